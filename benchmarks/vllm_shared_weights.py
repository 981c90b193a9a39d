"""Lets the vLLM engines of one process share the weights that they have in common, on a CPU.

Each engine loads and packs its own copy, and where in memory a copy lies (small pages or huge ones, which sets of the
caches) makes an engine several percent faster or slower than its twin for as long as it lives. Engines that read the
same memory differ by what they compute only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

PATCHED = "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm"


@dataclass(frozen=True)
class _Packed:
    """What vLLM gives a layer when it has packed its weight: the function that multiplies, and what is left of it."""

    linear: Callable[..., torch.Tensor]
    weight: torch.nn.Parameter


class SharedWeights:
    """The packed weights of the engines so far.

    Attributes:
        layers, shared: dense layers of all engines, and how many of them took an earlier engine's weight.
    """

    def __init__(self) -> None:
        self.layers = self.shared = 0
        self._made: dict[tuple[Any, ...], _Packed] = {}

    @contextmanager
    def engine(self) -> Iterator[None]:
        """While open, one engine is made: its dense layers take what an earlier engine has packed of the same bits."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        # layers of one engine stay apart even where their bits are equal, as those of random models may be
        seen: Counter[tuple[str, str, bool]] = Counter()

        def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
            weight: Any = layer.weight
            if weight.is_meta or weight.ndim != 2:
                dispatch_cpu_unquantized_gemm(layer, remove_weight)
                return
            what = (_digest(weight), _digest(getattr(layer, "bias", None)), remove_weight)
            key = (*what, seen[what])
            seen[what] += 1
            self.layers += 1
            if key in self._made:
                self.shared += 1
                layer.cpu_linear, layer.weight = self._made[key].linear, self._made[key].weight
                return
            dispatch_cpu_unquantized_gemm(layer, remove_weight)
            self._made[key] = _Packed(layer.cpu_linear, layer.weight)  # type: ignore[arg-type]

        with mock.patch(PATCHED, dispatch):
            yield


def _digest(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return ""
    contents = hashlib.blake2b(tensor.detach().contiguous().view(torch.uint8).numpy(), digest_size=16)
    return f"{tuple(tensor.shape)} {tensor.dtype} {contents.hexdigest()}"
