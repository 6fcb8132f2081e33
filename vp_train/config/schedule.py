"""The sections `schedule` and `vocab`."""

from __future__ import annotations

from dataclasses import dataclass

from vp_train.config.bounds import MOST_LAYERS
from vp_train.config.errors import ConfigError
from vp_train.config.setting import check_section, setting


@dataclass(frozen=True)
class ScheduleConfig:
    """The base schedule, into which the vocabulary passes are woven.

    The cap limits the activations and held shards of a rank.  Without one, `auto` stays within
    about what 1F1B keeps on its fullest rank: p + 1 microbatches (p + 2 with two_barrier) and two
    held shards.  If no schedule is found under that, the cap is what the best schedule found keeps.
    """

    name: str = setting(
        "1f1b", "A schedule of schedules.generators, or auto: the fastest found under a cap."
    )
    num_chunks: int | None = setting(
        None,
        "Stages per rank, if the schedule leaves a choice.",
        least=1,
        most=MOST_LAYERS,
    )
    cap_microbatches: float | None = setting(
        None, "auto: cap on memory, in microbatches of 1/p of the model's activations.", above=0
    )
    cap_gib: float | None = setting(None, "auto: cap on memory.", unit="GiB", above=0)
    file: str | None = setting(
        None,
        "A file with a schedule: ours, or a CSV of torch.distributed.pipelining; "
        "it replaces all of the above.",
    )

    def __post_init__(self) -> None:
        check_section("schedule.", self)
        for name in ("cap_microbatches", "cap_gib"):
            value = getattr(self, name)
            if value is not None and self.name != "auto":
                raise ConfigError(
                    f"schedule.{name}={value} counts only with schedule=auto, not {self.name}; "
                    "drop one of the two"
                )
        if self.cap_gib is not None and self.cap_microbatches is not None:
            raise ConfigError(
                f"schedule.cap_gib={self.cap_gib} and "
                f"schedule.cap_microbatches={self.cap_microbatches}: set one of the two"
            )

    @property
    def is_solved(self) -> bool:
        """Return whether the schedule is still to be searched for."""
        return self.name == "auto" and self.file is None


@dataclass(frozen=True)
class VocabConfig:
    """The split of the input and output layers, and the code that computes S and T."""

    algorithm: str = setting(
        "one_barrier", "A vocabulary algorithm of schedules.vocab, or auto with schedule=auto."
    )
    backend: str = setting(
        "chunked",
        "chunked holds exponentials from S to T; recompute computes them again in T; "
        "reference is the slow oracle of the tests.",
        choices=("chunked", "recompute", "reference"),
    )
    shards: tuple[int, ...] | None = setting(
        None, "Vocabulary rows of each rank; null: as equal as possible."
    )
    balance: bool = setting(False, "Give more rows to ranks with less other work.")
    recompute_fraction: float = setting(
        1.0,
        "recompute: part of the rows whose logits T computes again, by a fourth matrix product.",
        least=0,
        most=1,
    )
    sum_dtype: str = setting(
        "float32",
        "Dtype in which the shards' terms of dL/dx are summed; "
        "compute: run.dtype, which moves half the bytes.",
        choices=("float32", "compute"),
    )

    def __post_init__(self) -> None:
        check_section("vocab.", self)
        if self.recompute_fraction != 1 and self.backend != "recompute":
            raise ConfigError(
                f"vocab.recompute_fraction={self.recompute_fraction} counts only with "
                f"vocab.backend=recompute, not {self.backend}; drop one of the two"
            )
        if self.balance and self.shards is not None:
            raise ConfigError(
                f"vocab.balance=true and vocab.shards={list(self.shards)}: set one of the two"
            )
