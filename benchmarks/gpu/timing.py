"""Timing of many versions of one computation: cold weights, CUDA graphs, versions interleaved.

Each version's calls are captured into a graph over input sets that together exceed three times the L2 cache, so every
call finds its weights in device memory, as the layers of a model do. The versions' graphs are replayed in turn; a
slow moment of the machine then falls on all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .capture import captured
from .checks import Inputs

Call = Callable[[Any], Any]
# What is called, and the input sets that it is called on in turn.
Version = tuple[Call, Sequence[Any]]

# A graph's start takes some ten microseconds; replays last long enough that it does not show.
LEAST_REPLAY_US = 500.0
# Clocks rise for tens of milliseconds when a GPU begins to work.
WARM_MS = 30.0
MOST_SETS = 800


def sets_needed(bytes_per_set: int, cache_bytes: int, memory_bytes: int) -> int:
    """Input sets so that rotating through them leaves nothing of one in the cache until its turn comes again."""
    return max(2, min(-(-3 * cache_bytes // bytes_per_set) + 1, memory_bytes // bytes_per_set, MOST_SETS))


def percentiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of samples in microseconds."""
    ordered = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return {"p20": round(ordered[1], 3), "p50": round(ordered[4], 3), "p80": round(ordered[7], 3)}


def milliseconds(work: Callable[[], object]) -> float:
    """Device time of `work`, whose launches are all in the queue before the first one begins."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(500_000)  # cycles, a quarter of a millisecond: a graph's start falls into it
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _captured(version: Call, sets: Sequence[Any], rounds: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph, replayed once, and what its last call gives, which every replay writes anew."""
    last = None
    with captured() as graph:
        for _ in range(rounds):
            for inputs in sets:
                last = version(inputs)
    graph.replay()
    torch.cuda.synchronize()
    return graph, last


def nothing(name: str) -> None:
    """For callers that need not know which version comes next."""


def never() -> bool:
    """For callers that time every version."""
    return False


def time_on_gpu(
    versions: dict[str, Version],
    replays: int = 25,
    at: Callable[[str], None] = nothing,
    enough: Callable[[], bool] = never,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Microseconds per call of each version, and what the last call of each has given in the last timed replay, for the
    last of its input sets: calls that follow each other without a pause can go wrong where a single one does not.

    A version that fails to run or to be captured has only ``error``. ``at`` is told which version comes next, and ""
    when all take turns. Versions behind the first whose turn comes when ``enough`` is true are not run.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    calls: dict[str, int] = {}
    results: dict[str, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    for name, (version, sets) in versions.items():
        if (graphs or results) and enough():
            break
        at(name)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles, creates handles, before the capture
                for inputs in sets[:2]:
                    version(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph, last[name] = _captured(version, sets, 1)
            once = 1000 * min(milliseconds(graph.replay) for _ in range(3))
            rounds = max(1, min(20, math.ceil(LEAST_REPLAY_US / max(once, 1.0))))
            if rounds > 1:
                graph, last[name] = _captured(version, sets, rounds)
            graphs[name], calls[name] = graph, rounds * len(sets)
        except Exception as error:
            last.pop(name, None)
            results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    at("")
    spent = 0.0
    while graphs and spent < WARM_MS:
        spent += sum(milliseconds(graph.replay) for graph in graphs.values())
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(replays):
        for name, graph in graphs.items():
            samples[name].append(milliseconds(graph.replay) * 1000 / calls[name])
    results.update({name: percentiles(values) for name, values in samples.items()})
    return results, last


def time_on_cpu(
    versions: dict[str, Version],
    replays: int = 3,
    at: Callable[[str], None] = nothing,
    enough: Callable[[], bool] = never,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The dry run's stand-in for :func:`time_on_gpu`; its numbers mean nothing."""
    results: dict[str, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    for name, (version, sets) in versions.items():
        if results and enough():
            break
        at(name)
        samples = []
        try:
            for _ in range(replays):
                start = time.perf_counter()
                for inputs in sets:
                    last[name] = version(inputs)
                samples.append((time.perf_counter() - start) * 1e6 / len(sets))
            results[name] = percentiles(samples)
        except Exception as error:
            last.pop(name, None)
            results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    at("")
    return results, last


def ceilings() -> dict[str, float]:
    """What this GPU reaches here and now: a 1 GiB copy (read plus write), a sum over 1 GiB, which only reads, and a
    bf16 matrix product on random data."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def median(work: Callable[[], object], repeats: int = 15) -> float:
        return statistics.median(milliseconds(work) for _ in range(repeats)) / 1000

    for _ in range(100):  # an idle GPU's clock is a fifth of what it rises to
        torch.mm(a, b)
    numbers = source.view(torch.float32)
    copy, read = median(lambda: target.copy_(source)), median(lambda: numbers.sum())
    product = median(lambda: torch.mm(a, b))
    return {
        "copy_gb_s": round(2 * source.numel() / copy / 1e9, 1),
        "read_gb_s": round(source.numel() / read / 1e9, 1),
        "matmul_tflop_s": round(2 * 8192**3 / product / 1e12, 1),
    }


@torch.inference_mode()
def eager_overhead(version: Call, inputs: Inputs, calls: int = 300) -> float:
    """Microseconds of host time per eager call: what Python, dispatch and launching cost, the GPU not waited for."""
    for _ in range(20):
        version(inputs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        version(inputs)
    spent = (time.perf_counter() - start) * 1e6 / calls
    torch.cuda.synchronize()
    return round(spent, 2)
