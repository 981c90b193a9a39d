"""The package's model, compressed by each method and served by vLLM's engine, against transformers on 64 prompts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make test-vllm` sets it up and runs this", allow_module_level=True)

from taco_svd.checkpoint import DEFAULT_MODEL

from .conftest import METHODS
from .engine import agreement, prompts, vllm_answers

VOCABULARY = 2048
TOKENS = 32
# Logits are below 30, some thousand rounding errors of 6e-8 of that size deep, which mostly cancel.
LOGPROB_TOLERANCE = 30 * 1000**0.5 * 6e-8 * 2


@pytest.mark.parametrize("method", list(METHODS))
def test_greedy_tokens_equal_those_of_transformers(method: str, compressed: Callable[[str], Path]) -> None:
    directory = compressed(method)
    asked = prompts(64, VOCABULARY)
    answers = vllm_answers(directory, asked, TOKENS)
    # two tokens 1.4e-6 apart have been seen to come out the other way round
    share, worst = agreement(directory, asked, answers, tie=LOGPROB_TOLERANCE)
    assert share == 1.0
    assert worst < LOGPROB_TOLERANCE


def test_in_bfloat16_they_differ_no_more_than_the_dense_models(compressed: Callable[[str], Path]) -> None:
    """In 16 bits vLLM and transformers round differently everywhere, and near ties fall either way."""
    asked = prompts(64, VOCABULARY)
    found = {}
    for name, directory in (("dense", DEFAULT_MODEL), ("taco", compressed("taco"))):
        answers = vllm_answers(directory, asked, TOKENS, dtype="bfloat16")
        found[name] = agreement(directory, asked, answers, torch.bfloat16)
        print(
            f"{name}: {found[name][0]:.2%} of the tokens are transformers', log-probabilities to {found[name][1]:.3f}"
        )
    # log-probabilities are known to a few units in the last place of logits below 16, that is, of 2^-4
    assert found["taco"][0] > 2 * found["dense"][0] - 1 - 0.005
    assert found["taco"][1] < max(2 * found["dense"][1], 4 * 2**-4)
