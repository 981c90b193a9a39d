"""Pictures of records that the commands write: matplotlib figures, made without a display.

Texts that come from files (names of modules, models) pass through `plain`: matplotlib would read $...$ as mathematics.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

WIDTH = 8.6
KEPT, GONE, FACTORISED, BRIDGE = "#4c78a8", "#bab0ac", "#f58518", "#54a24b"


def plain(text: object) -> str:
    """A text that matplotlib draws as it is, on one line and not too long."""
    line = " ".join(str(text).split())
    return (line if len(line) <= 60 else line[:57] + "...").replace("$", r"\$")


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG: the same bytes for the same figure (no date, no random names)."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "taco", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _new(height: float, columns: int = 1, width: float = WIDTH) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def healing_curve(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out KL to the dense model over training tokens."""
    figure, axes = _new(3.2, width=6.4)
    tokens = [point["tokens"] / 1e3 for point in curve]
    axes.plot(tokens, [point["kl"] for point in curve], marker="o", label="held-out KL(dense || compressed)")
    best = min(range(len(curve)), key=lambda index: curve[index]["objective"])
    axes.plot(tokens[best], curve[best]["kl"], marker="o", markersize=11, fillstyle="none", color="C0", label="kept")
    axes.set_xlabel("training tokens (thousands)")
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def importance_bars(scores: Sequence[float], states: Sequence[str], measure: str) -> Figure:
    """Importance per layer; `states` has "kept", "factorised" or "removed" per layer."""
    figure, axes = _new(2.9)
    colours = {"kept": KEPT, "factorised": FACTORISED, "removed": GONE}
    positive = [score for score in scores if score > 0]
    for state, colour in colours.items():
        layers = [layer for layer, found in enumerate(states) if found == state]
        if layers:
            axes.bar(layers, [scores[layer] for layer in layers], color=colour, label=state)
    if positive and max(positive) > 8 * sorted(positive)[len(positive) // 2]:
        axes.set_yscale("log")  # the first layer alone would flatten all others
    axes.set_xticks(range(len(scores)) if len(scores) <= 40 else range(0, len(scores), 4))
    axes.set_xlabel("layer of the dense model")
    axes.set_ylabel(plain(measure))
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    return figure


def allocation_map(
    paths: Sequence[str],
    layers: int,
    cost: Mapping[tuple[int, str], tuple[float, int]],
    removed: Sequence[int],
    bridges: Mapping[int, int],
) -> Figure:
    """Layers x matrices: share of each matrix's parameters that is kept, with the rank written in.

    Args:
        cost: (layer, path) -> (share of the dense matrix's parameters, rank) of the factorised matrices.
        bridges: layer -> rank of the bridge behind it.
    """
    figure, axes = _new(0.9 + 0.36 * (len(paths) + 1), width=max(WIDTH, 1.6 + 0.42 * layers))
    shades = matplotlib.colormaps["viridis"]
    for layer in range(layers):
        for row, path in enumerate(paths):
            if layer in removed:
                axes.add_patch(Rectangle((layer - 0.5, row - 0.5), 1, 1, facecolor="#e8e6e4", edgecolor="white"))
                continue
            share, rank = cost.get((layer, path), (1.0, 0))
            colour = shades(min(share, 1.0))
            axes.add_patch(Rectangle((layer - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            if rank:
                dark = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] < 0.5
                size = 7 if rank < 1000 else 5.5
                axes.text(layer, row, str(rank), ha="center", va="center", fontsize=size, color="w" if dark else "k")
        if layer in removed:
            axes.text(layer, (len(paths) - 1) / 2, "removed", rotation=90, ha="center", va="center", color="#777777")
    for layer, rank in bridges.items():
        axes.add_patch(Rectangle((layer - 0.5, len(paths) - 0.5), 1, 1, facecolor=BRIDGE, edgecolor="white"))
        axes.text(layer, len(paths), str(rank), ha="center", va="center", fontsize=7, color="w")
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_ylim(len(paths) + (0.5 if bridges else -0.5), -0.5)
    rows = [*map(plain, paths), "bridge behind it"] if bridges else list(map(plain, paths))
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(layers) if layers <= 40 else range(0, layers, 4))
    axes.set_xlabel("layer of the dense model")
    for side in axes.spines.values():
        side.set_visible(False)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), shades)
    figure.colorbar(scale, ax=axes, label="parameters kept", pad=0.01)
    return figure


def spectra(panels: Mapping[str, Sequence[tuple[str, Sequence[float], Sequence[float], int]]]) -> Figure:
    """Singular values of dense matrices and of what replaced them.

    Args:
        panels: title -> lines (label, dense singular values, the replacement's, rank kept).
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 5.5, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for index, (label, dense, found, rank) in enumerate(lines):
            colour = f"C{index % 10}"
            scale = max(dense) if len(dense) else max(found, default=1.0)
            scale = scale or 1.0
            if len(dense):
                axes.plot(range(1, len(dense) + 1), [value / scale for value in dense], color=colour, lw=1.0, alpha=0.6)
            axes.plot(
                range(1, rank + 1), [value / scale for value in found[:rank]], color=colour, lw=2.2, label=plain(label)
            )
        axes.set_title(plain(title), fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        axes.set_ylim(bottom=0)
    figure.supxlabel("direction, largest first", fontsize=9)
    figure.supylabel("singular value, relative", fontsize=9)
    return figure


def drift_by_depth(lines: Mapping[str, Sequence[tuple[int, float, float]]]) -> Figure:
    """Relative error and cosine behind every layer; `lines`: name -> (dense layer, relative error, cosine)."""
    figure, (left, right) = _new(3.0, 2)
    for index, (name, points) in enumerate(lines.items()):
        layers = [point[0] for point in points]
        style = {"marker": "o", "markersize": 3.5, "color": f"C{index}", "label": plain(name)}
        left.plot(layers, [point[1] for point in points], **style)
        right.plot(layers, [1 - point[2] for point in points], **style)
    left.set_ylabel("relative error of the hidden state")
    right.set_ylabel("1 - cosine to the dense hidden state")
    for axes in (left, right):
        axes.set_xlabel("behind layer (of the dense model)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def predicted_against_measured(points: Sequence[tuple[str, float, float]]) -> Figure:
    """Loss the plan predicted against the loss measured: (label, predicted, measured)."""
    figure, axes = _new(3.4, width=4.6)
    top = 1.15 * max(max(predicted, measured, 1e-12) for _, predicted, measured in points)
    axes.plot([0, top], [0, top], color="#888888", lw=1, ls="--")
    for label, predicted, measured in points:
        axes.plot(predicted, measured, marker="o", color="C0")
        axes.annotate(plain(label), (predicted, measured), xytext=(5, -3), textcoords="offset points", fontsize=8)
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("predicted loss (nats per token)")
    axes.set_ylabel("measured")
    axes.grid(alpha=0.3)
    return figure


def consistency_steps(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Relative error of hidden states before and after each closed-form correction."""
    figure, axes = _new(3.0)
    for index, record in enumerate(records):
        colour = KEPT if record["adopted"] else GONE
        axes.plot([index, index], [record["before"], record["after"]], color=colour, lw=2)
        axes.plot(index, record["before"], marker="_", color=colour, markersize=9)
        axes.plot(index, record["after"], marker="o", color=colour, markersize=5)
    labels = [plain(f"{record['layer']} {record['path']}") for record in records]
    step = max(1, len(labels) // 30)
    axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=90, fontsize=7)
    axes.plot([], [], marker="_", color=KEPT, ls="", label="before")
    axes.plot([], [], marker="o", color=KEPT, ls="", label="after, adopted")
    axes.plot([], [], marker="o", color=GONE, ls="", label="after, not adopted")
    axes.set_ylabel("held-out error")
    values = [value for record in records for value in (record["before"], record["after"])]
    if min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")  # the stream grows with depth, and its errors with it
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    return figure


def alternatives(rows: Sequence[Mapping[str, Any]], this: str) -> Figure:
    """Perplexity over parameters, and over decode latency where it was measured.

    Args:
        rows: name, perplexity, standard_error, parameters, and decode (latency / the dense model's) or None.
        this: name of the model that the report is about.
    """
    timed = [row for row in rows if row.get("decode")]
    figure, axes = _new(3.4, 2 if timed else 1, WIDTH if timed else 5.5)
    panels = [(axes[0], rows, "parameters", 1e6, "parameters (millions)")] if timed else []
    if timed:
        panels.append((axes[1], timed, "decode", 1.0, "decode latency / dense"))
    else:
        panels.append((axes, rows, "parameters", 1e6, "parameters (millions)"))
    for place, shown, key, unit, title in panels:
        for row in shown:
            own = row["name"] == this
            x, y = row[key] / unit, row["perplexity"]
            style = {"color": FACTORISED if own else KEPT, "marker": "D" if own else "o", "capsize": 2}
            place.errorbar(x, y, yerr=row.get("standard_error") or 0.0, ls="", **style)
            place.annotate(plain(row["name"]), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
        place.set_xlabel(title)
        place.set_ylabel("perplexity")
        place.margins(0.16)
        place.grid(alpha=0.3)
    return figure
