"""One forward and one backward pass, a layer at a time: all calibration batches go through a layer before the next.

Of a model that is larger than memory each layer is then read twice, however many batches there are, and what is
gathered at a layer is complete when its turn is over. Hidden states between layers are kept in a `Store`, so that a
pass that was interrupted goes on where it stopped; on a GPU, where a pass is over sooner than they would be written (of
Llama-2-7B and 64 windows of 2048 tokens 70 GB), in the machine's memory. The mathematics is that of
`SuffixRunner.backward` with every layer's activations computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from .architectures import Architecture, LinearSite
from .calibration import embedding_weight
from .memory import host_room
from .predictions import windows_loss
from .progress import Report
from .store import Store
from .suffix import (
    CPU_BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    SiteCallback,
    gradient_scale,
    gradients_watched,
    unscaled,
    without_parameter_gradients,
)
from .walk import Walk

# layer, gradient of the loss with respect to the hidden states that leave it: [batch, tokens, hidden]
ResidualCallback = Callable[[int, torch.Tensor], None]


def _is_quick(device: torch.device) -> bool:
    """Whether a pass is over sooner than what lies between its layers would be written."""
    return device.type == "cuda"


class LayerwisePass:
    """Runs a token set forward to the loss and backward to a layer, one layer at a time.

    Args:
        architecture: the model; it is not changed.
        tokens: int64 [samples, seq_len].
        store: where hidden states and gradients between layers are kept; entries are named after `name`. Of a model on
            a GPU a lasting store gets none: a pass that was interrupted begins anew.
        name: tells passes over different sets apart.
        batch_tokens: at most this many tokens are run at once (never less than one window).
        samples: windows of the whole set whose mean loss is meant, where `tokens` are a part of it.
    """

    def __init__(
        self,
        architecture: Architecture,
        tokens: torch.Tensor,
        store: Store,
        name: str = "pass",
        batch_tokens: int | None = None,
        samples: int | None = None,
    ) -> None:
        self.architecture, self.tokens, self.name = architecture, tokens, name
        self.device = embedding_weight(architecture.model).device
        if batch_tokens is None:
            batch_tokens = CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
        rows = max(1, batch_tokens // tokens.shape[1])
        self.walk = Walk(architecture, tokens.split(rows), explicit_attention=True)
        self.depth = len(architecture.layers)
        begins_anew = store.lasting and _is_quick(self.device)
        self._own = Store(memory=host_room(store.team.size)) if begins_anew else None
        self._between = self._own or store
        self._samples = samples or len(tokens)

    def backward(
        self,
        sites: Sequence[LinearSite],
        callback: SiteCallback,
        lowest: int | None = None,
        residual_callback: ResidualCallback | None = None,
        finished: Callable[[int], None] | None = None,
        report: Report | None = None,
    ) -> None:
        """Hands every site's input and output gradient to `callback`, layer by layer from the top.

        Args:
            lowest: the pass ends there; default the lowest layer among the sites.
            residual_callback: gets the gradient at the hidden states that leave each layer, batch by batch.
            finished: called when a layer has handed out everything; what it stores survives an interruption that
                comes later. A pass that goes on after one hands out the layers that were not finished.

        Raises:
            RuntimeError: when a site was not run by the model's forward.
        """
        if lowest is None:
            lowest = min(site.layer for site in sites)
        model = self.architecture.model
        scale = gradient_scale(model, self._samples * self.tokens.shape[1])
        total = (self.depth - lowest) * 2
        tell = report or (lambda done, of: None)
        with without_parameter_gradients(model), ExitStack() as stack:
            if self._own is not None:
                stack.callback(self._own.delete)
            above = self._resume_at(lowest)
            if above is None:
                self._forward(lowest, lambda done: tell(done, total))
                above = self.depth
                gradients = self._head(scale)
            else:
                gradients = self._load("gradient", above)
            for layer in range(above - 1, lowest - 1, -1):
                here = [site for site in sites if site.layer == layer]
                gradients = self._layer(layer, here, gradients, callback, residual_callback, scale)
                if finished is not None:
                    finished(layer)
                self._save("gradient", layer, gradients)
                self._between.drop(self._entry("gradient", layer + 1))
                self._between.drop(self._entry("hidden", layer + 1))
                tell(self.depth - lowest + self.depth - layer, total)
            self._between.drop(self._entry("hidden", lowest))
            self._between.drop(self._entry("gradient", lowest))

    # -- steps ------------------------------------------------------------------------------------------------------

    def _forward(self, lowest: int, tell: Callable[[int], None]) -> None:
        """Stores what enters each layer from `lowest` on, and what leaves the last."""
        start = next((layer for layer in range(self.depth, lowest - 1, -1) if self._has("hidden", layer)), None)
        hidden = list(self.walk.entering) if start is None else self._load("hidden", start)
        for layer in range(start or 0, self.depth):
            if layer >= lowest and not self._has("hidden", layer):
                self._save("hidden", layer, hidden)
            hidden = self.walk.through(layer, hidden)
            if layer >= lowest:
                tell(layer + 1 - lowest)
        if not self._has("hidden", self.depth):
            self._save("hidden", self.depth, hidden)

    def _head(self, scale: float) -> list[torch.Tensor]:
        """Gradients of the set's mean loss (times `scale`) at the hidden states that leave the last layer."""
        found = []
        for batch, hidden in enumerate(self._load("hidden", self.depth)):
            h = hidden.requires_grad_(True)
            tokens = self.walk.batches[batch].to(self.device)
            with torch.enable_grad():
                share = scale * len(tokens) / self._samples
                loss = windows_loss(self.architecture.model, tokens, share, partial(self.walk.output, batch, h))
                (gradient,) = torch.autograd.grad(loss, h)
            found.append(gradient)
        return found

    def _layer(
        self,
        layer: int,
        sites: Sequence[LinearSite],
        gradients: list[torch.Tensor],
        callback: SiteCallback,
        residual_callback: ResidualCallback | None,
        scale: float,
    ) -> list[torch.Tensor]:
        """Gradients at the hidden states that enter the layer, from those that leave it."""
        module = self.architecture.layers[layer]
        entering = []
        with gradients_watched(self.architecture, sites, callback, scale), torch.enable_grad():
            for batch, hidden in enumerate(self._load("hidden", layer)):
                if residual_callback is not None:
                    residual_callback(layer, unscaled(gradients[batch], scale))
                h = hidden.requires_grad_(True)
                with self.walk.attention(batch):
                    out = self.walk.call(module, layer, batch, h)
                    (gradient,) = torch.autograd.grad(out, h, gradients[batch].to(out.dtype))
                entering.append(gradient)
        self.walk.let_go(module)
        return entering

    # -- what is kept between layers --------------------------------------------------------------------------------

    def _entry(self, kind: str, layer: int) -> str:
        return f"{self.name}/{kind}/{layer}"

    def _has(self, kind: str, layer: int) -> bool:
        return self._entry(kind, layer) in self._between

    def _resume_at(self, lowest: int) -> int | None:
        """The layer whose entering gradients are known and below which everything needed is there."""
        for layer in range(lowest + 1, self.depth):
            if self._has("gradient", layer) and all(self._has("hidden", below) for below in range(lowest, layer)):
                return layer
        return None

    def _save(self, kind: str, layer: int, batches: Sequence[torch.Tensor]) -> None:
        self._between.put(self._entry(kind, layer), {str(number): tensor for number, tensor in enumerate(batches)})

    def _load(self, kind: str, layer: int) -> list[torch.Tensor]:
        found = self._between.get(self._entry(kind, layer))
        return [found[str(number)].detach().to(self.device) for number in range(len(self.walk.batches))]
