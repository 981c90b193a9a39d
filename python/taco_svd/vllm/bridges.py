"""Bridges in vLLM: a decoder layer that passes the residual stream through a low-rank map."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm

import taco_kernels

from ..errors import TacoError
from ..structure import BridgeSpec

# Layer classes that return (hidden_states, residual) whose sum is the residual stream. Others return a pair that means
# something else (Cohere's second one is stale), so a pair from an unknown class is refused.
PAIRS = frozenset(
    {
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "GemmaDecoderLayer",
        "Gemma2DecoderLayer",
        "Gemma3DecoderLayer",
        "MixtralDecoderLayer",
        "Qwen3MoeDecoderLayer",
    }
)


class Bridge(nn.Module):
    """``h + u (v rmsnorm(h)) + bias`` on the residual stream h [tokens, hidden]; every rank computes all of it.

    Parameters `v` [rank, hidden], `u` [hidden, rank], `bias` [hidden] or None.
    """

    def __init__(self, hidden: int, spec: BridgeSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = spec.eps
        self.v = nn.Parameter(torch.empty(spec.rank, hidden, dtype=dtype), requires_grad=False)
        self.u = nn.Parameter(torch.empty(hidden, spec.rank, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(hidden, dtype=dtype), requires_grad=False) if spec.bias else None
        self.norm = RMSNorm(hidden, eps=spec.eps, dtype=dtype)
        # Ones, not has_weight=False: vLLM fuses a norm with the all-reduce before it into a kernel that needs a weight,
        # also where there is none. A buffer, since no checkpoint holds it: vLLM's dummy weights leave it alone, and
        # sleep mode keeps it.
        ones = self.norm.weight.data
        ones.weight_loader_numel = 0  # what vLLM waits for when weights are loaded a second time
        del self.norm.weight
        self.norm.register_buffer("weight", ones, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return taco_kernels.low_rank_bridge(hidden, self.v, self.u, self.bias, self.eps)

    def forward_pair(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a stream that is kept as a pair to be summed by the next norm.

        Adding and normalising is one fused kernel of vLLM, and what the bridge adds is summed by the next layer's norm
        like any layer's output: a bridge costs one norm and one low-rank linear map.
        """
        normed, stream = self.norm(hidden, residual)
        return taco_kernels.low_rank_linear(normed, self.v, self.u, self.bias), stream


class _BridgedMixin:
    bridge: Bridge
    taco_stream: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(output, tuple):
            return self.bridge(output)
        hidden, *rest = output
        if self.taco_stream == "first" or all(other is None for other in rest):
            return self.bridge(hidden), *rest
        if self.taco_stream == "pair":
            return *self.bridge.forward_pair(hidden, rest[0]), *rest[1:]
        raise _unknown(type(self).__bases__[1])


def _unknown(layer_class: type) -> TacoError:
    return TacoError(
        f"vLLM's {layer_class.__name__} hands on its residual stream in a way that bridges have not been tested with; "
        "compress without bridges for vLLM (--method taco, paper or removal), or serve with transformers."
    )


_bridged_classes: dict[type[nn.Module], type[nn.Module]] = {}


def attach(layer: nn.Module, spec: BridgeSpec, hidden: int, dtype: torch.dtype) -> None:
    """Makes a decoder layer of vLLM pass its output through a bridge (with empty weights), in place.

    Raises:
        TacoError: the layer's class returns a pair whose meaning is not known, or vLLM has replaced its forward.
    """
    base: Any = type(layer)
    if "forward" in vars(layer):  # it would go on calling the one without a bridge
        raise TacoError(
            "vLLM moves this model's weights in and out around each layer's call, which is not supported for models "
            "with bridges; leave out --offload-group-size, or use --cpu-offload-gb where memory can be shared (UVA)."
        )
    definer = next(cls for cls in base.__mro__ if "forward" in vars(cls))
    # A tuple's first tensor is the stream in transformers' layers, which vLLM runs by its Transformers backend. Its own
    # layers hand on a pair, whatever that means, if they take one or say so (the second one of StableLM's is stale).
    stream = "alone"
    if definer.__name__ in PAIRS:
        stream = "pair"
    elif definer.__module__.startswith("transformers."):
        stream = "first"
    else:
        signature = inspect.signature(definer.forward)
        if "residual" in signature.parameters or "tuple" in str(signature.return_annotation).lower():
            raise _unknown(base)
    if base not in _bridged_classes:
        namespace = {"__module__": __name__, "taco_stream": stream}
        _bridged_classes[base] = type(f"Bridged{base.__name__}", (_BridgedMixin, base), namespace)
    layer.__class__ = _bridged_classes[base]
    layer.bridge = Bridge(hidden, spec, dtype)
