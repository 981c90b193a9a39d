"""What the CPU benchmarks share: cold weights, interleaved timing, and a table at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu.timing import Arena

_ROWS: list[dict[str, object]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all shapes, ranks and rows (many minutes)")


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
