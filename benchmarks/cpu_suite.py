"""CPU benchmarks of the kernels over the layers of real models: one command, resumable, results as JSON and plots.

    python benchmarks/cpu_suite.py                        # goes on where it stopped; --full for every model, row, rank
    python benchmarks/cpu_suite.py --report               # tables and plots from the JSON, measures nothing

Every point is checked against float64 first and gets no speed when it is wrong. Weights are cold: they are cut from a
block of at least four times the last cache. Times are those of interleaved pairs; ratios are medians of the pairs'
ratios with their 20th and 80th percentiles. ``dense`` is one ``F.linear`` with the full matrix, ``library`` torch's
calls with the same factors (with norm and addition for the bridge), ``compiled`` the same through ``torch.compile``,
``read`` plain loads of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cpu.bench import LIBRARY, Call, measure
from cpu.points import Point, full, quick, tiny
from cpu.report import break_even_table, plot, target_table
from cpu.timing import Arena, last_level_cache, product_rate, read_rate, spread
from gpu.store import Budget, Store, sources

from taco_kernels import low_rank_linear, native

RESULTS = Path(__file__).resolve().parent / "results" / "cpu"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> dict[str, Any]:
    """What must agree for old results to count."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "isa": native.module.cpu_isa() if native.module else None,
        "torch": torch.__version__,
        "sources": sources("csrc/cpu", "csrc/direct", "taco_kernels"),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",  # torch asks for them, 15% more bandwidth
    }


def call_overhead() -> dict[str, float]:
    """Microseconds of one eager call on sizes that cost nothing: Python, dispatcher and pybind11."""
    x, v, u = torch.randn(1, 8), torch.randn(4, 8), torch.randn(8, 4)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(200):
            low_rank_linear(x, v, u)
        times.append((time.perf_counter() - start) / 200 * 1e6)
    return spread(times)


class Compiled:
    """torch.compile of the library calls, once per point: static shapes give it its best code."""

    def __call__(self, op: str) -> Call:
        torch._dynamo.reset()
        return torch.compile(LIBRARY[op], dynamic=False)


def run(points: list[Point], store: Store, budget: Budget, seconds: float, tiny_run: bool) -> int:
    """Yardsticks of this run, then what is missing until the budget is spent; returns how many points are left."""
    todo = [point for point in points if not store.done(point.key)]
    arena: Arena | None = None
    dtype = ""
    while todo and budget.left > 0:
        point = todo.pop(0)
        needed = 2 * getattr(torch, point.dtype).itemsize * sum(i * o for i, o in point.members)
        if point.dtype != dtype or arena is None or arena.bytes < needed:
            # one arena of one dtype at a time: they are large. So points of this dtype go first.
            first = arena is None
            dtype, arena = point.dtype, None
            arena = Arena(getattr(torch, dtype), max(2**20 if tiny_run else 256 * 2**20, needed), cold=not tiny_run)
            if first:
                size = 128 if tiny_run else 2048
                store.save(
                    yardsticks={
                        "read_gbps": read_rate(arena),
                        "product_gflops": {
                            name: product_rate(getattr(torch, name), size) for name in ("bfloat16", "float32")
                        },
                    },
                    call_overhead_us=call_overhead(),
                )
            todo.sort(key=lambda p: p.dtype != dtype)
        result = measure(point, arena, Compiled(), seconds)
        store.add(point.key, result)
        if "red" in result:
            print(f"{point.key}: WRONG RESULT {result['errors']} (bound {result['bound']:.0f}), not timed")
            continue
        ratios = "  ".join(f"{name[2:]} x{result[name]['p50']:.2f}" for name in result if name.startswith("x_"))
        print(f"{point.key}: {result['ours_us']['p50']:.0f} us, {result['gbps']:.1f} GB/s  {ratios}", flush=True)
    return len(todo)


def report(content: dict[str, Any], out: Path) -> int:
    """Tables and plots of what was measured; the exit code, 1 where a result was wrong."""
    print(target_table(content), "\n", break_even_table(content), sep="\n")
    for path in plot(content, out):
        print(f"wrote {path}")
    return 1 if any("red" in point for point in content["points"].values()) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="every model, rows up to 8192")
    parser.add_argument("--budget-seconds", type=float, default=1e9, help="stop between points when these are over")
    parser.add_argument("--point-seconds", type=float, default=0.8, help="timing of one point at most, about")
    parser.add_argument("--restart", action="store_true", help="forget earlier results")
    parser.add_argument("--report", action="store_true", help="tables and plots of what is there")
    parser.add_argument("--only", default="", help="only points whose key contains this")
    parser.add_argument("--dry-run", action="store_true", help="tiny points: tests the suite itself")
    args = parser.parse_args()
    if native.module is None:
        print(f"there is nothing to measure: {native.reason}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    part = "kernels-dry-run" if args.dry_run else "kernels"
    if args.report:  # of whatever machine
        path = args.out / f"{part}.json"
        if not path.exists():
            print(f"there is nothing to report: {path} is not there", file=sys.stderr)
            return 2
        return report(json.loads(path.read_text()), args.out)
    store = Store(args.out, part, {"machine": machine()}, not args.restart)
    # The yardsticks of an earlier run hold until this one measures its own.
    if store.points:
        old = json.loads(store.path.read_text())
        store.content.update({key: old[key] for key in ("yardsticks", "call_overhead_us", "complete")})
    points = list(tiny() if args.dry_run else full() if args.full else quick())
    unique: dict[str, Point] = {}
    for point in points:
        unique.setdefault(point.key, point)  # the first of a kind: it has its place, and more to compare with
    points = [point for point in unique.values() if args.only in point.key]
    with torch.inference_mode():
        left = run(points, store, Budget(args.budget_seconds), args.point_seconds, args.dry_run)
    store.save(complete=left == 0)
    print(f"{left} points left")
    return 0 if left else report(store.content, args.out)


if __name__ == "__main__":
    sys.exit(main())
