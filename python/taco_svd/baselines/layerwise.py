"""Runs decoder layers one at a time, each called the way the model calls it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..architectures import Architecture
from ..suffix import SuffixRunner


class LayerCalls:
    """What the model hands to each layer beside the hidden states (masks, positions), per batch of a runner.

    Attributes:
        entering: per batch the hidden states that enter layer 0, [rows, seq_len, hidden].
    """

    def __init__(self, runner: SuffixRunner) -> None:
        self.entering: list[torch.Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls = self._calls[-1]
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            if not calls:
                self.entering.append((args[0] if args else kwargs["hidden_states"]).detach())
            calls.append((args[1:], rest))

        with ExitStack() as stack, torch.no_grad():
            for layer in runner.architecture.layers:
                stack.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
            for index in range(len(runner.batches)):
                self._calls.append([])
                runner.logits(index)

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """What `layer`, in the place of layer `index`, makes of a batch's hidden states."""
        args, kwargs = self._calls[batch][index]
        output: Any = layer(hidden, *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


def input_moments(
    architecture: Architecture, calls: LayerCalls, index: int, paths: list[str], hidden: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Sum of x x^T over all tokens for linear maps of one layer, run on the given hidden states: float32 [in, in]."""
    layer = architecture.layers[index]
    moments: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Any:
        def gather(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].detach().flatten(0, -2).float()
            moment = rows.T @ rows
            moments[path] = moments[path].add_(moment) if path in moments else moment

        return gather

    with ExitStack() as stack:
        for path in paths:
            stack.callback(layer.get_submodule(path).register_forward_pre_hook(watch(path)).remove)
        for batch, states in enumerate(hidden):
            calls.run(layer, index, batch, states)
    return moments
