"""The allocator against exhaustive search, its curves, and what they predict."""

from __future__ import annotations

import itertools

import pytest
import torch

from taco_svd import TacoError, compress
from taco_svd.allocation import Sizes
from taco_svd.architectures import Architecture, linear_shape
from taco_svd.budget import allocate, factor_parameters, lower_hull, map_options
from taco_svd.calibration import Calibration
from taco_svd.loss_curves import LossCurves, scaled_curve, tail_energies
from taco_svd.replacement import LowRankLinear

from .tiny_models import VOCABULARY, tiny_model


@pytest.mark.parametrize("out_features, in_features, rank", [(32, 56, 3), (32, 56, 20), (56, 32, 31), (8, 8, 1)])
def test_factor_parameters_are_what_a_module_stores(out_features: int, in_features: int, rank: int) -> None:
    count, pivoted = factor_parameters(out_features, in_features, rank)
    module = LowRankLinear(in_features, out_features, rank, bias=False, pivoted=pivoted)
    assert count == sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()])
    assert count <= rank * (out_features + in_features)


def test_tails_and_scaled_curves() -> None:
    sigma = torch.tensor([4.0, 2.0, 1.0])
    tail = tail_energies(sigma)
    assert tail.tolist() == [21.0, 5.0, 1.0, 0.0]
    curve = scaled_curve(tail, [(1, 10.0), (2, 1.0)])
    assert curve[1] == pytest.approx(10.0) and curve[2] == pytest.approx(1.0) and curve[3] == 0
    assert curve[0] == pytest.approx(42.0)  # constant factor beyond what was measured
    assert scaled_curve(tail, []).tolist() == [0.0] * 4
    assert scaled_curve(tail, [(1, -1.0)]).tolist() == [0.0] * 4
    assert (scaled_curve(tail, [(1, 0.0), (2, 3.0)]).diff() <= 0).all()  # fewer directions never cost less


def toy_curves(model_name: str = "llama") -> tuple[Architecture, LossCurves]:
    architecture = Architecture(tiny_model(model_name))
    generator = torch.Generator().manual_seed(8)
    maps = {}
    for site in architecture.sites():
        full = min(linear_shape(architecture.module(site)))
        sigma = torch.rand(full, generator=generator).sort(descending=True).values
        maps[site] = tail_energies(sigma) * float(torch.rand((), generator=generator))
    return architecture, LossCurves(maps, {})


def test_allocation_is_close_to_the_best_of_all() -> None:
    """Three maps, all other ones dense: every combination is tried."""
    architecture, curves = toy_curves()
    some = list(curves.maps)[3:24:9]
    curves = LossCurves({site: curves.maps[site] for site in some}, {})
    dense = Sizes.of(architecture).total
    choices = [map_options(*linear_shape(architecture.module(site)), curves.maps[site]) for site in some]
    smallest = dense - sum(options[0].parameters - options[-1].parameters for options in choices)
    for budget in torch.linspace(smallest + 1, dense, 9).long().tolist():
        found = allocate(architecture, curves, budget)
        assert found.parameters <= budget
        best = min(
            sum(option.loss for option in combination)
            for combination in itertools.product(*choices)
            if dense - sum(o[0].parameters - c.parameters for o, c in zip(choices, combination, strict=True)) <= budget
        )
        # a Lagrangian misses the optimum by less than one step of one map
        step = max(max(b.loss - a.loss for a, b in itertools.pairwise(options)) for options in choices)
        assert best - 1e-12 <= found.predicted_loss <= best + step


def test_hull_is_convex_and_holds_the_best() -> None:
    _, curves = toy_curves()
    options = map_options(56, 32, next(iter(curves.maps.values())))
    hull = lower_hull(options)
    slopes = [(b.loss - a.loss) / (a.parameters - b.parameters) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    for price in (0.0, 1e-4, 1e-3, 1e-2, 1.0):
        best = min(option.loss + price * option.parameters for option in options)
        assert best == min(option.loss + price * option.parameters for option in hull)


def test_a_layer_that_costs_nothing_is_taken_out() -> None:
    architecture, curves = toy_curves()
    curves = LossCurves(curves.maps, {0: 9.0, 1: 9.0, 2: 9.0, 3: 0.0, 4: 9.0})
    found = allocate(architecture, curves, int(0.85 * Sizes.of(architecture).total))
    assert found.structure.removed == (3,)
    assert all(layer != 3 for layer in found.structure.low_rank)


def test_only_layers_that_may_be_touched_are() -> None:
    architecture, curves = toy_curves()
    found = allocate(architecture, curves, int(0.9 * Sizes.of(architecture).total), layers=[1, 4])
    assert set(found.structure.low_rank) <= {1, 4}


def test_a_budget_out_of_reach_is_refused() -> None:
    architecture, curves = toy_curves()
    with pytest.raises(TacoError, match="cannot be reached"):
        allocate(architecture, curves, 10)


def test_prediction_orders_what_is_measured() -> None:
    tokens = torch.randint(3, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(2))
    model, calibration = tiny_model("llama"), Calibration(tokens, "random", 0)
    results = [
        compress(model, method="taco", keep=keep, calibration=calibration, consistency=False)[1].result
        for keep in (0.9, 0.75, 0.6)
    ]
    predicted = [result["predicted_loss"] for result in results]
    measured = [result["measured_loss"] for result in results]
    assert predicted == sorted(predicted) and measured == sorted(measured)
