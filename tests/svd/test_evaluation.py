"""Perplexity against a plain loop over tokens."""

from __future__ import annotations

import copy
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


def test_a_change_is_told_more_sharply_than_either_perplexity() -> None:
    """Paired over windows: against plain arithmetic on the two models' losses, window by window."""
    text = torch.randint(3, VOCABULARY, (203,))
    before = tiny_model("llama")
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.lm_head.weight += 0.002 * torch.randn_like(after.lm_head.weight)
    scores = [perplexity(model, text, 10, 7, batch_tokens=31) for model in (before, after)]
    found = scores[1].change(scores[0])
    assert found.nll == pytest.approx(scores[1].nll - scores[0].nll, abs=1e-9)
    assert found.relative == pytest.approx(scores[1].perplexity / scores[0].perplexity - 1, abs=1e-9)
    windows = [perplexity(model, text, 10, 7).window_nll for model in (before, after)]
    assert len(windows[0]) == scores[0].windows and sum(scores[0].window_tokens) == scores[0].tokens
    more = torch.tensor(windows[1], dtype=torch.float64) - torch.tensor(windows[0], dtype=torch.float64)
    tokens = torch.tensor(scores[0].window_tokens)
    off = more - found.nll * tokens
    error = float((off.square().sum() * len(off) / (len(off) - 1)).sqrt() / tokens.sum())
    assert found.nll_standard_error == pytest.approx(error, rel=1e-4)
    assert 0 < 3 * found.nll_standard_error < scores[1].nll_standard_error
    assert found.low < found.relative < found.high
    assert (1 + found.high) / (1 + found.low) == pytest.approx(math.exp(2 * 1.96 * error), rel=1e-4)
    same = scores[0].change(scores[0])
    assert (same.nll, same.nll_standard_error, same.low, same.high) == (0, 0, 0, 0)
    assert "window_nll" not in scores[0].to_dict()
    assert math.isnan(perplexity(after, text[:9], 8).change(perplexity(before, text[:9], 8)).low)
    with pytest.raises(ValueError, match="not of the same windows"):
        scores[0].change(perplexity(before, text[:100], 10, 7))


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
