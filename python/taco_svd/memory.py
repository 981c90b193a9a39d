"""How much memory there is, and giving back what is no longer used."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from .wide_products import release_room


def free_memory() -> int:
    """Bytes that this process may still take, as far as the system tells; a terabyte where it does not.

    The smaller of what the machine has and what the control group (a container) leaves.
    """
    free = 1 << 40
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            free = min(free, max(0, int(limit.read()) - int(used.read())))
    except (OSError, ValueError, StopIteration):  # another system, or no limit ("max")
        pass
    return free


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
