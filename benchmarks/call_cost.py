"""What one eager call costs besides its arithmetic: matrices so small that they take no time, warm and cold.

Warm is a loop of nothing else. Cold is how a model runs: between two calls a layer's weights pass through the caches
and push the interpreter, torch's dispatcher and the op's own code out of them; here 96 MB are read before each call.
Compared with torch's own calls for the same work, with `nn.Linear`, and with our op by the ordinary way (through the
dispatcher, as under a profiler or with gradients).

Usage: python benchmarks/call_cost.py [--out benchmarks/results/cpu/call-cost.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cpu.bench import LIBRARY, OURS
from cpu.timing import Arena, read_cold, spread
from origin import origin
from torch import Tensor

from taco_kernels import direct, native, pivoted_low_rank_linear
from taco_svd.replacement import LowRankLinear

SIZE, RANK = 64, 16
EVICTED = 96 * 2**20

Call = Callable[[], object]


def calls(dtype: torch.dtype) -> dict[str, Call]:
    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns).to(dtype)

    x, weight = matrix(1, SIZE), matrix(SIZE, SIZE)
    pairs = [(matrix(RANK, SIZE), matrix(SIZE, RANK)) for _ in range(3)]
    factors = {op: [t for pair in pairs[:count] for t in pair] for op, count in MEMBERS.items()}
    pivot, narrow = torch.randperm(SIZE).int(), matrix(RANK, SIZE - RANK)
    low_rank = LowRankLinear(SIZE, SIZE, RANK, False, dtype=dtype)
    linear = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
    two = torch.nn.Sequential(
        torch.nn.Linear(SIZE, RANK, bias=False, dtype=dtype), torch.nn.Linear(RANK, SIZE, bias=False, dtype=dtype)
    )
    found: dict[str, Call] = {"F.linear": lambda: torch.nn.functional.linear(x, weight)}
    for op in MEMBERS:
        found[f"{op}: ours"] = lambda op=op: OURS[op](x, *factors[op])  # type: ignore[misc]
        found[f"{op}: library"] = lambda op=op: LIBRARY[op](x, *factors[op])  # type: ignore[misc]
    found["pivoted: ours"] = lambda: pivoted_low_rank_linear(x, narrow, pairs[0][1], pivot)
    found["module: LowRankLinear"] = lambda: low_rank(x)
    found["module: nn.Linear"] = lambda: linear(x)
    found["module: two nn.Linear"] = lambda: two(x)
    return found


MEMBERS = {"linear": 1, "bridge": 1, "group": 3, "mlp": 3}


def warm_times(call: Call, repeats: int) -> list[float]:
    for _ in range(50):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(200):
            call()
        times.append((time.perf_counter() - start) / 200 * 1e6)
    return times


def cold_times(found: Sequence[Call], evict: Callable[[int], object], rounds: int) -> list[list[float]]:
    """By turns, so that drift hits all alike."""
    times: list[list[float]] = [[] for _ in found]
    for number in range(rounds):
        for place, call in enumerate(found):
            evict(number)
            start = time.perf_counter()
            call()
            times[place].append((time.perf_counter() - start) * 1e6)
    return times


def measure(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    found = calls(dtype)
    evict = read_cold(Arena(dtype, 4 * EVICTED), EVICTED)
    warm = {name: spread(warm_times(call, rounds // 2)) for name, call in found.items()}
    cold = cold_times([lambda: None, *found.values()], evict, rounds)
    clock = spread(cold[0])["p50"]  # the clock itself is cold too
    return {
        name: {"warm_us": warm[name], "cold_us": {cut: value - clock for cut, value in spread(times).items()}}
        for name, times in zip(found, cold[1:], strict=True)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if native.module is None:
        print(f"there is nothing to measure: {native.reason}", file=sys.stderr)
        return 2
    made_with = origin()
    ways = {}
    with torch.no_grad():
        for way in ("direct", "ordinary") if direct.usable else ("ordinary",):
            native.module.direct_enable(way == "direct")
            ways[way] = measure(getattr(torch, arguments.dtype), arguments.rounds)
    native.module.direct_enable(True)
    for way, rows in ways.items():
        print(f"{way} calls, {arguments.dtype}, {torch.get_num_threads()} threads: us warm, us cold (20th, 80th)")
        for name, row in rows.items():
            cold = row["cold_us"]
            print(f"  {name:24}{row['warm_us']['p50']:7.2f}{cold['p50']:8.1f} ({cold['p20']:.1f}, {cold['p80']:.1f})")
    if arguments.out:
        result = {
            "what": "microseconds of one eager call on matrices that cost nothing",
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            **made_with,
            "ways": ways,
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
