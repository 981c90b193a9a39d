"""Next-token cross-entropy in bounded memory: the gradient is formed in the forward pass, a slice of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Logits that are widened to float32 at once: a few megabytes, which stay in a CPU's cache. On a GPU a launch should
# have more to do.
CPU_SLICE = 1 << 19
GPU_SLICE = 1 << 24


def slices(logits: torch.Tensor) -> list[slice]:
    """Slices of the rows of logits [positions, vocabulary] that are widened at once."""
    rows, vocabulary = logits.shape
    step = max(1, (CPU_SLICE if logits.device.type == "cpu" else GPU_SLICE) // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, max(1, rows), step)]


# The label of a position whose prediction does not count: that which torch's losses leave out.
NOTHING = -100


def counted_labels(labels: torch.Tensor) -> int:
    """How many predictions count in windows of labels [windows, seq_len]: no window's first token is predicted."""
    return int((labels[:, 1:] != NOTHING).sum())


def counted_positions(labels: torch.Tensor) -> torch.Tensor:
    """Whose predictions count where no token judges them (a divergence): bool, as `labels` [windows, seq_len].

    A position counts if the token that follows it does; a window's last one, if its own does: that text goes on.
    """
    return torch.cat([labels[:, 1:], labels[:, -1:]], dim=1) != NOTHING


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, weight: float = 1.0, count: int | None = None
) -> torch.Tensor:
    """Mean cross-entropy (nats) of each token given those before it; labels are shifted here and nowhere else.

    logits [batch, seq_len, vocabulary], labels int64 [batch, seq_len]: the tokens, `NOTHING` for those that do not
    count; 0 where none does. `count` is `counted_labels` of these, for those who know. Computed in float32 (float64 for
    float64). `weight` multiplies the loss, and its gradient before that is rounded to the logits' dtype.
    """
    scale = weight / max(1, counted_labels(labels) if count is None else count)
    loss: torch.Tensor = _LabelLoss.apply(logits, labels[:, 1:], scale)
    return loss


def label_loss(logits: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale` times the summed cross-entropy (nats): logits [positions, vocabulary], labels int64 [positions], of
    which `NOTHING` does not count."""
    loss: torch.Tensor = _LabelLoss.apply(logits[None], labels[None], scale)
    return loss


class _LabelLoss(torch.autograd.Function):
    """Autograd's own way holds four float32 copies of the logits at its peak, this one a slice of one.

    The gradient is ``softmax - onehot`` times a constant that is known before the backward pass, so it is formed while
    the softmax is at hand, and stored in the logits' dtype as autograd would hand it over. Positions (the second
    dimension of the logits) beyond the labels' do not count.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        batch, length = labels.shape
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        if gradient is not None:
            gradient[:, length:] = 0
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for row in range(batch):
            for part in slices(logits[row, :length]):
                here = labels[row, part, None]
                counts = here != NOTHING
                here = here.where(counts, 0)
                logs = functional.log_softmax(logits[row, part], dim=-1, dtype=wide)
                total -= logs.gather(1, here).where(counts, 0).sum(dtype=torch.float64)
                if gradient is not None:
                    share = logs.exp_()
                    share.scatter_add_(1, here, share.new_full(here.shape, -1.0))
                    gradient[row, part] = share.mul_(counts.to(wide) * scale)
        ctx.gradient = gradient
        return (total * scale).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return handed_out(ctx, outer), None, None


def handed_out(ctx: Any, outer: torch.Tensor) -> torch.Tensor:
    """The gradient that a function's forward pass has put into `ctx.gradient`, times the outer one, in its memory.

    Raises:
        RuntimeError: it has been handed out before.
    """
    gradient: torch.Tensor | None
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        raise RuntimeError("the loss was differentiated twice; its gradient is handed out once")
    return gradient if bool(outer == 1) else gradient.mul_(outer)
