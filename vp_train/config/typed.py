"""Overrides as one types them in a shell, and as hydra's grammar reads them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence


def override(name: str, value: str) -> str:
    """Return the override that sets a text, whatever characters it has."""
    return f"{name}={quoted_value(value)}"


MEANT_FOR_HYDRA = re.compile(r"""\s*(?:['"\[{].*|null\s*)|.*[,\\].*|""", re.I | re.S)


def typed(name: str, value: str) -> str:
    """Return the override that sets a text as one types it: in quotes only where it needs them."""
    is_plain = not MEANT_FOR_HYDRA.fullmatch(value) and "~" not in value
    return f"{name}={value}" if is_plain else override(name, value)


def for_shell(word: str) -> str:
    """Return a word of a command as one types it: in quotes where it needs them, double if able."""
    plain = shlex.quote(word)
    return plain if plain == word or re.search(r'["$`\\!]', word) else f'"{word}"'


def shell_word(name: str, value: str) -> str:
    """Return the word of a shell that sets a text, in quotes where it needs them."""
    return for_shell(typed(name, value))


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
