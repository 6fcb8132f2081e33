"""Type checks for the values of a config.json.

JSON may hold a value of any type.  Without a check, a wrong type would cause an error far from the
file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vp_train.config import ConfigError

_WHOLE, _NUMBER, _FLAG = "a whole number, like 4096", "a finite number, like 0.5", "true or false"
_LAYERS = "a whole number up to 100,000"
_TEXT, _TEXTS, _OBJECT = (
    'a text, like "llama"',
    'a list of texts, like ["full_attention"]',
    "an object, {...}",
)

_IS: dict[str, Callable[[Any], bool]] = {
    _WHOLE: lambda value: type(value) is int and abs(value) < 1 << 53,  # excludes true and 2.0
    _LAYERS: lambda value: type(value) is int and value <= 100_000,
    _NUMBER: lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,
    _FLAG: lambda value: isinstance(value, bool),
    _TEXT: lambda value: isinstance(value, str),
    _TEXTS: lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    _OBJECT: lambda value: isinstance(value, dict),
}
_KINDS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "head_dim"), _WHOLE),
    "num_hidden_layers": _LAYERS,
    **dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), _WHOLE
    ),
    **dict.fromkeys(("sliding_window", "sliding_window_pattern", "max_window_layers"), _WHOLE),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "query_pre_attn_scalar"), _NUMBER),
    # GPT-2 has names of its own, Granite its multipliers.
    **dict.fromkeys(("n_embd", "n_inner", "n_head", "n_positions", "n_ctx"), _WHOLE),
    "n_layer": _LAYERS,
    "layer_norm_epsilon": _NUMBER,
    "activation_function": _TEXT,
    **dict.fromkeys(("embedding_multiplier", "attention_multiplier"), _NUMBER),
    **dict.fromkeys(("residual_multiplier", "logits_scaling"), _NUMBER),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _NUMBER),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), _FLAG
    ),
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation"), _TEXT),
    "layer_types": _TEXTS,
    # RoPE settings: the objects that hold them, whole or per layer type, and their values.
    **dict.fromkeys(
        ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention"), _OBJECT
    ),
    **dict.fromkeys(
        ("rope_theta", "rope_local_base_freq", "factor", "low_freq_factor", "high_freq_factor"),
        _NUMBER,
    ),
    **dict.fromkeys(
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"), _NUMBER
    ),
    "truncate": _FLAG,
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    "original_max_position_embeddings": _WHOLE,
}


def check(values: Mapping[str, Any], where: str = "") -> None:
    """Check the types of the values in a config.json.  null counts as absent.

    `where` is put before the name in messages.  Raises ConfigError for a value of the wrong type.
    """
    for name, value in values.items():
        kind = _KINDS.get(name)
        if kind is None or value is None:
            continue
        if not _IS[kind](value):
            raise ConfigError(
                f"{where}{name}={json.dumps(value, default=repr)[:60]} must be {kind}"
            )
        if kind is _OBJECT:
            check(value, f"{where}{name}: ")
