"""Writes the README's first table from the JSON that `taco-svd compare ... --json` printed; no figure is typed by hand.

Usage: python benchmarks/readme_table.py benchmarks/results/cpu-zen4/compare-classics-16l.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from whole_models import write_docs

from taco_svd.report import over_dense_cell, perplexity_cell

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def markdown(values: dict) -> str:
    lines = [
        "| | perplexity | increase over dense | parameters | kept | MB | prefill ms | decode ms/token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in values["models"]:
        score, latency = row["perplexity"], row["latency"]
        lines.append(
            f"| {row['model']} | {perplexity_cell(score)} | {over_dense_cell(score)} | {row['parameters']:,} | "
            f"{row['share']:.1%} | {row['bytes'] / 1e6:.2f} | {latency['prefill']['p50'] * 1e3:.2f} | "
            f"{latency['decode']['p50'] * 1e3:.2f} |"
        )
    latency = values["latency"]
    lines.append("")
    lines.append(
        f"Perplexity on {values['text']} ({values['models'][0]['perplexity']['tokens']:,} tokens); latency on "
        f"{latency['device']}, {latency['threads']} threads, batch {latency['batch']}, prompt {latency['prompt']}, "
        f"median of {latency['rounds']} interleaved rounds."
    )
    return "\n".join(lines)


def main() -> None:
    values = json.loads(Path(sys.argv[1]).read_text())
    write_docs(markdown(values), README, BEGIN, END)


if __name__ == "__main__":
    main()
