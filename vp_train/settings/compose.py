"""Overrides -> RunConfig: composed here what can be, and by hydra all else."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from vp_train.config import ConfigError, RunConfig
from vp_train.settings.checks import one_choice
from vp_train.settings.choices import default_choices, of_choices, on_saved, schema
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

    def choices(self, chosen: Mapping[str, str]) -> dict[str, str]:
        """Return the choices of the groups that begin anew, `chosen` or the default, in order."""
        return {
            group: chosen.get(group, default)
            for group, default in default_choices().items()
            if group in self.anew
        }


def composed_config(overrides: Sequence[str], saved: Saved | None = None) -> RunConfig:
    """Compose configs/, or what is saved, and `overrides`; raise ConfigError like `load_config`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    composed = _composed_here(overrides, saved) or _of_hydra(overrides, saved)
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


def _composed_here(overrides: Sequence[str], saved: Saved | None = None) -> Any:
    """Compose as hydra does, but each choice of a group once; None for what is left to hydra.

    Hydra reads all files for every call, and settings of its own, which takes most of its time.
    """
    from omegaconf import OmegaConf

    groups = group_choices()
    chosen: dict[str, str] = {}
    others = []
    for word in overrides:
        group, _, choice = word.partition("=")
        if group not in groups:
            others.append(word)
        elif choice in groups[group]:
            chosen[group] = choice
        else:
            return None
    try:
        if saved is None:
            composed = pickle.loads(of_choices(tuple(sorted(chosen.items()))))
        else:
            composed = on_saved(saved.settings, saved.choices(chosen))
        for word in others:
            parsed = parsed_override(word)
            if parsed.is_sweep_override():
                return None
            OmegaConf.update(composed, parsed.key_or_group, parsed.value())
    except Exception:  # hydra's own way will say what is wrong
        return None
    return composed


def _hydra_composed(overrides: Sequence[str], saved: Saved | None = None) -> Any:
    """Return what hydra composes.  Raises its errors."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=schema())
    if saved is not None:
        anew = [{group: choice} for group, choice in saved.choices({}).items()]
        store.store(name="saved", node=dict(saved.settings))
        store.store(name="resumed", node={"defaults": ["schema", "saved", *anew, "_self_"]})
    with initialize_config_module("vp_train.configs", version_base="1.3"):
        return compose("resumed" if saved else "config", overrides=list(overrides))
