"""Which settings may change when a run is resumed, or starts from other weights."""

from __future__ import annotations

from vp_train.config.whole import RunConfig

# The sections that a resumed run keeps, beside run.dtype and the sequences of a step.
KEPT_SECTIONS = ("model", "data", "loss")
# What chooses the text or its tokens.  A resumed run may find them in another place: when it has
# read them, it compares them by the hashes in `Source.contents`.
TEXT = (
    *("data.name", "data.path", "data.blend", "data.tokenizer", "data.end_token"),
    *("data.begin_token", "data.jsonl_field"),
)
FREE_DATA = (*TEXT, "data.other_tokenizer", "data.cache_dir", "data.workers", "data.validation")
# Model settings that a run may have otherwise than the weights that it starts from.  The second
# kind changes what the weights compute, and a line says so.  Any other setting would give the same
# tensors another place or another use.
_FREE_MODEL = ("seq_length", "init_std")
_NEW_MEANING = (
    *("norm_epsilon", "sliding_window", "full_attention_every", "logit_softcap"),
    *("rope_base", "rope_local_base", "rope_scaling", "rope_factor", "rope_low_frequency"),
    *("rope_high_frequency", "rope_original_length", "rope_attention_factor"),
)
# Model settings that may change within a run, with run.allow=[sequence].
_SEQUENCE = (
    *("seq_length", "sliding_window", "full_attention_every"),
    *(name for name in _NEW_MEANING if name.startswith("rope_")),
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
    section = name.partition(".")[0]
    is_kept = section in (*KEPT_SECTIONS, "batch", "batch_ramp") or name == "run.dtype"
    is_free = name in FREE_DATA or permission_of(name, config) in config.run.allow
    return is_kept and not is_free


def keeps_with_weights(name: str, config: RunConfig) -> bool:
    """Return whether a run that starts from other weights must have this setting as they do."""
    section, _, key = name.partition(".")
    is_free = key in (*_FREE_MODEL, *_NEW_MEANING) and not _counts_weights(name, config)
    return section == "model" and not is_free


def means_another_model(name: str) -> bool:
    """Return whether weights may be used with another value of this setting, but differently."""
    return name.removeprefix("model.") in _NEW_MEANING


def _counts_weights(name: str, config: RunConfig) -> bool:
    """Return whether this is the length of a sequence, and each position has weights."""
    return name == "model.seq_length" and config.model.positions == "learned"
