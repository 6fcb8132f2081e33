"""The combinations of overrides that have several values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from vp_train.config import ConfigError
from vp_train.settings.checks import check_size
from vp_train.settings.words import parsed_override

_MOST_COMBINATIONS = 10_000


def combinations(words: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every combination of the values in `words`, the last one fastest.

    A word may have several values as in hydra's multirun: `a=1,2`, `a=choice(1,2)`,
    `a=range(1,5)`.  All other words stay as they are, and so does one that hydra cannot parse, so
    that `load_config` says what is wrong with it.  Raises ConfigError for other kinds of sweeps,
    for shuffle(...), with which an index would be another run in every process, and for too many
    combinations.
    """
    from hydra.errors import HydraException

    check_size(words)
    choices, total = [], 1
    for word in words:
        values = [word]
        try:
            parsed = parsed_override(word)
        except HydraException:
            parsed = None
        if parsed is not None and parsed.is_sweep_override():
            values = _swept(parsed, word)
        if (total := total * len(values)) > _MOST_COMBINATIONS:
            raise ConfigError(
                f"{word}: the lists have more than {_MOST_COMBINATIONS:,} combinations; give fewer"
            )
        choices.append(values)
    return [list(chosen) for chosen in itertools.product(*choices)]


def _swept(parsed: Any, word: str) -> list[str]:
    """Return the overrides that hydra makes of a sweep, not many more than are allowed.

    `parsed` is what hydra read in `word`.  Raises ConfigError for a sweep without a fixed order.
    """
    from hydra.errors import HydraException

    wrong = ConfigError(f"{word}: a sweep takes a list of values, choice(...) or range(...)")
    if not parsed.is_discrete_sweep() or getattr(parsed.value(), "shuffle", False):
        raise wrong
    key = parsed.get_key_element()
    try:
        values = itertools.islice(parsed.sweep_string_iterator(), _MOST_COMBINATIONS + 1)
        found = [f"{key}={value}" for value in values]
    except (HydraException, ValueError, TypeError, AttributeError, AssertionError):
        raise wrong from None
    if not found:
        raise ConfigError(f"{word} has no values")
    return found
