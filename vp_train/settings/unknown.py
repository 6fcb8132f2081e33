"""Words of a command line that are no settings: all are answered in one error."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vp_train.config import ConfigError
from vp_train.config.typed import for_shell
from vp_train.settings.checks import LONGEST_KEY
from vp_train.settings.meant import (
    choice_of_group,
    close_names,
    instead_of_option,
    instead_of_word,
    way_elsewhere,
    written,
)
from vp_train.settings.tree import ENTRIES, group_choices, is_text, sections, setting_names

_MOST_ANSWERED = 5


@dataclass(frozen=True, slots=True)
class _Unknown:
    """A word that is none of ours.

    word: as typed, in short.
    kind: what it is not.
    answer: what to write instead, empty if nothing is like it.
    """

    word: str
    kind: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Phrase:
    """A name with its value, as typed: in one word, or in several with blanks between them.

    words: as typed.
    value: empty if there is none or if there are several.
    is_torn: the blanks stand in the value.
    """

    words: tuple[str, ...]
    name: str
    value: str
    is_torn: bool = False

    @property
    def is_option(self) -> bool:
        """Whether it begins as an option does."""
        return self.words[0].startswith("-")

    @property
    def text(self) -> str:
        """All words."""
        return " ".join(self.words)

    @property
    def has_blanks(self) -> bool:
        """Whether there are blanks around the sign between name and value."""
        return len(self.words) > 1 and "=" in self.text and not self.is_torn


def refuse_unknown(words: Sequence[str], known_options: Sequence[str]) -> None:
    """Raise ConfigError for words that are neither settings nor `known_options`."""
    found = []
    for phrase in _phrases(words):
        if phrase.is_option:
            found.append(_option(phrase, known_options))
        elif phrase.words[0].startswith("="):
            found.append(_Unknown(repr(phrase.words[0]), "an override", _NO_BLANKS))
        elif phrase.is_torn:
            found.append(_torn(phrase))
        elif phrase.has_blanks or "=" not in phrase.text:
            found.append(_without_sign(phrase))
        else:
            found += _settings(phrase.words)
    _refuse(found, known_options)


def refuse_options(words: Sequence[str], known_options: Sequence[str]) -> None:
    """Raise ConfigError for options that are not `known_options`; other words are not looked at."""
    options = (phrase for phrase in _phrases(words) if phrase.is_option)
    _refuse([_option(phrase, known_options) for phrase in options], known_options)


def refuse_unknown_settings(words: Sequence[str]) -> None:
    """Raise ConfigError for overrides of settings that are not there."""
    _refuse(_settings(words), ())


_NO_BLANKS = "write key=value without blanks"


def _phrases(words: Sequence[str]) -> Iterator[_Phrase]:
    """Yield the words with the values that follow them: of options, and behind blanks."""
    rest = list(words)
    while rest:
        taken = [rest.pop(0)]
        name, sign, value = taken[0].lstrip("-").partition("=")
        is_option = taken[0].startswith("-")
        if not sign and rest and rest[0].startswith("="):  # `x = 2` or `x =2`
            taken.append(rest.pop(0))
            sign, value = "=", taken[-1][1:]
        if value:
            is_torn = False
            while not is_option and rest and _goes_on(name, " ".join(taken), rest[0]):
                taken.append(rest.pop(0))
                is_torn = True
            yield _Phrase(tuple(taken), name, value, is_torn)
            continue
        takes = is_option or bool(sign) or name in _known()
        most = len(rest) if is_option and not sign else int(takes)
        values = list(itertools.takewhile(_is_value, rest[:most]))
        del rest[: len(values)]
        yield _Phrase((*taken, *values), name, values[0] if len(values) == 1 else "")


def _goes_on(name: str, typed: str, word: str) -> bool:
    """Return whether a word goes on with the value of `name` that was `typed` without quotes."""
    is_open = any(typed.count(left) > typed.count(right) for left, right in ("[]", "{}"))
    return is_open or (is_text(name) and _is_value(word))


def _is_value(word: str) -> bool:
    return "=" not in word and not re.match("-[^0-9.]", word)


def _option(phrase: _Phrase, known_options: Sequence[str]) -> _Unknown:
    word = phrase.text if phrase.has_blanks else phrase.words[0]
    answer = instead_of_option(phrase.words[0], phrase.name, phrase.value, known_options)
    return _Unknown(word, "an option", answer or (_NO_BLANKS if phrase.has_blanks else ""))


def _torn(phrase: _Phrase) -> _Unknown:
    """Return what is wrong with a value in several words."""
    answer = f"for one value write {for_shell(phrase.text)}"
    choices = {choice for choices in group_choices().values() for choice in choices}
    if len(phrase.words) == 2 and phrase.words[1] in choices:
        answer += f", else {instead_of_word(phrase.words[1])}"
    return _Unknown(repr(phrase.text), "an override", answer)


def _without_sign(phrase: _Phrase) -> _Unknown:
    """Return what is wrong with a word without `=`, or with blanks around that."""
    if len(phrase.words) == 1 and "=" not in phrase.text:
        return _Unknown(repr(phrase.text), "an override", instead_of_word(phrase.name))
    answer = way_elsewhere(phrase.name, phrase.value)
    if answer is None:
        close = [phrase.name] if phrase.name in _known() else close_names(phrase.name)
        answer = f"write {written(close[0], phrase.value)} without blanks" if close else _NO_BLANKS
    return _Unknown(repr(phrase.text), "an override", answer)


def _settings(words: Sequence[str]) -> list[_Unknown]:
    """Return those of the overrides whose settings are not there, except what is refused anyway."""
    known, found = _known(), []
    for word in words:
        key, _, value = word.partition("=")
        is_odd = word.startswith(("+", "~", "hydra")) or "@" in key or len(key) > LONGEST_KEY
        if key in known or is_odd or any(key.startswith(f"{name}.") for name in ENTRIES):
            continue
        answer = way_elsewhere(key, value) or ""
        if not answer and (close := _close(word)):
            answer = f"did you mean {' or '.join(close)}?"
        found.append(_Unknown(key, "a setting", answer))
    return found


def _known() -> tuple[str, ...]:
    """Return what may stand before `=`."""
    return (*setting_names(), *sections(), "settings")


def _close(word: str) -> list[str]:
    choice = choice_of_group(word)
    return [choice] if choice is not None else close_names(word.partition("=")[0])


def _refuse(found: Sequence[_Unknown], known_options: Sequence[str]) -> None:
    """Raise ConfigError if something was found, with what there is."""
    if not found:
        return
    options = ", ".join((*known_options, "--help"))
    where = f"there are {options} and --print-config, all else is key=value"
    has_options = any(one.kind == "an option" for one in found)
    if len(found) > 1:
        answers = [f"{one.word}: {one.answer or 'nothing is like it'}" for one in found]
        more = [f"and {len(found) - _MOST_ANSWERED} more"] if len(found) > _MOST_ANSWERED else []
        parts = [*answers[:_MOST_ANSWERED], *more]
        where = where if has_options else "vp-train --help lists all settings"
        raise ConfigError(f"{len(found)} words are not known; {_joined([*parts, where])}")
    (one,) = found
    if one.kind == "a setting" and not one.answer:
        section = one.word.partition(".")[0]
        lists = f"{section} lists those of {section}"
        if section not in sections():
            lists = f"lists all, and with a name those of {', '.join(sections())}"
        where = f"vp-train --help {lists}"
    needs_where = has_options or not one.answer
    parts = [f"{one.word} is not {one.kind}", one.answer, where if needs_where else ""]
    raise ConfigError(_joined(filter(None, parts)))


def _joined(parts: Iterator[str] | Sequence[str]) -> str:
    """Return clauses with semicolons between them, but after a question."""
    return "; ".join(parts).replace("?; ", "? ")
