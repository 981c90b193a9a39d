"""What the CPU suite measures, the most telling first: the points of the targets, then whole models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gpu.shapes import MODELS, shapes

TARGET_SHAPES = ((4096, 4096), (4096, 11008))
TARGET_RANKS = (64, 128, 256, 512, 1024)
TARGET_ROWS = (1, 2, 4, 8, 16)
PREFILL_ROWS = (128, 512, 2048)
DTYPES = ("bfloat16", "float32")
# Shares of the break-even rank at which dense and low rank are compared; the crossing is interpolated.
SHARES = (0.5, 0.7, 0.8, 0.9, 1.0)


class Point(NamedTuple):
    """One measurement. ``op``: linear, bridge (in = out), group (q, k, v) or mlp (out is the width in the middle)."""

    op: str
    in_size: int
    out_size: int
    rank: int
    rows: int
    dtype: str
    against: tuple[str, ...]  # of library, dense, compiled

    @property
    def key(self) -> str:
        return f"{self.op}/{self.dtype}/{self.in_size}x{self.out_size}/r{self.rank}/m{self.rows}"

    @property
    def weights(self) -> int:
        """Elements of all factors."""
        return sum(self.rank * (i + o) for i, o in self.members)

    @property
    def members(self) -> list[tuple[int, int]]:
        """(in, out) of each factorised linear."""
        a, b = self.in_size, self.out_size
        return {"group": [(a, a), (a, b), (a, b)], "mlp": [(a, b), (a, b), (b, a)]}.get(self.op, [(a, b)])

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.weights


def break_even(in_size: int, out_size: int) -> int:
    """The rank at which both factors together hold as many weights as the dense matrix."""
    return in_size * out_size // (in_size + out_size)


def rank_of_keep(in_size: int, out_size: int, keep: float = 0.8) -> int:
    """The paper's rank for a share of kept weights, down to a multiple of 16."""
    return max(16, int(keep * break_even(in_size, out_size)) // 16 * 16)


def targets() -> Iterator[Point]:
    for rows in (1, 16, 4, 2, 8):
        for dtype in DTYPES:
            for shape in TARGET_SHAPES:
                for rank in TARGET_RANKS:
                    yield Point("linear", *shape, rank, rows, dtype, ("library", "dense", "compiled"))


def around_break_even() -> Iterator[Point]:
    for rows in (1, 4, 16):
        for dtype in DTYPES:
            for shape in TARGET_SHAPES:
                for share in SHARES:
                    rank = int(share * break_even(*shape)) // 16 * 16
                    yield Point("linear", *shape, rank, rows, dtype, ("library", "dense"))


def prefill() -> Iterator[Point]:
    for rows in PREFILL_ROWS:
        for dtype in DTYPES:
            for shape in TARGET_SHAPES:
                for rank in (64, 256, 1024):
                    yield Point("linear", *shape, rank, rows, dtype, ("library",))


def other_ops() -> Iterator[Point]:
    for rows in (1, 8, 16):
        for rank in (64, 256):
            yield Point("bridge", 4096, 4096, rank, rows, "bfloat16", ("library", "compiled"))
            yield Point("group", 4096, 1024, rank, rows, "bfloat16", ("library", "compiled"))
            yield Point("mlp", 4096, 14336, rank, rows, "bfloat16", ("library", "compiled"))


def models(all_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 512, 2048, 8192)) -> Iterator[Point]:
    """Every distinct linear layer of the models, at 80% of the break-even rank and at 256."""
    for rows in all_rows:
        for in_size, out_size in shapes():
            for rank in sorted({256, rank_of_keep(in_size, out_size)}):
                yield Point("linear", in_size, out_size, rank, rows, "bfloat16", ("library", "dense"))


def quick() -> Iterator[Point]:
    """Under ten minutes on two cores: targets, break-even, prefill, the other ops, the models' layers at decode."""
    yield from targets()
    yield from around_break_even()
    yield from prefill()
    yield from other_ops()
    yield from models((1, 8))


def full() -> Iterator[Point]:
    yield from quick()
    yield from models()


def tiny() -> Iterator[Point]:
    """For ``--dry-run``: the suite's own code in seconds."""
    for rows in (1, 20):
        for op in ("linear", "bridge", "group", "mlp"):
            yield Point(op, 48, 48 if op == "bridge" else 80, 16, rows, "bfloat16", ("library", "dense"))


def models_of(in_size: int, out_size: int) -> list[str]:
    return [name for name, layers in MODELS.items() if (in_size, out_size) in layers]
