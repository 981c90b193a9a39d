"""Temporary directories that do not outlive their process for long: what a killed one left behind, the next takes away.

The moments of a 1 B parameter model are 6 GB of files, and a process that is killed (by the system, for want of memory)
cannot delete its own. So every directory holds a file that its process keeps locked. The system lets go of the lock
when the process is gone, however it went, and also where containers share a disk but not their process numbers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked, nothing swept
    fcntl = None  # type: ignore[assignment]

PREFIX = "taco-svd-"
LOCK = ".lock"


class ScratchDirectory:
    """A new directory in the system's place for temporary files (TMPDIR), gone with this object.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # locked before it has its name: a directory without a lock file is not swept
        begun = self.path / f"{LOCK}.begun"
        lock = begun.open("w")
        _locked(lock)
        begun.rename(self.path / LOCK)
        self._end = weakref.finalize(self, _delete, self.path, lock, os.getpid())

    def delete(self) -> None:
        """Takes it away now."""
        self._end()


def _delete(path: Path, lock: IO[str], owner: int) -> None:
    if os.getpid() == owner:  # not a child's, which has copies of all objects
        shutil.rmtree(path, ignore_errors=True)
    lock.close()


def sweep() -> None:
    """Deletes the scratch directories of processes that are gone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        try:
            with lock.open("r+") as opened:
                if _locked(opened):
                    shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # another user's, or another process was quicker
            continue


def _locked(file: IO[str]) -> bool:
    """Locks a file, unless another process has."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
