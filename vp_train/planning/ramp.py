"""The batch-size ramp: how many microbatches every step has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vp_train.config import ConfigError
from vp_train.units import count_words


@dataclass(frozen=True, slots=True)
class BatchRamp:
    """The microbatches of one replica in every step.

    `stages` are pairs of a step and a number of microbatches: every step until that one has so
    many, if no earlier pair says otherwise.  Steps after the last pair have `full`.
    """

    stages: tuple[tuple[int, int], ...]
    full: int

    @classmethod
    def of(
        cls,
        pairs: Sequence[Sequence[int]],
        num_microbatches: int,
        micro_batch_size: int,
        num_replicas: int,
    ) -> BatchRamp:
        """Return the ramp of `batch_ramp`, whose pairs have the sequences of all replicas.

        Raises ConfigError for sequences that do not split into microbatches of all replicas.
        """
        unit = micro_batch_size * num_replicas
        for _, sequences in pairs:
            if sequences % unit:
                raise ConfigError(
                    f"batch_ramp: {count_words(sequences, 'sequence')} cannot be split into "
                    f"microbatches of micro_batch_size={micro_batch_size} on "
                    f"{count_words(num_replicas, 'replica')}; use a multiple of {unit}"
                )
        stages = tuple((step, sequences // unit) for step, sequences in pairs)
        return cls(stages, num_microbatches)

    def at(self, step: int) -> int:
        """Return the microbatches of `step`, which counts from 1."""
        return next((count for last, count in self.stages if step <= last), self.full)

    def until(self, step: int) -> int:
        """Return the microbatches of all steps up to `step`."""
        total = done = 0
        for last, count in self.stages:
            steps = max(0, min(step, last) - done)
            total, done = total + steps * count, done + steps
        return total + (step - done) * self.full

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of microbatches of steps, each once."""
        return tuple(dict.fromkeys([count for _, count in self.stages] + [self.full]))
