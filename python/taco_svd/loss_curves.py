"""What each linear map costs the model at each rank, and each layer when it is taken out.

The K-FAC metric predicts how a map's loss falls with its rank up to a factor (the tail of its squared weighted singular
values); measurements at a few ranks give the factor. The loss is the divergence KL(dense || changed) of the next
token, nats per token, with one change made at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from .architectures import Architecture, LinearSite, linear_shape
from .calibration import embedding_weight
from .decomposition import Decomposition
from .divergence import kl_per_token
from .factorise import put_factors
from .importance import bypassed
from .progress import Report
from .suffix import SuffixRunner

# Ranks that are measured, as shares of the full rank: the curve is bent most where few directions stay.
MEASURED_SHARES = (0.1, 0.4)
# Bytes of reference log-probabilities that may be kept: large vocabularies are measured on fewer tokens.
REFERENCE_BYTES = 1 << 28
MEASURED_TOKENS = 1024


@dataclass(frozen=True)
class LossCurves:
    """Predicted loss (KL, nats per token) of single changes.

    Attributes:
        maps: per linear map float64 [full rank + 1]: the loss when that many directions stay; 0 at full rank.
        removal: per layer the loss when it is taken out.
        measured: what was measured: (map, rank, loss).
    """

    maps: Mapping[LinearSite, torch.Tensor]
    removal: Mapping[int, float]
    measured: tuple[tuple[LinearSite, int, float], ...] = field(default=())


def tail_energies(sigma: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of all but the r largest singular values, for r = 0 .. len(sigma): float64."""
    squares = sigma.double().square()
    tail = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


def scaled_curve(tail: torch.Tensor, points: Sequence[tuple[int, float]]) -> torch.Tensor:
    """A tail scaled through measured points (rank, loss): the logarithm of the factor is linear in log tail between
    them and constant beyond.

    Losses that are not positive (rounding, or a change that happens to help) count as a thousandth of the prediction.
    """
    tail = tail.double()
    floor = float(tail[0]) * 1e-12
    scale = max((loss / float(tail[rank]) for rank, loss in points if float(tail[rank]) > floor), default=0.0)
    known = sorted(
        (float(tail[rank].log()), max(loss / float(tail[rank]), 1e-3 * scale))
        for rank, loss in points
        if float(tail[rank]) > floor
    )
    if not known or scale <= 0:
        return tail * 0.0
    x = tail.clamp(min=floor).log()
    xs = torch.tensor([at for at, _ in known], dtype=torch.float64)
    ys = torch.tensor([factor for _, factor in known], dtype=torch.float64).log()
    if len(known) == 1:
        factor = ys.exp().expand_as(x)
    else:
        right = torch.searchsorted(xs, x.cpu()).clamp(1, len(known) - 1)
        share = ((x.cpu() - xs[right - 1]) / (xs[right] - xs[right - 1])).clamp(0, 1)
        factor = (ys[right - 1] + share * (ys[right] - ys[right - 1])).exp().to(tail.device)
    curve = tail * factor
    # fewer directions never cost less: interpolation must not say so
    return curve.flip(0).cummax(0).values.flip(0)


class Divergence:
    """KL(dense || changed) per token on a few calibration windows, for changes at or above one layer at a time."""

    def __init__(self, architecture: Architecture, tokens: torch.Tensor) -> None:
        vocabulary = embedding_weight(architecture.model).shape[0]
        most = max(2, min(MEASURED_TOKENS, REFERENCE_BYTES // (4 * vocabulary)))
        length = min(tokens.shape[1], most)
        self.tokens = tokens[: max(1, most // length), :length]
        self.runner = SuffixRunner(architecture, self.tokens, 0)
        with torch.no_grad():
            self.reference = [self._log_probabilities(index) for index in range(len(self.runner.batches))]

    def _log_probabilities(self, index: int) -> torch.Tensor:
        return torch.log_softmax(self.runner.logits(index).float(), -1)

    def climb(self, layer: int) -> None:
        """From now on changes are made at or above `layer`: what lies below is not computed again."""
        self.runner = self.runner.at(layer)

    @torch.no_grad()
    def measure(self) -> float:
        total = 0.0
        for index, reference in enumerate(self.reference):
            ours = self._log_probabilities(index)
            rows = reference.shape[0] * reference.shape[1]
            total += float((reference.exp() * (reference - ours)).sum(-1).double().mean()) * rows
        return total / self.tokens.numel()


def measure_curves(
    architecture: Architecture,
    tokens: torch.Tensor,
    sites: Sequence[LinearSite],
    decompose: Callable[[LinearSite], Decomposition],
    report: Report,
    shares: Sequence[float] = MEASURED_SHARES,
) -> LossCurves:
    """Measures every map of `sites` at a few ranks and every layer's removal, one change at a time.

    `decompose` is called once per map and its result let go, so that no second model's worth of factors is held.
    `architecture` must be a copy whose modules may be replaced; it is as before when this returns.
    """
    divergence = Divergence(architecture, tokens)
    maps: dict[LinearSite, torch.Tensor] = {}
    removal: dict[int, float] = {}
    measured: list[tuple[LinearSite, int, float]] = []
    depth = len(architecture.layers)
    returns_tuple = SuffixRunner(architecture, tokens[:1, :2], 1).returns_tuple if depth > 1 else False
    for layer in range(depth):
        divergence.climb(layer)
        for site in [site for site in sites if site.layer == layer]:
            parts = decompose(site)
            full = min(linear_shape(architecture.module(site)))
            dense = architecture.module(site)
            points = []
            for rank in sorted({max(1, min(full - 1, round(share * full))) for share in shares if full > 1}):
                try:
                    put_factors(architecture, site, parts, torch.arange(rank, device=parts.sigma.device))
                    points.append((rank, divergence.measure()))
                finally:
                    architecture.replace(site, dense)
            measured += [(site, rank, loss) for rank, loss in points]
            maps[site] = scaled_curve(tail_energies(parts.sigma), points).cpu()
        with bypassed(architecture, {layer}, returns_tuple):
            removal[layer] = divergence.measure()
        report(layer + 1, depth)
    return LossCurves(maps, removal, tuple(measured))


@torch.no_grad()
def divergence_between(dense: PreTrainedModel, other: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Mean KL(dense || other) of the next token over windows [samples, seq_len], nats per token."""
    total = 0.0
    device = embedding_weight(dense).device
    for window in tokens.split(1):
        batch = window.to(device)
        truth = dense(input_ids=batch, use_cache=False).logits
        ours = other(input_ids=batch, use_cache=False).logits
        total += float(kl_per_token(truth, ours).double().mean())
    return total / max(1, tokens.shape[0])
