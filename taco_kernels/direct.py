"""Direct calls: plain tensors go from an op's public function straight to its kernel, past torch's dispatcher.

The dispatcher, pybind11 and the checks in Python take 9 us of a call, and 100 us when the caches hold the last layer's
weights instead of that code, which is how a model runs: as much as a bridge's kernel itself, or three library calls.
The extension therefore reads the tensors through DLPack's C interface (csrc/direct). Whatever needs the dispatcher
takes the ordinary way: gradients, forward-mode derivatives, autocast, transforms, modes, tracing, profiling,
subclasses, a forced backend, another device, anything that does not fit together (the ordinary way has the message).
The results are the same bits.

On a GPU the ordinary way decides, by what was measured there, which backend serves a call. Calls of sizes that the CUDA
kernels have served once, or the library, are direct from then on, all ops' but the MLP's (csrc/direct/gpu.h).
NOT YET RUN ON A GPU: what is tested is the same code on a device that is made of CPU memory.

``TACO_DIRECT=0`` (read at import) turns direct calls off. The storage of results on a CPU cannot be resized in place,
since it comes through DLPack; otherwise they are ordinary tensors.

Compiled code (torch.compile, vLLM) calls an op through the dispatcher, where a kernel in Python costs 25 us warm and
over 100 us cold. For CPU tensors without gradients it is given a twin of the op, ``<op>_native``, whose kernel the
extension registers itself through torch's stable C interface (csrc/direct/registered.cpp; no torch headers). Exported
programs hold the ordinary op.

A function of the extension gives the result; None where the ordinary way must be taken; False where the tensors are
plain and fit together but there are more rows than its kernels are good for, and the library may be called at once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from taco_kernels import _cuda, dispatch, native
from taco_kernels._library import library, needs_grad, register_autocast, transformed

__all__ = ["entry", "exporting", "native_op", "reason", "served", "suits_native", "usable"]

# What asks for the dispatcher while one of these says so: functions of torch._C, each 40 ns.
_GUARDS = (
    "is_grad_enabled",
    "_is_any_autocast_enabled",
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_are_functorch_transforms_active",
    "_get_tracing_state",
    "_autograd._profiler_enabled",
)


def _guards() -> tuple[Any, ...]:
    """The functions named in `_GUARDS`; None for one that this torch has not."""
    place: Any = torch._C
    return tuple(
        functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), place) for name in _GUARDS
    )


def _setup() -> str:
    """Hands torch's interface to the extension; returns why there are no direct calls, empty where there are."""
    if native.module is None:
        return native.reason
    if os.environ.get("TACO_DIRECT", "1").strip() == "0":
        return "turned off by TACO_DIRECT=0"
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    guards = _guards()
    missing = f"torch {torch.__version__} does not offer what they need (DLPack's C interface, since 2.10)"
    if capsule is None or None in guards or not hasattr(forward_ad, "_current_level"):
        return missing
    try:
        made = native.module.direct_setup(
            capsule, torch.Tensor, torch.nn.Parameter, guards, torch.get_num_threads, forward_ad.__dict__
        )
    except (TypeError, ValueError) as error:  # the interface's early forms: an integer, a capsule of another name
        return f"torch {torch.__version__} offers DLPack's C interface in another form ({error})"
    dispatch.allow_direct()
    return "" if made else missing


def _ordinary(*_: Any) -> None:
    """Stands for the extension's functions where there are none."""


def entry(op: str, limits: Callable[[torch.dtype], dispatch.RowLimits]) -> Callable[..., Any]:
    """The extension's direct function of `op`, told which rows and ranks it serves; see the module for its results."""
    if not usable:
        return _ordinary
    assert native.module is not None
    for dtype, code in dispatch.CPP_DTYPES.items():
        native.module.direct_limit(op, code, limits(dtype))
    found: Callable[..., Any] = getattr(native.module, f"direct_{op}")
    return found


def served(op: str, backend: str, *args: Any) -> None:
    """Notes that the ordinary way has served a call on a GPU: calls like it may be direct from now on.

    Args:
        backend: by which it did.
        args: what the op's entry takes.
    """
    if usable and backend in ("cuda", "library") and dispatch.get_backend() is None:
        launch = _cuda.launch() if backend == "cuda" else -1
        native.module.direct_remember(op, launch, *args)  # type: ignore[union-attr]


def native_op(op: str, schema: str, ordinary: Any, fake: Callable[..., Any]) -> Any:
    """Defines and returns ``<op>_native``; without the extension's kernel it calls the ordinary op.

    Args:
        schema: arguments and results, as the ordinary op has them.
        ordinary: the ordinary op's overload.
        fake: its fake.
    """
    name = f"{op}_native"
    library.define(name + schema)
    library.impl(name, lambda *args: ordinary(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"taco_kernels::{name}", fake, lib=library)
    made = getattr(torch.ops.taco_kernels, name).default
    register_autocast(name, made)
    if usable:
        assert native.module is not None
        _registered[op] = native.module.direct_register(op)
    return made


def exporting() -> bool:
    """Whether a program is being exported; while torch 2.11 compiles, `is_exporting` says so whatever is going on."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else bool(flag)


def suits_native(op: str, *tensors: Tensor | None) -> bool:
    """Whether compiled code should call ``<op>_native`` with these tensors. For use while compiling."""
    first = tensors[0]
    return (
        _registered.get(op, False)
        and first is not None
        and first.device.type == "cpu"
        and not exporting()
        and not needs_grad(*tensors)
        and not transformed()
    )


_registered: dict[str, bool] = {}

reason = _setup()
"""Why there are no direct calls; empty where there are"""

usable = not reason
