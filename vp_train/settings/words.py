"""Values and overrides in words: as one types them, and as hydra's grammar reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any

from vp_train.config import printable
from vp_train.config.typed import MEANT_FOR_HYDRA, for_shell, override, quoted_value
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
    if not equals or not is_text(name) or MEANT_FOR_HYDRA.fullmatch(value):
        return word
    return override(name, value)


_PATH_OF_ENTRY = re.compile(rf"{_QUOTED}|(?<=path:)([^'\"\[\]{{}},]+)")


def _quoted_path(found: re.Match[str]) -> str:
    return found[0] if found[1] is None else quoted_value(found[1])


def quoted_words(word: str) -> str:
    """Return the way out for a text that hydra takes for something else; empty for other words."""
    name, _, value = word.partition("=")
    if name in ENTRIES:
        quoted = re.sub(_PATH_OF_ENTRY, _quoted_path, word)
        example = ENTRIES[name][1] if quoted == word else for_shell(quoted)
        return f"quote a path with other signs than letters, digits and /-_.: {example}"
    if not is_text(name) or re.fullmatch(_QUOTED, value):
        return ""
    typed = override(name, value.replace("'", ""))
    return f"if that is one text, quote it for the shell and for hydra: {for_shell(typed)}"


def parsed_override(word: str) -> Any:
    """Return what hydra's grammar reads in an override.  Raises HydraException."""
    return _parser().parse_override(word)


@cache
def _parser() -> Any:
    """Return hydra's parser of overrides: making it takes as long as its work on a word."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()
