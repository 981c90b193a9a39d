"""Calibration on a long text: excerpts instead of the whole, the same guarantees."""

from __future__ import annotations

import random

import torch

from taco_svd.calibration import CHARACTERS_PER_TOKEN, LONG_TEXT_FACTOR, text_windows, tokenize
from taco_svd.checkpoint import DEFAULT_MODEL


def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEFAULT_MODEL)


def _words(characters: int) -> str:
    draw = random.Random(0)
    words = []
    while sum(map(len, words)) + len(words) < characters:
        words.append("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(1, 9))))
    return " ".join(words)


def test_excerpts_come_from_the_text_and_depend_on_the_seed_alone():
    tokenizer = _tokenizer()
    samples, seq_len = 4, 16
    text = _words(LONG_TEXT_FACTOR * samples * seq_len * CHARACTERS_PER_TOKEN + 1000)
    windows = text_windows(text, tokenizer, samples, seq_len, 0, "words")
    assert windows.shape == (samples, seq_len) and windows.dtype == torch.int64
    for window in windows:
        # the last token may be a part of a word: everything before it is in the text as it is
        assert tokenizer.decode(window[:-1]).strip() in text
    assert torch.equal(windows, text_windows(text, tokenizer, samples, seq_len, 0, "words"))
    assert not torch.equal(windows, text_windows(text, tokenizer, samples, seq_len, 1, "words"))
    assert len({tuple(window.tolist()) for window in windows}) == samples


def test_a_text_of_very_long_tokens_is_tokenised_whole():
    """Without a space an excerpt is empty: the fallback must still fill the windows."""
    tokenizer = _tokenizer()
    text = "a" * (LONG_TEXT_FACTOR * 2 * 8 * CHARACTERS_PER_TOKEN + 10)
    windows = text_windows(text, tokenizer, 2, 8, 0, "letters")
    assert windows.shape == (2, 8)
    assert set(windows.flatten().tolist()) <= set(tokenize(text, tokenizer).tolist())
