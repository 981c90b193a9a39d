"""Runs a model from one decoder layer upwards, on hidden states that were computed once.

What lies below the lowest redundant layer never changes while a model is compressed, so its output is kept and the
lower layers are skipped. The model's own forward does the rest (masks, rotary embeddings, head), whatever its
architecture: the skipped layers are silenced in place, the first of them handing out the kept hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .architectures import Architecture, LinearSite
from .calibration import embedding_weight

# x [batch, tokens, in] and the gradient of the loss with respect to the output, [batch, tokens, out]
SiteCallback = Callable[[LinearSite, torch.Tensor, torch.Tensor], None]


class SuffixRunner:
    """Runs calibration batches through a model from a fixed layer upwards.

    Args:
        architecture: the model; its modules at or above `first_layer` may be replaced between runs.
        tokens: int64 [samples, seq_len].
        first_layer: the lowest layer that will ever be replaced.
        batch_tokens: at most this many tokens are run at once (never less than one window).
    """

    def __init__(
        self, architecture: Architecture, tokens: torch.Tensor, first_layer: int, batch_tokens: int = 4096
    ) -> None:
        self.architecture = architecture
        self.first_layer = first_layer
        self.device = embedding_weight(architecture.model).device
        rows = max(1, batch_tokens // tokens.shape[1])
        self.batches: tuple[torch.Tensor, ...] = tokens.split(rows)
        self.samples = tokens.shape[0]
        self._hidden: list[torch.Tensor] | None = None
        self._returns_tuple = False

    def _capture(self) -> list[torch.Tensor]:
        """Hidden states that enter `first_layer`, per batch."""
        if self._hidden is None:
            captured: list[torch.Tensor] = []

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                captured.append(_hidden_argument(args, kwargs).detach())
                raise _Enough

            def after(_: nn.Module, __: Any, output: Any) -> None:
                self._returns_tuple = isinstance(output, tuple)

            layers = self.architecture.layers
            with ExitStack() as stack:
                stack.callback(layers[0].register_forward_hook(after).remove)
                hook = layers[self.first_layer].register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(hook.remove)
                for batch in self.batches:
                    try:
                        with torch.no_grad():
                            self.architecture.model(input_ids=batch.to(self.device), use_cache=False)
                    except _Enough:
                        pass
            self._hidden = captured
        return self._hidden

    @property
    def returns_tuple(self) -> bool:
        """Whether this model's layers return a tuple (older transformers) rather than the hidden states."""
        if self.first_layer > 0:
            self._capture()
        return self._returns_tuple

    @contextmanager
    def _skipping(self, index: int) -> Iterator[None]:
        """While open, layers below `first_layer` do nothing and batch `index`'s hidden states come out of them."""
        if self.first_layer == 0:
            yield
            return
        hidden = self._capture()[index]
        silenced = list(self.architecture.layers[: self.first_layer])

        def passing(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._returns_tuple else hidden

        for layer in silenced:
            layer.forward = passing
        try:
            yield
        finally:
            for layer in silenced:
                del layer.forward  # the instance attribute; the class's forward shows again

    def logits(self, index: int) -> torch.Tensor:
        """Logits of batch `index`: [batch, seq_len, vocabulary]."""
        with self._skipping(index):
            output = self.architecture.model(input_ids=self.batches[index].to(self.device), use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    def loss(self, index: int) -> torch.Tensor:
        """Next-token cross-entropy (nats) of batch `index`, weighted so that the batches' sum is the set's mean."""
        share = len(self.batches[index]) / self.samples
        return next_token_loss(self.logits(index), self.batches[index].to(self.device)) * share

    @torch.no_grad()
    def mean_loss(self) -> float:
        """Mean next-token cross-entropy (nats per token) over the whole set."""
        return float(sum(self.loss(index).double() for index in range(len(self.batches))))

    @torch.no_grad()
    def layer_inputs(self, index: int, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Hidden states entering each of `layers` for batch `index`; len(stack) means the last layer's output."""
        found: dict[int, torch.Tensor] = {}
        stack_modules = self.architecture.layers
        with ExitStack() as stack:
            for layer in layers:
                if layer < len(stack_modules):

                    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
                        found[layer] = _hidden_argument(args, kwargs).detach()

                    hook = stack_modules[layer].register_forward_pre_hook(before, with_kwargs=True)
                else:

                    def after(_: nn.Module, __: Any, output: Any, layer: int = layer) -> None:
                        found[layer] = (output[0] if isinstance(output, tuple) else output).detach()

                    hook = stack_modules[-1].register_forward_hook(after)
                stack.callback(hook.remove)
            self.logits(index)
        return found

    def backward(
        self,
        sites: Sequence[LinearSite],
        callback: SiteCallback,
        progress: Callable[[int, int], None] | None = None,
        residual_callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
        residual_layers: Sequence[int] = (),
    ) -> float:
        """One forward and backward pass over the set; hands every site's input and output gradient to `callback`.

        One pass serves all sites. The graph begins at the lowest layer among them; no parameter gets a gradient.
        `residual_callback(layer, hidden, gradient)` is called likewise for the hidden states that leave each of
        `residual_layers`. Returns the mean loss (nats per token) over the set.

        Raises:
            RuntimeError: when a site was not run by the model's forward (its statistics would be silently empty).
        """
        model = self.architecture.model
        lowest = min([site.layer for site in sites] + list(residual_layers))
        was_training = model.training
        frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        seen: set[LinearSite] = set()
        total = 0.0
        try:
            model.eval()
            for parameter in frozen:
                parameter.requires_grad_(False)
            with ExitStack() as stack, torch.enable_grad():
                stack.callback(
                    self.architecture.layers[lowest]
                    .register_forward_pre_hook(_require_grad, with_kwargs=True, prepend=True)
                    .remove
                )
                for site in sites:

                    def watch(
                        _: nn.Module, args: tuple[Any, ...], output: torch.Tensor, site: LinearSite = site
                    ) -> None:
                        x = args[0].detach()
                        seen.add(site)
                        output.register_hook(lambda gradient: callback(site, x, gradient.detach()))

                    stack.callback(self.architecture.module(site).register_forward_hook(watch).remove)
                for layer in residual_layers:

                    def watch_residual(_: nn.Module, __: Any, output: Any, layer: int = layer) -> None:
                        hidden = output[0] if isinstance(output, tuple) else output
                        kept = hidden.detach()
                        assert residual_callback is not None
                        hidden.register_hook(lambda gradient: residual_callback(layer, kept, gradient.detach()))

                    stack.callback(self.architecture.layers[layer].register_forward_hook(watch_residual).remove)
                for index in range(len(self.batches)):
                    loss = self.loss(index)
                    loss.backward()
                    total += float(loss.detach())
                    if progress is not None:
                        progress(index + 1, len(self.batches))
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            model.train(was_training)
        missed = [site.name for site in sites if site not in seen]
        if missed:
            raise RuntimeError(f"the model's forward never called {', '.join(missed)}; no statistics for them")
        return total


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) of each token given those before it; labels are shifted here and nowhere else.

    logits [batch, seq_len, vocabulary], tokens int64 [batch, seq_len]; computed in float32.
    """
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


class _Enough(Exception):
    """Ends a forward pass once what was wanted has been seen."""


def _hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _require_grad(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Starts the graph at this layer's input, since no parameter requires a gradient."""
    hidden = _hidden_argument(args, kwargs).detach().requires_grad_(True)
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
