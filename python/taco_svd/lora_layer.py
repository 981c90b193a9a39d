"""PEFT's LoRA layer around a factorised map."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from .errors import TacoError
from .int8_linear import Int8LowRankLinear
from .replacement import LowRankLinear

# Values of init_lora_weights that look at no weight: eva goes by a map's inputs.
STARTS = ("gaussian", "eva")
# What peft 0.19 would pass over in silence here; newer ones refuse by name what a layer does not say that it knows.
VARIANTS = ("alora_invocation_tokens", "arrow_config", "use_bdlora", "use_qalora")
WAYS_OUT = (
    "serve the adapter unmerged (transformers, or vLLM: docs/vllm.md), or train it on the dense model that "
    "`taco-svd export` writes"
)


@functools.cache
def lora_class() -> type[nn.Module]:
    """The adapter around a `LowRankLinear` or `Int8LowRankLinear`; made on demand, since peft is an optional package.

    Raises:
        TacoError: peft is missing, or older than 0.19.
    """
    try:
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.tuners_utils import check_adapters_to_merge
    except ImportError:
        raise TacoError("LoRA on a compressed model needs peft: pip install peft.") from None
    if "config" not in inspect.signature(LoraLayer.update_layer).parameters:
        raise TacoError("LoRA on a compressed model needs peft 0.19 or later: pip install -U peft.")

    # "Linear" in its name is how PEFT knows maps that have an adapter already (target_modules="all-linear")
    class LowRankLoraLinear(nn.Module, LoraLayer):
        """``base(x) + scaling B A dropout(x)``: a second pair of factors beside the compressed ones."""

        # peft's own, by adapter; its package has no types to take them from
        lora_A: Any
        lora_B: Any
        lora_bias: Any
        lora_dropout: Any
        base_layer: Any
        scaling: Any
        active_adapters: Any
        disable_adapters: Any
        merged: Any
        merged_adapters: Any
        get_base_layer: Any
        kwargs: Any
        _check_forward_args: Any
        _mixed_batch_forward: Any

        def __init__(
            self,
            base_layer: nn.Module,
            adapter_name: str,
            config: Any,
            r: int = 8,
            lora_alpha: int = 8,
            **kwargs: Any,
        ) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)
            self._active_adapter = adapter_name
            # the base layer's factors before the first adapter was merged
            self._unmerged: tuple[torch.Tensor | None, ...] | None = None
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
            _check(config)
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            # peft looks for a `weight` to learn the device from
            for part in (self.lora_A, self.lora_B):
                part[adapter_name].to(next(self.get_base_layer().parameters()).device)

        def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
            return module.in_features, module.out_features

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self._check_forward_args(x, *args, **kwargs)
            names = kwargs.pop("adapter_names", None)
            if self.disable_adapters and self.merged:
                self.unmerge()
            if names is not None and not self.disable_adapters:
                mixed: torch.Tensor = self._mixed_batch_forward(x, *args, adapter_names=names, **kwargs)
                return mixed
            y: torch.Tensor = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters or self.merged:
                return y
            for name in self.active_adapters:
                if name in self.lora_A:
                    lora_a, lora_b = self.lora_A[name], self.lora_B[name]
                    change = lora_b(lora_a(self.lora_dropout[name](x.to(lora_a.weight.dtype))))
                    y = y + (change * self.scaling[name]).to(y.dtype)
            return y

        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            """[out_features, in_features]; peft asks for it to combine adapters."""
            change: torch.Tensor = self.lora_B[adapter].weight @ self.lora_A[adapter].weight * self.scaling[adapter]
            return change

        def check_merge(self, names: list[str]) -> None:
            """Refuses adapters that a factorised layer cannot take into its factors.

            Raises:
                TacoError: the adapters `names` cannot be merged here.
            """
            base = self.get_base_layer()
            where = self.kwargs.get("target_name") or "A factorised map"
            if isinstance(base, Int8LowRankLinear):
                raise TacoError(
                    f"{where}: its factors are 8-bit integers, into which nothing is merged. Merge the adapter into "
                    f"the model that they were made from and quantize the result, or {WAYS_OUT}."
                )
            added = sum(self.lora_A[name].weight.shape[0] for name in names)
            if base.rank + added > min(base.in_features, base.out_features):
                raise TacoError(
                    f"{where}: merging makes rank {base.rank} + {added}, too much for a {base.out_features} x "
                    f"{base.in_features} map; {WAYS_OUT}."
                )
            if base.bias is None and any(self.lora_bias[name] for name in names):
                raise TacoError(f"{where}: it has no bias to merge lora_bias=True into; {WAYS_OUT}.")

        @torch.no_grad()
        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Puts the adapters' factors beside the compressed ones: ``[u, scaling B]`` and ``[v; A]``.

            Exact up to the rounding to the factors' dtype, at a rank that grows by the adapters'. A pivoted right
            factor is written out in full.

            Raises:
                TacoError: see `check_merge`.
                ValueError: the merged factors are not finite (``safe_merge``).
            """
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
            if not names:
                return
            self.check_merge(names)
            base: LowRankLinear = self.get_base_layer()
            lefts = [self.lora_B[name].weight * self.scaling[name] for name in names]
            rights = [self.lora_A[name].weight for name in names]
            u = torch.cat([base.u, *(left.to(base.u) for left in lefts)], 1)
            v = torch.cat([base.full_right_factor().to(base.v.dtype), *(right.to(base.v) for right in rights)])
            bias = base.bias
            for name in names:
                if self.lora_bias[name]:
                    assert bias is not None
                    bias = (bias + self.lora_B[name].bias * self.scaling[name]).to(bias.dtype)
            made = [u, v] if bias is None else [u, v, bias]
            if safe_merge and not all(bool(tensor.isfinite().all()) for tensor in made):
                raise ValueError(f"The merged factors are not finite; the adapters {', '.join(names)} seem broken.")
            if self._unmerged is None:
                self._unmerged = (base.u, base.v, base.bias, base.pivot)
            _put_factors(base, u, v, bias, None)
            self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            """Puts the factors from before the first merge back."""
            if self._unmerged is None:
                return
            base: LowRankLinear = self.get_base_layer()
            _put_factors(base, *(None if kept is None else kept.to(base.u.device) for kept in self._unmerged))
            self._unmerged = None
            self.merged_adapters.clear()

    LowRankLoraLinear.__qualname__ = "LowRankLoraLinear"
    return LowRankLoraLinear


def __getattr__(name: str) -> Any:
    """Finds the class made on demand by name, so that adapted models can be pickled."""
    if name == "LowRankLoraLinear":
        return lora_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _put_factors(base: LowRankLinear, u: Any, v: Any, bias: Any, pivot: Any) -> None:
    """Gives a factorised map other tensors, maybe of another rank; each is trained if the one before it was."""
    for name, tensor in (("u", u), ("v", v), ("bias", bias)):
        if tensor is not None:
            setattr(base, name, nn.Parameter(tensor, getattr(base, name).requires_grad))
    base.pivot = pivot
    base.rank = u.shape[1]


def _check(config: Any) -> None:
    """Refuses what asks for more than the inputs and outputs of a map.

    Raises:
        TacoError: the config asks for it.
    """
    if config.use_dora:
        raise TacoError("DoRA scales the rows of a dense weight; a factorised map takes plain LoRA.")
    for variant in VARIANTS:
        if getattr(config, variant, None):
            raise TacoError(f"{variant} is for dense maps; a factorised map takes plain LoRA.")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() not in STARTS:
        raise TacoError(
            f"init_lora_weights={start!r} starts from a dense weight, which a factorised map has not; take True or one "
            f"of {', '.join(STARTS)}."
        )
