"""The allocator against exhaustive search, its curves, and what they predict."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch

from taco_svd import TacoError, compress, loss_curves
from taco_svd.allocation import (
    Option,
    _spend_the_rest,
    allocate,
    allocate_within,
    cheapest_layers,
    factor_parameters,
    lower_hull,
    map_options,
)
from taco_svd.architectures import Architecture, LinearSite, linear_shape
from taco_svd.bridging import BridgeMoments, fit_bridge
from taco_svd.budget import BRIDGE_EPS, Sizes, structure_parameters
from taco_svd.calibration import Calibration
from taco_svd.divergence import kl_per_token
from taco_svd.loss_curves import LossCurves, scaled_curve, tail_energies
from taco_svd.progress import Silent
from taco_svd.replacement import LowRankLinear
from taco_svd.run_bridges import bridge_rank, bridged, runs_to_bridge
from taco_svd.taco import Analysis
from taco_svd.walk import Walk

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


@pytest.mark.parametrize("shape, plain, pivoted", [((128, 384), 36, 37), ((4096, 4096), 416, 432)])
def test_what_is_left_buys_nothing_worse(shape: tuple[int, int], plain: int, pivoted: int) -> None:
    """The last rank without a pivot takes more parameters than the first with one, for more loss."""
    tail = tail_energies(torch.linspace(1, 0.01, min(shape)))
    options = map_options(*shape, tail)
    by_rank = {option.rank: option for option in options}
    assert by_rank[plain].cost > by_rank[pivoted].cost and by_rank[plain].loss > by_rank[pivoted].loss
    site, chosen = LinearSite(0, "mlp.up_proj", "mlp"), dict[LinearSite, Option]()
    for spare in (by_rank[plain].cost - by_rank[pivoted].cost, 10 * shape[1]):
        chosen[site] = by_rank[pivoted]
        _spend_the_rest(chosen, {site: options}, spare)
        assert chosen[site].loss <= by_rank[pivoted].loss and chosen[site].cost <= by_rank[pivoted].cost + spare


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


def test_layers_are_taken_out_as_exhaustive_search_does() -> None:
    """Every way to keep, remove and bridge six layers, costs drawn at random."""
    depth = 6
    generator = torch.Generator().manual_seed(4)
    for trial in range(30):
        side_by_side = trial % 2 == 0
        stays, goes = (torch.rand(depth, generator=generator).tolist() for _ in range(2))
        runs = [(a, b) for a in range(1, depth) for b in range(a, min(depth, a + 3))]
        bridges = {run: float(torch.rand((), generator=generator)) * 1.5 for run in runs}
        best = (float("inf"), None)
        for kinds in itertools.product("sgb", repeat=depth):
            # a stretch of b is one bridged run: it follows a layer that stays, and is followed by one
            text = "".join(kinds)
            stretches = [(m.start(), m.end() - 1) for m in re.finditer("b+", text)]
            allowed = all(
                run in bridges and text[run[0] - 1] == "s" and (run[1] + 1 == depth or text[run[1] + 1] == "s")
                for run in stretches
            )
            if "s" in text and allowed and (side_by_side or "gg" not in text):
                total = sum(bridges[run] for run in stretches)
                total += sum({"s": stays, "g": goes}[kind][layer] for layer, kind in enumerate(text) if kind != "b")
                best = min(best, (total, text))
        gone = cheapest_layers(stays, goes, bridges, side_by_side)
        found = sum(bridges[run] for run in gone.bridged) + sum(goes[layer] for layer in gone.plainly)
        found += sum(stays[layer] for layer in range(depth) if layer not in gone.layers)
        assert found == pytest.approx(best[0]), (gone, best)


def test_a_cheap_bridge_is_chosen_and_counted() -> None:
    architecture, curves = toy_curves()
    dense = Sizes.of(architecture).total
    hidden = architecture.model.config.hidden_size
    curves = dataclasses.replace(curves, bridged={(1, 2): (4, 1e-6)})
    found = allocate(architecture, curves, int(0.6 * dense))
    assert found.structure.removed == (1, 2)
    assert found.structure.bridges[0].after == 0 and found.structure.bridges[0].rank == 4
    saved = sum(
        out * wide - factor_parameters(out, wide, rank)[0]
        for layer, ranks in found.structure.low_rank.items()
        for path, rank in ranks.items()
        for out, wide in [linear_shape(architecture.module(site_of(architecture, layer, path)))]
    )
    bare = dataclasses.replace(found.structure, low_rank={}, pivoted={})
    assert found.parameters == structure_parameters(architecture, bare) - saved
    assert hidden * (2 * 4 + 1) == structure_parameters(architecture, found.structure) - structure_parameters(
        architecture, dataclasses.replace(found.structure, bridges=())
    )
    assert found.parameters <= 0.6 * dense
    without = allocate(architecture, dataclasses.replace(curves, bridged={}), int(0.6 * dense))
    assert found.predicted_loss < without.predicted_loss and not without.structure.bridges


def site_of(architecture: Architecture, layer: int, path: str) -> LinearSite:
    return next(site for site in architecture.sites([layer]) if site.path == path)


def test_bridges_are_fitted_on_other_windows_than_they_are_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_curves, "MEASURED_TOKENS", 24)
    model = tiny_model("llama")
    tokens = torch.randint(3, VOCABULARY, (10, 12), generator=torch.Generator().manual_seed(3))
    analysis = Analysis(model, Calibration(tokens, "tokens", 0))
    curves = analysis.curves({}, Silent())
    assert set(curves.bridged) == set(runs_to_bridge(model.config.num_hidden_layers)) and all(
        loss >= 0 for _, loss in curves.bridged.values()
    )
    # what was measured for one run, computed the long way
    run = (1, 2)
    h = model(tokens[:2], output_hidden_states=True).hidden_states[1].detach()
    changed = bridged(analysis.store, run, h)
    walk = Walk(Architecture(model), [tokens[:2]])
    with torch.no_grad():
        leaving = changed
        for layer in range(3, model.config.num_hidden_layers):
            leaving = walk.run(model.model.layers[layer], layer, 0, leaving)
        expected = float(kl_per_token(model(tokens[:2]).logits, walk.logits(0, leaving)).double().mean())
    assert curves.bridged[run][1] == pytest.approx(expected, rel=1e-4)
    moments = BridgeMoments(BRIDGE_EPS)
    states = model(tokens[2:], output_hidden_states=True).hidden_states
    moments.add(states[1].detach(), states[3].detach())
    u, v, _ = fit_bridge(moments, bridge_rank(model.config.hidden_size))
    kept = analysis.store.get("run-bridge/1-2")
    torch.testing.assert_close(kept["u"] @ kept["v"], u @ v, rtol=1e-3, atol=1e-5)


def test_a_loss_that_may_be_is_met_by_the_smallest_model() -> None:
    architecture, curves = toy_curves()
    large = allocate(architecture, curves, int(0.5 * Sizes.of(architecture).total)).predicted_loss
    sizes: list[int] = []
    for most in (0.02 * large, 0.1 * large, 0.5 * large):
        found = allocate_within(architecture, curves, most)
        assert found.predicted_loss <= most
        sizes.append(found.parameters)
        # the dual problem: that loss is not to be had for noticeably less
        smaller = allocate(architecture, curves, int(0.98 * found.parameters))
        assert smaller.predicted_loss > most
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_a_loss_that_no_change_keeps_to_is_refused() -> None:
    architecture, curves = toy_curves()
    with pytest.raises(TacoError, match="1e-30 nats per token is out of reach"):
        allocate_within(architecture, curves, 1e-30)
