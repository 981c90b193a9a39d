"""``python -m taco_kernels.env``: what was built, what is usable here, and why the rest is not.

``--json`` prints the same for programs. It answers the first questions of a bug report, so it must work on every
machine: whatever cannot be found out is reported as such, never raised.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from taco_kernels import direct, native
from taco_kernels._version import __version__
from taco_kernels.dispatch import backends, get_backend

__all__ = ["report"]

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "pybind11")


def _installed(package: str) -> str:
    # Asks the metadata, not the package: importing transformers takes seconds.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def _why_no_gpu() -> str:
    if torch.cuda.is_available():
        return ""
    return "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device or driver"


@functools.cache
def build_digest() -> str:
    """What computes here, as a short hash: this package's Python files, the compiled extension, tuned tables.

    The version alone does not tell: an installation in place has one version for many builds.
    """
    found = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".so", ".json", ".pyd"):
            found.update(path.relative_to(root).as_posix().encode() + b"\0")
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def report() -> dict[str, Any]:
    """Everything the table shows, as plain JSON types.

    Keys: ``versions``, ``build`` (None without the extension), ``extension`` ("loaded" or why not), ``cpu``,
    ``openmp``, ``gpus`` with ``gpu_note``, ``backends`` (each "usable" or why not, for CPU and CUDA tensors),
    ``direct_calls`` ("yes" or why not: CPU tensors past torch's dispatcher),
    ``environment`` (the variables that change what happens here).
    """
    extension = native.module
    return {
        "versions": {
            "taco_kernels": __version__,
            "python": platform.python_version(),
            **{name: torch.__version__ if name == "torch" else _installed(name) for name in _PACKAGES},
            "cuda (of torch)": torch.version.cuda or "none",
            "platform": platform.platform(),
        },
        "extension": "loaded" if extension is not None else native.reason,
        "build": None if extension is None else json.loads(extension.BUILD_INFO),
        "cpu": {
            "name": _cpu_name(),
            "usable_isas": [] if extension is None else extension.cpu_isas(),
            "isa_in_use": None if extension is None else extension.cpu_isa(),
        },
        "openmp": {
            "runtimes_loaded": native.omp_libraries_in_process(),
            "threads": 0 if extension is None else extension.omp_threads(),
            "torch_threads": torch.get_num_threads(),
        },
        "gpus": _gpus(),
        "gpu_note": _why_no_gpu(),
        "forced_backend": get_backend(),
        "backends": {"cpu": backends("cpu"), "cuda": backends("cuda")},
        "direct_calls": direct.reason or "yes",
        "environment": {
            name: os.environ[name]
            for name in ("TACO_BACKEND", "TACO_DIRECT", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
            if name in os.environ
        },
    }


def _table(data: dict[str, Any]) -> str:
    lines: list[str] = []

    def section(title: str) -> None:
        lines.extend(["", title] if lines else [title])

    def row(name: str, value: object) -> None:
        lines.append(f"  {name:<24}{value}")

    section("Versions")
    for name, value in data["versions"].items():
        row(name, value)

    section("Built into the extension (taco_kernels._C)")
    build = data["build"]
    if build is None:
        row("nothing", data["extension"])
    else:
        row("C++ compiler", build.get("cxx", "unknown"))
        row("CPU instruction sets", ", ".join(build.get("cpu_isas", [])))
        row("OpenMP", "yes" if build.get("openmp") else "no: one thread")
        row("CUDA architectures", ", ".join(build.get("cuda_archs", [])) or "none (no nvcc at build, or TACO_CUDA=0)")
        row("nvcc", build.get("nvcc") or "not used")

    section("This machine")
    cpu, openmp = data["cpu"], data["openmp"]
    row("CPU", cpu["name"])
    row("instruction sets", ", ".join(cpu["usable_isas"]) or "unknown (no extension)")
    row("in use", cpu["isa_in_use"] or "-")
    row("OpenMP runtime", ", ".join(openmp["runtimes_loaded"]) or "none loaded")
    row("threads", f"{openmp['threads']} (extension), {openmp['torch_threads']} (torch)")
    row("direct calls", data["direct_calls"])
    for gpu in data["gpus"]:
        row("GPU", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    if not data["gpus"]:
        row("GPU", f"none: {data['gpu_note']}")

    for device, states in data["backends"].items():
        section(f"Backends for {device} tensors")
        for name, state in states.items():
            row(name, state if state == "usable" else f"no: {state}")
    section("Choice of backend")
    forced = data["forced_backend"]
    row("TACO_BACKEND", f"{forced} is forced" if forced else "not set: chosen per call")

    if data["environment"]:
        section("Environment variables")
        for name, value in data["environment"].items():
            row(name, value)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns the exit code (0)."""
    parser = argparse.ArgumentParser(prog="python -m taco_kernels.env", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead of a table")
    options = parser.parse_args(arguments)
    data = report()
    print(json.dumps(data, indent=2) if options.json else _table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
