"""Paper mode in one shot: layer importance and attribution out of the same passes over the calibration windows.

Which layers are redundant is known only when all windows have been through the model, and what their directions are
worth takes the gradients of those same passes. So the layers are guessed from a few windows and attributed while all
windows pass; the importance that comes out decides. A layer that was not guessed is attributed afterwards, in a pass of
its own (`factorise`), so the guess costs time at worst, never another result.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from .architectures import Architecture
from .attributed import Attributed
from .budget import low_rank_structure
from .forwards import hidden_argument, hidden_output
from .importance import LayerImportance, block_influence, by_influence, lost_direction
from .suffix import SuffixRunner

# The guess: a share of the windows, at least one.
GUESS_SHARE = 1 / 16


def importance_and_attribution(
    architecture: Architecture,
    tokens: torch.Tensor,
    count: int,
    compression_ratio: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LayerImportance, Attributed]:
    """Block influence of all layers, and the attribution of those that are likely the `count` least influential.

    Args:
        tokens: int64 [samples, seq_len].
        compression_ratio: the paper's c, from which ranks and so the number of candidate directions follow.
    """
    few = tokens[: max(1, int(len(tokens) * GUESS_SHARE))]
    guess = sorted(by_influence(block_influence(SuffixRunner(architecture, few, 0))).order[:count])
    ranks = low_rank_structure(architecture, guess, compression_ratio).low_rank
    attributed = Attributed(architecture, ranks)
    sites = attributed.groups(architecture.sites(guess))[0]  # what does not fit is attributed later
    sums = [0.0] * len(architecture.layers)

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, layer: int) -> None:
        sums[layer] += lost_direction(hidden_argument(args, kwargs).detach(), hidden_output(output).detach())

    with ExitStack() as stack:
        for layer, module in enumerate(architecture.layers):
            hook = module.register_forward_hook(partial(watch, layer=layer), with_kwargs=True)
            stack.callback(hook.remove)
        runner = SuffixRunner(architecture, tokens, 0)
        attributed.gather(sites, lambda gradients: runner.backward(sites, gradients, progress))
    return by_influence([total / tokens.numel() for total in sums]), attributed
