"""A command line -> RunConfig, also on top of what a resumed run has saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vp_train.config import ConfigError, RunConfig
from vp_train.durable import checkpoints_in
from vp_train.settings.checks import check_size, check_word, refuse_two_choices, refuse_unused
from vp_train.settings.compose import Saved, composed_config
from vp_train.settings.files import chosen_groups, expanded
from vp_train.settings.saved import NOT_SAVED, REPAIR, is_searched, sample_length, saved_settings
from vp_train.settings.tree import sections, setting_names, values_of
from vp_train.settings.unknown import refuse_unknown, refuse_unknown_settings
from vp_train.settings.words import as_written, at_home, setting_words


def load_config(overrides: Sequence[str], known_options: Sequence[str] = ()) -> RunConfig:
    """Compose configs/ and `overrides`.

    With run.resume=true the settings that the run has saved take the place of configs/.

    Raises ConfigError with the offending override and the way out.
    """
    check_size(overrides)
    refuse_unknown(overrides, known_options)
    refuse_two_choices(overrides)
    typed, chosen = overrides, chosen_groups(overrides)
    overrides = expanded(overrides)
    try:
        overrides = [as_written(at_home(word)) for word in overrides]
        for word in overrides:
            check_word(word)
        refuse_unknown_settings(overrides)
        if (saved := _saved_by_run(overrides)) is not None:
            return _resumed(saved, overrides, chosen)
        config = composed_config(overrides)
        refuse_unused(config.data, overrides)
        if config.vocab.balance and config.vocab.algorithm == "none":
            raise ConfigError(
                "vocab.balance=true needs a sharded vocabulary, but vocab=none; drop one of the two"
            )
        return config
    except ConfigError as error:
        for word in typed:
            if (settings := expanded([word])) != [word] and _fails_alike(settings, error):
                raise ConfigError(f"{word}: {error}") from None
        raise


def _fails_alike(overrides: Sequence[str], error: ConfigError) -> bool:
    """Return whether these overrides alone raise the same error."""
    try:
        for word in overrides:
            check_word(word)
        refuse_unknown_settings(overrides)
        composed_config(overrides)
    except ConfigError as other:
        return str(other) == str(error)
    return False


def default_words() -> dict[str, str]:
    """Return every setting without any override, as it is written on a command line."""
    return {name: setting_words(value) for name, value in values_of(load_config([])).items()}


def _saved_by_run(overrides: Sequence[str]) -> Path | None:
    """Return the settings that the run to be resumed has saved; None if there is no such run.

    Only what says where it lies is looked at: the other overrides may fit nothing but its settings.
    """
    if not any(word.startswith("run.resume=") for word in overrides):
        return None
    names = ("run", "run.name", "run.root", "run.resume")
    where = [word for word in overrides if word.partition("=")[0] in names]
    run = composed_config(where).run
    saved = run.directory / "config.yaml"
    return saved if run.resume and saved.is_file() else None


def _resumed(path: Path, overrides: Sequence[str], chosen: set[str]) -> RunConfig:
    """Return the settings that a run has saved in `path`, with `overrides` on top of them.

    A group among the `chosen` names begins anew with that choice.  Raises ConfigError where the
    file is broken.
    """
    saved = saved_settings(path)
    for section_name in sections():
        if not any(name.partition(".")[0] == section_name for name in saved):
            raise ConfigError(f"{path} has no section {section_name}; {REPAIR}")
    groups: dict[str, dict[str, object]] = {}
    values: dict[str, object] = {}
    for name in (*sections(), *setting_names()):
        section, _, key = name.partition(".")
        if name in saved and name not in NOT_SAVED and section not in chosen:
            (groups.setdefault(section, {}) if key else values)[key or section] = saved[name]
    if is_searched(saved, path):
        groups.get("schedule", {}).pop("file", None)  # other settings may lead to another one
    base = Saved({**values, **groups}, chosen)
    try:
        config = composed_config(overrides, base)
    except ConfigError:
        try:  # do the saved settings fit without the overrides?
            composed_config([], base)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; {REPAIR}") from None
        raise
    if any(word.startswith("data.sample_length=") for word in overrides):
        return config
    length = sample_length(saved)
    if length in (None, config.sample_length) or not checkpoints_in(config.run.checkpoints):
        return config
    return replace(config, data=replace(config.data, sample_length=length))
