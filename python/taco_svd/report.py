"""Tables for people, from the same records that `--json` prints for programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from .errors import TacoError
from .experts import kind_of
from .methods import METHODS

# why an evaluation has no KL divergence, where that needs no telling
NOT_ASKED = "not asked for"


def compare_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Models side by side: perplexity, size, latency; grouped by budget where there is more than one."""
    table = Table(title=title)
    several = len({str(row.get("setting")) for row in rows if "setting" in row}) > 1
    texts = list(rows[0].get("perplexity_on", {})) if rows else []
    columns = ("model", "perplexity", "over dense", *(column for text in texts for column in (text, "over dense")))
    columns = (*columns, "parameters", "kept", "MB", "prefill\nms", "decode\nms/token")
    for name in ("budget", *columns) if several else columns:
        table.add_column(name, justify="left" if name in ("model", "budget") else "right", no_wrap=True)
    last = None
    for row in rows:
        score = row["perplexity"]
        further = [row["perplexity_on"][text] for text in texts]
        latency = row.get("latency")
        setting = row.get("setting", {})
        cells = [
            row["model"],
            *(cell for one in (score, *further) for cell in (perplexity_cell(one), over_dense_cell(one))),
            f"{row['parameters']:,}",
            f"{row['share']:.1%}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{latency['prefill']['p50'] * 1e3:.2f}" if latency else "-",
            f"{latency['decode']['p50'] * 1e3:.2f}" if latency else "-",
        ]
        if several:
            if last is not None and setting != last:
                table.add_section()
            cells = [f"{setting['keep']:g}" if "keep" in setting else "", *cells]
        last = setting
        table.add_row(*cells)
    return table


def perplexity_cell(score: dict[str, Any]) -> str:
    return f"{score['perplexity']:.2f} ± {score['standard_error']:.2f}"


def over_dense_cell(score: dict[str, Any]) -> str:
    """How far a perplexity lies above the dense model's, with its standard error, paired over windows."""
    change = score.get("over_dense")
    if change is None:
        return "-"
    half = (change["high"] - change["low"]) / 2 / 1.96
    return f"{change['relative']:+.1%} ± {half:.1%}" if math.isfinite(half) else f"{change['relative']:+.1%}"


def plot_backend(path: str | Path) -> Any:
    """matplotlib's figure class, for files and no window.

    Raises:
        TacoError: matplotlib is not installed, or does not know the file's ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TacoError("--plot needs matplotlib: pip install 'taco-kernels[plot]'.") from error
    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise TacoError(f"--plot {path}: the name must end in one of {', '.join(sorted(known))}.")
    return Figure


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes a figure from `plot_backend`.

    Raises:
        TacoError: it cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise TacoError(f"{path} cannot be written: {error.strerror}.") from error


def compare_plot(values: dict[str, Any], path: str | Path) -> None:
    """Draws the rows of a comparison: perplexity over parameters and over latency relative to the dense model.

    Raises:
        TacoError: matplotlib is not installed, or does not know the file's ending; or it cannot be written.
    """
    figure = plot_backend(path)(figsize=(13, 5.5), layout="constrained")
    rows = values["models"]
    dense, made = rows[0], rows[1:]
    latency = any("against_dense" in row for row in made)
    axes = figure.subplots(1, 2 if latency else 1, sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row["model"] for row in made))
    worst = max(row["perplexity"]["perplexity"] for row in rows)  # the dense model's alone where all methods refused
    for number, name in enumerate(names):
        points = sorted((row for row in made if row["model"] == name), key=lambda row: row["parameters"])
        style = {
            "label": name,
            "color": f"C{number % 10}",
            "marker": "osD^vP*"[number % 7],
            "linestyle": "-" if number < 10 else "--",
            "linewidth": 2.5 if name == "taco" else 1.2,
        }
        heights = [row["perplexity"]["perplexity"] for row in points]
        spread = [row["perplexity"]["standard_error"] for row in points]
        axes[0].errorbar([row["parameters"] / 1e6 for row in points], heights, yerr=spread, capsize=2, **style)
        timed = [row for row in points if "against_dense" in row]
        if timed:
            axes[1].plot(
                [row["against_dense"]["decode"]["median"] for row in timed],
                [row["perplexity"]["perplexity"] for row in timed],
                **{**style, "linestyle": "none"},
            )
    axes[0].set_xlabel("parameters, millions")
    axes[0].set_ylabel(f"perplexity on {values['text']} (bars: standard error)")
    if latency:
        axes[1].set_xlabel("decode latency relative to the dense model (interleaved pairs, median)")
    base = dense["perplexity"]["perplexity"]
    for axis, place in zip(axes, (dense["parameters"] / 1e6, 1.0), strict=False):
        axis.plot([place], [base], "kx", markersize=9, label="dense")
        axis.axhline(base, color="k", linewidth=0.6, linestyle=":")
        if worst > 3 * base:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small", ncols=2)
    save_figure(figure, path)


def info_table(info: dict[str, Any]) -> Table:
    table = Table(title=f"{info['directory']}: {info['method']}", show_header=False)
    table.add_column("", style="bold")
    table.add_column("", overflow="fold")
    source, result, calibration = info["source"], info["result"], info["calibration"]
    table.add_row("source", f"{source.get('name')} ({source.get('architecture')}, {source.get('layers')} layers)")
    whole = METHODS[info["method"]].whole_model  # these are what removal would take out
    redundant = "least important layers" if whole else "redundant layers"
    if not (whole and len(info["redundant_layers"]) == source.get("layers")):  # a budget of time looks at no order
        table.add_row(redundant, ", ".join(map(str, info["redundant_layers"])) or "none")
    table.add_row("removed layers", ", ".join(map(str, info["removed_layers"])) or "none")
    if info["compression_ratio"] is not None and not whole:
        table.add_row("compression ratio", f"{info['compression_ratio']:.4g}")
    for layers, ranks in _alike(info["low_rank"]):
        table.add_row(layers, "rank " + ", ".join(f"{path} {rank}" for path, rank in _by_kind(ranks).items()))
    if info["int8_factors"]:
        integers = sum(map(len, info["int8_factors"].values()))
        table.add_row("8-bit factors", f"of {integers} of {sum(map(len, info['low_rank'].values()))} factorised maps")
    for bridge in info["bridges"]:
        table.add_row(
            f"bridge after layer {bridge['after']}", f"rank {bridge['rank']}{', bias' if bridge['bias'] else ''}"
        )
    table.add_row(
        "parameters",
        f"{source.get('parameters', 0):,} -> {result.get('parameters', 0):,} ({result.get('share', 0):.1%} kept)",
    )
    table.add_row("bytes of weights", f"{source.get('bytes', 0):,} -> {result.get('bytes', 0):,}")
    table.add_row("bytes of files", f"{result.get('file_bytes', 0):,}")
    table.add_row(
        "calibration",
        f"{calibration.get('source')}: {calibration.get('samples')} windows of {calibration.get('seq_len')} tokens, "
        f"seed {calibration.get('seed')}{_counted(calibration)}",
    )
    kinds = ("predicted", "measured")
    losses = [f"{name} {result[f'{name}_loss']:.4f}" for name in kinds if result.get(f"{name}_loss") is not None]
    healed = _healed(result.get("healing"))
    if losses:
        name = "KL to the dense model" + (" before healing" if healed else "")
        table.add_row(name, f"{', '.join(losses)} nats per token (held-out calibration windows)")
    if healed:
        table.add_row("healed", healed)
    if result.get("consistency"):
        adopted = sum(bool(record.get("adopted")) for record in result["consistency"])
        table.add_row("re-fitted maps", f"{adopted} of {len(result['consistency'])} tried")
    table.add_row("layer importance", str(info["importance"].get("measure")))
    table.add_row("made with", ", ".join(f"{name} {version}" for name, version in info["versions"].items()))
    return table


def _counted(calibration: Any) -> str:
    """What of the calibration counted, where that was not all."""
    return f"; {calibration.get('counted')} tokens of completions count" if calibration.get("completions_only") else ""


def _healed(record: Any) -> str | None:
    """What healing did, None where a plan does not tell (it may hold anything)."""
    try:
        kl = [float(record[when]["kl"]) for when in ("before", "after")]
        return f"KL to the dense model {kl[0]:.4f} -> {kl[1]:.4f} nats per token (held-out windows)"
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def evaluation_lines(values: dict[str, Any]) -> list[str]:
    """What `taco-svd eval` says about a model, a line per thing measured."""
    lines = []
    if "perplexity" in values:
        lines.append(
            f"perplexity {values['perplexity']:.3f} ± {values['standard_error']:.3f} on {values['text']}: "
            f"{values['tokens']:,} tokens{' of completions' if values.get('completions_only') else ''} in "
            f"{values['windows']} windows of {values['window']}, "
            f"stride {values['stride']}"
        )
    if "divergence" in values:
        found = values["divergence"]
        lines.append(
            f"KL({found['against']} || this) {found['kl']:.5f} ± {found['kl_standard_error']:.5f} nats per token; "
            f"{found['same_top_token']:.1%} of the most likely tokens are the same"
        )
    elif values.get("divergence_missing", NOT_ASKED) != NOT_ASKED:
        lines.append(f"no KL divergence: {values['divergence_missing']}")
    harness = values.get("harness", {})
    for task, metrics in harness.get("tasks", {}).items():
        for metric, found in metrics.items():
            line = f"{task} {metric} {found['value']:.4f}"
            if found["low"] is not None:
                line += f" (95%: {found['low']:.4f} to {found['high']:.4f})"
            lines.append(line)
    if "phenomena" in harness:
        worst = sorted(harness["phenomena"].items(), key=lambda item: item[1]["value"])[:3]
        told = ", ".join(f"{uid} {found['value']:.1%}" for uid, found in worst)
        lines.append(f"{len(harness['correct']):,} pairs of {len(harness['phenomena'])} phenomena; lowest: {told}")
    return lines


def _by_kind(ranks: dict[str, int]) -> dict[str, str]:
    """Ranks as text, the experts of a layer together: {"experts.*.down": "12 to 40 (7 experts)"}."""
    found: dict[str, list[int]] = {}
    for path, rank in ranks.items():
        found.setdefault(kind_of(path), []).append(rank)
    return {
        kind: str(values[0])
        if "*" not in kind
        else f"{min(values)} to {max(values)} ({len(values)} expert{'s' * (len(values) > 1)})"
        for kind, values in found.items()
    }


def _alike(low_rank: dict[str, dict[str, int]]) -> list[tuple[str, dict[str, int]]]:
    """Layers with the same ranks in one line, paths without what all of them share: ("ranks in 3, 5", {"q": 12})."""
    groups: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for layer, ranks in low_rank.items():
        groups.setdefault(tuple(ranks.items()), []).append(layer)
    lasts = [path.rpartition(".")[2] for ranks in low_rank.values() for path in ranks]
    ambiguous = len({path for ranks in low_rank.values() for path in ranks}) != len(set(lasts))

    def short(path: str) -> str:
        return path if ambiguous else path.rpartition(".")[2].removesuffix("_proj")

    return [
        (
            f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}",
            {short(path): rank for path, rank in ranks},
        )
        for ranks, layers in groups.items()
    ]
