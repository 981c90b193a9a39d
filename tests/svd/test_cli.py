"""The command line as a person meets it: what it prints, its exit codes, and one clear sentence for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taco_kernels
from taco_svd import bench, checkpoint, healing_run, report_data, shapes
from taco_svd.checkpoint import DEFAULT_MODEL

from .tiny_models import tiny_model

SMALL = ("--samples", "4", "--seq-len", "16")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "dense"
    tiny_model("llama").save_pretrained(path)
    return path


def test_compress_info_eval_bench_export(dense, tmp_path, invoke):
    out = tmp_path / "small"
    code, stdout, _ = invoke("compress", dense, "--out", out, "--layers", "2", *SMALL, "--json")
    assert code == 0
    made = json.loads(stdout)
    assert made["method"] == "taco" and len(made["redundant_layers"]) == 2
    assert made["result"]["parameters"] < made["source"]["parameters"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]  # nothing half-written left behind

    code, stdout, _ = invoke("info", out)
    assert code == 0 and "rank " in stdout and "kept" in stdout and "held-out" in stdout

    code, stdout, _ = invoke("eval", out, "--text", "self", "--window", "16", "--json")
    score = json.loads(stdout)
    assert code == 0 and score["perplexity"] > 1 and score["standard_error"] > 0 and score["tokens"] % 15 == 0

    code, stdout, _ = invoke(
        "bench", out, "--against", "dense,removal", "--prompt", "4", "--decode", "2", "--rounds", "3", "--json"
    )
    latency = json.loads(stdout)
    assert code == 0 and [row["phase"] for row in latency["results"]] == ["prefill", "decode"]
    for row in latency["results"]:
        assert set(row["models"]) == {"compressed", "dense", "removal"}
        overhead = row["comparisons"]["compressed/removal"]["overhead"]
        assert overhead["low"] <= overhead["median"] <= overhead["high"]

    ordinary = tmp_path / "ordinary"
    code, stdout, _ = invoke("export", out, "--dense", ordinary)
    assert code == 0 and "saves no memory" in stdout
    config = json.loads((ordinary / "config.json").read_text())
    assert config["model_type"] == "llama" and "taco_svd" not in config
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7, 8]])
    exported, compressed = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (ordinary, out))
    # float32 products in another order through a few layers
    torch.testing.assert_close(exported, compressed, rtol=1e-4, atol=1e-4)


def test_plan_is_carried_out_again(dense, tmp_path, invoke):
    assert invoke("compress", dense, "--out", tmp_path / "one", "--layers", "1", "--method", "svd", *SMALL)[0] == 0
    code, stdout, _ = invoke("compress", dense, "--out", tmp_path / "two", "--plan", tmp_path / "one", *SMALL, "--json")
    assert code == 0 and json.loads(stdout)["method"] == "svd"
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_compare_prints_every_method(dense, invoke):
    code, stdout, _ = invoke(
        "compare",
        dense,
        "--layers",
        "2",
        *SMALL,
        "--window",
        "16",
        "--rounds",
        "2",
        "--prompt",
        "4",
        "--max-windows",
        "4",
    )
    assert code == 0
    for name in ("dense", "removal", "bridge", "svd", "paper", "taco"):
        assert name in stdout


BAD = {
    "no such model": (["compress", "./nowhere", "--layers", "1", "--out", "OUT"], "No model at"),
    "no budget": (["compress", "DENSE", "--out", "OUT"], "--keep 0.8"),
    "two budgets": (["compress", "DENSE", "--out", "OUT", "--keep", "0.9", "--layers", "1"], "not both"),
    "keep too large": (["compress", "DENSE", "--out", "OUT", "--keep", "1.5"], "below 1"),
    "keep not reachable": (["compress", "DENSE", "--out", "OUT", "--keep", "0.01"], "cannot be reached"),
    "all layers away": (["compress", "DENSE", "--out", "OUT", "--layers", "5"], "between 1 and 4"),
    "unknown method": (["compress", "DENSE", "--out", "OUT", "--layers", "1", "--method", "magic"], "--method must be"),
    "unknown importance": (["compress", "DENSE", "--out", "OUT", "--layers", "1", "--importance", "x"], "--importance"),
    "window beyond context": (["compress", "DENSE", "--out", "OUT", "--layers", "1", "--seq-len", "999"], "context"),
    "text without tokenizer": (
        ["compress", "DENSE", "--out", "OUT", "--layers", "1", "--calibration", "TEXT"],
        "tokenizer",
    ),
    "output exists": (["compress", "DENSE", "--out", "DENSE", "--layers", "1"], "exists"),
    "force on a directory that is no model": (
        ["compress", "DENSE", "--out", "OTHER", "--layers", "1", "--force"],
        "no model directory",
    ),
    "bad dtype": (["eval", "DENSE", "--dtype", "int3", "--text", "self"], "--dtype"),
    "bad device": (["eval", "DENSE", "--device", "nonsense", "--text", "self"], "Device"),
    "a plan and a budget": (
        ["compress", "DENSE", "--out", "OUT", "--plan", "OTHER", "--keep", "0.5"],
        "leave out --keep",
    ),
    "a plan and a method": (
        ["compress", "DENSE", "--out", "OUT", "--plan", "OTHER", "--method", "bridge", "--no-consistency"],
        "leave out --method, --consistency",
    ),
    "a limit without tasks": (["eval", "MODEL", "--text", "self", "--limit", "5"], "--limit counts documents"),
    "windows without a text": (
        ["eval", "MODEL", "--tasks", "x", "--window", "32", "--stride", "8"],
        "only with --text",
    ),
    "no such text": (["eval", "MODEL", "--text", "missing.txt"], "No such text"),
    "text too short": (["eval", "MODEL", "--text", "TEXT"], "less than one window"),
    "stride": (["eval", "MODEL", "--text", "self", "--stride", "0"], "stride"),
    "no windows": (["eval", "MODEL", "--text", "self", "--max-windows", "0"], "--max-windows"),
    "info on a dense model": (["info", "DENSE"], "No plan"),
    "export of a dense model": (["export", "DENSE", "--dense", "OUT"], "ordinary model already"),
    "bench against nothing known": (["bench", "DENSE", "--against", "magic"], "--against"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(name, dense, tmp_path, invoke):
    arguments, said = BAD[name]
    (tmp_path / "text.txt").write_text("A few words.")
    other = tmp_path / "other"
    other.mkdir()
    (other / "keep.txt").write_text("not a model")
    places = {
        "DENSE": dense,
        "OUT": tmp_path / "out",
        "TEXT": tmp_path / "text.txt",
        "OTHER": other,
        "MODEL": DEFAULT_MODEL,
    }
    code, stdout, stderr = invoke(*[places.get(argument, argument) for argument in arguments])
    assert code == 2, stderr
    assert said in stderr and "Traceback" not in stderr and len(stderr.strip().splitlines()) == 1
    assert stdout == ""
    assert not (tmp_path / "out").exists() and (other / "keep.txt").exists()
    assert not list(tmp_path.glob(".*partial*"))


def test_nan_weights_are_refused_before_work(tmp_path, invoke):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    code, _, stderr = invoke("compress", tmp_path / "broken", "--out", tmp_path / "out", "--layers", "1")
    assert code == 2 and "layers.2.mlp.up_proj.weight" in stderr and "NaN" in stderr


def test_full_disk_is_told_before_work(dense, tmp_path, invoke, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    code, _, stderr = invoke("compress", dense, "--out", tmp_path / "out", "--layers", "1", *SMALL)
    assert code == 2 and "free" in stderr and not (tmp_path / "out").exists()


def test_force_replaces_a_model_and_nothing_else(dense, tmp_path, invoke):
    out = tmp_path / "small"
    for method in ("removal", "svd"):
        code, stdout, _ = invoke(
            "compress", dense, "--out", out, "--layers", "1", "--method", method, "--force", *SMALL, "--json"
        )
        assert code == 0 and json.loads(stdout)["method"] == method
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "DENSE", "--out", "OUT", "--layers", "1"],
        ["eval", "DENSE", "--text", "self"],
        ["bench", "--shape", "tinyllama-1.1b"],
        ["heal", "DENSE", "--out", "OUT", "--text", "self"],
        ["compare", "DENSE", "--layers", "1", "--text", "self"],
        ["report", "DENSE", "--out", "OUT"],
        ["export", "DENSE", "--dense", "OUT"],
        ["info", "DENSE"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_stopped_command_says_so(arguments, dense, tmp_path, invoke, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    for place, name in (
        (checkpoint, "load_model"),
        (checkpoint, "describe"),
        (healing_run, "heal_checkpoint"),
        (report_data, "gather"),
        (shapes, "shape_config"),
    ):
        monkeypatch.setattr(place, name, stop)
    places = {"DENSE": dense, "OUT": tmp_path / "out"}
    code, stdout, stderr = invoke(*[places.get(argument, argument) for argument in arguments])
    assert (code, stdout, stderr) == (130, "", "taco-svd: stopped; nothing was written.\n")
    assert not (tmp_path / "out").exists()


def test_a_stopped_bench_says_where_its_figures_are(tmp_path, invoke, monkeypatch):
    def stop(made, settings, progress, write):
        write({"so": "far"})
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_bench", stop)
    monkeypatch.setattr(shapes, "shape_config", lambda name: tiny_model("llama").config)
    saved = tmp_path / "saved.json"
    # a dtype that every CPU multiplies fast: bench says so of others
    options = ["--method", "paper", "--keep", "0.8", "--dtype", "float32", "--save", saved]
    code, _, stderr = invoke("bench", "--shape", "tiny", *options)
    assert (code, stderr) == (130, f"taco-svd: stopped; what was measured so far is in {saved}.\n")
    assert json.loads(saved.read_text()) == {"so": "far"}


def test_version(invoke):
    assert invoke("--version") == (0, f"taco-svd {taco_kernels.__version__}\n", "")


def test_json_has_no_nan(dense, invoke):
    """One window has no standard error: not known, and no number that other readers of JSON refuse."""
    code, stdout, stderr = invoke("eval", dense, "--text", "self", "--window", "16", "--max-windows", "1", "--json")
    assert code == 0, stderr

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert "null" in stdout and json.loads(stdout, parse_constant=refuse)


def test_help_teaches_every_command(invoke):
    code, stdout, _ = invoke("--help")
    assert code == 0
    for command in ("compress", "eval", "info", "bench", "export", "compare"):
        assert command in stdout
        assert invoke(command, "--help")[0] == 0


def test_the_module_runs_as_a_program_without_network(dense, tmp_path):
    """`python -m taco_svd` in a process of its own, with every socket refused."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*a, **k):\n"
        "    raise OSError('no network in this test')\n"
        "socket.socket.connect = refuse\n"
        "socket.getaddrinfo = refuse\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "taco_svd", "compress", "--out", str(tmp_path / "out"), "--layers", "2",
         "--method", "removal", "--samples", "2", "--seq-len", "8", "--json"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["parameters"] > 0
