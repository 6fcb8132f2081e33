"""Overrides that are refused before hydra reads them: too many, too deep, or of another kind."""

from __future__ import annotations

from collections.abc import Sequence

from vp_train.config import ConfigError, DataConfig
from vp_train.settings.tree import ENTRIES, group_choices, sections
from vp_train.settings.words import value_words

# What is read of a command line.  Hydra takes seconds for more: it parses in Python, and the time
# of lists and quotes grows with the square of their length.
_MOST_WORDS = 1_000  # overrides
_MOST_CHARACTERS = 65_536
_MOST_SIGNS = 2_048  # commas, brackets, quotes and backslashes
DEEPEST = 10  # also a file with settings
LONGEST_KEY = 200  # characters


def check_size(words: Sequence[str]) -> None:
    """Raise ConfigError for more overrides, or longer ones, than hydra can parse in a second."""
    found = {
        "overrides": (len(words), _MOST_WORDS),
        "characters": (sum(map(len, words)), _MOST_CHARACTERS),
        "commas, brackets and quotes": (
            sum(character in ",[]{}()\\'\"" for word in words for character in word),
            _MOST_SIGNS,
        ),
    }
    for what, (number, most) in found.items():
        if number > most:
            raise ConfigError(
                f"the overrides {max(words, key=len)[:60]} ... have {number:,} {what}; at most "
                f"{most:,} are read"
            )


def check_word(word: str) -> None:
    """Raise ConfigError for an override that hydra would take for something else than a value."""
    key, _, value = word.partition("=")
    if word.startswith(("+", "~")):
        raise ConfigError(f"{word}: settings cannot be added or removed; write key=value")
    if len(key) > LONGEST_KEY:
        raise ConfigError(f"{key} is not a setting; see vp-train --help for all keys")
    if key.startswith("hydra") or "@" in key:
        raise ConfigError(f"{key} is not a setting; see vp-train --help for all keys")
    for name, (_, example) in ENTRIES.items():
        if key.startswith(f"{name}."):
            raise ConfigError(f"{word}: entries of {name} are not set one by one; write {example}")
    if "${" in word:
        raise ConfigError(f"{word}: ${{...}} is not expanded in settings; write the value itself")
    if key in sections() and value.lstrip().startswith(("[", "{")):
        raise ConfigError(f"{word}: {one_choice(key)}")
    depth = deepest = 0
    for character in value:
        depth += (character in "[{(") - (character in ")}]")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise ConfigError(f"{word} is nested {deepest} deep; no setting is")


def one_choice(group: str) -> str:
    """Return the way out for a group that was given something else than the name of a choice."""
    choices = ", ".join(group_choices().get(group, ["vp-train --help lists them"]))
    return (
        f"a group takes the name of one of its choices ({choices}); "
        f"for one value write {group}.NAME=VALUE"
    )


def refuse_two_choices(overrides: Sequence[str]) -> None:
    """Raise ConfigError for two choices of a group, of which hydra takes the last without a word.

    A setting may be given twice, and the last one counts: what a plan proposes is appended.
    """
    chosen: dict[str, str] = {}
    for word in overrides:
        group = word.partition("=")[0]
        first = chosen.setdefault(group, word)
        if group in sections() and first != word:
            raise ConfigError(f"{first} and {word}: a group has one choice; drop one of the two")


# Settings of `data` that do not count with a choice of data.name.
_UNUSED_DATA = {
    "synthetic": (
        *("tokenizer", "other_tokenizer", "end_token", "begin_token", "jsonl_field"),
        *("cache_dir", "workers", "validation_fraction", "split_seed"),
    ),
    "pystdlib": ("jsonl_field",),
}


def refuse_unused(data: DataConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError for one of `overrides` that the chosen data does not use.

    A default does no harm, nor does one that a resumed run or another choice has kept.
    """
    given, default = {word.partition("=")[0] for word in overrides}, DataConfig()
    for name in _UNUSED_DATA.get(data.name, ()):
        value = getattr(data, name)
        if f"data.{name}" not in given or value == getattr(default, name):
            continue
        if name == "jsonl_field" and data.validation:
            continue
        raise ConfigError(
            f"data.{name}={value_words(value)} does not count with data={data.name}; drop it, or "
            "for text of your own add data=text data.path=DIR"
        )
