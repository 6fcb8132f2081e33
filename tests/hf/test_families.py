"""config.json means the same in every form it has been written in, and what no family has is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.hf import models
from vp_train.cli import load_config
from vp_train.config import ConfigError, ModelConfig
from vp_train.hf.families import config_of, model_of
from vp_train.model import shape

_GEMMA = {
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
}
# As published, before transformers 5.
PUBLISHED = {
    "llama3_8b": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "qwen2_5_7b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "gemma2_9b": _GEMMA
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma3_1b": _GEMMA
    | {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
}
FAMILIES = {
    "llama3_8b": "llama",
    "qwen2_5_7b": "qwen2",
    "qwen3_8b": "qwen3",
    "gemma_7b": "gemma",
    "gemma2_9b": "gemma2",
    "gemma3_1b": "gemma3_text",
    "gemma3_12b": "gemma3_text",
    "small": "llama",
    "small_qwen": "qwen3",
    "small_gemma": "gemma3_text",
}


def preset(name):
    return load_config([f"model={name}"]).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_the_presets(name):
    model = preset(name)
    read = model_of(PUBLISHED[name])
    assert replace(read, head_size=shape.head_size(read), seq_length=1) == replace(
        model, head_size=shape.head_size(model), seq_length=1
    )


def test_llama_3_1_has_its_own_frequencies():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = model_of(PUBLISHED["llama3_8b"] | {"rope_scaling": scaling | {"rope_type": "llama3"}})
    parameters = scaling | {"rope_type": "llama3", "rope_theta": 500000.0}
    assert model_of(PUBLISHED["llama3_8b"] | {"rope_parameters": parameters}) == old
    assert (old.rope_scaling, old.rope_factor, old.rope_base) == ("llama3", 8.0, 500000.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_counts_the_same_parameters_in_what_is_written_of_a_preset(name):
    model = preset(name)
    config = config_of(model)
    assert config["model_type"] == FAMILIES[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert theirs.num_parameters() == shape.num_parameters(model)
    again = model_of(config)
    assert config_of(again) == config | {"max_position_embeddings": again.seq_length}


@pytest.mark.parametrize("name", models.CONFIGS)
def test_what_transformers_writes_and_what_we_write_mean_the_same(name):
    model = model_of(models.CONFIGS[name].to_dict())
    assert model_of(config_of(model)) == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_softcap": 3.0}, "the nearest, llama, does not have model.attention_softcap=3.0"),
        (
            {"normalisation": "layernorm", "linear_bias": True},
            "the nearest, llama, does not have model.normalisation=layernorm",
        ),
        ({"qk_norm": True, "qkv_bias": True}, "the nearest, qwen2, does not have model.qk_norm=True"),
        ({"sliding_window": 64}, "the nearest, llama, does not have model.sliding_window=64"),
        ({"rope_scaling": "llama3", "rope_factor": 2.0, "logit_softcap": 5.0}, "llama, does not have model.logit_softcap=5.0"),
    ],
)
def test_what_the_nearest_family_lacks_is_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        config_of(ModelConfig(**changes))
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("gemma3_1b", {"layer_types": ["full_attention", *["sliding_attention"] * 25]}, "layer_types are not supported"),
        ("gemma2_9b", {"layer_types": ["chunked_attention"] * 42}, r"layer_types \['chunked_attention'\] are not supported"),
        ("gemma2_9b", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("qwen2_5_7b", {"use_sliding_window": True, "max_window_layers": 20}, "use_sliding_window=true .* is not supported"),
        ("llama3_8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("llama3_8b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic is not supported"),
    ],
)
def test_features_that_are_not_built_are_named(base, changes, message):
    with pytest.raises(ConfigError, match=message):
        model_of(PUBLISHED[base] | changes)
