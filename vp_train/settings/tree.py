"""What settings there are: sections, the settings in them, and the choices of groups."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from vp_train.config import BlendEntry, RunConfig, ValidationEntry
from vp_train.config.data import BLEND_EXAMPLE
from vp_train.config.setting import setting_of

# Settings that are lists of sections: the type of an entry, and a list as typed in a shell.
ENTRIES = {
    "data.blend": (BlendEntry, BLEND_EXAMPLE),
    "data.validation": (
        ValidationEntry,
        "'data.validation=[{name:wiki,path:DIR},{name:code,path:FILE}]'",
    ),
}
YAML_ENDINGS = (".yaml", ".yml")  # of the file of a group, by which it is no choice
# What the choices of a group set in other groups.
SETS_TOO = {"cluster": ("run.device", "run.dtype")}


@cache
def sections() -> Mapping[str, type]:
    """Return the classes of the configuration's sections by their names."""
    types = typing.get_type_hints(RunConfig)
    return MappingProxyType(
        {
            item.name: types[item.name]
            for item in fields(RunConfig)
            if is_dataclass(types[item.name])
        }
    )


@cache
def setting_names() -> tuple[str, ...]:
    """Return the names of all settings: `section.name`, or `name` for those of no section."""
    names = [f"{name}.{item.name}" for name, kind in sections().items() for item in fields(kind)]
    return (*names, *(item.name for item in own_fields()))


@cache
def own_fields() -> tuple[Any, ...]:
    """Return the fields of RunConfig that are not sections."""
    return tuple(item for item in fields(RunConfig) if item.name not in sections())


def field_of(name: str) -> tuple[Any, type]:
    """Return the field of a setting and the class that has it."""
    group, _, key = name.rpartition(".")
    section = sections()[group] if group else RunConfig
    (item,) = (item for item in fields(section) if item.name == key)
    return item, section


@cache
def kind_of(name: str) -> Any:
    """Return the type of a setting."""
    item, section = field_of(name)
    return typing.get_type_hints(section)[item.name]


@cache
def is_text(name: str) -> bool:
    """Return whether a setting takes any text."""
    if name not in setting_names():
        return False
    return kind_of(name) in (str, str | None) and not setting_of(field_of(name)[0]).choices


def values_of(config: RunConfig) -> dict[str, object]:
    """Return every setting of a configuration by its name."""
    values = {
        f"{name}.{item.name}": getattr(getattr(config, name), item.name)
        for name, kind in sections().items()
        for item in fields(kind)
    }
    return values | {item.name: getattr(config, item.name) for item in own_fields()}


@cache
def group_choices() -> dict[str, list[str]]:
    """Return the choices of every group of settings: the names of its YAML files, sorted."""
    from importlib.resources import files

    return {
        entry.name: sorted(
            file.name.removesuffix(".yaml")
            for file in entry.iterdir()
            if file.name.endswith(".yaml")
        )
        for entry in sorted(files("vp_train.configs").iterdir(), key=lambda entry: entry.name)
        if entry.is_dir() and not entry.name.startswith("_")
    }
