"""KL divergence from the dense model against a plain loop, and where the dense model is found."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from taco_svd import Plan, TacoError, save_compressed
from taco_svd.divergence import divergence, kl_per_token
from taco_svd.evaluation import perplexity
from taco_svd.source_model import load_source, source_path

from .tiny_models import VOCABULARY, tiny_model


@pytest.mark.parametrize("shape", [(7,), (2, 3, 31), (1, 1)])
def test_kl_is_the_sum_over_the_vocabulary(shape: tuple[int, ...]) -> None:
    p_logits, q_logits = torch.randn(2, *shape, dtype=torch.float64) * 3
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    slow = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(kl_per_token(p_logits, q_logits), slow, rtol=1e-12, atol=1e-13)
    # float32: each of n terms carries a few rounding errors of its logarithm's size
    bound = (
        8 * torch.finfo(torch.float32).eps * max(1.0, float(p_logits.abs().max() + q_logits.abs().max())) * shape[-1]
    )
    torch.testing.assert_close(kl_per_token(p_logits.float(), q_logits.float()).double(), slow, rtol=0, atol=bound)


@pytest.mark.parametrize("window, stride, max_windows", [(16, 16, None), (16, 5, None), (12, 12, 3)])
@torch.no_grad()
def test_divergence_equals_a_loop_over_tokens(compressed_tiny, window, stride, max_windows) -> None:
    dense, compressed, _ = compressed_tiny("llama")
    text = torch.randint(3, VOCABULARY, (101,))
    starts = list(range(0, len(text) - window + 1, stride))
    if max_windows is not None:
        starts = [starts[i * len(starts) // max_windows] for i in range(max_windows)]
    values, same, counted = [], [], set()
    for start in starts:
        ids = text[None, start : start + window]
        p = dense(ids).logits[0].double().log_softmax(-1)
        q = compressed(ids).logits[0].double().log_softmax(-1)
        for position in range(window - 1):
            if start + position + 1 in counted:
                continue
            counted.add(start + position + 1)
            values.append(float((p[position].exp() * (p[position] - q[position])).sum()))
            same.append(bool(p[position].argmax() == q[position].argmax()))
    found = divergence(dense, compressed, text, window, stride, max_windows, batch_tokens=40)
    assert found.tokens == len(values) == perplexity(compressed, text, window, stride, max_windows).tokens
    assert found.kl == pytest.approx(math.fsum(values) / len(values), rel=1e-4)
    assert found.same_top_token == pytest.approx(sum(same) / len(same))
    assert found.kl_standard_error > 0


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_model("gpt2").train()
    found = divergence(model, model, torch.randint(3, VOCABULARY, (60,)), 10)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.same_top_token == 1.0
    assert model.training


def test_models_of_different_vocabularies_are_refused() -> None:
    other = tiny_model("llama")
    other.resize_token_embeddings(VOCABULARY + 1)
    with pytest.raises(TacoError, match="vocabular"):
        divergence(other, tiny_model("llama"), torch.randint(3, VOCABULARY, (60,)), 10)


def test_the_source_is_found_beside_the_compressed_model(compressed_tiny, tmp_path, monkeypatch) -> None:
    dense, compressed, plan = compressed_tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    plan = Plan.from_dict({**plan.to_dict(), "source": {**plan.source, "name": "dense"}})
    save_compressed(compressed, plan, tmp_path / "small")
    assert source_path(plan, tmp_path / "small") == str(tmp_path / "dense")
    found = load_source(compressed, plan, tmp_path / "small")
    assert torch.equal(found.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    # or in the working directory
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "dense", tmp_path / "elsewhere" / "dense")
    with pytest.raises(TacoError, match="was not found"):
        source_path(plan, tmp_path / "small")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert source_path(plan, tmp_path / "small") == str(tmp_path / "elsewhere" / "dense")


@pytest.mark.parametrize("name", ["..", ".", "", "../dense", "/etc", "a/b/c"])
def test_names_in_plans_do_not_walk_through_directories(compressed_tiny, tmp_path, name) -> None:
    dense, _, plan = compressed_tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "models").mkdir()
    with pytest.raises(TacoError, match="was not found"):
        source_path(Plan.from_dict({**plan.to_dict(), "source": {"name": name}}), tmp_path / "models" / "small")


def test_another_model_is_not_taken_for_the_source(compressed_tiny, tmp_path) -> None:
    _, compressed, plan = compressed_tiny("llama")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    save_compressed(compressed, plan, tmp_path / "small")
    for name, says in (("other", "embeddings"), ("gpt2", "embeddings"), ("small", "compressed")):
        with pytest.raises(TacoError, match=says):
            load_source(compressed, plan, tmp_path / "small", tmp_path / name)
    assert load_source(compressed, plan, tmp_path / "small", _saved_bf16(tmp_path), dtype="auto") is not None


def _saved_bf16(folder):
    """The right model, stored in fewer bits than the compressed one is loaded in."""
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder / "bf16")
    return folder / "bf16"
