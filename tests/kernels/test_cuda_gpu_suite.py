"""benchmarks/gpu_suite.py without a GPU: its whole path on tiny shapes, and that it can tell right from wrong."""

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks" / "gpu_suite.py"


def _run(*arguments, interpret):
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SUITE), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def test_without_a_gpu_one_sentence(tmp_path):
    done = _run("--out", tmp_path / "out", interpret=False)
    assert done.returncode == 2
    assert done.stdout.startswith("No GPU is visible") and len(done.stdout.splitlines()) == 1 and not done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run_and_resume(tmp_path):
    interpret = importlib.util.find_spec("triton") is not None
    done = _run("--dry-run", "--out", tmp_path, "--budget-seconds", 300, interpret=interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert parts["suite"]["ok"] and all(parts["suite"]["ok"].values())
    assert parts["check"]["complete"] and len(parts["check"]["points"]) > 50
    assert all(point["ok"] for point in parts["check"]["points"].values())
    assert parts["bench"]["complete"]
    for point in parts["bench"]["points"].values():
        assert point["us"]["dense"]["p20"] <= point["us"]["dense"]["p80"]
        assert "two calls" in point["speedup"]["taco"] and not point["red"]
    assert parts["svd"]["complete"] and len(parts["svd"]["points"]) > 8
    assert all(point["ok"] for point in parts["svd"]["points"].values())
    if interpret:
        assert "triton" in parts["check"]["backends"]
        assert "skipped" not in parts["svd"]["points"]["sketch"]
        assert parts["none-dry-run"]["entries"]
    # Pictures come from the JSON alone.
    drawn = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_plots.py"), str(tmp_path / "bench.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if importlib.util.find_spec("matplotlib") is None:
        assert drawn.returncode != 0 and "matplotlib" in drawn.stderr
    else:
        assert drawn.returncode == 0, drawn.stderr
        assert all((tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG" for name in ("roofline", "speedup"))
    assert all(point["chosen"].startswith("taco") for point in parts["bench"]["points"].values())
    # Nothing is measured twice: there is no time for it.
    inside = ("--inside", "--dry-run", "--out", tmp_path, "--part", "bench", "--budget-seconds", 0)
    done = _run(*inside, interpret=interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads((tmp_path / "bench.json").read_text())
    assert again["points"] == parts["bench"]["points"] and again["complete"]


def test_tables_decide_what_runs(gpu, tmp_path, monkeypatch):
    """What the benchmark found fastest is what the dispatcher takes from then on, and only near what was measured."""
    from taco_kernels import dispatch
    from taco_kernels.triton_kernels import config

    us = {"taco library": {"p50": 5.0}, "taco cuda": {"p50": 8.0}, "taco cuda dependent": {"p50": 9.0}}
    point = {
        "op": "low_rank_linear",
        "dtype": "bfloat16",
        "table_shape": (4096, 4096, 64),
        "rows": 16,
        "us": us,
        "red": {},
    }
    gpu.tuning.write_table(tmp_path / "some-gpu.json", "Some GPU", {}, {"a": point})
    monkeypatch.setattr(config, "TUNED_DIR", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(dispatch, "why_not", lambda *_: "")
    config.forget_tables()
    dispatch.tuned_choice.cache_clear()
    try:
        for dtype in (torch.bfloat16, torch.float16):
            assert dispatch.choose("cuda", dtype, 16, False, ("low_rank_linear", 4096, 4096, 64)) == "library"
        assert dispatch.choose("cuda", torch.bfloat16, 8, False, ("low_rank_linear", 4096, 4096, 64)) == "cuda"
        assert dispatch.choose("cuda", torch.bfloat16, 16, False, ("low_rank_linear", 256, 256, 64)) == "cuda"
        assert dispatch.choose("cuda", torch.float32, 16, False, ("low_rank_linear", 4096, 4096, 64)) == "cuda"
        assert config.content("Some GPU")["cuda_launch"] == "cooperative"
        # Tuning afterwards keeps what the benchmark found, and the other way round.
        gpu.tuning.write_table(tmp_path / "some-gpu.json", "Some GPU", {})
        assert json.loads((tmp_path / "some-gpu.json").read_text())["choices"]
    finally:
        config.forget_tables()
        dispatch.tuned_choice.cache_clear()


def test_spent_budget_leaves_points_for_later(tmp_path):
    inside = ("--inside", "--dry-run", "--out", tmp_path, "--part", "bench", "--budget-seconds", 0)
    done = _run(*inside, interpret=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "bench.json").read_text())
    assert not content["complete"] and content["left"] > 0 and not content["points"]
    done = _run("--dry-run", "--out", tmp_path / "none", "--part", "bench", "--budget-seconds", 0, interpret=False)
    assert done.returncode == 0 and "not run, the budget is spent" in done.stdout
    steps = json.loads((tmp_path / "none" / "suite.json").read_text())["steps"]
    assert len(steps) == 2 and all(step["skipped"] for step in steps)


# A part of the suite that has four points; what happens at the second is said by a file beside it.
FAKE_PART = """
import argparse, os, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from gpu.store import Store
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--shard", default="0/1")
options, _ = parser.parse_known_args()
store = Store(options.out, "check", {{"gpu": "none"}})
number, of = map(int, options.shard.split("/"))

def point(key):
    if key == "b":
        {event}
    return {{"ok": True, "process": os.getpid()}}

for at, key in enumerate("abcd"):
    if at % of == number and not store.done(key):
        store.run(key, lambda: point(key))
        store.save()
store.save(complete=True, left_of={{"library": 0}}, backends=["library"])
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("event", "said"),
    [("os._exit(3)", "exit code 3"), ("time.sleep(60)", "no new point in 5 s"), ("raise RuntimeError('x')", "x")],
)
def test_what_crashes_or_hangs_costs_its_point_only(conductor, tmp_path, monkeypatch, event, said, workers):
    script = tmp_path / "suite.py"
    script.write_text(FAKE_PART.format(benchmarks=str(ROOT / "benchmarks"), event=event))
    monkeypatch.setattr(conductor, "SUITE", script)
    step = conductor.Step("check", 1.0, workers=workers, stall=5.0)
    monkeypatch.setattr(conductor, "plan", lambda workers: [step])
    out = tmp_path / "out"
    conductor.prepare(out, ["check"], resume=False)
    assert not conductor.Conductor(out, ["check"], [], 100.0, {"gpu": "none"}, workers).run() or "raise" in event
    content = json.loads((out / "check.json").read_text())
    assert content["complete"] and set(content["points"]) == set("abcd")
    assert [key for key, point in content["points"].items() if not point["ok"]] == ["b"]
    assert said in content["points"]["b"]["error"]
    steps = json.loads((out / "suite.json").read_text())["steps"]
    assert ("deaths" in steps[0]) == ("raise" not in event)
    # what failed is tried again, the rest is not
    before = content["points"]["a"]["process"]
    script.write_text(FAKE_PART.format(benchmarks=str(ROOT / "benchmarks"), event="pass"))
    conductor.prepare(out, ["check"], resume=True)
    assert conductor.Conductor(out, ["check"], [], 100.0, {"gpu": "none"}, workers).run()
    content = json.loads((out / "check.json").read_text())
    assert content["points"]["b"]["ok"] and content["points"]["a"]["process"] == before


FAKE_WARMING = """
import argparse, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from gpu.store import Store
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--part")
options, _ = parser.parse_known_args()
if options.part == "warm":
    time.sleep({seconds})
    (options.out / "warm").touch()
else:
    store = Store(options.out, options.part, {{"gpu": "none"}})
    store.run("a", lambda: {{"warm": (options.out / "warm").exists()}})
    store.save(complete=True)
"""


@pytest.mark.parametrize(("seconds", "in_time"), [(3, True), (60, False)])
def test_what_compiles_ahead_is_waited_for_as_long_as_its_share_lasts(
    conductor, tmp_path, monkeypatch, seconds, in_time
):
    """It has no points, so it does not hang however long it takes; nothing is timed beside it."""
    script = tmp_path / "suite.py"
    script.write_text(FAKE_WARMING.format(benchmarks=str(ROOT / "benchmarks"), seconds=seconds))
    monkeypatch.setattr(conductor, "SUITE", script)
    monkeypatch.setattr(conductor, "plan", lambda workers: [conductor.Step("check", 1.0), conductor.Step("bench", 1.0)])
    conductor.prepare(tmp_path, ["check", "bench"], resume=False)
    run = conductor.Conductor(tmp_path, ["check", "bench"], [], 120.0 if in_time else 16.0, {"gpu": "none"}, 1)
    assert run.run() and run.warming == []
    assert not json.loads((tmp_path / "check.json").read_text())["points"]["a"]["warm"]
    assert json.loads((tmp_path / "bench.json").read_text())["points"]["a"]["warm"] == in_time


def test_compiling_ahead_is_no_part_of_its_own(tmp_path):
    done = _run("--dry-run", "--out", tmp_path / "out", "--part", "warm", interpret=False)
    assert done.returncode == 2 and "--part warm belongs to the parts" in done.stderr


@pytest.fixture
def conductor(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu.conductor

    return gpu.conductor


@pytest.fixture
def gpu(monkeypatch):
    """The package ``gpu`` of the benchmarks folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu.bench
    import gpu.checks
    import gpu.shapes
    import gpu.tuning

    return gpu


@pytest.mark.parametrize("op", ["low_rank_linear", "low_rank_bridge", "low_rank_linear_group", "low_rank_mlp"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bound_lets_right_results_through_and_wrong_ones_not(gpu, op, dtype):
    checks = gpu.checks
    outs = (96, 32, 17) if op == "low_rank_linear_group" else 96
    inputs = checks.draw(op, 96, outs, 24, 5, dtype, "cpu", residual=True)
    right = checks.parts(checks.forced_reference(inputs))
    for backend in ("cuda", "triton", "library"):
        assert checks.worst_error(right, inputs, backend) <= 1.0
        for which in range(len(right)):
            wrong = [y.clone() for y in right]
            wrong[which][3, 7] += (0.2 if op != "low_rank_mlp" else 2.0) * right[which].float().abs().max().item()
            assert checks.worst_error(wrong, inputs, backend) > 1.0
            wrong[which][3, 7] = float("nan")
            assert checks.worst_error(wrong, inputs, backend) > 1.0


def test_of_many_rows_some_are_compared_and_all_must_be_finite(gpu):
    inputs = gpu.checks.draw("low_rank_linear", 24, 16, 8, 3000, "float32", "cpu")
    right = gpu.checks.forced_reference(inputs)
    assert gpu.checks.worst_error(right, inputs, "cuda") <= 1.0
    for row in (0, 2999):
        wrong = right.clone()
        wrong[row] += 1.0
        assert gpu.checks.worst_error(wrong, inputs, "cuda") > 1.0
    wrong = right.clone()
    wrong[1500, 3] = float("nan")
    assert gpu.checks.worst_error(wrong, inputs, "cuda") > 1.0


def test_separate_calls_compute_the_ops(gpu):
    """What our ops are compared with must be the same function."""
    for op, outs in {
        "low_rank_linear": 40,
        "low_rank_bridge": 48,
        "low_rank_linear_group": (40, 8),
        "low_rank_mlp": 56,
        "pivoted_low_rank_linear": 40,
    }.items():
        inputs = gpu.checks.draw(op, 48, outs, 16, 3, "float32", "cpu", residual=True)
        assert gpu.checks.worst_error(gpu.bench.separate(inputs), inputs, "library") <= 1.0
        assert gpu.checks.worst_error(gpu.checks.call(inputs), inputs, "library") <= 1.0
        flat = [t for member in inputs.members for t in member]
        if inputs.residual is None:
            again = gpu.bench._flat(inputs.x, flat, op, inputs.eps, inputs.pivot)
            assert gpu.checks.worst_error(again, inputs, "library") <= 1.0


def test_least_bytes_and_operations(gpu):
    inputs = gpu.checks.draw("low_rank_mlp", 10, 20, 3, 2, "float32", "cpu")
    factors = 2 * (3 * 10 + 20 * 3) + (3 * 20 + 10 * 3)
    assert inputs.bytes == 4 * (2 * 10 + factors + 2 * 20 + 10 + 2 * 10)
    assert inputs.flops == 2 * 2 * factors
    group = gpu.shapes.Point("low_rank_linear_group", 8, (8, 4), 2, 1)
    assert group.break_even_rank == 8 * 12 // (8 + 8 + 8 + 4) and group.table_shape == (8, 12, 4)


def test_wrong_version_gets_no_speedup(gpu, monkeypatch):
    right = gpu.bench.call
    monkeypatch.setattr(gpu.bench, "call", lambda inputs: right(inputs) * 1.5)
    point = gpu.shapes.Point("low_rank_linear", 64, 64, 16, 2, "float32")
    result = gpu.bench.bench_point(point, "cpu", ["library"], {}, 1 << 20, few=True)
    assert "taco" in result["red"] and "taco" not in result["speedup"]
    assert result["us"]["taco"]["p50"] > 0


def test_summary_of_known_numbers(gpu):
    ours = ("taco library", "taco cuda", "taco cuda dependent", "taco triton")

    def point(rows, rank, against_pair, against_dense, red=()):
        up = {} if red else {name: {"two calls": against_pair, "dense": against_dense} for name in ours}
        return {
            "op": "low_rank_linear", "dtype": "bfloat16", "table_shape": (4096, 4096, rank),
            "in": 4096, "out": 4096, "rank": rank, "rows": rows, "break_even_rank": 2048,
            "speedup": up, "red": dict.fromkeys(red, "wrong"),
            "share": {} if red else {name: {"copy": 0.5} for name in ours},
            "us": {
                "taco library": {"p50": 10.0}, "taco cuda": {"p50": 8.0}, "taco cuda dependent": {"p50": 6.0},
                "taco triton": {"p50": 5.0 if rank == 2000 else 20.0}, "dense": {"p50": 12.0},
            },
        }  # fmt: skip

    points = {
        "a": point(1, 512, 2.0, 3.0),
        "b": point(16, 1024, 8.0, 0.5),
        "c": point(4, 256, 0.1, 0.1, red=ours),
        "d": point(4, 2000, 2.0, 0.25),
    }
    decode = gpu.bench.summary(points)["decode, r >= 256"]
    assert decode["points"] == 4 and decode["red"] == 1
    assert decode["vs two calls, geomean"] == pytest.approx((2 * 8 * 2) ** (1 / 3), abs=1e-3)
    assert decode["vs dense below 0.8 break-even, least"] == 0.5, "rank 2000 is beyond 0.8 x break-even"
    ranks = gpu.bench.fastest_rank(points)
    assert ranks["low_rank_linear/4096x4096/m1"]["faster_up_to"] == 512
    assert ranks["low_rank_linear/4096x4096/m16"]["faster_up_to"] == 0
    launches = gpu.bench.launches(points)
    assert launches["faster"] == "dependent" and launches["cooperative_over_dependent"] == pytest.approx(
        8 / 6, abs=1e-3
    )
    chosen = {(c["rank"], c["rows"]): c["backend"] for c in gpu.bench.choices(points)}
    assert chosen[512, 1] == "cuda" and chosen[2000, 4] == "triton" and (256, 4) not in chosen
    points["b"]["red"] = {"taco cuda dependent": "wrong"}
    chosen = {(c["rank"], c["rows"]): c["backend"] for c in gpu.bench.choices(points)}
    assert chosen[1024, 16] == "library", "a wrong version is not chosen, however fast"


def test_shapes_cover_what_is_promised(gpu):
    points = list(gpu.shapes.bench_points())
    assert set(gpu.shapes.quick_points()) < set(points)
    assert {p.op for p in gpu.shapes.quick_points()} == {p.op for p in points} == set(gpu.shapes.OPS)
    assert len({point.key for point in points}) == len(points)
    assert {point.rows for point in points} == {1, 2, 4, 8, 16, 64, 512, 2048, 8192}
    for name, layers in gpu.shapes.MODELS.items():
        assert set(layers) <= {(p.in_size, p.out_size) for p in points if p.op == "low_rank_linear"}, name
    assert all(p.in_size == p.out_size for p in points if p.op == "low_rank_bridge")
    assert torch.finfo(getattr(torch, points[0].dtype)).bits == 16


class FakeGraph:
    """Notes how many calls a capture held; a replay takes a microsecond of the fake clock for each."""

    capturing: "FakeGraph | None" = None
    clock = 0.0

    def __init__(self):
        self.calls = 0

    def replay(self):
        FakeGraph.clock += self.calls / 1000


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeGraph.clock

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def fake_cuda(monkeypatch):
    """As much of torch.cuda as timing needs, without a GPU: a graph's time is the number of calls that it holds."""

    @contextlib.contextmanager
    def graph(graph):
        FakeGraph.capturing = graph
        yield
        FakeGraph.capturing = None

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "CUDAGraph": FakeGraph, "graph": graph, "Event": FakeEvent, "Stream": lambda: stream,
        "stream": contextlib.nullcontext, "current_stream": lambda: stream, "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)


def call_of(microseconds):
    def version(inputs):
        if FakeGraph.capturing is not None:
            FakeGraph.capturing.calls += microseconds

    return version


def test_times_are_per_call_whatever_the_number_of_sets(gpu, fake_cuda):
    def broken(inputs):
        if FakeGraph.capturing is not None:
            raise RuntimeError("not permitted when stream is capturing")

    timing = importlib.import_module("gpu.timing")
    versions = {
        "one": (call_of(3), ["a", "b"]),
        "long": (call_of(5000), ["a", "b", "c"]),
        "broken": (broken, ["a", "b"]),
    }
    found = timing.time_on_gpu(versions, replays=5)
    assert found["one"] == {"p20": 3.0, "p50": 3.0, "p80": 3.0}
    assert found["long"]["p50"] == 5000.0
    assert "not permitted" in found["broken"]["error"] and "p50" not in found["broken"]


def test_host_time_of_eager_calls_is_measured_without_a_graph(gpu, fake_cuda):
    timing = importlib.import_module("gpu.timing")
    assert 0 < timing.eager_overhead(call_of(1), None, calls=3) < 1e5


def test_what_is_timed_later_is_compiled_ahead(gpu, monkeypatch):
    """Every process takes its share of the points, and what fails does not stop the rest."""
    parts = importlib.import_module("gpu.parts")
    seen = []

    def compiled(inputs):
        seen.append((inputs.op, inputs.x.shape[0]))
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu.bench, "compiled", compiled)
    points = [gpu.shapes.Point("low_rank_linear", 24, 40, 512, rows) for rows in (512, 1, 16, 3)]
    monkeypatch.setattr(gpu.shapes, "quick_points", lambda: points)
    for shard in ("0/2", "1/2"):
        number, of = map(int, shard.split("/"))
        suite = types.SimpleNamespace(
            dry=False, quick=True, device="cpu", processors=4, usable=lambda: ["library"],
            budget=types.SimpleNamespace(spent=False), mine=lambda at, number=number, of=of: at % of == number,
        )  # fmt: skip
        assert parts.warm(suite)
    assert sorted(seen) == [("low_rank_linear", 1), ("low_rank_linear", 16), ("low_rank_linear", 512)]


@pytest.mark.parametrize(
    ("tool", "verdict"),
    [
        ('echo "Device not supported"; exit 1', "does not work here"),
        ('echo "Invalid write" > "$log"; exit 9', "FOUND"),
        ('echo \'{"points": {"a": {}}}\' > $out/check-small.json', "nothing"),
        ("sleep 60", "not done after"),
    ],
)
def test_what_compute_sanitizer_says(gpu, tmp_path, tool, verdict):
    parts = importlib.import_module("gpu.parts")
    script = tmp_path / "compute-sanitizer"
    # --log-file LOG is the tool's, --out FOLDER the suite's
    arguments = 'while [ $# -gt 0 ]; do case "$1" in --log-file) log=$2;; --out) out=$2;; esac; shift; done\n'
    script.write_text(f"#!/bin/bash\n{arguments}{tool}\n")
    script.chmod(0o755)
    point = parts._sanitized(str(script), "memcheck", 5.0 if tool.startswith("sleep") else 60.0)
    assert point["ok"] == (verdict != "FOUND")
    if verdict == "FOUND":
        assert "Invalid write" in point["log"]
    elif verdict == "nothing":
        assert "skipped" not in point
    else:
        assert verdict in point["skipped"]
