"""Tile sizes: a table tuned per GPU where there is one, sound defaults elsewhere. Nothing is tuned at run time.

``taco_kernels/tuned/<gpu>.json`` (written by ``benchmarks/gpu_suite.py --part tune``) holds
``{"gpu": name, "entries": [{"op", "dtype", "in", "out", "rank", "rows", "config": {...}}, ...]}``; ``--part bench``
adds ``choices``, the fastest backend for each op, shape and rows, and ``cuda_launch``. Members' sizes are summed.
A call takes the entry of its op, dtype and rows bucket that is nearest in (in, out, rank), if it is near. float16 moves
the same bytes as bfloat16, which is what gets measured, and takes its entries too.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNED_DIR = Path(__file__).resolve().parent.parent / "tuned"
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PATHS = ("row", "split", "gemm", "fused")
# A table entry further away than this (sum of |log2| ratios of in, out and rank) says nothing about a shape.
NEAR = 1.5
# The CUDA kernels read factors of half types whose rank is a multiple of this in 16-byte pieces, for the matrix unit.
# Others they read two bytes at a time, far from the bandwidth.
WHOLE_RANKS = 8
# Shared memory that a block can have on every GPU since sm_80 (sm_86 and sm_89 have least). Defaults stay below it.
PORTABLE_SHARED_BYTES = 99 * 1024


@dataclass(frozen=True)
class Config:
    """How one call is cut into programs.

    ``path``: ``row`` (one row, no matrix unit), ``split`` (first product split over ``in``, sums added up by the
    second kernel), ``gemm`` (two products, an extra ``combine`` launch where ``split > 1``), ``fused`` (one launch).
    ``block_m`` rows, ``block_r`` ranks, ``block_k`` steps along ``in`` and ``split`` slices of it for the first
    product; ``block_n`` outputs and ``block_k2`` steps along the rank for the second. ``out_split`` is the number of
    slices of ``out`` of the fused kernel, which uses ``warps`` and ``stages``. ``persistent`` programs per
    multiprocessor take the tiles of ``split`` and ``gemm`` in turn; 0 is one program for each tile.
    """

    path: str
    block_m: int
    block_r: int
    block_k: int
    split: int
    warps: int
    stages: int
    block_n: int
    block_k2: int
    warps2: int
    stages2: int
    out_split: int = 1
    persistent: int = 0

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ValueError(f"path must be one of {PATHS}, not {self.path!r}")
        for name in ("block_m", "block_r", "block_k", "block_n", "block_k2"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value}")


def rows_bucket(rows: int) -> int:
    """The smallest bucket that holds ``rows``, or the largest one."""
    return next((bucket for bucket in ROW_BUCKETS if rows <= bucket), ROW_BUCKETS[-1])


def gpu_slug(name: str) -> str:
    """File name of a GPU's table: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(0, value - 1).bit_length()))


def _fill(programs: int, wanted: int, steps: int) -> int:
    """Slices of a loop of ``steps`` that bring ``programs`` up to ``wanted``, no slice empty."""
    return max(1, min(steps, 64, wanted // max(1, programs)))


def default_config(
    rows: int,
    in_size: int,
    out_size: int,
    rank: int,
    element_size: int,
    processors: int,
    gated: bool = False,
) -> Config:
    """A configuration that compiles, fits and fills the chip on any GPU; chosen by counting, not by measuring.

    ``element_size`` is 2 (float16, bfloat16) or 4 (float32), ``processors`` the number of multiprocessors. For several
    members ``out_size`` and ``rank`` are their sums. ``gated`` is the form of two members and one result.
    """
    half = element_size == 2
    if rows <= 1:
        # 16 rank rows of 1 KB each: enough loads in flight per program, 64 accumulators per thread.
        block_r, block_k = 16, 512 if half else 256
        split = _fill(math.ceil(rank / block_r), 2 * processors, math.ceil(in_size / block_k))
        block_k2 = _power_of_two(rank, 16, 256)
        return Config("row", 1, block_r, block_k, split, 4, 2, 16, block_k2, 4, 2)
    if rows <= 16:
        # 16 rows is the matrix unit's own height. Small rank blocks: more programs, fewer splits to add up again.
        block_r, block_k = 16, 256 if half else 64
        split = _fill(math.ceil(rank / block_r), 2 * processors, math.ceil(in_size / block_k))
        # Up to 8 splits are added up by the second product itself (its pipeline holds a tile of each in shared
        # memory); more of them are worth a launch of their own.
        path = "split" if split <= 8 else "gemm"
        return Config(path, 16, block_r, block_k, split, 4, 3, 32, 64 if half else 32, 4, 3)
    if half and not gated and rank <= 128 and math.ceil(rows / 64) >= processors // 2:
        # One block of 64 rows per multiprocessor; two tiles of 64 x 64 and 128 x 64 in flight fit any GPU.
        block_r = _power_of_two(rank, 16, 128)
        out_split = max(1, processors // math.ceil(rows / 64))
        return Config("fused", 64, block_r, 64, 1, 4, 3, 64, 16, 4, 3, out_split)
    block_m = _power_of_two(rows, 32, 128) if half else 64
    m_blocks = math.ceil(rows / block_m)
    block_r = _power_of_two(rank, 16, 128 if half else 64)
    block_k = 64 if half else 32
    split = _fill(
        m_blocks * math.ceil(rank / block_r),
        processors,
        math.ceil(in_size / (4 * block_k)),
    )
    warps = 8 if block_m * block_r >= 128 * 128 or not half else 4
    warps2 = 8 if block_m == 128 or not half else 4
    return Config(
        "gemm",
        block_m,
        block_r,
        block_k,
        split,
        warps,
        3,
        # Two accumulators side by side in the gated form.
        (128 if half else 64) // (2 if gated else 1),
        block_k,
        warps2,
        3,
    )


def load_table(
    path: Path,
) -> dict[tuple[str, str, int], list[tuple[tuple[int, int, int], Config]]]:
    """Entries of a tuned table by (op, dtype, rows bucket). Raises ValueError, naming the file, on a broken table."""
    return _by_shape(path, "entries", lambda entry: Config(**entry["config"]))


def load_choices(path: Path) -> dict[tuple[str, str, int], list[tuple[tuple[int, int, int], str]]]:
    """Backends of a tuned table's ``choices``, as :func:`load_table` has configurations."""
    return _by_shape(path, "choices", lambda entry: str(entry["backend"]))


def _by_shape(path: Path, key: str, value: Callable[[dict[str, Any]], Any]) -> dict[tuple[str, str, int], list[Any]]:
    try:
        table: dict[tuple[str, str, int], list[Any]] = {}
        known = json.loads(path.read_text())
        for entry in known["entries"] if key == "entries" else known.get(key, []):
            name = (entry["op"], entry["dtype"], int(entry["rows"]))
            shape = (int(entry["in"]), int(entry["out"]), int(entry["rank"]))
            table.setdefault(name, []).append((shape, value(entry)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of tuned configurations: {error!r}") from error
    return table


@functools.cache
def content(name: str) -> dict[str, Any]:
    """All that is in the table of the GPU of this name; empty where there is none."""
    path = TUNED_DIR / f"{gpu_slug(name)}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


@functools.cache
def table_of_gpu(
    name: str,
) -> dict[tuple[str, str, int], list[tuple[tuple[int, int, int], Config]]]:
    path = TUNED_DIR / f"{gpu_slug(name)}.json"
    return load_table(path) if path.exists() else {}


@functools.cache
def _choices_of_gpu(name: str) -> dict[tuple[str, str, int], list[tuple[tuple[int, int, int], str]]]:
    path = TUNED_DIR / f"{gpu_slug(name)}.json"
    return load_choices(path) if path.exists() else {}


def whole_rank(dtype: str, rank: int) -> bool:
    """Whether the CUDA kernels read factors of this rank as fast as they can; in float32 they always do."""
    return dtype == "float32" or rank % WHOLE_RANKS == 0


def choice_for(op: str, dtype: str, rows: int, shape: tuple[int, int, int], gpu: str) -> str | None:
    """The backend that was fastest near this shape when the GPU was measured; None where nobody has measured.

    That the CUDA kernels were fastest at a whole rank (see ``whole_rank``) says nothing of the ranks beside it.
    """
    if 0 in shape:  # nothing to sum, or nothing to write: no distance to anything
        return None
    whole = whole_rank(dtype, shape[2])
    near = {True: (math.inf, ""), False: (math.inf, "")}  # of the whole ranks, and of the others
    for known, backend in _choices_of_gpu(gpu).get((op, dtype, rows_bucket(rows)), []):
        kind = whole_rank(dtype, known[2])
        near[kind] = min(near[kind], (_distance(shape, known), backend))
    distance, backend = near[whole]
    if distance > NEAR and not whole and near[True][1] != "cuda":
        distance, backend = near[True]
    return backend if distance <= NEAR else None


def _distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return sum(abs(math.log2(p / q)) for p, q in zip(a, b, strict=True))


def forget_tables() -> None:
    """Makes the next look-up read the tables anew: after one has been written."""
    for cached in (content, table_of_gpu, _choices_of_gpu, config_for):
        cached.cache_clear()


@functools.lru_cache(maxsize=4096)
def config_for(
    op: str,
    dtype: str,
    rows: int,
    in_size: int,
    out_size: int,
    rank: int,
    gpu: str,
    processors: int,
    widest: int | None = None,
) -> Config:
    """Configuration of one call.

    ``op`` and ``dtype`` ("float32", "float16", "bfloat16") as in the table; ``rows`` may be any number >= 1;
    ``gpu`` is the device's name ("" for none), ``processors`` its number of multiprocessors, ``widest`` the largest
    rank of several members, whose sum ``rank`` is.
    """
    shape = (in_size, out_size, rank)
    table, measured = table_of_gpu(gpu), dict.fromkeys((dtype, "bfloat16" if dtype == "float16" else dtype))
    near = [
        (_distance(shape, known), config)
        for name in measured
        for known, config in table.get((op, name, rows_bucket(rows)), [])
        # The fused kernel holds one rank block of one member, so a neighbour's tile must be wide enough here as well.
        if config.path != "fused" or (widest or rank) <= config.block_r
    ]
    if near:
        distance, config = min(near, key=lambda item: item[0])
        if distance <= NEAR:
            return config
    element_size = 4 if dtype == "float32" else 2
    return default_config(rows, in_size, out_size, rank, element_size, processors, op == "low_rank_mlp")


def as_entry(op: str, dtype: str, shape: tuple[int, int, int], rows: int, config: Config) -> dict[str, Any]:
    """One entry of a tuned table, ready for JSON."""
    in_size, out_size, rank = shape
    return {
        "op": op,
        "dtype": dtype,
        "in": in_size,
        "out": out_size,
        "rank": rank,
        "rows": rows_bucket(rows),
        "config": dataclasses.asdict(config),
    }
