"""Which layers matter least: block influence, angular distance over a run of layers, or greedy calibration loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .forwards import bypassed
from .suffix import SuffixRunner
from .team import Team
from .walk import Walk, layers_return_tuples

MEASURES = ("bi", "angular", "greedy")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerImportance:
    """How much each layer matters, and the order in which layers are taken out.

    Attributes:
        measure: ``"bi"``, ``"angular"`` or ``"greedy"``.
        scores: one per layer; small means redundant. For "greedy": the calibration loss (nats per token) that
            removing the layer adds, given those removed before it; for layers that stay, given all that are removed.
        order: layers from the most redundant on; at least as many as were asked for.
    """

    measure: str
    scores: tuple[float, ...]
    order: tuple[int, ...]


def lost_direction(entering: torch.Tensor, leaving: torch.Tensor) -> float:
    """Sum over tokens of 1 - cos(h_i, h_{i+1}): one batch's share of a layer's block influence."""
    cosine = torch.cosine_similarity(entering.float(), leaving.float(), dim=-1)
    return float((1 - cosine).double().sum())


def by_influence(scores: Sequence[float]) -> LayerImportance:
    """The ranking by block influence: layers from the lowest score on."""
    return LayerImportance("bi", tuple(scores), tuple(sorted(range(len(scores)), key=lambda layer: scores[layer])))


def block_influence(runner: SuffixRunner, progress: Progress | None = None, team: Team | None = None) -> list[float]:
    """BI_i = mean over tokens of 1 - cos(h_i, h_{i+1}), h_i entering layer i (ShortGPT, arXiv 2403.03853, eq. 1)."""
    sums = []
    for before, after in _streams(runner, progress):
        sums.append(sum(lost_direction(h, h2) for h, h2 in zip(before, after, strict=True)))
    team = team or Team()
    tokens = team.sum(runner.samples * runner.seq_len)
    return [team.sum(total) / tokens for total in sums]


def angular_distances(
    runner: SuffixRunner, length: int, progress: Progress | None = None, team: Team | None = None
) -> list[float]:
    """d_i = mean over windows of arccos(cos(h_i, h_{i+length})) / pi at the last token (arXiv 2403.17887, eq. 7).

    One value per start i of a run of `length` layers.
    """
    last: list[torch.Tensor] = []  # hidden states of the windows' last tokens, entering each layer
    for before, after in _streams(runner, progress):
        last.append(torch.cat([h[:, -1].double() for h in before]))
        final = torch.cat([h[:, -1].double() for h in after])
    last.append(final)
    distances = []
    for start in range(len(last) - length):
        cosine = torch.cosine_similarity(last[start], last[start + length], dim=-1)
        distances.append(float(torch.arccos(cosine.clamp(-1, 1)).sum()) / math.pi)
    team = team or Team()
    samples = team.sum(runner.samples)
    return [team.sum(total) / samples for total in distances]


def _streams(
    runner: SuffixRunner, progress: Progress | None
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Per layer the hidden states that enter and leave it, per batch; each layer is run for all batches at once."""
    architecture = runner.architecture
    walk = Walk(architecture, runner.batches, explicit_attention=True)
    hidden = list(walk.entering)
    for layer in range(len(architecture.layers)):
        leaving = walk.through(layer, hidden)
        if progress is not None:
            progress(layer + 1, len(architecture.layers))
        yield hidden, leaving
        hidden = leaving


def greedy_removal(runner: SuffixRunner, count: int, progress: Progress | None = None) -> tuple[list[int], list[float]]:
    """Takes out one layer after another, each time the one whose loss on the calibration set rises least (SLEB).

    Returns the layers in the order of removal, and for every layer the loss that it costs (see `LayerImportance`).
    """
    layers = runner.architecture.layers
    depth = len(layers)
    returns_tuple = layers_return_tuples(runner.architecture, runner.batches[0][:1, :2])
    removed: list[int] = []
    scores = [0.0] * depth
    base = runner.mean_loss()
    steps = sum(depth - round_ for round_ in range(count))
    done = 0
    for _ in range(count):
        trials: dict[int, float] = {}
        for layer in range(depth):
            if layer in removed:
                continue
            with bypassed([layers[index] for index in (*removed, layer)], returns_tuple):
                trials[layer] = runner.mean_loss()
            done += 1
            if progress is not None:
                progress(done, steps)
        best = min(trials, key=lambda layer: trials[layer])
        for layer, loss in trials.items():
            scores[layer] = loss - base
        removed.append(best)
        base = trials[best]
    return removed, scores


def rank_layers(
    runner: SuffixRunner, measure: str, count: int, progress: Progress | None = None, team: Team | None = None
) -> LayerImportance:
    """Orders layers from the most redundant on, by one of `MEASURES`; `count` is how many will be taken.

    With a `team` the runner has this process's windows ("greedy": all of them).
    """
    depth = len(runner.architecture.layers)
    if measure == "bi":
        return by_influence(block_influence(runner, progress, team))
    if measure == "angular":
        distances = angular_distances(runner, count, progress, team)
        start = min(range(len(distances)), key=lambda index: distances[index])
        # a layer's score: the best run that it is part of
        scores = [
            min(distances[first] for first in range(max(0, layer - count + 1), min(layer, depth - count) + 1))
            for layer in range(depth)
        ]
        return LayerImportance(measure, tuple(scores), tuple(range(start, start + count)))
    if measure == "greedy":
        order, scores = greedy_removal(runner, count, progress)
        return LayerImportance(measure, tuple(scores), tuple(order))
    raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
