"""Help, and the page docs/settings.md: every setting in words."""

from __future__ import annotations

import re
import textwrap
import typing
from collections.abc import Iterable
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any

from vp_train.config import RunConfig
from vp_train.config.setting import Setting, setting_of
from vp_train.settings.tree import ENTRIES, field_of, group_choices, own_fields, sections, values_of
from vp_train.settings.words import value_words


def settings_help(config: RunConfig, names: Iterable[str]) -> str:
    """Return one line for each of these settings: its value in `config`, and its meaning."""
    values = values_of(config)
    words = [
        (f"{name}={value_words(values[name])}", setting_of(field_of(name)[0])) for name in names
    ]
    width = min(44, max(len(word) for word, _ in words))
    return "\n".join(f"  {word:<{width}}  {_sentence(setting)}" for word, setting in words)


def files_words(group: str) -> str:
    """Return how settings are taken from files; `group` is the example of a group."""
    return (
        "settings=FILE.yaml takes what --print-config prints, or any part of it; other words win "
        f"over it.\nA group takes a file of its own too: {group}=FILE.yaml."
    )


def all_settings_help(command: str) -> str:
    """Return how settings are written, and which groups there are."""
    purposes = {
        name: re.split(r"[.;](?:\s|$)", _paragraphs(kind))[0] for name, kind in sections().items()
    }
    return "\n".join(
        [
            "A setting is written group.name=value, and a preset of a group group=choice.  The "
            f"groups, each in full with {command} --help GROUP:",
            *(f"  {name:<10}  {purpose}." for name, purpose in purposes.items()),
            "and in no group:",
            *(f"  {item.name}: {setting_of(item).meaning}" for item in own_fields()),
            files_words("cluster"),
            "vp-train --help has all settings in short, docs/settings.md in full.",
        ]
    )


def section_help(name: str, config: RunConfig) -> str:
    """Return the purpose of one section, and every setting of it in full.

    A setting has its value in `config`, meaning, allowed values, unit and default.
    """
    section = getattr(config, name)
    parts = [_in_full(f"{name}.{item.name}", item, section) for item in fields(section)]
    purpose = f"{name}: {_paragraphs(type(section))}".splitlines()
    wrapped = "\n".join(textwrap.fill(line, 100, break_on_hyphens=False) for line in purpose)
    return "\n".join([wrapped, "", *parts])


def setting_help(name: str, config: RunConfig) -> str:
    """Return one setting: in full, or its line of `settings_help` if it is in no section."""
    group, dot, _ = name.partition(".")
    if not dot:
        return settings_help(config, [name]).strip()
    return _in_full(name, field_of(name)[0], getattr(config, group))


def _in_full(name: str, item: Any, section: object) -> str:
    """Return value, meaning, allowed values, unit and default of a field of `section`."""
    setting, kind = setting_of(item), typing.get_type_hints(type(section))[item.name]
    facts = [
        _values_words(name, kind, setting),
        setting.unit,
        f"default {value_words(item.default)}",
    ]
    return (
        f"{name}={value_words(getattr(section, item.name))}\n"
        f"    {setting.meaning}\n"
        f"    ({'; '.join(filter(None, facts))})"
        f"{_entry_words(name)}"
    )


def _entry_words(name: str) -> str:
    """Return an example of a setting that is a list of sections, and what an entry has.

    Empty for other settings.
    """
    if name not in ENTRIES:
        return ""
    kind, example = ENTRIES[name]
    items = [
        (f"{item.name}={value_words(item.default)}", setting_of(item)) for item in fields(kind)
    ]
    width = max(len(word) for word, _ in items)
    lines = [f"    {word:<{width}}  {_sentence(setting)}" for word, setting in items]
    return "\n".join(["", f"    for example {example}; an entry has", *lines])


def settings_page() -> str:
    """Return docs/settings.md: every setting with its default, allowed values, unit and meaning."""
    parts = [
        "# Settings",
        "Every setting of a run. Append `section.name=value` to any command to change one; of\n"
        "two values the last counts, and a group has one choice.\n"
        "`vp-train --help SECTION` shows a section too. `settings=FILE.yaml` reads\n"
        "[a file of them](quickstart.md#your-own-text). Values are taken as they are written:\n"
        "`${...}` is refused, in overrides and in files, because a file of somebody else must not\n"
        "read the environment, and the shell expands your variables. Names have no control\n"
        "characters. A text may have spaces, `=`, `(` or `#`; one with a comma or a backslash is\n"
        "quoted, for the shell too: `\"data.path='a,b'\"`. This page is generated:\n"
        "`python -m vp_train.settings > docs/settings.md`.",
    ]
    for name, section in [
        *sections().items(),
        ("", RunConfig),
        *((f"an entry of {name}", kind) for name, (kind, _) in ENTRIES.items()),
    ]:
        title = "top level" if section is RunConfig else name
        own = own_fields() if section is RunConfig else fields(section)
        types = typing.get_type_hints(section)
        rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
        for item in own:
            setting = setting_of(item)
            values = "; ".join(
                filter(
                    None,
                    [_values_words(f"{name}.{item.name}", types[item.name], setting), setting.unit],
                )
            )
            rows.append(
                f"| `{item.name}` | `{value_words(item.default)}` | {values} | {setting.meaning} |"
            )
        paragraphs = [] if section is RunConfig else _paragraphs(section).split("\n\n")
        text = "".join(
            f"{textwrap.fill(words, 100, break_on_hyphens=False)}\n\n" for words in paragraphs
        )
        parts.append(f"## {title}\n\n{text}" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _sentence(setting: Setting) -> str:
    """Return the meaning of a setting, followed by its unit."""
    return f"{setting.meaning} [{setting.unit}]" if setting.unit else setting.meaning


def _paragraphs(section: type) -> str:
    """Return the docstring of a section with one line per paragraph."""
    lines = (line.strip() for line in (section.__doc__ or "").strip().splitlines())
    return "\n\n".join(" ".join(part.split("\n")) for part in "\n".join(lines).split("\n\n"))


# The values of these settings are the choices of their group.
_NAMED = {"schedule.name": "schedule", "vocab.algorithm": "vocab"}


def _values_words(name: str, kind: Any, setting: Setting) -> str:
    """Return in words which values the setting `name` takes."""
    if name in _NAMED:
        return f"one of {', '.join(group_choices()[_NAMED[name]])}"
    if not setting.choices:
        return "; ".join(filter(None, [_type_words(kind), setting.allowed]))
    return _type_words(kind).replace("text", f"one of {setting.allowed}")


def _type_words(kind: Any) -> str:
    """Return a type in words, for example `int or null`."""
    names = {int: "int", float: "float", bool: "true or false", str: "text", NoneType: "null"}
    if isinstance(kind, UnionType):
        return " or ".join(map(_type_words, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"list of {_type_words(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is list:
        return f"lists of {_type_words(typing.get_args(kind)[0])}"
    return names.get(kind, "entries")
