"""Runs vLLM's engine and transformers on the same prompts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import taco_svd  # noqa: F401 (registers compressed checkpoints with transformers)

# before vLLM is imported: a gigabyte of cache is plenty, and no core is to be bound twice
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MAX_LENGTH = 128


@dataclass(frozen=True)
class Answer:
    """Tokens that continue a prompt, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def bind_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each of two ranks a core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip(f"tensor parallelism binds each rank to a core of its own; there is {len(cores)}")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")


def factor_elements(model: Any) -> int:
    """How many numbers of factors a rank's model holds."""
    return sum(
        parameter.numel()
        for module in model.modules()
        if type(getattr(module, "quant_method", None)).__name__ == "FactorsMethod"
        for name, parameter in module.named_parameters(recurse=False)
        if name in ("u", "v")
    )


def prompts(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to 59 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def vllm_answers(
    directory: Path,
    asked: list[list[int]],
    tokens: int,
    dtype: str = "float32",
    first: Callable[[Any], Any] = lambda engine: None,
    **options: Any,
) -> list[Answer]:
    """Greedy answers of vLLM's engine, after `first` has done something to it; `options` are arguments of `vllm.LLM`.

    What `first` returns is the LoRA request of every prompt.
    """
    from vllm import LLM, SamplingParams

    options.setdefault("enforce_eager", True)
    engine = LLM(
        model=str(directory),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=MAX_LENGTH,
        max_num_seqs=16,
        **options,
    )
    adapter = first(engine)
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0)
    inputs = [{"prompt_token_ids": prompt} for prompt in asked]
    try:
        results = engine.generate(inputs, parameters, use_tqdm=False, lora_request=adapter)
    finally:
        engine.llm_engine.engine_core.shutdown()
    answers = []
    for result in results:
        output = result.outputs[0]
        assert output.logprobs is not None
        logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
        answers.append(Answer(list(output.token_ids), logprobs))
    return answers


@torch.no_grad()
def agreement(
    directory: Path,
    asked: list[list[int]],
    answers: list[Answer],
    dtype: torch.dtype = torch.float32,
    change: Callable[[Any], None] = lambda model: None,
    tie: float = 0.0,
) -> tuple[float, float]:
    """How well answers agree with transformers, which reads the same text, each token after the same ones before.

    `change` may change transformers' model first. Tokens whose logits are at most `tie` below the largest count as most
    likely as well: which of two it is then, rounding decides.

    Returns the share of tokens that are transformers' most likely one, and the largest difference of
    log-probabilities. A share of 1 says that greedy decoding in transformers (each step computed afresh, without a
    cache) gives the same tokens but for such ties, by induction over the positions.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    change(model)
    right, total, worst = 0, 0, 0.0
    for prompt, answer in zip(asked, answers, strict=True):
        logits = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(answer.tokens)
        behind = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
        right += int((behind <= tie).sum())
        total += len(chosen)
        mine = logits.float().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        worst = max(worst, float((mine - torch.tensor(answer.logprobs)).abs().max()))
    return right / total, worst
