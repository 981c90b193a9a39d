"""One run at a time in a directory that keeps a run's finished steps.

Two runs that write the same steps destroy each other's, and the first to finish takes the directory away under the
other. A directory is held by an advisory lock on itself: no file is left in it, and whatever ends a process frees it.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

from .errors import TacoError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, runs are not kept apart
    fcntl = None  # type: ignore[assignment]

# Directory (device, inode) -> who holds it in this process. A thread may hold one several times over: a command holds
# the directory of the run that it starts.
_held: weakref.WeakValueDictionary[tuple[int, int], DirectoryLock] = weakref.WeakValueDictionary()
_guard = threading.Lock()


class DirectoryLock:
    """Held as long as somebody refers to it; made by `hold`."""

    def __init__(self, descriptor: int) -> None:
        self.thread = threading.get_ident()
        weakref.finalize(self, os.close, descriptor)


def hold(path: str | Path) -> DirectoryLock | None:
    """Keeps other runs out of a directory, which is made if need be; None where the file system knows no locks.

    Raises:
        TacoError: another process or thread holds it.
        OSError: it cannot be made.
    """
    path = Path(path)
    if fcntl is None:
        path.mkdir(parents=True, exist_ok=True)
        return None
    with _guard:
        while True:
            path.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # its last run has ended in between
                continue
            key = _identity(os.fstat(descriptor))
            mine = _held.get(key)
            if mine is not None:
                os.close(descriptor)
                if mine.thread != threading.get_ident():
                    raise _in_use(path)
                return mine
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise _in_use(path) from None
            except OSError:  # some network file systems lock no directories
                os.close(descriptor)
                return None
            if _is_still(path, key):
                lock = _held[key] = DirectoryLock(descriptor)
                return lock
            os.close(descriptor)  # what was locked is what a run that has ended has taken away


def check_free(path: str | Path) -> None:
    """Refuses a directory that another run is working in; does nothing where there is none.

    Raises:
        TacoError: it is in use.
    """
    if Path(path).is_dir():
        hold(path)  # and lets go of it


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _is_still(path: Path, key: tuple[int, int]) -> bool:
    try:
        return _identity(path.stat()) == key
    except FileNotFoundError:
        return False


def _in_use(path: Path) -> TacoError:
    return TacoError(f"Another run is working in {path}: wait until it has ended, or choose another directory.")
