"""`taco-svd compare`: many methods at several budgets, refusals, interruption, the picture."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from taco_kernels import dispatch
from taco_svd import cli_compare, cli_shared, comparison, compress, evaluation_run, planning
from taco_svd.baselines import BASELINES, Workspace
from taco_svd.baselines.workspace import Moments
from taco_svd.calibration import Calibration
from taco_svd.cli_shared import save_json
from taco_svd.comparison import Measure, Setting, method_names, run_comparison
from taco_svd.errors import TacoError
from taco_svd.methods import METHODS
from taco_svd.model_size import parameter_count
from taco_svd.report import compare_plot

from .test_calibration import tokenizer as word_tokenizer
from .tiny_models import VOCABULARY, tiny_model

SMALL = ("--samples", "4", "--seq-len", "12", "--window", "12", "--max-windows", "4", "--prompt", "4")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_model("gpt2").save_pretrained(path)
    return path


def measure(rounds: int = 0) -> Measure:
    tokens = torch.randint(3, VOCABULARY, (64,), generator=torch.Generator().manual_seed(1))
    return Measure(tokens, "random", window=12, prompt=4, rounds=rounds)


def test_several_texts_are_evaluated_on_one_model(dense: Path, tmp_path: Path, invoke) -> None:
    """A row's further perplexities are what the same command finds when it is given that text alone."""
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    rows = {}
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    word_tokenizer().save_pretrained(model)
    first.write_text("w5 w6 w7 w8 " * 40)
    second.write_text("w15 w16 w9 " * 40)
    for name, text in {"both": f"{first},{second}", "second": str(second)}.items():
        code, stdout, stderr = invoke(
            "compare", model, "--methods", "removal", "--keep", "0.85", *SMALL,
            "--rounds", "0", "--json", "--text", text,
        )  # fmt: skip
        assert code == 0, stderr
        rows[name] = json.loads(stdout)["models"]
    for both, alone in zip(rows["both"], rows["second"], strict=True):
        assert both["perplexity_on"] == {"second.txt": alone["perplexity"]}
        assert both["perplexity"] != alone["perplexity"]


def test_several_methods_at_two_budgets_with_a_picture(dense: Path, tmp_path: Path, invoke) -> None:
    save, plot = tmp_path / "all.json", tmp_path / "all.png"
    code, stdout, stderr = invoke(
        "compare", dense, "--methods", "removal,fwsvd,modegpt,bridge,taco", "--keep", "0.85,0.7", *SMALL,
        "--rounds", "2", "--save", save, "--plot", plot,
    )  # fmt: skip
    assert code == 0, stderr
    values = json.loads(save.read_text())
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["all.json", "all.png"]
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # GPT-2 keeps queries, keys and values in one matrix: MoDeGPT refuses it, says why, and nothing else stops
    assert [(row["model"], row["setting"]["keep"]) for row in values["refused"]] == [
        ("modegpt", 0.85),
        ("modegpt", 0.7),
    ]
    assert "c_attn" in values["refused"][0]["reason"] and values["refused"][0]["reason"] in stdout.replace("\n", " ")
    names = ["removal", "fwsvd", "bridge", "taco"]
    assert [row["model"] for row in values["models"]] == ["dense", *names, *names]
    assert "unfinished" not in values
    total = parameter_count(tiny_model("gpt2"))
    for row in values["models"][1:]:
        assert row["share"] == row["parameters"] / total <= row["setting"]["keep"]
        found, dense_found = row["perplexity"], values["models"][0]["perplexity"]
        change = found["over_dense"]
        assert change["relative"] == pytest.approx(found["perplexity"] / dense_found["perplexity"] - 1, abs=1e-9)
        assert change["low"] < change["relative"] < change["high"] and f"{change['relative']:+.1%} ±" in stdout
        assert row["latency"]["decode"]["p50"] > 0
        low, middle, high = (row["against_dense"]["decode"][key] for key in ("low", "median", "high"))
        assert 0 < low <= middle <= high
    for name in names:
        assert stdout.count(f" {name} ") == 2


def test_a_picture_of_a_comparison_in_which_every_method_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    score = {"perplexity": 40.0, "standard_error": 1.0}
    values = {"text": "self", "models": [{"model": "dense", "perplexity": score, "parameters": 4000}]}
    compare_plot(values, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 0


def test_all_names_every_method_once(dense: Path, invoke) -> None:
    names = method_names("all")
    code, stdout, _ = invoke("compare", dense, "--methods", "all", "--layers", "2", *SMALL, "--rounds", "0", "--json")
    values = json.loads(stdout)
    assert code == 0 and [row["model"] for row in values["models"][1:] + values["refused"]] == [
        *(name for name in names if name != "modegpt"),
        "modegpt",
    ]
    assert sorted(names) == sorted(METHODS) and set(BASELINES) < set(names)
    assert method_names("svd, kfac,svd") == ["svd", "kfac"]


def test_statistics_are_gathered_once_for_all_methods_and_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    collect = Moments.collect
    monkeypatch.setattr(Moments, "collect", lambda self, *given: passes.append(1) or collect(self, *given))
    tokens = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(2))
    methods = ["fwsvd", "asvd", "svd-llm", "zs-svd", "modegpt"]
    made = []
    result = run_comparison(
        tiny_model("llama"),
        None,
        Calibration(tokens, "tokens", 0),
        methods,
        [Setting(0.8), Setting(0.6)],
        measure(),
        on_model=lambda name, model, plan: made.append((name, plan.method, parameter_count(model))),
    )
    assert len(result.models) == 11 and not result.refused
    assert made == [(row["model"], row["model"], row["parameters"]) for row in result.models[1:]]
    assert passes == [1]


def test_layers_are_ranked_once_per_measure_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = planning.rank_layers
    monkeypatch.setattr(
        planning,
        "rank_layers",
        lambda runner, kind, count, *rest: passes.append((kind, count)) or real(runner, kind, count, *rest),
    )
    model, tokens = (
        tiny_model("llama"),
        torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(2)),
    )
    calibration = Calibration(tokens, "tokens", 0)
    workspace = Workspace(model, calibration)
    runs = [("removal", "bi", 1), ("svd", "bi", 2)]
    runs += [("removal", "angular", 1), ("removal", "angular", 2), ("svd", "angular", 2)]
    for method, measure, layers in runs:
        options = {"method": method, "importance": measure, "layers": layers, "calibration": calibration}
        _, shared = compress(model, workspace=workspace, **options)
        _, alone = compress(model, **options)
        assert shared.redundant == alone.redundant and shared.importance == alone.importance
    assert passes == [("bi", 1), ("bi", 1), ("bi", 2), ("angular", 1), ("angular", 1)] + [("angular", 2)] * 3


def test_where_16_bits_are_slow_the_faster_dense_model_is_named(
    dense: Path, tmp_path: Path, invoke, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "library_multiplies", lambda dtype: dtype == torch.float32)
    small = tmp_path / "small"
    assert invoke("compress", dense, "--out", small, "--method", "removal", "--layers", "2", *SMALL[:4])[0] == 0
    benched = ("bench", small, "--prompt", "4", "--phase", "prefill", "--rounds", "1", "--json", "--dtype", "bfloat16")
    compared = ("compare", dense, "--methods", "removal", "--layers", "2", *SMALL, "--dtype", "bfloat16", "--rounds")
    for command, told in {benched: True, (*compared, "1"): True, (*compared, "0"): False}.items():
        code, stdout, stderr = invoke(*command)
        assert code == 0 and ("--dtype float32" in " ".join(stderr.split())) == told, (command, stderr)
        assert command != benched or json.loads(stdout)["library_multiplies"] is False
    cli_shared.tell_slow_products(tiny_model("gpt2"))
    monkeypatch.setattr(dispatch, "library_multiplies", lambda dtype: True)
    cli_shared.tell_slow_products(tiny_model("gpt2", torch.bfloat16))
    assert capsys.readouterr().err == ""


def test_results_come_in_one_by_one_and_survive_ctrl_c(
    dense: Path, tmp_path: Path, invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = comparison.compress

    def stopped(*arguments, method: str, **options):
        if method == "fwsvd":
            # what a second Ctrl-C could not take away any more
            assert [row["model"] for row in json.loads(save.read_text())["models"]] == ["dense", "removal", "svd"]
            raise KeyboardInterrupt
        return real(*arguments, method=method, **options)

    monkeypatch.setattr(comparison, "compress", stopped)
    save, plot = tmp_path / "some.json", tmp_path / "some.png"
    code, stdout, stderr = invoke(
        "compare", dense, "--methods", "removal,svd,fwsvd,asvd", "--keep", "0.8", *SMALL, "--rounds", "0",
        "--save", save, "--plot", plot,
    )  # fmt: skip
    assert code == 130
    assert "2 of 4" in stderr and "removal" in stdout and "svd" in stdout and "asvd" not in stdout
    assert json.loads(save.read_text())["unfinished"] == 2
    assert plot.exists() and not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_the_last_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.json"
    save_json(path, {"finished": 1})

    def full(file: Path, *_: object, **__: object) -> None:
        file.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(TacoError, match=r"some\.json cannot be written: No space left"):
            save_json(path, {"finished": 2})
    assert json.loads(path.read_text()) == {"finished": 1} and list(tmp_path.iterdir()) == [path]


def test_nothing_finished_is_an_error_with_the_reason(dense: Path, tmp_path: Path, invoke) -> None:
    code, stdout, stderr = invoke("compare", dense, "--methods", "modegpt", "--keep", "0.8", *SMALL, "--rounds", "0")
    assert code == 2 and "c_attn" in stderr.replace("\n", " ") and stdout == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--methods", "svd,magic"], "--methods takes all"),
        (["--methods", ","], "--methods takes all"),
        (["--keep", "0.9,many"], "with commas"),
        (["--keep", "0.9,1.2"], "above 0 and below 1"),
        (["--keep", "0.9", "--layers", "2"], "not both"),
        (["--keep", "0.9", "--compression-ratio", "0.5"], "goes with --layers"),
        (["--save", "MISSING/file.json"], "--save"),
        (["--save", "DIRECTORY"], "--save"),
        (["--plot", "DIRECTORY/picture.nonsense"], "--plot"),
    ],
)
def test_mistakes_are_told_before_any_work(
    arguments: list[str], said: str, tmp_path: Path, invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli_compare, "load", no_work)
    places = {"MISSING": str(tmp_path / "missing"), "DIRECTORY": str(tmp_path)}
    filled = [next((a.replace(k, p) for k, p in places.items() if k in a), a) for a in arguments]
    code, stdout, stderr = invoke("compare", *filled)
    assert code == 2 and said in stderr and stdout == "" and len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--batch", "0"], "at least 1"),
        (["--prompt", "60"], "exceed the context of 64"),
        (["--rounds", "-1"], "at least 1"),
        (["--max-windows", "0"], "--max-windows"),
    ],
)
def test_what_cannot_be_measured_is_told_before_models_are_made(
    arguments: list[str], said: str, dense: Path, invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError("text was looked for")

    monkeypatch.setattr(evaluation_run, "evaluation_tokens", no_work)
    code, stdout, stderr = invoke("compare", dense, *arguments)
    assert code == 2 and said in stderr and stdout == "" and len(stderr.strip().splitlines()) == 1


def test_dense_is_measured_once_and_settings_are_told() -> None:
    tokens = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(2))
    told: list[tuple[int, int]] = []
    result = run_comparison(
        tiny_model("llama"),
        None,
        Calibration(tokens, "tokens", 0),
        ["removal", "svd"],
        [Setting(layers=1, compression_ratio=0.6)],
        measure(rounds=1),
        on_result=lambda so_far: told.append((so_far.finished, len(so_far.models))),
    )
    assert told == [(0, 1), (1, 2), (2, 3), (2, 3)]
    assert [row.get("setting") for row in result.models] == [None, *[{"layers": 1, "compression_ratio": 0.6}] * 2]
    assert result.latency is not None and result.latency["rounds"] == 1
    with pytest.raises(TacoError, match="--methods"):
        method_names("nothing")


def test_bench_says_that_there_is_no_removal_where_every_layer_is_factorised(
    dense: Path, tmp_path: Path, invoke
) -> None:
    assert (
        invoke("compress", dense, "--out", tmp_path / "small", "--method", "svd", "--keep", "0.8", *SMALL[:4])[0] == 0
    )
    code, _, stderr = invoke("bench", tmp_path / "small", "--against", "removal")  # by default with what there is
    assert code == 2 and "--against dense" in stderr
