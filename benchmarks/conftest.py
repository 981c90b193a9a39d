"""What the CPU benchmarks share: cold weights, interleaved timing, and a table at the end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from taco_kernels import native

_ROWS: list[dict[str, object]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all shapes, ranks and rows (many minutes)")


def _last_level_cache() -> int:
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
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.bytes = max(256 * 2**20, 4 * _last_level_cache())
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


@pytest.fixture(scope="session")
def arenas() -> Callable[[torch.dtype], Arena]:
    """``arenas(dtype)``: the session's arena of that dtype."""
    known: dict[torch.dtype, Arena] = {}

    def get(dtype: torch.dtype) -> Arena:
        if dtype not in known:
            known.clear()  # one at a time: they are large
            known[dtype] = Arena(dtype)
        return known[dtype]

    return get


def pairs_of(
    ours: Callable[[int], object], other: Callable[[int], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Times of two functions in microseconds, called by turns: drift hits both alike.

    Each is told which piece of the arena to use, and no two calls in sequence use the same one, or the second would
    find in a cache what the first has brought. Only pairs are interleaved: a third function that streams a whole dense
    weight evicts the interpreter itself, and whoever comes after it pays some 50 us for that.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(-3, rounds):
        for index, function in enumerate((ours, other)):
            piece = 2 * (number + 3) + index
            start = time.perf_counter()
            function(piece)
            elapsed = (time.perf_counter() - start) * 1e6
            if number >= 0:  # the first three are for warming up
                times[index].append(elapsed)
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(times, n=10)
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def ratio(times: tuple[Sequence[float], Sequence[float]]) -> float:
    """How many times faster the first of :func:`pairs_of` is than the second: median of the pairs' ratios."""
    return statistics.median(other / ours for ours, other in zip(*times, strict=True))


def read_cold(arena: Arena, size: int) -> Callable[[int], object]:
    """Reads ``size`` bytes of the arena, another piece each time, as fast as this machine's threads can."""
    pieces = max(1, arena.bytes // size)
    base, threads = arena.data.data_ptr(), torch.get_num_threads()
    assert native.module is not None
    read = native.module.read_memory
    return lambda number: read(base + number % pieces * size // 64 * 64, min(size, arena.bytes), threads)


@pytest.fixture
def report() -> Callable[[dict[str, object]], None]:
    """Adds a row to the table that ends the session."""
    return _ROWS.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    columns = list(_ROWS[0])
    widths = [max(len(str(name)), *(len(str(row[name])) for row in _ROWS)) for name in columns]
    terminalreporter.section("weights out of memory; interleaved pairs; medians")
    for row in [dict(zip(columns, columns, strict=True)), *_ROWS]:
        cells = (str(row[name]).rjust(width) for name, width in zip(columns, widths, strict=True))
        terminalreporter.write_line("  ".join(cells))
