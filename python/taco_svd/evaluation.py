"""Perplexity, the way the field reports it: fixed windows, optionally strided so that each token has some context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from .calibration import begun_with, context_length, embedding_weight, needed_begin_token, unmarked
from .errors import TacoError
from .loss import NOTHING
from .predictions import Predictions
from .suffix import in_evaluation
from .wide_products import in_wide_products


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
        begin_token: the token that every window begins with, of a model that needs one (`needed_begin_token`).
        window_nll, window_tokens: of each window, the sum of its losses in nats and how many there are; for
            `change`, not in `to_dict`.
    """

    perplexity: float
    nll: float
    nll_standard_error: float
    standard_error: float
    tokens: int
    windows: int
    window: int
    stride: int
    begin_token: int | None = None
    window_nll: tuple[float, ...] = field(default=(), repr=False)
    window_tokens: tuple[int, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if not key.startswith("window_")}

    def change(self, before: Perplexity) -> Change:
        """How much this perplexity lies above `before`, another model's on the same windows.

        Raises:
            ValueError: the windows are others.
        """
        if self.window_tokens != before.window_tokens or not self.window_tokens:
            raise ValueError("The two perplexities are not of the same windows.")
        more = [here - there for here, there in zip(self.window_nll, before.window_nll, strict=True)]
        mean, error = ratio_mean(more, list(self.window_tokens))
        return Change(mean, error, *(_exp(mean + steps * error) - 1 for steps in (0, -1.96, 1.96)))


@dataclass(frozen=True)
class Change:
    """A perplexity over another one on the same windows.

    What makes a text hard makes it hard for both, and cancels: the error is much smaller than either perplexity's own.

    Attributes:
        nll: difference of the mean negative log-likelihoods, nats per token.
        nll_standard_error: over windows, paired; NaN for a single window.
        relative: ratio of the perplexities minus one.
        low, high: its 95% interval (normal, of `nll`).
    """

    nll: float
    nll_standard_error: float
    relative: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve_windows(
    model: PreTrainedModel, window: int | None, stride: int | None, max_windows: int | None = None
) -> tuple[int, int]:
    """(window, stride) with defaults filled in; cheap, so that it can be asked before any text is read.

    Raises:
        TacoError: a window outside 2..context, a stride outside 1..window, or no window at all.
    """
    if max_windows is not None and max_windows < 1:
        raise TacoError(f"--max-windows must be at least 1, got {max_windows}.")
    limit = context_length(model)
    window = min(limit, 2048) if window is None else window
    stride = window if stride is None else stride
    if not 2 <= window <= limit:
        raise TacoError(f"The window must be between 2 and the model's context of {limit} tokens, got {window}.")
    if not 1 <= stride <= window:
        raise TacoError(f"The stride must be between 1 and the window ({window}), got {stride}.")
    return window, stride


@dataclass(frozen=True)
class WindowBatch:
    """Some windows of a text, to run at once.

    Attributes:
        ids: int64 [rows, window].
        counted: which predictions are counted, bool [rows, window - 1].
        done: number of windows up to and with this batch.
    """

    ids: torch.Tensor
    counted: torch.Tensor
    done: int


class WindowBatches:
    """A text cut into windows for evaluation; iterates over batches of them.

    Windows of `window` tokens start every `stride` tokens. Each token is counted once: in every window but the
    first, only the last `stride` predictions are. Models that need a begin-of-text token have it before each window, as
    one of its tokens, and the token behind it is counted; others get the text alone, as compression papers do it.
    Tokens that are marked as outside completions (`calibration.tokenize`) are read, not counted.

    Raises:
        TacoError: text shorter than one window, one in which nothing counts, or what `resolve_windows` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        window: int | None,
        stride: int | None,
        max_windows: int | None,
        batch_tokens: int,
    ) -> None:
        self.window, self.stride = resolve_windows(model, window, stride, max_windows)
        self.begin_token = needed_begin_token(model)
        self._of_text = self.window - (self.begin_token is not None)
        self.stride = min(self.stride, self._of_text)
        if len(tokens) < self._of_text:
            raise TacoError(
                f"The text has {len(tokens)} tokens, less than one window of {self.window}; pass a longer text or a "
                "smaller --window."
            )
        starts = list(range(0, len(tokens) - self._of_text + 1, self.stride))
        if max_windows is not None and max_windows < len(starts):
            starts = [starts[i * len(starts) // max_windows] for i in range(max_windows)]
        self._starts, self._tokens = starts, tokens
        self._rows = max(1, batch_tokens // self.window)
        if not any(bool(batch.counted.any()) for batch in self):
            raise TacoError("--completions-only: no window of the text has a completion in it.")

    @property
    def windows(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[WindowBatch]:
        for first in range(0, len(self._starts), self._rows):
            chunk = self._starts[first : first + self._rows]
            found = torch.stack([self._tokens[start : start + self._of_text] for start in chunk])
            ids, labels = unmarked(begun_with(self.begin_token, found))
            counted = labels[:, 1:] != NOTHING
            if self.stride != self._of_text:
                # overlapping windows after the first count only what no earlier window has counted
                counted[[start > 0 for start in chunk], : -self.stride] = False
            yield WindowBatch(ids, counted, first + len(chunk))


def ratio_mean(sums: list[float], counts: list[int]) -> tuple[float, float]:
    """Mean per item and its standard error from sums and counts per window (ratio estimator over windows).

    The error is NaN for a single window.
    """
    count = sum(counts)
    mean = math.fsum(sums) / count
    if len(sums) < 2:
        return mean, float("nan")
    spread = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, math.sqrt(spread * len(sums) / (len(sums) - 1)) / count


def _exp(nats: float) -> float:
    return math.exp(nats) if not nats >= 700 else float("inf")


@torch.no_grad()
@in_wide_products
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
        TacoError: text shorter than one window, what `resolve_windows` refuses, or logits that are not finite.
    """
    batches = WindowBatches(model, tokens, window, stride, max_windows, batch_tokens)
    device = embedding_weight(model).device
    sums: list[float] = []
    counts: list[int] = []
    with in_evaluation(model):
        for batch in batches:
            ids = batch.ids.to(device)
            found = Predictions(model, ids)
            parts = [
                functional.cross_entropy(found.logits(piece).float(), found.labels[piece], reduction="none")
                for piece in found.pieces
            ]
            nll = torch.cat(parts).view(len(ids), -1)
            for row, counted in zip(nll, batch.counted.to(device), strict=True):
                sums.append(float(row[counted].double().sum()))
                counts.append(int(counted.sum()))
            if progress is not None:
                progress(batch.done, batches.windows)
    if not math.isfinite(math.fsum(sums)):
        raise TacoError("The model's logits are not finite on this text; its perplexity is undefined.")
    mean, error = ratio_mean(sums, counts)
    value = _exp(mean)
    cut = (batches.windows, batches.window, batches.stride, batches.begin_token)
    return Perplexity(value, mean, error, value * error, sum(counts), *cut, tuple(sums), tuple(counts))
