"""Checks of Triton configurations that no shape of ``checks.cases`` takes: fused, persistent, and tuned ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import checks, tuning
from .checks import Case

if TYPE_CHECKING:
    from taco_kernels.triton_kernels.config import Config

    from .shapes import Point


def cases(tiny: bool) -> list[tuple[Case, Config]]:
    """Each case and the configuration that it is computed with; ``tiny`` for a CPU.

    The second products of the fused kernel are cut into one slice of ``out`` and into three. Persistent programs, one
    and two for each multiprocessor, are fewer than the tiles, so that each takes several in turn.
    """
    from taco_kernels.triton_kernels.config import Config

    block = 16 if tiny else 64
    found = []
    for slices in (1, 3):
        wide = Config("fused", block, block, block, 1, 4, 3, block, 16, 4, 3, out_split=slices)
        found += [(case, wide) for case in (TINY_FUSED if tiny else FUSED)]
    for programs in (1, 2):
        whole = Config("gemm", 16, 16, block, 1, 4, 3, 16 if tiny else 32, 16, 4, 3, persistent=programs)
        added = Config("gemm", 16, 16, block, 3, 4, 3, 16 if tiny else 32, 16, 4, 3, persistent=programs)
        split = Config("split", 16, 16, block, 3, 4, 3, 16 if tiny else 32, 16, 4, 3, persistent=programs)
        found += [(case, whole) for case in (TINY_WHOLE if tiny else WHOLE)]
        found += [(case, added) for case in (TINY_ADDED if tiny else ADDED)]
        found += [(case, split) for case in (TINY_SPLIT if tiny else SPLIT)]
    return found


# The rank fits one block of 64. Sizes of whole tiles and of none; norm, residual, a group, factors the other way round.
FUSED = [
    Case("low_rank_linear", 4096, 1000, 64, 300, "bfloat16", residual=True),
    Case("low_rank_linear", 131, 71, 19, 77, "float16", residual=True),
    Case("low_rank_bridge", 264, 264, 40, 300, "bfloat16"),
    Case("low_rank_linear", 264, 136, 40, 77, "bfloat16", turned=True),
    Case("low_rank_linear_group", 264, (136, 45, 17), 19, 77, "bfloat16"),
]
# One slice of ``in``
WHOLE = [
    Case("low_rank_linear", 1000, 500, 200, 1000, "float16", residual=True),
    Case("low_rank_linear_group", 264, (136, 45, 17), 40, 1000, "bfloat16"),
    Case("low_rank_linear", 264, 136, 40, 1000, "bfloat16", turned=True),
    Case("low_rank_mlp", 264, 136, 40, 1000, "bfloat16"),
]
# Several, added up by a launch of its own
ADDED = [
    Case("low_rank_bridge", 520, 520, 200, 1000, "bfloat16"),
    Case("low_rank_linear", 1000, 131, 71, 300, "float16", residual=True),
]
# Several, added up by the second product
SPLIT = [
    Case("low_rank_linear", 131, 71, 19, 1000, "bfloat16", residual=True),
    Case("low_rank_bridge", 264, 264, 40, 1000, "float16"),
    Case("low_rank_linear_group", 131, (71, 17), 19, 1000, "float16"),
    Case("low_rank_mlp", 264, 136, 40, 1000, "bfloat16", act="gelu"),
]
TINY_FUSED = [
    Case("low_rank_linear", 40, 40, 8, 18, "bfloat16", residual=True),
    Case("low_rank_bridge", 33, 33, 5, 18, "float16"),
]
TINY_WHOLE = [Case("low_rank_linear", 33, 40, 17, 40, "bfloat16", turned=True)]
TINY_ADDED = [Case("low_rank_bridge", 40, 40, 17, 40, "float16")]
TINY_SPLIT = [Case("low_rank_linear_group", 40, (33, 17), 5, 40, "bfloat16")]


def neighbour(point: Point) -> Case:
    """The case whose sizes are one less than a tuned point's each: near enough for its entry, and no tile is whole."""

    def less(size: int) -> int:
        return max(1, size - 1)

    outs = tuple(map(less, point.out_size)) if isinstance(point.out_size, tuple) else less(point.out_size)
    rows = point.rows if point.rows <= 2 else point.rows - 1  # two rows and one take different kernels
    residual = point.op == "low_rank_linear"
    return Case(point.op, less(point.in_size), outs, less(point.rank), rows, point.dtype, residual=residual)


def check(case: Case, config: Config, device: str) -> dict[str, Any]:
    """Runs one case with one configuration, twice; ``ok`` also needs the same bits from both runs."""
    inputs = checks.drawn(case, device)
    with checks.poisoned_memory():
        first, second = tuning.run(config, inputs), tuning.run(config, inputs)
    return checks.compared(first, second, inputs, "triton")
