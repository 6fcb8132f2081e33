"""The settings that a run has saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vp_train.config import ConfigError, printable
from vp_train.config.cost import CPU_COSTS
from vp_train.durable import UnreadableError
from vp_train.settings.files import leaves, read_yaml
from vp_train.settings.words import setting_words

# A resumed run does not take these over: they follow from where it is found, and a change that is
# allowed once is not allowed for ever.
NOT_SAVED = ("run.name", "run.root", "run.resume", "run.allow", "run.init_from")
REPAIR = "repair it, or delete it and give all settings of the run again"


def saved_words(path: Path) -> dict[str, str]:
    """Return every setting in the config.yaml of a run, as it is written on a command line.

    Raises ConfigError where the file is broken.
    """
    return {printable(name): setting_words(value) for name, value in saved_settings(path).items()}


def saved_settings(path: Path) -> dict[str, object]:
    """Return every setting in the config.yaml of a run by its name.

    Raises ConfigError where the file is broken.
    """
    from omegaconf import OmegaConf

    try:
        saved = read_yaml(path)
    except UnreadableError as error:
        raise ConfigError(f"{error}; {REPAIR}") from None
    values = {
        name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for name, value in leaves(saved)
    }
    # Runs of earlier versions have saved all of them although nobody had chosen them.
    once = {f"cost.{name}": value for name, value in CPU_COSTS.items()}
    costs = {name: values[name] for name in once if name in values}  # some versions had fewer
    if None not in costs.values():
        values |= {name: None for name, value in costs.items() if value == once[name]}
    return values


def sample_length(saved: Mapping[str, object]) -> int | None:
    """Return the length of a run's samples; None if its settings have none that can be used."""
    length = saved.get("data.sample_length") or saved.get("model.seq_length")
    return length if type(length) is int else None


def split_seed(saved: Mapping[str, object]) -> object:
    """Return the seed of what a run holds out, as `DataConfig.validation_seed`."""
    seed = saved.get("data.split_seed")
    return saved.get("data.seed") if seed is None else seed


def is_searched(saved: Mapping[str, object], path: Path) -> bool:
    """Return whether the schedule.file in the settings at `path` is what the search has found."""
    file = Path(str(saved.get("schedule.file")))
    is_own = file.parts[-2:] == (path.parent.name, "schedule.txt")
    return saved.get("schedule.name") == "auto" and is_own


def run_of(source: Path) -> Path:
    """Return the directory of a run from that, or from one of its checkpoints."""
    place = source.resolve()
    return next(
        (path.parent for path in (place, place.parent) if path.name == "checkpoints"), place
    )


def started_from(source: Path) -> Path | None:
    """Return run.init_from of the run in directory `source`, or of the run of that checkpoint.

    It is None if the run started from nothing, or if its config.yaml cannot be read.
    """
    try:
        origin = saved_settings(run_of(source) / "config.yaml").get("run.init_from")
    except ConfigError:
        return None
    return Path(os.path.expanduser(origin)) if isinstance(origin, str) else None
