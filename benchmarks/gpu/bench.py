"""Our ops against dense, against separate library calls, and against those compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import shapes
from .checks import Inputs, call, draw, worst_error
from .timing import sets_needed, time_on_cpu, time_on_gpu

# Compiling takes seconds per shape; these rows stand for decode, a batch and prefill.
COMPILED_ROWS = (1, 16, 512)


def separate(inputs: Inputs) -> Tensor:
    """What one writes without us: norm, two linears, an add."""
    x, v, u, bias, residual, eps = inputs
    if eps is not None:
        return F.linear(F.linear(F.rms_norm(x, x.shape[-1:], eps=eps), v), u, bias) + x
    y = F.linear(F.linear(x, v), u, bias)
    return y if residual is None else y + residual


def _flat(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, eps: float | None) -> Tensor:
    return separate(Inputs(x, v, u, bias, None, eps))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flat, dynamic=False)


def compiled(inputs: Inputs) -> Tensor:
    return _compiled()(inputs.x, inputs.v, inputs.u, inputs.bias, inputs.eps)


def forced(backend: str, inputs: Inputs) -> Tensor:
    from taco_kernels import use_backend

    with use_backend(backend):
        return call(inputs)


def versions_for(point: shapes.Point, device: str, usable: list[str], few: bool) -> dict[str, Callable[[Inputs], Any]]:
    """Everything that is compared at this point; ``taco`` is what a user gets, the dispatcher's choice."""
    found: dict[str, Callable[[Inputs], Any]] = {"two calls": separate}
    if not few and point.rows in COMPILED_ROWS:
        found["compiled"] = compiled
    found["taco"] = call
    if "cuda" in usable and point.rows <= 16:
        found["taco cuda"] = functools.partial(forced, "cuda")
    if "triton" in usable:
        found["taco triton"] = functools.partial(forced, "triton")
    return found


def bench_point(
    point: shapes.Point, device: str, usable: list[str], machine: dict[str, Any], cache: int, few: bool
) -> dict[str, Any]:
    """Microseconds of each version, shares of the ceilings, and speed-ups; no speed-up of a version that is wrong."""
    if not few:
        torch.compiler.reset()  # or the number of shapes seen so far decides what is compiled
        _compiled.cache_clear()
    first = draw(point.op, point.in_size, point.out_size, point.rank, point.rows, point.dtype, device)
    # Large calls need no 200 repetitions, nor memory for them.
    count = 2 if few else min(200, sets_needed(first.bytes, cache, 12 << 30))
    sets = [first] + [
        draw(point.op, point.in_size, point.out_size, point.rank, point.rows, point.dtype, device)
        for _ in range(count - 1)
    ]
    versions = versions_for(point, device, usable, few)
    backend_of = {"two calls": "library", "compiled": "library", "taco": "library", "taco cuda": "cuda"}
    red: dict[str, Any] = {}
    for name, version in versions.items():
        try:
            worst = worst_error(version(first), first, backend_of.get(name, "triton"))
        except Exception as error:
            red[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        if not worst <= 1.0:
            red[name] = f"error {worst:.2f} times the bound"
    times = (time_on_gpu if device == "cuda" else time_on_cpu)(versions, sets)
    times.update(_dense(point, device, cache, few))

    result: dict[str, Any] = {
        "op": point.op, "in": point.in_size, "out": point.out_size, "rank": point.rank, "rows": point.rows,
        "dtype": point.dtype, "models": shapes.models_of(point.in_size, point.out_size), "sets": count,
        "break_even_rank": point.in_size * point.out_size // (point.in_size + point.out_size),
        "us": times, "red": red, "speedup": {}, "share": {},
    }  # fmt: skip
    for name in versions:
        if name in red or "p50" not in times[name]:
            continue
        microseconds = times[name]["p50"]
        if name.startswith("taco"):
            result["speedup"][name] = {
                against: round(times[against]["p50"] / microseconds, 3)
                for against in ("dense", "two calls", "compiled")
                if against in times and "p50" in times[against] and against not in red
            }
        if machine:
            result["share"][name] = {
                "copy": round(first.bytes / microseconds / 1e3 / machine["copy_gb_s"], 3),
                "matmul": round(first.flops / microseconds / 1e6 / machine["matmul_tflop_s"], 3),
            }
    return result


def _dense(point: shapes.Point, device: str, cache: int, few: bool) -> dict[str, Any]:
    """The full linear that the factors replace (no norm, no residual: in a model they are there either way)."""
    kind = getattr(torch, point.dtype)

    def one() -> Inputs:
        x = torch.randn(point.rows, point.in_size, device=device, dtype=kind)
        weight = torch.randn(point.out_size, point.in_size, device=device, dtype=kind) * point.in_size**-0.5
        bias = torch.randn(point.out_size, device=device, dtype=kind)
        return Inputs(x, weight, weight, bias, None, None)

    size = point.in_size * point.out_size * kind.itemsize
    sets = [one() for _ in range(2 if few else min(200, sets_needed(size, cache, 12 << 30)))]
    version = {"dense": lambda inputs: F.linear(inputs.x, inputs.v, inputs.bias)}
    return (time_on_gpu if device == "cuda" else time_on_cpu)(version, sets)


def geomean(values: list[float]) -> float | None:
    return round(float(torch.tensor(values, dtype=torch.float64).log().mean().exp()), 3) if values else None


def summary(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that the targets of this project are stated in."""
    kinds = {
        "decode, r >= 256": lambda p: p["rows"] <= 16 and p["rank"] >= 256,
        "decode, all ranks": lambda p: p["rows"] <= 16,
        "64 rows": lambda p: p["rows"] == 64,
        "512 rows and more": lambda p: p["rows"] >= 512,
        "512 rows and more, r <= 128": lambda p: p["rows"] >= 512 and p["rank"] <= 128,
    }
    report: dict[str, Any] = {}
    for name, belongs in kinds.items():
        chosen = [p for p in points.values() if belongs(p)]
        ups = [p["speedup"]["taco"] for p in chosen if "taco" in p["speedup"]]
        pair = [up["two calls"] for up in ups if "two calls" in up]
        dense = [
            p["speedup"]["taco"]["dense"]
            for p in chosen
            if p["rank"] < 0.8 * p["break_even_rank"] and "dense" in p["speedup"].get("taco", {})
        ]
        shares = [p["share"]["taco"]["copy"] for p in chosen if "taco" in p["share"]]
        report[name] = {
            "points": len(chosen),
            "red": sum("taco" in p["red"] for p in chosen),
            "vs two calls, geomean": geomean(pair),
            "vs two calls, least": min(pair, default=None),
            "vs dense below 0.8 break-even, least": min(dense, default=None),
            "share of copy bandwidth, median": sorted(shares)[len(shares) // 2] if shares else None,
        }
    return report


def fastest_rank(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per shape and rows: the largest measured rank at which we beat dense, next to the break-even rank by bytes."""
    found: dict[str, dict[str, Any]] = {}
    for p in points.values():
        if p["op"] != "low_rank_linear" or "dense" not in p["speedup"].get("taco", {}):
            continue
        key = f"{p['in']}x{p['out']}/m{p['rows']}"
        entry = found.setdefault(key, {"faster_up_to": 0, "measured": [], "break_even_rank": p["break_even_rank"]})
        entry["measured"] = sorted({*entry["measured"], p["rank"]})
        if p["speedup"]["taco"]["dense"] > 1.0:
            entry["faster_up_to"] = max(entry["faster_up_to"], p["rank"])
    return found
