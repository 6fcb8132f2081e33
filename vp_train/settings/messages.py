"""What is wrong with an override, in one line with the way out, from hydra's messages."""

from __future__ import annotations

import contextlib
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from vp_train.config import ConfigError
from vp_train.config.errors import unknown
from vp_train.config.setting import setting_of
from vp_train.config.typed import shell_word
from vp_train.config.whole import RAMP_WORDS
from vp_train.settings.checks import LONGEST_KEY
from vp_train.settings.tree import ENTRIES, field_of, kind_of, setting_names
from vp_train.settings.words import parsed_override, quoted_words, value_words


def first_line(error: BaseException) -> str:
    """Return the first line of a message, or the name of an exception without one."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    return lines[0] if lines else type(error).__name__


def broken_list(word: str) -> str:
    """Return what is wrong with a list of values that hydra cannot read; empty for other words."""
    name, _, value = word.partition("=")
    if (missing := value.count("(") - value.count(")")) > 0 and re.match(
        r"(range|choice)\(", value
    ):
        return f"a closing bracket is missing: {word}{')' * missing}"
    items = [item.strip() for item in value.split(",")]
    if "[" in value or "(" in value or len(items) < 2 or all(items):
        return ""
    kept = f"{name}={','.join(filter(None, items))}"
    if value.endswith(",") and all(items[:-1]):
        return f"drop the comma at the end: {kept}"
    return f"item {items.index('') + 1} of its list is empty: {kept}"


def unknown_choice(error: BaseException) -> str:
    """Return hydra's message about an unknown choice of a group, in one line.

    Hydra lists the options one per line after 'Available options in'.
    """
    lines = str(error).splitlines()
    missing = lines[0].partition("Could not find ")[2].strip("'") or lines[0]
    options = [line.strip() for line in lines if line.startswith("\t") and "=" not in line]
    group, _, choice = missing.partition("/")
    if not choice:
        return f"{missing.removesuffix('/')}= names no preset; give one, or drop the word"
    if group == "data" and len(choice) < LONGEST_KEY and Path(os.path.expanduser(choice)).exists():
        path = shell_word("data.path", choice)
        return f"data={choice} is not known; for text of your own: data=text {path}"
    if group == "model" and (file := _model_file(choice)) is not None:
        word = shell_word("model", str(file))
        return f"{group}={choice} is a directory; give the file of settings in it: {word}"
    way_out = ", or give a file of settings whose name ends with .yaml" if "/" in choice else ""
    return unknown(f"{group}={choice}", choice, options) + way_out


def _model_file(choice: str) -> Path | None:
    """Return the file of settings in a directory that vp-import has written, if that is one."""
    file = Path(choice) / "model.yaml"
    try:
        return file if Path(os.path.expanduser(file)).is_file() else None
    except OSError:  # a name that no file can have
        return None


def bad_override(error: BaseException, overrides: Sequence[str]) -> str:
    """Return hydra's message about one of `overrides` that it cannot merge, in one line."""
    first = first_line(error)
    reason = f": {first_line(error.__cause__)}" if error.__cause__ is not None else ""
    for name, (kind, example) in ENTRIES.items():
        if first.startswith((f"Could not override '{name}'", f"Error merging override {name}=")):
            given = [word for word in overrides if word.startswith(f"{name}=")]
            if not given:
                return f"{name}{reason}"
            is_expanded = ":" in given[-1] and "{" not in given[-1]
            lost = "the shell expands braces without quotes; " if is_expanded else ""
            return f"{_wrong_entry(given[-1], kind)}; {lost}write {example}"
    if (other := re.match(r"In '(\w+)/(\w+)': Could not override '(\w+)'", first)) is not None:
        group, choice, chosen = other.groups()
        return (
            f"{group}={choice} chooses a {chosen}, and a resumed run keeps its own; give its "
            f"settings one by one (vp-train --print-config {group}={choice})"
        )
    if first.startswith("Ambiguous value"):
        word = first[first.index("'") + 1 : first.rindex("'")]
        way_out = quoted_words(word) or _one_value(word)
        return f"{word}: one value is needed; {way_out}"
    if first.startswith("Could not override"):
        key = first.split("'")[1]
        return f"{key} is not a setting; see vp-train --help for all keys"
    word = first.removeprefix("Error merging override ")
    if (words := _wrong_type(word)) is not None:
        return words
    return word + reason


def _one_value(word: str) -> str:
    """Return the way out for several values of a setting, separated by commas."""
    name, _, value = word.partition("=")
    if name in setting_names():
        kind = str(kind_of(name))
        if "tuple" in kind or "list" in kind:
            return f"a list is written {name}=[{value}]"
        if "int" in kind and re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", value):
            number = f"{name}={value.replace(',', '')}"
            return f"a number has no commas ({number}), and vp-train -m trains with each of several"
    return "vp-simulate --compare compares several schedules, vp-train -m trains with each value"


def _wrong_entry(word: str, entry_type: type) -> str:
    """Return what is wrong with the types in an override of a list of such entries."""
    value = parsed_override(word).value()
    if not isinstance(value, list):
        return f"{word} is not a list of corpora"
    list_name = word.partition("=")[0]
    kinds = typing.get_type_hints(entry_type)
    for number, entry in enumerate(value):
        place = f"{list_name}[{number}]"
        if not isinstance(entry, dict):
            return f"{place}={entry} is not a corpus"
        for name, setting in entry.items():
            if str(name) not in kinds:
                return unknown(f"{place}.{name}", name, list(kinds))
            kind = kinds[str(name)]
            if not _fits(setting, kind):
                return f"{place}.{name}={value_words(setting)} is not {_kind_words(kind)}"
    return f"{word} is not a list of corpora"


def _fits(setting: object, kind: Any) -> bool:
    """Return whether omegaconf takes a value of a list for a text or number of this type."""
    if setting is None:
        return isinstance(kind, UnionType)
    if kind is not float:
        return not isinstance(setting, list | dict)
    if isinstance(setting, bool) or not isinstance(setting, str | int | float):
        return False
    with contextlib.suppress(ValueError):
        float(setting)
        return True
    return False


def _wrong_type(word: str) -> str | None:
    """Return which values the setting of an override takes; None if it is not a simple one."""
    name, equals, value = word.partition("=")
    if not equals or name not in setting_names():
        return None
    if name == "batch_ramp":
        return f"{word} is not a list of pairs, each a step and a number of sequences; {RAMP_WORDS}"
    item, kind = field_of(name)[0], kind_of(name)
    setting = setting_of(item)
    if (words := _kind_words(kind)) is None:
        return None
    if (one := _one_element(name, value)) is not None:
        return f"{word} is not a list; write {name}=[{one}]"
    if setting.choices:
        return f"{word} is not {words}; choose one of {setting.allowed}"
    if not setting.allowed:
        return f"{word} is not {words}; see vp-train --help {name}"
    verb = "lie in" if setting.allowed.startswith(("[", "(")) else "be"
    is_list = _element_kind(kind) is not None
    subject = "each" if is_list else "it"
    digits = _in_digits(value)
    way_out = ""
    with contextlib.suppress(ConfigError):
        if digits is not None and not is_list:
            setting.check(name, int(digits), item.default)
            way_out = f"; write {name}={digits}"
    return f"{word} is not {words}; {subject} must {verb} {setting.allowed}{way_out}"


def _one_element(name: str, value: str) -> str | None:
    """Return a value that was typed alone as the one element of a list; None if it cannot be it."""
    element, item = _element_kind(kind_of(name)), field_of(name)[0]
    typed: object = value
    if element is int:
        digits = _in_digits(value)
        typed = None if digits is None else int(digits)
    if element not in (int, str) or typed is None or re.search(r"[\[\]{}()]", value):
        return None
    with contextlib.suppress(ConfigError):
        setting_of(item).check(name, typed, item.default)
        return str(typed)
    return None


def _element_kind(kind: Any) -> Any:
    """Return the type of the elements of a list, or of a list or null; None for other types."""
    for part in (kind, *typing.get_args(kind)):
        if typing.get_origin(part) is tuple:
            return typing.get_args(part)[0]
    return None


def _in_digits(value: str) -> str | None:
    """Return a whole number that has an exponent or a point in digits, None for all else."""
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?(e\+?[0-9]{1,2})?", value, re.I):
        return None
    number = float(value)
    return f"{number:.0f}" if number.is_integer() and number < 1e15 else None


def _kind_words(kind: Any) -> str | None:
    """Return a type as it is named in errors, for example `a whole number or null`."""
    if isinstance(kind, UnionType):
        parts = [_kind_words(part) for part in typing.get_args(kind)]
        return None if None in parts else " or ".join(filter(None, parts))
    if typing.get_origin(kind) is tuple:
        plural = {int: "whole numbers", float: "numbers", str: "texts"}
        element = plural.get(typing.get_args(kind)[0])
        return None if element is None else f"a list of {element}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return {**names, NoneType: "null"}.get(kind)
