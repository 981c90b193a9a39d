"""The mathematics of the published methods against slow, obvious versions: alternation, autograd, loops, lstsq."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taco_svd.baselines.workspace
from taco_svd import compress
from taco_svd.architectures import Architecture, LinearSite
from taco_svd.baselines import Workspace
from taco_svd.baselines.asvd import activation_scaled_svd
from taco_svd.baselines.budget import Budget
from taco_svd.baselines.fwsvd import fisher_weighted_svd
from taco_svd.baselines.kfac import Options, depth_factor, divergence, least_error, options_of, scales
from taco_svd.baselines.modegpt import lost_shares, nystroem, output_moment, query_key_dimensions, value_output
from taco_svd.baselines.replaceme import cosine_distances, linear_bridge
from taco_svd.baselines.svd_llm import input_moments, refit_left_factor
from taco_svd.baselines.whitening import cholesky, whitened_svd
from taco_svd.baselines.workspace import clipped_second_moment
from taco_svd.baselines.zs_svd import drop_effects, zero_sum_ranks
from taco_svd.calibration import Calibration
from taco_svd.decomposition import damped, weighted_svd
from taco_svd.errors import TacoError
from taco_svd.loss_curves import tail_energies
from taco_svd.progress import Silent
from taco_svd.walk import Walk

from .tiny_models import LAYERS, VOCABULARY, tiny_model

# float32 factors of matrices of a few dozen entries a side: a few times sqrt(64) roundings
FLOAT32 = 64 * torch.finfo(torch.float32).eps


def random_moment(size: int, generator: torch.Generator, tokens: int = 200) -> torch.Tensor:
    """E[x x^T] of tokens with a decaying spectrum and correlated channels."""
    scales = torch.logspace(0, -1.5, size, dtype=torch.float64)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, size, generator=generator, dtype=torch.float64) * scales @ mix
    return x.T @ x / tokens


def weighted_loss(difference: torch.Tensor, gradients: torch.Tensor, inputs: torch.Tensor) -> float:
    """tr(G D A D^T)."""
    return float(torch.trace(gradients @ difference @ inputs @ difference.T))


def best_by_alternation(
    weight: torch.Tensor, gradients: torch.Tensor, inputs: torch.Tensor, rank: int, generator: torch.Generator
) -> float:
    """The least weighted loss of any rank-`rank` product, found by solving for one factor at a time."""
    v = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float64)
    for _ in range(3000):
        u = torch.linalg.solve(v @ inputs @ v.T, v @ inputs @ weight.T).T
        v = torch.linalg.solve(u.T @ gradients @ u, u.T @ gradients @ weight)
    return weighted_loss(weight - u @ v, gradients, inputs)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (11, 11)])
@pytest.mark.parametrize("method", ["fwsvd", "asvd", "whitened"])
def test_truncation_is_the_best_in_the_methods_metric(method: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = torch.eye(shape[0], dtype=torch.float64)
    inputs = torch.eye(shape[1], dtype=torch.float64)
    if method == "fwsvd":
        rows = torch.rand(shape[0], generator=generator, dtype=torch.float64) ** 3 + 0.01
        parts, gradients = fisher_weighted_svd(weight, rows), torch.diag(rows)
    elif method == "asvd":
        magnitude = torch.rand(shape[1], generator=generator, dtype=torch.float64) ** 3 + 0.01
        # |W diag(m^0.5)|^2 weighs column j by m_j
        parts, inputs = activation_scaled_svd(weight, magnitude), torch.diag(magnitude)
    else:
        inputs = random_moment(shape[1], generator)
        parts = whitened_svd(weight, inputs)
    for rank in (1, 4):
        u, v = parts.factors(torch.arange(rank))
        found = weighted_loss(weight - u.double() @ v.double(), gradients, inputs)
        best = best_by_alternation(weight, gradients, inputs, rank, generator)
        assert found == pytest.approx(best, rel=1e-4)
        assert found == pytest.approx(float(parts.sigma[rank:].double().square().sum()), rel=1e-4)
        # another metric's truncation is worse: the weighting does something
        left, sigma, right = torch.linalg.svd(weight)
        plain = left[:, :rank] * sigma[:rank] @ right[:rank]
        assert found < weighted_loss(weight - plain, gradients, inputs) * (1 - 1e-3)
    u, v = parts.factors(torch.arange(min(shape)))
    torch.testing.assert_close((u @ v).double(), weight, rtol=100 * FLOAT32, atol=100 * FLOAT32)


def test_channels_and_rows_that_are_never_used_do_no_harm() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    some = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 1.0, 0.5, 3.0])
    for parts in (activation_scaled_svd(weight, some), fisher_weighted_svd(weight, some[:6])):
        u, v = parts.factors(torch.arange(6))
        torch.testing.assert_close(u @ v, weight, rtol=1e-3, atol=1e-3)
    for parts in (activation_scaled_svd(weight, some * 0), fisher_weighted_svd(weight, some[:6] * 0)):
        torch.testing.assert_close(parts.sigma, torch.linalg.svdvals(weight), rtol=FLOAT32, atol=FLOAT32)


def test_cholesky_of_moments_without_full_rank() -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor = cholesky(x.T @ x)
    torch.testing.assert_close(factor @ factor.T, x.T @ x, rtol=0, atol=1e-6)
    assert torch.equal(factor, factor.tril())
    with pytest.raises(TacoError, match="calibration"):
        cholesky(torch.zeros(3, 3))


# -- statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_shared_statistics_against_autograd(name: str, calibration_tokens: torch.Tensor) -> None:
    model = tiny_model(name)
    workspace = Workspace(model, Calibration(calibration_tokens, "tokens", 0))
    moments = workspace.moments()
    assert workspace.moments() is moments
    architecture = Architecture(model)
    samples, length = calibration_tokens.shape
    for site in architecture.sites([0, LAYERS - 1]):
        weight = architecture.module(site).weight
        transposed = name == "gpt2"
        inputs: list[torch.Tensor] = []
        handle = architecture.module(site).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].detach().flatten(0, -2).double())
        )
        fisher, total = torch.zeros(()), torch.zeros(())
        for window in calibration_tokens:
            logits = model(window[None]).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[1:]) / samples
            (gradient,) = torch.autograd.grad(loss, weight)
            gradient = gradient.T if transposed else gradient
            fisher = fisher + gradient.double().square().sum(1)
            total = total + gradient.double()
        handle.remove()
        x = torch.cat(inputs)
        # float32 through a few layers, forward and backward
        close = {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(moments.mean[site], x.mean(0), **close)
        torch.testing.assert_close(moments.magnitude[site], x.abs().mean(0), **close)
        expected = x.T @ x / (samples * length)
        largest = float(expected.abs().max())
        torch.testing.assert_close(moments.inputs(site).double() / largest, expected / largest, rtol=1e-4, atol=1e-5)
        size = float(total.abs().max())
        torch.testing.assert_close(moments.weight_gradient[site].double() / size, total / size, **close)
        torch.testing.assert_close(moments.fisher_rows[site] / fisher.max(), fisher / fisher.max(), **close)


def test_of_a_large_model_only_what_is_asked_for_is_gathered(
    calibration_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    calibration = Calibration(calibration_tokens, "tokens", 0)
    whole = Workspace(model, calibration).moments(kinds=["mean"])
    assert all(getattr(whole, kind) for kind in ("mean", "magnitude", "weight_gradient", "clipped_gradients"))
    monkeypatch.setattr(taco_svd.baselines.workspace, "available_bytes", lambda device: 1000)
    workspace = Workspace(model, calibration)
    some = workspace.moments(kinds=["fisher_rows"])
    assert some.fisher_rows and not (some.mean or some.magnitude or some.weight_gradient or some.clipped_gradients)
    more = workspace.moments(kinds=["fisher_rows", "second", "weight_gradient"])
    assert more is some and not (some.mean or some.clipped_gradients)
    for site, rows in some.fisher_rows.items():  # not added to once more by the second pass
        assert torch.equal(rows, whole.fisher_rows[site])
        assert torch.equal(some.weight_gradient[site], whole.weight_gradient[site])
        assert torch.equal(some.inputs(site), whole.inputs(site))


def test_clipped_second_moment_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(3, 17, 5, generator=generator) * torch.rand(3, 17, 1, generator=generator) ** 8
    gradient[1, 4] = 0
    inner = [gradient[window, token].double() for window in range(3) for token in range(2, 15)]
    mean = sum(float(row.norm()) for row in inner) / len(inner)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    clipped = 0
    for row in inner:
        norm = float(row.norm())
        target = min(max(norm, 0.1 * mean), 10 * mean) if norm else 0.0
        clipped += norm != target
        row = row / norm * target if norm else row
        expected += torch.outer(row, row)
    assert clipped > 5
    torch.testing.assert_close(clipped_second_moment(gradient).double(), expected, rtol=1e-5, atol=1e-6)


# -- SVD-LLM -------------------------------------------------------------------------------------------------


def test_refit_is_least_squares_on_the_new_inputs() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    x = (
        torch.randn(50, 10, generator=generator, dtype=torch.float64)
        @ torch.randn(10, 10, generator=generator).double()
    )
    v = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    u = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    expected = torch.linalg.lstsq(x @ v.T, x @ weight.T).solution.T
    found = refit_left_factor(weight, u, v, x.T @ x, ridge=0.0)
    torch.testing.assert_close(found.double(), expected, rtol=FLOAT32, atol=FLOAT32)
    # an overwhelming ridge leaves the factor as it was
    torch.testing.assert_close(refit_left_factor(weight, u, v, x.T @ x, ridge=1e12).double(), u, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
@torch.no_grad()
def test_layers_run_one_by_one_give_the_models_hidden_states(name: str, calibration_tokens: torch.Tensor) -> None:
    model = tiny_model(name)
    workspace = Workspace(model, Calibration(calibration_tokens, "tokens", 0))
    runner = workspace.runner()
    calls = Walk(workspace.architecture, runner.batches)
    hidden = calls.entering
    for index, layer in enumerate(workspace.architecture.layers):
        expected = runner.layer_inputs(0, [index, index + 1])
        assert torch.equal(hidden[0], expected[index])
        hidden = [calls.run(layer, index, batch, states) for batch, states in enumerate(hidden)]
        assert torch.equal(hidden[0], expected[index + 1])


def test_svd_llm_fits_every_map_on_what_the_compressed_layers_feed_it(calibration_tokens: torch.Tensor) -> None:
    """The factors of the highest layer, from the inputs that the finished compressed model really gives it."""
    model = tiny_model("llama")
    small, plan = compress(model, method="svd-llm", keep=0.6, calibration=calibration_tokens)
    top = LAYERS - 1
    workspace = Workspace(small, Calibration(calibration_tokens, "tokens", 0))
    calls = Walk(workspace.architecture, workspace.runner().batches)
    hidden = calls.entering
    for index in range(top):
        hidden = [calls.run(workspace.architecture.layers[index], index, 0, hidden[0])]
    # inputs inside the layer are those of its dense maps, as in the paper's code
    dense = Architecture(model)
    moments = input_moments(dense, calls, top, list(dense.paths), hidden)
    checked = 0
    for path in dense.paths:
        weight = dense.module(LinearSite(top, path, "")).weight.detach().double()
        factors = small.model.layers[top].get_submodule(path)
        u, v = factors.u.detach().double(), factors.v.detach().double()
        moment = moments[path].double()
        # stationary: no left factor is better for these inputs
        residual = (weight - u @ v) @ moment @ v.T
        assert float(residual.norm()) < 1e-3 * float((weight @ moment @ v.T).norm())
        checked += 1
    assert checked == 7 and plan.method == "svd-llm"


# -- ZS-SVD --------------------------------------------------------------------------------------------------


def test_drop_effects_against_autograd() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    x = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    parts = whitened_svd(weight, random_moment(9, generator))

    def loss(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix @ x).tanh().square().sum()

    sigma = parts.sigma.double().requires_grad_(True)
    loss(parts.left.double() * sigma @ parts.right.double()).backward()
    free = (parts.left.double() * parts.sigma.double() @ parts.right.double()).requires_grad_(True)
    loss(free).backward()
    assert sigma.grad is not None and free.grad is not None
    expected = -parts.sigma.double() * sigma.grad
    torch.testing.assert_close(drop_effects(parts, free.grad), expected, rtol=1e-9, atol=1e-9)


def zero_sum_slowly(effects: dict, shapes: dict, parameters: int) -> dict:
    """The rule of the paper, looking at every matrix's offer anew in each step."""
    ranks = {key: len(values) for key, values in effects.items()}
    total = 0.0
    while sum(min(m * n, ranks[key] * (m + n)) for key, (m, n) in shapes.items()) > parameters:
        offers = [(abs(values[ranks[key] - 1]), key) for key, values in effects.items() if ranks[key] > 1]
        wanted = [(size, key) for size, key in offers if (effects[key][ranks[key] - 1] >= 0) == (total <= 0)]
        _, key = min(wanted or offers)
        total += effects[key][ranks[key] - 1]
        ranks[key] -= 1
    return {key: rank for key, rank in ranks.items() if rank * sum(shapes[key]) < shapes[key][0] * shapes[key][1]}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.3, 0.95))
def test_zero_sum_selection_against_the_rule_itself(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: tuple(torch.randint(4, 14, (2,), generator=generator).tolist()) for key in range(5)}
    effects = {key: torch.randn(min(shape), generator=generator).tolist() for key, shape in shapes.items()}
    parameters = int(share * sum(m * n for m, n in shapes.values()))
    if parameters < sum(m + n for m, n in shapes.values()):
        with pytest.raises(TacoError, match="rank 1"):
            zero_sum_ranks(effects, shapes, parameters)
        return
    ranks = zero_sum_ranks(effects, shapes, parameters)
    assert ranks == zero_sum_slowly(effects, shapes, parameters)
    assert sum(ranks[key] * (m + n) if key in ranks else m * n for key, (m, n) in shapes.items()) <= parameters


def test_zero_sum_keeps_the_sum_near_zero() -> None:
    effects = {key: [0.5 - (index + key) % 2 for index in range(20)] for key in range(6)}
    ranks = zero_sum_ranks(effects, dict.fromkeys(effects, (20, 20)), 6 * 200)
    dropped = sum(sum(effects[key][rank:]) for key, rank in ranks.items())
    assert abs(dropped) <= 0.5


# -- KFAC and LEMS -------------------------------------------------------------------------------------------


def test_tail_energy_and_depth_factor() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0])
    assert tail_energies(sigma).tolist() == [14.0, 5.0, 1.0, 0.0]
    assert depth_factor(0, 8, 1.3, 5.0) == pytest.approx(6.0)
    assert depth_factor(7, 8, 1.3, 5.0) == pytest.approx(1.0)
    sums = [sum((k + 1) ** -1.3 for k in range(layer, 8)) for layer in range(8)]
    for layer in range(8):
        assert depth_factor(layer, 8, 1.3, 5.0) == pytest.approx(1 + 5 * (sums[layer] - sums[7]) / (sums[0] - sums[7]))
    assert depth_factor(0, 1, 1.0, 5.0) == 1.0


def test_options_end_in_dense_and_never_cost_more() -> None:
    tail = tail_energies(torch.linspace(5, 1, 10))
    options = options_of(tail, (10, 15), 2.0, 0.3)
    assert options.ranks == (2, 3, 4, 5, 0)  # break-even is 6, where factors cost what the matrix costs
    assert options.costs.tolist() == [50, 75, 100, 125, 150]
    assert options.errors[-1] == 0 and float(options.errors[1]) == pytest.approx(2 * float(tail[3]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_allocation_against_all_combinations(seed: int, place: float) -> None:
    """Within the budget, and no further from the best of all combinations than one step of one matrix."""
    generator = torch.Generator().manual_seed(seed)
    options = {}
    for key in range(3):
        sigma = torch.rand(9, generator=generator).sort(descending=True).values
        scale = float(torch.rand((), generator=generator)) + 0.1
        options[key] = options_of(tail_energies(sigma), (9, 12), scale, 0.3)
    least = sum(float(o.costs.min()) for o in options.values())
    parameters = int(least + place * (3 * 9 * 12 - least))
    choice = least_error(options, parameters)

    def of(indices: tuple[int, ...]) -> tuple[float, float]:
        pairs = [(options[key], index) for key, index in zip(options, indices, strict=True)]
        return sum(float(o.costs[i]) for o, i in pairs), sum(float(o.errors[i]) for o, i in pairs)

    cost, error = of(tuple(choice[key] for key in options))
    everything = itertools.product(*(range(len(o.ranks)) for o in options.values()))
    best = min(error for cost, error in map(of, everything) if cost <= parameters)
    step = max(float((o.errors[:-1] - o.errors[1:]).max()) for o in options.values())
    assert cost <= parameters and best - 1e-12 <= error <= best + step + 1e-12


def test_allocation_out_of_reach() -> None:
    options = {0: Options((1, 0), torch.tensor([5.0, 9.0]), torch.tensor([1.0, 0.0]))}
    with pytest.raises(TacoError, match="budget"):
        least_error(options, 4)


def test_divergence_against_its_definition(calibration_tokens: torch.Tensor) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    runner = Workspace(other, Calibration(calibration_tokens, "tokens", 0)).runner()
    with torch.no_grad():
        p = model(calibration_tokens).logits.double().softmax(-1)
        q = other(calibration_tokens).logits.double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert expected > 1e-3
    assert divergence(runner, [p.log().float()]) == pytest.approx(expected, rel=1e-3)


def test_errors_are_scaled_to_the_divergence_of_one_cut_matrix(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    workspace = Workspace(model, Calibration(calibration_tokens, "tokens", 0))
    found = scales(workspace, Silent(), (1, 3))
    assert set(found) == set(workspace.sites((1, 3)))
    for site in (LinearSite(3, "mlp.up_proj", "mlp"), LinearSite(1, "self_attn.v_proj", "attention")):
        weight = workspace.architecture.module(site).weight
        m, n = weight.shape
        rank = max(1, round(0.1 * m * n / (m + n)))
        moments = workspace.moments()
        clipped = moments.clipped_gradients[site]
        parts = weighted_svd(weight.detach(), damped(moments.inputs(site), 0.1), damped(clipped, 0.3))
        u, v = parts.factors(torch.arange(rank))
        with torch.no_grad():
            p = model(calibration_tokens).logits.double().log_softmax(-1)
            dense = weight.clone()
            weight.copy_(u @ v)
            q = model(calibration_tokens).logits.double().log_softmax(-1)
            weight.copy_(dense)
        expected = float((p.exp() * (p - q)).sum(-1).mean()) / float(parts.sigma[rank:].double().square().sum())
        assert found[site] == pytest.approx(expected, rel=1e-2)


def test_lems_spends_on_what_was_measured_to_matter(calibration_tokens: torch.Tensor) -> None:
    """A layer whose output is all but silent is cut to the least ranks; the others get what it leaves."""
    model = tiny_model("llama")
    with torch.no_grad():
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(path).weight *= 1e-4
    _, plan = compress(model, method="kfac", keep=0.75, calibration=calibration_tokens)
    shapes = Workspace(model, Calibration(calibration_tokens, "tokens", 0)).architecture
    costs = []
    for layer in range(LAYERS):
        cost = 0
        for path in shapes.paths:
            m, n = shapes.module(LinearSite(layer, path, "")).weight.shape
            rank = plan.structure.low_rank.get(layer, {}).get(path)
            cost += m * n if rank is None else rank * (m + n)
            if layer == 2:
                assert rank == round(0.3 * m * n / (m + n))
        costs.append(cost)
    assert costs[2] < 0.5 * min(costs[:2] + costs[3:])
    assert plan.options["divergence"] > 0 and 0 <= plan.options["alpha"] <= 3 and 0 <= plan.options["gamma"] <= 7


# -- MoDeGPT -------------------------------------------------------------------------------------------------


def test_output_moment_against_data() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64) + 1
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    for b in (bias, None):
        y = x @ weight.T + (0 if b is None else b)
        found = output_moment(weight, b, x.T @ x / 40, x.mean(0))
        torch.testing.assert_close(found, y.T @ y / 40, rtol=1e-12, atol=1e-12)


def test_nystroem_against_least_squares_and_explicit_leverage() -> None:
    generator = torch.Generator().manual_seed(6)
    # six units that share a strong signal and six weaker ones of their own: the latter are hard to replace
    own = torch.randn(300, 12, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 0.6, 12).double()
    shared = torch.randn(300, 1, generator=generator, dtype=torch.float64)
    hidden = own + shared * torch.tensor([1.0] * 6 + [0.0] * 6).double()
    stay, back = nystroem(hidden.T @ hidden / 300, 300, 7)
    # ridge leverage from the singular vectors of the hidden states: sum_j v_ij^2 s_j^2 / (s_j^2 + 1)
    _, s, vh = torch.linalg.svd(hidden, full_matrices=False)
    leverage = (vh.T.square() * (s.square() / (s.square() + 1))).sum(1)
    assert stay.tolist() == sorted(leverage.argsort(descending=True)[:7].tolist())
    assert stay.tolist() != sorted(hidden.square().sum(0).argsort(descending=True)[:7].tolist())
    expected = torch.linalg.lstsq(hidden[:, stay], hidden).solution.T
    torch.testing.assert_close(back, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back[stay], torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rotary", [False, True])
def test_query_key_dimensions_against_a_loop(rotary: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    groups, per_group, size, width = 3, 2, 8, 4
    query = torch.rand(groups * per_group * size, generator=generator)
    key = torch.rand(groups * size, generator=generator)
    found = query_key_dimensions(query, key, groups, width, rotary)
    for group in range(groups):
        scores = {}
        for dimension in range(size // 2 if rotary else size):
            inside = [dimension, dimension + size // 2] if rotary else [dimension]
            score = 0.0
            for head in range(group * per_group, (group + 1) * per_group):
                q = math.sqrt(sum(float(query[head * size + i]) for i in inside))
                k = math.sqrt(sum(float(key[group * size + i]) for i in inside))
                score += q * k
            scores[tuple(inside)] = score
        best = sorted(scores, key=lambda inside: scores[inside], reverse=True)[: width // (2 if rotary else 1)]
        assert found[group].tolist() == sorted(itertools.chain(*best))


def test_value_output_is_the_best_narrow_pair() -> None:
    generator = torch.Generator().manual_seed(8)
    output = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    moment = random_moment(6, generator)
    encode, decode = value_output(output, moment, 3)
    assert encode.shape == (3, 6) and decode.shape == (10, 3)
    identity = torch.eye(10, dtype=torch.float64)
    found = weighted_loss(output - decode @ encode, identity, moment)
    assert found == pytest.approx(best_by_alternation(output, identity, moment, 3, generator), rel=1e-6)


def test_values_that_are_always_zero_have_a_finite_narrow_pair() -> None:
    output = torch.randn(10, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    encode, decode = value_output(output, torch.zeros(6, 6), 3)
    # in the model's dtype they must be numbers; nothing is better than the plain truncation
    left, sigma, right = torch.linalg.svd(output, full_matrices=False)
    torch.testing.assert_close(decode @ encode, (left[:, :3] * sigma[:3]) @ right[:3])
    assert torch.isfinite(encode.to(torch.float16)).all() and torch.isfinite(decode.to(torch.float16)).all()


def test_layers_of_little_influence_lose_more() -> None:
    scores = [0.9, 0.05, 0.1, 0.02, 0.3]
    lost = lost_shares(scores, 0.2, temperature=0.1)
    exact = [math.exp(-score / 0.1) for score in scores]
    assert lost == pytest.approx([5 * 0.2 * value / sum(exact) for value in exact])
    # here two layers would lose more than may be: they lose that, the others share the rest in proportion
    lost = lost_shares(scores, 0.5, temperature=0.1)
    assert sum(lost) / 5 == pytest.approx(0.5) and max(lost) == pytest.approx(0.8)
    free = [index for index, value in enumerate(lost) if value < 0.8 - 1e-9]
    assert 1 < len(free) < 5
    for one, other in itertools.combinations(free, 2):
        assert lost[one] / lost[other] == pytest.approx(exact[one] / exact[other])
    assert lost_shares(scores, 0.9) == pytest.approx([0.9] * 5)


# -- ReplaceMe -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cosine_distances_against_hidden_states(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    found = cosine_distances(Workspace(model, Calibration(calibration_tokens, "tokens", 0)).runner(), 2)
    captured: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda _, __, out: captured.append(out)) for layer in model.model.layers]
    captured.append(model.model.embed_tokens(calibration_tokens))
    model(calibration_tokens)
    for handle in handles:
        handle.remove()
    for start in range(LAYERS - 1):
        a, b = captured[start].flatten(0, 1).double(), captured[start + 2].flatten(0, 1).double()
        expected = 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
        assert found[start] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "phi3"])
@torch.no_grad()
def test_replaceme_is_least_squares_folded_into_the_last_matrix(name: str) -> None:
    """The layer before the run, in the finished model, against lstsq on the dense model's hidden states."""
    model = tiny_model(name)
    tokens = torch.randint(3, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(9))
    with torch.enable_grad():
        small, plan = compress(model, method="replaceme", layers=[2, 3], calibration=tokens)
    runner = Workspace(model, Calibration(tokens, "tokens", 0)).runner()
    down = runner.architecture.module(runner.architecture.sites([1], "mlp")[-1])
    written: list[torch.Tensor] = []
    handle = down.register_forward_hook(lambda _, __, output: written.append(output.flatten(0, -2).double()))
    hidden = runner.layer_inputs(0, [2, 4])
    handle.remove()
    m = written[0]
    before, after = (hidden[index].flatten(0, -2).double() for index in (2, 4))
    transform = torch.linalg.lstsq(m, after - before + m).solution.T
    expected = before - m + m @ transform.T
    replaced = Workspace(small, Calibration(tokens, "tokens", 0)).runner().layer_inputs(0, [2])[2].flatten(0, -2)
    # T comes from moments in float64 with a ridge of 1e-6, is rounded to float32 and applied in it
    torch.testing.assert_close(replaced.double(), expected, rtol=2e-3, atol=2e-3)
    assert float((expected - after).norm()) < 0.99 * float((before - after).norm())
    assert plan.result["parameters"] == sum(parameter.numel() for parameter in small.parameters())


def test_linear_bridge_against_lstsq() -> None:
    generator = torch.Generator().manual_seed(10)
    m = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    d = (
        torch.randn(60, 5, generator=generator, dtype=torch.float64)
        + m @ torch.randn(5, 5, generator=generator).double()
    )
    expected = torch.linalg.lstsq(m, d).solution.T
    torch.testing.assert_close(linear_bridge(m.T @ m / 60, d.T @ m / 60), expected, rtol=1e-4, atol=1e-4)


# -- budgets -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(3, 60), st.integers(3, 60)), min_size=1, max_size=7), st.floats(0.05, 0.999))
def test_uniform_ranks_spend_the_budget_and_no_more(sizes: list[tuple[int, int]], share: float) -> None:
    shapes = {f"m{number}": size for number, size in enumerate(sizes)}
    layers = (0, 1, 2)
    dense = 3 * sum(m * n for m, n in sizes)
    budget = Budget(layers, int(share * dense), shapes)
    ranks = budget.ranks()
    spent = 3 * sum(ranks[path] * sum(shapes[path]) for path in shapes)
    least = 3 * sum(map(sum, sizes))
    assert spent <= max(budget.parameters, least)
    if all(budget.share * m * n / (m + n) >= 1 for m, n in sizes):
        for path, (m, n) in shapes.items():
            assert abs(ranks[path] - budget.share * m * n / (m + n)) < 1
    # what is left over would not buy another rank for any path that was cut short
    cut = [path for path, (m, n) in shapes.items() if ranks[path] < budget.share * m * n / (m + n)]
    assert all(budget.parameters - spent < 3 * sum(shapes[path]) for path in cut)


def test_decompositions_are_taken_of_the_dense_weights() -> None:
    """A workspace serves many compressions: none of them may see factors that another has put in place."""
    model = tiny_model("llama")
    tokens = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(12))
    calibration = Calibration(tokens, "tokens", 0)
    workspace = Workspace(model, calibration)
    for method in ("svd-llm", "zs-svd", "kfac"):
        compress(model, method=method, keep=0.6, calibration=calibration, workspace=workspace)
    for method in ("fwsvd", "svd-llm", "zs-svd", "kfac"):
        shared, _ = compress(model, method=method, keep=0.8, calibration=calibration, workspace=workspace)
        alone, _ = compress(model, method=method, keep=0.8, calibration=calibration)
        for here, there in zip(shared.parameters(), alone.parameters(), strict=True):
            assert torch.equal(here, there), method
