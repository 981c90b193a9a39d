"""Compressed checkpoints with random weights, one per architecture, that use everything the format has."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from taco_svd import BridgeSpec, Structure
from taco_svd.architectures import Architecture
from taco_svd.modeling import compressed_config_class
from taco_svd.replacement import LowRankLinear

VOCABULARY = 384
KEPT = (0, 1, 3, 5)
SOURCE_LAYERS = 6

# heads of 32, the smallest that vLLM's attention on a CPU takes
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 176,
    "num_hidden_layers": len(KEPT),
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama_biased": lambda: transformers.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=8, head_dim=32),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(**_GEMMA, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GEMMA, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=128,
        n_layer=len(KEPT),
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "opt": lambda: transformers.OPTConfig(
        **{**_COMMON, "ffn_dim": 176, "word_embed_proj_dim": 128}, do_layer_norm_before=True
    ),
    # maps that are fused in the checkpoint, queries, keys and values sorted by group of heads, which vLLM sorts anew
    "falcon": lambda: transformers.FalconConfig(**_COMMON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=128, n_layer=len(KEPT), n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
    "helium": lambda: transformers.HeliumConfig(**_GROUPED, head_dim=32),
    "mixtral": lambda: transformers.MixtralConfig(**_GROUPED, head_dim=32, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_GROUPED, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True
    ),
    "cohere": lambda: transformers.CohereConfig(**_GROUPED),
}


def structure_for(config: PreTrainedConfig, bridges: bool = True) -> Structure:
    """Two layers removed, bridges after layers 1 and 5; plain, pivoted and dense maps side by side in layers 1, 3."""
    with torch.device("meta"):
        paths = Architecture(AutoModelForCausalLM.from_config(config)).paths
    low_rank: dict[int, dict[str, int]] = {1: {}, 3: {}}
    pivoted: dict[int, list[str]] = {1: [], 3: []}
    for index, path in enumerate(paths):
        # layer 1: all plain but the fourth (pivoted) and the sixth (dense); layer 3: pivoted, dense, plain in turn
        if index != 5:
            low_rank[1][path] = 11 + 5 * index
        if index == 3:
            pivoted[1].append(path)
        if index % 3 != 1:
            low_rank[3][path] = 24 + index
        if index % 3 == 0:
            pivoted[3].append(path)
    return Structure(
        source_layers=SOURCE_LAYERS,
        kept=KEPT,
        low_rank=low_rank,
        pivoted={layer: tuple(paths) for layer, paths in pivoted.items()},
        bridges=(BridgeSpec(1, 9, True, 1e-6), BridgeSpec(5, 4, False, 1e-5)) if bridges else (),
    )


def random_model(name: str, dtype: torch.dtype = torch.float32, bridges: bool = True, seed: int = 7) -> PreTrainedModel:
    """A compressed model of `structure_for`, weights large enough for every part to show in the logits."""
    torch.manual_seed(seed)
    base = CONFIGS[name]()
    config_class = compressed_config_class(type(base))
    config = config_class.from_dict({**base.to_dict(), "taco_svd": structure_for(base, bridges).to_dict()})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(dtype) * (0.02 if parameter.ndim == 1 else 0.06))
        for module in model.modules():
            if isinstance(module, LowRankLinear) and module.pivot is not None:
                module.pivot.copy_(torch.randperm(module.in_features))
    model.config.architectures = [type(model).__name__]
    return model.eval()


def write_checkpoint(
    name: str, directory: Path, dtype: torch.dtype = torch.float32, bridges: bool = True, seed: int = 7
) -> Path:
    """Saves `random_model` as a checkpoint directory (without a tokenizer) and returns the directory."""
    random_model(name, dtype, bridges, seed).save_pretrained(directory)
    return directory
