"""Settings of a model in one form, so that models which compute the same have equal ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace

from vp_train.config.errors import ConfigError
from vp_train.config.model import ModelConfig


def canonical(model: ModelConfig) -> ModelConfig:
    """Return settings that are equal for models that compute the same from the same weights.

    Implied values are written out, and settings without effect get their default.
    """
    plain = ModelConfig()
    local = [model.is_local(layer) for layer in range(model.num_layers)]
    unused: set[str] = set()
    same: dict[str, object] = {}
    if model.linear_bias:
        unused |= {"qkv_bias"}
    if model.positions != "rope":
        unused |= {"rope_base"}
    if model.rope_scaling == "none":
        unused |= {"rope_factor"}
    if model.rope_scaling not in ("llama3", "yarn"):
        unused |= {"rope_low_frequency", "rope_high_frequency", "rope_original_length"}
    if not any(local):
        unused |= {"sliding_window", "full_attention_every", "rope_local_base"}
    else:
        has_base = model.rope_scaling == "none" and model.positions == "rope"
        same |= {
            "full_attention_every": local.index(False) + 1 if False in local else None,
            "rope_local_base": model.rope_local_base or (model.rope_base if has_base else None),
        }
    if model.rope_scaling == "yarn" and model.rope_attention_factor is None:
        same |= {"rope_attention_factor": yarn_factor(model.rope_factor)}
    size = model.head_size or model.hidden_size // model.num_heads
    divisor = float(size) if model.attention_divisor is None else model.attention_divisor
    same |= {"head_size": size, "attention_divisor": divisor}
    same |= {name: getattr(plain, name) for name in unused}
    return replace(model, **same)  # type: ignore[arg-type]


def yarn_factor(factor: float, mscale: float = 1.0) -> float:
    """Return what YaRN multiplies queries and keys by (arXiv 2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def model_changes(before: Mapping[str, object], model: ModelConfig) -> list[str]:
    """Return the names of the settings with which `model` is another model than that of `before`.

    before: settings of a model by their names; one that is missing there is not compared.  Values
        that mean the same are no change: a head_size, and the null that it follows from.  If they
        are not those of a model, every other value is a change.
    """
    known = {item.name for item in fields(ModelConfig)}
    theirs = {name: value for name, value in before.items() if name in known}
    ours = asdict(model)
    changed = [name for name in ours if name in theirs and theirs[name] != ours[name]]
    try:
        other = asdict(canonical(replace(model, **theirs)))  # type: ignore[arg-type]
    except (ConfigError, TypeError, ZeroDivisionError):
        return changed
    own = asdict(canonical(model))
    return [name for name in changed if own[name] != other[name]]
