"""Calls the steps of the method in order; holds no mathematics of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import taco_kernels

from .allocation import (
    Sizes,
    bridge_structure,
    layers_and_ratio,
    low_rank_structure,
    removal_structure,
    structure_parameters,
)
from .architectures import Architecture, LinearSite, slice_config
from .arguments import (
    check_given_model,
    check_given_tokenizer,
    fraction_or_none,
    given_layers,
    whole_number,
    whole_or_none,
)
from .attributed import Attributed
from .baselines import BASELINES, Workspace, choose_run, everywhere, make_budget, uniform_budget
from .budget import ByteCosts, Costs, allocate
from .calibration import (
    HELD_OUT_SHARE,
    Calibration,
    CalibrationSource,
    check_activations,
    check_tokens,
    load_calibration,
    recognised,
)
from .checkpoint import OF_THE_MODEL, parameter_count, weight_bytes
from .cost_budget import CostBudget, LatencyCosts, bridges_within, parse_keep
from .decomposition import numerical_errors_named
from .errors import TacoError, UnsupportedModelError
from .experts import EXPERTS, names_experts, open_modules, opened, set_idle
from .factorise import check_ranks, factorise
from .gathering import gathered, is_scattered
from .importance import MEASURES, LayerImportance, rank_layers
from .loss_curves import divergence_between
from .mapped import WeightSums, first_not_finite, is_mapped, not_finite, weight_sums
from .modeling import CompressedModel, as_compressed
from .one_shot import importance_and_attribution
from .plan import METHODS, Plan
from .progress import Progress, Silent
from .quantisation import quantise
from .replacement import drop_layers, structural_copy
from .sequential import held_out_windows
from .shapes import skeleton
from .suffix import SuffixRunner, evaluating
from .taco import BRIDGE_GRADIENT_DAMPING, GRADIENT_DAMPING, INPUT_DAMPING, Analysis, build_upwards
from .team import Team
from .texts import rows_digest
from .wide_products import in_wide_products
from .work_directory import check_work_directory, open_run, weights_digest

# What several processes can do together.
TEAM_METHODS = ("taco", "bridge", "removal")
# What factorises single experts; published methods leave them whole.
OPENING = ("taco", "paper", "svd")
# Greedy removal runs the set once per candidate: a part of it orders the layers as well.
GREEDY_SAMPLES = 16


def check_model(model: PreTrainedModel) -> Architecture:
    """Everything that can be wrong with a model, found before any long work.

    Raises:
        UnsupportedModelError: its structure.
        TacoError: already compressed, weights that are not finite, or a forward that does not run.
    """
    architecture = _check_structure(model)
    _check_weights(architecture, weight_sums(model))
    return architecture


def _check_structure(model: PreTrainedModel) -> Architecture:
    """What can be told without reading the weights."""
    check_given_model(model)
    _refuse_compressed(model)
    if is_scattered(model):
        raise TacoError(
            "The model's weights are not all here, or on several devices; compress() brings them together (plan=... "
            "carries out a plan), this does not."
        )
    architecture = Architecture(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TacoError(f"{name} has no data (meta device); load the model with its weights.")
    return architecture


def _refuse_compressed(model: PreTrainedModel) -> None:
    if isinstance(model, CompressedModel):
        raise TacoError("This model is compressed already; compress the dense model it came from.")


def _check_weights(architecture: Architecture, looked: list[WeightSums]) -> None:
    damaged = first_not_finite(looked)
    if damaged is not None:
        raise TacoError(f"{damaged} has NaN or infinite weights; the checkpoint is damaged.")
    _probe(architecture)


def _factorisable(architecture: Architecture, method: str, experts: str, timed: bool) -> Architecture:
    """The model as a method sees it: with single experts as linear maps of their own, or whole.

    Args:
        timed: whether the budget is one of time.

    Raises:
        TacoError: `experts` is unknown, or single ones cannot be timed.
    """
    if experts not in EXPERTS:
        raise TacoError(f"--experts must be one of {', '.join(EXPERTS)}, got {experts!r}.")
    if method not in OPENING or experts == "whole" or architecture.experts_block is None:
        return architecture
    if timed:
        raise TacoError(
            "--max-latency cannot price experts that are factorised one by one: which of them run depends on the "
            "tokens. Take --experts whole, or --keep."
        )
    return Architecture(opened(architecture.model))


def _probe(architecture: Architecture) -> None:
    """Runs two tokens forward and backward: every linear map must be seen, and layers must do what is assumed.

    Only the first token has a next one to be predicted. So in the last layer nothing may come back to the second,
    unless the first one sees it: then the model predicts from what it is to predict, and no score of it means anything.
    """
    tokens = torch.zeros((1, 2), dtype=torch.int64)
    sees_later = False

    def look(site: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
        nonlocal sees_later
        rows = gradient.reshape(-1, gradient.shape[-1])
        # an overflow gives NaN everywhere, and is named where it is found
        sees_later |= len(rows) == 2 and bool((rows[1].isfinite() & (rows[1] != 0)).any())

    try:
        runner = SuffixRunner(architecture, tokens, len(architecture.layers) - 1)
        runner.backward(architecture.sites([len(architecture.layers) - 1]), look)
    except Exception as error:
        raise TacoError(
            f"{type(architecture.model).__name__}: a trial run of two tokens failed "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); the model cannot be handled."
        ) from error
    if sees_later:
        raise UnsupportedModelError(
            f"{type(architecture.model).__name__}: tokens see those that come after them, so it is no causal language "
            "model; one of BERT's kind becomes one by is_decoder=True in its config.json."
        )


@in_wide_products
@evaluating
def make_plan(
    model: PreTrainedModel,
    calibration: Calibration,
    method: str = "taco",
    keep: float | None = None,
    layers: int | list[int] | None = None,
    compression_ratio: float | None = None,
    importance: str = "bi",
    bridge_rank: int | None = None,
    consistency: bool = True,
    progress: Progress | None = None,
    one_shot: bool = False,
    workspace: Workspace | None = None,
    _architecture: Architecture | None = None,
    cost: CostBudget | None = None,
    experts: str = EXPERTS[0],
) -> Plan:
    """Decides which layers are redundant and what replaces them; arguments as in `compress`."""
    progress = progress or Silent()
    _check_choices(method, importance, bridge_rank, one_shot)
    cost = cost or CostBudget()
    architecture = _factorisable(
        _architecture or check_model(model), method, experts, timed=cost.max_latency is not None
    )
    model = architecture.model
    chosen = _chosen(architecture, layers)
    measured: dict[str, Any]
    attributed: Attributed | None = None
    cost.check(method, keep, layers, bridge_rank, compression_ratio)
    if cost.keep_bytes is not None:
        keep = _share_of_parameters(model, cost.keep_bytes)
    count, ratio = 0, None
    if cost.max_latency is None:
        count, ratio = _count_and_ratio(architecture, method, keep, _how_many(layers), compression_ratio, bridge_rank)
    baseline = BASELINES.get(method)
    workspace = workspace or Workspace(model, calibration)
    depth = len(architecture.layers)
    if chosen is not None:
        redundant, measured = sorted(chosen), {"measure": "given"}
    elif everywhere(method, keep) or cost.max_latency is not None:
        redundant, measured = list(range(depth)), {"measure": "all layers"}
    elif method == "replaceme":
        redundant, distances = choose_run(workspace, count, progress)
        measured = {"measure": "cosine distance of runs", "scores": distances}
    else:
        importance = (baseline and baseline.importance) or importance
        tokens = workspace.team.windows(calibration.tokens)
        if importance == "greedy":  # one loss decides after the other: every process finds the same
            tokens = calibration.tokens[:GREEDY_SAMPLES]
        # a streamed model's layers are read one by one; passes over the whole model would read it once per batch
        if one_shot and importance == "bi" and ratio is not None and not is_mapped(model):
            with progress.step("layer importance and gradient attribution") as report:
                ranking, attributed = importance_and_attribution(architecture, tokens, count, ratio, report)
        else:
            step = f"layer importance ({importance})"

            def ranked() -> LayerImportance:
                with progress.step(step) as report:
                    return rank_layers(SuffixRunner(architecture, tokens, 0), importance, count, report, workspace.team)

            # how much each layer changes the hidden states does not depend on how many layers are to go
            ranking = workspace.keep(step if importance == "bi" else f"{step} of {count}", ranked)
        redundant, measured = sorted(ranking.order[:count]), dataclasses.asdict(ranking)
    options: dict[str, Any] = {}
    result: dict[str, Any] = {}
    if method == "removal" or (baseline is not None and baseline.removes):
        structure = removal_structure(architecture, redundant)
    elif method == "bridge" and cost.max_overhead is not None:
        within = bridges_within(model, redundant, cost.max_overhead, progress=progress)
        structure, result = within.structure, {"cost_budget": within.record}
    elif method == "bridge":
        structure = bridge_structure(architecture, redundant, bridge_rank)
    elif baseline is not None and baseline.allocate is not None:
        # entries of an index are int64, whatever the weights are
        index_size = 1.0 if cost.keep_bytes is None else torch.int64.itemsize / model.dtype.itemsize
        budget = make_budget(architecture, method, keep, redundant, ratio, index_size)
        decision = baseline.allocate(workspace, budget, progress)
        structure, options = decision.structure, decision.options
    elif cost.max_latency is not None:
        structure = removal_structure(architecture, [])  # taco's allocator decides below
    else:
        assert ratio is not None
        structure = low_rank_structure(architecture, redundant, ratio)
        workspace.attributed = None if attributed is None else (structure, attributed)
    parameters = structure_parameters(architecture, structure)
    if one_shot:
        options = {"one_shot": True}
    if method == "bridge":
        options = {"gradient_damping": BRIDGE_GRADIENT_DAMPING, "consistency": consistency}
    if method == "taco":
        options = {
            "input_damping": INPUT_DAMPING,
            "gradient_damping": GRADIENT_DAMPING,
            "consistency": consistency,
        }
        # with `layers`, the budget is what the paper's method needs for the same arguments
        most: float = parameters if keep is None else int(keep * parameter_count(model))
        costs: Costs | None = None
        if cost.keep_bytes is not None:
            most = cost.keep_bytes
            costs = ByteCosts(Sizes.of(architecture), model.dtype.itemsize, weight_bytes(model))
        elif cost.max_latency is not None:  # measured before the long work: the budget may be met already
            costs = LatencyCosts(model, progress=progress)
            most = costs.budget(cost.max_latency)
        curves = _analysis(workspace, model, calibration).curves(options, progress)
        allocation = allocate(architecture, curves, most, chosen, costs)
        structure, parameters = allocation.structure, allocation.parameters
        result = {"budget": most, "predicted_loss": allocation.predicted_loss}
        if costs is not None:
            result["budget_unit"] = costs.unit
        if isinstance(costs, LatencyCosts):
            result["cost_budget"] = costs.record(most, allocation.cost)
            costs.costs.close()
    return Plan(
        method=method,
        structure=structure,
        redundant=tuple(redundant),
        compression_ratio=ratio,
        importance=_plain(measured),
        calibration=calibration.describe(),
        options=options,
        source=describe_source(model),
        result={"parameters": parameters, "share": parameters / parameter_count(model), **result},
        versions=_versions(),
    )


def _check_choices(method: str, importance: str, bridge_rank: int | None, one_shot: bool) -> None:
    """Raises TacoError for words that are unknown and options of another method."""
    if method not in METHODS:
        raise TacoError(f"--method must be one of {', '.join(METHODS)}, got {method!r}.")
    if importance not in MEASURES:
        raise TacoError(f"--importance must be one of {', '.join(MEASURES)}, got {importance!r}.")
    if bridge_rank is not None and method != "bridge":
        raise TacoError("--bridge-rank goes with --method bridge.")
    if one_shot and method != "paper":
        raise TacoError("--one-shot goes with --method paper (the other methods need one pass at most anyway).")


def _chosen(architecture: Architecture, layers: int | list[int] | None) -> list[int] | None:
    """The layers that were named; None where there are none, or only their number.

    Raises:
        TacoError: one is named twice, or not there.
    """
    if not isinstance(layers, (list, tuple)):
        return None
    chosen, depth = list(layers), len(architecture.layers)
    if len(set(chosen)) != len(chosen) or not all(0 <= layer < depth for layer in chosen):
        raise TacoError(f"The layers to replace must be different and in 0..{depth - 1}, got {chosen}.")
    return chosen


def _fitting(architecture: Architecture, plan: Plan) -> Architecture:
    """What a plan's structure names: the model, with its experts opened where the plan factorises them one by one.

    Raises:
        TacoError: the plan is for another model.
    """
    depth = len(architecture.layers)
    if plan.structure.source_layers != depth:
        raise TacoError(f"The plan is for a model of {plan.structure.source_layers} layers, this one has {depth}.")
    if names_experts(plan.structure):
        architecture = Architecture(opened(architecture.model))
    check_ranks(architecture, plan.structure)
    return architecture


def _versions() -> dict[str, str]:
    return {
        "taco_kernels": taco_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _calibration_name(calibration: CalibrationSource) -> str:
    """What tells one calibration, as `recognised` gives it, from another before it is loaded."""
    if isinstance(calibration, torch.Tensor):
        calibration = Calibration(calibration, "tokens", 0)
    if isinstance(calibration, Calibration):
        return calibration.digest
    return str(calibration) if isinstance(calibration, (str, Path)) else rows_digest(calibration)


def _count_and_ratio(
    architecture: Architecture,
    method: str,
    keep: float | None,
    layers: int | None,
    compression_ratio: float | None,
    bridge_rank: int | None,
) -> tuple[int, float | None]:
    """As `layers_and_ratio`; a baseline that compresses all layers alike has no ratio.

    Raises:
        TacoError: out of range, contradictory, or not reachable.
    """
    if everywhere(method, keep) and layers is None and compression_ratio is None:
        assert keep is not None
        uniform_budget(architecture, keep, method)
        return len(architecture.layers), None
    return layers_and_ratio(Sizes.of(architecture), method, keep, layers, compression_ratio, bridge_rank)


def _share_of_parameters(model: PreTrainedModel, keep_bytes: int) -> float:
    """The share of the parameters that leaves so many bytes: what goes has the model's dtype, the rest need not."""
    return 1 - (weight_bytes(model) - keep_bytes) / (model.dtype.itemsize * parameter_count(model))


def _how_many(layers: int | list[int] | None) -> int | None:
    return len(layers) if isinstance(layers, (list, tuple)) else layers


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _without_paths(values: Any) -> Any:
    """A config without where it was read from, in configs inside of it too."""
    if not isinstance(values, dict):
        return values
    return {key: _without_paths(value) for key, value in values.items() if key not in ("_name_or_path", "name_or_path")}


def _config_of(model: PreTrainedModel) -> Any:
    """A model's config as JSON has it (string keys), or a plan would differ from itself once it has been saved."""
    return _without_paths(json.loads(model.config.to_json_string(use_diff=False)))


def describe_source(model: PreTrainedModel) -> dict[str, Any]:
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return {
        # of a local path only the last part: a plan must not carry its author's directories
        "name": Path(name).name if Path(name).is_absolute() or Path(name).exists() else name,
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "layers": model.config.num_hidden_layers,
        "parameters": parameter_count(model),
        "bytes": weight_bytes(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": _config_of(model),
    }


@in_wide_products
@evaluating
def apply_plan(
    model: PreTrainedModel,
    plan: Plan,
    calibration: Calibration,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> PreTrainedModel:
    """Carries a plan out: a compressed model that shares every untouched weight with `model`, which stays as it is.

    Raises:
        UnsupportedModelError: its structure.
        TacoError: the plan is for another kind of model, or the model is compressed already or not all here.
    """
    _check_structure(model)  # of weights elsewhere hooks would bring, and run, the layers that are to be replaced
    return _carry_out(model, plan, calibration, progress or Silent(), workspace or Workspace(model, calibration))[0]


def _analysis(workspace: Workspace, model: PreTrainedModel, calibration: Calibration) -> Analysis:
    """Taco mode's statistics of the dense model, shared like those of the baselines."""
    # of a mixture of experts some methods see the single ones, others the whole block
    key = "taco, experts open" if next(open_modules(model), None) is not None else "taco"
    return workspace.keep(key, lambda: Analysis(model, calibration, workspace.store, workspace.team))


@in_wide_products  # a scattered model that was gathered is not the one that `compress` was called with
def _carry_out(
    model: PreTrainedModel, plan: Plan, calibration: Calibration, progress: Progress, workspace: Workspace
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The compressed model, and what its making has to say for the plan's result."""
    record: dict[str, Any] = {}
    int8 = plan.structure.int8
    if int8:  # these are made of floating factors, like all others
        plan = dataclasses.replace(plan, structure=dataclasses.replace(plan.structure, int8={}))
    model = _fitting(Architecture(model), plan).model
    working = structural_copy(model)
    architecture = Architecture(working)
    baseline = BASELINES.get(plan.method)
    if baseline is not None and baseline.carry_out is not None:
        baseline.carry_out(workspace, architecture, plan, progress)
    elif plan.method in ("taco", "bridge"):
        record = build_upwards(
            model, architecture, plan, calibration, progress, _analysis(workspace, model, calibration)
        )
    elif plan.structure.low_rank:
        factorised = sorted(plan.structure.low_rank)
        runner = SuffixRunner(architecture, calibration.tokens, factorised[0], starts=factorised)
        known, workspace.attributed = workspace.attributed, None  # for the call that planned it; it is large
        attributed = None
        if known is not None and known[0] == plan.structure and plan.options.get("one_shot"):
            attributed = known[1]
        factorise(architecture, plan, runner, progress, workspace.store, attributed)
    set_idle(working, False)
    kept = list(plan.structure.kept)
    drop_layers(architecture, kept)
    compressed = as_compressed(working, slice_config(model.config, kept), plan.structure)
    name = not_finite(compressed)
    if name is not None:
        raise TacoError(f"The factors of {name} came out as NaN or infinite; try another --calibration.")
    return quantise(compressed, int8) if int8 else compressed, record


@numerical_errors_named()
@in_wide_products
@evaluating
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = "taco",
    keep: float | str | None = None,
    layers: int | list[int] | None = None,
    compression_ratio: float | None = None,
    calibration: CalibrationSource = "self",
    samples: int = 64,
    seq_len: int | None = None,
    seed: int = 0,
    importance: str = "bi",
    bridge_rank: int | None = None,
    one_shot: bool = False,
    consistency: bool = True,
    plan: Plan | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    max_overhead: float | None = None,
    max_latency: str | float | None = None,
    team: Team | None = None,
    experts: str = EXPERTS[0],
) -> tuple[PreTrainedModel, Plan]:
    """Compresses a language model.

    Args:
        model: a decoder-only transformers model in float32, bfloat16 or float16; it stays as it is, and the
            compressed model shares the weights of its untouched layers. Of a model that is sharded over processes
            (FSDP2, tensor parallelism: all of them must call this) or offloaded by accelerate, the compressed model
            is a whole one, mapped from files (`gathering`).
        tokenizer: needed when calibrating on text.
        method: "taco" (one budget over the whole model, factors weighted on both sides, re-fitted), "paper"
            (arXiv 2501.00339), "svd" (plain), "removal" (layers out, nothing in their place) or "bridge" (layers out,
            one low-rank map per run of them); or a published method to compare with (`baselines.BASELINES`), which
            with `keep` compresses all layers alike.
        keep: share of all parameters that may remain, or bytes as text ("4.2GB"); or
        layers: number of redundant layers, or which ones; with
        compression_ratio: the paper's c for their matrices (default 0.7).
        calibration: "self" (text the model writes), "wikitext2", "ptb", "c4", a text file or one of JSON lines, a
            list of texts, rows of a data set (dicts with ``text``, ``messages``, or ``prompt`` and ``completion``),
            int64 tokens [samples, seq_len], or a `Calibration`.
        samples, seq_len, seed: number and length of calibration windows, and the seed of their draw.
        importance: how redundant layers are found: "bi", "angular" or "greedy".
        bridge_rank: rank of the bridges; default: all of them cost 0.3% of the layers that stay.
        max_overhead: method "bridge": instead of a rank, what all bridges may cost over bare removal, in measured
            time (0.003 is 0.3%), see `cost_budget`.
        max_latency: method "taco": a budget of measured time instead of `keep`; a fraction of the dense model's
            latency (0.8) or milliseconds per decoded token ("12.5ms").
        one_shot: paper method only: one pass over the dense model attributes all maps, instead of one pass per block
            on the model compressed so far.
        progress: is told of every step (`progress.Progress`); default: nobody is.
        workspace: statistics of the dense model, to be shared by calls on the same model and calibration.
        consistency: methods "taco" and "bridge" re-fit the maps that write to the residual stream (see `consistency`).
        plan: carries out this plan instead of making one (method, keep, layers ... are then not looked at).
        work_dir: keeps finished steps in this directory, so that the same call with `resume` goes on from them after
            an interruption and gives the same bits. The compressed model's factors are mapped from its files: delete
            it once the model is saved (`taco-svd compress` does both).
        resume: goes on from what `work_dir` has.
        team: the processes that do this together (methods taco, bridge and removal), each with a `work_dir` of its
            own; all return the same model.
        experts: of a mixture: "factorised" (methods taco, paper and svd: each expert's maps like any other) or "whole".

    Returns:
        (compressed model, plan); save with `taco_svd.save_compressed` or the model's `save_pretrained`. Of methods
        "taco" and "bridge" on a CPU, what a large model's layers do not share with `model` is mapped from temporary
        files (deleted already), so that it takes memory only where it is used.

    Raises:
        TacoError: anything wrong with the arguments, the model, the tokenizer or the text, before long work.
    """
    progress = progress or Silent()
    check_given_model(model)
    check_given_tokenizer(tokenizer)
    layers, samples, seed = given_layers(layers), whole_number("samples", samples), whole_number("seed", seed)
    seq_len, bridge_rank = whole_or_none("seq_len", seq_len), whole_or_none("bridge_rank", bridge_rank)
    if not isinstance(keep, str):
        keep = fraction_or_none("keep", keep)
    compression_ratio = fraction_or_none("compression_ratio", compression_ratio)
    max_overhead = fraction_or_none("max_overhead", max_overhead)
    if plan is not None and not isinstance(plan, Plan):
        raise TacoError(f"plan must be a Plan, got {type(plan).__name__}; Plan.load reads one from a file.")
    if work_dir is not None and not isinstance(work_dir, (str, Path)):
        raise TacoError(f"work_dir must be the name of a directory, got {work_dir!r:.80}.")
    share, keep_bytes = (None, None) if keep is None else parse_keep(keep)
    budget = CostBudget(keep_bytes, max_overhead, max_latency)
    team = team or Team()
    if not isinstance(calibration, (str, Path)) or (team.rank == 0 and not resume):  # see where it is loaded
        calibration = recognised(calibration)
    if team.size > 1 and plan is None and (max_overhead is not None or max_latency is not None):
        raise TacoError(
            "A budget of time is measured by one process that has the machine to itself: start one, or give --keep."
        )
    if team.size > 1 and (method if plan is None else plan.method) not in TEAM_METHODS:
        raise TacoError(f"Several processes work on --method {', '.join(TEAM_METHODS)} only; start one for {method}.")
    if work_dir is not None:
        check_work_directory(work_dir, resume)
        if workspace is not None:
            raise TacoError("A workspace serves many runs, a work directory keeps the steps of one; pass one of them.")
    elif resume:
        raise TacoError("resume needs the work_dir of the run that was stopped.")
    scattered = is_scattered(model)
    if scattered:
        _refuse_compressed(model)
        if workspace is not None:
            raise TacoError("The model's weights are not all here; a workspace serves only a model that is whole.")
    if isinstance(calibration, (torch.Tensor, Calibration)):
        check_tokens(calibration if isinstance(calibration, torch.Tensor) else calibration.tokens, model)
    # all that follows until the weights are read goes by shapes
    architecture = Architecture(skeleton(model.config, model.dtype)) if scattered else _check_structure(model)
    if plan is not None:
        _fitting(architecture, plan)
    else:  # what the arguments alone can tell, before calibration takes its time
        _check_choices(method, importance, bridge_rank, one_shot)
        _chosen(architecture, layers)
        budget.check(method, share, layers, bridge_rank, compression_ratio)
        seen = _factorisable(architecture, method, experts, timed=max_latency is not None)
        if max_latency is None:
            part = share
            if keep_bytes is not None:
                whole = weight_bytes(model)
                if not 0 < keep_bytes < whole:
                    raise TacoError(f"--keep {keep} must be above 0 and below the model's {whole:,} bytes of weights.")
                part = _share_of_parameters(model, keep_bytes)
            _count_and_ratio(seen, method, part, _how_many(layers), compression_ratio, bridge_rank)
    if scattered:
        with progress.step("bringing the weights together") as report:
            model = gathered(model, None if work_dir is None else Path(work_dir).absolute().parent, team, report)
        architecture = _check_structure(model)
    with progress.step("looking at the weights"):
        looked = weight_sums(model)  # once: of a streamed model that is all that is in its files
        _check_weights(architecture, looked)
    store = None
    if work_dir is not None:
        arguments = {
            "method": method,
            "keep": keep,
            "layers": layers,
            "compression_ratio": compression_ratio,
            "calibration": _calibration_name(calibration),
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
            "importance": importance,
            "bridge_rank": bridge_rank,
            "one_shot": one_shot,
            "consistency": consistency,
            "max_overhead": max_overhead,
            "max_latency": max_latency,
            "experts": experts,
            "plan": None if plan is None else hashlib.sha256(json.dumps(plan.to_dict()).encode()).hexdigest(),
        }
        digest = hashlib.sha256(json.dumps(_config_of(model), sort_keys=True).encode()).hexdigest()
        run = {**arguments, "weights": weights_digest(looked), "config": digest, "versions": _versions()}
        run["processes"] = team.size
        store = open_run(work_dir, run, resume, team)
        if "calibration" in store:
            kept = store.note("calibration")
            calibration = Calibration(store.get("calibration")["tokens"], kept["source"], kept["seed"])
    if not isinstance(calibration, Calibration):
        with progress.step("calibration text") as report:
            if team.rank == 0:
                calibration = load_calibration(calibration, model, tokenizer, samples, seq_len, seed, report)
        calibration = team.broadcast(calibration)
        assert isinstance(calibration, Calibration)
    if team.size > 1 and len(calibration.tokens) < HELD_OUT_SHARE * team.size:
        raise TacoError(
            f"{team.size} processes need at least {HELD_OUT_SHARE * team.size} calibration windows, there are "
            f"{len(calibration.tokens)}."
        )
    if store is not None and "calibration" not in store:
        note = {"source": calibration.source, "seed": calibration.seed}
        store.put("calibration", {"tokens": calibration.tokens}, note)
    check_activations(model, calibration)
    if workspace is None:
        workspace = Workspace(model, calibration, store, team)
    elif not workspace.is_for(model, calibration):
        raise TacoError("The workspace belongs to another model or another calibration set.")
    if plan is None and store is not None and "plan" in store:
        plan = Plan.from_dict(store.note("plan"))
    if plan is None:
        plan = make_plan(
            model,
            calibration,
            method,
            share,
            layers,
            compression_ratio,
            importance,
            bridge_rank,
            consistency,
            progress,
            one_shot,
            workspace,
            architecture,
            budget,
            experts,
        )
        plan = team.broadcast(plan)  # measured costs differ from process to process
        assert plan is not None
        if store is not None:
            store.put("plan", {}, plan.to_dict())
    compressed, record = _carry_out(model, plan, calibration, progress, workspace)
    windows = held_out_windows(calibration.tokens)
    if plan.method in ("taco", "bridge") and len(windows) and "measured_loss" not in record:
        with progress.step("measuring the loss on held-out windows"):
            record["measured_loss"] = divergence_between(model, compressed, windows)
    plan = dataclasses.replace(
        plan,
        calibration=calibration.describe(),
        source=describe_source(model),
        result={
            **{key: value for key, value in plan.result.items() if key not in OF_THE_MODEL},
            **record,
            "parameters": parameter_count(compressed),
            "bytes": weight_bytes(compressed),
            "dtype": str(compressed.dtype).removeprefix("torch."),
            "share": parameter_count(compressed) / parameter_count(model),
        },
    )
    compressed.taco_plan = plan  # type: ignore[assignment]
    return compressed, plan
