"""Every architecture the package promises, through every method: compress, save, reload, generate."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from taco_svd import CompressedModel, TacoError, UnsupportedModelError, compress, save_compressed
from taco_svd.architectures import Architecture

from .conftest import REPLACED, Compressed
from .tiny_models import CONFIGS, LAYERS, VOCABULARY, tiny_model

METHODS = ("removal", "svd", "paper", "taco", "bridge")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

every_architecture = pytest.mark.parametrize("name", CONFIGS)


def prompt(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("method", METHODS)
@every_architecture
@torch.no_grad()
def test_reload_is_bit_equal(
    name: str, method: str, dtype: torch.dtype, compressed_tiny: Callable[..., Compressed], tmp_path: Path
) -> None:
    dense, model, plan = compressed_tiny(name, method, dtype)
    save_compressed(model, plan, tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(again) is type(model) and isinstance(again, type(dense)) and isinstance(again, CompressedModel)
    assert again.dtype == model.dtype == dtype
    ids = prompt()
    logits = model(ids).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(again(ids).logits, logits)
    assert not torch.equal(logits, dense(ids).logits)
    assert again.structure == plan.structure
    # taco mode may take a layer out where that costs least: on random models it sometimes does
    expected = {"removal": LAYERS - len(REPLACED), "bridge": LAYERS - len(REPLACED), "taco": len(plan.structure.kept)}
    expected = expected.get(method, LAYERS)
    assert again.config.num_hidden_layers == len(Architecture(again).layers) == expected
    stored = [*again.parameters(), *(buffer for name, buffer in again.named_buffers() if name.endswith(".pivot"))]
    assert sum(tensor.numel() for tensor in stored) == plan.result["parameters"]


@pytest.mark.parametrize("method", METHODS)
@every_architecture
@torch.no_grad()
def test_generation_with_any_cache_equals_recomputing(
    name: str, method: str, compressed_tiny: Callable[..., Compressed]
) -> None:
    _, model, _ = compressed_tiny(name, method)
    # long enough that the sliding windows of 8 slide, and never ended early
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ids = prompt()
    recomputed = model.generate(ids, use_cache=False, **how)
    assert recomputed.shape == (2, 20)
    assert torch.equal(model.generate(ids, use_cache=True, **how), recomputed)
    assert torch.equal(model.generate(ids, cache_implementation="static", **how), recomputed)


@pytest.mark.parametrize("method", ["taco", "bridge"])
@every_architecture
@torch.no_grad()
def test_left_padding_changes_nothing(name: str, method: str, compressed_tiny: Callable[..., Compressed]) -> None:
    _, model, _ = compressed_tiny(name, method)
    ids, padding = prompt(), 5
    ids[1, :padding] = 0
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    alone = model(ids[1:, padding:]).logits
    whole = model(ids[:1]).logits
    # sums of up to 56 terms, a few per layer, reordered by the other shape
    bound = LAYERS * 56 * torch.finfo(torch.float32).eps * float(whole.abs().max())
    assert float((together[1:, padding:] - alone).abs().max()) <= bound
    assert float((together[:1] - whole).abs().max()) <= bound
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = model.generate(ids, attention_mask=mask, **how)
    assert torch.equal(batch[1:, padding:], model.generate(ids[1:, padding:], **how))


@every_architecture
def test_tied_embeddings_and_generation_config_survive(
    name: str, tmp_path: Path, calibration_tokens: torch.Tensor
) -> None:
    dense = tiny_model(name)
    dense.generation_config.update(do_sample=True, top_k=7, max_new_tokens=9)
    model, plan = compress(dense, method="taco", layers=1, calibration=calibration_tokens)
    save_compressed(model, plan, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    for made in (model, again):
        assert (made.get_input_embeddings().weight is made.get_output_embeddings().weight) == tied
        assert made.generation_config.top_k == 7
        assert made.generation_config.max_new_tokens == 9
        assert made.generation_config.do_sample is True


def test_some_tiny_models_are_tied_and_some_are_not() -> None:
    """Or the test above would say nothing about one of the two."""
    assert {bool(CONFIGS[name]().tie_word_embeddings) for name in CONFIGS} == {True, False}


@pytest.mark.parametrize("method", METHODS)
@every_architecture
@torch.no_grad()
def test_source_model_stays_bit_for_bit(name: str, method: str, calibration_tokens: torch.Tensor) -> None:
    model = tiny_model(name)
    model.train()
    ids = prompt()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(path, type(module)) for path, module in model.named_modules()]
    config, wants = model.config.to_dict(), [parameter.requires_grad for parameter in model.parameters()]
    compress(model, method=method, layers=REPLACED, calibration=calibration_tokens)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [(path, type(module)) for path, module in model.named_modules()] == modules
    assert model.config.to_dict() == config
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    fresh = tiny_model(name)
    assert torch.equal(model.eval()(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("method", METHODS)
def test_layers_at_both_ends_can_be_replaced(method: str, calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("qwen2")
    small, plan = compress(model, method=method, layers=[0, 4], calibration=calibration_tokens)
    assert plan.redundant == (0, 4)
    assert torch.isfinite(small(prompt()).logits).all()
    if method == "bridge":  # nothing comes before the lowest layer, so only the upper run has a bridge
        assert [bridge.after for bridge in plan.structure.bridges] == [3]


@pytest.mark.parametrize("importance", ["bi", "angular"])
def test_importance_by_hidden_states_chooses_the_layer_that_does_nothing(
    importance: str, calibration_tokens: torch.Tensor
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # layer 3 adds exactly nothing to the residual stream
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    small, plan = compress(model, method="removal", layers=1, importance=importance, calibration=calibration_tokens)
    assert plan.redundant == (3,)
    ids = prompt()
    with torch.no_grad():
        assert torch.equal(small(ids).logits, model(ids).logits)


@torch.no_grad()
def test_greedy_importance_takes_what_costs_least(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")

    def loss(layers: list[int]) -> float:
        with torch.enable_grad():
            small, _ = compress(model, method="removal", layers=layers, calibration=calibration_tokens)
        return float(small(calibration_tokens, labels=calibration_tokens).loss)

    first = min(range(LAYERS), key=lambda layer: loss([layer]))
    second = min(set(range(LAYERS)) - {first}, key=lambda layer: loss([first, layer]))
    with torch.enable_grad():
        _, plan = compress(model, method="removal", layers=2, importance="greedy", calibration=calibration_tokens)
    assert plan.importance["order"] == [first, second]
    assert plan.redundant == tuple(sorted((first, second)))


def _layers_that_return_tuples(name: str) -> PreTrainedModel:
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = {
        "falcon": transformers.FalconConfig(**settings),
        "bloom": transformers.BloomConfig(**settings),
        "gptj": transformers.GPTJConfig(**settings, rotary_dim=4, n_positions=64),
    }[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["falcon", "bloom", "gptj"])
@torch.no_grad()
def test_greedy_importance_of_layers_that_return_tuples(name: str, calibration_tokens: torch.Tensor) -> None:
    model = _layers_that_return_tuples(name)
    base = float(model(calibration_tokens, labels=calibration_tokens).loss)
    small, plan = compress(model, method="removal", layers=1, importance="greedy", calibration=calibration_tokens)
    left = float(small(calibration_tokens, labels=calibration_tokens).loss)
    slack = 16 * torch.finfo(torch.float32).eps * base  # losses are float32 means
    assert abs(plan.importance["scores"][plan.redundant[0]] - (left - base)) < slack


def test_full_rank_changes_nothing_but_rounding(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("qwen2")
    ids = prompt()
    for method in ("svd", "paper", "taco"):
        _, plan = compress(model, method=method, layers=[1], calibration=calibration_tokens)
        low = {
            1: {path: 32 if "k_proj" not in path and "v_proj" not in path else 16 for path in Architecture(model).paths}
        }
        full = dataclasses.replace(plan, structure=dataclasses.replace(plan.structure, low_rank=low))
        same, _ = compress(model, plan=full, calibration=calibration_tokens)
        with torch.no_grad():
            torch.testing.assert_close(same(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def _t5() -> PreTrainedModel:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=56, num_layers=3, num_heads=4)
    )


def _some_layers_with_experts() -> PreTrainedModel:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=56,
            moe_intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=3,
            num_experts_per_tok=2,
            mlp_only_layers=[1],
        )
    )


def _mamba() -> PreTrainedModel:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=4)
    )


def _gpt2_scaled() -> PreTrainedModel:
    config = CONFIGS["gpt2"]()
    config.scale_attn_by_inverse_layer_idx = True
    return transformers.GPT2LMHeadModel(config)


def _bert() -> PreTrainedModel:
    return transformers.BertLMHeadModel(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4
        )
    )


_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _minicpm3() -> transformers.MiniCPM3Config:
    return transformers.MiniCPM3Config(
        **_TINY, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, scale_depth=1.4,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["removal", "bridge", "svd"])
def test_a_scale_that_follows_the_depth_stays_what_it_was(
    method: str, calibration_tokens: torch.Tensor, tmp_path: Path
) -> None:
    """MiniCPM3 scales what its blocks add by the number of layers: a reloaded model added something else."""
    torch.manual_seed(0)
    model = transformers.MiniCPM3ForCausalLM(_minicpm3()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    small, plan = compress(model, method=method, layers=[1, 3], calibration=calibration_tokens)
    save_compressed(small, plan, tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert again.model.layers[0].residual_scale == pytest.approx(model.model.layers[0].residual_scale, rel=1e-12)
    torch.testing.assert_close(again(calibration_tokens).logits, small(calibration_tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_router_that_is_a_module_of_its_own_is_no_map() -> None:
    """HunYuan's reads its map's weight: a factor in its place ended in an AttributeError."""
    config = transformers.HunYuanMoEV1Config(**_TINY, num_key_value_heads=2, head_dim=8, num_experts=4, moe_topk=2)
    with torch.device("meta"):
        paths = Architecture(transformers.HunYuanMoEV1ForCausalLM(config)).paths
    assert "mlp.gate.wg" not in paths and "mlp.shared_mlp.down_proj" in paths


def _diffllama() -> PreTrainedModel:
    config = transformers.DiffLlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4
    )
    return transformers.DiffLlamaForCausalLM(config)


@pytest.mark.parametrize(
    "build, says",
    [
        (_bert, "BertLMHeadModel: tokens see those that come after"),
        (_t5, "encoder-decoder"),
        (_some_layers_with_experts, "mixed stacks"),
        (_mamba, "Mamba"),
        (_gpt2_scaled, "scale_attn_by_inverse_layer_idx"),
        (_diffllama, "layer's number"),
    ],
)
def test_unsupported_models_are_refused_by_name(
    build: Callable[[], PreTrainedModel], says: str, calibration_tokens: torch.Tensor
) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        compress(build(), method="svd", layers=1, calibration=calibration_tokens)


def test_a_bert_that_is_a_decoder_is_not_refused_for_what_its_tokens_see(calibration_tokens: torch.Tensor) -> None:
    model = _bert()
    model.config.is_decoder = True
    small, _ = compress(
        transformers.BertLMHeadModel(model.config), method="svd", layers=1, calibration=calibration_tokens
    )
    assert small(calibration_tokens).logits.isfinite().all()


def test_compressed_and_damaged_models_are_refused(
    compressed_tiny: Callable[..., Compressed], calibration_tokens: torch.Tensor
) -> None:
    _, small, _ = compressed_tiny("llama", "taco")
    with pytest.raises(TacoError, match="compressed already"):
        compress(small, method="taco", layers=1, calibration=calibration_tokens)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(TacoError, match="layers.2.mlp.up_proj.weight"):
        compress(model, method="taco", layers=1, calibration=calibration_tokens)


@pytest.mark.parametrize("method", ["taco", "bridge", "paper"])
def test_a_model_in_training_is_compressed_as_it_is_used(method: str, calibration_tokens: torch.Tensor) -> None:
    """Without its dropout, whatever mode it is in; and each of its modules is in that mode again afterwards."""
    config = copy.deepcopy(tiny_model("gpt2").config)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.5
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = torch.get_rng_state()
    plans = []
    for training in (False, True):
        model.train(training)
        model.transformer.h[1].attn.resid_dropout.eval()  # frozen by its owner
        torch.set_rng_state(state)
        compressed, plan = compress(model, method=method, layers=REPLACED, calibration=calibration_tokens)
        assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
        assert compressed.training == model.training == training
        assert model.transformer.h[2].attn.resid_dropout.training == training
        assert not model.transformer.h[1].attn.resid_dropout.training
        plans.append(plan)
    assert plans[0] == plans[1]
