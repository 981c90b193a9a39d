"""Results on disk: small JSON files, written atomically while a part runs, so that a cut-off run can be resumed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Where a process says which point it is at, and which version within it: whoever started it knows then where it died.
RUNNING = "TACO_SUITE_RUNNING"
# A thousand small points need not be a thousand written files.
SECONDS_BETWEEN_SAVES = 1.0


def write_json(path: Path, content: Any) -> None:
    """Writes beside ``path``, then renames: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def say_running(part: str, key: str, within: str = "") -> None:
    """Notes what this process is at, for the one that looks after it; no ``key`` between points."""
    if os.environ.get(RUNNING):
        Path(os.environ[RUNNING]).write_text("\t".join((part, key, within)))


def what_ran(mark: Path) -> tuple[str, str, str]:
    """(part, key, version within the point) that a process has said it is at; empty what it has not said."""
    part, key, within, *_ = [*mark.read_text().split("\t"), "", "", ""]
    return part, key, within


# What must agree for points to count together: numbers of two machines in one file would be worse than none.
IDENTITY = ("gpu", "torch", "triton", "sources", "dry_run")


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the files of two processes tell of the same sources, on the same machine and versions."""
    return all(one.get(name) == other.get(name) for name in IDENTITY)


def failed(point: dict[str, Any]) -> bool:
    """Whether a point found something wrong: not ok, a version with a wrong result, or no working configuration."""
    return not point.get("ok", True) or bool(point.get("red")) or bool(point.get("wrong"))


def all_checked(left_of: dict[str, int], backends: list[str]) -> bool:
    """Whether ``check`` has left no point, of any of these backends and of whatever else it says that of."""
    return all(left_of.get(name, 1) == 0 for name in {*left_of, *backends})


def error_of(error: BaseException) -> dict[str, Any]:
    """The point that stands for one that raised."""
    return {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}


@functools.cache
def sources(*folders: str) -> str:
    """A hash of what is measured, C++, CUDA and Python in the project's ``folders``."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def identity(gpu: str, dry: bool) -> dict[str, Any]:
    """What this run is of, by the names in ``IDENTITY``; ``gpu`` is the device's name."""
    import torch

    try:
        import triton

        version = triton.__version__
    except ModuleNotFoundError:
        version = "none"
    return {
        "gpu": gpu, "torch": torch.__version__, "triton": version, "sources": sources("csrc", "taco_kernels"),
        "dry_run": dry,
    }  # fmt: skip


class Store:
    """``points`` by key in ``<out>/<part>.json``; what a former process left there counts as done.

    ``same`` is what must agree for old points to count (the device, the versions, the sources): numbers of two machines
    in one file would be worse than none. Without ``resume`` no old point counts.
    """

    def __init__(self, out: Path, part: str, same: dict[str, Any], resume: bool = True) -> None:
        self.path = out / f"{part}.json"
        self.part = part
        self.content: dict[str, Any] = {"part": part, **same, "complete": False, "points": {}}
        self._saved = 0.0
        if resume and self.path.exists():
            old = json.loads(self.path.read_text())
            if all(old.get(key) == value for key, value in same.items()):
                self.content = {**old, "complete": False}

    def done(self, key: str) -> bool:
        return key in self.content["points"]

    def run(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Keeps what ``work`` gives, or that it raised: one broken point must not cost the others their run."""
        if os.environ.get(RUNNING) and not self.path.exists():
            self.save()  # what this point is noted in should the process die of it
        say_running(self.part, key)
        try:
            point = work()
        except Exception as error:
            point = error_of(error)
        self.add(key, point)
        return point

    def add(self, key: str, point: dict[str, Any]) -> None:
        self.content["points"][key] = point
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self, **facts: Any) -> None:
        self.content.update(facts)
        write_json(self.path, self.content)
        self._saved = time.monotonic()

    def blame(self, key: str, version: str, reason: str) -> None:
        """Notes that a version of a point ended its process: the point is measured again without it."""
        blame(self.content, key, version, reason)

    def blamed(self, key: str) -> dict[str, str]:
        """The versions of a point that ended a process, and how."""
        return dict(self.content.get("died", {}).get(key, {}))

    @property
    def points(self) -> dict[str, dict[str, Any]]:
        return self.content["points"]


def blame(content: dict[str, Any], key: str, version: str, reason: str) -> None:
    """Notes a version that ended its process in a part's ``content``. What the process said of it itself stays."""
    content.setdefault("died", {}).setdefault(key, {}).setdefault(version, reason)


def forget_failed(path: Path) -> None:
    """Takes the failed points out of a part's file, and those measured without a version that ended its process: they
    will be tried again, that version too. A candidate of ``tune`` that ended its process stays left out."""
    content = json.loads(path.read_text())
    kept = {key: point for key, point in content["points"].items() if not (failed(point) or point.get("without"))}
    if len(kept) < len(content["points"]):
        content["complete"] = False
        content.pop("left_of", None)
    if content.get("part") != "tune":
        content.pop("died", None)
    write_json(path, {**content, "points": kept})


class Budget:
    """Seconds that are left; parts stop between points when it is spent, never inside one."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def spent(self) -> bool:
        return self.left <= 0
