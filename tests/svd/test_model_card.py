"""The model card: readable by the hub's own parser, true to the model, and in nobody's way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from taco_svd import save_compressed
from taco_svd.checkpoint import load_model
from taco_svd.checksums import read_checksums
from taco_svd.model_card import model_card
from taco_svd.plan import Plan
from taco_svd.quantisation import quantise
from taco_svd.structure import Structure

from .conftest import Compressed

TAGS = ["taco-svd", "low-rank", "compressed"]


def named(plan: Plan, name: str) -> Plan:
    return dataclasses.replace(plan, source={**plan.source, "name": name})


@pytest.mark.parametrize("method", ["taco", "paper", "bridge", "removal"])
def test_the_card_tells_what_was_done(method: str, compressed_tiny: Callable[..., Compressed], tmp_path: Path) -> None:
    _, model, plan = compressed_tiny("llama", method)
    save_compressed(model, named(plan, "someone/tiny"), tmp_path / "small")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == TAGS
    assert card.data.base_model == "someone/tiny"
    assert "import taco_svd" in card.text and f"`{method}`" in card.text
    assert f"{plan.result['parameters']:,} ({plan.result['share']:.1%}" in card.text
    assert f"Layers removed: {'none' if method in ('taco', 'paper') else '2 (2-3)'} of 5" in card.text
    ranks = [rank for maps in plan.structure.low_rank.values() for rank in maps.values()]
    assert (f"{len(ranks)}, of rank {min(ranks)}" in card.text) if ranks else ("Factorised" not in card.text)
    assert ("bridges" in card.text) == (method == "bridge")
    assert "`tokens`, 4 windows of 12 tokens" in card.text
    assert "README.md" not in read_checksums(tmp_path / "small")


def test_every_way_of_saving_writes_one_and_leaves_what_is_there(
    checkpoint: Path, compressed_tiny: Callable[..., Compressed], tmp_path: Path
) -> None:
    model, _ = load_model(checkpoint)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == (checkpoint / "README.md").read_text()
    (tmp_path / "again" / "README.md").write_text("somebody's own")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "somebody's own"
    quantise(compressed_tiny("llama", "paper")[1]).save_pretrained(tmp_path / "int8")
    assert "8-bit integers" in (tmp_path / "int8" / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["llama", "dense model", "../outside", "a/b/c", "someone/x\nlicense: mit", "", "a/b: c"]
)
def test_only_the_hubs_names_are_base_models(name: str, compressed_tiny: Callable[..., Compressed]) -> None:
    _, model, plan = compressed_tiny("llama", "taco")
    card = ModelCard(model_card(model.structure, named(plan, name)))
    assert card.data.base_model is None and card.data.license is None and card.data.tags == TAGS


def test_names_out_of_plans_stay_names(compressed_tiny: Callable[..., Compressed]) -> None:
    _, model, plan = compressed_tiny("llama", "taco")
    hostile = "`<script>\x1b[2J\n---\n# heading {front}" + "x" * 5000
    plan = dataclasses.replace(named(plan, hostile), calibration={**plan.calibration, "source": hostile})
    text = model_card(model.structure, plan)
    assert "\x1b" not in text and "# heading" not in text.splitlines() and text.count("\n---\n") == 1
    lines = [line for line in text.splitlines() if "<script>" in line]
    assert len(lines) == 2 and all("`'<script>" in line and len(line) < 300 for line in lines)


def test_without_a_plan_the_structure_speaks() -> None:
    structure = Structure(40, tuple(range(0, 40, 2)), {0: {"mlp.up_proj": 7, "mlp.down_proj": 7}})
    text = model_card(structure, None)
    assert "Layers removed: 20 of 40" in text and "2, of rank 7\n" in text and "Method" not in text
    assert ModelCard(text).data.tags == TAGS
