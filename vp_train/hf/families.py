"""Translation between Hugging Face's config.json and ModelConfig, for the supported architectures.

A family reads a config.json into our settings, and writes one from them.  If reading what it wrote
does not give the same model, the family cannot express the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vp_train.config import ConfigError, ModelConfig
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
    """

    architecture: str
    defaults: Settings
    read: Callable[[Mapping[str, Any]], Settings]
    write: Callable[[ModelConfig], Settings]


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
        if value is not None or key.endswith("softcapping")
    }
    try:
        return _read(family, family.defaults | given)
    except KeyError as error:
        raise ConfigError(f"config.json has no {error.args[0]}") from None


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


def config_of(model: ModelConfig) -> Settings:
    """Return a config.json for this model.

    Raises ConfigError if no supported architecture has this model.  It names the nearest one and
    the settings that it lacks.
    """
    nearest: tuple[str, list[str]] | None = None
    for name, family in FAMILIES.items():
        config = (
            {"architectures": [family.architecture], "model_type": name}
            | _common(model)
            | family.write(model)
        )
        missing = _differences(model, model_of(config))
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
    ours, theirs = asdict(_canonical(model)), asdict(_canonical(other))
    names = [name for name, value in ours.items() if value != theirs[name]]
    # Settings that are None follow from the others.
    explicit = [name for name in names if getattr(model, name) is not None]
    return [f"model.{name}={getattr(model, name)}" for name in explicit or names]


def _canonical(model: ModelConfig) -> ModelConfig:
    """Return settings that are equal for models that compute the same.

    Implied values are written out, and settings without effect get their default.
    """
    plain = ModelConfig()
    local = [model.is_local(layer) for layer in range(model.num_layers)]
    same = {name: getattr(plain, name) for name in ("seq_length", "init_std")}
    if model.linear_bias:
        same |= {"qkv_bias": False}
    if model.rope_scaling == "none":
        same |= {"rope_factor": 1.0}
    if model.rope_scaling != "llama3":
        same |= {
            name: getattr(plain, name)
            for name in ("rope_low_frequency", "rope_high_frequency", "rope_original_length")
        }
    if not any(local):
        same |= {"sliding_window": None, "full_attention_every": None, "rope_local_base": None}
    else:
        base = (
            model.rope_base if model.rope_scaling == "none" and model.positions == "rope" else None
        )
        same |= {
            "full_attention_every": _every(local),
            "rope_local_base": model.rope_local_base or base,
        }
    size = head_size(model)
    divisor = float(size) if model.attention_divisor is None else model.attention_divisor
    return replace(model, head_size=size, attention_divisor=divisor, **same)


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
    values = config.get("rope_parameters")
    if values is None:
        values = {"rope_theta": config["rope_theta"]} | (config.get("rope_scaling") or {})
    elif layers is not None:
        values = {"rope_theta": config["rope_theta"]} | (values.get(layers) or {})
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
        case _:
            raise ConfigError(f"rope_type={kind} is not supported; default, linear and llama3 are")


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
    return {"rope_theta": model.rope_base, "rope_scaling": scaling}


def _windows(config: Mapping[str, Any], pattern: int) -> Settings:
    """Read the sliding-window layers of Gemma 2 and 3.

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
    full = config["num_hidden_layers"] if "layer_types" in config else config["max_window_layers"]
    types = config.get("layer_types") or ()
    if config["use_sliding_window"] and (
        full < config["num_hidden_layers"] or "sliding_attention" in types
    ):
        raise ConfigError(
            "use_sliding_window=true with "
            f"max_window_layers={config['max_window_layers']} "
            "is not supported: only the last layers would be local"
        )
    return _rope(config)


def _write_qwen(model: ModelConfig) -> Settings:
    return {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "max_window_layers": model.num_layers,
    } | _rope_written(model)


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
    local = _canonical(model).rope_local_base
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


_DEFAULTS: Settings = {
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
}
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
}
