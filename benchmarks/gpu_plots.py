"""Pictures of a GPU benchmark: roofline, and speed-up over dense by rank.

    python benchmarks/gpu_plots.py RESULTS/bench.json [--out DIR]

Writes ``roofline.png`` and ``speedup.png`` beside the JSON (or to DIR). Needs matplotlib, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpu.shapes import OPS

COLOURS = dict(zip(OPS, ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown"), strict=True))


def rates(content: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(op, operations per byte, TFLOP/s) of every point whose result was right."""
    return [
        (p["op"], p["flops"] / p["bytes"], p["flops"] / p["us"][p["chosen"]]["p50"] / 1e6)
        for p in content["points"].values()
        if p.get("chosen")
    ]


def speedups(content: dict[str, Any], rows: int) -> dict[str, list[tuple[float, float]]]:
    """Per op: (rank as a share of the break-even rank, speed-up over dense), by rank. A bridge replaces no matrix."""
    found: dict[str, list[tuple[float, float]]] = {}
    for p in content["points"].values():
        up = p["speedup"].get(p.get("chosen"), {}).get("dense") if p.get("chosen") else None
        if up is not None and p["rows"] == rows and p["op"] != "low_rank_bridge":
            found.setdefault(p["op"], []).append((p["rank"] / p["break_even_rank"], up))
    return {op: sorted(values) for op, values in found.items()}


def roofline(content: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    points = rates(content)
    machine = content.get("machine") or {}
    for op in OPS:
        xy = [(x, y) for name, x, y in points if name == op]
        if xy:
            axes.scatter(*zip(*xy, strict=True), s=10, label=op, color=COLOURS[op])
    if machine and points:
        low, high = min(x for _, x, _ in points), max(x for _, x, _ in points)
        peak, slope = machine["matmul_tflop_s"], machine["read_gb_s"] / 1e3
        corner = peak / slope
        line = sorted({low, high, *([corner] if low < corner < high else [])})
        axes.plot(
            line, [min(x * slope, peak) for x in line], "k--", lw=1, label="sum over 1 GiB and 8192^3 product, measured"
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte (least bytes)", ylabel="TFLOP/s")
    axes.set_title(f"{content.get('gpu', '')}: what the dispatcher chose")
    axes.legend(fontsize=8)
    return figure


def speedup(content: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    all_rows = sorted({p["rows"] for p in content["points"].values()})
    figure = Figure(figsize=(3.2 * max(1, len(all_rows)), 3.4), layout="constrained")
    panels = figure.subplots(1, max(1, len(all_rows)), sharey=True, squeeze=False)[0]
    for axes, rows in zip(panels, all_rows, strict=False):
        for op, values in speedups(content, rows).items():
            axes.plot(*zip(*values, strict=True), ".", ms=5, label=op, color=COLOURS[op])
        axes.axhline(1.0, color="k", lw=0.8)
        axes.set(title=f"{rows} rows", xlabel="rank / break-even rank", yscale="log")
        axes.axvline(1.0, color="grey", lw=0.8, ls=":")
    panels[0].set_ylabel("speed-up over dense")
    panels[0].legend(fontsize=7)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="bench.json of gpu_suite.py")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: beside the JSON)")
    options = parser.parse_args(arguments)
    content = json.loads(options.results.read_text())
    # a point that failed as a whole has no numbers
    content["points"] = {key: point for key, point in content["points"].items() if "us" in point}
    if not content["points"]:
        print(f"{options.results} has no points that were measured: nothing to draw.")
        return 1
    out = options.out or options.results.parent
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("roofline", roofline), ("speedup", speedup)):
        draw(content).savefig(out / f"{name}.png", dpi=130)
        print(out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
