"""benchmarks/gpu_suite.py without a GPU: its whole path on tiny shapes, and that it can tell right from wrong."""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
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
    # a budget that no share of is spent on a busy machine
    done = _run("--dry-run", "--out", tmp_path, "--budget-seconds", 3000, interpret=interpret)
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
    # Pictures come from the JSON alone, and leave out what has no numbers.
    broken = {**parts["bench"]["points"], "low_rank_linear/broken": {"ok": False, "error": "killed"}}
    (tmp_path / "broken.json").write_text(json.dumps({**parts["bench"], "points": broken}))
    drawn = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_plots.py"), str(tmp_path / "broken.json")],
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


def conducted(conductor, out, parts, seconds=100.0, workers=1):
    return conductor.Conductor(out, parts, [], seconds, {"gpu": "none"}, workers, time.monotonic())


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
    assert not conducted(conductor, out, ["check"], workers=workers).run() or "raise" in event
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
    assert conducted(conductor, out, ["check"], workers=workers).run()
    content = json.loads((out / "check.json").read_text())
    assert content["points"]["b"]["ok"] and content["points"]["a"]["process"] == before


# A part whose versions, or backends, are run one after the other; one of them hangs, kills the process or breaks it.
FAKE_VERSIONS = """
import argparse, os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from gpu.store import Store, say_running
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--part")
parser.add_argument("--without", action="append", default=[])
options, _ = parser.parse_known_args()
store = Store(options.out, options.part, {{"gpu": "none"}})

def run(name):
    if name == "taco cuda" or name.startswith("cuda/"):
        {event}

def point(key):
    ran = []
    for name in ("taco cuda", "taco cuda dependent", "dense"):
        if name.removeprefix("taco ") not in options.without:
            say_running("bench", key, name)
            run(name)
            ran.append(name)
    return {{"ran": ran, "launch": os.environ.get("TACO_CUDA_LAUNCH")}}

keys = [f"{{b}}/{{n}}" for b in ("cuda", "cuda dependent") for n in range(3)] if options.part == "check" else ["a", "b"]
for key in keys:
    if store.done(key) or key.partition("/")[0] in options.without:
        continue
    store.run(key, (lambda: point(key)) if options.part == "bench" else (lambda: run(key) or {{"ok": True}}))
    say_running(options.part, "")
    store.save()
{end}
store.save(complete=True)
"""


def _with_versions(conductor, tmp_path, monkeypatch, part, event, end="pass", seconds=100.0, stall=3.0):
    script = tmp_path / "suite.py"
    script.write_text(FAKE_VERSIONS.format(benchmarks=str(ROOT / "benchmarks"), event=event, end=end))
    monkeypatch.setattr(conductor, "SUITE", script)
    monkeypatch.delenv("TACO_CUDA_LAUNCH", raising=False)
    steps = [conductor.Step(part, 1.0, stall=stall), conductor.Step("bench", 1.0, stall=stall)]
    monkeypatch.setattr(conductor, "plan", lambda workers: steps[: 1 if part == "bench" else 2])
    monkeypatch.setattr(conductor, "WARM", conductor.WARM._replace(share=0.0))
    out = tmp_path / "out"
    conductor.prepare(out, ["check", "bench"], resume=False)
    run = conducted(conductor, out, ["check", "bench"], seconds)
    assert not run.run()
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.parametrize("event", ["time.sleep(60)", "os._exit(3)"])
def test_a_version_that_hangs_or_crashes_is_left_out_and_the_others_are_measured(
    conductor, tmp_path, monkeypatch, event
):
    """A barrier that never opens must not take the time, and the numbers, of all other versions of every point."""
    found = _with_versions(conductor, tmp_path, monkeypatch, "bench", event)
    for key in "ab":
        assert found["bench"]["points"][key] == {"ran": ["taco cuda dependent", "dense"], "launch": "dependent"}
    assert list(found["suite"]["left_out"]["bench"]) == ["cuda"] and len(found["suite"]["steps"][0]["deaths"]) == 1


def test_a_version_that_the_end_of_the_time_meets_is_not_left_out(conductor, tmp_path, monkeypatch):
    monkeypatch.setattr(conductor, "Step", functools.partial(conductor.Step, grace=0.0))
    monkeypatch.setattr(conductor, "STALL_SECONDS", 90.0)
    found = _with_versions(conductor, tmp_path, monkeypatch, "bench", "time.sleep(60)", seconds=4.0, stall=90.0)
    assert not found["suite"]["left_out"]["bench"] and "beyond its time" in found["suite"]["steps"][0]["deaths"][0]


@pytest.mark.parametrize(("event", "deaths"), [("time.sleep(60)", 1), ("os._exit(3)", 2)])
def test_a_launch_that_hangs_in_its_checks_is_left_out_of_the_others_and_still_timed(
    conductor, tmp_path, monkeypatch, event, deaths
):
    """Its hang may be one of odd sizes; where it hangs in the benchmark as well, that finds out by itself."""
    event = f"if options.part == 'check':\n            {event}"
    found = _with_versions(conductor, tmp_path, monkeypatch, "check", event)
    points = found["check"]["points"]
    assert [key for key, point in points.items() if not point["ok"]] == [f"cuda/{n}" for n in range(deaths)]
    assert sum(key.startswith("cuda dependent/") for key in points) == 3
    assert all("taco cuda" in point["ran"] for point in found["bench"]["points"].values())
    assert found["suite"]["ok"] == {"check": False, "bench": True}


def test_what_is_left_out_of_what(conductor):
    blame = conductor.Blame()
    assert blame.of("check", "direct/low_rank_mlp", "", True, "hangs") == "cuda"
    assert blame.of("check", "triton/low_rank_mlp", "", True, "hangs") is None
    assert blame.of("tune", "low_rank_mlp", "3", True, "hangs") is None
    assert blame.arguments("check") == blame.arguments("sanitize") == ["--without", "cuda"]
    assert not blame.arguments("bench") and not blame.environment("bench")
    assert blame.of("bench", "low_rank_mlp", "taco cuda dependent", False, "crashed") == "cuda dependent"
    assert blame.arguments("bench") == ["--without", "cuda dependent"] and not blame.environment("check")
    assert blame.environment("bench") == {"TACO_CUDA_LAUNCH": "cooperative"}
    blame.of("bench", "low_rank_mlp", "taco cuda", True, "hangs")
    assert not blame.environment("bench")


def test_an_end_that_breaks_costs_no_point(conductor, tmp_path, monkeypatch):
    """What a part does behind its points is not the last point's fault, and is not tried again and again."""
    found = _with_versions(conductor, tmp_path, monkeypatch, "bench", "pass", end="os._exit(4)")
    assert all("error" not in point for point in found["bench"]["points"].values())
    assert found["suite"]["steps"][0]["deaths"] == ["between points: died with exit code 4"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_part_that_cannot_even_begin_does_not_stop_the_rest(conductor, tmp_path, monkeypatch, workers):
    script = tmp_path / "suite.py"
    script.write_text("import sys\nif 'check' in sys.argv:\n    sys.exit(1)\n")
    monkeypatch.setattr(conductor, "SUITE", script)
    steps = [conductor.Step("check", 1.0, workers=workers), conductor.Step("svd", 1.0)]
    monkeypatch.setattr(conductor, "plan", lambda workers: steps)
    assert not conducted(conductor, tmp_path, ["check", "svd"], workers=workers).run()
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert suite["ok"] == {"check": False, "svd": True}


def test_an_error_in_the_conductor_itself_costs_one_step(conductor, tmp_path, monkeypatch):
    script = tmp_path / "suite.py"
    script.write_text("")
    monkeypatch.setattr(conductor, "SUITE", script)
    steps = [conductor.Step("check", 1.0, workers=2), conductor.Step("svd", 1.0)]
    monkeypatch.setattr(conductor, "plan", lambda workers: steps)
    monkeypatch.setattr(conductor, "merged", lambda *_: 1 / 0)
    assert not conducted(conductor, tmp_path, ["check", "svd"]).run()
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert suite["ok"] == {"check": False, "svd": True} and "ZeroDivisionError" in suite["steps"][0]["deaths"][0]


def test_the_children_of_a_killed_process_end_with_it(conductor, tmp_path, monkeypatch):
    """A compiler that runs on would be in the times of the steps behind it."""
    script = tmp_path / "suite.py"
    script.write_text(
        "import subprocess, sys, time\nfrom pathlib import Path\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        f"Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(conductor, "SUITE", script)
    monkeypatch.setattr(conductor, "plan", lambda workers: [conductor.Step("build", 0.02, grace=0.0)])
    assert not conducted(conductor, tmp_path, ["build"]).run()
    state = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_process_that_does_not_die_is_not_waited_for(conductor, tmp_path, monkeypatch):
    """SIGKILL waits for the driver, and the driver perhaps for a kernel that never ends."""
    script = tmp_path / "suite.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(conductor, "SUITE", script)
    monkeypatch.setattr(conductor, "BURIAL_SECONDS", 0.2)
    monkeypatch.setattr(conductor, "plan", lambda workers: [conductor.Step("build", 0.02, grace=0.0)])
    killed = []
    monkeypatch.setattr(conductor.os, "killpg", lambda group, number: killed.append(group))
    began = time.monotonic()
    try:
        assert not conducted(conductor, tmp_path, ["build"]).run()
        assert time.monotonic() - began < 60 and killed  # the script's own time
    finally:
        for group in killed:
            os.kill(group, 9)


def test_points_of_other_sources_are_not_merged(conductor, tmp_path):
    def write(path, sources, key):
        path.write_text(json.dumps({"sources": sources, "points": {key: {"ok": True}}, "left_of": {"library": 0}}))
        return path

    old, new = write(tmp_path / "check.json", "old", "a"), write(tmp_path / "part.json", "new", "b")
    conductor.merged(old, [new])
    content = json.loads(old.read_text())
    assert set(content["points"]) == {"b"} and content["sources"] == "new"


def test_what_is_not_timed_runs_side_by_side(conductor, tmp_path, monkeypatch):
    script = tmp_path / "suite.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\npart = sys.argv[sys.argv.index('--part') + 1]\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "(folder / f'{part}.began').write_text(str(time.time()))\ntime.sleep(1.5)\n"
        "(folder / f'{part}.ended').write_text(str(time.time()))\n"
    )
    monkeypatch.setattr(conductor, "SUITE", script)

    def overlap(parts):
        steps = [conductor.Step("sanitize", 1.0, beside_next=True), *(conductor.Step(part, 1.0) for part in parts)]
        monkeypatch.setattr(conductor, "plan", lambda workers: steps)
        monkeypatch.setattr(conductor, "WARM", conductor.WARM._replace(share=0.0))
        assert conducted(conductor, tmp_path / "out", ["sanitize", *parts]).run()
        began = float((tmp_path / f"{parts[0]}.began").read_text())
        return began < float((tmp_path / "sanitize.ended").read_text())

    (tmp_path / "out").mkdir()
    assert overlap(["check", "tune"])
    assert not overlap(["tune"]), "a step that is timed has the GPU to itself"


def test_the_plan_covers_every_part_in_the_order_of_what_it_tells(conductor):
    steps = conductor.plan(10)
    assert [step.part for step in steps[:3]] == ["build", "check", "bench"]
    assert {step.part for step in steps} == {"build", "check", "sanitize", "tune", "bench", "svd"}
    assert next(step for step in steps if "cuda" in step.options).stall < conductor.STALL_SECONDS


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
    run = conducted(conductor, tmp_path, ["check", "bench"], 120.0 if in_time else 16.0)
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
        "low_rank_linear_concat": (40, 8),
    }.items():
        inputs = gpu.checks.draw(op, 48, outs, 16, 3, "float32", "cpu", residual=True)
        assert gpu.checks.worst_error(gpu.bench.separate(inputs), inputs, "library") <= 1.0
        assert gpu.checks.worst_error(gpu.checks.call(inputs), inputs, "library") <= 1.0
        flat = [t for member in inputs.members for t in member]
        if inputs.residual is None:
            again = gpu.bench._flat(inputs.x, flat, op, inputs.eps)
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


@pytest.mark.parametrize("event", ["wrong", "raises"])
def test_what_goes_wrong_only_when_it_is_timed_gets_no_speedup(gpu, monkeypatch, event):
    """Calls that follow each other without a pause can share work space that a single call has for itself."""
    calls = 0

    def later(inputs):
        nonlocal calls
        calls += 1
        if calls > 1 and event == "raises":
            raise RuntimeError("not permitted when stream is capturing")
        return right(inputs) * (1.5 if calls > 1 else 1.0)

    right = gpu.bench.call
    monkeypatch.setattr(gpu.bench, "call", later)
    point = gpu.shapes.Point("low_rank_linear", 64, 64, 16, 2, "float32")
    result = gpu.bench.bench_point(point, "cpu", [], {}, 1 << 20, few=True, without=["library"])
    assert ("not permitted" if event == "raises" else "in the timed graph") in result["red"]["taco"]
    assert "taco" not in result["speedup"] and "taco library" not in result["us"]


def test_left_out_versions_take_the_dispatchers_choice_with_them(gpu):
    point = gpu.shapes.Point("low_rank_linear", 64, 64, 16, 2, "bfloat16")

    def names(*without):
        return set(gpu.bench.versions_for(point, "cuda", ["cuda", "triton", "library"], False, list(without)))

    everything = {"two calls", "taco", "taco library", "taco cuda", "taco cuda dependent", "taco triton"}
    assert names() == everything
    assert names("cuda") == everything - {"taco cuda"}
    in_order = list(gpu.bench.versions_for(point, "cuda", ["cuda", "triton", "library"], False, []))
    assert in_order[-1] == "taco", "or the dispatcher's choice is blamed for what a launch does"
    assert names("cuda", "cuda dependent") == {"two calls", "taco library", "taco triton"}


def test_of_two_launches_the_one_that_works_is_chosen(gpu):
    def point(red):
        us = {"taco cuda": {"p50": 8.0}, "taco cuda dependent": {"p50": 9.0}, "taco library": {"p50": 20.0}}
        shape = {"op": "low_rank_linear", "dtype": "bfloat16", "table_shape": (64, 64, 16), "rows": 1}
        return {**shape, "us": us, "red": {red: "wrong"} if red else {}}

    assert gpu.bench.launches({"a": point(None)})["faster"] == "cooperative"
    bad = {"a": point("taco cuda")}
    assert gpu.bench.launches(bad)["faster"] == "dependent" and gpu.bench.choices(bad)[0]["backend"] == "cuda"


def test_a_part_that_raises_is_told_from_one_that_found_something(tmp_path):
    (tmp_path / "bench.json").write_text("no JSON")
    done = _run("--inside", "--dry-run", "--out", tmp_path, "--part", "bench", interpret=False)
    assert done.returncode == 4 and "JSONDecodeError" in done.stderr


def test_what_torch_loads_at_first_is_no_points_fault(gpu, tmp_path, monkeypatch):
    """A check that shows no new point for half a minute counts as hanging; reading cuBLAS may take as long."""
    parts, store = importlib.import_module("gpu.parts"), importlib.import_module("gpu.store")
    mark = tmp_path / "mark"
    mark.write_text("")
    monkeypatch.setenv(store.RUNNING, str(mark))
    load, found = parts._load_libraries, []
    monkeypatch.setattr(parts, "_load_libraries", lambda device: (load(device), found.append(store.what_ran(mark))))
    monkeypatch.setattr(parts, "_check_work", lambda suite, backend: [("library/a", lambda: {"ok": True})])
    monkeypatch.setattr(parts, "_with_cuda", lambda suite: {"ok": True})
    suite = types.SimpleNamespace(
        dry=False, small=False, device="cpu", shard=0, shards=1, only=[], without=[], usable=lambda: ["library"],
        store=lambda part: store.Store(tmp_path, part, {}), mine=lambda number: True,
        budget=types.SimpleNamespace(spent=False), run=lambda kept, key, work: kept.run(key, work),
    )  # fmt: skip
    assert parts.check(suite)
    assert found == [("", "", "")] and store.what_ran(mark)[1] == "library/a"


@pytest.mark.parametrize("rows, columns", [(40, 70), (70, 40)])
def test_singular_values_that_svd_is_judged_by(gpu, rows, columns):
    svd = importlib.import_module("gpu.svd")
    for spectrum in svd.SPECTRA.values():
        a = svd.matrix(rows, columns, spectrum(40), "cpu").bfloat16()
        exact = torch.linalg.svdvals(a.double())
        assert (svd.singular_values(a) - exact).abs().max() <= 3e-8 * exact[0]
        assert svd.singular_values(a)[12:].norm() == pytest.approx(float(exact[12:].norm()), rel=1e-10, abs=3e-7)


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


def test_inputs_on_a_gpu_come_from_a_generator_of_their_own(gpu, monkeypatch):
    """A capture that fails ends torch's own for the rest of the process."""
    made, seen, randn = object(), [], torch.randn
    monkeypatch.setattr(gpu.checks, "generator", lambda device: made)

    def own(*sizes, generator=None, **options):
        seen.append(generator)
        return randn(*sizes, **options)

    monkeypatch.setattr(torch, "randn", own)
    gpu.checks.draw("low_rank_linear", 24, 40, 8, 3, "bfloat16", "cpu")
    assert seen and all(one is made for one in seen)
    monkeypatch.undo()
    assert gpu.checks.generator("cpu") is None


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
    told = []
    found, last = timing.time_on_gpu(versions, replays=5, at=told.append)
    assert told == ["one", "long", "broken", ""] and set(last) == {"one", "long"}
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
            dry=False, quick=True, device="cpu", processors=4, usable=lambda: ["library"], without=[],
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
    point = parts._sanitized(str(script), "memcheck", 5.0 if tool.startswith("sleep") else 60.0, ["cuda"])
    assert point["ok"] == (verdict != "FOUND")
    if verdict == "FOUND":
        assert "Invalid write" in point["log"]
    elif verdict == "nothing":
        assert "skipped" not in point
    else:
        assert verdict in point["skipped"]


def test_all_tools_of_compute_sanitizer_run_at_once_on_our_kernels(gpu, tmp_path, monkeypatch):
    """One after the other, the last of them would get the seconds that the first leaves.

    Each of them is done only when all have begun; one that waits in vain says nothing, and is then no check.
    """
    parts, suite = importlib.import_module("gpu.parts"), importlib.import_module("gpu.suite")
    script = tmp_path / "compute-sanitizer"
    script.write_text(
        f'#!/bin/bash\necho "$@" > {tmp_path}/$2.args\n'
        'while [ $# -gt 0 ]; do case "$1" in --out) out=$2;; esac; shift; done\n'
        f"all() {{ [ $(ls {tmp_path}/*.args | wc -l) = {len(parts.SANITIZERS)} ]; }}\n"
        "for i in {1..300}; do all && break; sleep 0.1; done\n"
        'all && echo \'{"points": {"a": {}}}\' > $out/check-small.json\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(parts.shutil, "which", lambda name: str(script))
    monkeypatch.setattr(suite.Suite, "lost", lambda self: None)
    monkeypatch.setattr(parts, "Suite", suite.Suite)
    options = types.SimpleNamespace(
        out=tmp_path, dry_run=True, small=False, quick=True, only=None, without=["cuda"], rows=None, shard=None,
        budget_seconds=60.0,
    )  # fmt: skip
    run = suite.Suite(options)
    run.dry = False
    assert parts.sanitize(run)
    content = json.loads((tmp_path / "sanitize.json").read_text())
    assert content["complete"] and set(content["points"]) == set(parts.SANITIZERS)
    assert not any("skipped" in point for point in content["points"].values())
    for kind in parts.SANITIZERS:
        said = (tmp_path / f"{kind}.args").read_text()
        assert "--kernel-name kns=taco" in said and "--without cuda" in said
        assert ("--report-api-errors no" in said) == (kind == "memcheck")


@pytest.fixture
def cpu_for_gpu(gpu, fake_cuda, monkeypatch):
    """The checks that need a GPU, on the CPU: their tensors lie there, and a graph's replay changes nothing."""
    checks = gpu.checks
    draw = checks.draw
    monkeypatch.setattr(checks, "draw", lambda *arguments, **more: draw(*arguments[:-1], "cpu", **more))
    monkeypatch.setattr(checks, "using", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return checks


@pytest.mark.parametrize("op", ["low_rank_linear", "low_rank_mlp", "low_rank_linear_group"])
def test_checks_of_streams_run_and_see_a_graph_that_does_not_follow_its_inputs(cpu_for_gpu, monkeypatch, op):
    assert cpu_for_gpu.check_streams("cuda", op) == {"ok": False}
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, generator: self)
    assert cpu_for_gpu.check_streams("cuda", op) == {"ok": True}


@pytest.mark.parametrize("op", ["low_rank_linear", "low_rank_linear_concat"])
def test_checks_of_streams_at_the_same_time_run_and_see_a_call_that_another_disturbs(cpu_for_gpu, monkeypatch, op):
    assert cpu_for_gpu.check_together("cuda", op) == {"ok": True}
    joined, calls = cpu_for_gpu.joined, []
    monkeypatch.setattr(cpu_for_gpu, "joined", lambda inputs: joined(inputs) + (calls.append(0) or len(calls) == 90))
    assert cpu_for_gpu.check_together("cuda", op) == {"ok": False}


@pytest.mark.parametrize(
    "op", ["low_rank_linear", "low_rank_bridge", "low_rank_linear_group", "pivoted_low_rank_linear"]
)
def test_checks_of_direct_calls_run_and_see_a_wrong_result(cpu_for_gpu, monkeypatch, op):
    from taco_kernels import direct

    if not direct.usable:
        pytest.skip(f"direct calls: {direct.reason}")
    monkeypatch.setattr(direct, "served", lambda *_: None)
    assert cpu_for_gpu.check_direct(op) == {"ok": True}
    joined = cpu_for_gpu.joined
    monkeypatch.setattr(cpu_for_gpu, "joined", lambda inputs: joined(inputs) + 1)
    assert cpu_for_gpu.check_direct(op) == {"ok": False}


def test_checks_of_statistics_let_right_sums_through_and_wrong_ones_not(gpu, monkeypatch):
    import taco_kernels

    checks = gpu.checks
    monkeypatch.setattr(checks, "using", lambda name: contextlib.nullcontext())

    def verdicts():
        yield checks.check_moment(70, 131, "bfloat16", "cpu")["ok"]
        for sizes in ((3, 65, 131, 71, 19), (40, 1, 30, 20, 8)):
            yield checks.check_attribution(*sizes, "float32", "cpu")["ok"]

    assert all(verdicts())
    for name in ("second_moment_dense", "singular_attribution"):
        right = getattr(taco_kernels, name)
        monkeypatch.setattr(taco_kernels, name, lambda *given, right=right: wrong(right(*given)))

    def wrong(found):
        return found * 1.1 if torch.is_tensor(found) else [t * 1.1 for t in found]

    assert not any(verdicts())


def test_ceilings_are_rates_per_second(gpu, fake_cuda, monkeypatch):
    timing = importlib.import_module("gpu.timing")
    empty, randn = torch.empty, torch.randn
    monkeypatch.setattr(torch, "empty", lambda *_, **__: empty(8, dtype=torch.uint8))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: randn(4, 4))
    monkeypatch.setattr(timing, "milliseconds", lambda work: work() is None or 2.0)
    assert timing.ceilings() == {"copy_gb_s": 0.0, "matmul_tflop_s": round(2 * 8192**3 / 2e-3 / 1e12, 1)}


def test_host_times_of_backends_that_fail_cost_themselves_only(gpu, monkeypatch):
    parts, timing = importlib.import_module("gpu.parts"), importlib.import_module("gpu.timing")
    draw = gpu.checks.draw
    monkeypatch.setattr(gpu.checks, "draw", lambda *arguments: draw(*arguments[:-1], "cpu"))
    monkeypatch.setattr(timing, "eager_overhead", lambda call, inputs: call(inputs) is not None and 5.0)
    found = parts._eager_overheads(["library", "cuda", "triton"], ["triton"])
    assert found["auto"] == found["library"] == 5.0 and "RuntimeError" in found["cuda"] and "triton" not in found
    assert "auto" not in parts._eager_overheads(["library"], ["cuda", "cuda dependent"])


def test_a_version_that_loses_the_gpu_is_known_by_its_name(gpu, tmp_path, monkeypatch):
    """An illegal access shows at the next call: the process ends before another version could be blamed for it, and
    the point is not kept, so that it is measured again without that version."""
    suite, store = importlib.import_module("gpu.suite"), importlib.import_module("gpu.store")
    monkeypatch.setenv(store.RUNNING, str(tmp_path / "mark"))
    options = types.SimpleNamespace(
        out=tmp_path, dry_run=True, small=False, quick=True, only=None, without=None, rows=None, shard=None,
        budget_seconds=60.0,
    )  # fmt: skip
    run = suite.Suite(options)
    results = run.store("bench")

    def point():
        run.within(results, "a", "taco cuda")
        monkeypatch.setattr(suite.Suite, "lost", lambda self: RuntimeError("an illegal memory access"))
        run.within(results, "a", "taco triton")

    with pytest.raises(SystemExit) as ended:
        run.run(results, "a", point)
    assert ended.value.code == suite.LOST
    assert store.what_ran(tmp_path / "mark") == ("bench", "a", "taco cuda")
    assert not json.loads((tmp_path / "bench.json").read_text())["points"]


def test_a_gpus_table_goes_into_the_package_and_comes_from_a_former_run(gpu, tmp_path, monkeypatch):
    """What one machine found must count on the next, which starts with the repository and the files of --out alone."""
    from taco_kernels.triton_kernels import config

    parts = importlib.import_module("gpu.parts")
    package, out = tmp_path / "tuned", tmp_path / "out"
    package.mkdir()
    out.mkdir()
    monkeypatch.setattr(config, "TUNED_DIR", package)
    suite = types.SimpleNamespace(gpu="Some GPU", out=out, dry=False)
    point = {
        "op": "low_rank_linear", "dtype": "bfloat16", "table_shape": (4096, 4096, 64), "rows": 16, "red": {},
        "us": {"taco library": {"p50": 5.0}, "taco cuda": {"p50": 3.0}, "taco cuda dependent": {"p50": 2.0}},
    }  # fmt: skip
    try:
        assert parts._install(suite, {}, {"a": point}) == ("some-gpu.json", 0)
        assert config.content("Some GPU")["cuda_launch"] == "dependent"
        assert (package / "some-gpu.json").read_text() == (out / "some-gpu.json").read_text()
        (package / "some-gpu.json").unlink()
        parts._adopt_table(suite)
        assert (package / "some-gpu.json").read_text() == (out / "some-gpu.json").read_text()
    finally:
        config.forget_tables()
