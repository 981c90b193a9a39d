"""Plans: read back as written, compared, edited and applied again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from taco_svd import CompressionOptions, Plan, TacoError, apply_plan, compress, make_plan
from taco_svd.architectures import Architecture
from taco_svd.calibration import Calibration
from taco_svd.replacement import LowRankLinear
from taco_svd.structure import Structure

from .conftest import Compressed
from .tiny_models import tiny_model


@pytest.mark.parametrize("method", ["removal", "svd", "paper", "taco", "bridge"])
def test_round_trip_and_second_application(
    method: str, compressed_tiny: Callable[..., Compressed], calibration_tokens: torch.Tensor, tmp_path: Path
) -> None:
    dense, model, plan = compressed_tiny("llama", method)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and again.diff(plan) == {}
    same, told = compress(dense, plan=again, calibration=calibration_tokens)
    assert told == plan
    with torch.no_grad():
        assert torch.equal(same(calibration_tokens).logits, model(calibration_tokens).logits)
    assert "/tmp" not in (tmp_path / "plan.json").read_text()


def test_edited_rank_is_applied(compressed_tiny: Callable[..., Compressed], calibration_tokens: torch.Tensor) -> None:
    dense, _, plan = compressed_tiny("llama", "taco")
    data = json.loads(json.dumps(plan.to_dict()))
    data["structure"]["low_rank"]["2"]["mlp.up_proj"] = 13
    edited = Plan.from_dict(data)
    old = plan.structure.low_rank[2]["mlp.up_proj"]
    assert plan.diff(edited) == {"structure.low_rank.2.mlp.up_proj": (old, 13)}
    model, told = compress(dense, plan=edited, calibration=calibration_tokens)
    module = Architecture(model).layers[2].get_submodule("mlp.up_proj")
    assert isinstance(module, LowRankLinear) and module.rank == 13
    assert told.result["parameters"] == plan.result["parameters"] + (13 - old) * (32 + 56)


class NoText:
    """A run that may look at the model and must not begin to write its calibration text."""

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[int, int], None]]:
        assert title == "looking at the weights", title
        yield lambda done, total: None


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"layers": 2, "importance": "none"}, "--importance must be"),
        ({"layers": 2, "bridge_rank": 4}, "--bridge-rank goes with"),
        ({"layers": 2, "one_shot": True}, "--one-shot goes with"),
        ({"layers": 2, "experts": "none"}, "--experts must be"),
        ({"max_latency": 0.8, "experts": "none"}, "--experts must be"),
        ({"layers": [2, 2]}, "must be different"),
        ({"layers": [2, 5]}, "in 0..4"),
        ({"method": "bridge", "layers": 2, "bridge_rank": 33}, "between 1 and the hidden size 32, got 33"),
        ({"method": "bridge", "keep": 0.8, "bridge_rank": 33}, "between 1 and the hidden size 32, got 33"),
        ({"method": "bridge", "keep": 0.8, "bridge_rank": -3}, "between 1 and the hidden size 32, got -3"),
        ({"plan": Plan("removal", Structure(6, (0, 1)), (2,))}, "6 layers, this one has 5"),
        ({"plan": Plan("svd", Structure(5, (0, 1, 2, 3, 4), {1: {"mlp.c_fc": 2}}), (1,))}, "The plan names"),
    ],
    ids=str,
)
def test_what_arguments_tell_is_told_before_text_is_written(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(TacoError, match=said):
        compress(tiny_model("llama"), progress=NoText(), **arguments)


def test_plan_for_another_model_is_refused(
    compressed_tiny: Callable[..., Compressed], calibration_tokens: torch.Tensor
) -> None:
    dense, _, plan = compressed_tiny("llama", "taco")
    longer = dataclasses.replace(plan, structure=dataclasses.replace(plan.structure, source_layers=6))
    with pytest.raises(TacoError, match="6 layers"):
        compress(dense, plan=longer, calibration=calibration_tokens)
    with pytest.raises(TacoError, match="names"):
        compress(tiny_model("gpt2"), plan=plan, calibration=calibration_tokens)
    for rank in (33, 1 << 19):
        wide = dataclasses.replace(
            plan, structure=dataclasses.replace(plan.structure, low_rank={2: {"mlp.up_proj": rank}}, pivoted={})
        )
        with pytest.raises(TacoError, match=f"rank {rank}"):
            compress(dense, plan=wide, calibration=calibration_tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "magic"},
        {"structure": None},
        {"structure": {"format_version": 1}},
        {"redundant": [3, 2]},
        {"redundant": [99]},
        {"redundant": ["2"]},
        {"redundant": 3},
        {"compression_ratio": "much"},
        {"options": [1]},
        {"surprise": 1},
    ],
)
def test_damaged_plans_are_refused(
    change: dict[str, Any], compressed_tiny: Callable[..., Compressed], tmp_path: Path
) -> None:
    _, _, plan = compressed_tiny("llama", "taco")
    (tmp_path / "plan.json").write_text(json.dumps({**plan.to_dict(), **change}))
    with pytest.raises(TacoError, match="plan|structure|format"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_files_that_are_no_plans(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(TacoError):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(TacoError, match="No plan at"):
        Plan.load(tmp_path)


def test_edited_plans_that_make_no_sense_are_refused(
    compressed_tiny: Callable[..., Compressed], calibration_tokens: torch.Tensor
) -> None:
    dense, _, plan = compressed_tiny("llama", "bridge")
    structure = plan.structure.to_dict()
    after = structure["bridges"][0]["after"]
    everything = list(range(structure["source_layers"]))
    for changes, words in (
        ({"kept": everything}, f"bridge after layer {after}, and the layer behind it is not taken out"),
        ({"kept": everything, "bridges": []}, "keeps every layer as it is"),
        ({"bridges": [{**structure["bridges"][0], "rank": 33}]}, "bridge of rank 33 in a stream of 32"),
    ):
        edited = dataclasses.replace(plan, structure=Structure.from_dict({**structure, **changes}))
        with pytest.raises(TacoError, match=words):
            compress(dense, plan=edited, calibration=calibration_tokens)


def test_a_plan_tells_no_directories(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    """It is published with the model."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "project" / "model")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "project" / "model")
    plan = compress(dense, method="removal", layers=1, calibration=calibration_tokens)[1]
    plan.save(tmp_path / "plan.json")
    assert plan.source["name"] == "model" and str(tmp_path) not in (tmp_path / "plan.json").read_text()


def test_numbers_of_other_libraries(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    model = tiny_model("llama")
    plan = compress(
        model, method="paper", layers=numpy.int64(2), compression_ratio=numpy.float32(0.7),
        calibration=calibration_tokens, work_dir=tmp_path / "work",
    )[1]  # fmt: skip
    plan.save(tmp_path / "plan.json")
    assert plan.compression_ratio == 0.7 and Plan.load(tmp_path / "plan.json") == plan
    expected = compress(model, method="svd", keep=0.8, calibration=calibration_tokens)[1]
    for keep in (numpy.float32(0.8), torch.tensor(0.8, dtype=torch.float64), Fraction(4, 5)):
        found = compress(model, method="svd", keep=keep, calibration=calibration_tokens)[1]
        assert found.structure == expected.structure


@pytest.mark.parametrize(
    "method, budget", [("taco", {"keep": 0.8}), ("bridge", {"layers": 2}), ("paper", {"layers": 2})]
)
def test_a_plan_and_what_comes_of_it_are_compress_in_two_steps(method, budget, calibration_tokens):
    calibration = Calibration(calibration_tokens, "tokens", 0)
    model = tiny_model("llama")
    plan = make_plan(model, calibration, CompressionOptions(method=method, **budget))
    carried = apply_plan(model, plan, calibration)
    whole, made = compress(model, method=method, calibration=calibration_tokens, **budget)
    assert plan.structure == made.structure and plan.redundant == made.redundant
    ours, theirs = carried.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
