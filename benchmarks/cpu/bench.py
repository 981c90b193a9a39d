"""Measures one point: correctness first, then interleaved pairs of ours with every other version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpu.points import Point
from cpu.timing import Arena, pairs_of, ratio_spread, read_cold, spread
from taco_kernels import low_rank_bridge, low_rank_linear, low_rank_linear_group, low_rank_mlp

Call = Callable[..., Any]


def two_calls(x: Tensor, v: Tensor, u: Tensor) -> Tensor:
    return F.linear(F.linear(x, v), u)


def bridge_calls(x: Tensor, v: Tensor, u: Tensor) -> Tensor:
    return F.linear(F.linear(F.rms_norm(x, (x.shape[-1],), eps=1e-6), v), u).add_(x)


def group_calls(x: Tensor, *factors: Tensor) -> list[Tensor]:
    return [two_calls(x, v, u) for v, u in zip(factors[::2], factors[1::2], strict=True)]


def mlp_calls(x: Tensor, *factors: Tensor) -> Tensor:
    gate_v, gate_u, up_v, up_u, down_v, down_u = factors
    return two_calls(F.silu(two_calls(x, gate_v, gate_u)).mul_(two_calls(x, up_v, up_u)), down_v, down_u)


def our_group(x: Tensor, *factors: Tensor) -> list[Tensor]:
    return low_rank_linear_group(x, list(factors[::2]), list(factors[1::2]))


def our_mlp(x: Tensor, *factors: Tensor) -> Tensor:
    gate_v, gate_u, up_v, up_u, down_v, down_u = factors
    return low_rank_mlp(x, (gate_v, gate_u, None), (up_v, up_u, None), (down_v, down_u, None))


def dense_calls(op: str) -> Call:
    if op == "mlp":
        return lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)).mul_(F.linear(x, up)), down)
    return lambda x, *weights: [F.linear(x, w) for w in weights]


OURS: dict[str, Call] = {
    "linear": low_rank_linear,
    "bridge": low_rank_bridge,
    "group": our_group,
    "mlp": our_mlp,
}
LIBRARY: dict[str, Call] = {"linear": two_calls, "bridge": bridge_calls, "group": group_calls, "mlp": mlp_calls}


def worst_error(op: str, ours: Any, library: Any, x: Tensor, factors: tuple[Tensor, ...]) -> dict[str, float]:
    """Largest error of both against float64 (of at most 16 rows), in units of the dtype's roundoff at the largest
    result. Rounding explains a few of them; a wrong kernel is off by hundreds."""
    picked = torch.linspace(0, len(x) - 1, min(16, len(x))).long().unique()
    exact = LIBRARY[op](x[picked].double(), *(t.double() for t in factors))
    found = {}
    for name, result in (("ours", ours), ("library", library)):
        pairs = zip(result, exact, strict=True) if isinstance(exact, list) else ((result, exact),)
        found[name] = max(
            ((y[picked].double() - e).abs().max() / (e.abs().max() * torch.finfo(x.dtype).eps)).item() for y, e in pairs
        )
    return found


def bound(point: Point) -> float:
    """What rounding explains, in worst_error's units: 32-bit sums of thousands of terms, and in the other versions,
    which also serve as ours for many rows, up to four roundings of intermediates on the way."""
    terms = sum(point.in_size + point.rank for _ in point.members)
    return 8.0 + (terms * 2.0**-7 if point.dtype == "float32" else 0.0)


def measure(point: Point, arena: Arena, compiled: Callable[[str], Call], seconds: float) -> dict[str, Any]:
    """All figures of one point; without any speed, and with ``red``, where a result is wrong."""
    dtype = getattr(torch, point.dtype)
    factors = arena.matrices(*(shape for i, o in point.members for shape in ((point.rank, i), (o, point.rank))))
    x = torch.randn(point.rows, point.in_size).to(dtype)
    ours, library = OURS[point.op], LIBRARY[point.op]

    def on_factors(call: Call) -> Callable[[int], object]:
        return lambda k: call(x, *factors[k % len(factors)])

    errors = worst_error(point.op, ours(x, *factors[0]), library(x, *factors[0]), x, factors[0])
    result: dict[str, Any] = {**point._asdict(), "errors": errors, "bound": bound(point)}
    if not errors["ours"] <= result["bound"]:
        return {**result, "red": True}

    size = point.weights * dtype.itemsize
    rounds = 40
    others: dict[str, Callable[[int], object]] = {"library": on_factors(library)}
    if "dense" in point.against:
        weights = arena.matrices(*((o, i) for i, o in point.members))
        dense = dense_calls(point.op)
        others["dense"] = lambda k: dense(x, *weights[k % len(weights)])
    if "compiled" in point.against:
        others["compiled"] = on_factors(compiled(point.op))
        others["compiled"](0)  # compiles
    others["read"] = read_cold(arena, size)
    call = on_factors(ours)
    for name, other in others.items():
        times = pairs_of(call, other, rounds, seconds / len(others))
        if name == "library":
            result["ours_us"] = spread(times[0])
        result[f"{name}_us"] = spread(times[1])
        result[f"x_{name}"] = ratio_spread(times)
    result["gbps"] = size / result["ours_us"]["p50"] / 1e3
    result["gflops"] = point.operations / result["ours_us"]["p50"] / 1e3
    result["of_read"] = result["x_read"]["p50"]
    return result
