"""Which backend computes a call: device, dtype and shape in, a backend's name out.

=============  =======================================================================================
``reference``  plain torch in float32 (float64 for float64); the specification, and always there
``library``    two ``torch.nn.functional.linear`` calls; fastest where there are many rows
``cpp``        the extension's CPU kernels (fp32, fp16, bf16)
``triton``     Triton kernels: CUDA tensors, or CPU tensors under ``TRITON_INTERPRET=1`` for tests
``cuda``       the extension's CUDA kernels for few rows
=============  =======================================================================================

The environment variable ``TACO_BACKEND`` (read at import), :func:`set_backend` and :func:`use_backend` force one; a
forced backend that cannot serve a call raises ``RuntimeError`` with the reason, never falls back in silence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator

import torch

from taco_kernels import native

__all__ = ["BACKENDS", "CPP_DTYPES", "backends", "choose", "get_backend", "set_backend", "use_backend"]

BACKENDS = ("reference", "library", "cpp", "triton", "cuda")

RowLimits = tuple[tuple[int, int, int], ...]
"""((rank, rows, rows per thread), ...), ranks falling to 0: from this rank on, up to so many rows, and again where each
thread has so many"""

ANY = 2**62
"""As a number of rows: however many there are; per thread: never"""

CPP_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""dtypes of the native kernels and their codes in ``csrc/``"""


def library_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies a dtype fast on this CPU: without AVX-512, 16 bits run at a tenth of float32's rate."""
    asked = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}.get(dtype)
    try:
        return asked is None or bool(getattr(torch.ops.mkldnn, asked)())
    except (AttributeError, RuntimeError):
        return True


isa: str = "" if native.module is None else native.module.cpu_isas()[0]

# Rows up to which the native kernels win over two library calls, as benchmarks/cpu_suite.py measures them (two Zen 4
# cores with AVX-512: fp32 x1.1 to x1.8 at 128 rows, x1.0 to x1.6 at 256; two with AVX2: even beyond 64). Where torch
# has no fast products of a 16-bit dtype, ours are several times faster for any number of rows.
CPU_MAX_ROWS = {
    torch.float32: 256 if isa.startswith("avx512") else 64,
    torch.float16: 16 if library_multiplies(torch.float16) or isa == "baseline" else ANY,
    torch.bfloat16: 16 if library_multiplies(torch.bfloat16) or isa == "baseline" else ANY,
}
# Ranks from which the kernels for many rows win over two fast library products, and up to how many rows: bfloat16 on
# cores with AVX-512-BF16, whose weights they read where they lie. The smaller the rank, the more of a call is packing
# and unpacking rows; the smaller the map, the more the library's second call (two Zen 4 cores: x1.0 to x3.5 within
# these limits but for a few points of x0.92 to x0.98, x0.86 to x2.6 at 128 rows below rank 128). Where each thread has
# rows enough to take blocks of them on its own, there is no upper limit. Matrix units (AMX) are several times faster
# than any of this, and the library's.
MANY_ROWS: dict[str, RowLimits] = {"avx512bf16": ((768, 256, 48), (192, 128, 48), (128, 128, ANY), (0, 64, ANY))}
# With AVX2 alone they win for float32 too, on AMD's cores, where MKL reaches two thirds of the FMA rate (two Zen 2
# cores, 64 to 2048 rows: x1.02 to x2.3 from rank 128 on, x0.87 to x1.2 at rank 64). On other makers' not measured.
if native.module is not None and native.module.cpu_is_amd():
    MANY_ROWS["avx2"] = ((128, ANY, ANY),)

# The same where a pivot gathers a map's inputs, which costs the library two more calls and two copies of x: x1.02 to
# x3.6 at 128 rows (two Zen 4 cores; the smaller the map the more), x0.97 to x1.4 at 256 from rank 128 on.
PIVOTED_ROWS: dict[str, RowLimits] = {"avx512bf16": ((192, 256, 48), (128, 256, ANY), (0, 128, ANY))}


def _dtypes_of_many_rows() -> frozenset[torch.dtype]:
    if isa == "avx2":
        return frozenset(CPP_DTYPES)
    has_matrix_unit = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    return frozenset([torch.bfloat16] if isa == "avx512bf16" and not has_matrix_unit() else [])


_many_rows = _dtypes_of_many_rows()


def multiplies_many_rows(dtype: torch.dtype) -> bool:
    """Whether this CPU has kernels for many rows of that dtype (csrc/cpu/many_rows*.inl) that are to be used."""
    return dtype in _many_rows


def cpu_rows(dtype: torch.dtype) -> RowLimits:
    """From which rank on how many rows the native kernels serve on a CPU."""
    few = ((0, CPU_MAX_ROWS[dtype], ANY),)
    return MANY_ROWS.get(isa, ()) + few if multiplies_many_rows(dtype) else few


def pivoted_rows(dtype: torch.dtype) -> RowLimits:
    """The same for maps whose inputs a pivot gathers."""
    return PIVOTED_ROWS[isa] if isa in PIVOTED_ROWS and multiplies_many_rows(dtype) else cpu_rows(dtype)


def within(limits: RowLimits, rank: int, rows: int) -> bool:
    """Whether so many rows, with factors of that rank, are within the limits."""
    most, each = next(limit[1:] for limit in limits if rank >= limit[0])
    return rows <= most or rows >= each * torch.get_num_threads()


# On a GPU a decode kernel serves few rows, and cuBLAS the rest.
CUDA_MAX_ROWS = 16
TRITON_MAX_ROWS = 16


def _from_environment() -> str | None:
    name = os.environ.get("TACO_BACKEND", "").strip().lower()
    return None if name in ("", "auto") else name


_forced: str | None = _from_environment()
_reasons: dict[tuple[str, str], str] = {}


def _too_old_gpu() -> str:
    """Why the current GPU is too old for our kernels (no bfloat16 in its matrix units); empty when it is not."""
    try:
        major, minor = torch.cuda.get_device_capability()
    except RuntimeError as error:  # in a process forked after CUDA was initialised
        return str(error).splitlines()[0]
    return "" if major >= 8 else f"needs a GPU of capability 8.0 or more, and this one has {major}.{minor}"


def _why_not(name: str, device_type: str) -> str:
    """Why backend ``name`` cannot work on tensors of ``device_type``; empty when it can."""
    if name in ("reference", "library"):
        return "no GPU is visible to torch" if device_type == "cuda" and not torch.cuda.is_available() else ""
    if name == "cpp":
        if device_type != "cpu":
            return f"computes CPU tensors only, not {device_type} tensors"
        return native.reason
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cuda":
            return _too_old_gpu() if torch.cuda.is_available() else "no GPU is visible to torch"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        return f"no GPU is visible to torch (for {device_type} tensors set TRITON_INTERPRET=1: slow, for tests)"
    if name == "cuda":
        if native.module is None:
            return native.reason
        if not native.module.HAS_CUDA:
            return "extension was built without CUDA (no nvcc was found, or TACO_CUDA=0)"
        if not torch.cuda.is_available():
            return "no GPU is visible to torch"
        if device_type != "cuda":
            return f"computes CUDA tensors only, not {device_type} tensors"
        if reason := _too_old_gpu():
            return reason
        if reason := native.module.cuda_unusable():
            built = ", ".join(json.loads(native.module.BUILD_INFO)["cuda_archs"])
            return f"the extension's kernels, built for {built}, cannot run on this GPU: {reason}"
        return ""
    return f"there is no such backend; choose one of {', '.join(BACKENDS)}"


def why_not(name: str, device_type: str) -> str:
    """Why backend ``name`` cannot serve tensors of ``device_type``; empty when it can.

    The answer is remembered: all GPUs of a process are taken to be of one kind, that of the first one asked about. For
    ``cuda`` tensors it initialises CUDA, where there is a GPU.
    """
    key = (name, device_type)
    known = _reasons.get(key)
    if known is None:
        known = _reasons[key] = _why_not(name, device_type)
    return known


def backends(device_type: str | None = None) -> dict[str, str]:
    """Every backend with ``"usable"`` or the reason why it is not.

    ``device_type`` ("cpu", "cuda") asks for tensors of that device; without it, a backend counts as usable when it
    serves any device of this machine.
    """
    return {name: _state(name, device_type) for name in BACKENDS}


def _state(name: str, device_type: str | None = None) -> str:
    """What ``backends`` says of one; asks nothing about the others."""
    devices = [device_type] if device_type else ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    reasons = [why_not(name, device) for device in devices]
    return "usable" if "" in reasons else reasons[0]


def allow_direct() -> None:
    """Direct calls (see ``direct``) are made while no backend is forced."""
    if native.module is not None:
        native.module.direct_enable(_forced is None)


def get_backend() -> str | None:
    """The backend that is forced, or None when each call chooses for itself."""
    return _forced


def set_backend(name: str | None) -> None:
    """Forces one backend for every later call of this process; None gives the choice back to the dispatcher.

    Raises ``RuntimeError`` when the backend is unknown or serves no device of this machine, with the reason.
    """
    global _forced
    if name is not None:
        if name not in BACKENDS:
            raise RuntimeError(f"{name}: {_why_not(name, 'cpu')}")
        state = _state(name)
        if state != "usable":
            raise RuntimeError(f"{name}: {state}")
    _forced = name
    allow_direct()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """``with use_backend("reference"): ...`` forces a backend inside the block (process-wide, not per thread).

    Raises ``RuntimeError`` as :func:`set_backend` does.
    """
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        globals()["_forced"] = before
        allow_direct()


@functools.lru_cache(maxsize=4096)
def tuned_choice(shape: tuple[str, int, int, int], dtype: torch.dtype, rows: int) -> str | None:
    """The backend that was fastest near this shape where this kind of GPU was measured; None where it was not.

    For ranks that the CUDA kernels read slowly there is an answer in any case: Triton, or beyond its rows the library.

    ``shape`` is (op, in, out, rank), sums over the members of a group, of an MLP those of gate and up. All GPUs of a
    process are taken to be of one kind. float16 moves the same bytes as bfloat16, which is what gets measured.
    """
    from taco_kernels.triton_kernels.config import choice_for, whole_rank

    op, *sizes = shape
    name = "float32" if dtype == torch.float32 else "bfloat16"
    chosen = choice_for(op, name, rows, tuple(sizes), torch.cuda.get_device_name())  # type: ignore[arg-type]
    if chosen in BACKENDS and not why_not(chosen, "cuda"):
        return chosen
    if whole_rank(name, shape[3]):
        return None
    return "triton" if rows <= TRITON_MAX_ROWS and not why_not("triton", "cuda") else "library"


def choose(
    device_type: str,
    dtype: torch.dtype,
    rows: int,
    turned: bool = False,
    shape: tuple[str, int, int, int] | None = None,
    rank: int = 0,
    limits: Callable[[torch.dtype], RowLimits] = cpu_rows,
) -> str:
    """The backend for one call: ``rows`` vectors of ``dtype`` on ``device_type``, through factors of ``rank`` (their
    sum in a group), which only a CPU asks for; ``limits`` are the op's there.

    ``turned`` says that a factor is a transposed view (as in a gradient): the C++ and CUDA kernels would have to copy
    it, which costs more than they save. On a GPU that has been measured, the table decides (see ``tuned_choice``).

    Raises ``RuntimeError`` when a backend is forced that cannot serve the call.
    """
    if _forced is not None:
        reason = why_not(_forced, device_type)
        if not reason and _forced in ("cpp", "triton", "cuda") and dtype not in CPP_DTYPES:
            reason = f"computes float32, float16 and bfloat16, not {dtype}"
        if reason:
            raise RuntimeError(f"{_forced}: {reason}")
        return _forced
    if dtype not in CPP_DTYPES:
        return "reference"
    if device_type == "cpu":
        ours = not turned and native.module is not None and within(limits(dtype), rank, rows)
        return "cpp" if ours else "library"
    if device_type == "cuda":
        if shape is not None and not turned:
            known = tuned_choice(shape, dtype, rows)
            if known is not None:
                return known
        if not turned and rows <= CUDA_MAX_ROWS and not why_not("cuda", "cuda"):
            return "cuda"
        if rows <= TRITON_MAX_ROWS and not why_not("triton", "cuda"):
            return "triton"
    return "library"
