"""What a model predicts for the tokens of some windows, a piece of them at a time.

Logits are the largest thing that a forward pass makes: of 2048 tokens and Llama 3's vocabulary half a gigabyte in
bfloat16, a fifth of a 1 B parameter model, and a loss makes float32 copies of them and a gradient. What a model does
behind its decoder stack treats every token by itself, so the stack runs once, and what follows (the head, and whatever
scales or caps its logits) is the model's own forward, run on a piece of the stack's output at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from .calibration import embedding_weight
from .forwards import forward_replaced
from .loss import NOTHING, counted_labels, handed_out, label_loss, next_token_loss

# logits [positions, vocabulary] and which of all positions these are, to a scalar
Function = Callable[[torch.Tensor, slice], torch.Tensor]
# Logits of a piece (16 MB in 16 bits; on a GPU, where a launch should have more to do, 128 MB), but never so few tokens
# that a product with the head waits for its weights.
PIECE, GPU_PIECE, LEAST_TOKENS = 1 << 23, 1 << 26, 128


def pieces(positions: int, head: torch.Tensor) -> list[slice]:
    """Slices of a number of positions whose logits may be held at once; `head` [vocabulary, hidden]."""
    step = max(LEAST_TOKENS, (PIECE if head.device.type == "cpu" else GPU_PIECE) // len(head))
    return [slice(start, min(start + step, positions)) for start in range(0, positions, step)]


class Predictions:
    """A model's predictions at all positions of some windows, or all but each window's last, which nothing follows.

    The decoder stack runs once, with a graph where gradients are enabled; `logits` runs the rest.

    Args:
        model: of any architecture whose forward calls its `base_model`; of others (OPT) all logits are made at once.
        ids: int64 [windows, tokens].
        run: runs the model's forward on `ids` and returns its output; default: calls the model.
        last: with the windows' last positions.

    Attributes:
        hidden: what the stack gives at the positions, window after window: [positions, hidden].
        labels: the tokens that follow the positions, int64 [positions]; -100 for a window's last.
        pieces: slices of the positions, to ask `logits` for.
    """

    def __init__(
        self, model: PreTrainedModel, ids: torch.Tensor, run: Callable[[], Any] | None = None, last: bool = False
    ) -> None:
        self._model = model
        count = ids.shape[1] - (not last)
        self._ids = ids[:, :count].flatten()
        self.labels = functional.pad(ids[:, 1:], (0, int(last)), value=NOTHING).flatten()
        self.pieces = pieces(len(self.labels), embedding_weight(model))
        stack: nn.Module = model.base_model
        seen: list[Any] = []

        def shortened(_: nn.Module, __: Any, output: Any) -> Any:
            seen.append(output)
            return _with_hidden(output, output.last_hidden_state[:, :1])  # what follows has next to nothing to do

        with ExitStack() as hooks:
            if stack is not model and len(self.pieces) > 1:
                hooks.callback(stack.register_forward_hook(shortened).remove)
            output = run() if run is not None else model(input_ids=ids, use_cache=False)
        self._stack_output = seen[0] if len(seen) == 1 else None
        whole = output.logits if self._stack_output is None else self._stack_output.last_hidden_state
        self.hidden: torch.Tensor = whole[:, :count].flatten(0, 1)

    def logits(self, piece: slice, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of some positions, [positions, vocabulary]; `hidden` stands in for their rows of `self.hidden`."""
        if hidden is None:
            hidden = self.hidden[piece]
        if self._stack_output is None:
            return hidden

        def handing_out(*_: Any, **__: Any) -> Any:
            return _with_hidden(self._stack_output, hidden[None])

        with forward_replaced([self._model.base_model], lambda forward: handing_out):
            output = self._model(input_ids=self._ids[piece][None], use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits

    def summed(self, function: Function) -> torch.Tensor:
        """The sum of `function(logits, piece)`, a scalar, over the pieces.

        Where `hidden` has a graph the sum has one to it, and to nothing else: of the head's parameters no gradient is
        taken. Only one piece's logits and their gradient are held at a time.
        """
        result: torch.Tensor = _Summed.apply(self.hidden, self, function)
        return result


def windows_loss(
    model: PreTrainedModel,
    ids: torch.Tensor,
    weight: float = 1.0,
    run: Callable[[], Any] | None = None,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weight` times a model's mean next-token cross-entropy (nats) on windows; arguments as for `Predictions`.

    As `next_token_loss` of its logits, but of large vocabularies only a piece of them is held at a time. There no
    gradient reaches the head's own parameters.

    Args:
        labels: as for `next_token_loss`; default: all tokens of `ids` count.
    """
    # counted before they are on a GPU, which would be waited for
    count = ids[:, 1:].numel() if labels is None else counted_labels(labels)
    labels = ids if labels is None else labels.to(ids.device)
    if len(pieces(ids[:, 1:].numel(), embedding_weight(model))) == 1:
        output = run() if run is not None else model(input_ids=ids, use_cache=False)
        return next_token_loss(output.logits, labels, weight, count)
    scale, following = weight / max(1, count), labels[:, 1:].flatten()
    predictions = Predictions(model, ids, run)
    return predictions.summed(lambda logits, piece: label_loss(logits, following[piece], scale))


class _Summed(torch.autograd.Function):
    """Takes the gradient of each piece while its logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, predictions: Predictions, function: Function) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for piece in predictions.pieces:
            part = hidden[piece].detach()
            with torch.set_grad_enabled(gradient is not None):
                part.requires_grad_(gradient is not None)
                value = function(predictions.logits(piece, part), piece)
            if gradient is not None:
                (gradient[piece],) = torch.autograd.grad(value, part)
            total += value.detach()
        ctx.gradient = gradient
        return total.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return handed_out(ctx, outer), None, None


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """What a decoder stack returned, with other hidden states."""
    changed = copy.copy(output)
    changed.last_hidden_state = hidden
    return changed
