"""Which settings may change when a run is resumed, or starts from other weights."""

from __future__ import annotations

# A resumed run may find its text in another place, so these settings of `data` may differ.  The
# text itself is compared by the hashes in `Source.contents`.
FREE_DATA = (
    *("name", "path", "blend", "tokenizer", "other_tokenizer", "end_token"),
    *("jsonl_field", "cache_dir", "workers", "validation"),
)
# Model settings that may change when a run starts from another run's weights.  Any other setting
# would give the same tensors another meaning.
FREE_MODEL = (
    *(
        "seq_length",
        "init_std",
        "norm_epsilon",
        "sliding_window",
        "full_attention_every",
        "logit_softcap",
    ),
    *("rope_base", "rope_local_base", "rope_scaling", "rope_factor"),
    *("rope_low_frequency", "rope_high_frequency", "rope_original_length"),
    "rope_attention_factor",
)
# Model settings that may change within a run, with run.allow=[sequence].
_SEQUENCE = (
    *("seq_length", "sliding_window", "full_attention_every"),
    *(name for name in FREE_MODEL if name.startswith("rope_")),
)


def permission_of(name: str) -> str | None:
    """Return the word of run.allow with which a resumed run may change this setting, if any."""
    section, _, key = name.partition(".")
    if section == "model":
        return "sequence" if key in _SEQUENCE else None
    return {"batch_ramp": "batch", "loss": "loss"}.get(section)


def keeps_on_resume(name: str) -> bool:
    """Return whether a resumed run must have this setting as its checkpoint has it."""
    section, _, key = name.partition(".")
    if section == "data":
        return key not in FREE_DATA
    return section in ("model", "loss") or name in ("run.dtype", "batch_ramp")
