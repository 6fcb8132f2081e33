"""Overrides -> RunConfig: hydra composes the choices of groups, here the other words follow."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

from vp_train.config import ConfigError, RunConfig
from vp_train.settings.checks import one_choice
from vp_train.settings.meant import choice_of_group
from vp_train.settings.messages import bad_override, broken_list, first_line, unknown_choice
from vp_train.settings.tree import group_choices, sections
from vp_train.settings.words import parsed_override, quoted_words


@dataclass(frozen=True, slots=True)
class Saved:
    """What a resumed run has saved, which takes the place of configs/.

    settings: top-level settings by name, and those of each section by its name.
    anew: names of groups that begin with their choice nevertheless.
    """

    settings: Mapping[str, object]
    anew: Set[str]


def composed_config(overrides: Sequence[str], saved: Saved | None = None) -> RunConfig:
    """Compose configs/, or what is saved, and `overrides`; raise ConfigError like `load_config`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    composed = _composed_once(overrides, saved) or _of_hydra(overrides, saved)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from None
    except ConfigError as error:
        for word in overrides:
            name, _, value = word.partition("=")
            meant = choice_of_group(word)
            if meant is not None and str(error).startswith(f"{name}={value!r} is not known"):
                raise ConfigError(f"{error}; did you mean {meant}?") from None
        raise
    assert isinstance(config, RunConfig)
    return config


def _of_hydra(overrides: Sequence[str], saved: Saved | None) -> Any:
    """Return what hydra composes; raise its errors as ConfigErrors."""
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf.errors import OmegaConfBaseException

    try:
        return _hydra_composed(overrides, saved)
    except OverrideParseException as error:
        word = str(error.override)
        way_out = broken_list(word) or quoted_words(word)
        way_out = way_out or "write key=value, e.g. run.steps=100"
        raise ConfigError(f"{error.override!r} is not an override; {way_out}") from None
    except MissingConfigException as error:
        raise ConfigError(unknown_choice(error)) from None
    except ConfigCompositionException as error:
        raise ConfigError(bad_override(error, overrides)) from None
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(first_line(error)) from None
    except Exception:  # whatever hydra's parser and merge stumble over, they never run our code
        known = group_choices()
        split = [(word, *word.partition("=")[::2]) for word in overrides]
        groups = [
            word
            for word, key, value in split
            if key in sections() and value not in known.get(key, ())
        ]
        if groups:
            words = one_choice(groups[0].partition("=")[0])
            raise ConfigError(f"{' '.join(groups)}: {words}") from None
        words = " ".join(overrides)
        raise ConfigError(f"{words} cannot be read; write key=value, e.g. run.steps=100") from None


def _composed_once(overrides: Sequence[str], saved: Saved | None = None) -> Any:
    """Compose as hydra does, but the groups only once in this process; None if something is wrong.

    Also None where groups begin anew on what is saved.  Hydra reads all files for every call, which
    takes most of its time.
    """
    from omegaconf import OmegaConf

    groups = group_choices()
    chosen: dict[str, str] = {}
    for word in overrides:
        group, _, choice = word.partition("=")
        if group in groups:
            if choice not in groups[group]:
                return None
            chosen[group] = word
    if saved is not None and saved.anew & groups.keys():
        return None
    try:
        if saved is None:
            composed = pickle.loads(_of_groups(tuple(sorted(chosen.values()))))
        else:
            composed = pickle.loads(_types())
            composed.merge_with(saved.settings)
        for word in overrides:
            if word.partition("=")[0] not in chosen:
                parsed = parsed_override(word)
                if parsed.is_sweep_override():
                    return None
                OmegaConf.update(composed, parsed.key_or_group, parsed.value())
    except Exception:  # hydra's own way will say what is wrong
        return None
    return composed


@cache
def _of_groups(chosen: tuple[str, ...]) -> bytes:
    """Return the settings of these choices of groups, each a word GROUP=CHOICE, pickled.

    Reading that takes a seventh of the time of a copy.
    """
    return pickle.dumps(_hydra_composed(chosen))


def _hydra_composed(overrides: Sequence[str], saved: Saved | None = None) -> Any:
    """Return what hydra composes.  Raises its errors."""
    from importlib.resources import files

    from hydra import compose, initialize_config_module
    from hydra.conf import HydraConf
    from omegaconf import OmegaConf

    store = _store()
    if saved is not None:
        defaults = OmegaConf.load(str(files("vp_train.configs").joinpath("config.yaml"))).defaults
        anew = [
            entry
            for entry in defaults
            if not isinstance(entry, str) and saved.anew & {str(group) for group in entry}
        ]
        store.store(name="saved", node=dict(saved.settings))
        store.store(name="resumed", node={"defaults": ["schema", "saved", *anew, "_self_"]})
    # Hydra would read eight files for its own settings, half of its time: they are for programs
    # that it starts.  Those of this process, if it is one, stay as they are.
    of_hydra = store.repo["hydra"]
    own = of_hydra["config.yaml"]
    store.store(name="config", group="hydra", node=HydraConf(defaults=[]))
    try:
        with initialize_config_module("vp_train.configs", version_base="1.3"):
            return compose("resumed" if saved else "config", overrides=list(overrides))
    finally:
        of_hydra["config.yaml"] = own


@cache
def _store() -> Any:
    """Return hydra's store with the types of all settings."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=pickle.loads(_types()))
    return store


@cache
def _types() -> bytes:
    """Return the types of all settings, pickled."""
    from omegaconf import OmegaConf

    types = OmegaConf.structured(RunConfig)
    _thaw(types)
    return pickle.dumps(types)


def _thaw(node: object) -> None:
    """Make `node` and all nodes in it writable.

    A frozen dataclass makes read-only nodes, into which nothing can be merged.
    """
    from omegaconf import DictConfig, OmegaConf

    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, False)
        for key in node:
            _thaw(node._get_node(key))
