"""The package's model, compressed by each method and served by vLLM's engine, against transformers on 64 prompts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make test-vllm` sets it up and runs this", allow_module_level=True)

from transformers import AutoModelForCausalLM

from taco_svd.checkpoint import DEFAULT_MODEL
from taco_svd.quantisation import quantise
from taco_svd.replacement import LowRankLinear
from taco_svd.vllm.shards import ALIGNED

from .conftest import METHODS
from .engine import agreement, bind_ranks, factor_elements, prompts, vllm_answers

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


@pytest.mark.parametrize("method", ["taco", "paper"])
def test_8_bit_factors_give_the_tokens_of_transformers(
    method: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    """Pivoted ones and plain ones, as `taco-svd quantize` writes them."""
    small = quantise(AutoModelForCausalLM.from_pretrained(compressed(method)))
    small.save_pretrained(tmp_path)
    asked = prompts(32, VOCABULARY)
    answers = vllm_answers(tmp_path, asked, TOKENS)
    share, worst = agreement(tmp_path, asked, answers, tie=LOGPROB_TOLERANCE)
    assert share == 1.0
    assert worst < LOGPROB_TOLERANCE
    # these are 8-bit factors: the ones that they were made from give other numbers
    assert agreement(compressed(method), asked, answers)[1] > 10 * worst


@pytest.mark.parametrize("method", ["taco", "paper"])
@pytest.mark.parametrize("choice", ["split", "replicate"])
def test_two_ranks_give_the_tokens_of_transformers(
    choice: str, method: str, compressed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pivoted factors and plain ones; each of two ranks holds about half of both, or all of one."""
    bind_ranks(monkeypatch)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # lets a function into the ranks, to count
    directory = compressed(method)
    asked, held = prompts(32, VOCABULARY), []

    def count(engine: Any) -> None:
        held.extend(engine.apply_model(factor_elements))

    answers = vllm_answers(
        directory,
        asked,
        TOKENS,
        first=count,
        tensor_parallel_size=2,
        additional_config={"taco_tensor_parallel": choice},
    )
    share, worst = agreement(directory, asked, answers, tie=LOGPROB_TOLERANCE)
    assert share == 1.0
    assert worst < LOGPROB_TOLERANCE
    model = AutoModelForCausalLM.from_pretrained(directory)
    factors = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    whole = sum(module.u.numel() + module.v.numel() for module in factors)
    assert len(held) == 2 and held[0] == held[1]
    if choice == "split":
        padded = sum(ALIGNED * (module.in_features + module.out_features) for module in factors)
        assert whole / 2 <= held[0] <= whole / 2 + padded
    else:
        assert held[0] > 0.65 * whole


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
