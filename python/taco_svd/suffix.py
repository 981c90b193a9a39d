"""Runs a model from one decoder layer upwards, on hidden states that were computed once.

What lies below the lowest redundant layer never changes while a model is compressed, so its output is kept and the
lower layers are skipped. The model's own forward does the rest (masks, rotary embeddings, head), whatever its
architecture: the skipped layers are silenced in place, the first of them handing out the kept hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .architectures import Architecture, LinearSite, linear_shape
from .calibration import embedding_weight
from .forwards import Enough, bypassed, forward_replaced, hidden_argument, hidden_output
from .model_size import weight_bytes
from .predictions import windows_loss
from .wide_products import needs_wide_products

P = ParamSpec("P")
R = TypeVar("R")

# x [batch, tokens, in] and the gradient of the loss with respect to the output, [batch, tokens, out]
SiteCallback = Callable[[LinearSite, torch.Tensor, torch.Tensor], None]

# Tokens per run. A CPU is faster with activations that stay in its caches (classics-16l, bfloat16, backward through 11
# layers: 1024 tokens at once take three quarters of the time of 4096), a GPU with more to do per launch.
CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 4096
# Logits of a run and their gradients may take this share of the model's bytes: large vocabularies get fewer tokens.
LOGITS_SHARE, LOGITS_BYTES = 0.03, 64 << 20
# Kept hidden states of further layers may take this share of the model's bytes, or so many of a small model (whose runs
# are short of everything but memory); beyond it they are computed again.
KEPT_SHARE, KEPT_BYTES = 0.05, 64 << 20
# On a CPU and in 16 bits, explicit attention beats the flash kernel on short windows (its backward pass takes three
# times as long: bfloat16, 256 tokens, 4 heads of 32), as long as the probabilities that it keeps are few.
EAGER_SEQ_LEN = 512
EAGER_BYTES = 256 << 20
# Activations kept for one backward pass; beyond it each layer's are computed again when its turn comes. A small model
# may keep more than it is large itself: computing again takes a third of the pass (classics-16l in float32).
ACTIVATION_BYTES = 128 << 20
SMALL_MODEL, SMALL_MODEL_ACTIVATIONS = 1 << 30, 512 << 20


class SuffixRunner:
    """Runs calibration batches through a model from a fixed layer upwards.

    Args:
        architecture: the model; its modules at or above `first_layer` may be replaced between runs.
        tokens: int64 [samples, seq_len].
        first_layer: the lowest layer that will ever be replaced.
        batch_tokens: at most this many tokens are run at once (never less than one window); by default what suits
            the model's device.
        starts: further layers at which `backward` may begin, provided that nothing below the layer is replaced before
            its last run. Their hidden states are kept as far as memory allows (`KEPT_SHARE`, `KEPT_BYTES`).
        recompute: whether a layer's activations are computed again in the backward pass instead of kept; by default
            where they would exceed `ACTIVATION_BYTES` (of a small model `SMALL_MODEL_ACTIVATIONS`).
    """

    def __init__(
        self,
        architecture: Architecture,
        tokens: torch.Tensor,
        first_layer: int,
        batch_tokens: int | None = None,
        starts: Sequence[int] = (),
        recompute: bool | None = None,
    ) -> None:
        self.architecture = architecture
        self.first_layer = first_layer
        weight = embedding_weight(architecture.model)
        self.device = weight.device
        size = weight_bytes(architecture.model)
        if batch_tokens is None:
            batch_tokens = CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
            allowed_logits = max(LOGITS_BYTES, LOGITS_SHARE * size)
            batch_tokens = min(batch_tokens, int(allowed_logits // (2 * weight.shape[0] * weight.element_size())))
        rows = max(1, batch_tokens // tokens.shape[1])
        self.batches: tuple[torch.Tensor, ...] = tokens.split(rows)
        self.samples, self.seq_len = tokens.shape
        self.recompute = recompute
        kept = tokens.numel() * weight.shape[1] * weight.element_size()
        allowed = max(KEPT_BYTES, KEPT_SHARE * size)
        further = sorted({layer for layer in starts if layer > first_layer})
        # from the top: a run that begins there saves the most layers
        self._starts = [first_layer, *further[max(0, len(further) - int(allowed // kept)) :]]
        self._hidden: list[dict[int, torch.Tensor]] | None = None
        self._returns_tuple = False

    def _capture(self) -> list[dict[int, torch.Tensor]]:
        """Hidden states that enter `first_layer` and the other kept layers, per batch."""
        if self._hidden is None:
            captured: list[dict[int, torch.Tensor]] = []

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int) -> None:
                if layer == self._starts[0]:
                    captured.append({})
                captured[-1][layer] = hidden_argument(args, kwargs).detach()
                if layer == self._starts[-1]:
                    raise Enough

            def after(_: nn.Module, __: Any, output: Any) -> None:
                self._returns_tuple = isinstance(output, tuple)

            layers = self.architecture.layers
            with ExitStack() as stack:
                stack.callback(layers[0].register_forward_hook(after).remove)
                for layer in self._starts:
                    hook = layers[layer].register_forward_pre_hook(partial(before, layer=layer), with_kwargs=True)
                    stack.callback(hook.remove)
                stack.enter_context(self._attention())
                for batch in self.batches:
                    try:
                        with torch.no_grad():
                            self.architecture.model(input_ids=batch.to(self.device), use_cache=False)
                    except Enough:
                        pass
            self._hidden = captured
        return self._hidden

    @contextmanager
    def _skipping(self, index: int, start: int) -> Iterator[None]:
        """While open, layers below `start` do nothing and batch `index`'s hidden states come out of them."""
        if start == 0:
            yield
            return
        hidden = self._capture()[index][start]
        with bypassed(self.architecture.layers[:start], self._returns_tuple, hidden):
            yield

    @contextmanager
    def _attention(self) -> Iterator[None]:
        rows = max(len(batch) for batch in self.batches)
        with explicit_attention(self.architecture, rows, self.seq_len, len(self.architecture.layers)):
            yield

    @contextmanager
    def _recomputing(self, lowest: int) -> Iterator[None]:
        """While open, layers from `lowest` on keep only their inputs for the backward pass, if `recompute` says so."""
        layers = list(self.architecture.layers[lowest:])
        wanted = self.recompute
        if wanted is None:
            # what the layer's linear maps read and give; norms and activation functions keep about as much again
            widths = sum(sum(linear_shape(layers[0].get_submodule(path))) for path in self.architecture.paths)
            tokens = max(batch.numel() for batch in self.batches)
            element = embedding_weight(self.architecture.model).element_size()
            size = sum(parameter.numel() for parameter in self.architecture.model.parameters()) * element
            allowed = SMALL_MODEL_ACTIVATIONS if size < SMALL_MODEL else ACTIVATION_BYTES
            wanted = 2 * widths * tokens * element * len(layers) > allowed
        if not wanted:
            yield
            return
        with forward_replaced(layers, lambda forward: partial(_recomputed, forward)):
            yield

    def logits(self, index: int, start: int | None = None) -> torch.Tensor:
        """Logits of batch `index`, run from a kept layer (default: the first): [batch, seq_len, vocabulary]."""
        logits: torch.Tensor = self._run(index, start).logits
        return logits

    def _run(self, index: int, start: int | None = None) -> Any:
        """The output of the model's forward on batch `index`, run from a kept layer."""
        with self._skipping(index, self.first_layer if start is None else start), self._attention():
            return self.architecture.model(input_ids=self.batches[index].to(self.device), use_cache=False)

    def loss(self, index: int, start: int | None = None, scale: float = 1.0) -> torch.Tensor:
        """Next-token cross-entropy (nats) of batch `index`, weighted so that the batches' sum is `scale` times the
        set's mean. No gradient reaches the head's own parameters."""
        ids = self.batches[index].to(self.device)
        share = scale * len(ids) / self.samples
        return windows_loss(self.architecture.model, ids, share, lambda: self._run(index, start))

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
                        found[layer] = hidden_argument(args, kwargs).detach()

                    hook = stack_modules[layer].register_forward_pre_hook(before, with_kwargs=True)
                else:

                    def after(_: nn.Module, __: Any, output: Any, layer: int = layer) -> None:
                        found[layer] = hidden_output(output).detach()

                    hook = stack_modules[-1].register_forward_hook(after)
                stack.callback(hook.remove)
            self.logits(index)
        return found

    def backward(
        self,
        sites: Sequence[LinearSite],
        callback: SiteCallback,
        progress: Callable[[int, int], None] | None = None,
    ) -> float:
        """One forward and backward pass over the set; hands every site's input and output gradient to `callback`.

        One pass serves all sites. The graph begins at the lowest layer among them; no parameter gets a gradient.
        Returns the mean loss (nats per token) over the set.

        Raises:
            RuntimeError: when a site was not run by the model's forward (its statistics would be silently empty).
        """
        model = self.architecture.model
        lowest = min(site.layer for site in sites)
        start = max((layer for layer in self._starts if layer <= lowest), default=self.first_layer)
        scale = gradient_scale(model, self.samples * self.seq_len)
        total = 0.0
        with without_parameter_gradients(model), ExitStack() as stack, torch.enable_grad():
            stack.callback(
                self.architecture.layers[lowest]
                .register_forward_pre_hook(_require_grad, with_kwargs=True, prepend=True)
                .remove
            )
            stack.enter_context(gradients_watched(self.architecture, sites, callback, scale))
            stack.enter_context(self._recomputing(lowest))
            stack.enter_context(self._attention())  # the backward pass may run layers again
            for index in range(len(self.batches)):
                loss = self.loss(index, start, scale)
                loss.backward()
                total += float(loss.detach()) / scale
                if progress is not None:
                    progress(index + 1, len(self.batches))
        return total


def gradient_scale(model: PreTrainedModel, tokens: int) -> float:
    """What a loss is multiplied by before its backward pass: a float16 gradient of the mean over so many tokens would
    be subnormal. Whoever is handed gradients gets them `unscaled`."""
    return float(tokens) if model.dtype == torch.float16 else 1.0


def unscaled(gradient: torch.Tensor, scale: float) -> torch.Tensor:
    """A gradient with the factor of its loss taken out, then in float32; detached."""
    return gradient.detach() if scale == 1 else gradient.detach().float() / scale


@contextmanager
def gradients_watched(
    architecture: Architecture, sites: Sequence[LinearSite], callback: SiteCallback, scale: float
) -> Iterator[None]:
    """While open, backward passes hand every site's input and output gradient (`unscaled`) to `callback`.

    Raises:
        RuntimeError: in the end, when a site was not run (its statistics would be silently empty).
    """
    seen: set[LinearSite] = set()
    with ExitStack() as stack:
        for site in sites:

            def watch(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor, site: LinearSite = site) -> None:
                if not output.requires_grad:  # the first of two runs: `_recomputed` comes back later
                    return
                x = args[0].detach()
                seen.add(site)
                output.register_hook(lambda gradient: callback(site, x, unscaled(gradient, scale)))

            stack.callback(architecture.module(site).register_forward_hook(watch).remove)
        yield
    missed = [site.name for site in sites if site not in seen]
    if missed:
        raise RuntimeError(f"the model's forward never called {', '.join(missed)}; no statistics for them")


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode, without dropout; afterwards each of its modules is in the mode it had."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def evaluating(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function of a model in eval mode; a model that comes of it, alone or first, is in the mode of the one."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)
        was_training = model.training
        with in_evaluation(model):
            result = function(*args, **kwargs)
        made = result[0] if isinstance(result, tuple) else result
        if isinstance(made, nn.Module):
            made.train(was_training)
        return result

    return run


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode and no parameter asks for a gradient; both come back as they were."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with in_evaluation(model):
            for parameter in asking:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def explicit_attention(architecture: Architecture, rows: int, seq_len: int, layers: int) -> Iterator[None]:
    """While open, short windows of 16-bit models go through explicit attention on a CPU (see `EAGER_SEQ_LEN`).

    `rows` windows run at once; the probabilities of so many `layers` are kept for a backward pass.
    """
    config = architecture.model.config
    heads = getattr(config, "num_attention_heads", 0)
    # probabilities in float32 and in 16 bits, per layer
    kept = 6 * layers * rows * heads * seq_len**2
    if not (
        embedding_weight(architecture.model).device.type == "cpu"
        and architecture.model.dtype in (torch.bfloat16, torch.float16)
        and seq_len <= EAGER_SEQ_LEN
        and kept <= EAGER_BYTES
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and not needs_wide_products(architecture.model)  # in float32 the flash kernel is the faster one
    ):
        yield
        return
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a layer now without a graph, and again, with one, when its gradient is asked for."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if args:
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=True, preserve_rng_state=False)
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}

    def named(hidden: torch.Tensor) -> Any:
        return forward(hidden_states=hidden, **rest)

    return checkpoint(named, kwargs["hidden_states"], use_reentrant=True, preserve_rng_state=False)


def _require_grad(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Starts the graph at this layer's input, since no parameter requires a gradient."""
    hidden = hidden_argument(args, kwargs).detach().requires_grad_(True)
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
