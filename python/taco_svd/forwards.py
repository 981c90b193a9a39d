"""What decoder layers take and give, and replacing for a while what forwards do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]


class Enough(Exception):
    """Ends a forward pass once what was wanted has been seen."""


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a decoder layer is called with."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def hidden_output(output: Any) -> torch.Tensor:
    """The hidden states in what a decoder layer returns: older transformers give a tuple."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def forward_replaced(layers: Iterable[nn.Module], make: Callable[[Forward], Forward]) -> Iterator[None]:
    """While open, each layer's forward is what `make` makes of it.

    Whatever was set on the instance before comes back: accelerate hangs its hooks there.
    """
    before = [(layer, layer.__dict__.get("forward")) for layer in layers]
    for layer, _ in before:
        layer.forward = make(layer.forward)
    try:
        yield
    finally:
        for layer, own in before:
            if own is None:
                del layer.forward  # the instance attribute; the class's forward shows again
            else:
                layer.forward = own


@contextmanager
def bypassed(
    layers: Iterable[nn.Module], returns_tuple: bool, handed_out: torch.Tensor | None = None
) -> Iterator[None]:
    """While open, decoder layers do not run: they hand through what they get, or `handed_out`.

    Args:
        returns_tuple: the model takes the hidden states out of what its layers return (`walk.layers_return_tuples`).
    """

    def passing(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_argument(args, kwargs) if handed_out is None else handed_out
        return (hidden,) if returns_tuple else hidden

    with forward_replaced(layers, lambda forward: passing):
        yield
