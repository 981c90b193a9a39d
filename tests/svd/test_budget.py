"""Budgets: met, and not by far; refused where they cannot be."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from taco_svd import TacoError, compress
from taco_svd.architectures import Architecture
from taco_svd.budget import Sizes, bridge_structure, layers_and_ratio, runs, structure_parameters

from .tiny_models import LAYERS, tiny_model


@pytest.mark.parametrize("keep", [0.95, 0.8, 0.6, 0.5])
@pytest.mark.parametrize("method", ["removal", "svd", "taco", "bridge"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_budget_is_met_and_used(name: str, method: str, keep: float, calibration_tokens: torch.Tensor) -> None:
    model = tiny_model(name)
    small, plan = compress(model, method=method, keep=keep, calibration=calibration_tokens)
    total = sum(parameter.numel() for parameter in model.parameters())
    stored = [*small.parameters(), *(buffer for name, buffer in small.named_buffers() if name.endswith(".pivot"))]
    share = sum(tensor.numel() for tensor in stored) / total
    assert share == plan.result["share"] and share <= keep
    sizes = Sizes.of(Architecture(model))
    if method in ("removal", "bridge"):
        step = sizes.layer  # whole layers; a bridge of the smallest rank may cost another one
        slack = 1 if method == "removal" else 2
    else:  # one rank more in every map of every redundant layer
        step, slack = len(plan.redundant) * sum(m + n for m, n in sizes.linear_shapes), 1
    assert share > keep - slack * step / total


@pytest.mark.parametrize(
    "method, arguments, says",
    [
        ("taco", {"keep": 0.01}, "cannot be reached"),
        ("removal", {"keep": 0.01}, "cannot be reached"),
        ("taco", {"keep": 0.8, "layers": 2}, "not both"),
        ("taco", {}, "--keep"),
        ("taco", {"keep": 1.0}, "below 1"),
        ("taco", {"keep": 0.0}, "above 0"),
        ("taco", {"keep": -3.0}, "above 0"),
        ("taco", {"layers": 0}, "between 1 and 4"),
        ("taco", {"layers": LAYERS}, "between 1 and 4"),
        ("taco", {"layers": 2, "compression_ratio": 1.0}, "below 1"),
        ("taco", {"layers": 2, "compression_ratio": 0.0}, "above 0"),
        ("taco", {"keep": 0.8, "compression_ratio": 0.5}, "follows from the budget"),
        ("removal", {"layers": 2, "compression_ratio": 0.5}, "no meaning"),
        ("taco", {"layers": [1, 1]}, "different"),
        ("taco", {"layers": [1, 7]}, "0..4"),
        ("taco", {"layers": 1, "bridge_rank": 4}, "--method bridge"),
        ("bridge", {"layers": 1, "bridge_rank": 33}, "between 1 and the hidden size"),
        ("magic", {"layers": 1}, "--method"),
        ("taco", {"layers": 1, "importance": "magic"}, "--importance"),
        ("removal", {"layers": [1], "importance": "greedy"}, "these are named"),
        ("replaceme", {"layers": 1, "importance": "greedy"}, "its own way"),
        ("asvd", {"keep": 0.8, "importance": "angular"}, "compresses all layers"),
        ("taco", {"max_latency": 0.8, "importance": "greedy"}, "compresses all layers"),
        ("taco", {"max_kl": 0.01, "importance": "greedy"}, "compresses all layers"),
        ("taco", {"max_kl": 0.01, "keep": 0.8}, "--max-kl is a budget of its own"),
        ("taco", {"max_kl": 0.01, "layers": 2}, "--max-kl is a budget of its own"),
        ("taco", {"max_kl": 0.01, "compression_ratio": 0.5}, "--max-kl decides every rank"),
        ("taco", {"max_kl": 0.01, "max_latency": 0.8}, "not both"),
        ("svd", {"max_kl": 0.01}, "--max-kl goes with --method taco"),
        ("taco", {"max_kl": 0.0}, "above 0"),
        ("taco", {"max_kl": float("nan")}, "above 0"),
        ("taco", {"max_kl": 1e-30}, "out of reach"),
        ("paper", {"layers": 1, "consistency": False}, "--no-consistency"),
    ],
)
def test_wrong_budgets_are_refused(
    method: str, arguments: dict[str, Any], says: str, calibration_tokens: torch.Tensor
) -> None:
    with pytest.raises(TacoError, match=says):
        compress(tiny_model("llama"), method=method, calibration=calibration_tokens, **arguments)


def test_taco_reaches_what_only_all_layers_together_give(calibration_tokens: torch.Tensor) -> None:
    """The paper's way leaves one layer as it is, which in a shallow model is a good part of it; taco need not."""
    model = tiny_model("llama")
    with pytest.raises(TacoError, match=r"--method paper: with all layers but one redundant"):
        compress(model, method="paper", keep=0.25, calibration=calibration_tokens)
    plan = compress(model, method="taco", keep=0.25, calibration=calibration_tokens)[1]
    assert 0.24 < plan.result["share"] <= 0.25 and len(plan.redundant) < LAYERS
    with pytest.raises(TacoError, match=r"--keep 0.1 .* taco: with rank 1 everywhere, 12.8% of the parameters remain"):
        compress(model, method="taco", keep=0.1, calibration=calibration_tokens)


def test_sizes_count_tied_parameters_once() -> None:
    model = tiny_model("llama")
    sizes = Sizes.of(Architecture(model))
    assert sizes.total == sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())
    assert (sizes.depth, len(sizes.linear_shapes)) == (LAYERS, 7)
    assert layers_and_ratio(sizes, "taco", None, 2, None) == (2, 0.7)
    assert layers_and_ratio(sizes, "removal", None, 2, None) == (2, None)


@pytest.mark.parametrize("rank", [None, 1, 16, 32])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.85])
def test_bridges_of_any_rank_fit_into_the_budget(keep: float, rank: int | None) -> None:
    architecture = Architecture(tiny_model("llama"))
    sizes = Sizes.of(architecture)
    count, _ = layers_and_ratio(sizes, "bridge", keep, None, None, rank)
    for gone in itertools.combinations(range(LAYERS), count):
        assert (
            structure_parameters(architecture, bridge_structure(architecture, list(gone), rank)) <= keep * sizes.total
        )


def test_runs() -> None:
    assert runs([5, 1, 2, 7, 8, 9]) == [(1, 2), (5, 5), (7, 9)]
    assert runs([]) == []


def test_a_budget_of_quality(calibration_tokens: torch.Tensor) -> None:
    shares = []
    for most in (0.001, 0.05):
        compressed, plan = compress(tiny_model("llama"), max_kl=most, calibration=calibration_tokens)
        assert plan.result["predicted_loss"] <= most == plan.result["budget"]
        assert plan.result["budget_unit"] == "nats per token" and plan.structure == compressed.structure
        shares.append(plan.result["share"])
    assert shares[1] < shares[0] < 1
