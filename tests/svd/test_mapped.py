"""Mapped models are the models that transformers loads, and give their pages back without losing anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from taco_svd.checkpoint import DEFAULT_MODEL, load_model
from taco_svd.errors import TacoError
from taco_svd.mapped import is_mapped, load_mapped, page_out
from taco_svd.module_tree import structural_copy

from .tiny_models import VOCABULARY, tiny_model


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "opt"])
def test_equals_the_ordinary_model(name: str, tmp_path: Path) -> None:
    tiny_model(name, torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    ordinary, _ = load_model(tmp_path)
    mapped = load_mapped(tmp_path)
    assert mapped is not None and is_mapped(mapped) and is_mapped(structural_copy(mapped)) and not is_mapped(ordinary)
    tokens = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = mapped(input_ids=tokens).logits
        page_out(mapped)
        assert torch.equal(mapped(input_ids=tokens).logits, before)
        assert torch.equal(ordinary(input_ids=tokens).logits, before)
    assert mapped.config.to_dict() == ordinary.config.to_dict() and not mapped.training
    assert {n: p.shape for n, p in mapped.named_parameters()} == {n: p.shape for n, p in ordinary.named_parameters()}


def test_pages_are_given_back_and_written_ones_kept() -> None:
    model = load_mapped(DEFAULT_MODEL)
    assert model is not None
    with torch.no_grad():
        weight = next(model.parameters())
        weight[0, 0] = 7.0
        page_out(model)
        assert float(weight[0, 0]) == 7.0
    fresh, _ = load_model(DEFAULT_MODEL)
    assert float(next(fresh.parameters()).detach()[0, 0]) != 7.0  # the file is as it was


def test_what_cannot_be_mapped_is_left_to_transformers(tmp_path: Path) -> None:
    assert load_mapped(DEFAULT_MODEL, "float32") is None
    (tmp_path / "config.json").write_text((DEFAULT_MODEL / "config.json").read_text())
    assert load_mapped(tmp_path) is None


@pytest.mark.parametrize("damage", ["outside", "shape", "truncated", "index"])
def test_damaged_checkpoints_are_refused(damage: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(DEFAULT_MODEL, directory)
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    index = directory / "model.safetensors.index.json"
    if damage == "shape":
        name = "model.norm.weight"
        save_file({**tensors, name: torch.cat([tensors[name]] * 2)}, weights)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        shutil.move(weights, tmp_path / "elsewhere.safetensors")
        names = dict.fromkeys(tensors, "../elsewhere.safetensors")
        index.write_text(json.dumps({"weight_map": names if damage == "outside" else 3}))
    with pytest.raises(TacoError):
        load_mapped(directory)
