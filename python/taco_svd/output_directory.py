"""Directories that are there whole or not at all: written beside their place, then renamed to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .atomic import disk_full, partial_path
from .errors import DiskFullError, TacoError


def _nameable(out: str | Path) -> Path:
    """Raises TacoError for what cannot be the name of a directory."""
    if not isinstance(out, (str, os.PathLike)) or "\0" in str(out):
        raise TacoError(f"The output must be the name of a directory, got {out!r:.80}.")
    out = Path(out)
    try:
        for name in (out, partial_path(out)):  # the second is longer
            with suppress(FileNotFoundError, NotADirectoryError):  # what is not there may yet be made
                os.lstat(name)
    except OSError as error:
        raise TacoError(f"{str(out)[:200]} cannot be written: {error.strerror}; choose another directory.") from error
    return out


def check_output(out: str | Path, force: bool = False, needed_bytes: int = 0) -> Path:
    """Refuses an output directory before any work is done for it.

    Raises:
        TacoError: it exists (and not `force`), its parent cannot be written, or the disk is too small.
    """
    out = _nameable(out)
    if out.exists() and not force:
        raise TacoError(f"{out} exists; choose another directory, or pass --force to replace it.")
    if out.exists() and not out.is_dir():
        raise TacoError(f"{out} is a file, not a directory; choose another directory.")
    if force and out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise TacoError(f"{out} is no model directory (it has no config.json); --force will not replace it.")
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TacoError(f"{parent} cannot be made: {error.strerror}.") from error
    if not os.access(parent, os.W_OK):
        raise TacoError(f"{parent} cannot be written to; choose another directory.")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise TacoError(
            f"The disk of {parent} has {free / 1e9:.2f} GB free, up to {needed_bytes / 1e9:.2f} GB are needed."
        )
    return out


def write_whole(out: str | Path, write: Callable[[Path], None], force: bool = False) -> None:
    """Calls `write` with a new directory beside `out` and renames it to `out` once it has returned.

    On any failure, Ctrl-C included, the new directory is taken away and `out` is as it was.

    Raises:
        TacoError: `out` exists and not `force`, or the disk is full.
    """
    out = check_output(out, force).resolve()  # of a link, what it leads to: that is what was checked
    partial = partial_path(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        if out.exists():
            replaced = out.parent / f".{out.name}.{os.getpid()}.replaced"
            out.rename(replaced)
            try:
                partial.rename(out)
            except BaseException:
                replaced.rename(out)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if disk_full(error):
            raise DiskFullError(
                f"No space left on the disk of {out.parent}; nothing was written. Free some and run again."
            ) from error
        raise
