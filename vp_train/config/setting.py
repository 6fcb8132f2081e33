"""What a field says of itself (meaning, bounds, unit), and the check of a value by that."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from vp_train.config.errors import CONTROL, ConfigError, printable, unknown

KEY = "setting"
Value = TypeVar("Value")
_LONGEST_TEXT = 2_048  # characters; a path has at most 4,096, and names are appended to some
_LONGEST_NAME = 255  # bytes; no file system has a longer one


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
    if found := CONTROL.search(text):
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
    return field(default=default, metadata={KEY: described})


def setting_of(item: Any) -> Setting:
    """Return the description of a field of a section."""
    described = item.metadata[KEY]
    assert isinstance(described, Setting)
    return described


def check_section(prefix: str, section: object) -> None:
    """Check every field of `section`; a YAML list becomes the tuple its field promises."""
    for item in fields(section):  # type: ignore[arg-type]
        value = frozen(getattr(section, item.name))
        object.__setattr__(section, item.name, value)
        setting_of(item).check(f"{prefix}{item.name}", value, item.default)


def frozen(value: Any) -> Any:
    """Return `value` with tuples for lists, in lists too."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value
