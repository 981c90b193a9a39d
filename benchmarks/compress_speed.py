"""Times a whole `taco_svd.compress` against the same algorithm written plainly, interleaved, in one process.

Plainly means: the method of arXiv 2501.00339 as its description reads. Block influence from all hidden states; then for
each block a full SVD of its matrices, singular values as trainable parameters, each weight rebuilt from them in every
forward pass, the model's own loss and autograd, over the whole model and all windows; float32, since singular values
are trained in it. It gets the fastest of several batch sizes. It runs on another thread count or device as torch does.

Two modes: `sequential` (a block sees the blocks above it compressed, as published) and `one_shot` (all blocks see the
dense model; plainly that is still a pass per block). What is compared are whole calls, and the directions they keep:
the share of the plain way's directions, over all matrices, that ours spans too. Below 99% no speed-up is printed.

Usage: python benchmarks/compress_speed.py [--text FILE] [--out benchmarks/results/cpu/compress-speed.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from origin import origin
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from taco_svd import compress
from taco_svd.architectures import Architecture, LinearSite, dense_weight
from taco_svd.budget import paper_rank
from taco_svd.calibration import Calibration, load_calibration
from taco_svd.checkpoint import DEFAULT_MODEL
from taco_svd.module_tree import structural_copy
from taco_svd.replacement import LowRankLinear

SAME_DIRECTIONS = 0.99
PLAIN_BATCHES = (1, 4, 16)

Kept = dict[LinearSite, torch.Tensor]


class SigmaLinear(nn.Module):
    """A linear map with trainable singular values, its weight rebuilt at every call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.left, sigma, self.right = torch.linalg.svd(weight.float(), full_matrices=False)
        self.sigma = nn.Parameter(sigma)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, (self.left * self.sigma) @ self.right, self.bias)


def plain_layers(model: PreTrainedModel, tokens: torch.Tensor, count: int, batch: int) -> list[int]:
    """The `count` layers of the lowest block influence."""
    scores: torch.Tensor | float = 0.0
    with torch.no_grad():
        for windows in tokens.split(batch):
            states = model(windows, output_hidden_states=True, use_cache=False).hidden_states
            pairs = itertools.pairwise(states)
            scores = scores + torch.stack([(1 - torch.cosine_similarity(a, b, dim=-1)).sum() for a, b in pairs])
    # the last hidden state has been through the final norm: that layer's score is not block influence; it is never low
    return sorted(torch.as_tensor(scores).argsort()[:count].tolist())


def plain_paper(
    model: PreTrainedModel, tokens: torch.Tensor, layers: int, ratio: float, batch: int, one_shot: bool
) -> Kept:
    """Algorithm 1 by autograd; the left singular vectors kept per matrix. `model` is float32 and is changed."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    architecture = Architecture(model)
    kept: Kept = {}
    late: list[tuple[LinearSite, nn.Module]] = []
    for layer in sorted(plain_layers(model, tokens, layers, batch), reverse=True):
        for block in ("mlp", "attention"):
            sites = architecture.sites([layer], block)
            dense = {site: architecture.module(site) for site in sites}
            for site in sites:
                made = SigmaLinear(dense_weight(dense[site]), getattr(dense[site], "bias", None))
                architecture.replace(site, made)
            for windows in tokens.split(batch):
                loss = model(windows, labels=windows, use_cache=False).loss * (len(windows) / len(tokens))
                loss.backward()
            for site in sites:
                made = architecture.module(site)
                assert isinstance(made, SigmaLinear) and made.sigma.grad is not None
                rank = paper_rank(*dense_weight(dense[site]).shape, ratio)
                order = (made.sigma.grad * made.sigma.detach()).abs().argsort(descending=True)[:rank]
                kept[site] = made.left[:, order]
                root = made.sigma.detach()[order].sqrt()
                factors = nn.Sequential(
                    nn.Linear(made.right.shape[1], rank, bias=False),
                    nn.Linear(rank, made.left.shape[0], bias=made.bias is not None),
                )
                factors[0].weight = nn.Parameter(root[:, None] * made.right[order], requires_grad=False)
                factors[1].weight = nn.Parameter(made.left[:, order] * root, requires_grad=False)
                if made.bias is not None:
                    factors[1].bias = nn.Parameter(made.bias, requires_grad=False)
                if one_shot:
                    architecture.replace(site, dense[site])
                    late.append((site, factors))
                else:
                    architecture.replace(site, factors)
    for site, factors in late:
        architecture.replace(site, factors)
    return kept


def ours_paper(model: PreTrainedModel, calibration: Calibration, layers: int, ratio: float, one_shot: bool) -> Kept:
    compressed, plan = compress(
        model, method="paper", layers=layers, compression_ratio=ratio, calibration=calibration, one_shot=one_shot
    )
    architecture = Architecture(compressed)
    kept: Kept = {}
    for layer in plan.structure.low_rank:
        for site in architecture.sites([layer]):
            module = architecture.module(site)
            assert isinstance(module, LowRankLinear)
            kept[site] = functional.normalize(module.u.detach().float(), dim=0)
    return kept


def same_directions(ours: Kept, plain: Kept) -> float:
    """Share of the plain way's directions that ours keeps too, over all matrices (0 where layers differ)."""
    if ours.keys() != plain.keys():
        return 0.0
    # columns of one orthonormal matrix (ours rounded to the dtype of the model): products are 0 or 1 but for rounding
    common = sum(int(((ours[site].T @ plain[site]).abs() > 0.9).sum()) for site in plain)
    return common / sum(columns.shape[1] for columns in plain.values())


def timed(run: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def quartiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"min": ordered[0], "median": statistics.median(ordered), "max": ordered[-1]}


def measure(
    name: str,
    dtype: torch.dtype,
    calibration: Calibration,
    layers: int,
    ratio: float,
    one_shot: bool,
    rounds: int,
    batch: int,
) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    wide = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    ours_paper(model, Calibration(calibration.tokens[:8], "warm-up", 0), layers, ratio, True)
    ours_times: list[float] = []
    plain_times: list[float] = []
    share = 0.0
    for _ in range(rounds):
        plain_time, plain = timed(
            lambda: plain_paper(structural_copy(wide), calibration.tokens, layers, ratio, batch, one_shot)
        )
        ours_time, ours = timed(lambda: ours_paper(model, calibration, layers, ratio, one_shot))
        share = same_directions(ours, plain)
        ours_times.append(ours_time)
        plain_times.append(plain_time)
    row = {
        "mode": "one_shot" if one_shot else "sequential",
        "dtype": str(dtype).removeprefix("torch."),
        "plain_batch": batch,
        "plain_seconds": quartiles(plain_times),
        "ours_seconds": quartiles(ours_times),
        "same_directions": share,
        "matrices": len(plain),
        "speed_up": None,
    }
    if share >= SAME_DIRECTIONS:
        row["speed_up"] = quartiles([plain / ours for plain, ours in zip(plain_times, ours_times, strict=True)])
    return row


def fastest_batch(name: str, tokens: torch.Tensor, layers: int, ratio: float) -> int:
    """The batch size that suits the plain way best, on a quarter of the windows."""
    wide = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    part = tokens[: max(max(PLAIN_BATCHES), len(tokens) // 4)]
    seconds = {
        batch: timed(lambda batch=batch: plain_paper(structural_copy(wide), part, 1, ratio, batch, True))[0]
        for batch in PLAIN_BATCHES
    }
    return min(seconds, key=lambda batch: seconds[batch])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--text", default="self", help="calibration text file; default: the model's own")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", default="one_shot,sequential")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    made_with = origin()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    source: Any = arguments.text
    calibration = load_calibration(source, model, tokenizer, arguments.samples, arguments.seq_len, 0)
    batch = fastest_batch(arguments.model, calibration.tokens, arguments.layers, arguments.ratio)
    rows = []
    for mode in arguments.modes.split(","):
        for dtype in arguments.dtypes.split(","):
            row = measure(
                arguments.model,
                getattr(torch, dtype),
                calibration,
                arguments.layers,
                arguments.ratio,
                mode == "one_shot",
                arguments.rounds,
                batch,
            )
            rows.append(row)
            gain = "no speed-up (other directions)" if row["speed_up"] is None else f"x{row['speed_up']['median']:.2f}"
            print(
                f"{row['mode']:10} {row['dtype']:8} plain {row['plain_seconds']['median']:6.2f} s (batch {batch})  "
                f"ours {row['ours_seconds']['median']:6.2f} s  {gain}  same directions {row['same_directions']:.2%}",
                flush=True,
            )
    result = {
        "what": "whole compress, --method paper, against the same algorithm written plainly",
        "layers": arguments.layers,
        "compression_ratio": arguments.ratio,
        "calibration": calibration.describe(),
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **made_with,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
