"""What a search leaves as it is typed: `vp-plan --search --keep`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from schedules.generators import GENERATORS
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.config import ConfigError, OptimConfig, RunConfig
from vp_train.config.errors import unknown
from vp_train.planning.choice import SHOWN_ALWAYS, SHOWN_WHERE_OTHER, Choice, value_of, word_of

KEPT_WHERE_TYPED = "vocab.balance"  # by a search, also without --keep
# What a search may keep, and the value of a choice.
_KEPT: Mapping[str, Callable[[Choice], Any]] = {
    "parallel.dp": lambda choice: choice.degrees.dp,
    "parallel.pp": lambda choice: choice.degrees.pp,
    "parallel.tp": lambda choice: choice.degrees.tp,
    "micro_batch_size": lambda choice: choice.micro_batch_size,
    "schedule.name": lambda choice: choice.schedule,
    "schedule.num_chunks": lambda choice: choice.num_chunks,
    "vocab.algorithm": lambda choice: choice.vocab,
    "parallel.placement": lambda choice: choice.placement,
    "parallel.recompute": lambda choice: choice.recompute,
    "parallel.sequence_parallel": lambda choice: choice.sequence_parallel,
    "parallel.offload_activations": lambda choice: choice.offload,
    "vocab.balance": lambda choice: choice.balance,
}
_KEPT_OF_OPTIMIZERS = ("optim.name", "optim.offload")
_GROUPS = {  # whose values a choice sets: what of them may be kept
    "schedule": ("schedule.name",),
    "vocab": ("vocab.algorithm",),
    "optim": _KEPT_OF_OPTIMIZERS,
    "parallel": ("parallel.placement",),
}


def searched_words(overrides: Sequence[str]) -> list[str]:
    """Return those of the typed overrides that a search replaces by its own choice.

    The number of microbatches is not among them, since the batch follows from it.
    """
    names = {*SHOWN_ALWAYS, *SHOWN_WHERE_OTHER, *_GROUPS} - {"num_microbatches"}
    return [word for word in overrides if word.lstrip("+~").partition("=")[0] in names]


def settings_of(word: str) -> tuple[str, ...]:
    """Return the setting that an override sets, or of a group those that a choice sets."""
    name = word.lstrip("+~").partition("=")[0]
    return _GROUPS.get(name, (name,))


@dataclass(frozen=True, slots=True)
class Kept:
    """The settings that a search leaves as they are, with their values; see `--keep`."""

    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, names: Iterable[str]) -> Kept:
        """Return the settings called `names` with their values in `config`.

        A group stands for what a choice sets of it; `parallel` is refused, since its degrees are
        settings of their own.  Raises ConfigError for a setting that is not searched or that no
        search can keep, or that has no value to keep.
        """
        values: dict[str, Any] = {}
        known = ("schedule", "vocab", "optim", *_KEPT, *_KEPT_OF_OPTIMIZERS)
        for given in names:
            if given == "parallel":
                raise ConfigError("--keep parallel: name its settings, as in --keep parallel.tp")
            for name in _GROUPS.get(given, (given,)):
                if name in known:
                    pass
                elif name in (*SHOWN_ALWAYS, *SHOWN_WHERE_OTHER):
                    raise ConfigError(
                        f"--keep {name}: a search sets it and cannot keep it; keep only some of "
                        f"{', '.join(known)}"
                    )
                else:
                    raise ConfigError(f"{unknown(f'--keep {given}', given, known)}, or typed")
                values[name] = value_of(config, name)
                if values[name] is None:
                    raise ConfigError(f"--keep {name}: it is not set; add {name}=8, for example")
        name = values.get("schedule.name", "1f1b")
        if name not in GENERATORS or ("schedule.name" in values and config.schedule.file):
            raise ConfigError(
                f"--keep schedule.name: a search keeps one of {', '.join(GENERATORS)}, not "
                f"{config.schedule.file or name}"
            )
        if values.get("vocab.algorithm", "none") not in VOCAB_ALGORITHMS:
            raise ConfigError("--keep vocab.algorithm: vocab=auto is any; drop one of the two")
        return cls(values)

    def has_word(self, word: str) -> bool:
        """Return whether this override sets what is kept."""
        return any(name in self.values for name in settings_of(word))

    def with_value(self, name: str, searched: Iterable[Any]) -> tuple[Any, ...]:
        """Return what is searched of a setting, with the value that is kept."""
        kept = (self.values[name],) if name in self.values else ()
        return tuple(dict.fromkeys((*searched, *kept)))

    def against(self, choice: Choice) -> str | None:
        """Return the first kept setting that a choice does not have, in words."""
        for name, value in self.values.items():
            if name in _KEPT and not self._has(choice, name, value):
                return f"--keep {name}={word_of(value)}"
        return None

    @staticmethod
    def _has(choice: Choice, name: str, value: Any) -> bool:
        found = _KEPT[name](choice)
        match name:
            case "schedule.num_chunks":  # not of schedules that leave no choice
                return found in (None, value)
            case "parallel.placement":  # even and balanced are the same where both are possible
                return bool((found == "redistribute") == (value == "redistribute"))
            case "parallel.recompute":
                return bool(found == value) and not choice.recompute_where_needed
            case "parallel.sequence_parallel":  # one rank has nothing to split over
                return found == value or choice.degrees.tp == 1
        return bool(found == value)

    def optimizers(self, config: RunConfig) -> tuple[OptimConfig, ...] | None:
        """Return the optimizers that are left to choose from, None for all."""
        if not set(_KEPT_OF_OPTIMIZERS) & set(self.values):
            return None
        typed = config.optim
        names = self.values.get("optim.name"), self.values.get("optim.offload")
        found = [
            replace(typed, name=name, offload=offload)
            for name, offload in (("zero1", False), ("adamw", False), ("zero1", True))
            if names[0] in (None, name) and names[1] in (None, offload)
        ]
        return tuple(found) or (typed,)

    @property
    def words(self) -> str:
        """The settings with their values, as typed."""
        return ", ".join(f"{name}={word_of(value)}" for name, value in self.values.items())


ALL = Kept()  # nothing is kept, everything is searched
