"""YAML files with settings, which somebody else may have written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from types import NoneType

from vp_train.config import ConfigError, RunConfig
from vp_train.durable import UnreadableError, read_text
from vp_train.settings.checks import DEEPEST
from vp_train.settings.messages import first_line
from vp_train.settings.tree import FILE_GROUPS, group_choices, sections
from vp_train.settings.words import quoted_value

_MOST_NODES = 4_096  # values in a file
_LARGEST_FILE = 1 << 18  # bytes


def read_yaml(path: Path) -> object:
    """Return the mapping in a YAML file as an omegaconf node; nothing in it is interpolated.

    The file is looked through as a stream of events before anything is built from it, so a few
    bytes cannot become many.  Raises UnreadableError for a file that is not regular or too large,
    for aliases, tags, `${...}`, deep nesting, and for anything else than a mapping.
    """
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    text = read_text(path, _LARGEST_FILE)
    try:
        if (reason := _refusal(text)) is not None:
            raise UnreadableError(f"{path}: {reason}")
        settings = pickle.loads(_parsed(text))
    except UnreadableError:
        raise
    except (ValueError, TypeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)  # counts lines from 0
        place = "" if mark is None else f"line {mark.line + 1}: "
        raise UnreadableError(f"{path} is not YAML ({place}{first_line(error)})") from None
    if not isinstance(settings, DictConfig) or not settings:
        raise UnreadableError(f"{path} holds no settings, one `key: value` per line")
    return settings


@lru_cache(maxsize=16)
def _parsed(text: str) -> bytes:
    """Return a YAML text as an omegaconf node, pickled; a run that goes on reads its file often."""
    from omegaconf import OmegaConf

    return pickle.dumps(OmegaConf.create(text))


def _refusal(text: str) -> str | None:
    """Return why a YAML text is not parsed, with its line; None if it may be.

    Raises YAMLError where it is not YAML.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = nodes = 0
    for event in yaml.parse(text, Loader=loader):
        reason = None
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            reason = "has anchors or aliases; write each value where it belongs"
        elif isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            reason = f"{event.value[:60]} is not expanded in settings; write the value itself"
        elif isinstance(event, yaml.ScalarEvent) and event.value == "???":
            reason = "has the value ???; write the value itself"
        elif isinstance(event, yaml.NodeEvent) and event.tag not in (None, "!"):
            reason = f"has the tag {event.tag[:60]}; settings have none"
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or nodes > _MOST_NODES:
            reason = f"is nested deeper than {DEEPEST} or has over {_MOST_NODES:,} values"
        if reason is not None:
            return f"line {event.start_mark.line + 1} {reason}"
    return None


def leaves(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the name and value of every setting; a list is one value."""
    from omegaconf import DictConfig

    assert isinstance(node, DictConfig)
    for key in node:
        value = node[key]
        if isinstance(value, DictConfig):
            yield from leaves(value, f"{prefix}{key!s}.")
        else:
            yield f"{prefix}{key!s}", value


def words_of_file(word: str) -> list[str] | None:
    """Return `model=FILE.yaml` or `cost=FILE.yaml` as overrides, one per setting in the file.

    vp-import writes such files of models, vp-profile of costs.  Returns None for any other word.
    Raises ConfigError if the file cannot be read.
    """
    group, _, value = word.partition("=")
    path = Path(os.path.expanduser(value))
    if group not in FILE_GROUPS or path.suffix != ".yaml":
        return None
    from omegaconf import DictConfig

    try:
        settings = read_yaml(path)
    except UnreadableError as error:
        raise ConfigError(f"{group}={error}{'' if path.exists() else _made_by(group)}") from None
    assert isinstance(settings, DictConfig)
    known = {item.name for item in fields(sections()[group])}
    for key, setting in settings.items():
        if str(key) not in known and not isinstance(setting, str | int | float | bool | NoneType):
            raise ConfigError(
                f"{word}: {key!s} is no setting of {group}; such a file has the settings of this "
                f"group alone, such as {next(iter(fields(sections()[group]))).name}: 8"
            )
    return [f"{group}.{key!s}={quoted_value(setting)}" for key, setting in settings.items()]


def has_settings(path: Path, group: str) -> bool:
    """Return whether a file has settings of a group, and nothing else."""
    try:
        settings = read_yaml(path)
    except UnreadableError:
        return False
    assert isinstance(settings, Mapping)
    return {str(key) for key in settings} <= {item.name for item in fields(sections()[group])}


def _made_by(group: str) -> str:
    """Return the way out where a file of a group is not there."""
    maker = {"model": "vp-import SRC DST", "cost": "vp-profile --cost FILE.yaml"}[group]
    choices = ", ".join(group_choices()[group])
    return f"; {maker} writes one, or choose one of {choices}"


def config_text(config: RunConfig) -> str:
    """Return the whole configuration as YAML."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
