"""ReplaceMe: a run of layers replaced by one linear map, which disappears into the layer before it.

D. Shopkhoev et al., "ReplaceMe: network simplification via depth pruning and transformer block linearization",
arXiv 2505.02819, section 2: the run of n layers whose end is nearest to its beginning in cosine distance is taken out.
With m the output of the MLP of the layer before the run, y what that layer adds it to, and l the hidden states after
the run, T = argmin E|T m + y - l|^2 (least squares, eq. 5) is multiplied into that MLP's last matrix. Nothing is added
to the model.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..architectures import Architecture, LinearSite, dense_weight, linear_shape
from ..decomposition import damped
from ..errors import TacoError, UnsupportedModelError
from ..plan import Plan
from ..progress import Progress
from ..suffix import SuffixRunner
from ..walk import comes_out
from .base import Baseline
from .workspace import Workspace

# Shrinkage of E[m m^T]: only against directions that the MLP never writes to.
RIDGE = 1e-6


def cosine_distances(runner: SuffixRunner, length: int) -> list[float]:
    """Mean over tokens of 1 - cos(h_i, h_{i + length}) for every start i of a run of `length` layers."""
    depth = len(runner.architecture.layers)
    sums = [0.0] * (depth - length + 1)
    tokens = 0
    for index in range(len(runner.batches)):
        hidden = runner.layer_inputs(index, range(depth + 1))
        for start in range(len(sums)):
            cosine = torch.cosine_similarity(hidden[start].float(), hidden[start + length].float(), dim=-1)
            sums[start] += float((1 - cosine).double().sum())
        tokens += hidden[0].shape[0] * hidden[0].shape[1]
    return [total / tokens for total in sums]


def choose_run(workspace: Workspace, length: int, progress: Progress) -> tuple[list[int], list[float]]:
    """The layers to take out, and the distance of every run.

    Raises:
        TacoError: when the run would begin at layer 0: there must be a layer before it.
    """
    if length > len(workspace.architecture.layers) - 1:
        raise TacoError("--method replaceme needs a layer before the run that is taken out.")
    with progress.step("cosine distance of runs") as report:
        distances = cosine_distances(workspace.runner(), length)
        report(1, 1)
    start = min(range(1, len(distances)), key=lambda index: distances[index])
    return list(range(start, start + length)), distances


def linear_bridge(mm: torch.Tensor, dm: torch.Tensor) -> torch.Tensor:
    """T = argmin E|T m - d|^2 from E[m m^T] and E[d m^T], [hidden, hidden]: float64."""
    return torch.linalg.solve(damped(mm, RIDGE, torch.float64), dm.double().T).T


def writes_to_stream(runner: SuffixRunner, site: LinearSite) -> bool:
    """Whether what a linear map puts out is added to the hidden states as it is, found by adding something to it."""
    module = runner.architecture.module(site)
    width = linear_shape(module)[0]
    if width != runner.architecture.model.config.hidden_size:
        return False
    plain = runner.layer_inputs(0, [site.layer + 1])[site.layer + 1].double()
    added_as_stored: list[torch.Tensor] = []

    def add(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        added = torch.linspace(-1, 1, width, device=output.device).to(output.dtype) * output.abs().mean()
        added_as_stored.append(added.double())
        return output + added

    handle = module.register_forward_hook(add)
    try:
        moved = runner.layer_inputs(0, [site.layer + 1])[site.layer + 1].double()
    finally:
        handle.remove()
    return comes_out(plain, moved, added_as_stored[0], runner.architecture.model.dtype)


def _carry_out(workspace: Workspace, architecture: Architecture, plan: Plan, progress: Progress) -> None:
    first, last = min(plan.structure.removed), max(plan.structure.removed)
    if list(plan.structure.removed) != list(range(first, last + 1)) or first == 0:
        raise TacoError("--method replaceme replaces one run of layers, which may not begin at layer 0.")
    runner = workspace.runner(first - 1)
    maps = architecture.sites([first - 1], "mlp")  # of a mixture there may be none: experts stay whole
    if not maps or not writes_to_stream(runner, maps[-1]):
        raise UnsupportedModelError(
            f"{type(architecture.model).__name__}: the MLP's output is not added to the residual stream as it is (a "
            "norm, a scale or a router comes in between), so ReplaceMe's map cannot be multiplied into it."
        )
    writer = maps[-1]
    dense = workspace.architecture.module(writer)
    written: list[torch.Tensor] = []
    mm = dm = torch.zeros((), dtype=torch.float64)
    tokens = 0
    with ExitStack() as stack, progress.step("linear bridge") as report:
        # the dense model is the caller's: no hook may stay on it, whatever happens
        stack.callback(dense.register_forward_hook(lambda _, __, output: written.append(output.detach())).remove)
        for index in range(len(runner.batches)):
            written.clear()
            hidden = runner.layer_inputs(index, [first, last + 1])
            m = written[0].flatten(0, -2).double()
            target = (hidden[last + 1].double() - hidden[first].double()).flatten(0, -2) + m
            mm, dm = mm + m.T @ m, dm + target.T @ m
            tokens += m.shape[0]
            report(index + 1, len(runner.batches))
    transform = linear_bridge(mm / tokens, dm / tokens)
    weight = dense_weight(dense).detach()
    bias = getattr(dense, "bias", None)
    folded: nn.Module = Conv1D(1, 1) if isinstance(dense, Conv1D) else nn.Linear(1, 1, bias=bias is not None)
    for name in ("in_features", "out_features", "nf", "nx"):
        if hasattr(dense, name):
            setattr(folded, name, getattr(dense, name))
    product = (transform @ weight.double()).to(weight.dtype)
    folded.weight = nn.Parameter(product.T.contiguous() if isinstance(dense, Conv1D) else product)
    if isinstance(bias, torch.Tensor):
        folded.bias = nn.Parameter((transform @ bias.detach().double()).to(bias.dtype))
    architecture.replace(writer, folded.train(dense.training))


REPLACEME = Baseline(
    "replaceme",
    "ReplaceMe: network simplification via depth pruning and transformer block linearization, arXiv 2505.02819",
    carry_out=_carry_out,
)
