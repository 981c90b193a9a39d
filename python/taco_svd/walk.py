"""Walks up a model layer by layer: each decoder layer is run by itself on hidden states that the caller holds.

`SuffixRunner` runs whole suffixes, for gradients; a walk runs each layer as often as a closed-form fit needs it, and
nothing else. Masks, positions and whatever else the model hands to its layers are recorded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .architectures import Architecture, LinearSite, linear_shape
from .calibration import embedding_weight
from .experts import expert_number
from .forwards import Enough, bypassed, hidden_argument, hidden_output
from .mapped import held, is_mapped, page_out
from .suffix import explicit_attention

# of a linear map: its input [batch, tokens, in], its output [batch, tokens, out]
Watch = Callable[[torch.Tensor, torch.Tensor], None]


class Walk:
    """The way a model calls its layers, recorded for every batch of a token set without running them.

    Args:
        explicit_attention: layers are called with explicit attention where that is faster (see
            `suffix.explicit_attention`); by default the model's own.

    Attributes:
        batches: the token batches, int64 [rows, seq_len].
        entering: per batch the hidden states that enter layer 0: [rows, seq_len, hidden].
    """

    def __init__(
        self, architecture: Architecture, batches: Sequence[torch.Tensor], explicit_attention: bool = False
    ) -> None:
        self.architecture = architecture
        self.batches = tuple(batches)
        self.entering: list[torch.Tensor] = []
        self._explicit_attention = explicit_attention
        self._mapped = is_mapped(architecture.model)
        self._device = embedding_weight(architecture.model).device
        self._returns_tuple = layers_return_tuples(architecture, self.batches[0][:1, :2]) if self.batches else False
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        for number, batch in enumerate(self.batches):
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def record(
                _: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = calls,
            ) -> None:
                if not calls:
                    self.entering.append(hidden_argument(args, kwargs).detach())
                rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                calls.append((args[1:], rest))
                if len(calls) == len(architecture.layers):
                    raise Enough

            with ExitStack() as stack, torch.no_grad(), suppress(Enough):
                for layer in architecture.layers:
                    stack.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
                # what a layer is called with does not depend on what the layers below made of it
                stack.enter_context(bypassed(architecture.layers, self._returns_tuple))
                stack.enter_context(self.attention(number))
                architecture.model(input_ids=batch.to(self._device), use_cache=False)
            self._calls.append(calls)

    @contextmanager
    def attention(self, batch: int) -> Iterator[None]:
        """While open, layers run with the attention that they were recorded with (backward passes need it too)."""
        if not self._explicit_attention:
            yield
            return
        rows, seq_len = self.batches[batch].shape
        with explicit_attention(self.architecture, rows, seq_len, 1):
            yield

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """What `layer`, called as the model's layer `index` is, makes of batch number `batch`'s hidden states."""
        with self.attention(batch):
            return self.call(layer, index, batch, hidden)

    def call(self, layer: nn.Module, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """As `run`, but gradients flow if they are enabled, and `attention` is the caller's matter."""
        args, kwargs = self._calls[batch][index]
        with held():  # whoever walks runs the layer for every batch
            output: Any = layer(hidden, *args, **kwargs)
        return hidden_output(output)

    def through(
        self, layer: int, stream: Sequence[torch.Tensor], architecture: Architecture | None = None
    ) -> list[torch.Tensor]:
        """What a layer makes of all batches' hidden states; of a mapped model its pages then go back to the system.

        The layer is that of `architecture`, a copy of the recorded model whose modules may be replaced; default the
        recorded one.
        """
        module = (architecture or self.architecture).layers[layer]
        leaving = [self.run(module, layer, batch, hidden) for batch, hidden in enumerate(stream)]
        self.let_go(module)
        return leaving

    def let_go(self, module: nn.Module) -> None:
        """Says that a layer will not be needed soon."""
        if self._mapped:
            page_out(module)

    def logits(self, batch: int, hidden: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """What the model's last norm and head make of the hidden states that leave the last layer.

        `rows` of the batch only, so that the logits of a large vocabulary need not be held for all of them.
        """
        logits: torch.Tensor = self.output(batch, hidden, rows).logits
        return logits

    def output(self, batch: int, hidden: torch.Tensor, rows: slice = slice(None)) -> Any:
        """The output of the model's forward on hidden states that leave the last layer."""
        with bypassed(self.architecture.layers, self._returns_tuple, hidden[rows]):
            return self.architecture.model(input_ids=self.batches[batch][rows].to(self._device), use_cache=False)


def layers_return_tuples(architecture: Architecture, tokens: torch.Tensor) -> bool:
    """Whether this model's layers return a tuple (older transformers) rather than the hidden states."""
    seen: list[bool] = []

    def after(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))
        raise Enough

    handle = architecture.layers[0].register_forward_hook(after)
    try:
        with torch.no_grad(), suppress(Enough):
            device = embedding_weight(architecture.model).device
            architecture.model(input_ids=tokens.to(device), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def watching(module: nn.Module, watch: Watch) -> Iterator[None]:
    """While open, `watch(input, output)` is called whenever the linear map `module` runs."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        watch(args[0].detach(), output.detach())

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Writers:
    """The linear maps whose outputs are added to the residual stream as they are; None where a block has none.

    Gemma's blocks, for example, normalise their outputs before they are added: they have none.

    Attributes:
        attention, mlp: of each block.
        added: the module whose output is all that the MLP block adds: its map, or a whole block of experts.
    """

    attention: LinearSite | None
    mlp: LinearSite | None
    added: LinearSite | None = None


def comes_out(plain: torch.Tensor, moved: torch.Tensor, added: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether what was added to a map's output has come out of its layer unchanged, but for rounding.

    Single elements cannot tell in 16 bits: a stream has features a hundred times the others' size, and is rounded at
    theirs. So all must be within the rounding of the largest, and the factor by which `added` has come out, over all
    tokens and features, must be one: its error is smaller by the root of their number.

    Args:
        plain, moved: what comes out without and with it, float64 [..., width].
        added: float64, as many features.
        dtype: in which the layer computes.
    """
    eps = torch.finfo(dtype).eps
    off = moved - plain - added
    # by the largest value: where terms cancel, the sum is smaller than what was rounded on the way to it
    if not bool((off.abs() <= 8 * eps * float(plain.abs().amax() + moved.abs().amax())).all()):
        return False
    strength = float(added.expand_as(off).square().sum())
    rounding = eps * float((plain.square() + moved.square()).mean().sqrt())
    return abs(float((off * added).sum())) <= (8 * rounding * strength**0.5 + 1e-3 * strength)


def residual_writers(architecture: Architecture, walk: Walk, layer: int) -> Writers:
    """Finds the maps of a layer that write straight to the residual stream, by trying.

    A constant added to such a map's output must come out of the layer unchanged. For the attention block the output
    of the MLP's map is silenced meanwhile, since the MLP reads what attention writes.
    """
    module = architecture.layers[layer]
    hidden = walk.entering[0][:1]
    batch = walk.batches[0]
    if batch.shape[0] > 1:
        walk = Walk(architecture, [batch[:1]])
        hidden = walk.entering[0]
    width = hidden.shape[-1]

    def leaves(changes: dict[LinearSite, Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
        with ExitStack() as stack:
            for site, change in changes.items():

                def hook(_: nn.Module, __: Any, output: torch.Tensor, change: Any = change) -> torch.Tensor:
                    changed: torch.Tensor = change(output)
                    return changed

                stack.callback(module.get_submodule(site.path).register_forward_hook(hook).remove)
            return walk.run(module, layer, 0, hidden).double()

    size = float(leaves({}).abs().mean())
    pattern = torch.linspace(-1, 1, width, device=hidden.device, dtype=torch.float64) * (size or 1.0)
    pattern = pattern.to(hidden.dtype).double()  # as it is added

    def writes(site: LinearSite, silenced: dict[LinearSite, Callable[[torch.Tensor], torch.Tensor]]) -> bool:
        plain = leaves(silenced)
        moved = leaves({**silenced, site: lambda output: output + pattern.to(output.dtype)})
        return comes_out(plain, moved, pattern, hidden.dtype)

    def returns_tensor(site: LinearSite) -> bool:
        seen: list[bool] = []
        handle = module.get_submodule(site.path).register_forward_hook(
            lambda _, __, output: seen.append(isinstance(output, torch.Tensor))
        )
        try:
            walk.run(module, layer, 0, hidden)
        finally:
            handle.remove()
        return seen == [True]

    def last_writer(block: str, silenced: dict[LinearSite, Callable[[torch.Tensor], torch.Tensor]]) -> Any:
        for site in reversed(architecture.sites([layer], block)):
            if expert_number(site.path) is not None:  # weighted by the router, on its own tokens: never as it is
                continue
            if linear_shape(architecture.module(site))[0] == width and writes(site, silenced):
                return site
        return None

    mlp = added = last_writer("mlp", {})
    if added is None and architecture.experts_block is not None:
        block = LinearSite(layer, architecture.experts_block, "mlp")  # what single experts give is weighted first
        added = block if returns_tensor(block) and writes(block, {}) else None
    if added is None:
        return Writers(None, None)
    return Writers(last_writer("attention", {added: torch.zeros_like}), mlp, added)
