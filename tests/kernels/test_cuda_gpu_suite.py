"""benchmarks/gpu_suite.py without a GPU: its whole path on tiny shapes, and that it can tell right from wrong."""

import importlib.util
import json
import os
import subprocess
import sys
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
    assert parts["check"]["complete"] and parts["check"]["red"] == 0 and len(parts["check"]["points"]) > 50
    assert parts["bench"]["complete"]
    for point in parts["bench"]["points"].values():
        assert point["us"]["dense"]["p20"] <= point["us"]["dense"]["p80"]
        assert "two calls" in point["speedup"]["taco"] and not point["red"]
    assert parts["svd"]["complete"] and parts["svd"]["red"] == 0 and len(parts["svd"]["points"]) > 8
    if interpret:
        assert "triton" in parts["check"]["backends"]
        assert "skipped" not in parts["svd"]["points"]["sketch"]
        assert parts["none-dry-run"]["entries"]
    # Nothing is measured twice, and nothing is lost when the budget is spent before anything new.
    before = (tmp_path / "bench.json").stat().st_mtime_ns, parts["bench"]["points"]
    done = _run(
        "--dry-run", "--out", tmp_path, "--resume", "--part", "bench", "--budget-seconds", 0, interpret=interpret
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads((tmp_path / "bench.json").read_text())
    assert again["points"] == before[1] and again["complete"]


def test_spent_budget_leaves_points_for_later(tmp_path):
    done = _run("--dry-run", "--out", tmp_path, "--part", "bench", "--budget-seconds", 0, interpret=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "bench.json").read_text())
    assert not content["complete"] and content["left"] > 0 and not content["points"]


@pytest.fixture
def gpu(monkeypatch):
    """The package ``gpu`` of the benchmarks folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu.bench
    import gpu.checks
    import gpu.shapes

    return gpu


@pytest.mark.parametrize("op", ["low_rank_linear", "low_rank_bridge"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bound_lets_right_results_through_and_wrong_ones_not(gpu, op, dtype):
    inputs = gpu.checks.draw(op, 96, 96, 24, 5, dtype, "cpu", residual=True)
    y = gpu.checks.forced_reference(inputs)
    for backend in ("cuda", "triton", "library"):
        assert gpu.checks.worst_error(y, inputs, backend) <= 1.0
        wrong = y.clone()
        wrong[3, 7] += 0.2 * y.float().abs().max().item()
        assert gpu.checks.worst_error(wrong, inputs, backend) > 1.0
        wrong[3, 7] = float("nan")
        assert gpu.checks.worst_error(wrong, inputs, backend) > 1.0


def test_wrong_version_gets_no_speedup(gpu, monkeypatch):
    right = gpu.bench.call
    monkeypatch.setattr(gpu.bench, "call", lambda inputs: right(inputs) * 1.5)
    point = gpu.shapes.Point("low_rank_linear", 64, 64, 16, 2, "float32")
    result = gpu.bench.bench_point(point, "cpu", ["library"], {}, 1 << 20, few=True)
    assert "taco" in result["red"] and "taco" not in result["speedup"]
    assert result["us"]["taco"]["p50"] > 0


def test_summary_of_known_numbers(gpu):
    def point(rows, rank, against_pair, against_dense, red=()):
        up = {} if red else {"taco": {"two calls": against_pair, "dense": against_dense}}
        return {
            "op": "low_rank_linear", "in": 4096, "out": 4096, "rank": rank, "rows": rows, "break_even_rank": 2048,
            "speedup": up, "red": dict.fromkeys(red, "wrong"), "share": {} if red else {"taco": {"copy": 0.5}},
        }  # fmt: skip

    points = {
        "a": point(1, 512, 2.0, 3.0),
        "b": point(16, 1024, 8.0, 0.5),
        "c": point(4, 256, 0.1, 0.1, red=["taco"]),
        "d": point(4, 2000, 2.0, 0.25),
    }
    decode = gpu.bench.summary(points)["decode, r >= 256"]
    assert decode["points"] == 4 and decode["red"] == 1
    assert decode["vs two calls, geomean"] == pytest.approx((2 * 8 * 2) ** (1 / 3), abs=1e-3)
    assert decode["vs dense below 0.8 break-even, least"] == 0.5, "rank 2000 is beyond 0.8 x break-even"
    ranks = gpu.bench.fastest_rank(points)
    assert ranks["4096x4096/m1"]["faster_up_to"] == 512 and ranks["4096x4096/m16"]["faster_up_to"] == 0


def test_shapes_cover_what_is_promised(gpu):
    points = list(gpu.shapes.bench_points())
    assert len({point.key for point in points}) == len(points)
    assert {point.rows for point in points} == {1, 2, 4, 8, 16, 64, 512, 2048, 8192}
    for name, layers in gpu.shapes.MODELS.items():
        assert set(layers) <= {(p.in_size, p.out_size) for p in points if p.op == "low_rank_linear"}, name
    assert all(p.in_size == p.out_size for p in points if p.op == "low_rank_bridge")
    assert torch.finfo(getattr(torch, points[0].dtype)).bits == 16
