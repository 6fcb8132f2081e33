"""Overrides -> RunConfig: composed here what can be, and by hydra all else."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from vp_train.config import ConfigError, RunConfig
from vp_train.settings.checks import one_choice
from vp_train.settings.choices import of_choices, schema
from vp_train.settings.meant import choice_of_group
from vp_train.settings.messages import bad_override, broken_list, first_line, unknown_choice
from vp_train.settings.tree import group_choices, sections
from vp_train.settings.words import parsed_override, quoted_words


def composed_config(primary: str, overrides: Sequence[str]) -> RunConfig:
    """Compose the configuration `primary` and `overrides`; raise ConfigError like `load_config`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    composed = _updated(overrides) if primary == "config" else None
    composed = composed or _of_hydra(primary, overrides)
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


def _of_hydra(primary: str, overrides: Sequence[str]) -> Any:
    """Return what hydra composes; raise its errors as ConfigErrors."""
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf.errors import OmegaConfBaseException

    try:
        return _hydra_composed(primary, overrides)
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


def _updated(overrides: Sequence[str]) -> Any:
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
        composed = pickle.loads(of_choices(tuple(sorted(chosen.items()))))
        for word in others:
            parsed = parsed_override(word)
            if parsed.is_sweep_override():
                return None
            OmegaConf.update(composed, parsed.key_or_group, parsed.value())
    except Exception:  # hydra's own way will say what is wrong
        return None
    return composed


def _hydra_composed(primary: str, overrides: Sequence[str]) -> Any:
    """Return what hydra composes.  Raises its errors."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=schema())
    with initialize_config_module("vp_train.configs", version_base="1.3"):
        return compose(primary, overrides=list(overrides))
