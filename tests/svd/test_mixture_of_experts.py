"""Mixtures of experts (Mixtral, Qwen3-MoE): experts stay whole, everything around them is compressed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from taco_svd import TacoError, compress, save_compressed
from taco_svd.architectures import Architecture
from taco_svd.checkpoint import load_model, parameter_count, weight_bytes
from taco_svd.export import to_dense, with_layers_removed

from .tiny_models import VOCABULARY

LAYERS = 4
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_COMMON, intermediate_size=40, num_local_experts=3)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**_COMMON, intermediate_size=48, moe_intermediate_size=24, num_experts=5)
    ),
    # experts that some tokens share stand beside the others as ordinary linear maps
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **{key: value for key, value in _COMMON.items() if key != "head_dim"},
            intermediate_size=48,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=28,
            num_experts=4,
        )
    ),
}  # fmt: skip
METHODS = ("taco", "paper", "svd", "bridge", "removal", "svd-llm")


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.config.architectures = [type(model).__name__]
    return model


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found(name: str) -> None:
    architecture = Architecture(build(name))
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    shared = {f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")} if name == "qwen2_moe" else set()
    assert set(architecture.paths) == attention | shared
    assert architecture.experts_block == "mlp"


@pytest.mark.parametrize("method, loaded", [(method, False) for method in METHODS] + [("taco", True), ("bridge", True)])
@pytest.mark.parametrize("name", MODELS)
def test_compress_save_reload_generate(
    name: str, method: str, loaded: bool, calibration_tokens: torch.Tensor, tmp_path: Path
) -> None:
    dense = build(name)
    if loaded:  # the form on the hub has one tensor per expert; transformers joins them as it reads
        dense.save_pretrained(tmp_path / "dense")
        dense, _ = load_model(tmp_path / "dense")
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    small, plan = compress(dense, method=method, layers=[1, 2], calibration=calibration_tokens)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert plan.result["parameters"] == parameter_count(small) < parameter_count(dense)
    assert plan.result["bytes"] == weight_bytes(small)
    for position, source in enumerate(plan.structure.kept):
        ours, theirs = small.model.layers[position].mlp, dense.model.layers[source].mlp
        for key, value in theirs.experts.state_dict().items():
            assert torch.equal(ours.experts.state_dict()[key], value)
        assert torch.equal(ours.gate.weight, theirs.gate.weight)
    save_compressed(small, plan, tmp_path / "small", max_shard_size="40KB")
    again, _ = load_model(tmp_path / "small")
    for key, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    if loaded:
        assert again.config._experts_implementation == small.config._experts_implementation
    # a model that was built by its class alone runs its experts one by one, a loaded one all at once
    again.config._experts_implementation = small.config._experts_implementation
    # torch's products of few rows round by where a matrix begins in memory: in a file that is anywhere
    again = copy.deepcopy(again)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)
        made = again.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(made, small.generate(ids, max_new_tokens=4, do_sample=False)) and made.shape[1] > 7


def test_taco_by_a_budget(calibration_tokens: torch.Tensor) -> None:
    dense = build("mixtral")
    keep = 0.93
    small, plan = compress(dense, method="taco", keep=keep, calibration=calibration_tokens)
    assert parameter_count(small) <= keep * parameter_count(dense)
    assert plan.structure.low_rank or plan.structure.removed
    with pytest.raises(TacoError, match="cannot be reached"):
        compress(dense, method="paper", keep=0.5, calibration=calibration_tokens)


def test_bfloat16_and_a_further_save(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    small, plan = compress(
        build("qwen3_moe", torch.bfloat16), method="taco", layers=[2], calibration=calibration_tokens
    )
    save_compressed(small, plan, tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto")
    model.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype="auto")
    for key, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@torch.no_grad()
def test_export_and_comparison(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    with torch.enable_grad():
        small, plan = compress(build("mixtral"), method="taco", layers=[1, 2], calibration=calibration_tokens)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    plain = to_dense(small)
    torch.testing.assert_close(plain(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    again, _ = load_model(tmp_path / "plain")
    assert type(again) is transformers.MixtralForCausalLM
    assert torch.equal(again(ids).logits, plain(ids).logits)
    assert len(with_layers_removed(small, list(plan.redundant)).model.layers) == LAYERS - len(plan.redundant)


def test_layers_are_chosen_as_for_dense_models(calibration_tokens: torch.Tensor) -> None:
    for importance in ("bi", "angular", "greedy"):
        _, plan = compress(
            build("mixtral"), method="removal", layers=2, importance=importance, calibration=calibration_tokens
        )
        assert len(plan.redundant) == 2
