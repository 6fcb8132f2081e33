"""Translation between Hugging Face's config.json and ModelConfig, for the supported architectures.

A family reads a config.json into our settings, and writes one from them.  If reading what it wrote
does not give the same model, the family cannot express the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vp_train.config import ConfigError, ModelConfig
from vp_train.config.canonical import canonical, yarn_factor
from vp_train.hf.names import GPT2, LLAMA, PHI3, Names
from vp_train.hf.values import check
from vp_train.model.shape import head_size

# Largest model.seq_length of an import, even if the model supports more.  A run may set its own.
_LONGEST = 4096

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    `defaults` apply to keys that config.json lacks.  `read` and `write` translate only what the
    families do not have in common.

    names: those of its tensors.
    renamed: its own names for the keys of config.json that others have in common.
    lacks: keys of the others that it does not have.
    """

    architecture: str
    defaults: Settings
    read: Callable[[Mapping[str, Any]], Settings]
    write: Callable[[ModelConfig], Settings]
    names: Names = LLAMA
    renamed: Mapping[str, str] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()


def model_of(config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that a config.json describes.

    Raises ConfigError that names a wrong value or an unsupported feature.
    """
    check(config)
    family = FAMILIES.get(config.get("model_type") or "")
    if family is None:
        raise ConfigError(
            f"model_type={config.get('model_type')!r} {config.get('architectures', '')} "
            f"is not known; vp-import reads {', '.join(FAMILIES)}"
        )
    _refuse(config, "quantization_config", None, "import the model that is not quantised")
    _refuse(config, "partial_rotary_factor", 1.0, "only whole heads are rotated here")
    _refuse(config, "use_bidirectional_attention", False, "attention is causal here")
    given = {
        key: value
        for key, value in config.items()
        if value is not None or key.endswith("softcapping") or key == "sliding_window"
    }
    own = {common: name for name, common in family.renamed.items()}
    given = {family.renamed.get(key, key): value for key, value in given.items()}
    try:
        return _read(family, family.defaults | given)
    except KeyError as error:
        missing = error.args[0]
        raise ConfigError(f"config.json has no {own.get(missing, missing)}") from None


def _read(family: Family, config: Mapping[str, Any]) -> ModelConfig:
    heads, groups = (
        config["num_attention_heads"],
        config.get("num_key_value_heads", config["num_attention_heads"]),
    )
    size = config.get("head_dim")
    settings: Settings = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": heads,
        "num_query_groups": groups,
        "head_size": None if size is None or size * heads == config["hidden_size"] else size,
        "ffn_hidden_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "seq_length": min(config["max_position_embeddings"], _LONGEST),
        "tied_embeddings": config["tie_word_embeddings"],
        "norm_epsilon": float(config["rms_norm_eps"]),
        "init_std": float(config["initializer_range"]),
    }
    return ModelConfig(**settings | family.read(config))


def config_of(model: ModelConfig, model_type: str | None = None) -> Settings:
    """Return a config.json for this model, of `model_type` if that can express it.

    Raises ConfigError if no supported architecture has this model.  It names the nearest one and
    the settings that it lacks.
    """
    nearest: tuple[str, list[str]] | None = None
    for name in sorted(FAMILIES, key=lambda name: name != model_type):
        family = FAMILIES[name]
        own = {common: key for key, common in family.renamed.items()}
        common = {
            own.get(key, key): value
            for key, value in _common(model).items()
            if key not in family.lacks
        }
        config = (
            {"architectures": [family.architecture], "model_type": name}
            | common
            | family.write(model)
        )
        try:
            missing = _differences(model, model_of(config))
        except ConfigError:  # the family refuses a value that it cannot have
            continue
        if not missing:
            return config
        if nearest is None or len(missing) < len(nearest[1]):
            nearest = name, missing
    assert nearest is not None
    raise ConfigError(
        f"no Hugging Face architecture here is this model; the nearest, {nearest[0]}, "
        f"does not have {', '.join(nearest[1])}"
    )


def _common(model: ModelConfig) -> Settings:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": head_size(model),
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.seq_length,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def _differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """Return the settings by which two models compute differently, with values of the first."""
    ours, theirs = asdict(_comparable(model)), asdict(_comparable(other))
    names = [name for name, value in ours.items() if value != theirs[name]]
    # Settings that are None follow from the others.
    explicit = [name for name in names if getattr(model, name) is not None]
    return [f"model.{name}={getattr(model, name)}" for name in explicit or names]


def _comparable(model: ModelConfig) -> ModelConfig:
    """Return the canonical settings of a model, without those that a config.json need not have."""
    plain = ModelConfig()
    return replace(canonical(model), seq_length=plain.seq_length, init_std=plain.init_std)


def _every(local: list[bool]) -> int | None:
    """Return full_attention_every for layers of which some are local.  None means all are local.

    Raises ConfigError if they follow another pattern.
    """
    every = local.index(False) + 1 if False in local else None
    if local != [every is None or (layer + 1) % every != 0 for layer in range(len(local))]:
        raise ConfigError(
            "layer_types are not supported: "
            "one full_attention must follow the same number of sliding_attention each time"
        )
    return every


def _refuse(config: Mapping[str, Any], name: str, only: object, reason: str) -> None:
    """Raise ConfigError unless setting `name` is absent, null, or `only`."""
    if config.get(name) not in (None, only):
        raise ConfigError(f"{name}={config[name]} is not supported: {reason}")


def _activation(config: Mapping[str, Any], known: tuple[str, ...]) -> None:
    given = config.get("hidden_activation") or config["hidden_act"]
    if given not in known:
        raise ConfigError(
            f"the activation {given} is not supported for {config['model_type']}, "
            f"which has {known[0]}"
        )


def _rope(config: Mapping[str, Any], layers: str | None = None) -> Settings:
    """Read the RoPE settings of all layers, or those of the layer type `layers`.

    transformers 5 has them in rope_parameters, earlier versions in rope_theta and rope_scaling.
    """
    values, scaling = config.get("rope_parameters"), config.get("rope_scaling") or {}
    own = config.get("original_max_position_embeddings")
    if layers is not None and values is not None:
        values = (values.get(layers) or {}) | scaling  # as transformers reads both
    else:
        values = scaling or values or {}
        values = values | ({} if own is None else {"original_max_position_embeddings": own})
    values = {
        "rope_theta": config["rope_theta"],
        # the default of transformers
        "original_max_position_embeddings": config.get("max_position_embeddings"),
    } | values
    kind = values.get("rope_type", values.get("type", "default"))
    _refuse(values, "partial_rotary_factor", 1.0, "only whole heads are rotated here")
    settings = {"rope_base": float(values["rope_theta"])}
    match kind:
        case "default":
            return settings
        case "linear":
            return settings | {"rope_scaling": "linear", "rope_factor": float(values["factor"])}
        case "llama3":
            return settings | {
                "rope_scaling": "llama3",
                "rope_factor": float(values["factor"]),
                "rope_low_frequency": float(values["low_freq_factor"]),
                "rope_high_frequency": float(values["high_freq_factor"]),
                "rope_original_length": values["original_max_position_embeddings"],
            }
        case "yarn":
            return settings | _yarn(values)
        case _:
            raise ConfigError(
                f"rope_type={kind} is not supported; default, linear, llama3 and yarn are"
            )


def _yarn(values: Mapping[str, Any]) -> Settings:
    _refuse(values, "truncate", True, "the ramp begins and ends at whole indices here")
    factor = float(values["factor"])
    given, mscales = (
        values.get("attention_factor"),
        (values.get("mscale"), values.get("mscale_all_dim")),
    )
    if given is None and all(mscales):
        above, below = (yarn_factor(factor, mscale) for mscale in mscales if mscale)
        given = above / below
    return {
        "rope_scaling": "yarn",
        "rope_factor": factor,
        "rope_low_frequency": float(values.get("beta_slow") or 1),
        "rope_high_frequency": float(values.get("beta_fast") or 32),
        "rope_original_length": values["original_max_position_embeddings"],
        "rope_attention_factor": None if given is None else float(given),
    }


def _rope_written(model: ModelConfig) -> Settings:
    """Write the RoPE settings in the form that every version of transformers reads."""
    scaling: Settings | None = None
    if model.rope_scaling == "linear":
        scaling = {"rope_type": "linear", "factor": model.rope_factor}
    elif model.rope_scaling == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_factor,
            "low_freq_factor": model.rope_low_frequency,
            "high_freq_factor": model.rope_high_frequency,
            "original_max_position_embeddings": model.rope_original_length,
        }
    elif model.rope_scaling == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": model.rope_factor,
            "beta_slow": model.rope_low_frequency,
            "beta_fast": model.rope_high_frequency,
            "original_max_position_embeddings": model.rope_original_length,
        }
        if model.rope_attention_factor is not None:
            scaling["attention_factor"] = model.rope_attention_factor
    return {"rope_theta": model.rope_base, "rope_scaling": scaling}


def _windows(config: Mapping[str, Any], pattern: int = 1) -> Settings:
    """Read the sliding-window layers of Gemma 2 and 3, and of Qwen.

    If config.json has no layer_types, every `pattern`-th layer has full attention.
    """
    types = config.get("layer_types")
    if types is None:
        if pattern < 1:
            raise ConfigError(
                f"sliding_window_pattern={pattern} is too small; "
                "one of so many layers has full attention, so it must be at least 1"
            )
        full = [(layer + 1) % pattern == 0 for layer in range(config["num_hidden_layers"])]
        types = ["full_attention" if is_full else "sliding_attention" for is_full in full]
    if len(types) != config["num_hidden_layers"]:
        raise ConfigError(
            f"layer_types has {len(types)} entries for "
            f"num_hidden_layers={config['num_hidden_layers']}; give one entry per layer"
        )
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(
            f"layer_types {sorted(unknown)} are not supported; "
            "full_attention and sliding_attention are"
        )
    local = [kind == "sliding_attention" for kind in types]
    if not any(local):
        return {}
    return {"sliding_window": config["sliding_window"], "full_attention_every": _every(local)}


def _layer_types(model: ModelConfig) -> list[str]:
    return [
        "sliding_attention" if model.is_local(layer) else "full_attention"
        for layer in range(model.num_layers)
    ]


def _read_llama(config: Mapping[str, Any]) -> Settings:
    _activation(config, ("silu",))
    if config["attention_bias"] != config["mlp_bias"]:
        raise ConfigError(
            f"attention_bias={config['attention_bias']} with mlp_bias={config['mlp_bias']} "
            "is not supported; both or none are"
        )
    return {"linear_bias": config["attention_bias"]} | _rope(config)


def _write_llama(model: ModelConfig) -> Settings:
    bias = model.linear_bias
    return {"hidden_act": "silu", "attention_bias": bias, "mlp_bias": bias} | _rope_written(model)


def _read_qwen(config: Mapping[str, Any]) -> Settings:
    _activation(config, ("silu",))
    _refuse(
        config,
        "attention_bias",
        False,
        "only q, k and v of Qwen 2 have biases, and Qwen 3 has none",
    )
    return _qwen_windows(config) | _rope(config)


def _qwen_windows(config: Mapping[str, Any]) -> Settings:
    """Read the sliding-window layers of Qwen: without layer_types those from max_window_layers on.

    Without a window, or with use_sliding_window=false, no layer is local whatever the others say.
    """
    layers, full = config["num_hidden_layers"], config["max_window_layers"]
    window = config.get("sliding_window", _QWEN_WINDOW)
    if not config["use_sliding_window"] or window is None:
        return {}
    types = config.get("layer_types")
    if types is None:
        if 0 < full < layers:
            raise ConfigError(
                f"use_sliding_window=true with max_window_layers={full} is not supported: "
                f"only the last {layers - full} of {layers} layers would be local"
            )
        types = ["full_attention" if full > 0 else "sliding_attention"] * layers
    return _windows({**config, "sliding_window": window, "layer_types": types})


def _write_qwen(model: ModelConfig) -> Settings:
    types = _layer_types(model)
    windows: Settings = {"use_sliding_window": False, "max_window_layers": model.num_layers}
    if "sliding_attention" in types:
        windows = {
            "use_sliding_window": True,
            "sliding_window": model.sliding_window,
            "max_window_layers": 0,
            "layer_types": types,
        }
    return {"hidden_act": "silu"} | windows | _rope_written(model)


_GEMMA = {"activation": "geglu", "zero_centred_norm": True, "embedding_scale": True}


def _read_gemma(config: Mapping[str, Any], layers: str | None = None) -> Settings:
    # Early files of the first Gemma say "gelu" but mean the tanh approximation.  In all other files
    # "gelu" is the exact function.
    early = config["model_type"] == "gemma" and not config.get("hidden_activation")
    _activation(config, ("gelu_pytorch_tanh", "gelu") if early else ("gelu_pytorch_tanh",))
    _refuse(config, "attention_bias", False, "Gemma has none")
    return _GEMMA | _rope(config, layers)


def _write_gemma(model: ModelConfig) -> Settings:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    } | _rope_written(model)


def _read_gemma2(config: Mapping[str, Any]) -> Settings:
    softcap = {"attention_softcap": config.get("attn_logit_softcapping")}
    return _read_gemma(config) | _sandwich(config) | softcap | _windows(config, 2)


def _write_gemma2(model: ModelConfig) -> Settings:
    return (
        _write_gemma(model)
        | _sandwich_written(model)
        | {"attn_logit_softcapping": model.attention_softcap}
    )


def _read_gemma3(config: Mapping[str, Any]) -> Settings:
    _refuse(
        config,
        "attn_logit_softcapping",
        None,
        "transformers never applies it in Gemma 3; set it to null for the same result",
    )
    local = {
        "rope_parameters": config.get("rope_parameters"),
        "rope_theta": config["rope_local_base_freq"],
    }
    of_local = _rope(local, "sliding_attention")
    if "rope_scaling" in of_local:
        raise ConfigError(
            f"rope_type={of_local['rope_scaling']} of sliding_attention is not supported; "
            "default is"
        )
    windows = _windows(config, config["sliding_window_pattern"])
    own = {"rope_local_base": of_local["rope_base"]} if windows else {}
    return (
        _read_gemma(config, "full_attention")
        | _sandwich(config)
        | windows
        | own
        | {"qk_norm": True}
    )


def _write_gemma3(model: ModelConfig) -> Settings:
    local = canonical(model).rope_local_base
    own = {} if local is None else {"rope_local_base_freq": local}
    return (
        _write_gemma(model)
        | _sandwich_written(model)
        | own
        | {"sliding_window_pattern": model.full_attention_every or model.num_layers + 1}
    )


def _sandwich(config: Mapping[str, Any]) -> Settings:
    """Read what Gemma 2 and 3 share: norms before and after every block, and the divisor."""
    return {
        "post_norms": True,
        "attention_divisor": float(config["query_pre_attn_scalar"]),
        "logit_softcap": config.get("final_logit_softcapping"),
    }


def _sandwich_written(model: ModelConfig) -> Settings:
    divisor = (
        float(head_size(model)) if model.attention_divisor is None else model.attention_divisor
    )
    return {
        "query_pre_attn_scalar": int(divisor),
        "final_logit_softcapping": model.logit_softcap,
        "sliding_window": model.sliding_window or model.seq_length,
        "layer_types": _layer_types(model),
    }


def _read_phi3(config: Mapping[str, Any]) -> Settings:
    settings = _read_mistral(config)
    if "rope_scaling" in settings:
        raise ConfigError(
            f"rope_type={settings['rope_scaling']} is not supported for phi3, which has default"
        )
    return settings


def _read_mistral(config: Mapping[str, Any]) -> Settings:
    """Read what Mistral and Phi-3 share: a window in every layer, if in any."""
    _activation(config, ("silu",))
    _refuse(config, "attention_bias", False, f"{config['model_type']} has none")
    if config.get("sliding_window") and "full_attention" in (config.get("layer_types") or ()):
        raise ConfigError(
            f"layer_types of {config['model_type']} are not supported: "
            "transformers gives all its layers the same window"
        )
    return {"sliding_window": config.get("sliding_window")} | _rope(config)


def _write_mistral(model: ModelConfig) -> Settings:
    window = {"sliding_window": model.sliding_window}
    return {"hidden_act": "silu"} | window | _rope_written(model)


def _read_olmo2(config: Mapping[str, Any]) -> Settings:
    _activation(config, ("silu",))
    _refuse(config, "attention_bias", False, "OLMo 2 has none")
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}
    return norms | _rope(config)


def _write_silu(model: ModelConfig) -> Settings:
    return {"hidden_act": "silu"} | _rope_written(model)


def _read_granite(config: Mapping[str, Any]) -> Settings:
    scale = config["attention_multiplier"]
    if scale <= 0:
        raise ConfigError(f"attention_multiplier={scale} is not supported; it must be above 0")
    return _read_llama(config) | {
        "attention_divisor": _divisor(scale),
        "embedding_multiplier": float(config["embedding_multiplier"]),
        "residual_multiplier": float(config["residual_multiplier"]),
        "logit_divisor": float(config["logits_scaling"]),
    }


def _write_granite(model: ModelConfig) -> Settings:
    divisor = (
        float(head_size(model)) if model.attention_divisor is None else model.attention_divisor
    )
    exact = divisor**-0.5
    short = float(f"{exact:.10g}")
    return _write_llama(model) | {
        "attention_multiplier": short if _divisor(short) == divisor else exact,
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "logits_scaling": model.logit_divisor,
    }


def _divisor(scale: float) -> float:
    """Return the attention_divisor of scores that are multiplied by `scale`, to 12 digits."""
    return float(f"{scale**-2.0:.12g}")


def _read_gpt2(config: Mapping[str, Any]) -> Settings:
    _activation(config, ("gelu_new", "gelu_pytorch_tanh"))
    _refuse(config, "scale_attn_weights", True, "scores are divided by sqrt(head size) here")
    _refuse(config, "scale_attn_by_inverse_layer_idx", False, "all layers scale scores alike here")
    _refuse(config, "add_cross_attention", False, "a decoder alone is trained here")
    return {
        "activation": "gelu",
        "ffn_hidden_size": config["intermediate_size"] or 4 * config["hidden_size"],
        "linear_bias": True,
        "normalisation": "layernorm",
        "positions": "learned",
        "seq_length": config["max_position_embeddings"],  # the rows of a matrix
    }


def _write_gpt2(model: ModelConfig) -> Settings:
    return {"activation_function": "gelu_new", "n_ctx": model.seq_length}


_GPT2_KEYS = {
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "rms_norm_eps",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
_DEFAULTS: Settings = {
    "max_position_embeddings": _LONGEST,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "hidden_act": "silu",
}
_QWEN_WINDOW = 4096  # where use_sliding_window=true comes without sliding_window
_QWEN_DEFAULTS = _DEFAULTS | {
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
_GEMMA_DEFAULTS = _DEFAULTS | {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        _DEFAULTS | {"tie_word_embeddings": False, "mlp_bias": False},
        _read_llama,
        _write_llama,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _QWEN_DEFAULTS,
        lambda config: _read_qwen(config) | {"qkv_bias": True},
        _write_qwen,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _QWEN_DEFAULTS | {"head_dim": 128},
        lambda config: _read_qwen(config) | {"qk_norm": True},
        _write_qwen,
    ),
    "gemma": Family("GemmaForCausalLM", _GEMMA_DEFAULTS, _read_gemma, _write_gemma),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA_DEFAULTS
        | {
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _read_gemma2,
        _write_gemma2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA_DEFAULTS
        | {
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        _read_gemma3,
        _write_gemma3,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _DEFAULTS | {"tie_word_embeddings": False, "sliding_window": 4096},
        _read_mistral,
        _write_mistral,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _DEFAULTS | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
        _read_phi3,
        _write_mistral,
        PHI3,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _DEFAULTS | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
        _read_olmo2,
        _write_silu,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _DEFAULTS
        | {
            "tie_word_embeddings": False,
            "mlp_bias": False,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        _read_granite,
        _write_granite,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _DEFAULTS
        | {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "intermediate_size": None,
        },
        _read_gpt2,
        _write_gpt2,
        GPT2,
        _GPT2_KEYS,
        ("attention_bias", "attention_dropout", "head_dim", "num_key_value_heads"),
    ),
}
