"""Tiny models of every family, made by transformers, as references for import and export."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
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
_GPT2 = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 111,
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
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
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
    # SmolLM and SmolLM 2: a tied Llama, here with linearly scaled angles.
    "smollm": LlamaConfig(
        **_SMALL,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0},
    ),
    "mistral": MistralConfig(**_SMALL, head_dim=12, sliding_window=9),
    "mistral without a window": MistralConfig(**_SMALL, sliding_window=None),
    "phi3": Phi3Config(**_SMALL, sliding_window=None),
    "phi3, tied, a window": Phi3Config(**_SMALL, sliding_window=9, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**_SMALL),
    "olmo2, tied": Olmo2Config(
        **_SMALL | {"num_key_value_heads": 4},
        tie_word_embeddings=True,
        rope_parameters=_YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    ),
    "granite": GraniteConfig(
        **_SMALL,
        embedding_multiplier=12.0,
        attention_multiplier=0.3,
        residual_multiplier=0.22,
        logits_scaling=6.0,
    ),
    "granite, tied, biases": GraniteConfig(
        **_SMALL,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        attention_multiplier=0.125,
        logits_scaling=8.0,
    ),
    "gpt2": GPT2Config(**_GPT2),
    "gpt2, untied": GPT2Config(**_GPT2, n_inner=80, tie_word_embeddings=False),
    "llama, yarn": LlamaConfig(**_SMALL, rope_parameters=_YARN),
    "qwen2, yarn": Qwen2Config(**_SMALL, rope_parameters=_YARN | {"attention_factor": 1.3}),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen2, a window in every layer": Qwen2Config(
        **_SMALL,
        rope_parameters=_YARN,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=0,
    ),
    "qwen3": Qwen3Config(**_SMALL, head_dim=12),
    "qwen3, a window in every other layer": Qwen3Config(
        **_SMALL,
        head_dim=12,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
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


class _Double:
    """torch for a module that computes parts of a model in float32 whatever its dtype is."""

    def __getattr__(self, name: str) -> object:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextmanager
def in_double() -> Iterator[None]:
    """Let transformers compute norms, softmax and angles in float64 too, within this context."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.model") and vars(module).get("torch") is torch:
                patched.setattr(module, "torch", _Double())
        yield


def double(path: str) -> PreTrainedModel:
    """Return the model at `path` in float64; call it within `in_double`."""
    return AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float64
    ).eval()
