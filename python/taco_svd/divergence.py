"""How far a compressed model's predictions are from the dense model's: KL divergence per token.

Perplexity sees only the probability of the token that came; the KL divergence sees the whole distribution, so it tells
small changes apart on far less text (its standard error on the same tokens is much smaller), and it cannot be improved
by luck on a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from .calibration import embedding_weight
from .errors import TacoError
from .evaluation import WindowBatches, ratio_mean
from .loss import slices
from .predictions import Predictions
from .suffix import in_evaluation
from .wide_products import in_wide_products


@dataclass(frozen=True)
class Divergence:
    """KL(dense || compressed) on a text.

    Attributes:
        kl: mean over predicted tokens, nats.
        kl_standard_error: over windows (tokens within a window are not independent).
        same_top_token: share of positions where both models find the same token most likely.
        tokens, windows, window, stride: as in `evaluation.Perplexity`; the same positions are counted.
    """

    kl: float
    kl_standard_error: float
    same_top_token: float
    tokens: int
    windows: int
    window: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def kl_per_token(dense_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(dense || compressed) in nats at every position; few of them are widened at a time.

    Args:
        dense_logits, logits: [..., vocabulary], any floating dtype; computed in float32 (float64 for float64).

    Returns:
        [...], with a graph to `logits` where it has one.
    """
    rows = [side.reshape(-1, side.shape[-1]) for side in (dense_logits, logits)]
    parts = slices(rows[0])
    found = [_kl(*(side[part] for side in rows)) for part in parts]
    return torch.cat(found).view(logits.shape[:-1])


def _kl(dense_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(torch.promote_types(dense_logits.dtype, logits.dtype), torch.float32)
    target = functional.log_softmax(dense_logits.to(wide), dim=-1)
    found = functional.log_softmax(logits.to(wide), dim=-1)
    return functional.kl_div(found, target, log_target=True, reduction="none").sum(-1)


def mean_of_counted(found: torch.Tensor, counted: torch.Tensor | None) -> tuple[float, int]:
    """(mean of a window's values [1, seq_len] that count, by what it weighs): all windows alike where all count."""
    if counted is None:
        return float(found.double().mean()), 1
    chosen = found[:, counted.to(found.device)].double()
    return (float(chosen.mean()), chosen.numel()) if chosen.numel() else (0.0, 0)


@torch.no_grad()
@in_wide_products
def divergence(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokens: torch.Tensor,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """KL(dense || compressed) on the positions that `evaluation.perplexity` counts with the same arguments.

    Raises:
        TacoError: as `evaluation.perplexity`, or models of different vocabularies.
    """
    if embedding_weight(dense).shape[0] != embedding_weight(compressed).shape[0]:
        raise TacoError("The two models have vocabularies of different size; their predictions cannot be compared.")
    batches = WindowBatches(compressed, tokens, window, stride, max_windows, batch_tokens)
    sums: list[float] = []
    counts: list[int] = []
    agreeing = 0
    with in_evaluation(dense), in_evaluation(compressed):
        for batch in batches:
            targets = Predictions(dense, batch.ids.to(dense.device))
            predictions = Predictions(compressed, batch.ids.to(compressed.device))
            values, same = [], []
            for piece in predictions.pieces:
                found = predictions.logits(piece)
                target = targets.logits(piece).to(found.device)
                values.append(kl_per_token(target, found))
                same.append(target.argmax(-1) == found.argmax(-1))
            rows = [torch.cat(parts).view(len(batch.ids), -1) for parts in (values, same)]
            for row, (kl, top) in enumerate(zip(*rows, strict=True)):
                counted = batch.counted[row].to(kl.device)
                sums.append(float(kl[counted].double().sum()))
                counts.append(int(counted.sum()))
                agreeing += int(top[counted].sum())
            if progress is not None:
                progress(batch.done, batches.windows)
    if not math.isfinite(math.fsum(sums)):
        raise TacoError("The models' logits are not finite on this text; their divergence is undefined.")
    mean, error = ratio_mean(sums, counts)
    return Divergence(mean, error, agreeing / sum(counts), sum(counts), batches.windows, batches.window, batches.stride)
