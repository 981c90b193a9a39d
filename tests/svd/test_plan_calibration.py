"""A plan is carried out on the windows that it was made with, or says why it cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taco_svd import TacoError, compress
from taco_svd.plan import Plan
from taco_svd.plan_calibration import drawn_as_planned, draws_differ
from taco_svd.structure import Structure

from .tiny_models import tiny_model

RECORD = {"source": "self", "samples": 4, "seq_len": 16, "tokens": 64, "seed": 3, "sha256": "0" * 64}


def plan_of(**calibration: Any) -> Plan:
    return Plan("removal", Structure(4, (0, 1, 3)), (2,), calibration=calibration)


def test_what_is_given_wins_and_the_rest_is_the_plans() -> None:
    plan = plan_of(**RECORD)
    assert drawn_as_planned(plan, []) == {"calibration": "self", "samples": 4, "seq_len": 16, "seed": 3}
    assert drawn_as_planned(plan, ["samples", "seed"]) == {"calibration": "self", "seq_len": 16}
    assert drawn_as_planned(plan_of(source="c4"), []) == {"calibration": "c4"}
    assert drawn_as_planned(plan_of(), ["calibration"]) == {}


@pytest.mark.parametrize("source", ["texts", "tokens", "gone.txt", "/etc/hostname", "../text.txt", "..", "", None])
def test_what_cannot_be_drawn_again(source: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "text.txt").write_text("A few words.")
    monkeypatch.chdir(tmp_path / "below")
    plan = plan_of(**({} if source is None else {**RECORD, "source": source}))
    with pytest.raises(TacoError, match="--calibration"):
        drawn_as_planned(plan, [])
    assert "calibration" not in drawn_as_planned(plan, ["calibration"])


def test_a_text_is_looked_for_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(**{**RECORD, "source": "text.txt"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TacoError, match=r"'text\.txt'.*not in the working directory"):
        drawn_as_planned(plan, [])
    assert drawn_as_planned(plan, [], look=False)["calibration"] == "text.txt"
    (tmp_path / "text.txt").write_text("A few words.")
    assert drawn_as_planned(plan, [])["calibration"] == "text.txt"


def test_draws_that_should_be_the_same_and_are_not() -> None:
    made = plan_of(**RECORD)
    assert not draws_differ(plan_of(**RECORD), made)
    assert draws_differ(plan_of(**{**RECORD, "sha256": "1" * 64}), made)
    # drawn otherwise by request, or nothing to compare with
    assert not draws_differ(plan_of(**{**RECORD, "sha256": "1" * 64, "seed": 4}), made)
    assert not draws_differ(plan_of(**{key: value for key, value in RECORD.items() if key != "sha256"}), made)


def test_compress_carries_a_plan_out_on_its_own_calibration(tmp_path: Path, invoke: Callable) -> None:
    """The same command as in the README: nothing but the plan is said, and the same model comes out."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    code, _, stderr = invoke(
        "compress", tmp_path / "dense", "--out", tmp_path / "one", "--layers", "1",
        "--samples", "5", "--seq-len", "12", "--seed", "7",
    )  # fmt: skip
    assert code == 0, stderr
    code, _, stderr = invoke("compress", tmp_path / "dense", "--out", tmp_path / "two", "--plan", tmp_path / "one")
    assert (code, stderr) == (0, "")
    one, two = (Plan.load(tmp_path / name) for name in ("one", "two"))
    assert one.calibration == two.calibration and one.calibration["samples"] == 5
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    code, _, _ = invoke(
        "compress", tmp_path / "dense", "--out", tmp_path / "three", "--plan", tmp_path / "one", "--seed", "8"
    )
    assert code == 0 and Plan.load(tmp_path / "three").calibration["seed"] == 8


def test_a_text_that_has_changed_is_told_and_one_that_is_gone_refused(
    tmp_path: Path, invoke: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the demo model, which has a tokenizer."""
    monkeypatch.chdir(tmp_path)
    text = Path("text.txt")
    text.write_text(" ".join(f"Word {number} is followed by the next one." for number in range(400)))
    common = ("compress", "--method", "removal")
    arguments = ("--layers", "1", "--samples", "2", "--seq-len", "16", "--calibration", text)
    code, _, stderr = invoke(*common, "--out", "one", *arguments)
    assert (code, stderr) == (0, "")
    code, stdout, stderr = invoke(*common[:1], "--out", "two", "--plan", "one", "--json")
    assert (code, stderr) == (0, "") and json.loads(stdout)["calibration"] == Plan.load("one").calibration
    text.write_text(text.read_text()[::-1])
    code, _, stderr = invoke(*common[:1], "--out", "three", "--plan", "one")
    assert code == 0 and "warning: the calibration windows are not those" in stderr and stderr.count("\n") == 1
    text.rename("moved.txt")
    code, stdout, stderr = invoke(*common[:1], "--out", "four", "--plan", "one")
    assert code == 2 and "--calibration FILE" in stderr and stderr.count("\n") == 1 and not Path("four").exists()
    code, _, stderr = invoke(*common[:1], "--out", "four", "--plan", "one", "--calibration", "moved.txt")
    assert (code, stderr) == (0, "")


def test_python_carries_a_plan_out_on_its_own_calibration() -> None:
    model = tiny_model("llama")
    one, made = compress(model, method="bridge", layers=1, samples=5, seq_len=12, seed=7)
    two, again = compress(model, plan=made)
    assert again.calibration == made.calibration and made.calibration["samples"] == 5
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert compress(model, plan=made, seed=8)[1].calibration["seed"] == 8
    tokens = torch.randint(3, 50, (4, 16))
    _, given = compress(model, method="bridge", layers=1, calibration=tokens)
    with pytest.raises(TacoError, match=r"calibration=\.\.\."):
        compress(model, plan=given)
    assert compress(model, plan=given, calibration=tokens)[1].calibration == given.calibration


@pytest.mark.parametrize("option", [{"keep": 0.8}, {"method": "svd"}, {"consistency": False}, {"layers": 2}])
def test_a_plan_leaves_nothing_to_options(option: dict[str, Any]) -> None:
    with pytest.raises(TacoError, match=f"has decided.*{next(iter(option))}|goes with"):
        compress(tiny_model("llama"), plan=plan_of(**RECORD), **option)
