"""The package's ``torch.library`` namespace and what its op files share. Holds no mathematics and chooses nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

__all__ = [
    "FLOATS",
    "any_autocast",
    "apply_function",
    "below_autograd",
    "computing_dtype",
    "library",
    "needs_grad",
    "register_autocast",
    "rows_of",
]

library = Library("taco_kernels", "DEF")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# An op that is called where no gradient is needed need not enter its Python autograd kernel at all: that saves a
# third of the call's overhead under no_grad, which is how `generate` runs.
below_autograd = torch._C._AutoDispatchBelowAutograd

# True inside torch.autocast of any device type, in one call.
any_autocast = torch._C._is_any_autocast_enabled


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, 10 us faster.

    ``Function.apply`` binds arguments to the signature of ``forward`` at every call, to fill in defaults, when the
    class has a ``setup_context``. Arguments are complete here, so its base class's method does the rest alone; only
    torch.func's transforms need the way round.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a reference accumulates in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    """True when autograd records and one of ``tensors`` asks for a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """``(x, rows, row stride)`` such that row i of ``x`` starts i * stride elements after its first one.

    ``x`` is [..., width]. Rows that lie evenly spaced are used where they are; anything else is copied once.
    """
    width = x.shape[-1]
    if x.is_contiguous():
        return x, (x.numel() // width if width else x.shape[:-1].numel()), width
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.shape[0], x.stride(0)
    flat = x.reshape(-1, width) if width else x.new_empty((x.shape[:-1].numel(), 0))
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.shape[0], flat.stride(0)


def register_autocast(name: str, overload: Any) -> None:
    """Makes op ``name`` cast its tensors to autocast's dtype, as ``torch.nn.functional.linear`` does.

    Without it a factorised linear would raise on mixed dtypes exactly where the linear it replaces works.
    """
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast_and_call(*args: Any, device_type: str = device_type, exclude: Any = exclude, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)

            def cast(value: Any) -> Any:
                if isinstance(value, (list, tuple)):
                    return [cast(item) for item in value]
                cast_it = isinstance(value, Tensor) and value.dtype in FLOATS[:3] and value.device.type == device_type
                return value.to(dtype) if cast_it else value

            with torch._C._ExcludeDispatchKeyGuard(exclude):
                return overload(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

        library.impl(name, cast_and_call, key)
