"""Values and overrides in words: as one types them, and as hydra's grammar reads them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from vp_train.config import printable
from vp_train.settings.tree import ENTRIES, is_text


def value_words(value: Any) -> str:
    """Return a value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):  # an entry of a list; what is null is not typed
        pairs = (f"{key}:{value_words(one)}" for key, one in value.items() if one is not None)
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(value_words, value))}]"
    return str(value)


def setting_words(value: object) -> str:
    """Return the value of a setting in words, without control characters."""
    return printable(value_words(value))


def override(name: str, value: str) -> str:
    """Return the override that sets a text, whatever characters it has."""
    return f"{name}={quoted_value(value)}"


_MEANT_FOR_HYDRA = re.compile(r"""\s*(?:['"\[{].*|null\s*)|.*[,\\].*|""", re.I | re.S)


def typed(name: str, value: str) -> str:
    """Return the override that sets a text as one types it: in quotes only where it needs them."""
    is_plain = not _MEANT_FOR_HYDRA.fullmatch(value) and "~" not in value
    return f"{name}={value}" if is_plain else override(name, value)


def for_shell(word: str) -> str:
    """Return a word of a command as one types it: in quotes where it needs them, double if able."""
    plain = shlex.quote(word)
    return plain if plain == word or re.search(r'["$`\\!]', word) else f'"{word}"'


def quoted_value(setting: object) -> str:
    """Return a value of a file as hydra reads it after `key=`."""
    if isinstance(setting, str):
        # A backslash counts as one unless it stands before a quote.
        return "'" + re.sub(r"(\\*)('|$)", _escaped, setting) + "'"
    if isinstance(setting, Mapping):
        pairs = (f"{key}:{quoted_value(value)}" for key, value in setting.items())
        return f"{{{','.join(pairs)}}}"
    if isinstance(setting, Sequence):
        return f"[{','.join(map(quoted_value, setting))}]"
    return "null" if setting is None else str(setting)


def _escaped(found: re.Match[str]) -> str:
    return found[1] * 2 + ("\\'" if found[2] else "")


_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_QUOTED_OR_HOME = re.compile(rf"{_QUOTED}|(?<=[=:,\[])\s*(~[^,\]}}]*)")


def at_home(word: str) -> str:
    """Expand a `~` that begins a value outside quotes: hydra's grammar has none."""

    def found(match: re.Match[str]) -> str:
        return match[0] if match[1] is None else quoted_value(os.path.expanduser(match[1]))

    return _QUOTED_OR_HOME.sub(found, word)


def as_written(word: str) -> str:
    """Quote the value of a text setting, so that `=`, `(` or `#` in a path is one of its letters.

    Lists, quoted values and null stay what they are in hydra's grammar, and so do values with a
    comma, which separates several, or a backslash, which escapes.
    """
    name, equals, value = word.partition("=")
    if not equals or not is_text(name) or _MEANT_FOR_HYDRA.fullmatch(value):
        return word
    return override(name, value)


def quoted_words(word: str) -> str:
    """Return the way out for a text that hydra takes for something else; empty for other words."""
    name, _, value = word.partition("=")
    if name in ENTRIES:
        return "quote a path with other signs than letters, digits and /-_.: {path:'/data/a=b'}"
    if not is_text(name) or re.fullmatch(_QUOTED, value):
        return ""
    typed = override(name, value.replace("'", ""))
    return f"if that is one text, quote it for the shell and for hydra: {for_shell(typed)}"


def parsed_override(word: str) -> Any:
    """Return what hydra's grammar reads in an override.  Raises HydraException."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(word)
