"""The section `data`, and the weights of a blend."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from vp_train.config.bounds import MOST_TOKENS
from vp_train.config.errors import ConfigError
from vp_train.config.setting import check_section, setting

_MOST_WORKERS = 1_024
_LONGEST_PATTERN = 100_000  # samples after which the order of a blend's corpora repeats
BLEND_EXAMPLE = (
    "'data.blend=[{path:DIR,weight:3},{name:pystdlib,weight:1}]'"  # the shell expands braces
)


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
        check_section("data.blend: ", self)
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
        check_section("data.validation: ", self)
        if self.name is None or self.path is None:
            raise ConfigError("data.validation: every set needs a name and a path")
        if not re.fullmatch(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,63}", self.name):
            raise ConfigError(
                f"data.validation: name={self.name} is not a name of at most 64 letters, digits, "
                "dots, underscores and dashes; it becomes part of the names of metrics"
            )


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
        "text: a directory or file of text, .jsonl (both also .gz, .zst), .parquet, .arrow or "
        "Megatron-LM's .bin, or the output of vp-prepare.",
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
    begin_token: str | None = setting(
        None, "Token of that tokenizer in front of every document; null: none."
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
        0.05, "Part of the tokens that is held out for validation.", least=0, below=1
    )
    validation: tuple[ValidationEntry, ...] | None = setting(
        None, "Named validation sets, beside the text that is held out: names and paths."
    )
    seed: int = setting(1234, "Seed of the order of samples.", least=0)
    split_seed: int | None = setting(
        None,
        "Seed of what is held out, and of its order; null: data.seed. With the same one, runs of "
        "several data.seed are validated on the same text.",
        least=0,
    )
    sample_length: int | None = setting(
        None,
        "Length of the samples that are shuffled; sequences are pieces of them or several. null: "
        "model.seq_length; a resumed run keeps it.",
        unit="tokens",
        least=1,
        most=MOST_TOKENS,
    )

    @property
    def validation_seed(self) -> int:
        """The seed of what is held out, and of the order of validation samples."""
        return self.seed if self.split_seed is None else self.split_seed

    def __post_init__(self) -> None:
        check_section("data.", self)
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
            raise ConfigError(f"data=blend needs its corpora; write {BLEND_EXAMPLE}")
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


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**15 else "more than 10^15"
