"""The module of a factorised map whose factors are 8-bit integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import taco_kernels
from taco_kernels.low_rank_linear_int8 import LARGEST, dequantise, quantise_rows

# Part of the format, whatever dtype a model is cast to.
SCALES = ("v_scale", "u_scale")


class Int8LowRankLinear(nn.Module):
    """A linear map in two factors of 8-bit integers: ``y = u ((v x) v_scale u_scale) + bias``.

    Parameters `v` [rank, in_features] and `u` [out_features, rank] (int8), `v_scale` and `u_scale` [rank] (float32, in
    any model), `bias` [out_features] or None; none of them is trained. `pivot` as in `replacement.LowRankLinear`, where
    `v` is [rank, in_features - rank].
    """

    pivot: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pivoted: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        columns = in_features - rank if pivoted else in_features
        self.v = _frozen(torch.empty(rank, columns, device=device, dtype=torch.int8))
        self.u = _frozen(torch.empty(out_features, rank, device=device, dtype=torch.int8))
        self.v_scale = _frozen(torch.empty(rank, device=device, dtype=torch.float32))
        self.u_scale = _frozen(torch.empty(rank, device=device, dtype=torch.float32))
        self.bias = _frozen(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer(
            "pivot", torch.empty(in_features, dtype=torch.int32, device=device) if pivoted else None, persistent=True
        )
        if self.v.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random factors whose product has the scale of `nn.Linear`'s default (for models built from a config)."""
        for integers, scale, std in (
            (self.v, self.v_scale, 1 / math.sqrt(3 * self.in_features)),
            (self.u, self.u_scale, 1 / math.sqrt(self.rank)),
        ):
            integers.copy_(torch.randint(-LARGEST, LARGEST + 1, integers.shape, device=integers.device))
            # integers that are all alike likely have a standard deviation of LARGEST / sqrt(3)
            scale.fill_(std * math.sqrt(3) / LARGEST)
        if self.pivot is not None:
            self.pivot.copy_(torch.arange(self.in_features, dtype=torch.int32))
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def fill(self, u: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, pivot: torch.Tensor | None) -> None:
        """Quantises the factors of a `replacement.LowRankLinear` of the same shape.

        Raises:
            ValueError: factors that are not finite.
        """
        integers, scales = quantise_rows(v)
        self.v.copy_(integers)
        self.v_scale.copy_(scales)
        integers, scales = quantise_rows(u.T)
        self.u.copy_(integers.T)
        self.u_scale.copy_(scales)
        for own, given in ((self.bias, bias), (self.pivot, pivot)):
            if own is not None and given is not None:
                own.copy_(given)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return taco_kernels.low_rank_linear_int8(x, self.v, self.v_scale, self.u, self.u_scale, self.bias, self.pivot)

    def floating(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(u, v) as a `replacement.LowRankLinear` has them, in `dtype`."""
        u = dequantise(self.u.detach(), self.u_scale.detach(), dtype)
        return u, dequantise(self.v.detach(), self.v_scale.detach()[:, None], dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = {name: getattr(self, name).data for name in SCALES}
        super()._apply(fn, recurse)
        for name, scale in kept.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                device = moved.device
                moved.data = torch.empty_like(scale, device=device) if device.type == "meta" else scale.to(device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, pivoted={self.pivot is not None}"
        )


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
