"""Random checkpoints that use everything the format has, served by vLLM's engine, against transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make test-vllm` sets it up and runs this", allow_module_level=True)

import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from taco_svd.quantisation import quantise

from .engine import MAX_LENGTH, agreement, bind_ranks, prompts, vllm_answers
from .random_checkpoints import VOCABULARY, random_model, write_checkpoint

TOKENS = 24
# Logits of these models are below 10. Their float32 rounding errors: a few hundred operations deep, unit roundoff 6e-8.
LOGPROB_TOLERANCE = 10 * 300 * 6e-8 / 10
# vLLM's attention on a CPU approximates tanh where logits are capped; its dense Gemma 2 is off by as much.
CAPPED_TOLERANCE = 5e-3
# vLLM computes Bloom's gelu where transformers approximates it by tanh.
GELU_TOLERANCE = 2e-3


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama_biased",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "phi3",
        "gpt2",
        "opt",
        "falcon",
        "bloom",
        "mixtral",
        "qwen3_moe",
    ],
)
def test_vllm_decodes_as_transformers_does(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(name, tmp_path / name)
    asked = prompts(16, VOCABULARY)
    answers = vllm_answers(directory, asked, TOKENS)
    share, worst = agreement(directory, asked, answers)
    assert share == 1.0
    assert worst < {"gemma2": CAPPED_TOLERANCE, "bloom": GELU_TOLERANCE}.get(name, LOGPROB_TOLERANCE)


@pytest.mark.parametrize("name, compiled", [("llama_biased", True), ("bloom", False), ("gpt_neox", False)])
def test_8_bit_factors_decode_as_transformers_does(name: str, compiled: bool, tmp_path: Path) -> None:
    """By models of vLLM's that sort a fused map's rows, or none, and by its Transformers backend."""
    quantise(random_model(name)).save_pretrained(tmp_path)
    asked = prompts(16, VOCABULARY)
    answers = vllm_answers(tmp_path, asked, TOKENS, enforce_eager=not compiled)
    share, worst = agreement(tmp_path, asked, answers)
    assert share == 1.0
    assert worst < {"bloom": GELU_TOLERANCE}.get(name, LOGPROB_TOLERANCE)


@pytest.mark.parametrize("name", ["gpt_neox", "helium"])  # the second one is in vLLM's registry under no name at all
def test_an_architecture_that_vllm_has_not_runs_by_its_transformers_backend(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(name, tmp_path / name)
    asked = prompts(16, VOCABULARY)
    share, worst = agreement(directory, asked, vllm_answers(directory, asked, TOKENS))
    assert share == 1.0 and worst < LOGPROB_TOLERANCE


@pytest.mark.parametrize(
    "name, choice, compiled",
    [
        ("llama_biased", "split", False),
        ("llama", "replicate", False),
        ("llama", "auto", True),
        ("phi3", "auto", False),
        ("falcon", "split", False),
        ("gpt_neox", "split", False),
    ],
)
def test_two_ranks_decode_as_one(
    name: str, choice: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind_ranks(monkeypatch)
    directory = write_checkpoint(name, tmp_path / name)
    asked = prompts(16, VOCABULARY)
    answers = vllm_answers(
        directory,
        asked,
        TOKENS,
        tensor_parallel_size=2,
        enforce_eager=not compiled,
        additional_config={"taco_tensor_parallel": choice},
    )
    share, worst = agreement(directory, asked, answers)
    assert share == 1.0 and worst < LOGPROB_TOLERANCE


@pytest.mark.parametrize("name, ranks", [("llama_biased", 2), ("phi3", 1)])
def test_weights_that_are_loaded_again_decode_as_transformers_does(
    name: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM does after sleep at level 2, and where a model is trained while it is served.

    With heads of their own: on a CPU vLLM packs a head while it loads it, and a tied one is not loaded again.
    """
    if ranks > 1:
        bind_ranks(monkeypatch)
    one, other = (write_checkpoint(name, tmp_path / str(seed), seed=seed) for seed in (7, 8))
    asked = prompts(16, VOCABULARY)

    def reload(engine: Any) -> None:
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})

    answers = vllm_answers(one, asked, TOKENS, first=reload, tensor_parallel_size=ranks)
    share, worst = agreement(other, asked, answers)
    assert share == 1.0 and worst < LOGPROB_TOLERANCE


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_lora_adapter_decodes_as_its_definition_says(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every map, factorised or dense: what transformers computes, and B A x beside it."""
    from vllm.lora.request import LoRARequest

    directory, adapter = write_checkpoint("llama", tmp_path / "llama"), tmp_path / "adapter"
    rank, scale = 4, 2.0
    stored: dict[str, torch.Tensor] = {}
    for path, module in random_model("llama").named_modules():
        if path.endswith("_proj"):
            stored[f"{path}.lora_A.weight"] = torch.randn(rank, module.in_features) * 0.1  # type: ignore[operator]
            stored[f"{path}.lora_B.weight"] = torch.randn(module.out_features, rank) * 0.1  # type: ignore[operator]
    adapter.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in stored.items()}, adapter / "adapter_model.safetensors"
    )
    names = sorted({name.split(".")[-3] for name in stored})
    options = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "target_modules": names, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(options))

    def adapted(model: Any) -> None:
        for path, module in model.named_modules():
            if f"{path}.lora_A.weight" in stored:
                product = stored[f"{path}.lora_B.weight"] @ stored[f"{path}.lora_A.weight"] * scale
                module.register_forward_hook(lambda _, inputs, output, w=product: output + inputs[0] @ w.T)

    asked = prompts(16, VOCABULARY)
    request = LoRARequest("adapter", 1, str(adapter))
    if ranks > 1:
        bind_ranks(monkeypatch)
    answers = vllm_answers(
        directory,
        asked,
        TOKENS,
        first=lambda engine: request,
        enable_lora=True,
        max_lora_rank=8,
        tensor_parallel_size=ranks,
    )
    share, worst = agreement(directory, asked, answers, change=adapted)
    assert share == 1.0 and worst < LOGPROB_TOLERANCE
    assert agreement(directory, asked, answers)[0] < 0.9, "the adapter changes nothing"


def test_compiled_graphs_decode_as_transformers_does(tmp_path: Path) -> None:
    directory = write_checkpoint("llama", tmp_path / "llama")
    asked = prompts(16, VOCABULARY)
    answers = vllm_answers(directory, asked, TOKENS, enforce_eager=False)
    share, worst = agreement(directory, asked, answers)
    assert share == 1.0 and worst < LOGPROB_TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_classifier_on_a_compressed_model_says_what_transformers_says(
    name: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    from vllm import LLM

    model = AutoModelForSequenceClassification.from_pretrained(
        write_checkpoint(name, tmp_path / "lm"), num_labels=3, pad_token_id=0
    ).eval()
    torch.nn.init.normal_(model.score.weight)
    directory = tmp_path / "classifier"
    model.save_pretrained(directory)
    for tokenizer in compressed("removal").glob("token*"):  # vLLM wants one here, also for tokens
        shutil.copy(tokenizer, directory)
    options = {"dtype": "float32", "max_model_len": MAX_LENGTH, "max_num_seqs": 4, "enforce_eager": True}
    engine = LLM(model=str(directory), **options)
    asked = prompts(8, VOCABULARY)
    found = engine.classify([{"prompt_token_ids": prompt} for prompt in asked], use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    for prompt, answer in zip(asked, found, strict=True):
        with torch.no_grad():
            exact = model(torch.tensor([prompt])).logits[0].softmax(-1)
        torch.testing.assert_close(torch.tensor(answer.outputs.probs), exact, rtol=0, atol=LOGPROB_TOLERANCE)
