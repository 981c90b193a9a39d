"""Healing: trains what stands for the removed parts, and nothing else, to reach the dense model's predictions.

The teacher is the dense model, so no labels are needed and every token gives a whole distribution as its target:

    logits:  mean over tokens of KL(dense || compressed)
    hidden:  mean over layers of |h - h_dense|^2 / |h_dense|^2, behind every kept layer from the lowest replacement up

Knowledge distillation (Hinton et al., arXiv 1503.02531) with all but the factors frozen; the compressed model keeps
its size and its kernels. AdamW with a cosine schedule. A run is a function of its arguments: the windows, their order
and the learning rate depend on seed and step alone, so that a run that was killed and goes on gives the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .architectures import Architecture
from .calibration import check_seed, unmarked
from .decomposition import full_svd
from .divergence import kl_per_token
from .drift import depth_map, recorded
from .errors import TacoError
from .int8_linear import Int8LowRankLinear
from .loss import NOTHING, counted_labels, counted_positions
from .modeling import CompressedModel
from .predictions import Predictions
from .replacement import LowRankBridge, LowRankLinear
from .structure import Structure
from .wide_products import in_wide_products

OBJECTIVES = ("logits", "hidden")
# Share of the steps in which the learning rate rises from 0: Adam's second moments are noise at first.
WARM_UP = 0.02
# Learning rates that are tried: doubled from the least, which a model wants that is very close to the dense one. The
# gradient is that of so many batches, its steps are judged on others.
LEAST_RATE, RATES = 1.25e-4, 11
GRADIENT_BATCHES, JUDGING_BATCHES = 4, 2
# A bridge's few directions want larger relative steps than the factors of a layer, and than one step along the signs of
# the gradient bears (classics-16l, 100 k tokens: 0.1; 0.03 and 0.3 were worse).
BRIDGE_STEP = 3.0


@dataclass(frozen=True)
class HealingOptions:
    """What a healing run does; the run's files repeat it, and a run goes on only under the same options.

    Attributes:
        tokens: training tokens in all (the last step may go over by less than one batch).
        objective: one of `OBJECTIVES`.
        lr: AdamW's peak step, relative to the root mean square of each parameter at the start; 0: found before the
            first step (`find_learning_rate`).
        batch: windows per step.
        seq_len: tokens per window; 0: as many as in calibration (filled in before the run).
        seed: of the draw and order of windows.
        held_out: windows that are never trained on (at most a tenth of all that are drawn).
        evaluations: how often the held-out windows are evaluated on the way (and once before the first step).
        norms: also train the gains (and biases) of the kept layers' norms.
        completions_only: of conversations, or prompts with completions, only what a model is to write counts (for
            "logits"; hidden states are those of all tokens).
    """

    tokens: int = 1_000_000
    objective: str = "logits"
    lr: float = 0.0
    batch: int = 8
    seq_len: int = 0
    seed: int = 0
    held_out: int = 64
    evaluations: int = 10
    norms: bool = False
    completions_only: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.objective not in OBJECTIVES:
            raise TacoError(f"--objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if min(self.tokens, self.batch, self.held_out, self.evaluations) < 1:
            raise TacoError("Tokens, batch, held-out windows and evaluations must be at least 1.")
        if self.seq_len < 0 or self.seq_len == 1:
            raise TacoError(f"--seq-len must be at least 2 (a token and the one it predicts), got {self.seq_len}.")
        if not 0 <= self.lr < 10:
            raise TacoError(
                f"--lr must be between 0 and 10 (relative to the size of the factors; 0: found), got {self.lr}."
            )

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch * self.seq_len))

    def learning_rate(self, step: int) -> float:
        """Relative step size of step 0, 1, ... : linear warm-up, then half a cosine down to zero."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def evaluation_steps(self) -> set[int]:
        """After how many steps the held-out windows are evaluated; 0 and the last always."""
        return {round(i * self.steps / self.evaluations) for i in range(self.evaluations + 1)}

    def to_dict(self) -> dict[str, Any]:
        # runs and plans from before there was a choice say nothing of it
        return {key: value for key, value in asdict(self).items() if key != "completions_only" or value}


# -- what is trained -----------------------------------------------------------------------------------------


def replacements(model: PreTrainedModel) -> dict[str, LowRankLinear | LowRankBridge]:
    """The modules that stand for something, by name."""
    kinds = (LowRankLinear, LowRankBridge)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def trainable_names(model: PreTrainedModel, norms: bool = False) -> list[str]:
    """Names of the parameters that healing trains.

    Raises:
        TacoError: there is none.
    """
    owners = set(replacements(model))
    if norms:
        architecture = Architecture(model)
        inside = {id(module) for layer in architecture.layers for module in layer.modules()}
        owners |= {
            name for name, module in model.named_modules() if id(module) in inside and "Norm" in type(module).__name__
        }
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in owners]
    if any(isinstance(module, Int8LowRankLinear) for module in model.modules()):
        raise TacoError("This model's factors are 8-bit integers, which are not trained: heal first, then quantize.")
    if not names:
        raise TacoError(
            "Nothing stands for the removed layers of this model, so there is nothing to heal; "
            "compress with --method bridge or taco, or pass --norms."
        )
    return names


@torch.no_grad()
def balance(module: LowRankLinear | LowRankBridge) -> None:
    """Chooses among all factors with the product u v those with u^T u = v v^T, in place.

    Adam's step does not depend on a parameter's scale; between factors of different scale it would train one of them
    only. Computed without forming the product: QR of both factors, SVD of the small core, in float64.
    """
    u, v = module.u.double(), module.v.double()
    q_left, r_left = torch.linalg.qr(u)
    q_right, r_right = torch.linalg.qr(v.T)
    left, sigma, right = full_svd(r_left @ r_right.T)
    root = sigma.sqrt()
    rank = module.rank
    if len(sigma) < rank:  # rank above a side of the matrix: the rest of the directions stays zero
        return
    module.u.copy_((q_left @ left * root)[:, :rank])
    module.v.copy_((root[:, None] * (right @ q_right.T))[:rank])


def prepare(model: PreTrainedModel, names: list[str]) -> dict[str, nn.Parameter]:
    """Freezes everything but the named parameters, which become float32; factors are balanced."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for name, module in replacements(model).items():
        if f"{name}.u" in names and bool(module.u.any()) and bool(module.v.any()):
            module.float()
            # pivoted factors have no freedom left: one of them is the identity on some inputs
            if getattr(module, "pivot", None) is None:
                balance(module)
    trained = {}
    for name in names:
        parameter = parameters[name]
        # in place: the optimiser keeps float32 masters whatever dtype the frozen weights have
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
        trained[name] = parameter
    return trained


def step_scale(parameter: torch.Tensor, module: nn.Module) -> float:
    """What the learning rate is relative to: the root mean square of a parameter.

    Where that is zero (an identity bridge's u), that of its module's other parameters.
    """
    for tensor in (parameter, *module.parameters()):
        scale = float(tensor.detach().double().pow(2).mean().sqrt())
        if scale > 0:
            return scale
    return 1.0


# -- the objective -------------------------------------------------------------------------------------------


def structure_of(model: PreTrainedModel) -> Structure:
    assert isinstance(model, CompressedModel)
    return model.structure


class Objective:
    """The loss of a batch of windows; holds the teacher."""

    def __init__(self, student: PreTrainedModel, dense: PreTrainedModel, kind: str) -> None:
        self.student, self.dense, self.kind = student, dense, kind
        structure = structure_of(student)
        touched = [structure.position(layer) for layer in structure.low_rank]
        touched += [structure.position(bridge.after) for bridge in structure.bridges]
        first = min(touched, default=0)
        # position in the compressed stack -> layer of the dense model after which the states should agree
        self.anchors = {position: end for position, end in depth_map(structure).items() if position >= first}
        self.device = student.device
        self.dtype = dense.dtype

    def _autocast(self) -> AbstractContextManager[Any]:
        """Frozen weights may have 16 bits, the factors never do."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean loss of int64 windows [rows, seq_len] as a scalar with a graph to the trained parameters."""
        return self._hidden(windows) if self.kind == "hidden" else self._logits(windows)

    def _predictions(self, windows: torch.Tensor) -> tuple[Predictions, Predictions]:
        """The dense model's and the student's, at every position: both see the same tokens, so the last counts too."""
        ids = unmarked(windows)[0].to(self.device)
        with torch.no_grad():
            target = Predictions(self.dense, ids, last=True)
        with self._autocast():
            return target, Predictions(self.student, ids, last=True)

    def _logits(self, windows: torch.Tensor) -> torch.Tensor:
        target, found = self._predictions(windows)
        counted, count = self._counted(windows)

        def mean_divergence(logits: torch.Tensor, piece: slice) -> torch.Tensor:
            with torch.autocast(self.device.type, enabled=False):
                with torch.no_grad():
                    truth = target.logits(piece)
                return kl_per_token(truth, logits).where(counted[piece], 0).sum() / max(1, count)

        with self._autocast():
            return found.summed(mean_divergence)

    def _counted(self, windows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Which positions count, bool [rows * seq_len], and how many."""
        counted = counted_positions(unmarked(windows)[1]).flatten()
        return counted.to(self.device), int(counted.sum())

    def _hidden(self, windows: torch.Tensor) -> torch.Tensor:
        ids = unmarked(windows)[0].to(self.device)
        with torch.no_grad(), recorded(self.dense, self.anchors.values()) as targets:
            self.dense.base_model(input_ids=ids, use_cache=False)
        with self._autocast(), recorded(self.student, self.anchors) as states:
            self.student.base_model(input_ids=ids, use_cache=False)
        errors = []
        for position, end in self.anchors.items():
            target = targets[end].float()
            errors.append((states[position].float() - target).pow(2).sum() / target.pow(2).sum())
        return torch.stack(errors).mean()

    @torch.no_grad()
    def held_out(self, windows: torch.Tensor, batch: int) -> dict[str, float]:
        """Objective, KL to the dense model and next-token loss (nats per token) on held-out windows."""
        objective = kl = nll = 0.0
        counted_in_all = 0
        for rows in windows.split(batch):
            target, found = self._predictions(rows)
            counted, count = self._counted(rows)
            counted_in_all += count
            labels = found.labels.where(counted, NOTHING)
            for piece in found.pieces:
                with self._autocast():
                    logits = found.logits(piece)
                kl += float(kl_per_token(target.logits(piece), logits)[counted[piece]].double().sum())
                nll += float(functional.cross_entropy(logits.float(), labels[piece], reduction="sum"))
            if self.kind == "hidden":
                objective += float(self._hidden(rows)) * len(rows) / len(windows)
        kl, nll = kl / counted_in_all, nll / max(1, counted_labels(unmarked(windows)[1]))
        if self.kind == "logits":
            objective = kl
        return {"objective": objective, "kl": kl, "nll": nll}


def find_learning_rate(
    trained: dict[str, nn.Parameter],
    scales: dict[str, float],
    objective: Objective,
    windows: torch.Tensor,
    batch: int,
) -> float:
    """The relative step along the gradient's signs (Adam's first) that helps most on windows it was not taken on.

    A model near the dense one has a narrow valley, one that has lost much a wide one: the best rates of whole runs lie
    within a factor of two of what is found here, and two orders of magnitude apart (classics-16l, 100 k tokens: taco at
    keep 0.8 0.001, plain SVD at 0.85 0.01).

    Args:
        trained, scales: parameters and what their steps are relative to, by name; left as they were.
        windows: training windows, int64 [count, seq_len]; the first few batches are used.

    Raises:
        TacoError: a gradient that is not finite.
    """
    batches = windows[: (GRADIENT_BATCHES + JUDGING_BATCHES) * batch].split(batch)
    judging = batches[-JUDGING_BATCHES:]
    for rows in batches[:-JUDGING_BATCHES] or batches:
        objective(rows).backward()
    with torch.no_grad():
        start = {name: parameter.detach().clone() for name, parameter in trained.items()}
        signs = {name: parameter.grad.sign_() for name, parameter in trained.items() if parameter.grad is not None}
        if not all(bool(torch.isfinite(sign).all()) for sign in signs.values()):
            raise TacoError("Healing cannot begin: the gradient is not finite on the training text.")
        found, best = LEAST_RATE, math.inf
        for doubling in range(RATES):
            rate = LEAST_RATE * 2**doubling
            for name, sign in signs.items():
                trained[name].copy_(start[name]).sub_(sign, alpha=rate * scales[name])
            loss = sum(float(objective(rows)) for rows in judging)
            if not loss < best:
                break
            found, best = rate, loss
        for name, parameter in trained.items():
            parameter.copy_(start[name])
            parameter.grad = None
    return found


# -- the run -------------------------------------------------------------------------------------------------


@dataclass
class HealingState:
    """Where a run is: everything that the next step depends on.

    Attributes:
        step: steps done.
        factors, first, second: parameters and Adam's moments, by name; float32.
        best: the parameters that were best on the held-out windows, rounded to the checkpoint's dtype.
        best_step: after how many steps that was.
        curve: one record per evaluation: step, tokens, objective, kl, nll (held out), train (mean loss since the last).
        losses: training losses since the last evaluation.
        lr: the run's learning rate: the options' one, or what was found (from the start, so it is not kept in files).
    """

    step: int
    factors: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    best_step: int
    curve: list[dict[str, Any]]
    losses: list[float]
    lr: float = 0.0


def window_order(count: int, options: HealingOptions) -> torch.Tensor:
    """Which window each place of the run takes: int64 [steps * batch]; every window once before any comes again."""
    generator = torch.Generator().manual_seed(options.seed)
    needed = options.steps * options.batch
    rounds = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return torch.cat(rounds)[:needed]


@in_wide_products
def heal(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    options: HealingOptions,
    stored: torch.dtype,
    state: HealingState | None = None,
    keep: Callable[[HealingState], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HealingState:
    """Trains the replacements of `student` in place; the returned state has the best parameters and the curve.

    Args:
        student: a compressed model; its trained parameters become float32, all others stay as they are.
        dense: the model it came from, on the same device.
        windows, held_out: int64 [count, seq_len]; the latter are never trained on.
        stored: dtype of the checkpoint; held-out losses are those of parameters rounded to it.
        state: where an earlier run of the same options stopped.
        keep: called with the state after every evaluation (and whenever it wants to be: see `healing_files`).

    Raises:
        TacoError: nothing to train, or a loss that is not finite.
    """
    names = trainable_names(student, options.norms)
    trained = prepare(student, names)
    objective = Objective(student, dense, options.objective)
    modules = dict(student.named_modules())
    owners = {name: modules[name.rpartition(".")[0]] for name in trained}
    scales = {name: step_scale(parameter, owners[name]) for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW([{"params": [p]} for p in trained.values()], lr=0.0, weight_decay=0.0)
    student.eval()
    dense.eval()
    if not options.lr:
        found = find_learning_rate(trained, scales, objective, windows, options.batch)
        options = dataclasses.replace(options, lr=found)
    scales = {
        name: BRIDGE_STEP * scale if isinstance(owners[name], LowRankBridge) else scale
        for name, scale in scales.items()
    }
    order = window_order(len(windows), options)
    evaluations = options.evaluation_steps()
    if state is None:
        zeros = {name: torch.zeros_like(p.detach()) for name, p in trained.items()}
        state = HealingState(0, {}, zeros, {name: z.clone() for name, z in zeros.items()}, {}, 0, [], [])
        _evaluate(state, trained, objective, held_out, options, stored)
    else:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state.factors[name])
    state.lr = options.lr
    for name, parameter in trained.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.first[name].to(parameter.device),
            "exp_avg_sq": state.second[name].to(parameter.device),
        }
    while state.step < options.steps:
        rows = order[state.step * options.batch : (state.step + 1) * options.batch]
        rate = options.learning_rate(state.step)
        for group, name in zip(optimizer.param_groups, trained, strict=True):
            group["lr"] = rate * scales[name]
        optimizer.zero_grad(set_to_none=True)
        loss = objective(windows[rows])
        loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TacoError(f"Healing diverged at step {state.step} (loss {value}); try a smaller --lr.")
        optimizer.step()
        state.step += 1
        state.losses.append(value)
        _collect(state, trained, optimizer)
        if state.step in evaluations:
            _evaluate(state, trained, objective, held_out, options, stored)
        if keep is not None:
            keep(state)
        if progress is not None:
            progress(state.step, options.steps)
    return state


def _collect(state: HealingState, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Points the state at the live tensors (no copy: they are written to a file or not at all)."""
    for name, parameter in trained.items():
        state.factors[name] = parameter.detach()
        state.first[name] = optimizer.state[parameter]["exp_avg"]
        state.second[name] = optimizer.state[parameter]["exp_avg_sq"]


def _evaluate(
    state: HealingState,
    trained: dict[str, nn.Parameter],
    objective: Objective,
    held_out: torch.Tensor,
    options: HealingOptions,
    stored: torch.dtype,
) -> None:
    """Adds a point to the curve: the held-out loss of what would be saved now."""
    live = {name: parameter.detach().clone() for name, parameter in trained.items()}
    rounded = {name: tensor.to(stored) for name, tensor in live.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(rounded[name])
    found = objective.held_out(held_out, options.batch)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(live[name])
    train = math.fsum(state.losses) / len(state.losses) if state.losses else None
    tokens = state.step * options.batch * options.seq_len
    if not state.curve or found["objective"] < min(point["objective"] for point in state.curve):
        state.best = {name: tensor.cpu() for name, tensor in rounded.items()}
        state.best_step = state.step
    state.curve.append({"step": state.step, "tokens": tokens, "train": train, **found})
    state.losses = []
