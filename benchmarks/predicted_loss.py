"""How well the allocator predicts: random plans on the demo model, predicted against measured loss, rank correlation.

    python benchmarks/predicted_loss.py --calibration FILE --text FILE [--plans 50] [--out FILE.json]

Every plan factorises a random subset of the linear maps at random ranks. Predicted: the sum of the single losses that
taco mode measured on the calibration text. Measured: KL(dense || factorised) on windows of another text. Factors are
those of the dense model's statistics, without re-fits, so that the prediction is about what is measured.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from origin import origin

from taco_svd.architectures import Architecture, dense_weight, linear_shape
from taco_svd.calibration import load_calibration
from taco_svd.checkpoint import DEFAULT_MODEL, load_model
from taco_svd.decomposition import damped, weighted_svd
from taco_svd.loss_curves import divergence_between
from taco_svd.module_tree import structural_copy
from taco_svd.progress import Silent
from taco_svd.statistics import SecondMoments
from taco_svd.suffix import SuffixRunner
from taco_svd.surgery import put_factors
from taco_svd.taco import GRADIENT_DAMPING, INPUT_DAMPING, Analysis


def ranks_of(values: list[float]) -> torch.Tensor:
    """Position of each value in ascending order, 0 .. n - 1 (no ties in measured floats)."""
    return torch.tensor(values).argsort().argsort().double()


def spearman(one: list[float], other: list[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks_of(one), ranks_of(other)]))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    made_with = origin()
    model, tokenizer = load_model(DEFAULT_MODEL, dtype=torch.float32)
    calibration = load_calibration(options.calibration, model, tokenizer, 64, 256, options.seed)
    text = load_calibration(options.text, model, tokenizer, 16, 256, options.seed + 1).tokens
    curves = Analysis(model, calibration).curves({}, Silent())

    working = structural_copy(model)
    architecture = Architecture(working)
    sites = architecture.sites()
    moments = SecondMoments()
    SuffixRunner(architecture, calibration.tokens, 0).backward(sites, moments)
    parts = {
        site: weighted_svd(
            dense_weight(architecture.module(site)).detach(),
            damped(moments.inputs(site), INPUT_DAMPING),
            damped(moments.gradients(site), GRADIENT_DAMPING),
        )
        for site in sites
    }
    dense = {site: architecture.module(site) for site in sites}
    draw = random.Random(options.seed)
    plans = []
    for _ in range(options.plans):
        share, low, high = draw.uniform(0.1, 1.0), draw.uniform(0.1, 0.5), draw.uniform(0.5, 0.95)
        predicted = 0.0
        for site in sites:
            architecture.replace(site, dense[site])
            if draw.random() < share:
                rank = max(1, round(draw.uniform(low, high) * min(linear_shape(dense[site]))))
                predicted += float(curves.maps[site][rank])
                put_factors(architecture, site, *parts[site].factors(torch.arange(rank)))
        plans.append({"predicted": predicted, "measured": divergence_between(model, working, text)})
        print(
            f"{len(plans)}/{options.plans}  predicted {predicted:.4f}  measured {plans[-1]['measured']:.4f}", flush=True
        )
    result = {
        "rank_correlation": spearman([p["predicted"] for p in plans], [p["measured"] for p in plans]),
        "plans": plans,
        "calibration": Path(options.calibration).name,
        "text": Path(options.text).name,
        "seed": options.seed,
        **made_with,
    }
    print(f"rank correlation of predicted and measured loss over {len(plans)} plans: {result['rank_correlation']:.3f}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
