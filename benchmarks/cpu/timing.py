"""Cold weights, interleaved pairs, and yardsticks: how anything on a CPU is timed here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from taco_kernels import native


def last_level_cache() -> int:
    """Bytes of the largest cache the system reports; 32 MiB where it reports none."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM") or 0) * unit)
    return max(sizes, default=32 * 2**20)


class Arena:
    """One block of random numbers, at least four times the last cache, that weights are cut from in turn.

    A call that reads the next piece each time finds its weights in memory, not in a cache, as a model's layers do.
    ``cold=False`` gives ``least`` bytes only, for tests.
    """

    def __init__(self, dtype: torch.dtype, least: int = 256 * 2**20, cold: bool = True) -> None:
        self.bytes = max(least, 4 * last_level_cache() if cold else 0)
        self.data = torch.empty(self.bytes // dtype.itemsize, dtype=dtype)
        piece = torch.randn(1 << 20, dtype=torch.float32).mul_(0.02).to(dtype)
        for start in range(0, len(self.data), len(piece)):
            self.data[start : start + len(piece)] = piece[: len(self.data) - start]

    def matrices(self, *shapes: tuple[int, int]) -> list[tuple[Tensor, ...]]:
        """As many sets of matrices of ``shapes`` as fit side by side."""
        size = sum(rows * columns for rows, columns in shapes)
        found = []
        for start in range(0, len(self.data) - size + 1, size):
            offset, matrices = start, []
            for rows, columns in shapes:
                matrices.append(self.data[offset : offset + rows * columns].view(rows, columns))
                offset += rows * columns
            found.append(tuple(matrices))
        return found


def pairs_of(
    ours: Callable[[int], object],
    other: Callable[[int], object],
    rounds: int,
    seconds: float = float("inf"),
    warm_up: int = 3,
) -> tuple[list[float], list[float]]:
    """Times of two functions in microseconds, called by turns: drift hits both alike.

    Each is told which piece of the arena to use, and no two calls in sequence use the same one, or the second would
    find in a cache what the first has brought. Only pairs are interleaved: a third function that streams a whole dense
    weight evicts the interpreter itself, and whoever comes after it pays some 50 us for that. Stops early, after five
    rounds at least, once ``seconds`` are over.
    """
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for number in range(-warm_up, rounds):
        for index, function in enumerate((ours, other)):
            piece = 2 * (number + warm_up) + index
            start = time.perf_counter()
            function(piece)
            elapsed = (time.perf_counter() - start) * 1e6
            if number >= 0:
                times[index].append(elapsed)
        if number >= 4 and time.perf_counter() - began > seconds:
            break
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(times, n=10)
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def ratio(times: tuple[Sequence[float], Sequence[float]]) -> float:
    """How many times faster the first of :func:`pairs_of` is than the second: median of the pairs' ratios."""
    return statistics.median(other / ours for ours, other in zip(*times, strict=True))


def ratio_spread(times: tuple[Sequence[float], Sequence[float]]) -> dict[str, float]:
    """Percentiles of the pairs' ratios, above 1 where the first is faster."""
    return spread([other / ours for ours, other in zip(*times, strict=True)])


def read_cold(arena: Arena, size: int) -> Callable[[int], object]:
    """Reads ``size`` bytes of the arena, another piece each time, as fast as this machine's threads can."""
    pieces = max(1, arena.bytes // size)
    base, threads = arena.data.data_ptr(), torch.get_num_threads()
    assert native.module is not None
    read = native.module.read_memory
    return lambda number: read(base + number % pieces * size // 64 * 64, min(size, arena.bytes), threads)


def read_rate(arena: Arena, rounds: int = 20) -> dict[str, float]:
    """GB/s of plain reads out of memory, pieces of 32 MiB (of an eighth of a smaller arena)."""
    size = min(32 * 2**20, arena.bytes // 8)
    read, times = read_cold(arena, size), []
    for number in range(rounds):
        start = time.perf_counter()
        read(number)
        times.append(time.perf_counter() - start)
    return {name: size / value / 1e9 for name, value in spread(times).items()}


def product_rate(dtype: torch.dtype, size: int = 2048, rounds: int = 3) -> float:
    """GFLOP/s of torch's size^3 product, the best of a few: what this machine's cores can do in a long run."""
    a = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.nn.functional.linear(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
