"""benchmarks/whole_models.py: its rows are commands that work, and its tables say what the results say."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import transformers

from taco_kernels import env
from taco_svd.bench_report import bench_table, stand_in_note


@pytest.fixture
def script(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("whole_models", repo_root / "benchmarks" / "whole_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(name: str) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip


def test_every_row_is_measured_and_reported(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, invoke: Callable, tmp_path: Path
) -> None:
    import taco_svd.shapes as shapes

    monkeypatch.setattr(shapes, "shape_config", tiny)
    rows = script.rows(60)
    assert {name.removesuffix("-bridge") for name in rows if name.endswith("-bridge")} == {
        "tinyllama-1.1b", "llama-3.2-3b", "llama-2-7b",
    }  # fmt: skip
    for name, command in rows.items():
        path = tmp_path / f"whole-model-{name}.json"
        extra = ["--rounds", "1", "--save", path]
        # the rank that costs 0.3% of so small a model does not exist
        if "bridge" in command:
            extra += ["--bridge-rank", "2"]
        code, _, stderr = invoke("bench", *command, *extra)
        assert code == 0, (name, stderr)
        assert not script.is_current(path, command, "cpu")
        script.stamp(path, script.made_by(command, "cpu"))
        assert script.is_current(path, command, "cpu")
        assert not script.is_current(path, [*command, "--prompt", "7"], "cpu")
        path.with_suffix(".part").write_text(json.dumps({**json.loads(path.read_text()), "complete": False}))
        assert not script.is_current(path.with_suffix(".part"), command, "cpu")
    report = script.report(tmp_path)
    lines = [line for line in report.splitlines() if line.startswith("| ") and "---" not in line]
    measured = [
        compared
        for path in tmp_path.glob("*.json")
        for row in json.loads(path.read_text())["results"]
        for compared in row["comparisons"].values()
    ]
    assert len(lines) == 2 + len(measured)
    assert sum("removal again" in line for line in lines) == 1
    assert "weights are random" in report and "taco is a stand-in" in report
    document = tmp_path / "document.md"
    document.write_text(f"above\n{script.BEGIN}\nold\n{script.END}\nbelow\n")
    for _ in range(2):
        script.write_docs(report, document)
        assert document.read_text() == f"above\n{script.BEGIN}\n{report}\n{script.END}\nbelow\n"
    assert script.DOCS.read_text().count(script.BEGIN) == script.DOCS.read_text().count(script.END) == 1


def test_on_a_gpu_models_run_as_graphs(script: ModuleType) -> None:
    from taco_svd.bench_runner import MODES

    assert script.mode_of("cpu") == []
    option, mode = script.mode_of("cuda")
    assert option == "--mode" and mode == "graph" and mode in MODES


def test_results_of_another_machine_do_not_count(script: ModuleType, tmp_path: Path) -> None:
    assert not script.is_current(tmp_path / "none.json", [], "cpu")
    (tmp_path / "bad.json").write_text("{")
    assert not script.is_current(tmp_path / "bad.json", [], "cpu")
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"complete": True}))
    script.stamp(path, script.made_by([], "cpu"))
    assert script.is_current(path, [], "cpu")
    for name, value in script.made_by([], "cpu").items():
        assert value is not None, name
        path.write_text(json.dumps({"complete": True, "made_by": {**script.made_by([], "cpu"), name: "another"}}))
        assert not script.is_current(path, [], "cpu"), name


def test_a_result_says_what_it_began_with(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sources that are edited while a row is measured leave no result that could pass for one of either build."""
    build, after = ["first"], "first"

    def run(command: list[str], **_: object) -> SimpleNamespace:
        made = {"complete": True, "results": [], "device": "d", "dtype": "float32", "versions": {"torch": "2"}}
        Path(command[command.index("--save") + 1]).write_text(json.dumps(made))
        build[0] = after
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script, "build_now", lambda: build[0])
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    monkeypatch.setattr(sys, "argv", ["whole_models.py", "--only", "one-thread", "--restart", "--out", str(tmp_path)])
    path = tmp_path / "whole-model-tinyllama-1.1b-one-thread.json"
    after = "second"
    assert script.main() == 1 and not path.exists()
    build[0] = after = "first"
    assert script.main() == 0 and json.loads(path.read_text())["made_by"]["build"] == "first"
    kept, after = path.read_text(), "second"
    assert script.main() == 1 and path.read_text() == kept


def test_each_row_is_of_the_sources_as_they_are_then(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rows of one run take hours, and each is measured by a process that reads the sources anew."""
    monkeypatch.setattr(env, "__file__", str(tmp_path / "env.py"))
    (tmp_path / "op.py").write_text("old")
    first = script.made_by([], "cpu")
    (tmp_path / "op.py").write_text("new")
    assert script.made_by([], "cpu") != first


def test_kept_results_can_be_read(script: ModuleType) -> None:
    """Of every format that has been written, and by everything that reads one."""
    for path in script.RESULTS.glob("*/whole-model-*.json"):
        result = script.whole_result(path)
        assert result is not None, path
        assert len(bench_table(result).rows) > 0
        assert "damaged" not in script.report(path.parent)


@pytest.mark.parametrize("weights, method, told", [
    ("random", "taco", ("weights are random", "taco is a stand-in")), ("random", "bridge", ("weights are random",)),
    ("checkpoint", "taco", ()),
])  # fmt: skip
def test_tables_say_what_models_of_a_shape_are(weights: str, method: str, told: tuple[str, ...]) -> None:
    note = stand_in_note({"weights": weights, "method": method})
    assert {words for words in ("weights are random", "taco is a stand-in") if words in note} == set(told)


def test_damaged_and_incomplete_results_are_named_not_shown(script: ModuleType, tmp_path: Path) -> None:
    ratio = {"median": 0.001, "low": 0.0, "high": 0.002}
    result = {
        "complete": True, "shape": "whole", "device": "d", "dtype": "bfloat16", "versions": {"torch": "2"},
        "threads": 2,
        "structure": {"bridges": [{"rank": 8}]},
        "results": [{
            "phase": "decode", "prompt": 512, "batch": 1, "models": {"removal": {"seconds": {"p50": 0.01}}},
            "comparisons": {"compressed/removal": {"overhead": ratio, "rounds": 12, "stopped": "time"}},
        }],
    }  # fmt: skip
    (tmp_path / "whole-model-a.json").write_text(json.dumps(result))
    (tmp_path / "whole-model-b.json").write_text(json.dumps({**result, "complete": False, "shape": "half"}))
    (tmp_path / "whole-model-c.json").write_text("{")
    report = script.report(tmp_path)
    assert "| whole |" in report and "half" not in report
    assert report.endswith("Left out, since damaged or incomplete: whole-model-b.json, whole-model-c.json.")


@pytest.mark.parametrize("high, met", [(0.0029, "yes"), (0.0031, "no")])
def test_a_target_is_met_by_the_upper_end(script: ModuleType, high: float, met: str) -> None:
    result = {"shape": "s", "method": "bridge", "threads": 2, "structure": {"bridges": [{"rank": 8}]}}
    ratio = {"median": 0.001, "low": 0.0, "high": high}
    compared = {"overhead": ratio, "rounds": 12, "stopped": "time", "bytes": 0.8}
    seconds = {"seconds": {"p50": 0.01}}
    row = {"phase": "decode", "prompt": 512, "batch": 1, "models": {"removal": seconds, "dense": seconds}}
    assert script._overhead_row(result, row, "compressed/removal", compared).endswith(f"| - | - | {met} |")
    compared["bridges"] = {"median": 0.002, "low": 0.0019, "high": 0.0021, "samples": 12}
    line = script._overhead_row(result, row, "compressed/removal", compared)
    assert line.endswith(f"| +0.20% (+0.19% to +0.21%) | - | {met} |")  # shown, not judged by
    # against dense: below 1 at the upper end, and within 5% of the bytes that are left
    for median, top, expected in ((-0.17, -0.1, "yes"), (-0.15, -0.1, "no"), (-0.17, 0.01, "no")):
        compared["overhead"] = {"median": median, "low": -0.3, "high": top}
        assert script._factor_row(result, row, "compressed/dense", compared).endswith(f"| {expected} |")
