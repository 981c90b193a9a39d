"""Options of the command line that no other test gives it: each with an outcome that differs from the default's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taco_svd import Plan, bench_runner, shapes
from taco_svd.checkpoint import DEFAULT_MODEL
from taco_svd.experts import names_experts

from .test_mixture_of_experts import build
from .tiny_models import CONFIGS, tiny_model

SMALL = ("--samples", "4", "--seq-len", "16", "--layers", "2")
SHORT = ("--prompt", "4", "--decode", "2", "--rounds", "1", "--phase", "decode", "--bridge-rank", "2")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "dense"
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture
def benched(invoke: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The result of `taco-svd bench` on a tiny shape with these options."""
    monkeypatch.setattr(shapes, "shape_config", lambda name: CONFIGS["llama"]())

    def run(*options: str) -> dict[str, Any]:
        code, stdout, stderr = invoke("bench", "--shape", "tiny", *SHORT, *options, "--json")
        assert code == 0, stderr
        return json.loads(stdout)

    return run


@pytest.fixture
def planned(invoke: Callable, tmp_path: Path) -> Callable[..., Plan]:
    """The plan that `taco-svd compress` makes of a model with these options."""

    def run(model: Path, *options: str) -> Plan:
        out = tmp_path / f"small{len(list(tmp_path.iterdir()))}"
        code, _, stderr = invoke("compress", model, "--out", out, *SMALL, *options)
        assert code == 0, stderr
        return Plan.load(out)

    return run


def test_bench_in_a_compiled_mode(benched: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    # without generated code, which takes long to build and has nothing to do with this
    monkeypatch.setattr(bench_runner, "_compiled", lambda forward, device: compiled.append(forward) or forward)
    assert [row["mode"] for row in benched("--layers", "2")["results"]] == ["eager"] and not compiled
    result = benched("--layers", "2", "--mode", "compiled,eager")
    assert [row["mode"] for row in result["results"]] == ["compiled", "eager"]
    assert len(compiled) == 4  # each of two pairs


def test_bench_with_redundant_layers_in_several_runs(benched: Callable) -> None:
    for options, redundant in ((), [2, 3]), (("--runs", "2"), [1, 3]):
        result = benched("--share", "0.4", *options)
        assert result["redundant"] == redundant
        assert len(result["structure"]["bridges"]) == (2 if options else 1)


def test_eval_with_windows_that_overlap(invoke: Callable, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20)
    apart, overlapping = (
        json.loads(invoke("eval", DEFAULT_MODEL, "--text", text, "--window", "32", *options, "--json")[1])
        for options in ((), ("--stride", "8"))
    )
    assert (apart["stride"], overlapping["stride"]) == (32, 8)
    assert overlapping["windows"] > 3 * apart["windows"]
    # every token but a window's first ones is seen with at least 24 before it
    assert overlapping["perplexity"] < apart["perplexity"]


def test_compress_in_one_shot(dense: Path, planned: Callable) -> None:
    options = [planned(dense, "--method", "paper", *more).options for more in ((), ("--one-shot",))]
    assert [made.get("one_shot", False) for made in options] == [False, True]


def test_compress_with_experts_left_whole(planned: Callable, tmp_path_factory: pytest.TempPathFactory) -> None:
    mixture = tmp_path_factory.mktemp("models") / "mixture"
    build("mixtral").save_pretrained(mixture)
    factorised, whole = (planned(mixture, "--method", "svd", *more) for more in ((), ("--experts", "whole")))
    assert names_experts(factorised.structure) and not names_experts(whole.structure)
    assert whole.structure.low_rank


@pytest.mark.parametrize("measure", ["angular", "greedy"])
def test_compress_by_another_importance(measure: str, dense: Path, planned: Callable) -> None:
    usual, other = (planned(dense, "--method", "removal", *more) for more in ((), ("--importance", measure)))
    assert usual.importance["measure"] == "bi" and other.importance["measure"] == measure
    assert usual.importance["scores"] != other.importance["scores"]
    first, second = other.redundant
    assert measure == "greedy" or second == first + 1  # a run of layers
    assert sorted(other.importance["order"][:2]) == [first, second]
