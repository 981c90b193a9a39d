"""Re-fits against ordinary least squares, and what they do to a model's residual stream."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from taco_svd import compress
from taco_svd.architectures import Architecture
from taco_svd.calibration import Calibration
from taco_svd.consistency import FitMoments, HeldOutMoments, refit
from taco_svd.walk import Walk, residual_writers, watching

from .test_mixture_of_experts import build
from .tiny_models import CONFIGS, VOCABULARY, tiny_model


def moments(inputs: torch.Tensor, missing: torch.Tensor, affine: bool, parts: int = 3) -> FitMoments:
    found = FitMoments(affine)
    for s, e in zip(inputs.chunk(parts), missing.chunk(parts), strict=True):
        found.add(s, e)
    return found


@pytest.mark.parametrize("affine", [False, True])
def test_refit_is_ridge_regression(affine: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    s = torch.randn(300, 7, generator=generator, dtype=torch.float64) + affine
    truth = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    e = s @ truth.T + 0.1 * torch.randn(300, 5, generator=generator, dtype=torch.float64) + affine * 2.0
    found = refit(moments(s[:200], e[:200], affine), moments(s[200:], e[200:], affine), ridges=(1e-2,))
    inputs = torch.cat([s, torch.ones(300, 1, dtype=torch.float64)], 1) if affine else s
    # the same problem by an augmented least-squares system, without normal equations
    weight = (1e-2 * float((inputs[:200].square().sum(0)).mean())) ** 0.5
    rows = torch.cat([inputs[:200], weight * torch.eye(inputs.shape[1], dtype=torch.float64)])
    right = torch.cat([e[:200], torch.zeros(inputs.shape[1], 5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, right).solution.T
    assert found.change is not None and torch.allclose(found.change, expected, atol=1e-9)
    left = e[200:] - inputs[200:] @ expected.T
    assert found.after == pytest.approx(float(left.square().sum(1).mean()), rel=1e-9)
    assert found.before == pytest.approx(float(e[200:].square().sum(1).mean()), rel=1e-12)


def test_refit_that_does_not_generalise_is_refused() -> None:
    generator = torch.Generator().manual_seed(4)
    s = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    e = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    held = refit(moments(s[:20], e[:20], False), moments(s[20:], e[20:], False), ridges=(1e-9,))
    assert held.change is None and held.after == held.before
    nothing = refit(moments(s * 0, e, False), moments(s * 0, e, False))
    assert nothing.change is None


def plain_refit(fit: FitMoments, held: FitMoments, ridges: tuple[float, ...]) -> list[tuple[float, torch.Tensor]]:
    """(error on the held-out windows, change) per strength, by one dense solve in float64 each."""
    found = []
    for ridge in ridges:
        ss, es = fit.ss.double(), fit.es.double()
        regular = ss + ridge * ss.diagonal().mean() * torch.eye(len(ss), dtype=torch.float64)
        change = torch.linalg.solve(regular, es.T).T
        inside = ((change @ held.ss.double()) * change).sum() - 2 * (change * held.es.double()).sum()
        found.append(((held.ee + float(inside)) / held.tokens, change))
    return found


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("outputs", [1, 90, 301])
def test_refit_chooses_and_solves_as_the_plain_one_does(
    outputs: int, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks of columns and of outputs; where there are many, strengths are compared on a sketch of them."""
    monkeypatch.setattr("taco_svd.triangle.BLOCK", 32)
    monkeypatch.setattr("taco_svd.consistency.OUTPUT_BLOCK", 64)
    monkeypatch.setattr("taco_svd.consistency.SKETCHED_OUTPUTS", 64)
    generator = torch.Generator().manual_seed(outputs)
    s = torch.randn(400, 77, generator=generator, dtype=torch.float64) @ torch.randn(
        77, 77, generator=generator, dtype=torch.float64
    )
    truth = torch.randn(outputs, 77, generator=generator, dtype=torch.float64) / 20
    e = s @ truth.T + 4 * torch.randn(400, outputs, generator=generator, dtype=torch.float64) + affine
    fit, held = moments(s[:200], e[:200], affine, 1), moments(s[200:], e[200:], affine, 1)
    # a product is symmetric to rounding; what is above the diagonal counts
    before = (fit.ss.triu() + fit.ss.triu(1).T, held.ss.clone(), held.es.clone())
    ridges = (1e-4, 1e-2, 1.0, 100.0)
    errors = plain_refit(fit, held, ridges)
    found = refit(fit, held, ridges)
    best = min(range(len(ridges)), key=lambda number: errors[number][0])
    assert 0 < best < 3 and found.ridge == ridges[best]  # neither end: the choice is one
    assert found.after == pytest.approx(errors[best][0], rel=1e-9)
    assert torch.allclose(found.change, errors[best][1], rtol=1e-8, atol=1e-10)
    assert all(torch.equal(one, other) for one, other in zip(before, (fit.ss, held.ss, held.es), strict=True))
    assert fit.es is None  # the change is where it was


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("outputs", [3, 301])
def test_few_held_out_tokens_judge_without_sums(outputs: int, affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taco_svd.consistency.OUTPUT_BLOCK", 64)
    monkeypatch.setattr("taco_svd.consistency.SKETCHED_OUTPUTS", 64)
    generator = torch.Generator().manual_seed(7)
    s = torch.randn(230, 77, generator=generator, dtype=torch.float64)
    e = s @ torch.randn(outputs, 77, generator=generator, dtype=torch.float64).T / 20 + affine
    e += torch.randn(230, outputs, generator=generator, dtype=torch.float64)
    found = []
    for kind, tokens in ((FitMoments, 30), (HeldOutMoments, 30)):
        held = kind(affine)
        for start in (200, 200 + tokens // 2):
            held.add(s[start : start + tokens // 2], e[start : start + tokens // 2])
        assert (held.ss is None) == (kind is HeldOutMoments)
        found.append(refit(moments(s[:200], e[:200], affine, 1), held, (1e-2, 1.0)))
    assert found[0].change is not None and found[0].ridge == found[1].ridge
    assert torch.equal(found[0].change, found[1].change)
    assert found[1].after == pytest.approx(found[0].after, rel=1e-9)
    assert found[1].before == pytest.approx(found[0].before, rel=1e-12)


def test_held_out_tokens_are_summed_up_where_they_are_many() -> None:
    s = torch.randn(60, 20, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    held, plain = HeldOutMoments(), FitMoments()
    for part in s.split(10):
        held.add(part, part[:, :3])
        plain.add(part, part[:, :3])
        assert bool(held.kept) == (held.tokens <= 10)
        assert held.tokens == plain.tokens and held.ee == pytest.approx(plain.ee, rel=1e-14)
    torch.testing.assert_close(held.ss, plain.ss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(held.es, plain.es, rtol=1e-13, atol=1e-13)


def test_taken_moments_are_the_same_and_gone() -> None:
    s = torch.randn(40, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for affine in (False, True):
        found = moments(s, s[:, :2], affine, 2)
        expected = found.second_moment()
        assert torch.equal(found.take_second_moment(), expected) and found.ss is None and found.es is None
        torch.testing.assert_close(expected, s.T @ s / 40, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_walk_equals_the_model(name: str) -> None:
    model = tiny_model(name)
    architecture = Architecture(model)
    tokens = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))
    walk = Walk(architecture, tokens.split(2))
    seen: list[torch.Tensor] = []
    hook = architecture.layers[-1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for batch in tokens.split(2):
            model(input_ids=batch, use_cache=False)
    hook.remove()
    for batch, hidden in enumerate(walk.entering):
        for index, layer in enumerate(architecture.layers):
            hidden = walk.run(layer, index, batch, hidden)
        assert torch.equal(hidden, seen[batch])


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_writers_are_the_maps_whose_output_is_the_difference(name: str) -> None:
    model = tiny_model(name)
    architecture = Architecture(model)
    tokens = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    walk = Walk(architecture, [tokens])
    writers = residual_writers(architecture, walk, 2)
    if name.startswith("gemma"):  # normalises what its blocks give before adding it
        assert writers.attention is None and writers.mlp is None
        return
    assert writers.attention is not None and writers.mlp is not None
    written: list[torch.Tensor] = []
    attention, mlp = architecture.module(writers.attention), architecture.module(writers.mlp)
    with watching(attention, lambda _, y: written.append(y)), watching(mlp, lambda _, y: written.append(y)):
        hidden = walk.entering[0]
        out = walk.run(architecture.layers[2], 2, 0, hidden)
    total = hidden + sum(y.view_as(hidden) for y in written)
    assert torch.allclose(out, total, atol=1e-5)


def with_outliers(name: str, dtype: torch.dtype, outlier: float) -> tuple[Architecture, Walk]:
    """A model one of whose features is as large as such features of trained models are, and its walk."""
    model = build(name).to(dtype) if name == "qwen2_moe" else tiny_model(name, dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] *= outlier
        architecture = Architecture(model)
        tokens = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
        return architecture, Walk(architecture, [tokens])


@pytest.mark.parametrize("outlier", [1, 30, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_writers_are_told_from_others_in_streams_with_outliers(dtype: torch.dtype, outlier: float) -> None:
    """A stream is rounded at its largest features' size, a hundred times the others': a gate or a factor must not hide
    in that, and a map that is added as it is must not be lost in it.
    """
    for name, written in (("llama", ("self_attn.o_proj", "mlp.down_proj")), ("gpt2", ("attn.c_proj", "mlp.c_proj"))):
        writers = residual_writers(*with_outliers(name, dtype, outlier), 2)
        assert writers.attention is not None and writers.mlp is not None
        assert (writers.attention.path, writers.mlp.path) == written
    gated = residual_writers(*with_outliers("qwen2_moe", dtype, outlier), 1)  # by a sigmoid: the shared expert's map
    assert gated.mlp is None and gated.added is not None and gated.added.path == "mlp"
    architecture, walk = with_outliers("llama", dtype, outlier)
    for layer in architecture.layers:  # as in Granite: what blocks give is scaled before it is added
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(
                lambda _, __, out: (0.22 * out[0], *out[1:]) if isinstance(out, tuple) else 0.22 * out
            )
    scaled = residual_writers(architecture, walk, 2)
    assert scaled.attention is None and scaled.mlp is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "phi3"])
def test_consistency_brings_the_stream_back(name: str) -> None:
    """On windows that no fit saw; the tiny models' maps are random, so there is much to make up for."""
    model = tiny_model(name)
    tokens = torch.randint(3, VOCABULARY, (48, 16), generator=torch.Generator().manual_seed(2))
    calibration = Calibration(tokens, "random", 0)
    drift = {}
    for consistency in (False, True):
        _, plan = compress(model, method="bridge", layers=[2, 3], calibration=calibration, consistency=consistency)
        drift[consistency] = plan.result["drift"][-1]["relative_error"]
        assert bool(plan.result["consistency"]) == consistency
        for record in plan.result["consistency"]:
            assert record["after"] <= record["before"] and record["adopted"] == (record["after"] < record["before"])
    assert drift[True] < drift[False]


def test_weights_that_were_refitted_are_no_longer_the_source_models() -> None:
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = torch.randint(3, VOCABULARY, (16, 16), generator=torch.Generator().manual_seed(2))
    compressed, plan = compress(model, method="bridge", layers=[2], calibration=Calibration(tokens, "random", 0))
    assert any(record["adopted"] for record in plan.result["consistency"])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    changed = [r for r in plan.result["consistency"] if r["adopted"]]
    kept = list(plan.structure.kept)
    for record in changed:
        ours = compressed.model.layers[kept.index(record["layer"])].get_submodule(record["path"]).weight
        theirs = model.model.layers[record["layer"]].get_submodule(record["path"]).weight
        assert ours.data_ptr() != theirs.data_ptr() and not torch.equal(ours, theirs)


def test_one_window_cannot_be_held_out_so_nothing_is_refitted() -> None:
    tokens = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(2))
    _, plan = compress(tiny_model("llama"), method="taco", keep=0.8, calibration=Calibration(tokens, "random", 0))
    assert plan.result["consistency"] == [] and "measured_loss" not in plan.result


def test_a_plan_carried_out_again_gives_the_same_model() -> None:
    tokens = torch.randint(3, VOCABULARY, (16, 16), generator=torch.Generator().manual_seed(2))
    calibration = Calibration(tokens, "random", 0)
    model = tiny_model("llama")
    first, plan = compress(model, method="taco", keep=0.8, calibration=calibration)
    second, again = compress(model, plan=dataclasses.replace(plan, result={}), calibration=calibration)
    assert again.structure == plan.structure
    for (name, ours), (other, theirs) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs)
