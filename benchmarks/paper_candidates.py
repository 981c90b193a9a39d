"""How many leading directions must be attributed to find those that paper mode keeps? Writes a table and a plot.

For every linear map of some layers: full SVD, |sigma dL/dsigma| of all directions, the best k of them; then the share
of these among the leading c k directions, c from 1 up, and what `expected_missing` says from those candidates alone.
Paper mode starts with three k candidates from a randomized SVD where the matrix is large, and goes on to all
directions where the estimate exceeds `MISSING_SHARE`: the last column counts maps where it should have and did not.

Usage: python benchmarks/paper_candidates.py [--text FILE] [--out benchmarks/results/cpu/paper-candidates.json]
The plot is written beside the JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from taco_svd.architectures import Architecture, dense_weight
from taco_svd.attribution import CANDIDATES, SigmaGradients, expected_missing, top_directions
from taco_svd.budget import paper_rank
from taco_svd.calibration import load_calibration
from taco_svd.checkpoint import DEFAULT_MODEL
from taco_svd.decomposition import plain_svd
from taco_svd.factorise import MISSING_SHARE
from taco_svd.suffix import SuffixRunner

MULTIPLES = (1, 1.5, 2, 2.5, 3, 4, 5, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--text", default="self", help="calibration text file; default: the model's own")
    parser.add_argument("--layers", default="3,5,6,8")
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    source: Any = arguments.text
    calibration = load_calibration(source, model, tokenizer, arguments.samples, arguments.seq_len, 0)
    layers = [int(part) for part in arguments.layers.split(",")]
    architecture = Architecture(model)
    sites = architecture.sites(layers)
    parts = {site: plain_svd(dense_weight(architecture.module(site)).detach()) for site in sites}
    gradients = SigmaGradients(parts)
    SuffixRunner(architecture, calibration.tokens, min(layers)).backward(sites, gradients)
    rows = []
    for site in sites:
        sigma, importance = parts[site].sigma, gradients.importance(site)
        rank = paper_rank(*dense_weight(architecture.module(site)).shape, arguments.ratio)
        kept = top_directions(importance, rank)
        for multiple in MULTIPLES:
            count = min(len(sigma), int(multiple * rank))
            estimate = expected_missing(importance[:count], sigma[:count], rank, len(sigma))
            found = float((kept < count).double().mean())
            rows.append(
                {
                    "map": site.name,
                    "rank": rank,
                    "directions": len(sigma),
                    "multiple": multiple,
                    "share_found": found,
                    "expected_missing": estimate,
                    "accepted": estimate <= MISSING_SHARE,
                }
            )
    summary = []
    for multiple in MULTIPLES:
        chosen = [row for row in rows if row["multiple"] == multiple]
        wrong = [row["map"] for row in chosen if row["accepted"] and row["share_found"] < 1 - MISSING_SHARE]
        found = [row["share_found"] for row in chosen]
        summary.append(
            {
                "multiple": multiple,
                "share_found_mean": sum(found) / len(found),
                "share_found_least": min(found),
                "maps_complete": sum(value == 1 for value in found),
                "maps_accepted": sum(row["accepted"] for row in chosen),
                "maps_accepted_wrongly": wrong,
                "maps": len(chosen),
            }
        )
        line = summary[-1]
        print(
            f"{multiple:4} k candidates: {line['share_found_mean']:.1%} of the kept among them (least "
            f"{line['share_found_least']:.0%}), all in {line['maps_complete']} of {line['maps']} maps; accepted "
            f"{line['maps_accepted']}, wrongly {len(wrong)}"
        )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "model": Path(arguments.model).name,
            "compression_ratio": arguments.ratio,
            "calibration": calibration.describe(),
            "candidates": CANDIDATES,
            "missing_share": MISSING_SHARE,
            "summary": summary,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        plot(rows, arguments.out.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name in dict.fromkeys(row["map"] for row in rows):
        mine = [row for row in rows if row["map"] == name]
        colour = "tab:blue" if "attn" in name else "tab:orange"
        share = [row["multiple"] * row["rank"] / row["directions"] for row in mine]
        axes.plot(share, [row["share_found"] for row in mine], color=colour, alpha=0.45, linewidth=1)
        for at, row in zip(share, mine, strict=True):
            if row["accepted"] and at <= 1:
                axes.plot(at, row["share_found"], "o", color=colour, markersize=4)
    axes.plot([], [], color="tab:blue", label="attention")
    axes.plot([], [], color="tab:orange", label="MLP")
    axes.plot([], [], "o", color="grey", markersize=4, label="accepted by the estimate")
    axes.set_xlim(0, 1)
    axes.set_xlabel("candidates, as a share of all directions")
    axes.set_ylabel("share of the kept directions among them")
    axes.set_title("Paper mode keeps directions from deep in the spectrum", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
