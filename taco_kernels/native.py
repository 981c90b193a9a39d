"""Loads the compiled extension ``taco_kernels._C`` once, and remembers why it could not be loaded.

Importing this module never raises: a missing or broken extension leaves the package usable through its other
backends, and the reason is told when somebody asks for the ``cpp`` or ``cuda`` backend by name.

The extension leaves its OpenMP symbols (``GOMP_*``) undefined on purpose. torch has already loaded an OpenMP runtime
into the process; binding to that one gives a single thread pool that follows ``torch.set_num_threads``. A second
runtime beside it would oversubscribe the cores. Only when no runtime offers the symbols (a torch built without
OpenMP) is the system's ``libgomp.so.1`` loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from types import ModuleType

import torch  # noqa: F401  (its OpenMP runtime must be in the process before the extension looks for one)

__all__ = ["module", "omp_libraries_in_process", "reason"]


def omp_libraries_in_process() -> list[str]:
    """Paths of the OpenMP runtimes that are mapped into this process; empty where that cannot be known."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(None, 5)[-1].strip() for line in maps if "omp" in line}
    except OSError:
        return []
    return sorted(path for path in paths if os.path.basename(path).startswith(("libgomp", "libiomp5", "libomp")))


def _expose_omp() -> str:
    """Makes one OpenMP runtime's symbols visible to the extension; returns what was tried, for the error message."""
    path = next(iter(omp_libraries_in_process()), "libgomp.so.1")
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"no OpenMP runtime could be loaded ({error})"
    return f"OpenMP runtime {path}"


def _load() -> tuple[ModuleType | None, str]:
    name = "taco_kernels._C"
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"extension failed to load: {error}"
        return (
            None,
            "extension was not built (reinstall with a C++ compiler, or run: python setup.py build_ext --inplace)",
        )
    except ImportError as error:
        first = str(error)
    sys.modules.pop(name, None)
    tried = _expose_omp()
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"extension failed to load: {error}; first try: {first}; then with {tried}"


module, reason = _load()
"""The extension (None when it cannot be used) and the reason why not (empty when it can)."""
