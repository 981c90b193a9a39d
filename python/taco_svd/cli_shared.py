"""What all commands share: options, progress, loading, printing."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .atomic import whole_file
from .json_values import without_infinities

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .progress import Report

errors = Console(stderr=True)
# A line of progress where no bars can be drawn: none in less than so many seconds.
SECONDS_BETWEEN_LINES = 30.0
PROGRESS_PREFIX = "[taco-svd] "
clock = time.monotonic

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of tables; progress as plain lines on stderr.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
DtypeOption = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
ModelArgument = Annotated[str | None, typer.Argument(help="Model directory or hub name; default: the demo model.")]


class Bars:
    """Progress on stderr: bars with an ETA on a terminal, plain lines anywhere else (a scheduler's or CI's log).

    Args:
        as_json: plain lines on a terminal too, for the output is read by a program.
        silent: nothing at all, for all but the first of several processes that do the same.
    """

    def __init__(self, as_json: bool, silent: bool = False) -> None:
        self.silent = silent
        # FORCE_COLOR, which CI systems set, asks for colours and not for a cursor that goes up and down in a log
        self.lines = as_json or errors.is_dumb_terminal or not sys.stderr.isatty()

    @contextmanager
    def step(self, title: str) -> Iterator[Report]:
        if self.silent:
            yield lambda done, total: None
        elif self.lines:
            lines = ProgressLines(title)
            yield lines.report
            lines.done()
        else:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            with Progress(
                *columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=errors
            ) as bars:
                task = bars.add_task(title, total=None)
                yield lambda done, total: bars.update(task, completed=done, total=total)


class ProgressLines:
    """A step's progress as plain lines on stderr: one now, at most one every `SECONDS_BETWEEN_LINES`, one when done.

    A step that fails has no last line: the error that follows says so.
    """

    def __init__(self, title: str) -> None:
        from .untrusted import printable

        self.title = " ".join(printable(title).split())  # there are names of files in titles
        self.start = self.last = clock()
        self._print("started")

    def report(self, done: int, total: int) -> None:
        now = clock()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        if total <= 0:
            self._print(f"{done}")
            return
        left = f", about {duration((now - self.start) / done * (total - done))} left" if 0 < done <= total else ""
        self._print(f"{done}/{total} ({done / total:.0%}){left}")

    def done(self) -> None:
        self._print(f"done in {clock() - self.start:.1f} s")

    def _print(self, said: str) -> None:
        # flushed: logs are looked at while the work goes on
        print(f"{PROGRESS_PREFIX}{self.title}: {said}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3.5 h."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def on_command_line(context: typer.Context, *names: str) -> list[str]:
    """Which of a command's options, named as its parameters are, were given: a default is nobody's wish."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"
    ]


def quiet_libraries() -> None:
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


P = ParamSpec("P")
R = TypeVar("R")


def told_when_stopped(command: Callable[P, R]) -> Callable[P, R]:
    """A command that ends with a line and exit code 130 on Ctrl-C; typer's own end has no word."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            # plain, since paths are no markup
            print(f"taco-svd: stopped; {str(stop) or 'nothing was written.'}", file=sys.stderr)
            raise typer.Exit(130) from stop

    return run


def check_dtype(dtype: str) -> None:
    from .errors import TacoError

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise TacoError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")


def load(
    name: str | None, dtype: str, device: str, mapped: bool | None = False, bars: Bars | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    from .checkpoint import DEFAULT_MODEL, load_model

    quiet_libraries()
    check_dtype(dtype)
    # minutes for a large one, and hours where it is fetched from the hub
    with (bars or Bars(False, silent=True)).step("loading the model"):
        return load_model(name or DEFAULT_MODEL, dtype, device, mapped)


def can_be_replaced(path: Path) -> bool:
    """Whether there can be a new file of that name.

    Results are renamed to their place when they are whole: a device or a pipe (/dev/null, as root) would not be written
    to, it would be gone.
    """
    parent = path.absolute().parent
    return parent.is_dir() and os.access(parent, os.W_OK) and (path.is_file() or not path.exists())


def tell_slow_products(model: PreTrainedModel) -> None:
    """Says, before latencies, that a dense model of this dtype is not the fastest that this CPU can run."""
    from .wide_products import needs_wide_products

    if needs_wide_products(model):
        kind = str(model.dtype).removeprefix("torch.")
        errors.print(
            f"torch multiplies {kind} slowly on this CPU: dense layers are several times faster in float32, so compare "
            "with --dtype float32 as well."
        )


def check_result_files(save: Path | None, plot: Path | None) -> None:
    """What --save and --plot cannot write is told before hours of work.

    Raises:
        TacoError: no file in a directory that can be written to; or matplotlib is missing or cannot draw such a file.
    """
    from .errors import TacoError
    from .report import plot_backend

    for option, path in (("--save", save), ("--plot", plot)):
        if path is None:
            continue
        if not can_be_replaced(path):
            raise TacoError(
                f"{option} {path} cannot be written: it must be an ordinary file in a directory that can be."
            )
    if plot is not None:
        plot_backend(plot)


def save_json(path: Path, values: Any) -> None:
    """Whole or not at all: the results of hours must survive a second Ctrl-C, and a full disk.

    Raises:
        TacoError: it cannot be written.
    """
    from .errors import TacoError

    try:
        with whole_file(path) as partial:
            partial.write_text(_as_json(values) + "\n", encoding="utf-8")
    except OSError as error:
        raise TacoError(f"{path} cannot be written: {error.strerror}.") from error


def print_json(values: Any) -> None:
    print(_as_json(values))


def _as_json(values: Any) -> str:
    return json.dumps(without_infinities(values), indent=2, default=str, allow_nan=False)


def out_console() -> Console:
    # wide enough for the tables when the output is a file or a pipe
    # names and records come from files: no markup in them
    width = None if sys.stdout.isatty() else 140
    return Console(width=width, markup=False, emoji=False)
