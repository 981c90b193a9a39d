"""The directory of a compression run: finished steps are kept there, and a run that was stopped goes on from them."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .directory_lock import check_free, hold
from .errors import StoppedError, TacoError
from .mapped import WeightSums
from .store import INDEX, Store, entry_file
from .team import Team

RUN = "run"


def check_apart(work: str | Path, out: str | Path, option: str) -> None:
    """Refuses a work directory that is the output or in it: the output must not exist until it is written whole, so a
    run would fail at its very end. An output inside the work directory would go with it.

    Raises:
        TacoError: naming both; `option` is what the work directory was given with.
    """
    kept, written = Path(work).resolve(), Path(out).resolve()
    if kept == written or written in kept.parents or kept in written.parents:
        raise TacoError(f"{option} {work} and --out {out} must not be the same nor lie in each other.")


def check_can_be_made(path: Path, option: str) -> None:
    """Refuses a work directory that is no directory, or cannot become one, before the model is loaded.

    Raises:
        TacoError: naming what is in the way.
    """
    if path.is_dir():
        return
    if path.exists():
        raise TacoError(f"{path} is a file; a work directory is needed there. Choose another {option}.")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise TacoError(f"{path} cannot be made: {above} is no directory to write to. Choose another {option}.")


def led_to(path: str | Path) -> Path:
    """What a link leads to, there or not yet; any other path as it is."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


def check_work_directory(path: str | Path, resume: bool) -> None:
    """Refuses a directory that holds another run's steps, or is something else, before the model is loaded.

    Raises:
        TacoError: it is a file, holds other files than a run's, finished steps that `resume` does not ask for, or
            another run is working there.
    """
    path = led_to(path)
    check_can_be_made(path, "--work-dir")
    if not path.exists():
        return
    check_free(path)
    inside = [entry.name for entry in path.iterdir()]
    # it is taken away in the end, so without an index it may hold only what a run killed before it had one has left
    first, unfinished = entry_file(RUN), (f".{entry_file(RUN)}.", f".{INDEX}.")
    if INDEX not in inside and not all(name == first or name.startswith(unfinished) for name in inside):
        raise TacoError(f"{path} holds other files; choose another --work-dir.")
    if INDEX in inside and not resume:
        raise TacoError(
            f"{path} holds the finished steps of a run that was stopped: --resume goes on from them; "
            "delete it to start again."
        )


def open_run(path: str | Path, run: dict[str, Any], resume: bool, team: Team | None = None) -> Store:
    """The store of a run described by `run` (plain JSON values), new or continued.

    Raises:
        TacoError: see `check_work_directory`; or what it holds belongs to a run of other arguments, model or versions.
    """
    check_work_directory(path, resume)
    store = Store(led_to(path), team=team)
    if RUN in store:
        there = store.note(RUN)
        differing = sorted(key for key in {*run, *there} if run.get(key) != there.get(key))
        if differing:
            told = "; ".join(f"{key}: {there.get(key)!r} then, {run.get(key)!r} now" for key in differing)
            raise TacoError(f"{path} belongs to another run ({told}). Repeat its arguments, or delete it.")
    else:
        store.put(RUN, {}, run)
    return store


@contextmanager
def finished_steps_kept(path: Path) -> Iterator[None]:
    """While open, a command works in that directory: it goes when the work is done, and stays when it was stopped.

    Errors of the user's (`TacoError`) leave no directory that was not there before, a full disk does. Ctrl-C carries
    on with a message that says how to go on.
    """
    path = led_to(path)  # the link would stay, and all that is there
    there_before = path.exists()
    lock = hold(path)
    try:
        yield
    except KeyboardInterrupt as stop:
        if not (path / INDEX).exists():
            if not there_before:
                shutil.rmtree(path, ignore_errors=True)
            raise
        raise KeyboardInterrupt(
            f"finished steps are in {path}: the same command with --resume goes on from them."
        ) from stop
    except StoppedError:
        raise
    except TacoError:
        if not there_before:
            shutil.rmtree(path, ignore_errors=True)
        raise
    else:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        del lock  # only now: whoever comes next finds no directory


def weights_digest(looked: Iterable[WeightSums]) -> str:
    """A hash of the names, shapes, dtypes and contents of a model's parameters.

    Contents enter as sums of blocks: telling models apart needs no more.
    """
    found = hashlib.sha256()
    for seen in looked:
        found.update(f"{seen.name} {seen.kind}".encode())
        for total in seen.sums:
            found.update(struct.pack("<d", total))
    return found.hexdigest()
