"""Perplexity against a plain loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from taco_svd import TacoError
from taco_svd.evaluation import perplexity

from .tiny_models import VOCABULARY, tiny_model


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
@pytest.mark.parametrize("window, stride", [(16, 16), (16, 5), (16, 1), (16, 15), (7, 3), (64, 64)])
@torch.no_grad()
def test_equals_a_loop_that_counts_each_token_once(window: int, stride: int, batch_tokens: int) -> None:
    model = tiny_model("llama")
    text = torch.randint(3, VOCABULARY, (101,))
    counted: dict[int, float] = {}
    start = 0
    while start + window <= len(text):
        logits = model(text[None, start : start + window]).logits[0].double()
        for position in range(1, window):
            token = start + position
            if token not in counted:
                counted[token] = float(-functional.log_softmax(logits[position - 1], dim=-1)[text[token]])
        start += stride
    found = perplexity(model, text, window, stride, batch_tokens=batch_tokens)
    assert found.tokens == len(counted)
    assert found.nll == pytest.approx(math.fsum(counted.values()) / len(counted), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    assert found.windows == (101 - window) // stride + 1


@pytest.mark.parametrize("window, stride", [(16, None), (16, 16), (16, 5), (16, 1), (2, None), (64, 64)])
@torch.no_grad()
def test_models_that_need_a_begin_token_get_one_before_every_window(window: int, stride: int | None) -> None:
    """Every window is the token and `window - 1` of text, whose first is predicted, too; each token counts once."""
    model = tiny_model("gemma2")
    begin = model.config.bos_token_id
    text = torch.randint(3, VOCABULARY, (101,))
    of_text = window - 1
    step = min(stride or window, of_text)
    counted: dict[int, float] = {}
    for start in range(0, len(text) - of_text + 1, step):
        ids = torch.cat([torch.tensor([begin]), text[start : start + of_text]])
        logits = model(ids[None]).logits[0].double().log_softmax(-1)
        for place in range(of_text):
            counted.setdefault(start + place, -float(logits[place, text[start + place]]))
    found = perplexity(model, text, window, stride)
    assert (found.begin_token, found.window, found.stride) == (begin, window, step)
    assert found.tokens == len(counted)
    assert found.nll == pytest.approx(math.fsum(counted.values()) / len(counted), rel=1e-5)
    assert perplexity(tiny_model("llama"), text, window, stride).begin_token is None


def test_standard_error_shrinks_with_the_text() -> None:
    model = tiny_model("llama")
    text = torch.randint(3, VOCABULARY, (1600,))
    short, long = perplexity(model, text[:400], 8), perplexity(model, text, 8)
    assert 0 < long.nll_standard_error < short.nll_standard_error
    assert long.standard_error == pytest.approx(long.perplexity * long.nll_standard_error)
    # windows of one random text: a quarter of the windows has twice the error, give or take the draw
    assert short.nll_standard_error / long.nll_standard_error == pytest.approx(2, rel=0.4)
    assert math.isnan(perplexity(model, text[:8], 8).nll_standard_error)


def test_repeated_text_has_no_error() -> None:
    text = torch.randint(3, VOCABULARY, (8,)).repeat(5)
    assert perplexity(tiny_model("llama"), text, 8).nll_standard_error == pytest.approx(0, abs=1e-6)


def test_fewer_windows_and_training_mode() -> None:
    model = tiny_model("llama").train()
    found = perplexity(model, torch.randint(3, VOCABULARY, (200,)), 10, max_windows=4)
    assert (found.windows, found.tokens) == (4, 36)
    assert model.training


@pytest.mark.parametrize(
    "length, window, stride, says",
    [(9, 10, None, "longer text"), (99, 1, None, "window"), (99, 65, None, "context"), (99, 10, 11, "stride")],
)
def test_wrong_windows_are_refused(length: int, window: int, stride: int | None, says: str) -> None:
    with pytest.raises(TacoError, match=says):
        perplexity(tiny_model("llama"), torch.randint(3, VOCABULARY, (length,)), window, stride)


def test_infinite_logits_are_an_error() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(TacoError, match="not finite"):
        perplexity(model, torch.randint(3, VOCABULARY, (40,)), 10)
