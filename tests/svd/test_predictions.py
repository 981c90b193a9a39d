"""Predictions a piece at a time against all logits at once."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional
from transformers import PreTrainedModel

from taco_svd import predictions
from taco_svd.architectures import Architecture
from taco_svd.divergence import divergence
from taco_svd.evaluation import perplexity
from taco_svd.layerwise import LayerwisePass
from taco_svd.predictions import Predictions, pieces, windows_loss
from taco_svd.store import Store
from taco_svd.suffix import SuffixRunner

from .test_layerwise import Seen, collected
from .tiny_models import CONFIGS, VOCABULARY, tiny_model


def windows() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))


def cohere() -> PreTrainedModel:
    """Its forward scales what comes out of the head."""
    torch.manual_seed(0)
    config = transformers.CohereConfig(**CONFIGS["llama"]().to_dict() | {"logit_scale": 0.5, "model_type": "cohere"})
    return transformers.CohereForCausalLM(config).eval()


def model_of(name: str) -> PreTrainedModel:
    return (cohere() if name == "cohere" else tiny_model(name)).double()


@pytest.mark.parametrize("positions, vocabulary", [(1, 10), (7, 1 << 30), (4096, 128_256), (300, 32_000), (0, 5)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pieces_cover_everything_once(positions: int, vocabulary: int, device: str) -> None:
    found = pieces(positions, torch.empty((vocabulary, 0), device=device))
    assert [index for piece in found for index in range(positions)[piece]] == list(range(positions))
    largest = max((piece.stop - piece.start for piece in found), default=0)
    limit = predictions.PIECE if device == "cpu" else predictions.GPU_PIECE
    assert largest <= predictions.LEAST_TOKENS or largest * vocabulary <= limit


@pytest.mark.parametrize("name", [*CONFIGS, "cohere"])
def test_logits_and_gradient_are_those_of_the_whole(name: str, seven: None) -> None:
    model, ids = model_of(name), windows()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = Predictions(model, ids, lambda: model(inputs_embeds=embeddings, use_cache=False))
    whole = model(inputs_embeds=embeddings, use_cache=False).logits[:, :-1].flatten(0, 1)
    # OPT's forward calls a part of its base model
    assert len(found.pieces) == 5 and found.hidden.shape == (30, VOCABULARY if name == "opt" else 32)
    got = torch.cat([found.logits(piece) for piece in found.pieces])
    torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.labels, ids[:, 1:].flatten())

    loss = windows_loss(model, ids, 0.75, lambda: model(inputs_embeds=embeddings, use_cache=False))
    exact = 0.75 * functional.cross_entropy(whole, found.labels)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(3 * loss, embeddings)
    (wanted,) = torch.autograd.grad(3 * exact, embeddings)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)
    assert "forward" not in vars(model.base_model) and not model.base_model._forward_hooks


def test_last_positions_where_they_are_wanted(seven: None) -> None:
    model, ids = model_of("cohere"), windows()
    with torch.no_grad():
        found = Predictions(model, ids, last=True)
        got = torch.cat([found.logits(piece) for piece in found.pieces])
        logits = model(ids).logits
    assert len(found.pieces) == 5
    torch.testing.assert_close(got, logits.flatten(0, 1), rtol=1e-12, atol=1e-12)
    loss = functional.cross_entropy(got, found.labels)
    torch.testing.assert_close(loss, functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_the_head_never_sees_more_than_a_piece(seven: None) -> None:
    model, ids = tiny_model("llama"), windows()
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0][..., 0].numel()))
    with torch.no_grad():
        windows_loss(model, ids)
        perplexity(model, ids.flatten(), window=11)
    assert len(rows) == 12 and max(rows) == 7


def test_few_logits_are_made_at_once_with_the_same_bits() -> None:
    model, ids = tiny_model("qwen3"), windows()
    assert torch.equal(Predictions(model, ids).hidden, model(input_ids=ids).logits[:, :-1].flatten(0, 1))
    calls: list[torch.Tensor] = []
    model.base_model.register_forward_hook(lambda *_: calls.append(ids))
    windows_loss(model, ids)
    assert len(calls) == 1


def test_a_stack_without_a_module_of_its_own(seven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), windows()
    expected = windows_loss(model, ids)
    monkeypatch.setattr(type(model), "base_model_prefix", "nothing")
    found = Predictions(model, ids)
    assert found.hidden.shape[-1] == VOCABULARY  # the logits themselves
    torch.testing.assert_close(windows_loss(model, ids), expected, rtol=1e-6, atol=0)


def test_gradients_in_float16_are_rounded_in_its_range(calibration_tokens: torch.Tensor) -> None:
    """Those of a mean over all tokens would be subnormal: the factor against that goes in before they are rounded."""
    architecture = Architecture(tiny_model("llama", torch.float16))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        logits = output.detach()
        output.register_hook(lambda gradient: seen.append((logits, gradient.clone())))

    architecture.model.get_output_embeddings().register_forward_hook(watch)
    SuffixRunner(architecture, calibration_tokens, 0).backward(architecture.sites([1]), lambda *_: None)
    samples = len(calibration_tokens)
    ((logits, gradient),) = seen
    exact = logits[:, :-1].double().softmax(-1)
    exact -= functional.one_hot(calibration_tokens[:, 1:], VOCABULARY)
    # rounded once; the softmax in float32 is a little off too
    torch.testing.assert_close(gradient[:, :-1].double(), exact, rtol=2.0**-11 * 1.01, atol=2.0**-25)
    assert samples == len(logits) and not gradient[:, -1].any()


def test_a_sum_is_differentiated_once(seven: None) -> None:
    model, ids = tiny_model("llama"), windows()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = windows_loss(model, ids, 1.0, lambda: model(inputs_embeds=embeddings, use_cache=False))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def gathered(name: str, tokens: torch.Tensor) -> tuple[Seen, Seen, float]:
    architecture = Architecture(model_of(name))
    sites = architecture.sites([1, 3])
    whole: Seen = {}
    layerwise: Seen = {}
    loss = SuffixRunner(architecture, tokens, 1, 24).backward(sites, collected(whole))
    LayerwisePass(architecture, tokens, Store(memory=1 << 30), batch_tokens=24).backward(sites, collected(layerwise))
    return whole, layerwise, loss


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_passes_give_the_same_gradients(
    name: str, calibration_tokens: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    *expected, loss = gathered(name, calibration_tokens)
    request.getfixturevalue("seven")
    *found, again = gathered(name, calibration_tokens)
    assert again == pytest.approx(loss, rel=1e-12)
    for one, two in zip(expected, found, strict=True):
        assert one.keys() == two.keys() and len(one) > 4
        for site in one:
            for (x, gradient), (x2, gradient2) in zip(one[site], two[site], strict=True):
                torch.testing.assert_close(x2, x, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(gradient2, gradient, rtol=1e-9, atol=1e-12 * float(gradient.abs().max()))


def test_evaluations_give_the_same_numbers(request: pytest.FixtureRequest) -> None:
    dense, other = model_of("gemma2"), model_of("gemma2")
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    text = torch.randint(3, VOCABULARY, (97,), generator=torch.Generator().manual_seed(2))
    before = perplexity(dense, text, 16, 5), divergence(dense, other, text, 16, 5)
    request.getfixturevalue("seven")
    after = perplexity(dense, text, 16, 5), divergence(dense, other, text, 16, 5)
    for one, two in zip(before, after, strict=True):
        assert two.to_dict() == pytest.approx(one.to_dict(), rel=1e-5)
    assert after[1].kl > 0 and after[1].tokens == after[0].tokens == before[0].tokens
