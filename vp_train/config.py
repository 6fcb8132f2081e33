"""The configuration tree: frozen dataclasses whose fields describe and check themselves.

Everything here is what a user may set; derived values live in `RunPlan`.  A field declares its
type, default, bounds, unit and meaning once.  The checks, `--help` and `docs/settings.md` follow
from that.  Checks of two fields are in `__post_init__`.  Checks that need two sections or the world
size are in `planning.plan`.  Every check raises ConfigError, which names the value and the way out.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

DTYPES = ("bfloat16", "float16", "float32", "float64")
_LINEAR_DTYPES = ("compute", "float8")
_DEVICES = ("cpu", "cuda")
_KEY = "setting"

Value = TypeVar("Value")


# Characters that a terminal obeys instead of showing them, among them those that turn the
# direction of writing, and halves of surrogate pairs, which stand for bytes that are not UTF-8.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_LONGEST_MESSAGE = 1_500  # characters


def printable(text: str) -> str:
    """Return `text` with control characters escaped as in Python, so that no terminal obeys them.

    Nothing that others wrote (names of files, texts in them) is printed otherwise.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class ConfigError(ValueError):
    """A value that the user must change.

    The command line prints the message without a traceback and exits with code 78.  It is one
    printable line, and the middle of a very long one is left out.
    """

    def __init__(self, message: str) -> None:
        words = printable(message)
        if len(words) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            words = f"{words[:half]} ... {len(words):,} characters ... {words[-half:]}"
        super().__init__(words)


# Values of settings under the names that they have elsewhere.
_ALSO_CALLED = {
    **dict.fromkeys(("fp16", "half", "16", "16-mixed"), "float16"),
    **dict.fromkeys(("bf16", "bf16-mixed"), "bfloat16"),
    **dict.fromkeys(("fp32", "float", "32", "tf32"), "float32"),
    **dict.fromkeys(("fp64", "double"), "float64"),
    **dict.fromkeys(("gpu", "nvidia"), "cuda"),
    **dict.fromkeys(("interleaved_1f1b", "vpp"), "interleaved"),
    "adam": "adamw",
}


def unknown(words: str, value: object, choices: Sequence[str]) -> str:
    """Return the message about a value that is none of the choices, with one that looks like it.

    words: how the message names the value.
    """
    word = str(value).lower()
    close = [choice for choice in choices if choice in (word, _ALSO_CALLED.get(word))]
    close = close or difflib.get_close_matches(str(value), choices, n=1, cutoff=0.8)
    close = close or [choice for choice in choices if len(word) > 1 and choice.startswith(word)][:3]
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"{words} is not known{hint}; choose one of {', '.join(choices)}"


@dataclass(frozen=True, slots=True)
class Setting:
    """The meaning and the allowed values of a field of the configuration.

    A value is at least `least` or above `above`, and at most `most` or below `below`, if these are
    set.  `choices` are the only values; an empty tuple allows any.  For a tuple all this holds for
    every element.
    """

    meaning: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    @property
    def allowed(self) -> str:
        """Return in words which values are allowed; empty if all of the type are."""
        if self.choices:
            return ", ".join(self.choices)
        lowest, highest = self._lowest, self._highest
        if lowest is None or highest is None:
            return " and ".join(filter(None, [self._at_least, self._at_most]))
        opening, closing = "[" if self.above is None else "(", "]" if self.below is None else ")"
        return f"{opening}{lowest:,}, {highest:,}{closing}"

    def check(self, name: str, value: Any, default: Any) -> None:
        """Raise ConfigError unless `value` is allowed; None is allowed if it is the default."""
        if isinstance(value, tuple):
            for element in value:
                self.check(name, element, default)
            return
        if value is None and default is None:
            return
        if isinstance(value, str):
            _check_text(name, value)
        if self.choices and value not in self.choices:
            raise ConfigError(unknown(f"{name}={value!r}", value, self.choices))
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value} is not a finite number")
        if isinstance(value, int | float) and abs(value) > _largest(value):
            raise ConfigError(
                f"{name}={value} is too large for any use; it must be at most {_largest(value):,}"
            )
        if not self._low_enough(value):
            words = f"is too large; it must be {self._at_most}"
            if self._highest is not None and self._highest <= 1:
                words = f"is out of range; it must lie in {self.allowed}"
            raise ConfigError(f"{name}={value} {words}")
        if not self._high_enough(value):
            way_out = "" if default is not None else f", or null{self._null_words}"
            raise ConfigError(f"{name}={value} is too small; it must be {self._at_least}{way_out}")

    @property
    def _null_words(self) -> str:
        """Return in words what null stands for, "" if the meaning does not say it."""
        words = re.search(r"null: (.+?)(?:;|\.(?:\s|$))", self.meaning)
        return "" if words is None else f" ({words[1]})"

    @property
    def _lowest(self) -> float | None:
        return self.above if self.least is None else self.least

    @property
    def _highest(self) -> float | None:
        return self.below if self.most is None else self.most

    @property
    def _at_least(self) -> str:
        if self._lowest is None:
            return ""
        return f"{'at least' if self.above is None else 'above'} {self._lowest:,}"

    @property
    def _at_most(self) -> str:
        if self._highest is None:
            return ""
        return f"{'at most' if self.below is None else 'below'} {self._highest:,}"

    def _high_enough(self, value: Any) -> bool:
        return (self.least is None or value >= self.least) and (
            self.above is None or value > self.above
        )

    def _low_enough(self, value: Any) -> bool:
        return (self.most is None or value <= self.most) and (
            self.below is None or value < self.below
        )


_LONGEST_TEXT = 2_048  # characters; a path has at most 4,096, and names are appended to some
_LONGEST_NAME = 255  # bytes; no file system has a longer one


def _largest(value: float) -> float:
    """Return the largest number of a setting without a bound of its own.

    Whole numbers fit into 64 bits, and products of a few other numbers do not overflow.
    """
    return 2**63 - 1 if isinstance(value, int) else 1e30


def _check_text(name: str, text: str) -> None:
    """Raise ConfigError for a text that is empty, too long, or not printable."""
    if not text:
        raise ConfigError(f"{name} is empty; give a value")
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(
            f"{name}={text} has {len(text):,} characters; at most {_LONGEST_TEXT:,} are allowed"
        )
    if found := _CONTROL.search(text):
        raise ConfigError(
            f"{name}={text} has the control character {printable(found[0])}; leave it out, "
            "and rename the file if it is a name"
        )
    if max(len(os.fsencode(part)) for part in text.split("/")) > _LONGEST_NAME:
        raise ConfigError(f"{name}={text} has a name of more than {_LONGEST_NAME} bytes")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ConfigError(f"{name}={text} begins with the home of somebody who is not known here")


def setting(
    default: Value,
    meaning: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Value:
    """Return a dataclass field with this default that describes itself; see `Setting`."""
    described = Setting(meaning, unit, choices, least, above, most, below)
    return field(default=default, metadata={_KEY: described})


def setting_of(item: Any) -> Setting:
    """Return the description of a field of a section."""
    described = item.metadata[_KEY]
    assert isinstance(described, Setting)
    return described


def _check(prefix: str, section: object) -> None:
    """Check every field of `section`; a YAML list becomes the tuple its field promises."""
    for item in fields(section):  # type: ignore[arg-type]
        value = _frozen(getattr(section, item.name))
        object.__setattr__(section, item.name, value)
        setting_of(item).check(f"{prefix}{item.name}", value, item.default)


def refuse_with_graphs(name: str, value: object, needed: object) -> None:
    """Raise ConfigError if the setting `name` is not as run.cuda_graphs needs it."""
    if value != needed:
        raise ConfigError(
            f"run.cuda_graphs=true replays passes of {name}={needed}, not of {value}; "
            f"use {name}={needed} or run.cuda_graphs=false"
        )


def _frozen(value: Any) -> Any:
    """Return `value` with tuples for lists, in lists too."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


# Bounds that no real run meets.  They stop a slip of the keyboard before a plan is made: published
# models have at most 200 layers and 300 thousand tokens of vocabulary, runs at most a few hundred
# thousand GPUs, 64 pipeline ranks, and some thousand microbatches in a step.
_MOST_LAYERS = 10_000
_MOST_WIDTH = 10_000_000
_MOST_TOKENS = 100_000_000  # of a vocabulary, or of a sequence
_MOST_REPLICAS = 100_000
_MOST_RANKS_OF_A_MODEL = 1_024  # of a pipeline, or of a tensor-parallel group
MOST_MICROBATCHES = 65_536
# Of gradients, at least, in a stage with as many layers: nothing hides the sum of the last one.
BUCKETS_PER_STAGE = 8


@dataclass(frozen=True)
class ModelConfig:
    """A decoder.  GPT, Llama, Qwen, Gemma and others are settings of these; see configs/model."""

    num_layers: int = setting(8, "Decoder layers.", least=1, most=_MOST_LAYERS)
    hidden_size: int = setting(256, "Width of the residual stream.", least=1, most=_MOST_WIDTH)
    num_heads: int = setting(8, "Attention heads.", least=1, most=_MOST_WIDTH)
    num_query_groups: int = setting(
        4, "Heads of keys and values, as in GQA.", least=1, most=_MOST_WIDTH
    )
    head_size: int | None = setting(
        None, "Width of a head; null: hidden_size / num_heads.", least=1, most=_MOST_WIDTH
    )
    ffn_hidden_size: int = setting(768, "Inner width of the MLP.", least=1, most=_MOST_WIDTH)
    vocab_size: int = setting(32_768, "Tokens of the vocabulary.", least=1, most=_MOST_TOKENS)
    seq_length: int = setting(256, "Tokens of a sequence.", least=1, most=_MOST_TOKENS)
    tied_embeddings: bool = setting(False, "The input and the output layer share one matrix.")
    embedding_scale: bool = setting(False, "Multiply embeddings by sqrt(hidden_size).")
    embedding_multiplier: float = setting(
        1.0, "Multiply embeddings by this too, before learned positions.", above=0
    )
    normalisation: str = setting("rmsnorm", "Kind of all norms.", choices=("rmsnorm", "layernorm"))
    zero_centred_norm: bool = setting(False, "RMSNorm scales by 1 + w instead of its weight w.")
    norm_epsilon: float = setting(1e-5, "Added to the variance in a norm.", above=0)
    pre_norms: bool = setting(
        True, "Norms before attention and MLP; false, as in OLMo 2, needs post_norms."
    )
    post_norms: bool = setting(
        False, "Norms after attention and MLP too, before the residual is added."
    )
    residual_multiplier: float = setting(
        1.0, "The outputs of attention and MLP times this are added to the residual.", above=0
    )
    activation: str = setting(
        "swiglu",
        "Activation of the MLP: swiglu or geglu, which are gated, or gelu; "
        "geglu and gelu use the tanh approximation.",
        choices=("swiglu", "geglu", "gelu"),
    )
    linear_bias: bool = setting(False, "Biases in all linear layers of the decoder.")
    qkv_bias: bool = setting(False, "A bias in the linear layer of queries, keys and values.")
    qk_norm: bool = setting(False, "An RMSNorm over each head of queries and keys.")
    qk_norm_whole: bool = setting(
        False,
        "With qk_norm: over all heads of the queries together, and over all of the keys; "
        "needs parallel.tp=1.",
    )
    attention_divisor: float | None = setting(
        None, "Scores are q k / sqrt(attention_divisor); null: head_size.", above=0
    )
    attention_softcap: float | None = setting(None, "c: scores become c tanh(scores / c).", above=0)
    sliding_window: int | None = setting(
        None,
        "Tokens that a local layer attends to, its own included; null: no layer is local.",
        unit="tokens",
        least=1,
    )
    full_attention_every: int | None = setting(
        None,
        "With sliding_window: every n-th layer attends to all tokens; null: no layer does.",
        unit="layers",
        least=1,
    )
    positions: str = setting(
        "rope",
        "Rotary embeddings, or a learned table of seq_length rows that stage 0 adds.",
        choices=("rope", "learned"),
    )
    rope_base: float = setting(10_000.0, "Base of the angles of rotary embeddings.", above=0)
    rope_local_base: float | None = setting(
        None, "Base of the angles in local layers; null: rope_base.", above=0
    )
    rope_scaling: str = setting(
        "none",
        "linear divides all angles by rope_factor, llama3 (arXiv 2407.21783) and yarn "
        "(arXiv 2309.00071) only low frequencies.",
        choices=("none", "linear", "llama3", "yarn"),
    )
    rope_factor: float = setting(1.0, "Divisor of rope_scaling.", least=1)
    rope_low_frequency: float = setting(
        1.0,
        "llama3, yarn: frequencies with fewer turns than this within rope_original_length are "
        "divided by the whole rope_factor.",
    )
    rope_high_frequency: float = setting(
        4.0,
        "llama3, yarn: frequencies with more turns than this are not divided; usual for yarn: 32.",
    )
    rope_original_length: int = setting(
        8192, "llama3, yarn: sequence length before scaling.", unit="tokens", least=1
    )
    rope_attention_factor: float | None = setting(
        None,
        "yarn: queries and keys are multiplied by this; null: 0.1 ln(rope_factor) + 1.",
        above=0,
    )
    init_std: float = setting(0.02, "Standard deviation of initial weights.", least=0)
    logit_divisor: float = setting(1.0, "Logits are divided by this, before the softcap.", above=0)
    logit_softcap: float | None = setting(None, "c: logits become c tanh(logits / c).", above=0)

    def __post_init__(self) -> None:
        _check("model.", self)
        self._check_heads()
        self._check_pairs()

    def _check_heads(self) -> None:
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} does not split over "
                f"model.num_heads={self.num_heads}; "
                f"use a multiple of {self.num_heads}, or set model.head_size"
            )
        size = self.head_size or self.hidden_size // self.num_heads
        if self.positions == "rope" and size % 2:
            name = (
                "model.hidden_size / model.num_heads"
                if self.head_size is None
                else "model.head_size"
            )
            raise ConfigError(f"{name} = {size} is odd; rotary embeddings need an even head size")
        if self.num_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_heads={self.num_heads} does not split over "
                f"model.num_query_groups={self.num_query_groups}; use a divisor of {self.num_heads}"
            )

    def _check_pairs(self) -> None:
        """Raise ConfigError for a setting that counts only with another one."""
        if self.zero_centred_norm and self.normalisation != "rmsnorm":
            raise ConfigError(
                "model.zero_centred_norm=true counts only with model.normalisation=rmsnorm, "
                f"not {self.normalisation}; drop one of the two"
            )
        if self.qk_norm and self.normalisation != "rmsnorm":
            raise ConfigError(
                "model.qk_norm=true counts only with model.normalisation=rmsnorm, "
                f"not {self.normalisation}; drop one of the two"
            )
        if not self.pre_norms and not self.post_norms:
            raise ConfigError(
                "model.pre_norms=false counts only with model.post_norms=true; "
                "layers without any norm do not train"
            )
        if self.qk_norm_whole and (self.zero_centred_norm or not self.qk_norm):
            raise ConfigError(
                "model.qk_norm_whole=true counts only with model.qk_norm=true and "
                "model.zero_centred_norm=false; set these, or drop it"
            )
        for name in ("full_attention_every", "rope_local_base"):
            if getattr(self, name) is not None and self.sliding_window is None:
                raise ConfigError(
                    f"model.{name}={getattr(self, name)} counts only with model.sliding_window; "
                    "set it, or drop this"
                )
        for name, unused in (("rope_local_base", None), ("rope_scaling", "none")):
            if getattr(self, name) != unused and self.positions != "rope":
                raise ConfigError(
                    f"model.{name}={getattr(self, name)} counts only with model.positions=rope, "
                    f"not {self.positions}; drop one of the two"
                )
        if self.rope_factor != 1 and self.rope_scaling == "none":
            raise ConfigError(
                f"model.rope_factor={self.rope_factor} counts only with "
                "model.rope_scaling=linear, llama3 or yarn; set one of them"
            )
        if self.rope_scaling == "yarn" and (
            self.rope_local_base is not None or self.rope_base <= 1
        ):
            raise ConfigError(
                f"model.rope_scaling=yarn needs model.rope_base={self.rope_base} above 1 and "
                f"model.rope_local_base={self.rope_local_base} null; change those, or drop it"
            )
        if self.rope_attention_factor is not None and self.rope_scaling != "yarn":
            raise ConfigError(
                f"model.rope_attention_factor={self.rope_attention_factor} counts only with "
                f"model.rope_scaling=yarn, not {self.rope_scaling}; drop one of the two"
            )
        if (
            self.rope_scaling in ("llama3", "yarn")
            and not 0 < self.rope_low_frequency < self.rope_high_frequency
        ):
            raise ConfigError(
                f"model.rope_low_frequency={self.rope_low_frequency} and "
                f"model.rope_high_frequency={self.rope_high_frequency}: "
                "the first must be above 0 and below the second"
            )

    def is_local(self, layer: int) -> bool:
        """Return whether this layer attends only to `sliding_window` tokens.

        Layers are counted from 0 over the whole model.
        """
        every = self.full_attention_every
        return self.sliding_window is not None and (every is None or (layer + 1) % every != 0)


@dataclass(frozen=True)
class ScheduleConfig:
    """The base schedule, into which the vocabulary passes are woven.

    The cap limits the activations and held shards of a rank.  Without one, `auto` stays within
    p + 1 microbatches and two held shards, about what 1F1B with one_barrier keeps.  If no
    schedule is found under that, the cap is what the best schedule found keeps.
    """

    name: str = setting(
        "1f1b", "A schedule of schedules.generators, or auto: the fastest found under a cap."
    )
    num_chunks: int | None = setting(
        None,
        "Stages per rank, if the schedule leaves a choice.",
        least=1,
        most=_MOST_LAYERS,
    )
    cap_microbatches: float | None = setting(
        None, "auto: cap on memory, in microbatches of 1/p of the model's activations.", above=0
    )
    cap_gib: float | None = setting(None, "auto: cap on memory.", unit="GiB", above=0)
    file: str | None = setting(
        None,
        "A file with a schedule: ours, or a CSV of torch.distributed.pipelining; "
        "it replaces all of the above.",
    )

    def __post_init__(self) -> None:
        _check("schedule.", self)
        for name in ("cap_microbatches", "cap_gib"):
            value = getattr(self, name)
            if value is not None and self.name != "auto":
                raise ConfigError(
                    f"schedule.{name}={value} counts only with schedule=auto, not {self.name}; "
                    "drop one of the two"
                )
        if self.cap_gib is not None and self.cap_microbatches is not None:
            raise ConfigError(
                f"schedule.cap_gib={self.cap_gib} and "
                f"schedule.cap_microbatches={self.cap_microbatches}: set one of the two"
            )

    @property
    def is_solved(self) -> bool:
        """Return whether the schedule is still to be searched for."""
        return self.name == "auto" and self.file is None


@dataclass(frozen=True)
class VocabConfig:
    """The split of the input and output layers, and the code that computes S and T."""

    algorithm: str = setting(
        "one_barrier", "A vocabulary algorithm of schedules.vocab, or auto with schedule=auto."
    )
    backend: str = setting(
        "chunked",
        "chunked holds exponentials from S to T; recompute computes them again in T; "
        "reference is the slow oracle of the tests.",
        choices=("chunked", "recompute", "reference"),
    )
    shards: tuple[int, ...] | None = setting(
        None, "Vocabulary rows of each rank; null: as equal as possible."
    )
    balance: bool = setting(False, "Give more rows to ranks with less other work.")
    recompute_fraction: float = setting(
        1.0,
        "recompute: part of the rows whose logits T computes again, by a fourth matrix product.",
        least=0,
        most=1,
    )
    sum_dtype: str = setting(
        "float32",
        "Dtype in which the shards' terms of dL/dx are summed; "
        "compute: run.dtype, which moves half the bytes.",
        choices=("float32", "compute"),
    )

    def __post_init__(self) -> None:
        _check("vocab.", self)
        if self.recompute_fraction != 1 and self.backend != "recompute":
            raise ConfigError(
                f"vocab.recompute_fraction={self.recompute_fraction} counts only with "
                f"vocab.backend=recompute, not {self.backend}; drop one of the two"
            )
        if self.balance and self.shards is not None:
            raise ConfigError(
                f"vocab.balance=true and vocab.shards={list(self.shards)}: set one of the two"
            )


RECOMPUTE = ("none", "selective", "full")


def _run_of(word: str) -> tuple[str, ...]:
    """Return the values that an item of a list stands for: `3*full` for three."""
    count, times, value = str(word).partition("*")
    return (value,) * int(count) if times and re.fullmatch("[0-9]{1,4}", count) else (word,)


@dataclass(frozen=True)
class ParallelConfig:
    """The degrees of parallelism, and the placement of layers on stages.

    A run has dp x pp x tp ranks: `dp` replicas of the model, each a pipeline of `pp` pipeline
    ranks, each of which is `tp` ranks that split its matrices.  A degree that is null is inferred
    from the world size.  If both `pp` and `dp` are null, `dp` is 1.
    """

    pp: int | None = setting(
        None,
        "Ranks of a pipeline; null: inferred from the world size.",
        least=1,
        most=_MOST_RANKS_OF_A_MODEL,
    )
    dp: int | None = setting(
        None,
        "Replicas, each with num_microbatches of its own; null: inferred from the world size.",
        least=1,
        most=_MOST_REPLICAS,
    )
    tp: int = setting(1, "Ranks that split each matrix.", least=1, most=_MOST_RANKS_OF_A_MODEL)
    placement: str = setting(
        "even",
        "Layers per stage: even; balanced, numbers that differ by at most one; "
        "redistribute, fewer on the last stage (arXiv 2411.05288).",
        choices=("even", "balanced", "redistribute"),
    )
    layers_per_stage: tuple[int, ...] | None = setting(
        None, "Number of layers of each stage; overrides placement."
    )
    recompute: str = setting(
        "none",
        "What the backward recomputes instead of keeping it: nothing, the attention of each layer, "
        "or whole layers.",
        choices=RECOMPUTE,
    )
    recompute_per_stage: tuple[str, ...] | None = setting(
        None,
        "Recomputation of each stage, instead of recompute; 4*full is four of them.",
        choices=RECOMPUTE,
    )
    sequence_parallel: bool = setting(
        False, "Split norms and residuals over the tensor-parallel ranks too, by tokens."
    )
    offload_activations: float = setting(
        0.0,
        "Part of each stage's layers, the first ones, whose kept activations wait in host memory "
        "between forward and backward; 0: none.",
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        if self.recompute_per_stage is not None:
            whole = tuple(kind for word in self.recompute_per_stage for kind in _run_of(word))
            object.__setattr__(self, "recompute_per_stage", whole)
        _check("parallel.", self)
        if self.recompute != "none" and self.recompute_per_stage is not None:
            raise ConfigError(
                f"parallel.recompute={self.recompute} and "
                f"parallel.recompute_per_stage={list(self.recompute_per_stage)}: set one of the two"
            )

    def recompute_of(self, stage: int) -> str:
        """Return what the backward of `stage` recomputes, one of RECOMPUTE."""
        return (
            self.recompute if self.recompute_per_stage is None else self.recompute_per_stage[stage]
        )


@dataclass(frozen=True)
class LossConfig:
    """The loss that training minimises; see `vocab.loss`.

    Validation measures the plain negative log-likelihood, the mean over all tokens.
    """

    label_smoothing: float = setting(
        0.0, "Part of the target that is spread over the vocabulary.", least=0, below=1
    )
    z_loss: float = setting(
        0.0, "Weight of the squared log-sum-exp of every token's logits.", least=0
    )
    normalisation: str = setting(
        "token",
        "token: mean over all tokens; sequence: mean over the sequences' means.",
        choices=("token", "sequence"),
    )

    def __post_init__(self) -> None:
        _check("loss.", self)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, a learning-rate schedule with warm-up, global gradient clipping."""

    name: str = setting(
        "adamw",
        "adamw keeps the whole state in every replica; zero1 shards it over the replicas.",
        choices=("adamw", "zero1"),
    )
    lr: float = setting(2e-3, "Learning rate after the warm-up.", least=0)
    min_lr: float | None = setting(
        None, "Learning rate that the decay ends at; null: a tenth of lr.", least=0
    )
    schedule: str = setting(
        "cosine",
        "cosine decays from lr to min_lr; wsd holds lr and decays linearly at the end of the run.",
        choices=("cosine", "wsd"),
    )
    warmup_steps: int = setting(10, "Steps in which the rate rises to lr.", unit="steps", least=0)
    decay_fraction: float = setting(
        0.2, "wsd: part of the run in which the rate falls.", least=0, below=1
    )
    weight_decay: float = setting(0.1, "Decoupled weight decay of matrices.", least=0)
    beta1: float = setting(0.9, "Decay of the running mean of gradients.", least=0, below=1)
    beta2: float = setting(0.95, "Decay of the running mean of their squares.", least=0, below=1)
    epsilon: float = setting(1e-8, "Added to the root of the mean square.", above=0)
    clip_grad_norm: float = setting(
        1.0, "Largest norm of all gradients; 0 turns clipping off.", least=0
    )
    offload: bool = setting(False, "zero1: keep the state in host memory and update it there.")
    overlap_sums: bool = setting(
        True, "Sum a bucket of gradients over the replicas beside the passes that follow it."
    )
    overlap_gathers: bool = setting(
        True, "zero1: gather the new parameters beside the first passes of the next step."
    )
    bucket_mib: int = setting(
        64,
        "Largest size of a gradient bucket, which also has at most an eighth of a stage; "
        "a larger MLP or attention is reduced in one piece.",
        unit="MiB",
        least=1,
        most=1 << 20,
    )

    def __post_init__(self) -> None:
        _check("optim.", self)
        if self.offload and self.name != "zero1":
            raise ConfigError(
                f"optim.offload=true counts only with optim.name=zero1, not {self.name}; "
                "change one of the two"
            )
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ConfigError(
                f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}, which decays to it; "
                "lower it, or leave it out for a tenth of optim.lr"
            )

    @property
    def final_lr(self) -> float:
        """The learning rate that the decay ends at: min_lr, or a tenth of lr."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True)
class BlendEntry:
    """A corpus of a blend."""

    name: str = setting("text", "Like data.name.", choices=("text", "pystdlib"))
    path: str | None = setting(None, "Like data.path.")
    weight: float = setting(1.0, "Number of samples relative to the other corpora.")
    jsonl_field: str | None = setting(None, "Like data.jsonl_field, which counts if this is null.")

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"data.blend: weight={self.weight} of {self.path or self.name}; "
                "weights must be above 0 and finite, leave the corpus out if it is to give nothing"
            )
        _check("data.blend: ", self)
        if self.name == "text" and self.path is None:
            raise ConfigError("data.blend: every corpus needs a path, or name: pystdlib")


@dataclass(frozen=True)
class ValidationEntry:
    """A named validation set, of whole texts that are not trained on."""

    name: str | None = setting(
        None, "Name in metrics and progress: letters, digits, `.`, `_` and `-`."
    )
    path: str | None = setting(None, "Like data.path.")
    jsonl_field: str | None = setting(None, "Like data.jsonl_field, which counts if this is null.")

    def __post_init__(self) -> None:
        _check("data.validation: ", self)
        if self.name is None or self.path is None:
            raise ConfigError("data.validation: every set needs a name and a path")
        if not re.fullmatch(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,63}", self.name):
            raise ConfigError(
                f"data.validation: name={self.name} is not a name of at most 64 letters, digits, "
                "dots, underscores and dashes; it becomes part of the names of metrics"
            )


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**15 else "more than 10^15"


_MOST_WORKERS = 1_024
_LONGEST_PATTERN = 100_000  # samples after which the order of a blend's corpora repeats


def exact(part: float) -> Fraction:
    """Return a part of a whole as it was typed: 0.29, and not the binary number next to it."""
    return Fraction(str(part))


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest whole numbers in the ratio of `weights`.

    A weight counts as the decimal number that it prints as.  Raises ConfigError if the sum is too
    large: the corpora take turns in a pattern of so many samples.
    """
    typed = [exact(weight) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in typed))
    whole = [int(weight * denominator) for weight in typed]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if sum(whole) > _LONGEST_PATTERN:
        rounded = ", ".join(str(max(round(weight / sum(whole), 3), 0.001)) for weight in whole)
        raise ConfigError(
            f"data.blend: weights {', '.join(map(str, weights))} repeat only after "
            f"{_count(sum(whole))} samples, at most {_LONGEST_PATTERN:,} are kept; "
            f"round them, for example to {rounded}"
        )
    return tuple(whole)


@dataclass(frozen=True)
class DataConfig:
    """The source of the tokens."""

    name: str = setting(
        "pystdlib",
        "pystdlib: Python's standard library; text: text files; blend: several of these; "
        "synthetic: a random source of known entropy.",
        choices=("pystdlib", "text", "blend", "synthetic"),
    )
    path: str | None = setting(
        None,
        "text: a directory or file of text, .jsonl (both also .gz, .zst), .parquet or .arrow, "
        "or the output of vp-prepare.",
    )
    blend: tuple[BlendEntry, ...] | None = setting(None, "blend: the corpora and their weights.")
    packing: str = setting(
        "none",
        "documents: tokens attend only within their document, "
        "and the last one does not predict the next document.",
        choices=("none", "documents"),
    )
    tokenizer: str | None = setting(
        None, "A Hugging Face tokenizer.json; null trains one of model.vocab_size tokens."
    )
    other_tokenizer: bool = setting(
        False, "Accept text tokenized by another tokenizer than the one that run.init_from knows."
    )
    end_token: str | None = setting(
        None, "Token of that tokenizer that ends a document; null tries the usual names."
    )
    jsonl_field: str = setting(
        "text", "Field of a .jsonl line, or column of a table, that holds the text."
    )
    cache_dir: str = setting("data-cache", "Directory for tokenizers and tokens.")
    workers: int | None = setting(
        None,
        "Processes that tokenize a corpus of more than 8 MB; null: one for each CPU. The tokens "
        "do not depend on it.",
        least=1,
        most=_MOST_WORKERS,
    )
    validation_fraction: float = setting(
        0.05, "Part of the samples that is kept for validation.", least=0, below=1
    )
    validation: tuple[ValidationEntry, ...] | None = setting(
        None, "Named validation sets, beside the text that is held out: names and paths."
    )
    seed: int = setting(1234, "Seed of the order of samples.", least=0)
    sample_length: int | None = setting(
        None,
        "Length of the samples that are shuffled; sequences are pieces of them or several. null: "
        "model.seq_length; a resumed run keeps it.",
        unit="tokens",
        least=1,
        most=_MOST_TOKENS,
    )

    def __post_init__(self) -> None:
        _check("data.", self)
        if self.name == "text" and self.path is None:
            raise ConfigError(
                "data.name=text needs data.path: "
                "a directory of text or .jsonl files, or one such file"
            )
        if self.name != "text" and self.path is not None:
            raise ConfigError(
                f"data.path={self.path} counts only with data=text, not data.name={self.name}; "
                "add data=text, or drop it"
            )
        if self.name == "blend" and not self.blend:
            raise ConfigError(
                "data.name=blend needs data.blend: "
                "[{path: DIR, weight: 3}, {name: pystdlib, weight: 1}]"
            )
        if self.name != "blend" and self.blend:
            raise ConfigError(
                f"data.blend counts only with data=blend, not data.name={self.name}; "
                "add data=blend, or drop it"
            )
        if self.name == "synthetic" and self.packing != "none":
            raise ConfigError(
                f"data.packing={self.packing} needs documents, "
                "which data.name=synthetic has none of; drop data.packing"
            )
        self._check_validation()
        _ = self.weights  # raises ConfigError for weights that cannot be used

    def _check_validation(self) -> None:
        names = [entry.name for entry in self.validation or ()]
        if names and self.name == "synthetic":
            raise ConfigError(
                "data.validation needs text with a tokenizer, which data.name=synthetic has not; "
                "drop one of the two"
            )
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                f"data.validation: name={repeated[0]} occurs {names.count(repeated[0])} times; "
                "give every set another name"
            )

    @property
    def num_workers(self) -> int:
        """The number of processes that tokenize."""
        if hasattr(os, "sched_getaffinity"):  # not on macOS
            return self.workers or len(os.sched_getaffinity(0))
        return self.workers or os.cpu_count() or 1

    @property
    def weights(self) -> tuple[int, ...]:
        """The weights of a blend's corpora, or of the only corpus, as whole numbers.

        Raises ConfigError like `whole_weights`.
        """
        return whole_weights([entry.weight for entry in self.blend or ()] or [1.0])


@dataclass(frozen=True)
class CostConfig:
    """The seconds that the planner assumes for passes and messages of one microbatch.

    Those of passes follow from FLOPs at `flops_per_second`.  Measured times, which vp-profile
    writes, replace that estimate.  `measured_*` say what was measured; those that are not null must
    agree with the run.  A message takes its fixed time and, if a bandwidth is given, its bytes
    divided by the bandwidth.  What is null follows on GPUs from `cluster`, and on a CPU it is that
    of a core which two ranks share.
    """

    flops_per_second: float | None = setting(
        None,
        "Rate of all passes, unless those of their parts are given; null: 5e10 on a CPU.",
        unit="FLOP/s",
        least=1,
    )
    matrix_flops_per_second: float | None = setting(
        None, "Rate of large matrix products.", unit="FLOP/s", least=1
    )
    attention_flops_per_second: float | None = setting(
        None,
        "Rate of causal attention over long sequences, counting what the mask leaves.",
        unit="FLOP/s",
        least=1,
    )
    memory_bytes_per_second: float | None = setting(
        None, "Bandwidth of elementwise kernels.", unit="bytes/s", least=1
    )
    kernel_seconds: float | None = setting(
        None, "Fixed time of a kernel; null: 0 on a CPU.", unit="s", least=0
    )
    multiprocessors: int | None = setting(
        None,
        "Multiprocessors over which tiles of products run in waves; 0: any number; null: 0 on a "
        "CPU.",
        least=0,
    )
    layer_launch_seconds: float | None = setting(
        None,
        "What a CPU takes to issue the kernels of a layer's forward and backward; null: that of "
        "the cluster.",
        unit="s",
        least=0,
    )
    logit_bytes: float = setting(
        6.0,
        "Bytes that S and T read and write per token and vocabulary row, beside their products.",
        least=0,
    )
    contention: float | None = setting(
        None, "Part by which layers take longer beside a sharded vocabulary; null: none.", least=0
    )
    hop_seconds: float | None = setting(
        None, "Fixed time of a message between stages; null: 2e-4 on a CPU.", unit="s", least=0
    )
    hop_bytes_per_second: float | None = setting(
        None, "Bandwidth between stages.", unit="bytes/s", least=1
    )
    collective_seconds: float | None = setting(
        None, "Fixed time of a vocabulary collective; null: 5e-4 on a CPU.", unit="s", least=0
    )
    collective_bytes_per_second: float | None = setting(
        None, "Bandwidth of a vocabulary collective.", unit="bytes/s", least=1
    )
    host_bytes_per_second: float | None = setting(
        None,
        "Bandwidth between a rank and its host, in each direction, for offload_activations; "
        "null: transfers take no time.",
        unit="bytes/s",
        least=1,
    )
    tensor_seconds: float | None = setting(
        None,
        "Fixed time of an all-reduce over tensor-parallel ranks; "
        "a layer has 2 in its forward and 2 in its backward; null: 0 on a CPU.",
        unit="s",
        least=0,
    )
    tensor_bytes_per_second: float | None = setting(
        None, "Bandwidth of that all-reduce.", unit="bytes/s", least=1
    )
    measured_layer_flops: float | None = setting(
        None, "Forward FLOPs of the measured layer; other layers are refused.", unit="FLOP"
    )
    measured_dtype: str | None = setting(None, "run.dtype when measured.", choices=DTYPES)
    measured_linear_dtype: str | None = setting(
        None, "run.linear_dtype when measured.", choices=_LINEAR_DTYPES
    )
    measured_device: str | None = setting(None, "run.device when measured.", choices=_DEVICES)
    measured_cuda_graphs: bool | None = setting(None, "run.cuda_graphs when measured.")
    measured_on: str | None = setting(None, "Name of the device in the report of vp-plan.")
    layer_forward_seconds: float | None = setting(None, "Measured F of a layer.", unit="s", least=0)
    layer_backward_seconds: float | None = setting(
        None, "Measured B of a layer.", unit="s", least=0
    )
    layer_input_grad_seconds: float | None = setting(
        None, "Measured I of a layer.", unit="s", least=0
    )
    layer_weight_grad_seconds: float | None = setting(
        None, "Measured W of a layer.", unit="s", least=0
    )
    output_fixed_seconds: float = setting(
        0.0,
        "Fixed part of S and T of a shard; counts only with output_row_seconds.",
        unit="s",
        least=0,
    )
    output_row_seconds: float | None = setting(
        None, "Measured S and T per vocabulary row.", unit="s", least=0
    )
    lookup_seconds: float | None = setting(None, "Measured E of a shard.", unit="s", least=0)
    lookup_grad_seconds: float | None = setting(None, "Measured G of a shard.", unit="s", least=0)
    rank_slowness: tuple[float, ...] | None = setting(
        None, "Factors by which the ranks are slower than all this; null: 1 for all.", above=0
    )

    def __post_init__(self) -> None:
        _check("cost.", self)
        if self.rank_slowness == ():
            raise ConfigError("cost.rank_slowness=[] has no value; give one for each rank, or null")

    @property
    def has_rates(self) -> bool:
        """Return whether products, attention and elementwise kernels have rates of their own."""
        return self.matrix_flops_per_second is not None

    @property
    def is_measured(self) -> bool:
        """Return whether the times of layers or of the output layer were measured."""
        return self.layer_forward_seconds is not None or self.output_row_seconds is not None


# What CostConfig leaves open, on a CPU core that two ranks share.
CPU_COSTS = {
    "flops_per_second": 5e10,
    "kernel_seconds": 0.0,
    "multiprocessors": 0,
    "hop_seconds": 2e-4,
    "collective_seconds": 5e-4,
    "tensor_seconds": 0.0,
}


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that a run is planned for; `vp-plan` and `vp-profile` read it.

    Links are those of one GPU, in one direction: `node_*` to the other GPUs of its node,
    `network_*` to other nodes.  `host_*` count with optim.offload and
    parallel.offload_activations.  With `multiprocessors` passes are split into matrix products,
    attention and elementwise kernels, each with its own rate.  Without it all FLOPs run at
    `efficiency`, and nothing else takes time.
    """

    num_nodes: int = setting(1, "Number of nodes.", least=1, most=_MOST_REPLICAS)
    gpus_per_node: int = setting(4, "GPUs per node.", least=1, most=_MOST_RANKS_OF_A_MODEL)
    memory_gib: float = setting(
        4.0, "Memory that a rank may allocate on its GPU.", unit="GiB", above=0
    )
    bfloat16_flops_per_second: float = setting(1e11, "Peak of a GPU.", unit="FLOP/s", least=1)
    float16_flops_per_second: float = setting(1e11, "Peak of a GPU.", unit="FLOP/s", least=1)
    float32_flops_per_second: float = setting(1e11, "Peak of a GPU.", unit="FLOP/s", least=1)
    float64_flops_per_second: float = setting(5e10, "Peak of a GPU.", unit="FLOP/s", least=1)
    float8: bool = setting(True, "Whether GPUs have products in float8, as from an H100 on.")
    efficiency: float = setting(
        0.5,
        "Part of the peak that large matrix products reach, unless cost has measured times.",
        above=0,
        most=1,
    )
    attention_efficiency: float = setting(
        0.5, "Part of the peak that causal attention reaches over long sequences.", above=0, most=1
    )
    multiprocessors: int = setting(
        0, "Multiprocessors of a GPU; 0: all FLOPs run at efficiency.", least=0, most=100_000
    )
    kernel_seconds: float = setting(0.0, "Fixed time of a kernel.", unit="s", least=0)
    layer_launch_seconds: float = setting(
        0.0,
        "What a CPU takes to issue the kernels of a layer's forward and backward; in a plan a "
        "layer takes at least as long.",
        unit="s",
        least=0,
    )
    sustained: float = setting(
        1.0,
        "Part of the rates of kernels alone that passes keep in a run: clocks under the limit of "
        "power, late hosts, the slowest of many GPUs.",
        above=0,
        most=1,
    )
    contention: float = setting(
        0.0,
        "Part by which layers take longer beside the collectives of a sharded vocabulary, "
        "which hold some multiprocessors.",
        least=0,
    )
    memory_bytes_per_second: float = setting(
        1e10, "Bandwidth of a GPU's memory.", unit="bytes/s", least=1
    )
    node_seconds: float = setting(2e-4, "Fixed time of a message within a node.", unit="s", least=0)
    node_bytes_per_second: float = setting(1e9, "Bandwidth within a node.", unit="bytes/s", least=1)
    network_seconds: float = setting(
        1e-3, "Fixed time of a message between nodes.", unit="s", least=0
    )
    network_bytes_per_second: float = setting(
        1e8, "Bandwidth of one port between nodes.", unit="bytes/s", least=1
    )
    rails: int | None = setting(
        None, "Ports of a node, which its GPUs share; null: one for each GPU.", least=1
    )
    network_step_seconds: float = setting(
        0.0, "Time of one step of a ring between nodes.", unit="s", least=0
    )
    pod_nodes: int | None = setting(
        None, "Nodes that reach each other at full bandwidth; null: all.", least=1
    )
    oversubscription: float = setting(
        1.0, "Factor by which a port is slower between pods, with all GPUs sending.", least=1
    )
    host_bytes_per_second: float = setting(
        1e10, "Bandwidth between a GPU and its host.", unit="bytes/s", least=1
    )
    host_node_bytes_per_second: float | None = setting(
        None,
        "Bandwidth between all GPUs of a node and its host together, in each direction; null: that "
        "of each.",
        unit="bytes/s",
        least=1,
    )
    host_memory_gib: float | None = setting(
        None,
        "Memory of a node's host that its ranks may allocate for activations and optimizer state; "
        "0: none; null: not checked.",
        unit="GiB",
        least=0,
    )
    host_memory_bytes_per_second: float = setting(
        1e10, "A GPU's share of the bandwidth of host memory.", unit="bytes/s", least=1
    )

    def __post_init__(self) -> None:
        _check("cluster.", self)

    @property
    def num_gpus(self) -> int:
        """The GPUs of all nodes."""
        return self.num_nodes * self.gpus_per_node

    @property
    def host_limit(self) -> float:
        """The bytes that the ranks of a node may keep in its memory, infinity if not known."""
        known = self.host_memory_gib
        return math.inf if known is None else known * 2**30


_LONGEST_SECONDS = 10_000_000  # the longest timeout
PERMISSIONS = ("batch", "sequence", "loss")
SETTLED_STEP = 5  # of a process: whatever warms up is over


TRACKERS = ("wandb", "mlflow")
# Figures that a line of progress may show: keys of metrics.jsonl, and the time that is left.
PROGRESS = (
    *("loss", "grad_norm", "learning_rate", "left"),
    *("tokens_per_second", "interval_tokens_per_second", "mfu", "bubble_mean", "bubble_worst"),
    *("seconds/step", "seconds/data", "seconds/forward_backward", "seconds/vocabulary"),
    *("seconds/waiting_mean", "seconds/waiting_worst", "seconds/gradient_sum"),
    *("seconds/optimizer", "seconds/checkpoint", "seconds/validation", "seconds/rest"),
    *("peak_bytes", "memory/allocated_worst", "memory/allocated_mean"),
    *("memory/reserved_worst", "memory/reserved_mean"),
)


@dataclass(frozen=True)
class RunSettings:
    """One run: its length, its files, its devices, and what to do when something goes wrong."""

    name: str = setting("default", "Directory of the run, in root.")
    root: str = setting("runs", "Directory of all runs.")
    steps: int = setting(90, "Optimizer steps.", unit="steps", least=1)
    seed: int = setting(1, "Seed of the initial weights.")
    dtype: str = setting(
        "float32",
        "Dtype of weights and activations; gradients and optimizer state are at least float32.",
        choices=DTYPES,
    )
    linear_dtype: str = setting(
        "compute",
        "Dtype of the products y and dx of the decoder's linear layers; compute: run.dtype; "
        "float8 needs run.dtype=bfloat16 (see cluster.md).",
        choices=_LINEAR_DTYPES,
    )
    float8_scales: str = setting(
        "row",
        "With linear_dtype=float8: a scale for each token and each row or column of a weight, or "
        "one for each tensor.",
        choices=("row", "tensor"),
    )
    device: str = setting("cpu", "Where the ranks compute.", choices=_DEVICES)
    comm_backend: str = setting(
        "nccl",
        "Library of communication on cuda; "
        "gloo goes through host memory and lets several ranks share a GPU.",
        choices=("nccl", "gloo"),
    )
    comm_priority: bool = setting(True, "nccl: communication runs on streams of high priority.")
    collective_ctas: int = setting(
        2,
        "nccl: maximum thread blocks of a vocabulary collective; 0: NCCL's choice.",
        least=0,
        most=1_024,
    )
    hop_channels: int = setting(
        2,
        "nccl: maximum channels of a hop unless NCCL_MAX_P2P_NCHANNELS is set; 0: NCCL's choice.",
        least=0,
        most=1_024,
    )
    compile: str = setting(
        "auto",
        "Compile; auto: where it pays, on cuda or in 16 bits on a CPU, with a compiler; "
        "on: all elementwise work but LayerNorm, GELU; off: nothing.",
        choices=("auto", "on", "off"),
    )
    cuda_graphs: bool = setting(
        False,
        "Replay the passes of layers as CUDA graphs: less for the host to do, some more memory.",
    )
    deterministic: bool = setting(
        False, "Use only algorithms with bitwise reproducible results; slower on cuda."
    )
    log_every: int = setting(10, "Steps between two lines of progress.", unit="steps", least=1)
    progress: tuple[str, ...] = setting(
        (
            *("loss", "grad_norm", "learning_rate", "interval_tokens_per_second"),
            *("bubble_mean", "left", "peak_bytes"),
        ),
        "Figures of such a line, in this order; monitoring.md has their meaning.",
        choices=PROGRESS,
    )
    eval_every: int = setting(
        30, "Steps between two validations; 0 turns them off.", unit="steps", least=0
    )
    eval_microbatches: int = setting(
        16,
        "Microbatches of a validation, of all replicas; of each set of data.validation.",
        least=0,
        most=MOST_MICROBATCHES,
    )
    eval_sequences: int | None = setting(
        None,
        "Sequences of a validation instead of eval_microbatches: the same ones for every "
        "micro_batch_size.",
        least=1,
        most=_MOST_WIDTH,
    )
    checkpoint_every: int = setting(
        45,
        "Steps between two checkpoints; the last step has one too; 0 turns them off.",
        unit="steps",
        least=0,
    )
    checkpoint_minutes: float = setting(
        0.0,
        "Minutes between two checkpoints, besides checkpoint_every; 0 turns them off.",
        unit="min",
        least=0,
    )
    max_minutes: float = setting(
        0.0,
        "Minutes after which the run saves a checkpoint and exits with 75; 0: no limit.",
        unit="min",
        least=0,
    )
    keep_checkpoints: int = setting(2, "Newest checkpoints that are kept.", least=1)
    resume: bool = setting(False, "Go on from the newest checkpoint of this run.")
    allow: tuple[str, ...] = setting(
        (),
        "What may change in a resumed run: batch, the sequences of a step; sequence, their "
        "length, rotary embeddings and windows; loss.",
        choices=PERMISSIONS,
    )
    init_from: str | None = setting(
        None,
        "Directory of a run or of vp-import with the initial weights; a resumed run has its own.",
    )
    trace_step: int = setting(
        SETTLED_STEP,
        "Step whose passes are timed and written as a trace; a resumed run that has done it times "
        f"step {SETTLED_STEP} of its own; 0: none.",
        least=0,
    )
    trackers: tuple[str, ...] = setting(
        (), "Services that get the metrics too; each is an extra to install.", choices=TRACKERS
    )
    project: str = setting("vp_train", "Project of a run at its trackers.")
    report: bool = setting(
        True, "Write report.html at the end; without the extra `plot` there is none."
    )
    profile_steps: tuple[int, ...] = setting(
        (), "Steps that torch's profiler records, in profile/ of the run.", least=1
    )
    profile_ranks: tuple[int, ...] = setting(
        (0,), "Ranks whose profile_steps are recorded.", least=0
    )
    on_nonfinite: str = setting(
        "stop",
        "What to do at a loss or gradient that is not finite; "
        "go_back: to the last checkpoint, leaving out the data since then.",
        choices=("stop", "skip", "go_back"),
    )
    on_spike: str = setting(
        "apply",
        "What to do at a finite spike of the loss or of the gradient norm: apply the step and say "
        "so, or as for on_nonfinite.",
        choices=("apply", "stop", "skip", "go_back"),
    )
    spike_loss_factor: float = setting(
        2.0,
        "Times the median of the last 64 steps from which a loss is a spike, after 16 steps.",
        above=1,
    )
    spike_norm_factor: float = setting(
        10.0,
        "Times the median of the last 64 steps that a norm of gradients must be to be a spike.",
        above=1,
    )
    timeout_seconds: float = setting(
        300.0,
        "Longest wait for a message within a step; a rank that hangs ends the run.",
        unit="s",
        least=1,
        most=_LONGEST_SECONDS,
    )
    world_timeout_seconds: float = setting(
        1800.0,
        "Longest wait of all ranks for each other at the start, around steps and at checkpoints, "
        "and for a disk on which a save does not get on.",
        unit="s",
        least=1,
        most=_LONGEST_SECONDS,
    )

    def __post_init__(self) -> None:
        _check("run.", self)
        if self.linear_dtype == "float8" and self.dtype != "bfloat16":
            raise ConfigError(
                f"run.linear_dtype=float8 needs run.dtype=bfloat16, not {self.dtype}, which is not "
                "scaled to float8; set run.dtype=bfloat16, or drop run.linear_dtype"
            )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"run.name={self.name!r} is not a directory name; "
                "use letters, digits and dashes, and run.root for the parent"
            )

    @property
    def directory(self) -> Path:
        """The directory of the run's files."""
        return Path(self.root).expanduser() / self.name

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.directory / "checkpoints"

    @property
    def saves(self) -> bool:
        """Return whether the run writes checkpoints at all."""
        return self.checkpoint_every > 0 or self.checkpoint_minutes > 0

    @property
    def profiles(self) -> Path:
        """The directory of what torch's profiler recorded."""
        return self.directory / "profile"


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


RAMP_WORDS = "write batch_ramp=[[1000,8],[3000,16]]"


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    vocab: VocabConfig = field(default_factory=VocabConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunSettings = field(default_factory=RunSettings)
    num_microbatches: int = setting(
        8, "Microbatches of a step in each replica.", least=1, most=MOST_MICROBATCHES
    )
    micro_batch_size: int = setting(1, "Sequences of a microbatch.", least=1, most=_MOST_WIDTH)
    batch_ramp: tuple[list[int], ...] = setting(
        (),
        "Smaller steps at the start: [[1000,8],[3000,16]] takes 8 sequences in each step until "
        "step 1000, 16 until step 3000, then all.",
        least=1,
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            if _KEY in item.metadata:
                value = _frozen(getattr(self, item.name))
                object.__setattr__(self, item.name, value)
                setting_of(item).check(item.name, value, item.default)
        self._check_ramp()
        if self.run.cuda_graphs:
            refuse_with_graphs("data.packing", self.data.packing, "none")
            refuse_with_graphs("run.linear_dtype", self.run.linear_dtype, "compute")
        if self.run.linear_dtype == "float8" and not self.cluster.float8:
            raise ConfigError(
                "run.linear_dtype=float8 needs GPUs that have it, such as an H100, and those of "
                "this cluster do not (cluster.float8=false); drop run.linear_dtype"
            )
        if self.loss.label_smoothing and self.model.logit_softcap is not None:
            raise ConfigError(
                f"loss.label_smoothing={self.loss.label_smoothing} and "
                f"model.logit_softcap={self.model.logit_softcap} do not go together: the sum of "
                "capped logits would cost a pass over all of them; set one of the two"
            )

    def _check_ramp(self) -> None:
        """Raise ConfigError for a ramp that is none, or that its schedule cannot follow."""
        last = 0
        for pair in self.batch_ramp:
            if len(pair) != 2:
                raise ConfigError(
                    f"batch_ramp: {list(pair)} is not a pair of a step and a number of sequences; "
                    f"{RAMP_WORDS}"
                )
            if pair[0] <= last:
                raise ConfigError(
                    f"batch_ramp: step {pair[0]} comes after step {last}; give the steps in order"
                )
            last = pair[0]
        if self.batch_ramp and (self.schedule.file is not None or self.schedule.name == "auto"):
            words = "schedule=auto" if self.schedule.file is None else "schedule.file"
            raise ConfigError(
                f"batch_ramp needs a schedule for every number of microbatches, and {words} has "
                "one; choose a schedule by name"
            )

    @property
    def eval_sequences(self) -> int:
        """The sequences of a validation, of all replicas: at least one."""
        count = self.run.eval_sequences
        return (
            max(1, self.run.eval_microbatches) * self.micro_batch_size if count is None else count
        )

    def eval_microbatches_of(self, dp_size: int) -> int:
        """Return the evaluation microbatches per replica: the same number in all, at least one."""
        return -(-self.eval_sequences // (self.micro_batch_size * dp_size))

    @property
    def sample_length(self) -> int:
        """The tokens of the pieces of text that are shuffled."""
        return self.data.sample_length or self.model.seq_length
