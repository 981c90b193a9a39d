"""Tensors of a long run, in memory or on disk: what is finished survives the process and need not fit in memory.

Every entry is one safetensors file, written beside its place and renamed; `index.json` holds sizes and checksums and
is renamed after it. So whatever the index names was written whole, and what a crash has left is not named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .atomic import disk_full_told, whole_file
from .checksums import file_digest
from .directory_lock import hold
from .errors import DiskFullError, TacoError
from .scratch import ScratchDirectory
from .team import Team

INDEX = "index.json"
FORMAT = 1


class Store:
    """Named groups of tensors, each with a note (whatever JSON can hold).

    Args:
        directory: where entries are kept for a later process. Without one they live in memory, and beyond `memory`
            bytes in a temporary directory that goes with the store.
        memory: bytes of entries that may be held in memory when there is no directory.
        team: processes with a store each. `in` then means that all of them have the entry, and all must ask.

    Raises:
        TacoError: another process or thread has a store in that directory, or its index is not readable.
    """

    def __init__(self, directory: str | Path | None = None, memory: int = 0, team: Team | None = None) -> None:
        self.team = team or Team()
        self.lasting = directory is not None
        self._directory = Path(directory) if directory is not None else None
        self._memory, self._used = memory, 0
        self._held: dict[str, tuple[dict[str, torch.Tensor], Any]] = {}
        self._index: dict[str, dict[str, Any]] = {}
        self._checked: set[str] = set()
        self._temporary: ScratchDirectory | None = None
        if self._directory is not None:
            self._lock = hold(self._directory)  # as long as the store lives
            self._index = self._read_index()

    # -- entries ----------------------------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return self.team.all(self._here(name)) if self.lasting else self._here(name)

    def _here(self, name: str) -> bool:
        return name in self._held or (name in self._index and self._sound(name))

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
        """Keeps an entry; it is lasting once this returns.

        Raises:
            DiskFullError: there is no space for it, or no temporary directory can be made.
        """
        if name in self._held:
            self.drop(name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if not self.lasting and self._used + size <= self._memory:
            self._held[name] = ({key: tensor.detach().cpu() for key, tensor in tensors.items()}, note)
            self._used += size
            return
        # a shared storage would be written once per tensor that looks into it, a view with all of what it looks into
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        file = entry_file(name)
        with self._disk_full_told(), whole_file(self._folder() / file) as partial:
            if plain:
                save_file(plain, partial)
            else:
                partial.write_bytes(b"")
            # no later process reads a temporary file
            digest = file_digest(partial) if self.lasting else ""
        self._index[name] = {"file": file, "sha256": digest, "note": note}
        self._checked.add(name)
        self._write_index()

    def get(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry; those on disk are mapped, not read, and live on the CPU.

        Raises:
            KeyError: no such entry, or its file is damaged.
        """
        if name in self._held:
            return dict(self._held[name][0])
        if not self._here(name):
            raise KeyError(name)
        file = self._folder() / self._index[name]["file"]
        if file.stat().st_size == 0:
            return {}
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict

    def note(self, name: str) -> Any:
        """What was noted with an entry.

        Raises:
            KeyError: no such entry.
        """
        if name in self._held:
            return self._held[name][1]
        if not self._here(name):
            raise KeyError(name)
        return self._index[name]["note"]

    def in_memory(self, name: str) -> bool:
        """Whether the tensors of an entry are held, rather than mapped from a file."""
        return name in self._held

    def drop(self, name: str) -> None:
        """Forgets an entry, where there is one."""
        held = self._held.pop(name, None)
        if held is not None:
            self._used -= sum(tensor.numel() * tensor.element_size() for tensor in held[0].values())
        entry = self._index.pop(name, None)
        if entry is not None:
            self._write_index()
            (self._folder() / entry["file"]).unlink(missing_ok=True)

    def delete(self) -> None:
        """Takes everything away, the directory with it."""
        self._held.clear()
        self._index.clear()
        if self._temporary is not None:
            self._temporary.delete()
            self._temporary = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    # -- disk -------------------------------------------------------------------------------------------------------

    def _folder(self) -> Path:
        if self._directory is not None:
            return self._directory
        if self._temporary is None:
            try:
                self._temporary = ScratchDirectory()
            except OSError as error:
                raise DiskFullError(
                    f"No temporary directory can be made ({error}); point TMPDIR to a disk with space."
                ) from error
        return self._temporary.path

    def _sound(self, name: str) -> bool:
        """Whether the file is what was written; looked at once per process. A damaged entry is forgotten."""
        if name in self._checked:
            return True
        entry = self._index[name]
        file = self._folder() / entry["file"]
        try:
            sound = file_digest(file) == entry["sha256"]
            if sound and file.stat().st_size:
                with safe_open(file, framework="pt"):
                    pass
        except (OSError, SafetensorError):
            sound = False
        if sound:
            self._checked.add(name)
        else:
            self._index.pop(name)
        return sound

    def _read_index(self) -> dict[str, dict[str, Any]]:
        assert self._directory is not None
        path = self._directory / INDEX
        if not path.exists():
            return {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            entries: dict[str, dict[str, Any]] = values["entries"]
            sound = values["format"] == FORMAT and all(
                Path(entry["file"]).name == entry["file"] and isinstance(entry["sha256"], str)
                for entry in entries.values()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise TacoError(f"{path} is not readable as an index of finished work; delete {self._directory}.")
        return entries

    def _write_index(self) -> None:
        with self._disk_full_told(), whole_file(self._folder() / INDEX) as partial:
            partial.write_text(json.dumps({"format": FORMAT, "entries": self._index}), encoding="utf-8")

    def _disk_full_told(self) -> AbstractContextManager[None]:
        return disk_full_told(
            self._folder(),
            "finished steps are kept. Free some, and run the same command with --resume."
            if self.lasting
            else "free some, or point TMPDIR to another.",
        )


def entry_file(name: str) -> str:
    """The file of an entry."""
    return f"{name.replace('/', '-')}.safetensors"
