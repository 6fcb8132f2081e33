"""What a resumed run has otherwise than before, and whether it may."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vp_train.config import ConfigError, RunConfig, RunSettings, printable
from vp_train.config.canonical import model_changes
from vp_train.config.resume import (
    TEXT,
    keeps_on_resume,
    keeps_with_weights,
    means_another_model,
    permission_of,
)
from vp_train.config.typed import shell_word
from vp_train.durable import UnreadableError, checkpoints_in, homes, runs_beside, similar_run
from vp_train.settings.files import leaves, read_yaml
from vp_train.settings.saved import (
    NOT_SAVED,
    is_searched,
    sample_length,
    saved_settings,
    split_seed,
)
from vp_train.settings.tree import values_of
from vp_train.settings.words import value_words
from vp_train.units import plural

_BATCH = "sequences of a step"
# The sequences of a step, which several settings and the number of ranks decide: as the run had
# them, and as it would have them now.  None if not known.
BatchChange = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that a resumed run had with another value, and whether it may change.

    permission: the word of run.allow with which it may, None if there is none.
    decides_text: whether the text may be another one with it, which only its tokens tell.
    """

    name: str
    before: str
    now: str
    is_refused: bool
    permission: str | None
    decides_text: bool = False

    @property
    def verdict(self) -> str:
        """Return whether the change is allowed, in words."""
        if self.decides_text and not self.is_refused:
            return "refused unless the tokens stay the same"
        if self.permission is None:
            return "refused" if self.is_refused else "allowed"
        words = "refused without" if self.is_refused else "allowed by"
        return f"{words} run.allow=[{self.permission}]"


def changes(config: RunConfig, batch: BatchChange = None) -> list[Change]:
    """Return what a resumed run would have otherwise than its config.yaml, in the order of names.

    A setting of another version is not compared.  Raises ConfigError where the file is broken.
    """
    path, now = config.run.directory / "config.yaml", values_of(config)
    before, found = saved_settings(path), []
    is_done = bool(checkpoints_in(config.run.checkpoints))  # else it begins anew

    def change(name: str, was: object, value: object) -> Change:
        words, new_words = (printable(value_words(one)) for one in (was, value))
        if not is_done:
            return Change(name, words, new_words, False, None)
        is_refused = keeps_on_resume(name, config)
        is_refused |= name == "data.name" and "synthetic" in (was, value)
        permission = permission_of(name, config)
        return Change(name, words, new_words, is_refused, permission, name in TEXT)

    for name in (name for name in now if name in before):
        was, value = before[name], now[name]
        if name == "data.sample_length":
            was, value = sample_length(before), config.sample_length
        if name == "data.split_seed" and was != value:
            was, value = split_seed(before), config.data.validation_seed
        is_found = name == "vocab.algorithm" and value == "auto"  # by the search of a schedule
        is_found |= name == "schedule.file" and value is None and is_searched(before, path)
        if name in NOT_SAVED or value_words(was) == value_words(value) or is_found:
            continue
        found.append(change(name, was, value))
    if batch is not None and batch[0] != batch[1]:
        found.append(replace(change("batch", *batch), name=_BATCH))
    return found


def check_start(config: RunConfig, batch: BatchChange = None) -> None:
    """Raise ConfigError if a run cannot go on, or start, with these settings from what is there.

    The settings that were saved decide.  They are compared here, before data is prepared.  The
    checkpoint is compared again when it is loaded.
    """
    run, directory = config.run, config.run.directory
    if run.resume and checkpoints_in(run.checkpoints) and (directory / "config.yaml").is_file():
        _refuse([change for change in changes(config, batch) if change.is_refused], directory)
        origin = saved_settings(directory / "config.yaml").get("run.init_from")
        if run.init_from is not None and not _is_same_place(run.init_from, origin):
            words = "from new weights" if origin is None else f"from {origin}"
            raise ConfigError(
                f"run.init_from={run.init_from}, but {directory} started {words}, and goes on "
                "from its own checkpoint; drop run.init_from, or choose another run.name"
            )
    elif run.init_from is not None:
        for name, was, now in _changes_of_weights(config):
            if keeps_with_weights(name, config):
                raise ConfigError(
                    f"run.init_from={run.init_from} is with {name}={was}, this command line has "
                    f"{now}; use the same value"
                )


def weight_words(config: RunConfig) -> list[str]:
    """Return a line for each setting by which the weights of run.init_from compute otherwise.

    A run may change these on purpose, as for longer sequences.  A resumed run has begun already.
    """
    run = config.run
    if run.init_from is None or (run.resume and checkpoints_in(run.checkpoints)):
        return []
    return [
        f"{name}: the weights have {was}, this run {now}"
        for name, was, now in _changes_of_weights(config)
        if means_another_model(name)
    ]


def _changes_of_weights(config: RunConfig) -> list[tuple[str, str, str]]:
    """Return the model settings that are not those of the weights of run.init_from.

    Each is a name, the value of the weights and that of `config`.
    """
    assert config.run.init_from is not None
    before = _model_of(Path(os.path.expanduser(config.run.init_from)).absolute())
    return [
        (
            f"model.{name}",
            printable(value_words(before[name])),
            value_words(getattr(config.model, name)),
        )
        for name in model_changes(before, config.model)
    ]


def _refuse(refused: Sequence[Change], directory: Path) -> None:
    """Raise ConfigError that names all changes that a run does not allow, if there are any."""
    if not refused:
        return
    before = ", ".join(f"{change.name}={change.before}" for change in refused)
    words = f"the same {plural(len(refused), 'value')}"
    permissions = list(dict.fromkeys(change.permission for change in refused))
    if None not in permissions:
        words += f", or give run.allow=[{','.join(filter(None, permissions))}]"
    if any(change.name == _BATCH for change in refused):
        words += f"; {_BATCH} are num_microbatches x micro_batch_size x parallel.dp"
    if any(change.name == "model.seq_length" and change.permission is None for change in refused):
        words += "; model.positions=learned has weights for each position, so it cannot change"
    raise ConfigError(
        f"{directory} has run with {before}, this command line has "
        f"{', '.join(change.now for change in refused)}; use {words}"
    )


def _is_same_place(ours: str, theirs: object) -> bool:
    """Return whether two origins are the same directory, or the other one is gone and has moved."""
    if not isinstance(theirs, str):
        return False
    place = Path(os.path.expanduser(theirs))
    return not place.exists() or place.resolve() == Path(os.path.expanduser(ours)).resolve()


def _model_of(place: Path) -> Mapping[str, object]:
    """Return the model settings that lie beside the weights in a run, an import or a checkpoint.

    They are empty if there are none that can be read.
    """
    for directory in homes(place):
        with contextlib.suppress(ConfigError, UnreadableError):
            if (directory / "config.yaml").is_file():
                saved = saved_settings(directory / "config.yaml").items()
                own = (item for item in saved if item[0].startswith("model."))
                return {name.removeprefix("model."): value for name, value in own}
            if (directory / "model.yaml").is_file():
                return dict(leaves(read_yaml(directory / "model.yaml")))
    return {}


def refuse_misspelt(settings: RunSettings, overrides: Sequence[str]) -> None:
    """Raise ConfigError if a run to be resumed is not there, and its name seems misspelt.

    It seems so if a run has a similar name and nothing but settings of `run` was typed: no model
    and no data, which a new run would have.
    """
    directory = settings.directory
    says_more = any(word.lstrip("+~").partition(".")[0] != "run" for word in overrides)
    if not settings.resume or directory.exists() or says_more:
        return
    if (close := similar_run(directory)) is not None:
        meant = shell_word("run.name", close.name)
        raise ConfigError(
            f"{directory} holds no run; did you mean {meant}? run.resume=false starts a new one"
        )


def resume_words(
    config: RunConfig, batch: BatchChange = None, done: int | None = None
) -> str | None:
    """Say where the settings of a resumed run come from and what this command line changes.

    `done` is the step of the newest checkpoint, None if there is none.  All changes are rows of a
    table: setting, before, now, and whether it is allowed.  If there is no run or no checkpoint to
    go on from, say that it begins.  Return None without run.resume.
    """
    path = config.run.directory / "config.yaml"
    if not config.run.resume:
        return None
    if not path.is_file() and checkpoints_in(config.run.checkpoints):
        return (
            f"{path} is not a file, but there are checkpoints: "
            "only settings of this command line count, so give all that the run had"
        )
    if not path.is_file():
        close = similar_run(config.run.directory)
        hint = "" if close is None else f" (did you mean {shell_word('run.name', close.name)}?)"
        if close is None and (names := runs_beside(config.run.directory, 3)):
            hint = f" (the newest runs there: {', '.join(names)})"
        return (
            f"{config.run.directory} holds no run{hint}: NOTHING IS RESUMED, "
            "a new one begins at step 1 with the settings of this command line"
        )
    begins = ""
    if not checkpoints_in(config.run.checkpoints):
        begins = f" ({config.run.checkpoints} holds no checkpoint: training begins at step 1)"
    rows = []
    for one in changes(config, batch):
        verdict = one.verdict
        if one.name == "run.steps" and done is not None and config.run.steps < done:
            verdict = f"refused, step {done} is done"
        elif config.run.steps == done and verdict == "allowed":
            verdict = f"unused, step {done} is done"
        rows.append((one.name, one.before, one.now, verdict))
    if not rows:
        return f"settings of {path}{begins}"
    rows.insert(0, ("setting", "was", "now", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
    return "\n  ".join([f"settings of {path}{begins}, changed here:", *lines])
