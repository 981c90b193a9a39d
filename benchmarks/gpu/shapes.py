"""What is measured: linear layers of real models, ranks, rows. One generator feeds tuning and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# (in, out) of each distinct linear layer, from the models' published configurations.
MODELS: dict[str, list[tuple[int, int]]] = {
    "Llama-2-7B": [(4096, 4096), (4096, 11008), (11008, 4096)],
    "Llama-3-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "Qwen3-8B": [(4096, 4096), (4096, 1024), (4096, 12288), (12288, 4096)],
    "Llama-3-70B": [(8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)],
}
ROWS = (1, 2, 4, 8, 16, 64, 512, 2048, 8192)
RANKS = (16, 64, 128, 256, 512, 1024)
# Rows whose best configuration is looked for; the buckets between take that of the next one up.
TUNED_ROWS = {1: (1,), 16: (2, 4, 8, 16), 64: (32, 64), 512: (128, 256, 512), 2048: (1024, 2048), 8192: (4096, 8192)}


class Point(NamedTuple):
    """One measurement: ``op`` is low_rank_linear or low_rank_bridge (then in = out = hidden)."""

    op: str
    in_size: int
    out_size: int
    rank: int
    rows: int
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        return f"{self.op}/{self.dtype}/{self.in_size}x{self.out_size}/r{self.rank}/m{self.rows}"


def shapes() -> list[tuple[int, int]]:
    """Every distinct (in, out), the ones that most models share first."""
    found = [shape for layers in MODELS.values() for shape in layers]
    return sorted(set(found), key=lambda shape: (-found.count(shape), shape[0] * shape[1], shape))


def models_of(in_size: int, out_size: int) -> list[str]:
    return [name for name, layers in MODELS.items() if (in_size, out_size) in layers]


def bench_points() -> Iterator[Point]:
    """The most telling first, since a run may be cut short: ranks 512 and 128, decode, then the rest."""
    hidden = (4096, 8192)
    for rank in (512, 128, 1024, 256, 64, 16):
        for rows in ROWS:
            for size in hidden:
                yield Point("low_rank_bridge", size, size, rank, rows)
            for in_size, out_size in shapes():
                yield Point("low_rank_linear", in_size, out_size, rank, rows)


def tune_points() -> Iterator[Point]:
    for rank in (512, 128, 1024, 64):
        for rows in TUNED_ROWS:
            yield Point("low_rank_bridge", 4096, 4096, rank, rows)
            for in_size, out_size in ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)):
                yield Point("low_rank_linear", in_size, out_size, rank, rows)


def tiny_points() -> Iterator[Point]:
    """For ``--dry-run``: the suite's own code, on any machine, in seconds."""
    for rows in (1, 3, 20):
        yield Point("low_rank_bridge", 48, 48, 16, rows, "float32")
        yield Point("low_rank_linear", 40, 72, 8, rows, "bfloat16")
