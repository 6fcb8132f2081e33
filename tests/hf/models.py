"""Tiny models of every family, made by transformers, as references for import and export."""

from __future__ import annotations

import os

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 111,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "pad_token_id": 7,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONG = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "llama3.1": LlamaConfig(**_SMALL, rope_parameters=_LLAMA3, head_dim=12, rms_norm_eps=1e-5),
    "llama with biases": LlamaConfig(
        **_SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SMALL, head_dim=12),
    "gemma": GemmaConfig(**_SMALL | {"num_key_value_heads": 1}, head_dim=16),
    "gemma2": Gemma2Config(
        **_SMALL,
        head_dim=12,
        query_pre_attn_scalar=10,
        sliding_window=9,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(
        **_SMALL | {"num_hidden_layers": 7}, head_dim=12, query_pre_attn_scalar=9, sliding_window=7
    ),
    "gemma3, long": Gemma3TextConfig(
        **_SMALL,
        head_dim=8,
        sliding_window=5,
        rope_parameters=_LONG,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """Return a model with random weights, including norms and biases."""
    torch.manual_seed(0)
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) / 4
    return model.to(dtype).eval()


def load(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
