"""One command for a bare GPU machine: build, check, sanitize, tune, benchmark; small JSON files under ``--out``.

    python benchmarks/gpu_suite.py --out DIR [--part build|check|sanitize|tune|bench|svd] [--budget-seconds N]
                                   [--resume] [--dry-run]

Without ``--part`` all parts run in that order. Parts stop between points when the budget is spent and say what is
left; ``--resume`` goes on from the files in DIR. ``--dry-run`` runs the same code on a CPU with tiny shapes.
Exit code 0: nothing found wrong; 1: something is; 2: this cannot run here (the last line says why).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402  (the search path comes first)
from gpu import bench, checks, shapes, svd, timing, tuning  # noqa: E402
from gpu.store import Budget, Store, write_json  # noqa: E402

PARTS = ("build", "check", "sanitize", "tune", "bench", "svd")


class Suite:
    """What every part needs to know."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.dry: bool = options.dry_run
        self.resume: bool = options.resume
        self.small: bool = options.small
        self.quick: bool = options.quick
        self.budget = Budget(options.budget_seconds)
        self.device = "cpu" if self.dry else "cuda"
        self.gpu = "none (dry run)"
        self.processors, self.cache = 4, 1 << 20
        if not self.dry:
            properties = torch.cuda.get_device_properties(0)
            self.gpu, self.processors, self.cache = (
                properties.name, properties.multi_processor_count, properties.L2_cache_size
            )  # fmt: skip

    def store(self, part: str) -> Store:
        try:
            import triton

            triton_version = triton.__version__
        except ModuleNotFoundError:
            triton_version = "none"
        same = {"gpu": self.gpu, "torch": torch.__version__, "triton": triton_version, "dry_run": self.dry}
        return Store(self.out, part, same, self.resume)

    def usable(self) -> list[str]:
        from taco_kernels import backends

        return [name for name, state in backends(self.device).items() if state == "usable" and name != "reference"]


def build(suite: Suite) -> bool:
    """Builds the extension in place and keeps the compiler's report and what the package says of itself."""
    store = suite.store("build")
    started = time.monotonic()
    if suite.dry:
        store.add("setup.py", {"ok": True, "skipped": "dry run: what is built here is used"})
    else:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        # This GPU's code alone: a third of the compiler's time.
        major, minor = torch.cuda.get_device_capability()
        arch = {(9, 0): "90a", (10, 0): "100a"}.get((major, minor), "80")
        settings = {**os.environ, "TACO_CUDA": "1", "TACO_CUDA_ARCHS": os.environ.get("TACO_CUDA_ARCHS", arch)}
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        seconds = round(time.monotonic() - started, 1)
        text = "".join(log.read_text() for log in ROOT.glob("build/**/build.log"))
        spills = [line.strip() for line in text.splitlines() if "spill" in line and " 0 bytes spill stores" not in line]
        registers = [int(word) for word in re.findall(r"Used (\d+) registers", text)]
        store.add(
            "setup.py",
            {
                "ok": done.returncode == 0, "seconds": seconds, "tail": (done.stdout + done.stderr)[-2000:],
                "kernels": len(registers), "most_registers": max(registers, default=None), "spills": spills[:5],
            },
        )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    report = subprocess.run(
        [sys.executable, "-m", "taco_kernels.env", "--json"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    ok = report.returncode == 0
    store.add("env", {"ok": ok, "report": json.loads(report.stdout) if ok else report.stderr[-2000:]})
    all_ok = all(point["ok"] for point in store.points.values())
    store.save(complete=True)
    print(f"build: {'ok' if all_ok else 'FAILED'} ({time.monotonic() - started:.0f} s)")
    return all_ok


def check(suite: Suite) -> bool:
    """Every op on every backend that is usable here, against float64."""
    store = suite.store("check-small" if suite.small else "check")
    left = 0
    order = ("cuda", "cuda dependent", "triton", "cpp", "library")
    names = [name for name in order if name.partition(" ")[0] in suite.usable()]
    full = suite.dry or suite.small
    if not full and "cuda" in names:
        for op in shapes.OPS:
            if op != "low_rank_mlp" and not store.done(f"direct/{op}"):
                store.add(f"direct/{op}", checks.check_direct(op))
    for backend in names:
        if not full and backend.partition(" ")[0] in ("cuda", "triton"):
            for op in shapes.OPS:
                if not store.done(f"{backend}/streams/{op}"):
                    store.add(f"{backend}/streams/{op}", checks.check_streams(backend, op))
        for case in checks.cases(suite.small, suite.dry):
            # Triton compiles for every dtype, path and alignment: a part of the grid reaches every kernel.
            if backend == "triton" and not full:
                odd = case.dtype == "bfloat16" or case.in_size == 264
                if case.rows not in (0, 1, 7, 16, 64, 2048) or case.rank > 1024 or not odd:
                    continue
            if suite.small and backend == "library":
                continue
            # Separate steps overflow float16 where the fused ones do not; that is not theirs to answer for.
            if backend == "library" and case.scale != 1.0:
                continue
            key = f"{backend}/{case.key}"
            if store.done(key):
                continue
            if suite.budget.spent:
                left += 1
                continue
            store.points[key] = checks.check(case, backend, suite.device)
        store.save()
    bad = {key: point for key, point in store.points.items() if not point["ok"]}
    store.save(complete=left == 0, left=left, red=len(bad), backends=sorted(suite.usable()))
    print(
        f"check: {len(store.points)} done, {len(bad)} wrong, {left} left; backends {', '.join(sorted(suite.usable()))}"
    )
    for key, point in list(bad.items())[:10]:
        print(f"  WRONG {key}: {point}")
    return not bad


def sanitize(suite: Suite) -> bool:
    """compute-sanitizer over small shapes: bad accesses, races in shared memory, barriers that are not reached."""
    store = suite.store("sanitize")
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if suite.dry or tool is None:
        reason = "dry run" if suite.dry else "compute-sanitizer was not found"
        store.save(complete=False, skipped=reason)
        print(f"sanitize: skipped ({reason})")
        return True
    for kind in ("memcheck", "racecheck", "synccheck"):
        if store.done(kind) or suite.budget.left < 20:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [
                tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "5", sys.executable, __file__,
                "--part", "check", "--small", "--out", folder, "--budget-seconds", str(int(suite.budget.left)),
            ]  # fmt: skip
            # Blocks of their own from cudaMalloc: an access beyond a tensor is then beyond an allocation.
            environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            try:
                done = subprocess.run(
                    command,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=max(20, suite.budget.left),
                )
            except subprocess.TimeoutExpired:
                continue
        store.add(
            kind, {"ok": done.returncode == 0, "code": done.returncode, "tail": (done.stdout + done.stderr)[-1500:]}
        )
    bad = [kind for kind, point in store.points.items() if not point["ok"]]
    store.save(complete=len(store.points) == 3)
    print(f"sanitize: {', '.join(store.points) or 'nothing'} done, {', '.join(bad) or 'none'} with findings")
    return not bad


def _install(suite: Suite, tuned: dict[str, Any], measured: dict[str, Any] | None = None) -> tuple[str, int]:
    """Writes the GPU's table under ``--out`` and into the package; what this process looked up before is forgotten."""
    from taco_kernels import _cuda, dispatch
    from taco_kernels.triton_kernels import config

    name = f"{config.gpu_slug(suite.gpu)}.json"
    target, installed = suite.out / name, config.TUNED_DIR / name
    if not suite.dry and installed.exists() and not target.exists():
        shutil.copyfile(installed, target)
    entries = tuning.write_table(target, suite.gpu, tuned, measured)
    if not suite.dry:
        shutil.copyfile(target, installed)
        config.forget_tables()
        dispatch.tuned_choice.cache_clear()
        _cuda.set_launch(None)
    return name, entries


def tune(suite: Suite) -> bool:
    """Triton configurations, into the repository's table and a copy under ``--out``."""
    if "triton" not in suite.usable():
        print("tune: skipped (the Triton backend is not usable here)")
        return True
    store = suite.store("tune")
    left = 0
    points = shapes.quick_tune_points if suite.quick else shapes.tune_points
    for point in shapes.tiny_points() if suite.dry else points():
        if point.op == "pivoted_low_rank_linear":
            continue  # takes the entries of a plain map of as many bytes
        if store.done(point.key):
            continue
        if suite.budget.spent:
            left += 1
            continue
        result = tuning.tune_point(point, suite.device, suite.processors, suite.cache, suite.dry)
        facts = {"op": point.op, "dtype": point.dtype, "table_shape": point.table_shape, "rows": point.rows}
        store.add(point.key, {**facts, **result})
    name, entries = _install(suite, store.points)
    lost = [key for key, point in store.points.items() if point["config"] is None]
    store.save(complete=left == 0, left=left)
    gains = [p["default_us"] / p["us"] for p in store.points.values() if p.get("default_us") and p.get("us")]
    print(
        f"tune: {len(store.points)} points, {left} left, {entries} entries in {name}; "
        f"x{bench.geomean(gains)} over the defaults (geomean); {len(lost)} without a working configuration"
    )
    return not lost and not any(point["wrong"] for point in store.points.values())


def run_bench(suite: Suite) -> bool:
    """Times and speed-ups; the ceilings are measured first, in the same process."""
    store = suite.store("bench")
    machine = {} if suite.dry else timing.ceilings()
    usable = suite.usable()
    left = 0
    points = shapes.quick_points if suite.quick else shapes.bench_points
    for point in shapes.tiny_points() if suite.dry else points():
        if store.done(point.key):
            continue
        if suite.budget.spent:
            left += 1
            continue
        compile_too = not suite.dry and (not suite.quick or point.rank == 512)
        result = bench.bench_point(point, suite.device, usable, machine, suite.cache, suite.dry, compile_too)
        store.add(point.key, {**result, "machine": machine})
    if not suite.dry and not suite.budget.spent:
        small = checks.draw("low_rank_linear", 1024, 1024, 64, 1, "bfloat16", "cuda")
        overhead = {name: timing.eager_overhead(functools.partial(bench.forced, name), small) for name in usable}
        overhead["auto"] = timing.eager_overhead(checks.call, small)
        store.save(eager_us=overhead)
    if suite.dry:
        print("bench: dry run, so these numbers mean nothing")
    launches = bench.launches(store.points)
    if store.points:
        _install(suite, {}, store.points)
    report = bench.summary(store.points)
    ranks = bench.fastest_rank(store.points)
    store.save(complete=left == 0, left=left, machine=machine, summary=report, launches=launches)
    store.save(faster_than_dense_up_to_rank=ranks)
    print(f"bench: {len(store.points)} points, {left} left; ceilings {machine or 'not measured (dry run)'}")
    print(f"  cooperative over dependent launch: {launches}")
    heads = ("points", "red", "x pair", "least", "x comp", "x dense", "copy")
    print(f"  {'':30} " + " ".join(f"{head:>7}" for head in heads))
    for name, row in report.items():
        shown = ["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row.values()]
        print(f"  {name:30} " + " ".join(f"{cell:>7}" for cell in shown))
    if not suite.dry and "eager_us" in store.content:
        print(f"  eager host time per call (us): {store.content['eager_us']}")
    return not any(point["red"] for point in store.points.values())


RUN: dict[str, Callable[[Suite], bool]] = {
    "build": build,
    "check": check,
    "sanitize": sanitize,
    "tune": tune,
    "bench": run_bench,
    "svd": svd.run,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files (made if missing)")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part (may be given several times)")
    parser.add_argument("--budget-seconds", type=float, default=540, help="stop between points after this long")
    parser.add_argument("--resume", action="store_true", help="keep the points that OUT has already")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes; the numbers mean nothing")
    parser.add_argument("--quick", action="store_true", help="tune and bench one hidden size, the telling points only")
    parser.add_argument("--small", action="store_true", help="check only small shapes (what sanitize runs)")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("No GPU is visible to torch: nothing was run (--dry-run tries the suite's code on the CPU).")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(options)
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    verdicts: dict[str, Any] = {}
    for part in options.part or PARTS:
        verdicts[part] = RUN[part](suite)
        if part == "build" and not verdicts[part]:
            break
    write_json(
        options.out / "suite.json",
        {"gpu": suite.gpu, "python": platform.python_version(), "torch": torch.__version__, "ok": verdicts},
    )
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
