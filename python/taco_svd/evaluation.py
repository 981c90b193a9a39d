"""Perplexity, the way the field reports it: fixed windows, optionally strided so that each token has some context."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from .calibration import context_length, embedding_weight
from .errors import TacoError


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with what is needed to judge it.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token.
        nll: that mean, in nats.
        nll_standard_error: standard error of `nll` over windows (tokens within a window are not independent).
        standard_error: the same carried over to the perplexity (delta method).
        tokens: number of tokens predicted and counted.
        windows, window, stride: how the text was cut.
    """

    perplexity: float
    nll: float
    nll_standard_error: float
    standard_error: float
    tokens: int
    windows: int
    window: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve_windows(model: PreTrainedModel, window: int | None, stride: int | None) -> tuple[int, int]:
    """(window, stride) with defaults filled in; cheap, so that it can be asked before any text is read.

    Raises:
        TacoError: a window outside 2..context, or a stride outside 1..window.
    """
    limit = context_length(model)
    window = min(limit, 2048) if window is None else window
    stride = window if stride is None else stride
    if not 2 <= window <= limit:
        raise TacoError(f"The window must be between 2 and the model's context of {limit} tokens, got {window}.")
    if not 1 <= stride <= window:
        raise TacoError(f"The stride must be between 1 and the window ({window}), got {stride}.")
    return window, stride


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a model on a text.

    Windows of `window` tokens start every `stride` tokens. Each token is counted once: in every window but the
    first, only the last `stride` tokens are. With ``stride == window`` (the default, as compression papers do it)
    windows do not overlap and the first token of each is context only.

    Args:
        tokens: int64 [tokens], one text.
        window: default: the model's context, at most 2048.
        max_windows: spread evenly over the text when there are more.
        batch_tokens: at most this many tokens run at once.

    Raises:
        TacoError: text shorter than one window, a stride outside 1..window, or logits that are not finite.
    """
    window, stride = resolve_windows(model, window, stride)
    if len(tokens) < window:
        raise TacoError(f"The text has {len(tokens)} tokens, less than one window of {window}; pass a longer text.")
    starts = list(range(0, len(tokens) - window + 1, stride))
    if max_windows is not None and max_windows < len(starts):
        starts = [starts[i * len(starts) // max_windows] for i in range(max_windows)]
    device = embedding_weight(model).device
    rows = max(1, batch_tokens // window)
    sums: list[float] = []
    counts: list[int] = []
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(starts), rows):
            chunk = starts[first : first + rows]
            batch = torch.stack([tokens[start : start + window] for start in chunk]).to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            nll = functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
            ).view(len(chunk), window - 1)
            for start, row in zip(chunk, nll, strict=True):
                # overlapping windows after the first count only what no earlier window has counted
                counted = row if start == 0 or stride == window else row[-stride:]
                sums.append(float(counted.double().sum()))
                counts.append(counted.numel())
            if progress is not None:
                progress(first + len(chunk), len(starts))
    finally:
        model.train(was_training)
    total, count = math.fsum(sums), sum(counts)
    if not math.isfinite(total):
        raise TacoError("The model's logits are not finite on this text; its perplexity is undefined.")
    mean = total / count
    # ratio estimator over windows
    if len(sums) > 1:
        spread = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
        error = math.sqrt(spread * len(sums) / (len(sums) - 1)) / count
    else:
        error = float("nan")
    value = math.exp(mean) if mean < 700 else float("inf")
    return Perplexity(value, mean, error, value * error, count, len(starts), window, stride)
