"""One model that can be asked again and again for a timed prefill or for timed decode steps, in one of three modes.

=============  =====================================================================================================
``eager``      transformers as it is, growing cache
``compiled``   ``torch.compile(fullgraph=True)`` over a static cache; on a GPU ``mode="reduce-overhead"``
``graph``      eager kernels captured in one CUDA graph over a static cache
=============  =====================================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from .devices import on_device, waits_for
from .errors import TacoError, first_line
from .experts import open_modules

MODES = ("eager", "compiled", "graph")
PHASES = ("prefill", "decode")


class Runner:
    """A model at one batch size and prompt length, ready to be timed.

    Args:
        model: in eval mode, on its device.
        mode: one of `MODES`.
        batch, prompt: sequences at once, and tokens each before decoding starts.
        decode_steps: tokens decoded before the cache goes back to the prompt's end (not timed).
        phases: what will be asked for; only that is prepared.

    The cache of a batch holds one prompt `batch` times: attention costs the same, and a prefill of the whole batch,
    minutes on a CPU, is not needed to time a decode step.

    Raises:
        TacoError: see `check_mode`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mode: str = "eager",
        batch: int = 1,
        prompt: int = 128,
        decode_steps: int = 32,
        phases: tuple[str, ...] = PHASES,
    ) -> None:
        check_mode(model, mode)
        self.model, self.mode, self.batch, self.prompt = model, mode, batch, prompt
        self.decode_steps = decode_steps
        self.device = model.device
        self.wait = waits_for(self.device)
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(int(vocabulary), (batch, prompt), generator=generator).to(self.device)
        self.token = self.ids[:, :1].clone()
        self.used = 0
        with torch.inference_mode(), on_device(self.device):
            if "decode" in phases:
                self._prepare_decode()
            if "prefill" in phases:
                self._prepare_prefill()

    # -- what is timed -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self) -> float:
        """Seconds of one forward pass over the prompts, cache included, logits of the last token only."""
        with on_device(self.device):
            cache = self._new_prefill_cache()
            self.wait()
            start = time.perf_counter()
            self._prefill(cache)
            self.wait()
            return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, steps: int = 1) -> float:
        """Seconds per step of one token for each sequence, over `steps` steps after another."""
        with on_device(self.device):
            if self.used + steps > self.decode_steps:
                self._rewind()
            self.used += steps
            self.wait()
            start = time.perf_counter()
            for _ in range(steps):
                # always the same token instead of the most likely one: the sampler is no part of what is compared
                self._step()
            self.wait()
            return (time.perf_counter() - start) / steps

    # -- prefill -----------------------------------------------------------------------------------------------

    def _prepare_prefill(self) -> None:
        self._prefill_cache: StaticCache | None = None
        self._prefill_graph: torch.cuda.CUDAGraph | None = None
        self._prefill_forward: Any = self.model.forward
        if self.mode == "compiled":
            self._prefill_forward = _compiled(self.model.forward, self.device)
        # The last token by an index, whose result is contiguous. Of the view that logits_to_keep=1 gives, torch 2.13's
        # product in bfloat16 takes 50 times as long on a CPU (0.35 s for a vocabulary of 32,000), in every model alike.
        self._last = torch.tensor([self.prompt - 1], device=self.device)
        if self.mode == "graph":
            cache = self._new_prefill_cache()
            self._prefill_graph = capture(lambda: self._prefill(cache), lambda: _set_length(cache, 0))

    # A method like `_step`, not a function kept in an attribute: that would refer back to the runner, whose caches and
    # graphs would then stay until the collector comes, which is off while the clock runs.
    def _prefill(self, cache: Any) -> None:
        if self._prefill_graph is not None:
            self._prefill_graph.replay()
        else:
            self._prefill_forward(input_ids=self.ids, past_key_values=cache, use_cache=True, logits_to_keep=self._last)

    def _new_prefill_cache(self) -> Any:
        if self.mode == "eager":
            return DynamicCache(config=self.model.config)
        if self._prefill_cache is None:
            self._prefill_cache = _static_cache(self.model, self.batch, self.prompt)
        _set_length(self._prefill_cache, 0)
        return self._prefill_cache

    # -- decode ------------------------------------------------------------------------------------------------

    def _prepare_decode(self) -> None:
        # made without a config it keeps every token, also of layers with a sliding window: the caches that are filled
        # from it drop what they do not need, and know how long the prompt was
        cache = DynamicCache()
        self.model(input_ids=self.ids[:1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers: list[Any] = list(cache.layers)
        self._prompt_states = [(layer.keys, layer.values) for layer in layers]
        self._cache: Any = None
        self._rewind()
        self._decode_graph: torch.cuda.CUDAGraph | None = None
        self._decode_forward: Any = self.model
        if self.mode == "compiled":
            self._decode_forward = _compiled(self.model.forward, self.device)
        if self.mode == "graph":
            self._decode_graph = capture(self._step, lambda: _set_length(self._cache, self.prompt))
            self._rewind()

    def _step(self) -> None:
        if self._decode_graph is not None:
            self._decode_graph.replay()
        else:
            self._decode_forward(input_ids=self.token, past_key_values=self._cache, use_cache=True)

    def _rewind(self) -> None:
        """The cache as it was at the prompt's end."""
        self.used = 0
        if self.mode != "eager" and self._cache is not None:
            _set_length(self._cache, self.prompt)
            return
        self._cache = None  # before the new one is made: two do not fit where one is large
        if self.mode == "eager":
            self._cache = DynamicCache(config=self.model.config)
        else:
            self._cache = _static_cache(self.model, self.batch, self.prompt + self.decode_steps)
        for index, states in enumerate(self._prompt_states):
            keys, values = (state.expand(self.batch, *state.shape[1:]) for state in states)
            self._cache.update(keys, values, index)


def check_mode(model: PreTrainedModel, mode: str) -> None:
    """Refuses a mode in which a model cannot run.

    Raises:
        TacoError: unknown, ``graph`` without a GPU, or ``graph`` or ``compiled`` of a model with open experts.
    """
    if mode not in MODES:
        raise TacoError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if mode == "graph" and model.device.type != "cuda":
        raise TacoError("--mode graph needs a GPU (--device cuda).")
    if mode != "eager" and next(open_modules(model), None) is not None:
        raise TacoError(
            f"--mode {mode} cannot run a model whose experts are factorised one by one: which of them run is decided "
            "on the host, token by token. Take --mode eager, or compress with --experts whole."
        )


def _compiled(forward: Any, device: torch.device) -> Any:
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)


def _static_cache(model: PreTrainedModel, batch: int, length: int) -> StaticCache:
    """A static cache whose tensors exist already: a compiled prefill must find them at fixed addresses."""
    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    # A layer that keeps a sliding window only counts its tokens in Python: another graph for every one of them, and
    # none at all once the window is full. With all tokens kept the mask leaves out the same ones.
    cache.layers = [
        StaticLayer(max_cache_len=length) if getattr(layer, "is_sliding", False) else layer for layer in cache.layers
    ]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, heads, width, model.dtype, model.device)
    return cache


def _set_length(cache: Any, length: int) -> None:
    """Tells a static cache, in place, that it holds `length` tokens."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def capture(run: Callable[[], object], reset: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph of the current device; `reset` undoes what it did to its inputs.

    Raises:
        TacoError: it cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose and load their kernels outside the capture
            run()
            reset()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # on a stream of this device: torch's own for captures belongs to the device of the process's first one
    try:
        with torch.cuda.graph(graph, stream=side):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # the first of them is why: ending a capture that has failed is an error too
        cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        first = first_line(cause)
        raise TacoError(f"What is to be timed cannot be captured in a CUDA graph: {first}") from error
    reset()
    return graph
