"""Every published form of config.json is read correctly, and unsupported features are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.hf import models
from vp_train.config import ConfigError, ModelConfig
from vp_train.hf import families
from vp_train.hf.families import config_of, model_of
from vp_train.model import shape
from vp_train.settings import load_config

_GEMMA = {
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
}
# Published files, in the form before transformers 5.
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
    "gemma_7b": _GEMMA
    | {
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": None,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "max_position_embeddings": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 16,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
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
    "mistral_7b": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "phi3_mini": {
        "model_type": "phi3",
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "olmo2_7b": {
        "model_type": "olmo2",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
    "granite_2b": {
        "model_type": "granite",
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_type": "cls_index",
        "vocab_size": 50257,
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
    "llama3_70b": "llama",
    "llama3_405b": "llama",
    "qwen2_5_7b": "qwen2",
    "qwen3_8b": "qwen3",
    "mistral_7b": "mistral",
    "phi3_mini": "mistral",  # which computes the same
    "olmo2_7b": "olmo2",
    "granite_2b": "granite",
    "gpt2": "gpt2",
    **{f"gpt_{size}": "gpt2" for size in ("4b", "7b", "10b", "16b", "21b", "30b")},
    "gemma_7b": "gemma",
    "gemma2_9b": "gemma2",
    "gemma3_1b": "gemma3_text",
    "gemma3_12b": "gemma3_text",
    "nano": "llama",
    "small": "llama",
    "small_qwen": "qwen3",
    "small_gemma": "gemma3_text",
}


GEMMA_3 = {
    "activation": "geglu",
    "zero_centred_norm": True,
    "embedding_scale": True,
    "tied_embeddings": True,
    "post_norms": True,
    "qk_norm": True,
    "sliding_window": 16,
    "full_attention_every": 2,
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
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = model_of(PUBLISHED["llama3_8b"] | {"rope_scaling": scaling | {"rope_type": "llama3"}})
    parameters = scaling | {"rope_type": "llama3", "rope_theta": 500000.0}
    assert model_of(PUBLISHED["llama3_8b"] | {"rope_parameters": parameters}) == old
    assert (old.rope_scaling, old.rope_factor, old.rope_base) == ("llama3", 8.0, 500000.0)
    # transformers prefers the same key beside these values.
    beside = {"rope_parameters": parameters, "original_max_position_embeddings": 4096}
    assert model_of(PUBLISHED["llama3_8b"] | beside) == replace(old, rope_original_length=4096)


@pytest.mark.parametrize("name", ["llama3", "yarn"])
def test_frequencies_without_their_first_length_are_those_of_transformers(name):
    scaling = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = scaling | {"rope_type": name, "rope_theta": 5e5}
    config = PUBLISHED["llama3_8b"] | {"rope_parameters": parameters}
    model = model_of(config)
    theirs = AutoConfig.for_model(**config).rope_parameters["original_max_position_embeddings"]
    assert model.rope_original_length == theirs == config["max_position_embeddings"]


def test_both_forms_of_the_frequencies_of_gemma_3_together_are_those_of_transformers():
    both = PUBLISHED["gemma3_1b"] | {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 50.0}},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    ours = model_of(both)  # first, because transformers changes what it is given
    theirs = AutoConfig.for_model(**both).rope_parameters
    assert ours == model_of(PUBLISHED["gemma3_1b"] | {"rope_parameters": theirs})


def test_an_activation_that_is_left_out_is_that_of_the_family():
    for name, published in PUBLISHED.items():
        silent = {key: value for key, value in published.items() if key != "hidden_act"}
        assert model_of(silent) == model_of(published), name


def test_every_preset_has_a_family():
    presets = Path(__file__).parents[2] / "configs" / "model"
    assert FAMILIES.keys() == {file.stem for file in presets.glob("*.yaml")}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_counts_the_same_parameters_in_what_is_written_of_a_preset(name):
    model = preset(name)
    config = config_of(model)
    assert config["model_type"] == FAMILIES[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert theirs.num_parameters() == shape.num_parameters(model)
    again = model_of(config)
    reach = "n_positions" if config["model_type"] == "gpt2" else "max_position_embeddings"
    assert config_of(again) == config | {reach: again.seq_length}


@pytest.mark.parametrize("name", models.CONFIGS)
def test_what_transformers_writes_and_what_we_write_mean_the_same(name):
    model = model_of(models.CONFIGS[name].to_dict())
    assert model_of(config_of(model)) == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_softcap": 3.0},
            "the nearest, llama, does not have model.attention_softcap=3.0",
        ),
        (
            {"normalisation": "layernorm", "linear_bias": True},
            "the nearest, llama, does not have model.normalisation=layernorm",
        ),
        (
            {"qk_norm": True, "qkv_bias": True},
            "the nearest, qwen2, does not have model.qk_norm=True",
        ),
        (
            {"sliding_window": 64, "full_attention_every": 2},
            "the nearest, qwen2, does not have model.qkv_bias=False",
        ),
        (
            {"rope_scaling": "llama3", "rope_factor": 2.0, "logit_softcap": 5.0},
            "llama, does not have model.logit_softcap=5.0",
        ),
        (
            GEMMA_3 | {"rope_local_base": 1e3, "attention_softcap": 5.0},
            "gemma3_text, does not have model.attention_softcap=5.0",
        ),
    ],
)
def test_what_the_nearest_family_lacks_is_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        config_of(ModelConfig(**changes))
    assert str(caught.value).endswith(message)


def test_a_family_that_refuses_a_model_is_passed_over():
    model = ModelConfig(rope_scaling="linear", rope_factor=2.0)
    assert config_of(model, "phi3") == config_of(model)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            "gemma3_1b",
            {"layer_types": ["full_attention", *["sliding_attention"] * 25]},
            "layer_types are not supported",
        ),
        (
            "gemma2_9b",
            {"layer_types": ["chunked_attention"] * 42},
            r"layer_types \['chunked_attention'\] are not supported",
        ),
        (
            "gemma2_9b",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not supported",
        ),
        (
            "qwen2_5_7b",
            {"use_sliding_window": True, "max_window_layers": 20},
            "use_sliding_window=true .* is not supported",
        ),
        ("llama3_8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            "llama3_8b",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.25,
                }
            },
            "partial_rotary_factor=0.25 is not supported",
        ),
        (
            "gemma3_1b",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=50.0 is not supported: transformers never",
        ),
        (
            "gemma3_1b",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                }
            },
            "rope_type=linear of sliding_attention is not supported",
        ),
        (
            "gemma2_9b",
            {"hidden_activation": "gelu"},
            "activation gelu is not supported for gemma2, which has gelu_pytorch_tanh",
        ),
        (
            "gemma2_9b",
            {"hidden_activation": None, "hidden_act": "gelu"},
            "activation gelu is not supported for gemma2",
        ),
        (
            "gemma3_1b",
            {"hidden_activation": "gelu"},
            "activation gelu is not supported for gemma3_text",
        ),
        (
            "gemma_7b",
            {"hidden_activation": "gelu"},
            "activation gelu is not supported for gemma, which",
        ),
        (
            "llama3_8b",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type=dynamic is not supported",
        ),
        (
            "llama3_8b",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "truncate": False,
                }
            },
            "truncate=False is not supported",
        ),
        (
            "mistral_7b",
            {"layer_types": ["full_attention", "sliding_attention"] * 16},
            "layer_types of mistral are not supported",
        ),
        (
            "phi3_mini",
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
            "rope_type=longrope is not supported",
        ),
        ("phi3_mini", {"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75 is not"),
        (
            "phi3_mini",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type=linear is not supported for phi3",
        ),
        ("olmo2_7b", {"attention_bias": True}, "attention_bias=True is not supported: OLMo 2 has"),
        ("granite_2b", {"attention_multiplier": 0.0}, "attention_multiplier=0.0 is not supported"),
        ("granite_2b", {"attention_bias": True}, "attention_bias=True with mlp_bias=False is not"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True is not supported",
        ),
        ("gpt2", {"activation_function": "gelu"}, "the activation gelu is not supported for gpt2"),
        ("gpt2", {"n_embd": None}, "config.json has no n_embd"),
    ],
)
def test_features_that_are_not_built_are_named(base, changes, message):
    with pytest.raises(ConfigError, match=message):
        model_of(PUBLISHED[base] | changes)


def test_transformers_never_caps_the_scores_of_gemma_3():
    """The reason why we refuse the setting.  If this test fails one day, Gemma 3 may have a cap."""
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain, capped = (
            models.make("gemma3", attn_logit_softcapping=cap)(ids).logits for cap in (None, 0.1)
        )
    assert torch.equal(plain, capped)


@pytest.mark.parametrize("name", PUBLISHED)
def test_another_activation_is_refused_by_every_family(name):
    keys = ("hidden_act", "hidden_activation", "activation_function")
    with pytest.raises(ConfigError, match="activation relu is not supported"):
        model_of(PUBLISHED[name] | dict.fromkeys(keys, "relu"))


def test_a_gemma_may_have_full_attention_in_every_layer():
    given = {key: value for key, value in PUBLISHED["gemma3_1b"].items() if key != "layer_types"}
    model = model_of(given | {"sliding_window_pattern": 1})
    assert not any(map(model.is_local, range(model.num_layers)))
    with pytest.raises(ConfigError, match="sliding_window_pattern=0 is too small"):
        model_of(given | {"sliding_window_pattern": 0})


@pytest.mark.parametrize(
    ("mscales", "factor"),
    [
        ({}, None),
        ({"mscale": 1.0}, None),
        ({"mscale_all_dim": 1.0}, None),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.5, "mscale_all_dim": 1.0, "attention_factor": 1.5}, 1.5),
    ],
)
def test_yarn_takes_its_factor_of_attention_from_both_scales_or_none(mscales, factor):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    given = {"rope_parameters": yarn | {"factor": 4.0} | mscales}
    assert model_of(PUBLISHED["llama3_8b"] | given).rope_attention_factor == factor


def test_gelu_of_an_early_gemma_is_its_approximation():
    assert model_of(PUBLISHED["gemma_7b"] | {"hidden_act": "gelu"}) == model_of(
        PUBLISHED["gemma_7b"]
    )


def test_an_import_is_as_long_as_its_architecture_reaches_but_not_too_long_to_train():
    assert model_of(PUBLISHED["qwen2_5_7b"]).seq_length == 4096
    assert model_of(PUBLISHED["qwen2_5_7b"] | {"max_position_embeddings": 2048}).seq_length == 2048


def test_local_layers_without_a_base_have_that_of_all():
    model = ModelConfig(**GEMMA_3, rope_base=5e5)
    config = config_of(model)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (5e5, 5e5)
    assert model_of(config) == replace(model, rope_local_base=5e5, attention_divisor=32.0)
    # This scales RoPE of the local layers too, which Gemma 3 does not.
    scaled = replace(model, rope_scaling="linear", rope_factor=2.0)
    with pytest.raises(ConfigError, match="no Hugging Face architecture here is this model"):
        config_of(scaled)


@pytest.mark.parametrize(
    ("base", "name", "value", "message"),
    [
        ("llama3_8b", "hidden_size", "32", 'hidden_size="32" must be a whole number, like 4096'),
        ("llama3_8b", "num_hidden_layers", 2.0, "num_hidden_layers=2.0 must be a whole number"),
        ("llama3_8b", "vocab_size", True, "vocab_size=true must be a whole number"),
        ("llama3_8b", "num_key_value_heads", 0, "model.num_query_groups=0 is too small"),
        ("llama3_8b", "model_type", ["llama"], 'model_type=["llama"] must be a text'),
        ("llama3_8b", "hidden_act", 3, "hidden_act=3 must be a text"),
        ("llama3_8b", "rope_theta", "abc", 'rope_theta="abc" must be a finite number, like 0.5'),
        ("llama3_8b", "rope_theta", float("inf"), "rope_theta=Infinity must be a finite number"),
        ("llama3_8b", "rope_theta", 10**400, "rope_theta=1000"),
        ("llama3_8b", "rms_norm_eps", "x", 'rms_norm_eps="x" must be a finite number'),
        ("llama3_8b", "rms_norm_eps", float("nan"), "rms_norm_eps=NaN must be a finite number"),
        ("llama3_8b", "rms_norm_eps", -1.0, "model.norm_epsilon=-1.0 is too small"),
        ("llama3_8b", "rope_parameters", 5, "rope_parameters=5 must be an object"),
        (
            "llama3_8b",
            "rope_parameters",
            {"rope_theta": "1"},
            'rope_parameters: rope_theta="1" must be a finite number',
        ),
        (
            "llama3_8b",
            "tie_word_embeddings",
            "false",
            'tie_word_embeddings="false" must be true or false',
        ),
        (
            "gemma3_1b",
            "rope_parameters",
            {"full_attention": 1},
            "rope_parameters: full_attention=1 must be an object",
        ),
        ("gemma3_1b", "layer_types", [None] * 26, "layer_types=[null, null, null"),
        (
            "gemma3_1b",
            "layer_types",
            ["full_attention"],
            "layer_types has 1 entries for num_hidden_layers=26",
        ),
        ("gemma3_1b", "sliding_window_pattern", 0, "sliding_window_pattern=0 is too small"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_it_must_be(base, name, value, message):
    with pytest.raises(ConfigError) as caught:
        model_of(PUBLISHED[base] | {name: value})
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("kind", sorted(families.FAMILIES))
def test_a_key_that_is_missing_counts_as_in_transformers(kind):
    """Except max_position_embeddings, which bounds only what a run may be given."""
    ours, theirs = families.FAMILIES[kind].defaults, AutoConfig.for_model(kind).to_dict()
    common = (ours.keys() & theirs.keys()) - {"max_position_embeddings"}
    assert common
    assert {key: ours[key] for key in common} == {key: theirs[key] for key in common}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("uses", [False, True])
@pytest.mark.parametrize("window", [{}, {"sliding_window": None}, {"sliding_window": 9}])
def test_layers_of_a_qwen_are_local_where_those_of_transformers_are(family, first, uses, window):
    own = {"model_type": family, "num_hidden_layers": 4}
    said = {"use_sliding_window": uses, "max_window_layers": first, **window}
    config = {
        name: value for name, value in PUBLISHED["qwen2_5_7b"].items() if "window" not in name
    }
    config |= own | said
    theirs = AutoConfig.for_model(**config)
    local = [kind == "sliding_attention" for kind in theirs.layer_types]
    if any(local) and not all(local):
        with pytest.raises(ConfigError, match=f"max_window_layers={first} is not supported"):
            model_of(config)
        return
    model = model_of(config)
    assert [model.is_local(layer) for layer in range(4)] == local
    assert model.sliding_window == (theirs.sliding_window if all(local) else None)


def test_a_sliding_window_that_no_layer_has_is_no_reason_to_refuse():
    plain = PUBLISHED["qwen2_5_7b"]
    layers = plain["num_hidden_layers"]
    windowed = plain | {"use_sliding_window": True, "max_window_layers": layers}
    assert model_of(windowed) == model_of(plain)
    assert model_of(windowed | {"max_window_layers": layers + 1}) == model_of(plain)
    for changes in ({"use_sliding_window": False}, {"sliding_window": None}):
        assert model_of(windowed | {"max_window_layers": 0} | changes) == model_of(plain)
    with pytest.raises(ConfigError, match=rf"only the last 1 of {layers} layers would be local"):
        model_of(windowed | {"max_window_layers": layers - 1})
    full = {"layer_types": ["full_attention"] * layers, "max_window_layers": layers - 1}
    assert model_of(windowed | full) == model_of(plain)
    mixed = {"layer_types": ["full_attention", "sliding_attention"] * 16, "sliding_window": None}
    assert model_of(PUBLISHED["mistral_7b"] | mixed).sliding_window is None
