"""How much memory there is, and giving back what is no longer used."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from .wide_products import release_room

# Of the machine's free memory, what results of a model on a GPU may take there between steps.
HOST_SHARE = 0.5


def free_memory() -> int | None:
    """Bytes that this process may still take, the page cache included; None where the system does not tell.

    The smaller of what the machine has and what the control group (a container) leaves.
    """
    found: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
        # inside a container the limit is the group's, not the machine's
        limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            stat = (Path("/sys/fs/cgroup") / "memory.stat").read_text().split()
            cached = int(stat[stat.index("inactive_file") + 1])
            found.append(max(0, int(text) - int(used.read_text()) + cached))
    except (OSError, ValueError, IndexError):
        pass
    return min(found) if found else None


def host_room(processes: int = 1) -> int:
    """Bytes that each of some processes of this machine may keep in its memory, of what does not stay on a GPU."""
    return int(HOST_SHARE * (free_memory() or 0)) // processes


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another system or another C library
        return None
    return found


def release() -> None:
    """Returns what products were computed in (`wide_products`) and freed heap pages, where the C library is glibc.

    It keeps blocks of up to 32 MB for itself, and one small tensor above them holds all of them: after a backward pass
    of a 1 B parameter model that is a tenth of the model.
    """
    release_room()
    trim = _trim()
    if trim is not None:
        trim(0)
