"""Pictures of records that the commands write: matplotlib figures, made without a display."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure


def healing_curve(curve: list[dict[str, Any]]) -> Figure:
    """Held-out KL to the dense model and the training loss over training tokens."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
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
