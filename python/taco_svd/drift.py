"""Hidden-state drift by depth: how far a compressed model's residual stream is from the dense model's, layer by layer.

Compared are places where both should agree: behind every kept layer (and the bridge it may carry), against what enters
the next kept layer in the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .architectures import Architecture
from .forwards import hidden_output
from .structure import Structure
from .wide_products import in_wide_products


@dataclass(frozen=True)
class Drift:
    """Drift behind one kept layer.

    Attributes:
        layer: the kept layer, in the dense model.
        until: the last dense layer that it (with what follows it) stands for.
        relative_error: sqrt(sum |h - h_dense|^2 / sum |h_dense|^2) over all tokens.
        cosine: mean cosine between h and h_dense.
    """

    layer: int
    until: int
    relative_error: float
    cosine: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def depth_map(structure: Structure) -> dict[int, int]:
    """Position in the compressed stack -> layer of the dense model behind which the hidden states should agree."""
    ends = [*(following - 1 for following in structure.kept[1:]), structure.source_layers - 1]
    return dict(enumerate(ends))


@contextmanager
def recorded(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """While open, collects the hidden states that leave the given layers of a model."""
    found: dict[int, torch.Tensor] = {}
    stack = Architecture(model).layers
    with ExitStack() as hooks:
        for index in layers:

            def after(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
                found[index] = hidden_output(output)

            hooks.callback(stack[index].register_forward_hook(after).remove)
        yield found


@torch.no_grad()
@in_wide_products
def measure_drift(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    structure: Structure,
    windows: torch.Tensor,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> list[Drift]:
    """Drift behind every kept layer, on windows of text.

    Args:
        dense, compressed: the two models, on one device, in eval mode.
        structure: which layers of `dense` the layers of `compressed` are (its ranks and bridges are not looked at, so
            that bare removal can be measured as well).
        windows: int64 [count, length].
    """
    places = depth_map(structure)
    errors = dict.fromkeys(places, 0.0)
    sizes, cosines = dict(errors), dict(errors)
    done = 0
    for rows in windows.split(batch):
        ids = rows.to(dense.device)
        with recorded(dense, places.values()) as targets:
            dense.base_model(input_ids=ids, use_cache=False)
        with recorded(compressed, places) as states:
            compressed.base_model(input_ids=ids, use_cache=False)
        for position, end in places.items():
            target, found = targets[end].float(), states[position].float()
            errors[position] += float((found - target).pow(2).sum(dtype=torch.float64))
            sizes[position] += float(target.pow(2).sum(dtype=torch.float64))
            cosines[position] += float(functional.cosine_similarity(found, target, dim=-1).sum(dtype=torch.float64))
        done += len(rows)
        if progress is not None:
            progress(done, len(windows))
    tokens = windows.numel()
    return [
        Drift(structure.kept[p], end, (errors[p] / sizes[p]) ** 0.5 if sizes[p] else 0.0, cosines[p] / tokens)
        for p, end in places.items()
    ]
