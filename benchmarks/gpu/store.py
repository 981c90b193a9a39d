"""Results on disk: small JSON files, written atomically after every point, so that a cut-off run can be resumed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes beside ``path``, then renames: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


class Store:
    """``points`` by key in ``<out>/<part>.json``; with ``resume`` what a former run left there counts as done.

    ``same`` is what must agree for old points to count (the device, the versions): numbers of two machines in one
    file would be worse than none.
    """

    def __init__(self, out: Path, part: str, same: dict[str, Any], resume: bool) -> None:
        self.path = out / f"{part}.json"
        self.content: dict[str, Any] = {"part": part, **same, "complete": False, "points": {}}
        if resume and self.path.exists():
            old = json.loads(self.path.read_text())
            if all(old.get(key) == value for key, value in same.items()):
                self.content["points"] = old["points"]

    def done(self, key: str) -> bool:
        return key in self.content["points"]

    def add(self, key: str, point: dict[str, Any]) -> None:
        self.content["points"][key] = point
        self.save()

    def save(self, **facts: Any) -> None:
        self.content.update(facts)
        write_json(self.path, self.content)

    @property
    def points(self) -> dict[str, dict[str, Any]]:
        return self.content["points"]


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
