"""Suffix runs: the loss and its gradient, kept hidden states, layers that are run twice, one pass for all maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from taco_kernels import dispatch
from taco_svd import TacoError, compress, loss, suffix
from taco_svd.architectures import Architecture, LinearSite, dense_weight
from taco_svd.attribution import SigmaGradients
from taco_svd.decomposition import plain_svd
from taco_svd.loss import next_token_loss
from taco_svd.replacement import LowRankLinear
from taco_svd.suffix import SuffixRunner

from .tiny_models import LAYERS, tiny_model

Seen = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.parametrize("vocabulary, length, slice_", [(7, 2, 1), (7, 9, 20), (33, 12, 10**6), (5, 40, 15)])
def test_loss_and_gradient(vocabulary: int, length: int, slice_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CPU_SLICE", slice_)
    logits = (3 * torch.randn(3, length, vocabulary)).requires_grad_()
    tokens = torch.randint(vocabulary, (3, length))
    value = next_token_loss(logits, tokens, 0.25)
    (2 * value).backward()
    wide = logits.detach().double().requires_grad_()
    exact = 0.25 * functional.cross_entropy(wide[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    (2 * exact).backward()
    assert logits.grad is not None and wide.grad is not None
    eps = torch.finfo(torch.float32).eps
    count = 3 * (length - 1)
    assert abs(float(value.detach() - exact.detach())) <= vocabulary * 8 * eps * float(exact.detach() + 1)
    # softmax of logits up to 12: their rounding is relative to the logit, the exponential makes it absolute
    assert float((logits.grad - wide.grad).abs().max()) <= (vocabulary + 32) * eps * 0.5 / count
    assert not logits.grad[:, -1].any()


def test_loss_in_half_precision_rounds_the_gradient_once() -> None:
    logits = torch.randn(2, 6, 11).bfloat16().requires_grad_()
    tokens = torch.randint(11, (2, 6))
    next_token_loss(logits, tokens).backward()
    wide = logits.detach().double().requires_grad_()
    functional.cross_entropy(wide[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert logits.grad is not None and wide.grad is not None
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=2.0**-8 * 1.01, atol=1e-8)


def everything(runner: SuffixRunner, layers: list[int]) -> tuple[float, Seen]:
    """Mean loss, and inputs and gradients of all maps of `layers`, batches concatenated."""
    pieces: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def site(at: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
        pieces.setdefault(at.name, []).append((x.clone(), gradient.clone()))

    value = runner.backward(runner.architecture.sites(layers), site)
    joined = {
        key: (torch.cat([x for x, _ in parts]), torch.cat([gradient for _, gradient in parts]))
        for key, parts in pieces.items()
    }
    return value, joined


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox", "opt", "phi3"])
def test_layers_run_twice_give_the_same_bits(name: str, calibration_tokens: torch.Tensor) -> None:
    architecture = Architecture(tiny_model(name))
    kept = everything(SuffixRunner(architecture, calibration_tokens, 1, 24, recompute=False), [1, 3])
    twice = everything(SuffixRunner(architecture, calibration_tokens, 1, 24, recompute=True), [1, 3])
    assert kept[0] == twice[0] and kept[1].keys() == twice[1].keys() and len(kept[1]) > 4
    for key, pair in kept[1].items():
        assert torch.equal(pair[0], twice[1][key][0]) and torch.equal(pair[1], twice[1][key][1]), key
    assert all("forward" not in vars(layer) for layer in architecture.layers)


def test_activations_decide_whether_layers_run_twice(
    calibration_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(suffix, "checkpoint", lambda run, *args, **_: (calls.append(1), run(*args))[1])
    architecture = Architecture(tiny_model("llama"))
    everything(SuffixRunner(architecture, calibration_tokens, 1), [1])
    assert not calls
    monkeypatch.setattr(suffix, "SMALL_MODEL_ACTIVATIONS", 1000)
    everything(SuffixRunner(architecture, calibration_tokens, 1), [1])
    assert len(calls) == LAYERS - 1


@pytest.mark.parametrize(("share", "size"), [(0.0, 0), (10.0, 0), (0.0, 1 << 20)])
def test_runs_begin_at_the_highest_kept_layer(
    share: float, size: int, calibration_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies between the lowest and the wanted layer is run only where its hidden states could not be kept."""
    monkeypatch.setattr(suffix, "KEPT_SHARE", share)
    monkeypatch.setattr(suffix, "KEPT_BYTES", size)
    architecture = Architecture(tiny_model("llama"))
    runner = SuffixRunner(architecture, calibration_tokens, 1, 24, starts=[1, 3])
    runner.mean_loss()  # captures
    ran: list[int] = []
    for index, layer in enumerate(architecture.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    value, seen = everything(runner, [3])
    assert set(ran) == ({3, 4} if share or size else {1, 2, 3, 4})
    reference = everything(SuffixRunner(architecture, calibration_tokens, 0, 24), [3])
    assert value == reference[0]
    for key, pair in seen.items():
        assert torch.equal(pair[0], reference[1][key][0]) and torch.equal(pair[1], reference[1][key][1]), key


def test_float16_gradients_do_not_underflow(calibration_tokens: torch.Tensor) -> None:
    tokens = calibration_tokens.repeat(200, 1)  # many tokens make each one's gradient small
    half = everything(SuffixRunner(Architecture(tiny_model("llama", torch.float16)), tokens, 3), [3])
    wide = everything(SuffixRunner(Architecture(tiny_model("llama")), tokens, 3), [3])
    for key, (_, gradient) in half[1].items():
        exact = wide[1][key][1]
        # a dozen roundings to 11 bits on the way down, weights included
        assert float((gradient - exact).norm() / exact.norm()) <= 12 * 2.0**-11 * 2, key


@pytest.mark.parametrize("multiplies", [True, False])
def test_explicit_attention_is_only_used_inside_runs(
    multiplies: bool, calibration_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only where the CPU multiplies 16 bits: elsewhere attention is computed in float32 by the flash kernel."""
    monkeypatch.setattr(dispatch, "library_multiplies", lambda dtype: multiplies)
    model = tiny_model("llama", torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    runner = SuffixRunner(Architecture(model), calibration_tokens, 1)
    seen = []
    model.model.layers[2].register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    runner.mean_loss()
    assert set(seen) == {"eager" if multiplies else "sdpa"} and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_one_shot_attributes_on_the_dense_model(name: str, calibration_tokens: torch.Tensor) -> None:
    """Each block by a pass of its own over the dense model: the same directions as from the one pass."""
    compressed, plan = compress(
        tiny_model(name),
        method="paper",
        layers=[1, 3],
        compression_ratio=0.6,
        calibration=calibration_tokens,
        one_shot=True,
    )
    assert plan.options == {"one_shot": True}
    dense, made = Architecture(tiny_model(name)), Architecture(compressed)
    for layer in (1, 3):
        for block in ("mlp", "attention"):
            sites = dense.sites([layer], block)
            parts = {site: plain_svd(dense_weight(dense.module(site)).detach()) for site in sites}
            scores = SigmaGradients(parts)
            SuffixRunner(dense, calibration_tokens, 0).backward(sites, scores)
            for site in sites:
                installed = made.module(site)
                assert isinstance(installed, LowRankLinear)
                kept = scores.importance(site).argsort(descending=True)[: installed.rank]
                product = (parts[site].left[:, kept] * parts[site].sigma[kept]) @ parts[site].right[kept]
                torch.testing.assert_close(
                    installed.u @ installed.v, product, rtol=0, atol=1e-5 * float(parts[site].sigma[0])
                )


def test_one_shot_goes_with_the_paper_method(calibration_tokens: torch.Tensor) -> None:
    with pytest.raises(TacoError, match="--one-shot goes with --method paper"):
        compress(tiny_model("llama"), method="taco", layers=2, calibration=calibration_tokens, one_shot=True)
