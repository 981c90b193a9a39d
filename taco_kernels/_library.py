"""The package's ``torch.library`` namespace and what its op files share. Holds no mathematics and chooses nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

__all__ = [
    "FLOATS",
    "any_autocast",
    "apply_function",
    "below_autograd",
    "computing_dtype",
    "define",
    "exact_products",
    "implement",
    "library",
    "needs_grad",
    "register_autocast",
    "rows_of",
    "seen_as_op",
    "transformed",
]

library = Library("taco_kernels", "DEF")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# An op that is called where no gradient is needed need not enter its Python autograd kernel at all: that saves a
# third of the call's overhead under no_grad, which is how `generate` runs.
below_autograd = torch._C._AutoDispatchBelowAutograd

# True inside torch.autocast of any device type, in one call.
any_autocast = torch._C._is_any_autocast_enabled


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, 10 us faster; not for what is :func:`transformed`.

    ``Function.apply`` binds arguments to the signature of ``forward`` at every call, to fill in defaults, when the
    class has a ``setup_context``. Arguments are complete here, so its base class's method does the rest alone.
    """
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def seen_as_op() -> bool:
    """Whether a call that is differentiated must go through its op nevertheless.

    Autocast must cast before autograd records, and it sits in the op's dispatch; so does torch.jit.trace, to which a
    bare autograd.Function is a call of Python that it can neither save nor run again.
    """
    return any_autocast() or torch._C._get_tracing_state() is not None


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a reference accumulates in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    """True when autograd records and one of ``tensors`` asks for a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def transformed() -> bool:
    """Whether a transform of torch.func is active, or a level of forward-mode differentiation.

    Calls under one are computed by torch's own operations, which have rules for all transforms in any order; an
    autograd.Function has only those that are written for it, and ops of ours would lose tangents without a word.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


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


def define(name: str, schema: str) -> Any:
    """Defines op ``name`` and returns its overload. What computes it is registered by :func:`implement`.

    Args:
        schema: arguments and results, as in ``(Tensor x, Tensor? bias=None) -> Tensor``.
    """
    library.define(name + schema)
    return getattr(torch.ops.taco_kernels, name).default


def implement(
    name: str,
    *,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
    by_torch: Callable[..., Any] | None = None,
    on_cpu: Callable[..., Any] | None = None,
) -> None:
    """Registers what computes op ``name``. torch calls these functions as they are, with nothing around them.

    Args:
        compute: the op on a CPU and on a GPU.
        fake: its results for tensors without data; checks arguments like the real op.
        autograd: what calls come to first: records a gradient where one is needed.
        by_torch: the op in torch's own operations, for ``torch.func.vmap``. With it the op follows autocast as a linear
            does; without it neither is registered.
        on_cpu: the op on a CPU, where that is not ``compute``.
    """
    library.impl(name, on_cpu or compute, "CPU")
    library.impl(name, compute, "CUDA")
    torch.library.register_fake(f"taco_kernels::{name}", fake, lib=library)
    library.impl(name, autograd, "Autograd")
    if by_torch is not None:
        register_autocast(name, getattr(torch.ops.taco_kernels, name).default)
        _register_batched(name, by_torch)


def register_autocast(name: str, overload: Any) -> None:
    """Makes op ``name`` cast its tensors to autocast's dtype, as ``torch.nn.functional.linear`` does.

    Without it a factorised linear would raise on mixed dtypes exactly where the linear it replaces works.
    """
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast_and_call(*args: Any, device_type: str = device_type, exclude: Any = exclude, **kwargs: Any) -> Any:
            def cast(value: Any) -> Any:
                return _autocast(value, device_type)

            with torch._C._ExcludeDispatchKeyGuard(exclude):
                return overload(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

        library.impl(name, cast_and_call, key)


def _set_back(setting: Any, before: str) -> None:
    """Makes a backend's precision what it was: by the common setting where that says so, which then goes on deciding.

    "none" is what stands for that.
    """
    setting.fp32_precision = "none"
    if setting.fp32_precision != before:
        setting.fp32_precision = before


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """For statistics, whose products are to be in the precision that is promised wherever they are called.

    No autocast, and float32 products that are float32 products, whatever the caller has set (TF32, bfloat16).
    """
    global _exact_calls
    with contextlib.ExitStack() as own:
        if _has_autocast(device.type):
            own.enter_context(torch.autocast(device.type, enabled=False))
        with _exact_guard:
            if not _exact_calls:
                _make_products_exact(_exact_settings)
            _exact_calls += 1
        try:
            yield
        finally:
            with _exact_guard:
                _exact_calls -= 1
                if not _exact_calls:
                    _exact_settings.close()


# The settings are the process's: the first of several threads makes products exact, and the last one sets them back.
_exact_guard = threading.Lock()
_exact_calls = 0
_exact_settings = contextlib.ExitStack()


def _make_products_exact(stack: contextlib.ExitStack) -> None:
    """Changes what must be changed, and leaves on the stack what sets it back."""
    # Since torch 2.9 each backend has a setting of its own, and asking for the common one may raise.
    settings = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if all(hasattr(setting, "fp32_precision") for setting in settings):
        for setting in settings:
            before = setting.fp32_precision  # type: ignore[union-attr]
            if before not in ("ieee", "none"):  # these are exact already
                stack.callback(_set_back, setting, before)
                setting.fp32_precision = "ieee"  # type: ignore[union-attr]
    elif (common := torch.get_float32_matmul_precision()) != "highest":
        stack.callback(torch.set_float32_matmul_precision, common)
        torch.set_float32_matmul_precision("highest")


def _register_batched(name: str, by_torch: Callable[..., Any]) -> None:
    """Makes torch.func.vmap compute op ``name`` by torch's own operations, which have batching rules.

    Autocast comes beneath vmap, where it meets these operations and no longer the op: so its cast is made here.
    """

    def batched(x: Tensor, *others: Any) -> Any:
        device_type = x.device.type
        if not (_has_autocast(device_type) and torch.is_autocast_enabled(device_type)):
            return by_torch(x, *others)
        return by_torch(*(_autocast(value, device_type) for value in (x, *others)))

    library.impl(name, batched, "FuncTorchBatched")


def _has_autocast(device_type: str) -> bool:
    """Whether autocast is on at all, and knows the device type: asked about others (meta) it raises."""
    return any_autocast() and torch.amp.is_autocast_available(device_type)


def _autocast(value: Any, device_type: str) -> Any:
    """An argument as autocast gives it to an op: tensors of its device in its dtype, those in lists too."""
    if isinstance(value, (list, tuple)):
        return [_autocast(item, device_type) for item in value]
    cast_it = isinstance(value, Tensor) and value.dtype in FLOATS[:3] and value.device.type == device_type
    return value.to(torch.get_autocast_dtype(device_type)) if cast_it else value
