"""Tables for people, from the same records that `--json` prints for programs."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .latency import LatencyReport


def compare_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Models side by side: perplexity, size, latency."""
    table = Table(title=title)
    for name in ("model", "perplexity", "parameters", "kept", "MB", "prefill ms", "decode ms/token"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        score = row["perplexity"]
        latency = row.get("latency")
        table.add_row(
            row["model"],
            f"{score['perplexity']:.2f} ± {score['standard_error']:.2f}",
            f"{row['parameters']:,}",
            f"{row['share']:.1%}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{latency['prefill']['p50'] * 1e3:.2f}" if latency else "-",
            f"{latency['decode']['p50'] * 1e3:.2f}" if latency else "-",
        )
    return table


def latency_table(report: LatencyReport) -> Table:
    table = Table(
        title=f"batch {report.batch}, prompt {report.prompt}, {report.decode_steps} tokens decoded, "
        f"{report.rounds} interleaved rounds, {report.device}, {report.threads} threads"
    )
    for name in ("", "prefill ms (p20 / p50 / p80)", "decode ms per step (p20 / p50 / p80)"):
        table.add_column(name)
    for name, phases in report.seconds.items():
        cells = [" / ".join(f"{phases[phase][p] * 1e3:.2f}" for p in ("p20", "p50", "p80")) for phase in phases]
        table.add_row(name, *cells)
    for name, ratios in report.overhead.items():
        one, other = name.split("/")
        table.add_row(
            f"{one} against {other}",
            *(f"{r.median:+.1%} (95%: {r.low:+.1%} to {r.high:+.1%})" for r in ratios.values()),
        )
    return table


def info_table(info: dict[str, Any]) -> Table:
    table = Table(title=f"{info['directory']}: {info['method']}", show_header=False)
    table.add_column("", style="bold")
    table.add_column("", overflow="fold")
    source, result, calibration = info["source"], info["result"], info["calibration"]
    table.add_row("source", f"{source.get('name')} ({source.get('architecture')}, {source.get('layers')} layers)")
    table.add_row("redundant layers", ", ".join(map(str, info["redundant_layers"])) or "none")
    table.add_row("removed layers", ", ".join(map(str, info["removed_layers"])) or "none")
    if info["compression_ratio"] is not None:
        table.add_row("compression ratio", f"{info['compression_ratio']:.4g}")
    for layer, ranks in info["low_rank"].items():
        table.add_row(f"layer {layer}", ", ".join(f"{path} rank {rank}" for path, rank in ranks.items()))
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
        f"seed {calibration.get('seed')}",
    )
    table.add_row("layer importance", str(info["importance"].get("measure")))
    table.add_row("made with", ", ".join(f"{name} {version}" for name, version in info["versions"].items()))
    return table


def evaluation_lines(values: dict[str, Any]) -> list[str]:
    """What `taco-svd eval` says about a model, a line per thing measured."""
    lines = []
    if "perplexity" in values:
        lines.append(
            f"perplexity {values['perplexity']:.3f} ± {values['standard_error']:.3f} on {values['text']}: "
            f"{values['tokens']:,} tokens in {values['windows']} windows of {values['window']}, "
            f"stride {values['stride']}"
        )
    if "divergence" in values:
        found = values["divergence"]
        lines.append(
            f"KL({found['against']} || this) {found['kl']:.5f} ± {found['kl_standard_error']:.5f} nats per token; "
            f"{found['same_top_token']:.1%} of the most likely tokens are the same"
        )
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
