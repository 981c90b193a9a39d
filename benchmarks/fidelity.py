"""Perplexity of every method at several sizes, over seeds of the calibration draw and over texts.

    python benchmarks/fidelity.py --calibration train.txt --text books.txt,wikitext2-test.txt --seeds 0,1,2

Every seed draws its own calibration windows; one JSON per seed is kept under `--out` and not computed again when the
command is repeated. `summary.json`, the table and the picture hold means and spreads over the seeds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

# equal parameters in two ways: a share of the whole model, and what the paper's method needs for its own arguments
SETTINGS = (("--keep", "0.9,0.8,0.7"), ("--layers", "4", "--compression-ratio", "0.7"))


def main(
    calibration: Annotated[str, typer.Option(help="Text to calibrate on.")],
    text: Annotated[str, typer.Option(help="Texts to evaluate on, with commas.")],
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0,1,2",
    model: Annotated[str | None, typer.Option(help="Default: the demo model.")] = None,
    methods: Annotated[str, typer.Option(help="As for taco-svd compare.")] = "all",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    max_windows: Annotated[int, typer.Option(help="Evaluation windows per text.")] = 96,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("benchmarks/results/cpu/fidelity"),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in seeds.split(","):
        for number, setting in enumerate(SETTINGS):
            file = out / f"seed-{seed}-{('keep', 'layers')[number]}.json"
            if not file.is_file() or "unfinished" in json.loads(file.read_text()):
                command = [
                    *(sys.executable, "-m", "taco_svd", "compare", *([model] if model else [])),
                    *("--methods", methods, *setting, "--calibration", calibration, "--text", text, "--seed", seed),
                    *("--samples", str(samples), "--seq-len", str(seq_len), "--window", str(seq_len)),
                    *("--max-windows", str(max_windows), "--rounds", "0", "--save", str(file)),
                ]
                print(" ".join(command[1:]), flush=True)
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            runs.append(json.loads(file.read_text()))
    summary = summarise(runs)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (out / "summary.md").write_text(markdown(summary), encoding="utf-8")
    show(summary)


def scores_of(row: dict, text: str) -> dict[str, dict]:
    """A model's perplexities by text; `text` is the run's first."""
    return {text: row["perplexity"], **row.get("perplexity_on", {})}


def summarise(runs: list[dict]) -> dict:
    """Per setting, method and text: perplexities of all seeds, their mean and standard deviation."""
    found: dict[tuple[str, str, str], list[float]] = {}
    shares: dict[tuple[str, str], float] = {}
    for run in runs:
        for row in run["models"]:
            setting = ", ".join(f"{name} {value}" for name, value in row.get("setting", {}).items()) or "dense"
            # removal has no ratio of its own, but stands in the table of the others' setting
            setting = "layers 4, compression_ratio 0.7" if setting == "layers 4" else setting
            shares[setting, row["model"]] = row["share"]
            for text, score in scores_of(row, run["text"]).items():
                found.setdefault((setting, row["model"], text), []).append(score["perplexity"])
    rows = [
        {
            "setting": setting,
            "model": model,
            "share": shares[setting, model],
            "text": text,
            "perplexities": values,
            "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
        }
        for (setting, model, text), values in found.items()
    ]
    return {"calibrations": [run["calibration"] for run in runs[:: len(SETTINGS)]], "rows": rows}


def lines(summary: dict) -> list[list[str]]:
    """The columns' names, then a line per setting and method."""
    texts = list(dict.fromkeys(row["text"] for row in summary["rows"]))
    cells: dict[tuple[str, str], dict[str, dict]] = {}
    for row in summary["rows"]:
        cells.setdefault((row["setting"], row["model"]), {})[row["text"]] = row
    found = [["setting", "model", "kept", *texts]]
    for (setting, model), by_text in cells.items():
        share = next(iter(by_text.values()))["share"]
        scores = [f"{by_text[text]['mean']:.2f} ± {by_text[text]['standard_deviation'] or 0:.2f}" for text in texts]
        found.append([setting, model, f"{share:.1%}", *scores])
    return found


def heading(summary: dict) -> str:
    return f"perplexity, mean and standard deviation over {len(summary['calibrations'])} calibration draws"


def markdown(summary: dict) -> str:
    columns, *rows = lines(summary)
    table = [columns, ["---"] * len(columns), *rows]
    text = "".join("| " + " | ".join(row) + " |\n" for row in table)
    return f"Written by `benchmarks/fidelity.py`: {heading(summary)}.\n\n{text}"


def show(summary: dict) -> None:
    columns, *rows = lines(summary)
    table = Table(title=heading(summary))
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
