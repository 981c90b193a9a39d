"""benchmarks/cpu_suite.py on tiny shapes: its whole path, resuming, and that a wrong result gets no speed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taco_kernels import native

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(native.module is None, reason=f"cpp backend: {native.reason}")


@pytest.fixture
def parts(monkeypatch):
    """The modules of benchmarks/cpu by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return {name: importlib.import_module(f"cpu.{name}") for name in ("bench", "points", "report", "timing")}


def run(*arguments):
    command = [sys.executable, str(BENCHMARKS / "cpu_suite.py"), "--dry-run", "--point-seconds", "0.02", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_dry_run_resumes_and_reports(tmp_path):
    done = run("--out", str(tmp_path), "--budget-seconds", "0")
    assert done.returncode == 0 and "8 points left" in done.stdout, done.stdout + done.stderr
    done = run("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "kernels-dry-run.json").read_text())
    assert content["complete"] and len(content["points"]) == 8
    assert content["call_overhead_us"]["p50"] > 0 and content["yardsticks"]["read_gbps"]["p50"] > 0
    for point in content["points"].values():
        assert "red" not in point
        assert point["ours_us"]["p20"] <= point["ours_us"]["p50"] <= point["ours_us"]["p80"]
        assert {"x_library", "x_dense", "x_read"} <= point.keys()
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "roofline.png").stat().st_size > 0 and (tmp_path / "speedup.png").stat().st_size > 0
    # what is known is not measured again
    done = run("--out", str(tmp_path), "--report")
    assert done.returncode == 0 and "| one eager call" in done.stdout
    assert json.loads((tmp_path / "kernels-dry-run.json").read_text())["points"] == content["points"]
    # another machine's are reported too, as they are
    content["machine"]["cpu"] = "another"
    (tmp_path / "kernels-dry-run.json").write_text(json.dumps(content))
    done = run("--out", str(tmp_path), "--report")
    assert done.returncode == 0 and "| one eager call" in done.stdout, done.stderr
    assert json.loads((tmp_path / "kernels-dry-run.json").read_text()) == content
    assert run("--out", str(tmp_path / "nothing"), "--report").returncode == 2


@pytest.mark.parametrize("op", ["linear", "bridge", "group", "mlp"])
def test_a_wrong_result_gets_no_speed(parts, monkeypatch, op):
    bench = parts["bench"]
    point = parts["points"].Point(op, 48, 48, 16, 3, "float32", ("library", "dense"))
    arena = parts["timing"].Arena(torch.float32, 2**20, cold=False)
    good = bench.measure(point, arena, lambda name: bench.LIBRARY[name], 0.01)
    assert "red" not in good and good["x_library"]["p50"] > 0

    def off_by_little(*arguments, right=bench.OURS[op]):
        result = right(*arguments)
        first = result[0] if isinstance(result, list) else result
        first[-1, -1] += first.abs().max() * 1e-4
        return result

    monkeypatch.setitem(bench.OURS, op, off_by_little)
    bad = bench.measure(point, arena, lambda name: bench.LIBRARY[name], 0.01)
    assert bad["red"] and not any(key.startswith("x_") or key.endswith("_us") for key in bad)


def test_the_crossing_is_interpolated(parts):
    def at(share, speed_up):
        rank = share * parts["points"].break_even(4096, 4096)
        return {"rank": rank, "in_size": 4096, "out_size": 4096, "x_dense": {"p50": speed_up}}

    crossing = parts["report"].crossing
    assert crossing([at(0.5, 2.0), at(1.0, 0.8), at(0.8, 1.2)]) == pytest.approx(0.9)
    assert crossing([at(0.5, 2.0), at(0.8, 1.2)]) is None


def test_points_are_those_of_the_targets(parts):
    points = parts["points"]
    found = {(p.dtype, (p.in_size, p.out_size), p.rank, p.rows) for p in points.quick() if "compiled" in p.against}
    for rows in points.TARGET_ROWS:
        for dtype in points.DTYPES:
            for shape in points.TARGET_SHAPES:
                assert {(dtype, shape, rank, rows) for rank in points.TARGET_RANKS} <= found
    for model, layers in points.MODELS.items():
        full = {(p.in_size, p.out_size) for p in points.full()}
        assert set(layers) <= full, model
