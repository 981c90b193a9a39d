"""Tables and plots from the suite's JSON; nothing here measures."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cpu.points import PREFILL_ROWS, SHARES, TARGET_RANKS, TARGET_ROWS, TARGET_SHAPES, break_even

Points = list[dict[str, Any]]


def geomean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def against_best(point: dict[str, Any]) -> float:
    """Speed-up over the better of torch's two calls and their compiled form."""
    return min(point[name]["p50"] for name in ("x_library", "x_compiled") if name in point)


def at_targets(points: Points, rows: tuple[int, ...], dtypes: tuple[str, ...]) -> Points:
    return [
        p
        for p in points
        if p["op"] == "linear"
        and p["rows"] in rows
        and p["dtype"] in dtypes
        and (p["in_size"], p["out_size"]) in TARGET_SHAPES
        and p["rank"] in TARGET_RANKS
        and "red" not in p
    ]


def crossing(points: Points) -> float | None:
    """Share of the break-even rank at which dense becomes as fast, interpolated; None if it does not within range."""
    known = sorted((p["rank"] / break_even(p["in_size"], p["out_size"]), p["x_dense"]["p50"]) for p in points)
    for (a, fast), (b, slow) in itertools.pairwise(known):
        if fast >= 1 > slow:
            return a + (b - a) * (fast - 1) / (fast - slow)
    return None


def target_table(content: dict[str, Any]) -> str:
    """The targets beside what was measured, as Markdown."""
    points: Points = list(content["points"].values())
    lines = ["| what | target | measured | points |", "|---|---|---|---|"]

    def row(what: str, target: str, measured: str, count: int) -> None:
        lines.append(f"| {what} | {target} | {measured if count else 'missing'} | {count} |")

    few = at_targets(points, (1,), ("bfloat16",))
    row(
        "1 row, bf16, better of two calls and compiled",
        "x3 geomean",
        f"x{geomean(map(against_best, few)):.2f} (x{geomean(p['x_library']['p50'] for p in few):.2f} over two calls; "
        f"{min(map(against_best, few)):.2f} to {max(map(against_best, few)):.2f})"
        if few
        else "",
        len(few),
    )
    for dtype in ("bfloat16", "float32"):
        few = at_targets(points, TARGET_ROWS, (dtype,))
        row(
            f"1-16 rows, {dtype}, the same",
            "x2 geomean, never below x1.0",
            f"x{geomean(map(against_best, few)):.2f}, lowest x{min(map(against_best, few)):.2f}" if few else "",
            len(few),
        )
    cache = content["machine"]["last_level_cache"]
    width = {"bfloat16": 2, "float32": 4}
    for dtype in width:
        large = [
            p
            for p in points
            if p["op"] == "linear"
            and p["rows"] == 1
            and p["dtype"] == dtype
            and "red" not in p
            and p["rank"] * (p["in_size"] + p["out_size"]) * width[dtype] > cache
        ]
        row(
            f"1 row, {dtype}, factors larger than the last cache: share of measured read bandwidth",
            "90%",
            f"median {statistics.median(p['of_read'] for p in large):.0%}, "
            f"lowest {min(p['of_read'] for p in large):.0%}"
            if large
            else "",
            len(large),
        )
    many = [p for p in points if p["op"] == "linear" and p["rows"] in PREFILL_ROWS and "red" not in p]
    row(
        "128-2048 rows against two calls",
        "x1.0 everywhere",
        f"x{geomean(p['x_library']['p50'] for p in many):.3f}, lowest x{min(p['x_library']['p50'] for p in many):.3f}"
        if many
        else "",
        len(many),
    )
    near = [
        p
        for p in points
        if p["op"] == "linear" and p["rows"] <= 16 and "x_dense" in p and "red" not in p
        and p["rank"] < 0.9 * break_even(p["in_size"], p["out_size"])
    ]  # fmt: skip
    slower = [p for p in near if p["x_dense"]["p50"] < 1]
    row(
        "1-16 rows against dense, r < 0.9 break-even",
        "faster",
        f"slower at {len(slower)}, lowest x{min(p['x_dense']['p50'] for p in near):.2f}" if near else "",
        len(near),
    )
    overhead = content.get("call_overhead_us")
    row("one eager call, nothing to compute", "10 us", f"{overhead['p50']:.1f} us" if overhead else "", bool(overhead))
    red = [key for key, p in content["points"].items() if "red" in p]
    if red:
        lines += ["", f"Wrong results, not timed: {', '.join(red)}"]
    return "\n".join(lines)


def break_even_table(content: dict[str, Any]) -> str:
    points = [p for p in content["points"].values() if p["op"] == "linear" and "x_dense" in p]
    lines = ["| dtype | in x out | rows | break-even by weights | by time, as a share of it |", "|---|---|---|---|---|"]
    for dtype in ("bfloat16", "float32"):
        for shape in TARGET_SHAPES:
            for rows in (1, 4, 16):
                mine = [
                    p for p in points
                    if (p["in_size"], p["out_size"]) == shape and p["rows"] == rows and p["dtype"] == dtype
                ]  # fmt: skip
                if len(mine) > 1:
                    share = crossing(mine)
                    text = f"{share:.2f}" if share is not None else f"above {max(SHARES):.2f} or not found"
                    lines.append(f"| {dtype} | {shape[0]}x{shape[1]} | {rows} | {break_even(*shape)} | {text} |")
    return "\n".join(lines)


def plot(content: dict[str, Any], out: Path) -> list[Path]:
    """``roofline.png`` and ``speedup.png`` beside the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: Points = [p for p in content["points"].values() if p["op"] == "linear" and "red" not in p]
    width = {"bfloat16": 2, "float32": 4}
    paths = []
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, dtype in zip(axes, width, strict=True):
        mine = [p for p in points if p["dtype"] == dtype]
        # a weight of so many bytes takes part in two operations per row
        intensity = [2 * p["rows"] / width[dtype] for p in mine]
        axis.scatter(intensity, [p["gflops"] for p in mine], s=14, label="taco_kernels")
        library = [p["gflops"] * p["ours_us"]["p50"] / p["library_us"]["p50"] for p in mine]
        axis.scatter([1.12 * i for i in intensity], library, s=14, marker="x", label="two library calls")
        bandwidth, peak = content["yardsticks"]["read_gbps"]["p50"], content["yardsticks"]["product_gflops"][dtype]
        grid = [0.25 * 2**k for k in range(16)]
        axis.plot(grid, [min(peak, bandwidth * g) for g in grid], color="black", lw=1, label="read, 2048^3 product")
        axis.set(xscale="log", yscale="log", title=dtype, xlabel="operations per byte of weights", ylabel="GFLOP/s")
        axis.legend()
    paths.append(out / "roofline.png")
    figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
    plt.close(figure)

    figure, grid_axes = plt.subplots(2, 2, figsize=(12, 9), sharex=True)
    for line, dtype in zip(grid_axes, width, strict=True):
        for axis, shape in zip(line, TARGET_SHAPES, strict=True):
            for rows, colour in zip((1, 4, 16), ("tab:blue", "tab:orange", "tab:green"), strict=True):
                mine = sorted(
                    (p for p in points if (p["in_size"], p["out_size"]) == shape and p["rows"] == rows
                     and p["dtype"] == dtype),
                    key=lambda p: p["rank"],
                )  # fmt: skip
                for name, style in (("library", "-"), ("dense", "--")):
                    known = [p for p in mine if f"x_{name}" in p]
                    ranks, ratios = [p["rank"] for p in known], [p[f"x_{name}"]["p50"] for p in known]
                    axis.plot(ranks, ratios, style, color=colour, marker=".", label=f"{rows} rows, over {name}")
            axis.axhline(1, color="black", lw=0.8)
            axis.axvline(break_even(*shape), color="grey", lw=0.8, ls=":")
            axis.set(xscale="log", yscale="log", title=f"{dtype} {shape[0]}x{shape[1]}", xlabel="rank")
            axis.set_ylabel("times faster")
    grid_axes[0][0].legend(fontsize=8)
    paths.append(out / "speedup.png")
    figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
    plt.close(figure)
    return paths
