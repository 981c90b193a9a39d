"""What is measured: linear layers of real models, ranks, rows. One generator feeds tuning and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

OPS = (
    "low_rank_linear",
    "low_rank_bridge",
    "low_rank_linear_group",
    "low_rank_mlp",
    "pivoted_low_rank_linear",
    "low_rank_linear_concat",
)
BEHIND_PIVOT = ("pivoted_low_rank_linear", "low_rank_linear_concat")
# (in, out) of each distinct linear layer, from the models' published configurations.
MODELS: dict[str, list[tuple[int, int]]] = {
    "Llama-2-7B": [(4096, 4096), (4096, 11008), (11008, 4096)],
    "Llama-3-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "Qwen3-8B": [(4096, 4096), (4096, 1024), (4096, 12288), (12288, 4096)],
    "Llama-3-70B": [(8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)],
}
# (hidden, outputs of q, k and v) and (hidden, width of the MLP) of each model
QKV: dict[str, tuple[int, tuple[int, ...]]] = {
    "Llama-2-7B": (4096, (4096, 4096, 4096)),
    "Llama-3-8B": (4096, (4096, 1024, 1024)),
    "Qwen3-8B": (4096, (4096, 1024, 1024)),
    "Llama-3-70B": (8192, (8192, 1024, 1024)),
}
MLP: dict[str, tuple[int, int]] = {
    "Llama-2-7B": (4096, 11008),
    "Llama-3-8B": (4096, 14336),
    "Qwen3-8B": (4096, 12288),
    "Llama-3-70B": (8192, 28672),
}
ROWS = (1, 2, 4, 8, 16, 64, 512, 2048, 8192)
RANKS = (16, 64, 128, 256, 512, 1024)
# Rows whose best configuration is looked for; the buckets between take that of the next one up.
TUNED_ROWS = {1: (1,), 16: (2, 4, 8, 16), 64: (32, 64), 512: (128, 256, 512), 2048: (1024, 2048), 8192: (4096, 8192)}
# The same for rows that are benchmarked, where the backend is chosen.
CHOSEN_ROWS = {
    1: (1,),
    2: (2,),
    4: (4,),
    8: (8,),
    16: (16,),
    **{rows: TUNED_ROWS[rows] for rows in (64, 512, 2048, 8192)},
}


class Point(NamedTuple):
    """One measurement. low_rank_bridge: in = out = hidden. low_rank_linear_group: one ``out_size`` per member.
    low_rank_mlp: ``in_size`` is hidden, ``out_size`` the width. low_rank_linear_concat: a group behind pivots."""

    op: str
    in_size: int
    out_size: int | tuple[int, ...]
    rank: int
    rows: int
    dtype: str = "bfloat16"

    @property
    def shape(self) -> str:
        outs = self.out_size if isinstance(self.out_size, tuple) else (self.out_size,)
        return f"{self.in_size}x{'+'.join(map(str, outs))}"

    @property
    def key(self) -> str:
        return f"{self.op}/{self.dtype}/{self.shape}/r{self.rank}/m{self.rows}"

    @property
    def table_shape(self) -> tuple[int, int, int]:
        """(in, out, rank) by which the tables know what runs: of several members the sums, of an MLP gate and up."""
        if isinstance(self.out_size, tuple):
            cut = self.op == "low_rank_linear_concat"
            ranks = [min(self.rank, self.in_size, out) if cut else self.rank for out in self.out_size]
            return self.in_size, sum(self.out_size), sum(ranks)
        if self.op == "low_rank_mlp":
            return self.in_size, 2 * self.out_size, 2 * self.rank
        return self.in_size, self.out_size, self.rank

    @property
    def break_even_rank(self) -> int:
        """The rank at which the factors have as many elements as the dense matrices."""
        if self.op in BEHIND_PIVOT:
            # rank (in + out - rank) = in out at the smaller side; of several members the rank is cut to each one's
            outs = self.out_size if isinstance(self.out_size, tuple) else (self.out_size,)
            return min(self.in_size, max(outs))
        if isinstance(self.out_size, tuple):
            out = sum(self.out_size)
            return self.in_size * out // (len(self.out_size) * self.in_size + out)
        return self.in_size * self.out_size // (self.in_size + self.out_size)


# No multiple of 8, so the CUDA kernels read its factors two bytes at a time; allocated ranks are often such.
ODD_RANK = Point("low_rank_linear", 4096, 4096, 409, 1)
# A down projection: many inputs, few outputs
DOWN = (14336, 4096)


def shapes() -> list[tuple[int, int]]:
    """Every distinct (in, out), the ones that most models share first."""
    found = [shape for layers in MODELS.values() for shape in layers]
    return sorted(set(found), key=lambda shape: (-found.count(shape), shape[0] * shape[1], shape))


def models_of(point: Point) -> list[str]:
    """The models that have this layer."""
    if isinstance(point.out_size, tuple):
        return [name for name, layer in QKV.items() if layer == (point.in_size, point.out_size)]
    if point.op == "low_rank_mlp":
        return [name for name, layer in MLP.items() if layer == (point.in_size, point.out_size)]
    return [name for name, layers in MODELS.items() if (point.in_size, point.out_size) in layers]


def bench_points() -> Iterator[Point]:
    """The most telling first, since a run may be cut short: ranks 512 and 128, decode, then the rest."""
    groups, mlps = dict.fromkeys(QKV.values()), dict.fromkeys(MLP.values())
    for rank in (512, 128, 1024, 256, 64, 16):
        behind = 4 * rank - 1024  # what a map keeps of itself behind a pivot is half of it and more
        for rows in ROWS:
            pivoted = rank >= 512 and rows <= 2048
            for size in (4096, 8192):
                yield Point("low_rank_bridge", size, size, rank, rows)
            for in_size, out_size in shapes():
                yield Point("low_rank_linear", in_size, out_size, rank, rows)
                if pivoted and behind < min(in_size, out_size):
                    yield Point("pivoted_low_rank_linear", in_size, out_size, behind, rows)
            for hidden, outs in groups:
                yield Point("low_rank_linear_group", hidden, outs, rank, rows)
                if pivoted and behind < hidden:
                    yield Point("low_rank_linear_concat", hidden, outs, behind, rows)
            for hidden, width in mlps:
                yield Point("low_rank_mlp", hidden, width, rank, rows)
            if (rank, rows) == (512, ODD_RANK.rows):
                yield ODD_RANK


def _is_down(point: Point) -> bool:
    down = point.op == "low_rank_linear" and (point.in_size, point.out_size) == DOWN
    return down and point.rank in (128, 512)


def quick_points() -> Iterator[Point]:
    """What the first minutes on a GPU should tell: one hidden size, a down projection, three ranks, five row counts."""
    for point in bench_points():
        first = point.in_size == 4096 and point.out_size in (4096, 11008, 14336, (4096, 1024, 1024))
        ranks = (1024, 3072) if point.op in BEHIND_PIVOT else (128, 512, 1024)
        wanted = (first and point.rank in ranks) or _is_down(point) or point == ODD_RANK
        if wanted and point.rows in (1, 4, 16, 512, 2048):
            yield point


def tune_points() -> Iterator[Point]:
    for rank in (512, 128, 1024, 64):
        for rows in TUNED_ROWS:
            yield Point("low_rank_bridge", 4096, 4096, rank, rows)
            yield Point("low_rank_linear_group", 4096, (4096, 1024, 1024), rank, rows)
            yield Point("low_rank_mlp", 4096, 14336, rank, rows)
            for in_size, out_size in ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)):
                yield Point("low_rank_linear", in_size, out_size, rank, rows)


def quick_tune_points() -> Iterator[Point]:
    """Prefill, where the Triton kernels have no CUDA kernel beside them, at the two middle ranks."""
    for point in tune_points():
        of_size = (point.in_size == 4096 and point.rank in (128, 512)) or _is_down(point)
        if of_size and point.rows in (512, 2048):
            yield point


def tiny_points() -> Iterator[Point]:
    """For ``--dry-run``: the suite's own code, on any machine, in seconds."""
    for rows in (1, 3, 20):
        yield Point("low_rank_bridge", 48, 48, 16, rows, "float32")
        yield Point("low_rank_linear", 40, 72, 8, rows, "bfloat16")
        yield Point("pivoted_low_rank_linear", 40, 72, 24, rows, "bfloat16")
        if rows != 3:
            yield Point("low_rank_linear_group", 40, (48, 16, 16), 8, rows, "float16")
            yield Point("low_rank_linear_concat", 40, (48, 16, 16), 24, rows, "bfloat16")
            yield Point("low_rank_mlp", 40, 56, 16, rows, "bfloat16")
