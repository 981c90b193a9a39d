"""Models by hub name go by their snapshot in the cache: streamed like directories, and called by their name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from taco_svd import TacoError, checkpoint, hub
from taco_svd.checkpoint import DEFAULT_MODEL, load_model
from taco_svd.mapped import is_mapped
from taco_svd.plan import Plan
from taco_svd.planning import describe_source

from .tiny_models import VOCABULARY, tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny"


def cached(cache: Path, name: str, files: Path) -> Path:
    """Puts files into a cache as huggingface_hub does: blobs, and a snapshot of links to them."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for folder in (home / "refs", home / "blobs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(files.iterdir())):
        shutil.copy(file, home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty yet, on a machine without a connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def snapshot(cache: Path, tmp_path: Path) -> Path:
    """The tiny llama in the cache, in several shards."""
    tiny_model("llama").save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    return cached(cache, NAME, tmp_path / "saved")


@pytest.mark.parametrize("mapped", [False, True, None])
@pytest.mark.parametrize("here", [False, True])
def test_a_hub_name_loads_and_streams(
    mapped: bool | None, here: bool, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 1000)  # None: the files are more than a share of this
    model, tokenizer = load_model(NAME, mapped=mapped, here=here)
    assert is_mapped(model) == (mapped is not False) and tokenizer is None
    assert model.name_or_path == model.config.name_or_path == describe_source(model)["name"] == NAME
    tokens = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, tiny_model("llama")(input_ids=tokens).logits)


def test_compress_streams_a_hub_name_and_eval_finds_it_again(snapshot: Path, tmp_path: Path, invoke: Callable) -> None:
    out = tmp_path / "small"
    code, _, stderr = invoke(
        "compress", NAME, "--stream", "--layers", "1", "--samples", "4", "--seq-len", "16", "--out", out
    )
    assert code == 0, stderr
    assert Plan.load(out).source["name"] == NAME
    code, stdout, stderr = invoke("eval", out, "--text", "self", "--window", "16", "--max-windows", "2", "--json")
    assert code == 0 and json.loads(stdout)["divergence"]["against"] == NAME, stderr


def test_a_hub_model_brings_its_tokenizer(cache: Path) -> None:
    cached(cache, "someone/classics", DEFAULT_MODEL)
    model, tokenizer = load_model("someone/classics", mapped=True)
    assert is_mapped(model) and tokenizer is not None and tokenizer("a")["input_ids"]


def test_what_is_not_here_is_said(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(TacoError, match="no directory someone/tiny here, and from the hub it cannot be loaded"):
        load_model(NAME)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text((DEFAULT_MODEL / "config.json").read_text())
    cached(cache, NAME, tmp_path / "saved")
    with pytest.raises(TacoError, match=r"someone/tiny has no model\.safetensors .*Only safetensors are read"):
        load_model(NAME)


def test_only_what_is_read_is_fetched(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append(options)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert hub.snapshot(NAME) == snapshot
    small, weights = asked
    assert "*.json" in small["allow_patterns"] and not any("safetensors" in name for name in small["allow_patterns"])
    assert weights["allow_patterns"] == sorted(file.name for file in snapshot.glob("*.safetensors"))
    assert weights["revision"] == COMMIT and not small["local_files_only"] and not weights["local_files_only"]
    hub.snapshot(NAME, here=True)
    assert all(options["local_files_only"] for options in asked[2:]) and len(asked) == 4


@pytest.mark.parametrize("damage", ["config", "index", "pattern"])
def test_what_a_repository_says_decides_on_no_download(
    damage: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is refused for its config costs no download of its weights; a name in its index is no pattern."""
    tiny_model("llama").save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    file = tmp_path / "saved" / ("config.json" if damage == "config" else "model.safetensors.index.json")
    values = json.loads(file.read_text())
    if damage == "config":
        values["attn_implementation"] = "someone/kernel"
    else:
        values["weight_map"] = 3 if damage == "index" else dict.fromkeys(values["weight_map"], "*.safetensors")
    file.write_text(json.dumps(values))
    directory = cached(cache, NAME, tmp_path / "saved")
    asked: list[list[str]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(TacoError):
        load_model(NAME)
    assert asked[1:] == ([["[*].safetensors"]] if damage == "pattern" else [])
