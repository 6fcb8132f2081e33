"""The figures that runs write and reports read: their keys, and what they are called.

docs/monitoring.md has their meaning.
"""

from __future__ import annotations

# Figures that a line of progress may show: keys of metrics.jsonl, and the time that is left.
PROGRESS = (
    *("loss", "grad_norm", "learning_rate", "left", "tokens", "passes"),
    *("tokens_per_second", "interval_tokens_per_second", "mfu", "bubble_mean", "bubble_worst"),
    *("seconds/step", "seconds/data", "seconds/forward_backward", "seconds/vocabulary"),
    *("seconds/waiting_mean", "seconds/waiting_worst", "seconds/gradient_sum"),
    *("seconds/optimizer", "seconds/checkpoint", "seconds/validation", "seconds/rest"),
    *("peak_bytes", "memory/allocated_worst", "memory/allocated_mean"),
    *("memory/reserved_worst", "memory/reserved_mean"),
)
LOSS, BITS = "loss", "bits_per_byte"  # figures of a validation
_SETS = "validation/"  # before the name of a validation set


def name_of(key: str) -> str:
    """Return what seconds or bytes are called: seconds/waiting_mean -> waiting."""
    return key.rpartition("/")[2].removesuffix("_mean").replace("_", " ")


def validation_key(name: str, figure: str) -> str:
    """Return the key of LOSS or BITS of a validation set; held-out text has no name."""
    return f"{_SETS}{name}/{figure}" if name else f"validation_{figure}"


def set_of(key: str, figure: str) -> str | None:
    """Return the validation set whose LOSS or BITS has this key, None if none has."""
    end = f"/{figure}"
    if len(key) > 200 or not (key.startswith(_SETS) and key.endswith(end)):
        return None
    return key[len(_SETS) : -len(end)] or None
