"""The settings of the chosen files of configs/, merged as hydra does."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from functools import cache
from typing import Any

from vp_train.config import RunConfig


@cache
def of_choices(chosen: tuple[tuple[str, str], ...]) -> bytes:
    """Return the settings of these choices, each a group and its choice, pickled.

    Reading that takes a seventh of the time of a copy.  Raises ValueError for what is left to
    hydra: several choices that ask for others, and groups that configs/config.yaml does not have.
    """
    from omegaconf import OmegaConf

    own, defaults = _ours("config")[0], default_choices()
    asked = _asked_by(defaults | dict(chosen))
    choices = defaults | dict(asked) | dict(chosen)
    if len(asked) > 1 or asked != _asked_by(choices) or choices.keys() != defaults.keys():
        raise ValueError(f"{choices} are left to hydra")
    parts = [_of_choice(*choice)[0] for choice in choices.items()]
    return pickle.dumps(OmegaConf.merge(schema(), *parts, own))


def on_saved(saved: Mapping[str, object], choices: Mapping[str, str]) -> Any:
    """Return saved settings with these choices of groups on top of them.

    Raises ValueError for choices that ask for others, which are left to hydra.
    """
    from omegaconf import OmegaConf

    if _asked_by(choices):
        raise ValueError(f"{choices} are left to hydra")
    return OmegaConf.merge(schema(), saved, *(_of_choice(*one)[0] for one in choices.items()))


def default_choices() -> dict[str, str]:
    """Return the choice of every group in configs/config.yaml, in the order in which they count."""
    _, *groups, _ = _ours("config")[1]  # first the schema, last its own settings
    return {str(group): choice for entry in groups for group, choice in entry.items()}


def _asked_by(choices: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the choices of other groups that these choices ask for, each a group and a choice."""
    return [asked for choice in choices.items() for asked in _of_choice(*choice)[1]]


@cache
def _of_choice(group: str, choice: str) -> tuple[Any, list[tuple[str, str]]]:
    """Return the settings of a choice of a group, and the choices of other groups it asks for.

    Its file may build on choices of the same group and the same package.  Raises ValueError for
    what else hydra knows.
    """
    from omegaconf import OmegaConf

    (own, defaults, is_global), parts, asked = _ours(f"{group}/{choice}"), [], []
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if entry == "_self_":
            parts.append(own if is_global else {group: own})
        elif isinstance(entry, str) and _ours(f"{group}/{entry}")[2] == is_global:
            settings, others = _of_choice(group, entry)
            parts.append(settings)
            asked += others
        elif is_global and "override /" in str(entry):
            asked += [(key.removeprefix("override /"), other) for key, other in entry.items()]
        else:
            raise ValueError(f"{entry} of {group}/{choice}.yaml is left to hydra")
    return OmegaConf.merge(*parts), asked


@cache
def _ours(name: str) -> tuple[Any, list[Any], bool]:
    """Return the settings, the list of defaults, and whether the package is _global_, of a file.

    Raises ValueError for another package.
    """
    from importlib.resources import files

    from omegaconf import OmegaConf

    text = files("vp_train.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    is_global = text.startswith("# @package _global_\n")
    if "@package" in text and not is_global:
        raise ValueError(f"the package of {name}.yaml is left to hydra")
    settings: Any = OmegaConf.create(text)
    return settings, [*settings.pop("defaults", [])], is_global


@cache
def schema() -> object:
    """Return the types of all settings."""
    from omegaconf import OmegaConf

    types = OmegaConf.structured(RunConfig)
    _thaw(types)
    return types


def _thaw(node: object) -> None:
    """Make `node` and all nodes in it writable.

    A frozen dataclass makes read-only nodes, into which nothing can be merged.
    """
    from omegaconf import DictConfig, OmegaConf

    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, False)
        for key in node:
            _thaw(node._get_node(key))
