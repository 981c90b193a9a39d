"""What several baselines need of one model and one calibration set, gathered once and shared.

`taco-svd compare` runs a dozen methods at several sizes: the statistics of the dense model are the same for all of
them, so one forward and backward pass gathers what any of them asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ..architectures import Architecture, LinearSite, linear_shape
from ..attributed import Attributed
from ..bench_memory import available_bytes
from ..calibration import Calibration, embedding_weight
from ..decomposition import Decomposition
from ..progress import Progress, Silent
from ..statistics import SecondMoments
from ..store import Store
from ..structure import Structure
from ..suffix import SuffixRunner
from ..team import Team

# LEMS drops the first and last eighth of each window from the gradients and clips token norms to this many means.
EDGE = 0.125
CLIP = (0.1, 10.0)

# What may be gathered, by the names of the attributes of `Moments`.
KINDS = ("second", "mean", "magnitude", "weight_gradient", "fisher_rows", "clipped_gradients")
# Of the device's free memory, what statistics may take that nobody has asked for yet.
SPARE_SHARE = 0.25

T = TypeVar("T")


@dataclass
class Moments:
    """Statistics of every linear map of the dense model, for all calibration tokens; of what was not gathered, nothing.

    Attributes:
        second: E[x x^T] and E[g g^T] (see `statistics.SecondMoments`).
        mean: E[x], float64 [in].
        magnitude: E[|x|], float64 [in].
        weight_gradient: dL/dW of the set's mean loss, float32 [out, in].
        fisher_rows: sum over the columns of E[(dL/dW)^2], the expectation over windows: float64 [out], up to a factor.
        clipped_gradients: E[g g^T] with window edges left out and token norms clipped, float32 [out, out],
            up to a factor.
    """

    second: SecondMoments = field(default_factory=SecondMoments)
    mean: dict[LinearSite, torch.Tensor] = field(default_factory=dict)
    magnitude: dict[LinearSite, torch.Tensor] = field(default_factory=dict)
    weight_gradient: dict[LinearSite, torch.Tensor] = field(default_factory=dict)
    fisher_rows: dict[LinearSite, torch.Tensor] = field(default_factory=dict)
    clipped_gradients: dict[LinearSite, torch.Tensor] = field(default_factory=dict)

    def inputs(self, site: LinearSite) -> torch.Tensor:
        """E[x x^T]: [in, in], float32."""
        return self.second.inputs(site)

    def collect(
        self, tokens: torch.Tensor, kinds: Iterable[str] = KINDS
    ) -> Callable[[LinearSite, torch.Tensor, torch.Tensor], None]:
        """The callback for `SuffixRunner.backward`; `tokens` is the whole set, [samples, seq_len]."""
        count, length = tokens.numel(), tokens.shape[1]
        wanted = frozenset(kinds)
        of_weights = bool(wanted & {"weight_gradient", "fisher_rows"})

        def add(kind: dict[LinearSite, torch.Tensor], site: LinearSite, value: torch.Tensor) -> None:
            kind[site] = kind[site].add_(value) if site in kind else value

        def callback(site: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
            if "second" in wanted:
                wide = x.dtype == torch.float64  # the sums are in float32
                self.second(site, *((x.float(), gradient.float()) if wide else (x, gradient)))
            rows = x.flatten(0, -2)
            if "mean" in wanted:
                add(self.mean, site, rows.sum(0, dtype=torch.float64) / count)
            if "magnitude" in wanted:
                add(self.magnitude, site, rows.abs().sum(0, dtype=torch.float64) / count)
            if not of_weights and "clipped_gradients" not in wanted:
                return
            # one product per window: squares of windows do not cancel, their sum is the weight's gradient
            # (OPT hands its MLP the tokens of all windows in one row)
            windows = [value.reshape(-1, length, value.shape[-1]).float() for value in (x, gradient)]
            for x_window, g_window in zip(*windows, strict=True) if of_weights else ():
                weight_gradient = g_window.T @ x_window
                if "fisher_rows" in wanted:
                    add(self.fisher_rows, site, weight_gradient.square().sum(1, dtype=torch.float64))
                if "weight_gradient" in wanted:
                    add(self.weight_gradient, site, weight_gradient)
            if "clipped_gradients" in wanted:
                add(self.clipped_gradients, site, clipped_second_moment(windows[1]))

        return callback


def bytes_of(kinds: Iterable[str], shapes: Iterable[tuple[int, int]]) -> int:
    """What statistics of maps of these shapes (out, in) take, at most."""
    matrices = {
        "second": lambda m, n: (m * m + n * n) // 2,
        "weight_gradient": lambda m, n: m * n,
        "clipped_gradients": lambda m, n: m * m,
    }
    counted = [matrices[kind] for kind in kinds if kind in matrices]
    return sum(4 * numbers(*shape) for shape in shapes for numbers in counted)


def clipped_second_moment(gradient: torch.Tensor) -> torch.Tensor:
    """Sum of g g^T over the inner tokens of windows, token norms clipped to `CLIP` times their mean.

    Args:
        gradient: [windows, tokens, out].

    Returns:
        float32 [out, out].
    """
    length = gradient.shape[1]
    cut = int(length * EDGE)
    inner = gradient[:, cut : length - cut].flatten(0, 1).float()
    norms = inner.norm(dim=1, keepdim=True)
    mean = norms.mean()
    if mean > 0:
        target = norms.clamp(CLIP[0] * mean, CLIP[1] * mean)
        # a token without any gradient has no direction to be stretched along
        inner = torch.where(norms > 0, inner * (target / norms.clamp(min=torch.finfo(torch.float32).tiny)), inner)
    return inner.T @ inner


class Workspace:
    """Everything that baselines share while they work on one dense model and one calibration set.

    Holds statistics of all linear maps at once: about as many numbers as the weights of the layers have, several
    times over. That is the price of one pass for a dozen methods; it is freed with the workspace. Where it would take
    more than `SPARE_SHARE` of what is free (a large model on a GPU), each pass gathers only what was asked for.

    Args:
        store: where one run keeps its finished steps (see `work_directory`); None for any number of runs in memory.
    """

    def __init__(
        self, model: PreTrainedModel, calibration: Calibration, store: Store | None = None, team: Team | None = None
    ) -> None:
        self.architecture = Architecture(model)
        self.team = team or Team()
        self.store = store
        self.calibration = calibration
        # paper mode in one shot: what the pass that found the layers has attributed already, and for which structure
        self.attributed: tuple[Structure, Attributed] | None = None
        self._moments = Moments()
        self._gathered: set[str] = set()
        self._kept: dict[Any, Any] = {}

    def is_for(self, model: PreTrainedModel, calibration: Calibration) -> bool:
        return self.architecture.model is model and self.calibration.digest == calibration.digest

    def runner(self, first_layer: int = 0, windows: int | None = None) -> SuffixRunner:
        """Runs the calibration windows (or the first so many) through the dense model."""
        tokens, labels = self.calibration.tokens[:windows], self.calibration.labels
        return SuffixRunner(self.architecture, tokens, first_layer, labels=None if labels is None else labels[:windows])

    def moments(self, progress: Progress | None = None, kinds: Iterable[str] = KINDS) -> Moments:
        """The statistics of the dense model, of these kinds at least; what is not there yet takes a backward pass."""
        asked = set(kinds) - self._gathered
        if asked:
            sites = self.architecture.sites()
            rest = set(KINDS) - self._gathered
            shapes = [linear_shape(self.architecture.module(site)) for site in sites]
            free = available_bytes(embedding_weight(self.architecture.model).device)
            if free is None or bytes_of(rest, shapes) <= SPARE_SHARE * free:
                asked = rest
            with (progress or Silent()).step("activation and gradient statistics") as report:
                self.runner().backward(sites, self._moments.collect(self.calibration.tokens, asked), report)
            self._gathered |= asked
        return self._moments

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives, made once per key: decompositions, measured losses and the like."""
        if key not in self._kept:
            self._kept[key] = make()
        value: T = self._kept[key]
        return value

    def keep_decomposition(self, key: Any, make: Callable[[], Decomposition]) -> Decomposition:
        """As `keep`; of all maps they are larger than the model, so between uses they lie in the machine's memory."""
        device = embedding_weight(self.architecture.model).device
        return self.keep(key, lambda: make().to("cpu")).to(device)

    def sites(self, layers: Iterable[int]) -> list[LinearSite]:
        return self.architecture.sites(list(layers))
