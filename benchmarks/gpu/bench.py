"""Our ops against dense, against separate library calls, and against those compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import shapes
from .checks import Factors, Inputs, call, draw, generator, using, worst_error
from .timing import Version, nothing, sets_needed, time_on_cpu, time_on_gpu

# Compiling takes seconds per shape; these rows stand for decode, a batch and prefill.
COMPILED_ROWS = (1, 16, 512)


def _together(members: tuple[Factors, ...]) -> Tensor:
    """The members' first factors as the one matrix they are slices of (see ``draw``)."""
    first = members[0].v
    return first.as_strided((sum(member.v.shape[0] for member in members), first.shape[1]), first.stride())


def _shared_input(x: Tensor, members: tuple[Factors, ...]) -> list[Tensor]:
    middles = F.linear(x, _together(members)).split([member.v.shape[0] for member in members], dim=1)
    return [F.linear(middle, member.u, member.bias) for middle, member in zip(middles, members, strict=True)]


def _behind_pivot(x: Tensor, member: Factors) -> Tensor:
    assert member.pivot is not None
    gathered, rank = x.index_select(1, member.pivot), member.v.shape[0]
    return F.linear(torch.addmm(gathered[:, :rank], gathered[:, rank:], member.v.T), member.u, member.bias)


def separate(inputs: Inputs) -> Tensor | list[Tensor]:
    """What one writes without us, as well as one can: norm, two linears, an add; first factors of one x in one call."""
    x, members, residual = inputs.x, inputs.members, inputs.residual
    if inputs.op == "low_rank_linear_group":
        return _shared_input(x, members)
    if inputs.op == "low_rank_mlp":
        gate, up = _shared_input(x, members[:2])
        v, u, bias, _ = members[2]
        return F.linear(F.linear(F.silu(gate) * up, v), u, bias)
    if inputs.op == "low_rank_linear_concat":
        return torch.cat([_behind_pivot(x, member) for member in members], dim=-1)
    if inputs.behind_pivot:
        y = _behind_pivot(x, members[0])
        return y if residual is None else y + residual
    v, u, bias, _ = members[0]
    if inputs.eps is not None:
        return F.linear(F.linear(F.rms_norm(x, x.shape[-1:], eps=inputs.eps), v), u, bias) + x
    y = F.linear(F.linear(x, v), u, bias)
    return y if residual is None else y + residual


def _flat(x: Tensor, tensors: list[Tensor | None], op: str, eps: float | None) -> Tensor | list[Tensor]:
    members = tuple(Factors(*tensors[i : i + 4]) for i in range(0, len(tensors), 4))  # type: ignore[arg-type]
    return separate(Inputs(op, x, members, None, eps))


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_flat, dynamic=False)


def compiled(inputs: Inputs) -> Tensor | list[Tensor]:
    return _compiled()(inputs.x, [t for member in inputs.members for t in member], inputs.op, inputs.eps)


def forced(name: str, inputs: Inputs) -> Tensor | list[Tensor]:
    """The public op on one backend, "cuda dependent" being the CUDA kernels' other launch."""
    with using(name):
        return call(inputs)


def fresh_compiler() -> None:
    """Forgets what was compiled, or the number of shapes seen so far decides what is compiled at all."""
    torch.compiler.reset()
    _compiled.cache_clear()


def versions_for(
    point: shapes.Point, device: str, usable: list[str], compile_too: bool, without: list[str]
) -> dict[str, Callable[[Inputs], Any]]:
    """Everything that is compared at this point; ``taco`` is what a user gets, the dispatcher's choice.

    ``without`` are backends and versions whose calls have hung or crashed; the dispatcher's choice may be the CUDA
    kernels, and goes with them when neither launch works.
    """
    found: dict[str, Callable[[Inputs], Any]] = {"two calls": separate}
    if compile_too and point.rows in COMPILED_ROWS:
        found["compiled"] = compiled
    found["taco library"] = functools.partial(forced, "library")
    # Triton's kernels for these serve few rows
    pivoted = point.op in shapes.BEHIND_PIVOT
    if "cuda" in usable and point.rows <= 16:
        found["taco cuda"] = functools.partial(forced, "cuda")
        found["taco cuda dependent"] = functools.partial(forced, "cuda dependent")
    if "triton" in usable and (point.rows <= 16 or not pivoted):
        found["taco triton"] = functools.partial(forced, "triton")
    found["taco"] = call  # last: what hangs is then known by its own name
    bad = {*without, *(["taco"] if {"cuda", "cuda dependent"} <= set(without) else [])}
    return {name: version for name, version in found.items() if name.removeprefix("taco ") not in bad}


def bench_point(
    point: shapes.Point, device: str, usable: list[str], machine: dict[str, Any], cache: int, few: bool,
    compile_too: bool = False, without: list[str] | None = None, at: Callable[[str], None] = nothing,
) -> dict[str, Any]:  # fmt: skip
    """Microseconds of each version, shares of the ceilings, and speed-ups, but none of a version that is wrong, alone
    or in the timed graph. ``at`` is told which version comes next."""
    if compile_too:
        fresh_compiler()
    first = draw(point.op, point.in_size, point.out_size, point.rank, point.rows, point.dtype, device)
    count = 2 if few else sets_needed(first.bytes, cache, 12 << 30)
    sets = [first] + [
        draw(point.op, point.in_size, point.out_size, point.rank, point.rows, point.dtype, device)
        for _ in range(count - 1)
    ]
    versions = versions_for(point, device, usable, compile_too, without or [])
    # "taco" may be any of them, the library included.
    backend_of = dict.fromkeys(("two calls", "compiled", "taco", "taco library"), "library") | {"taco triton": "triton"}
    red: dict[str, Any] = {}
    for name, version in versions.items():
        at(name)
        try:
            worst = worst_error(version(first), first, backend_of.get(name, "cuda"))
        except Exception as error:
            red[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        if not worst <= 1.0:
            red[name] = f"error {worst:.2f} times the bound"
    at("")
    timed: dict[str, Version] = {name: (version, sets) for name, version in versions.items()}
    if "dense" not in (without or []):
        timed["dense"] = _dense(point, device, cache, few)
    times, last = (time_on_gpu if device == "cuda" else time_on_cpu)(timed, at=at)
    for name in versions:
        if name in red:
            continue
        if name not in last:
            red[name] = f"not timed: {times[name].get('error')}"
        elif not (worst := worst_error(last[name], sets[-1], backend_of.get(name, "cuda"))) <= 1.0:
            red[name] = f"error {worst:.2f} times the bound in the timed graph"

    result: dict[str, Any] = {
        "op": point.op, "in": point.in_size, "out": point.out_size, "rank": point.rank, "rows": point.rows,
        "dtype": point.dtype, "models": shapes.models_of(point), "sets": count, "bytes": first.bytes,
        "flops": first.flops, "table_shape": point.table_shape, "break_even_rank": point.break_even_rank,
        "us": times, "red": red, "speedup": {}, "share": {}, "without": without or [],
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
                "read": round(first.bytes / microseconds / 1e3 / machine["read_gb_s"], 3),
                "matmul": round(first.flops / microseconds / 1e6 / machine["matmul_tflop_s"], 3),
            }
    return result


class _Dense(NamedTuple):
    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def _dense_call(op: str, inputs: _Dense) -> Tensor:
    x = F.linear(inputs.x, inputs.weights[0], inputs.biases[0])
    if op != "low_rank_mlp":
        return x
    gate, up = x.chunk(2, dim=1)
    return F.linear(F.silu(gate) * up, inputs.weights[1], inputs.biases[1])


def _dense(point: shapes.Point, device: str, cache: int, few: bool) -> Version:
    """The full matrices that the factors replace, those of one x glued together, as fast dense models have them (no
    norm, no residual: in a model they are there either way)."""
    kind = getattr(torch, point.dtype)
    out = sum(point.out_size) if isinstance(point.out_size, tuple) else point.out_size
    sizes = [(out, point.in_size)]
    if point.op == "low_rank_mlp":
        sizes = [(2 * out, point.in_size), (point.in_size, out)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=kind, generator=generator(device))

    def one() -> _Dense:
        weights = tuple(normal(*size).mul_(size[1] ** -0.5) for size in sizes)
        return _Dense(normal(point.rows, point.in_size), weights, tuple(normal(size[0]) for size in sizes))

    size = sum(a * b for a, b in sizes) * kind.itemsize
    sets = [one() for _ in range(2 if few else sets_needed(size, cache, 12 << 30))]
    return functools.partial(_dense_call, point.op), sets


def geomean(values: list[float]) -> float | None:
    return round(float(torch.tensor(values, dtype=torch.float64).log().mean().exp()), 3) if values else None


def launches(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The cooperative launch's time over the dependent one's, geometric mean and extremes; above 1, dependent wins. Of
    two launches one of which never gave a right result, the other wins."""

    def right(version: str) -> dict[str, float]:
        return {
            key: p["us"][version]["p50"]
            for key, p in points.items()
            if "p50" in p["us"].get(version, {}) and version not in p["red"]
        }

    cooperative, dependent = right("taco cuda"), right("taco cuda dependent")
    ratios = [cooperative[key] / dependent[key] for key in cooperative if key in dependent]
    mean = geomean(ratios)
    faster = None if mean is None else "dependent" if mean > 1.0 else "cooperative"
    if bool(cooperative) != bool(dependent):
        faster = "cooperative" if cooperative else "dependent"
    return {
        "points": len(ratios),
        "cooperative_over_dependent": mean,
        "least": round(min(ratios), 3) if ratios else None,
        "most": round(max(ratios), 3) if ratios else None,
        "faster": faster,
    }


def _backends(points: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The timed versions that the dispatcher may choose, and their backends.

    A launch is chosen for all calls at once: the CUDA kernels count with the one that is faster on the whole.
    """
    cuda = "taco cuda dependent" if launches(points)["faster"] == "dependent" else "taco cuda"
    return {"taco library": "library", cuda: "cuda", "taco triton": "triton"}


def chosen(points: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Per point the version that the dispatcher will take by these points: the fastest whose result is right. Points of
    which none is right are left out."""
    found = {}
    backends = _backends(points)
    for key, p in points.items():
        times = {name: t["p50"] for name, t in p["us"].items() if name in backends and "p50" in t}
        right = {name: time for name, time in times.items() if name not in p["red"]}
        if right:
            found[key] = min(right, key=right.__getitem__)
    return found


def summary(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that the targets of this project are stated in, of the backends that the dispatcher will choose by
    these points."""
    ours = chosen(points)
    kinds = {
        "decode, r >= 256": lambda p: p["rows"] <= 16 and p["rank"] >= 256,
        "decode, all ranks": lambda p: p["rows"] <= 16,
        "64 rows": lambda p: p["rows"] == 64,
        "512 rows and more": lambda p: p["rows"] >= 512,
        "512 rows and more, r <= 128": lambda p: p["rows"] >= 512 and p["rank"] <= 128,
    }
    for op in shapes.OPS:
        short = op.replace("low_rank_", "")
        kinds[f"{short}, decode"] = lambda p, op=op: p["op"] == op and p["rows"] <= 16  # type: ignore[misc]
    report: dict[str, Any] = {}
    for name, belongs in kinds.items():
        keys = [key for key, point in points.items() if belongs(point)]
        ups = {key: points[key]["speedup"][ours[key]] for key in keys if ours.get(key) in points[key]["speedup"]}
        pair = [up["two calls"] for up in ups.values() if "two calls" in up]
        dense = [
            up["dense"]
            for key, up in ups.items()
            if points[key]["rank"] < 0.8 * points[key]["break_even_rank"] and "dense" in up
        ]
        shares = [points[key]["share"][ours[key]]["read"] for key in ups if ours[key] in points[key]["share"]]
        report[name] = {
            "points": len(keys),
            "red": sum(any(version.startswith("taco") for version in points[key]["red"]) for key in keys),
            "vs two calls, geomean": geomean(pair),
            "vs two calls, least": min(pair, default=None),
            "vs compiled, geomean": geomean([up["compiled"] for up in ups.values() if "compiled" in up]),
            "vs dense below 0.8 break-even, least": min(dense, default=None),
            "share of read bandwidth, median": sorted(shares)[len(shares) // 2] if shares else None,
        }
    return report


def fastest_rank(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per op, shape and rows: the largest measured rank at which we beat dense, beside the break-even rank by bytes."""
    found: dict[str, dict[str, Any]] = {}
    ours = chosen(points)
    for key_of_point, p in points.items():
        up = p["speedup"].get(ours.get(key_of_point, ""), {})
        if p["op"] == "low_rank_bridge" or "dense" not in up:
            continue  # a bridge replaces whole layers, not one dense matrix
        outs = p["out"] if isinstance(p["out"], (list, tuple)) else [p["out"]]
        key = f"{p['op']}/{p['in']}x{'+'.join(map(str, outs))}/m{p['rows']}"
        entry = found.setdefault(key, {"faster_up_to": 0, "measured": [], "break_even_rank": p["break_even_rank"]})
        entry["measured"] = sorted({*entry["measured"], p["rank"]})
        if up["dense"] > 1.0:
            entry["faster_up_to"] = max(entry["faster_up_to"], p["rank"])
    return found


def choices(points: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For the dispatcher: the fastest backend whose result is right, per op, shape and rows, for the tuned table."""
    backends = _backends(points)
    found = []
    for key, version in chosen(points).items():
        p = points[key]
        in_size, out_size, rank = p["table_shape"]
        for rows in shapes.CHOSEN_ROWS.get(p["rows"], (p["rows"],)):
            entry = {"op": p["op"], "dtype": p["dtype"], "in": in_size, "out": out_size, "rank": rank, "rows": rows}
            found.append({**entry, "backend": backends[version]})
    return found
