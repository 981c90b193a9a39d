"""Bridges for every short run of layers of the dense model, for the allocator to weigh against what else can be done.

They are fitted on the dense streams only; the one that a plan ends up with is fitted again on what the compressed model
feeds it (`sequential`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .architectures import Architecture
from .bridging import BridgeMoments, fit_bridge
from .budget import BRIDGE_EPS
from .store import Store
from .team import Team
from .walk import Walk

Run = tuple[int, int]
Report = Callable[[int, int], None]

# Lengths of runs that are weighed, in shallow and in deep models.
LENGTHS, DEEP_LENGTHS, DEEP = (1, 2, 3, 4), (1, 2, 4), 24
# Rank as a share of the hidden size, a multiple of 8 where it is more: one bridge then costs a small part of a layer.
RANK_SHARE = 8


def bridge_rank(hidden: int) -> int:
    """The rank at which bridges are weighed."""
    rank = max(1, hidden // RANK_SHARE)
    return rank - rank % 8 if rank >= 8 else rank


def runs_to_bridge(depth: int) -> list[Run]:
    """(first, last) of every run that is weighed; a bridge hangs on the layer before it, so none begins at layer 0."""
    lengths = LENGTHS if depth <= DEEP else DEEP_LENGTHS
    return [(first, first + length - 1) for first in range(1, depth) for length in lengths if first + length <= depth]


def fit_run_bridges(
    architecture: Architecture,
    tokens: torch.Tensor,
    store: Store,
    report: Report,
    team: Team | None = None,
    batch_tokens: int = 4096,
) -> list[Run]:
    """Fits a bridge of `bridge_rank` for every run and keeps it in the store as ``run-bridge/first-last``.

    Args:
        tokens: windows to fit on, [samples, seq_len]; with none (or fewer than processes) nothing is fitted.
    """
    team = team or Team()
    if len(tokens) < team.size:
        return []
    depth = len(architecture.layers)
    wanted = runs_to_bridge(depth)
    if all([_entry(run) in store for run in wanted]):  # noqa: C419 - every process asks for all
        return wanted
    hidden_size = architecture.model.config.hidden_size
    walk = Walk(architecture, team.windows(tokens).split(max(1, batch_tokens // tokens.shape[1])))
    streams = {0: list(walk.entering)}
    for layer in range(depth):
        streams[layer + 1] = walk.through(layer, streams[layer])
        for number, (first, last) in enumerate(run for run in wanted if run[1] == layer):
            moments = BridgeMoments(BRIDGE_EPS)
            for entering, leaving in zip(streams[first], streams[layer + 1], strict=True):
                moments.add(entering, leaving)
            moments.sum_over(team)
            tensors = {}
            if team.deals(number):
                u, v, bias = fit_bridge(moments, bridge_rank(hidden_size), sketched=True)
                tensors = {"u": u.cpu(), "v": v.cpu(), "bias": bias.cpu()}  # to others, and into the store
            tensors = team.broadcast(tensors, number % team.size)
            store.put(_entry((first, last)), tensors)
        streams = {start: stream for start, stream in streams.items() if start > layer + 1 - max(LENGTHS)}
        report(layer + 1, depth)
    return wanted


def bridged(store: Store, run: Run, hidden: torch.Tensor) -> torch.Tensor:
    """What the bridge of a run makes of the hidden states that enter the run."""
    tensors = {name: tensor.to(hidden.device) for name, tensor in store.get(_entry(run)).items()}
    h = hidden.float()
    x = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + BRIDGE_EPS)
    return (h + (x @ tensors["v"].T) @ tensors["u"].T + tensors["bias"]).to(hidden.dtype)


def _entry(run: Run) -> str:
    return f"run-bridge/{run[0]}-{run[1]}"
