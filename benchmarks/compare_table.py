"""Writes the table of `taco-svd compare --save FILE` over several sizes and texts into a document.

Several files are runs of the same comparison with other methods: same calibration windows, same texts.

Usage: python benchmarks/compare_table.py benchmarks/results/cpu-zen4/compare-smollm2-135m*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fidelity import scores_of
from whole_models import write_docs

from taco_svd.report import over_dense_cell

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "baselines.md"
BEGIN, END = "<!-- pretrained:begin -->", "<!-- pretrained:end -->"
# A model whose perplexity is so many times the dense one's writes no text: its digits say nothing.
USELESS = 10


def cell(score: dict, dense: dict) -> str:
    value = score["perplexity"]
    if value > USELESS * dense["perplexity"]:
        return f"over {USELESS} times dense"
    change = over_dense_cell(score)
    return f"{value:.2f}" if change == "-" else f"{value:.2f} ({change})"


def markdown(values: dict) -> str:
    rows, text = values["models"], values["text"]
    dense = scores_of(rows[0], text)
    lines = ["| keep | method | kept | " + " | ".join(dense) + " |", "|---|---|---|" + "---|" * len(dense)]
    for row in rows:
        scores = scores_of(row, text)
        cells = " | ".join(cell(scores[name], dense[name]) for name in dense)
        lines.append(f"| {row.get('setting', {}).get('keep', '')} | {row['model']} | {row['share']:.1%} | {cells} |")
    calibration, score = values["calibration"], rows[0]["perplexity"]
    lines += [
        "",
        f"Perplexity (increase over dense, paired over windows, ± standard error), {score['windows']} windows of "
        f"{score['window']} tokens of each text; calibrated on {calibration['samples']} windows of "
        f"{calibration['seq_len']} tokens of {calibration['source']}.",
    ]
    return "\n".join(lines)


def together(runs: list[dict]) -> dict:
    """One comparison of several: the first one's dense model, all other rows by size, smallest loss last."""
    first = runs[0]
    dense = first["models"][0]
    for run in runs[1:]:
        if run["calibration"] != first["calibration"]:
            raise SystemExit("The runs were calibrated on other windows.")
        if scores_of(run["models"][0], run["text"]) != scores_of(dense, first["text"]):
            raise SystemExit("The runs measured the dense model otherwise.")
    rows = [row for run in runs for row in run["models"][1:]]
    rows.sort(key=lambda row: (-row["setting"]["keep"], -row["perplexity"]["perplexity"]))
    return {**first, "models": [dense, *rows]}


def main() -> None:
    runs = [json.loads(Path(file).read_text()) for file in sys.argv[1:]]
    write_docs(markdown(together(runs)), DOCUMENT, BEGIN, END)


if __name__ == "__main__":
    main()
