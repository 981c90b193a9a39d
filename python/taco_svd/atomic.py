"""Files that are there whole or not at all: written beside their place, then renamed to it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DiskFullError


def partial_path(path: Path) -> Path:
    """The name beside `path` that is written first: hidden, and this process's own."""
    return path.parent / f".{path.name}.{os.getpid()}.partial"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name to write a file under; when the block ends, it takes the place of `path`.

    Whatever ends the block early, Ctrl-C included, `path` is as it was, and nothing lies beside it. What a process that
    was killed has left carries another name than any whole file.
    """
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def disk_full_told(folder: str | Path, advice: str) -> Iterator[None]:
    """Turns "no space left" inside the block into an error that says what to do.

    Raises:
        DiskFullError: in place of whatever said, inside, that there is no space left.
    """
    try:
        yield
    except Exception as error:
        if disk_full(error):
            raise DiskFullError(f"No space left on the disk of {folder}; {advice}") from error
        raise


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no space left."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors wraps the system's error into its own type
    return full or "No space left" in str(error) or "os error 28" in str(error)
