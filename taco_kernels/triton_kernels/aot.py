"""Compiles the launches of a call ahead of time, without a GPU, and reads what the compiler made of them.

Used by tests and by people who change a kernel: registers, shared memory, spills and the instructions chosen answer
most questions before a GPU is at hand. Not used when the ops run.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .config import Config
from .launch import FP_FUSION, Launch, Member, launches
from .low_rank_linear_int8 import int8_launches
from .pivoted_low_rank_linear import pivoted_launches

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_POINTERS |= {torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports for one kernel: ``shared`` and ``stack`` in bytes, ``registers`` per thread.

    ``stack`` counts spilled registers and arrays in local memory: 0 means none. ``ptx`` and ``sass`` are listings.
    """

    kernel: str
    shared: int
    registers: int
    stack: int
    ptx: str
    sass: str


def _signature(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and alignment of the arguments, specialised the way Triton's run time would."""
    constants: dict[Any, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    fixed = set(launch.kernel.do_not_specialize or ())

    def describe(name: str, value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(name, item, (*path, i)) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            kind, aligned = _POINTERS[value.dtype], (value.storage_offset() * value.element_size()) % 16 == 0
        elif isinstance(value, float):
            kind, aligned = "fp32", False
        elif value == 1 and name not in fixed:
            kind, aligned = "constexpr", False
            constants[name if len(path) == 1 else path] = 1
        else:
            kind, aligned = "i32", value % 16 == 0 and name not in fixed
        if aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    names = launch.kernel.arg_names
    given = zip(names, launch.args, strict=False)
    signature = {name: describe(name, value, (position,)) for position, (name, value) in enumerate(given)}
    signature |= dict.fromkeys(launch.constants, "constexpr")
    return {name: signature[name] for name in names}, constants, attributes


def _tool(name: str) -> str:
    """A CUDA binary utility out of Triton's own wheel."""
    import triton.backends.nvidia

    root = Path(triton.backends.nvidia.__path__[0])
    found = root / "bin" / name
    if not found.exists():
        raise FileNotFoundError(f"this Triton carries no {name} ({found})")
    return str(found)


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compiles one launch for compute capability ``arch`` (80, 86, 90, ...) and inspects the result."""
    signature, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": FP_FUSION,
    }
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(cubin)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        sass = subprocess.run(
            [_tool("cuobjdump"), "-sass", str(cubin)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    match = re.search(r"REG:(\d+)\s+STACK:(\d+).*?LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump's resource report could not be read: {usage!r}")
    registers, stack, local = (int(group) for group in match.groups())
    return Compiled(
        launch.kernel.__name__,
        int(built.metadata.shared),
        registers,
        stack + local,
        built.asm["ptx"],
        sass,
    )


def call_launches(
    rows: int,
    in_size: int,
    out_size: int,
    rank: int,
    dtype: torch.dtype,
    config: Config,
    *,
    bridge: bool = False,
    members: int = 1,
    act: str | None = None,
    transposed: bool = False,
    pivoted: bool = False,
) -> list[Launch]:
    """The launches of a call on contiguous tensors of these sizes, with bias and residual, without data.

    ``bridge`` makes it a ``low_rank_bridge`` (then ``in_size`` must equal ``out_size``), ``members`` a group of alike
    linears, ``act`` the gated form of two, ``transposed`` a product with factors that are stored the other way round
    (the gradient towards x), ``pivoted`` a ``pivoted_low_rank_linear`` (``config`` for in_size - rank inputs).
    """

    def empty(rows: int, columns: int) -> torch.Tensor:
        if transposed:
            return torch.empty((columns, rows), dtype=dtype, device="meta").T
        return torch.empty((rows, columns), dtype=dtype, device="meta")

    x = torch.empty((rows, in_size), dtype=dtype, device="meta")
    ys = [torch.empty((rows, out_size), dtype=dtype, device="meta") for _ in range(members)]
    parts = [
        Member(empty(rank, in_size), empty(out_size, rank), torch.empty(out_size, dtype=dtype, device="meta"), y)
        for y in (ys if act is None else [ys[0]] * members)
    ]
    residual = None if members > 1 else x if bridge else torch.empty_like(ys[0])
    if pivoted:
        v = torch.empty((rank, in_size - rank), dtype=dtype, device="meta")
        pivot = torch.empty(in_size, dtype=torch.int32, device="meta")
        return pivoted_launches(x, parts[0]._replace(v=v), pivot, residual, config, 132)
    return launches(x, parts, residual, 1e-6 if bridge else None, config, act, 132)


def int8_call_launches(
    rows: int, in_size: int, out_size: int, rank: int, dtype: torch.dtype, processors: int, pivoted: bool = False
) -> list[Launch]:
    """The launches of a ``low_rank_linear_int8`` with bias on contiguous tensors of these sizes, without data."""

    def empty(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return int8_launches(
        empty(rows, in_size, dtype=dtype),
        empty(rank, in_size - rank if pivoted else in_size),
        empty(out_size, rank),
        empty(rank, dtype=torch.float32),
        empty(rank, dtype=torch.float32),
        empty(out_size, dtype=dtype),
        empty(in_size, dtype=torch.int32) if pivoted else None,
        empty(rows, out_size, dtype=dtype),
        processors,
    )
