"""One small random model per architecture the package promises to handle."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

LAYERS = 5
VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GROUPED,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=56,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model whose biases and norms are random too, so that a lost bias shows."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    # built in its dtype: `.to(bfloat16)` would also round the rotary frequencies, which a reload does not
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 3.0
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.02 * scale).to(dtype))
    model.config.architectures = [type(model).__name__]  # as save_pretrained would set it sooner or later
    return model.eval()
