"""Which settings may change when a run is resumed, or starts from other weights."""

from __future__ import annotations

from vp_train.config.whole import RunConfig

# The sections that a resumed run keeps, beside run.dtype and the sequences of a step.
KEPT_SECTIONS = ("model", "data", "loss")
# A resumed run may find its text in another place, so these settings of `data` may differ.  The
# text itself is compared by the hashes in `Source.contents`.
FREE_DATA = (
    *("name", "path", "blend", "tokenizer", "other_tokenizer", "end_token"),
    *("jsonl_field", "cache_dir", "workers", "validation"),
)
# Model settings that may change when a run starts from another run's weights.  Any other setting
# would give the same tensors another meaning.
_FREE_MODEL = (
    *("seq_length", "init_std", "norm_epsilon", "sliding_window", "full_attention_every"),
    *("logit_softcap", "rope_base", "rope_local_base", "rope_scaling", "rope_factor"),
    *("rope_low_frequency", "rope_high_frequency", "rope_original_length"),
    "rope_attention_factor",
)
# Model settings that may change within a run, with run.allow=[sequence].
_SEQUENCE = (
    *("seq_length", "sliding_window", "full_attention_every"),
    *(name for name in _FREE_MODEL if name.startswith("rope_")),
)


def permission_of(name: str, config: RunConfig) -> str | None:
    """Return the word of run.allow with which a resumed run may change this setting, if any.

    `batch` are the sequences of a step, which are no setting by themselves.
    """
    section, _, key = name.partition(".")
    if section == "model":
        return "sequence" if key in _SEQUENCE and not _counts_weights(name, config) else None
    return {"batch": "batch", "batch_ramp": "batch", "loss": "loss"}.get(section)


def keeps_on_resume(name: str, config: RunConfig) -> bool:
    """Return whether a resumed run must have this setting as its checkpoint has it."""
    section, _, key = name.partition(".")
    is_kept = section in (*KEPT_SECTIONS, "batch", "batch_ramp") or name == "run.dtype"
    is_free = section == "data" and key in FREE_DATA
    return is_kept and not is_free and permission_of(name, config) not in config.run.allow


def keeps_with_weights(name: str, config: RunConfig) -> bool:
    """Return whether a run that starts from other weights must have this setting as they do."""
    section, _, key = name.partition(".")
    return section == "model" and (key not in _FREE_MODEL or _counts_weights(name, config))


def _counts_weights(name: str, config: RunConfig) -> bool:
    """Return whether this is the length of a sequence, and each position has weights."""
    return name == "model.seq_length" and config.model.positions == "learned"
