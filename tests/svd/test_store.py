"""What is finished stays, what is damaged or half-written is not taken for finished."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path

import pytest
import torch

from taco_svd import store as store_module
from taco_svd.errors import DiskFullError, TacoError
from taco_svd.store import INDEX, Store

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, 2, dtype=torch.bfloat16)[:, :1]}


@pytest.mark.parametrize("kind", ["memory", "temporary", "directory"])
def test_entries_come_back(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "w") if kind == "directory" else Store(memory=1 << 20 if kind == "memory" else 0)
    store.put("x/1", TENSORS, {"note": [1, 2.5]})
    store.put("empty", {})
    assert "x/1" in store and "x/2" not in store
    assert all(torch.equal(store.get("x/1")[key], value) for key, value in TENSORS.items())
    assert store.note("x/1") == {"note": [1, 2.5]} and store.get("empty") == {} and store.note("empty") is None
    store.put("x/1", {"a": torch.zeros(1)})
    assert list(store.get("x/1")) == ["a"]
    store.drop("x/1")
    assert "x/1" not in store
    with pytest.raises(KeyError):
        store.get("x/1")
    store.delete()
    assert list(tmp_path.iterdir()) == []


def test_another_process_finds_what_was_finished(tmp_path: Path) -> None:
    Store(tmp_path).put("done", TENSORS, "note")
    again = Store(tmp_path)
    assert "done" in again and again.note("done") == "note"
    assert torch.equal(again.get("done")["b"], TENSORS["b"])


def test_only_what_another_process_may_read_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = store_module.file_digest
    monkeypatch.setattr(store_module, "file_digest", lambda file: hashed.append(file.name) or real(file))
    Store().put("temporary", TENSORS)
    assert not hashed
    Store(tmp_path / "w").put("lasting", TENSORS)
    assert len(hashed) == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "emptied"])
def test_damaged_entries_count_as_missing(damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("whole", TENSORS)
    store.put("hurt", TENSORS)
    file = tmp_path / "hurt.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"")
    again = Store(tmp_path)
    assert "hurt" not in again and "whole" in again
    with pytest.raises(KeyError):
        again.get("hurt")
    again.put("hurt", TENSORS)
    assert "hurt" in Store(tmp_path)


@pytest.mark.parametrize("step", ["save_file", "replace"])
def test_an_interrupted_write_leaves_the_old_entry(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put("x", {"a": torch.zeros(3)})

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "save_file":
            patch.setattr(store_module, "save_file", stop)
        else:
            patch.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            store.put("x", {"a": torch.ones(3)})
    assert torch.equal(Store(tmp_path).get("x")["a"], torch.zeros(3))
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"format": 1, "entries": {"x": {"file": "../../etc/passwd", "sha256": "0"}}}),
        json.dumps({"format": 2, "entries": {}}),
    ],
)
def test_a_strange_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(TacoError, match="delete"):
        Store(tmp_path)


def test_a_full_disk_and_none_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "save_file", full)
        with pytest.raises(DiskFullError, match="--resume"):
            Store(tmp_path / "w").put("x", TENSORS)
        with pytest.raises(DiskFullError, match="TMPDIR"):
            Store().put("x", TENSORS)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)  # the index, after an entry that still fitted
        with pytest.raises(DiskFullError, match="--resume"):
            Store(tmp_path / "v").put("x", TENSORS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(DiskFullError, match=r"No temporary directory can be made .*TMPDIR"):
        Store().put("x", TENSORS)
