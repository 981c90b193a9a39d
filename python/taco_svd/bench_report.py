"""A latency run as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from .report import plot_backend, save_figure

# What the product promises over removal, and what factors must stay below against the dense model.
TARGET_OVERHEAD = 0.003


def bench_table(result: dict[str, Any]) -> Table:
    """One row per model and comparison of every mode, batch and phase."""
    title = f"{result.get('source') or result.get('shape')}: {result['method']}, {result['dtype']}, {result['device']}"
    table = Table(title=f"{title}, {result['threads']} threads, prompt {result['settings']['prompt']}")
    for name in ("mode", "batch", "phase", "", "ms (p20 / p50 / p80)", "tokens/s", "overhead (95%)", "rounds"):
        table.add_column(name, justify="left" if name in ("mode", "phase", "") else "right")
    for row in result["results"]:
        place = (row["mode"], str(row["batch"]), row["phase"])
        for name, values in row["models"].items():
            seconds = " / ".join(f"{values['seconds'][p] * 1e3:.2f}" for p in ("p20", "p50", "p80"))
            table.add_row(*place, name, seconds, f"{values['tokens_per_second']:,.1f}", "", "")
            place = ("", "", "")
        for name, values in row["comparisons"].items():
            text = interval_text(values["overhead"])
            share = values.get("bytes") or values.get("flops")
            one, other = name.split("/")
            what = f"{one} over {other}"
            if share is not None and other == "dense":
                what += f" ({'bytes' if 'bytes' in values else 'operations'} {share - 1:+.1%})"
            table.add_row("", "", "", what, "", "", text, f"{values['rounds']}, {values['stopped']}", style="bold")
            for key, what, counted in (
                ("bridges", "bridges, timed inside", "samples"),
                ("windows", "bridges, on over off", "rounds"),
                ("windows_control", "bridges, off over off", "rounds"),
            ):
                if key in values:
                    ratio = values[key]
                    table.add_row("", "", "", what, "", "", interval_text(ratio), f"{ratio[counted]}, {counted}")
        table.add_section()
    sizes = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in result["weight_bytes"].items())
    table.caption = f"Weights: {sizes}. Energy: {_energy(result)}.{_predicted(result)}{stand_in_note(result)}"
    return table


def interval_text(ratio: dict[str, float]) -> str:
    """Median and interval of a ratio minus one, in percent."""
    return f"{ratio['median']:+.2%} ({ratio['low']:+.2%} to {ratio['high']:+.2%})"


def stand_in_note(*results: dict[str, Any]) -> str:
    """What a reader must know of models that were made from a shape; nothing for checkpoints."""
    made = [result for result in results if result.get("weights") == "random"]
    if not made:
        return ""
    text = " All weights are random: this is about latency and says nothing about quality."
    if any(result["method"] == "taco" for result in made):
        text += (
            " Here taco is a stand-in: every map keeps the same share of its parameters, with the same ranks in every "
            "layer, where the method would allocate ranks by what each map was measured to cost."
        )
    return text


def _predicted(result: dict[str, Any]) -> str:
    """What the cost model said beforehand, to be held against the table."""
    record = result.get("cost_budget", {})
    text = ""
    ranks = sorted({bridge["rank"] for bridge in result["structure"]["bridges"]})
    if ranks:
        text += f" Bridges: {len(result['structure']['bridges'])} of rank {', '.join(map(str, ranks))}."
    if "predicted_overhead" in record:
        parts = (f"{phase} {value:.2%}" for phase, value in record["predicted_overhead"].items())
        text += f" Predicted overhead: {', '.join(parts)} (prompt {record['prompt']}, batch 1)."
    if "predicted_latency" in record:
        ratio = record["predicted_latency"] / record["dense_latency"] - 1
        text += f" Predicted over dense: {ratio:+.1%} ({record['predicted_latency'] * 1e3:.2f} ms per token)."
    return text


def _energy(result: dict[str, Any]) -> str:
    row = result["results"][-1]
    found = [
        f"{name} {values['joules_per_token']:.3g} J/token"
        for name, values in row["models"].items()
        if "joules_per_token" in values
    ]
    return f"{', '.join(found)} ({row['energy']}; {row['phase']})" if found else str(row["energy"])


def plot_bench(result: dict[str, Any], path: Path) -> None:
    """Overhead over removal with its intervals, and latency over dense beside what bytes or operations would allow.

    Raises:
        TacoError: see `plot_backend` and `save_figure`.
    """
    panels: list[tuple[str, str]] = []
    for other, title in (("removal", "overhead over removal, %"), ("dense", "latency over dense, %")):
        if any(f"compressed/{other}" in row["comparisons"] for row in result["results"]):
            panels.append((other, title))
    figure = plot_backend(path)(figsize=(6.5 * len(panels), 1.2 + 0.5 * len(result["results"])), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for (other, title), axis in zip(panels, axes, strict=True):
        labels: list[str] = []
        for row in result["results"]:
            values = row["comparisons"].get(f"compressed/{other}")
            if values is None:
                continue
            place = len(labels)
            labels.append(f"{row['mode']}, batch {row['batch']}, {row['phase']}")
            ratio = {key: 100 * value for key, value in values["overhead"].items()}
            bars = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            axis.errorbar([ratio["median"]], [place], xerr=bars, fmt="o", capsize=4, color="tab:blue")
            share = values.get("bytes") or values.get("flops")
            if other == "dense" and share is not None:
                axis.plot([100 * (share - 1)], [place], marker="|", markersize=16, color="tab:gray", linestyle="none")
        axis.axvline(0, color="black", linewidth=0.8)
        if other == "removal" and result["method"] == "bridge":  # other methods do more than bridge what is removed
            axis.axvline(100 * TARGET_OVERHEAD, color="tab:red", linewidth=0.8, linestyle="--", label="0.3%")
            axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)  # above: intervals are anywhere
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.margins(x=0.1)
        axis.set_xlabel(title + (" (grey: share of bytes or operations)" if other == "dense" else ""))
    name = result.get("source") or result.get("shape")
    figure.suptitle(f"{name}, {result['method']}, {result['dtype']}, {result['device']}")
    save_figure(figure, path)
