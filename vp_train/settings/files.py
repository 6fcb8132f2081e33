"""YAML files with settings, which somebody else may have written."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path

from vp_train.config import ConfigError, RunConfig
from vp_train.config.typed import quoted_value, shell_word
from vp_train.durable import UnreadableError, read_text, similar_names
from vp_train.settings.checks import DEEPEST, check_size
from vp_train.settings.messages import first_line
from vp_train.settings.tree import SETS_TOO, YAML_ENDINGS, group_choices, sections

_MOST_NODES = 4_096  # values in a file
_LARGEST_FILE = 1 << 18  # bytes
_WHOLE = "give a file as --print-config prints it, or any part of that"


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
        raise UnreadableError(f"{path} is not YAML ({_problem(error, text)})") from None
    if not isinstance(settings, DictConfig) or not settings:
        raise UnreadableError(f"{path} holds no settings, one `key: value` per line")
    return settings


@lru_cache(maxsize=16)
def _parsed(text: str) -> bytes:
    """Return a YAML text as an omegaconf node, pickled; a run that goes on reads its file often."""
    from omegaconf import OmegaConf

    return pickle.dumps(OmegaConf.create(text))


def _problem(error: Exception, text: str) -> str:
    """Return what a YAML parser found wrong in a text, with its line."""
    mark = getattr(error, "problem_mark", None)  # counts lines from 0
    if mark is None:
        return first_line(error)
    words = getattr(error, "problem", None) or first_line(error)
    if words.startswith("but "):
        words = f"{getattr(error, 'context', '')} {words}"
    lines = text.splitlines()
    if mark.line < len(lines) and re.match(" *\t", lines[mark.line]):
        words = "a tab begins it; indent with blanks"
    return f"line {mark.line + 1}: {words}"


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
        elif (
            isinstance(event, yaml.NodeEvent)
            and not nodes
            and not isinstance(event, yaml.MappingStartEvent)
        ):
            reason = "begins no setting; write one `key: value` per line"
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


def expanded(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with the settings in files in place of the words that name the files.

    Those of settings=FILE come first, as if they were typed before all other words; a group that is
    chosen later drops what they set of it.  Raises ConfigError if a file cannot be read.
    """
    words: list[str] = []
    for layer in _layers(overrides):
        groups = _groups(layer)
        anew = groups.union(*(SETS_TOO.get(group, ()) for group in groups))
        words = [word for word in words if not anew & {*_names(word)}]
        of_files = {word: _words_of_group(word) for word in layer}
        words += [one for word in layer for one in of_files[word] or ()]
        words += [word for word in layer if of_files[word] is None]
    return words


def chosen_groups(overrides: Sequence[str]) -> set[str]:
    """Return the groups that begin with a choice or a file: of `overrides`, and of their files."""
    return set().union(*map(_groups, _layers(overrides)))


def _layers(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every file of settings, and at last all other words."""
    files = [word for word in overrides if word.startswith("settings=")]
    return [*map(_words_of_settings, files), [word for word in overrides if word not in files]]


def _groups(words: Sequence[str]) -> set[str]:
    """Return the groups that these overrides give a choice or a file."""
    return {_names(word)[0] for word in words} & {*sections()}


def _words_of_settings(word: str) -> list[str]:
    """Return the settings in the file of `settings=FILE` as overrides, one for each.

    `model: NAME` in it is the choice model=NAME of a group, or the file of one.  Raises
    ConfigError if the file cannot be read.
    """
    file = word.partition("=")[2]
    path = Path(os.path.expanduser(file))
    if not file:
        raise ConfigError(f"{word} names no file; {_WHOLE}")
    try:
        settings = read_yaml(path)
    except UnreadableError as error:
        if not path.exists():
            raise ConfigError(f"settings={error}{_instead_of_file('settings', path)}") from None
        raise ConfigError(f"settings={error}; {_WHOLE}") from None
    groups = group_choices()
    assert isinstance(settings, Mapping)
    if "defaults" in settings:
        raise ConfigError(
            f"{word}: it has `defaults`; write the choices of groups as `model: nano`, and all "
            "else as values"
        )
    words = [
        f"{key}={value}" if key in groups and isinstance(value, str) else _word_of(key, value)
        for key, value in leaves(settings)
    ]
    try:
        check_size(words)
        for one in words:
            _words_of_group(one, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{word}: {error}") from None
    return words


def _words_of_group(word: str, beside: Path | None = None) -> list[str] | None:
    """Return `model=FILE.yaml`, or the file of another group, as overrides, one per setting.

    vp-import writes such files of models, vp-profile of costs.  The settings of the group stand
    there alone, or as in configs/cluster in sections.  Returns None for any other word.  Raises
    ConfigError if the file cannot be read, with a hint if it lies in the directory `beside`.
    """
    group, _, value = word.partition("=")
    path = Path(os.path.expanduser(value))
    if path.suffix not in YAML_ENDINGS or group not in group_choices():
        return None
    try:
        settings = read_yaml(path)
    except UnreadableError as error:
        if beside is not None and not path.exists() and (beside / path).is_file():
            way_out = f"; paths count from where the command runs: write {group}: {beside / path}"
        elif path.exists():
            way_out = "" if path.is_file() else _made_by(group)
        else:
            way_out = _instead_of_file(group, path)
        raise ConfigError(f"{group}={error}{way_out}") from None
    assert isinstance(settings, Mapping)
    has_sections = any(isinstance(one, Mapping) for one in settings.values())
    found = dict(leaves(settings, "" if has_sections else f"{group}."))
    others = [name for name in found if not {group, *SETS_TOO.get(group, ())} & {*_names(name)}]
    if {"defaults", f"{group}.defaults"} & found.keys():
        raise ConfigError(f"{word}: it has `defaults`; write the values themselves")
    if others:
        raise ConfigError(
            f"{word}: {others[0]} is no setting of {group}; {shell_word('settings', value)} "
            "takes those of all groups"
        )
    return [_word_of(name, setting) for name, setting in found.items()]


def _names(word: str) -> tuple[str, str]:
    """Return the name of the setting in a word, and that of its section."""
    name = word.partition("=")[0]
    return name, name.partition(".")[0]


def _word_of(name: str, value: object) -> str:
    """Return the override for a setting in a file."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if isinstance(plain, str):
        plain = os.path.expanduser(plain)
    return f"{name}={quoted_value(plain)}"


def has_settings(path: Path, group: str) -> bool:
    """Return whether a file has settings of a group, and nothing else."""
    try:
        settings = read_yaml(path)
    except UnreadableError:
        return False
    assert isinstance(settings, Mapping)
    return {str(key) for key in settings} <= {item.name for item in fields(sections()[group])}


def _instead_of_file(name: str, path: Path) -> str:
    """Return the way out for a file that is not there, one of `name=FILE`."""
    parts = str(path).split(",")
    if len(parts) > 1 and name == "settings":
        words = " ".join(shell_word(name, part.strip("[] ")) for part in parts)
        return f"; several files are several words: {words}"
    places = {place.stem: place for place in path.parent.glob("*.y*ml")}
    if close := similar_names(path.stem, places):
        return f"; did you mean {shell_word(name, str(places[close[0]]))}?"
    return f"; {_WHOLE}" if name == "settings" else _made_by(name)


def _made_by(group: str) -> str:
    """Return the way out where a file of a group is not there."""
    makers = {"model": "vp-import SRC DST", "cost": "vp-profile --cost FILE.yaml"}
    made = f"{makers[group]} writes one, or " if group in makers else ""
    return f"; {made}choose one of {', '.join(group_choices()[group])}"


def config_text(config: RunConfig) -> str:
    """Return the whole configuration as YAML."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
