"""Degenerate models and statistics: every method gives finite factors or a `TacoError`, and the same bits twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from svd.tiny_models import tiny_model
from transformers import PreTrainedModel

import taco_kernels
from taco_kernels import (
    low_rank_bridge,
    low_rank_linear,
    low_rank_linear_group,
    low_rank_mlp,
    native,
    pivoted_low_rank_linear,
)
from taco_svd import Plan, TacoError, compress, save_compressed
from taco_svd.calibration import Calibration
from taco_svd.decomposition import damped
from taco_svd.methods import METHODS

EVERYWHERE = ("fwsvd", "asvd", "svd-llm", "zs-svd", "kfac", "modegpt")


def arguments(method: str) -> dict[str, object]:
    if method in EVERYWHERE:
        return {"method": method, "keep": 0.85}
    return {"method": method, "layers": 2 if method in ("sleb", "replaceme") else [2, 3]}


def _dead(model: PreTrainedModel) -> None:
    """Neurons that never fire, outputs that nobody reads, a head without values."""
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[::2] = 0
        layer.mlp.down_proj.weight[:, ::3] = 0
        layer.self_attn.v_proj.weight[:4] = 0


def _zero_maps(model: PreTrainedModel) -> None:
    """Whole matrices of zeros, as in blocks that were added to a trained model; one gives zero inputs to the next."""
    for layer in model.model.layers[1:3]:
        for module in (layer.mlp.gate_proj, layer.self_attn.q_proj, layer.mlp.down_proj):
            module.weight.zero_()


def _no_gradient(model: PreTrainedModel) -> None:
    model.model.norm.weight.zero_()


def _no_input(model: PreTrainedModel) -> None:
    model.model.embed_tokens.weight.zero_()


def _huge(model: PreTrainedModel) -> None:
    """Activations of 1e36, whose squares float32 does not hold."""
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.mul_(1e18)
        layer.mlp.down_proj.weight.mul_(1e18)


def _tiny(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(1e-25)


def _rank_one(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.fill_(0.01)


CASES: dict[str, tuple[Callable[[PreTrainedModel], None] | None, torch.dtype]] = {
    "dead neurons": (_dead, torch.float32),
    "zero matrices": (_zero_maps, torch.float32),
    "no gradient": (_no_gradient, torch.float32),
    "no gradient fp16": (_no_gradient, torch.float16),
    "no input": (_no_input, torch.float32),
    "huge": (_huge, torch.float32),
    "tiny": (_tiny, torch.float32),
    "rank one": (_rank_one, torch.float32),
}
# What has no answer, and says so: whitening needs inputs.
NAMED = {(case, method) for case in ("zero matrices", "no input", "huge", "tiny") for method in ("svd-llm", "zs-svd")}
OURS = ("taco", "paper", "bridge", "svd")
BASELINES = ("fwsvd", "asvd", "svd-llm", "zs-svd", "kfac", "modegpt", "replaceme", "sleb")
TRIED = [(case, method) for case in CASES for method in OURS]
TRIED += [(case, method) for case in ("zero matrices", "no gradient", "huge") for method in BASELINES]
TRIED += [(case, "modegpt") for case in ("no input", "tiny", "dead neurons")]
TRIED += [("tiny", "svd-llm"), ("rank one", "kfac")]


@pytest.mark.parametrize("case, method", TRIED)
def test_degenerate_models(case: str, method: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    change, dtype = CASES[case]
    model = tiny_model("llama", dtype)
    with torch.no_grad():
        assert change is not None
        change(model)
    if (case, method) in NAMED:
        with pytest.raises(TacoError, match="zero|finite|NaN|decomposed"):
            compress(model, calibration=tokens, **arguments(method))
        return
    small, plan = compress(model, calibration=tokens, **arguments(method))
    with torch.no_grad():
        assert bool(torch.isfinite(small(tokens).logits).all())
    plan.save(tmp_path / "plan.json")
    Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("method", ["taco", "paper", "bridge", "svd-llm", "modegpt"])
@pytest.mark.parametrize("kind", ["one window of two", "one token again and again", "fp16 with large values"])
def test_statistics_of_low_rank(method: str, kind: str, tokens: torch.Tensor) -> None:
    model = tiny_model("llama", torch.float16 if "fp16" in kind else torch.float32)
    if "fp16" in kind:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(3e3)
    given = tokens[:1, :2] if "two" in kind else torch.full((3, 9), 7) if "again" in kind else tokens
    small, _ = compress(model, calibration=given, **arguments(method))
    with torch.no_grad():
        assert bool(torch.isfinite(small(tokens).logits).all())


@pytest.mark.parametrize("method", METHODS)
def test_overflow_of_the_dense_model_is_named(method: str, tokens: torch.Tensor) -> None:
    model = tiny_model("llama", torch.float16)
    with torch.no_grad():
        for module in (model.model.layers[2].mlp.up_proj, model.model.layers[2].mlp.gate_proj):
            module.weight.mul_(0).add_(6e4)
    with pytest.raises(TacoError, match=r"float16.*Load it in bfloat16 or float32"):
        compress(model, calibration=tokens, **arguments(method))


def test_windows_of_one_token_are_refused(tokens: torch.Tensor) -> None:
    for wrong in (tokens[:, :1], tokens[:0], tokens[0], tokens.int()):
        with pytest.raises(TacoError, match="Calibration tokens must be"):
            Calibration(wrong, "tokens", 0)
        with pytest.raises(TacoError, match="Calibration tokens must be"):
            compress(tiny_model("llama"), method="svd", layers=1, calibration=wrong)


def test_moments_of_nothing_weigh_nothing() -> None:
    assert torch.equal(damped(torch.zeros(3, 3), 0.1), torch.eye(3, dtype=torch.float64))
    with pytest.raises(TacoError, match="not finite"):
        damped(torch.full((3, 3), float("inf")), 0.1)


@pytest.mark.parametrize(
    "method, threads", [(method, 1) for method in METHODS] + [(method, 2) for method in ("taco", "paper", "bridge")]
)
def test_the_same_files_twice(method: str, threads: int, tokens: torch.Tensor, tmp_path: Path) -> None:
    torch.set_num_threads(threads)
    try:
        for number in range(2):
            small, plan = compress(tiny_model("llama"), calibration=tokens, **arguments(method))
            save_compressed(small, plan, tmp_path / f"{number}")
            torch.rand(3)  # what others draw in between must not matter
    finally:
        torch.set_num_threads(1)
    for name in ("model.safetensors", "config.json", "taco_plan.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name


# -- ops -----------------------------------------------------------------------------------------------------------

BACKENDS = ["library", "reference", *(["cpp"] if native.module is not None else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(backend: str, dtype: torch.dtype, wrong: float) -> None:
    x = torch.randn(6, 33).to(dtype)
    v, u, w = torch.randn(9, 33).to(dtype), torch.randn(33, 9).to(dtype), torch.randn(9, 24).to(dtype)
    pivot = torch.randperm(33, dtype=torch.int32)
    gate = (v, u, None)
    calls = {
        "linear": lambda x: low_rank_linear(x, v, u),
        "bridge": lambda x: low_rank_bridge(x, v, u),
        "group": lambda x: torch.cat(low_rank_linear_group(x, [v, v], [u, u]), -1),
        "mlp": lambda x: low_rank_mlp(x, gate, gate, gate),
        "pivoted": lambda x: pivoted_low_rank_linear(x, w, u, pivot),
    }
    damaged = x.clone()
    damaged[2, 5] = wrong
    others = [0, 1, 3, 4, 5]
    with taco_kernels.use_backend(backend):
        for name, call in calls.items():
            clean, found = call(x), call(damaged)
            assert torch.equal(found[others], clean[others]), name
            # an infinity times a factor of either sign: no output of that row can be a number that looks right
            assert not bool(torch.isfinite(found[2]).all()), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_beyond_float16_overflow_to_infinity(backend: str) -> None:
    x = torch.full((2, 64), 200.0, dtype=torch.float16)
    v, u = torch.full((4, 64), 100.0, dtype=torch.float16), torch.full((8, 4), -1.0, dtype=torch.float16)
    with taco_kernels.use_backend(backend):
        y = low_rank_linear(x, v, u)
    assert bool((y == -float("inf")).all())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_randomized_svd_names_what_is_not_finite(wrong: float) -> None:
    a = torch.randn(80, 90)
    a[3, 4] = wrong
    with pytest.raises(ValueError, match=r"NaN|infinit|finite"):
        taco_kernels.randomized_svd(a, 5)
    with pytest.raises(ValueError, match=r"NaN|infinit|finite"):
        taco_kernels.randomized_svd(torch.randn(80, 90), 5, left=a[:80, :80])
