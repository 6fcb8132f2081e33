"""The figures of a step that come from all ranks: seconds by part, waiting, memory, MFU.

A rank says its own in the message with loss and norm.  docs/monitoring.md has all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vp_train.config.figures import name_of
from vp_train.pipeline.stopwatch import Part

_COMPUTING = (Part.FORWARD_BACKWARD, Part.VOCABULARY)
_KEYS = {part: f"seconds/{part}" for part in Part} | {Part.WAITING: "seconds/waiting_mean"}
_BESIDE = (Part.CHECKPOINT, Part.VALIDATION)  # between two steps, and no part of a step's speed


@dataclass(frozen=True, slots=True)
class RankFigures:
    """The figures of one rank in one step.

    seconds: by part; they add up to the time from one exchange of loss and norm to the next.
    allocated, reserved: bytes.  On a GPU the highest in the step, of torch's allocator; with CUDA
    graphs both are what is reserved.  On a CPU the highest resident size so far, and 0.
    """

    seconds: Mapping[Part, float]
    allocated: float
    reserved: float = 0.0

    def numbers(self) -> list[float]:
        """Return all of it as numbers, as many on every rank."""
        return [self.allocated, self.reserved, *(self.seconds[part] for part in Part)]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> RankFigures:
        """Return the figures whose `numbers` these are."""
        allocated, reserved, *seconds = numbers
        return cls(dict(zip(Part, seconds, strict=True)), allocated, reserved)

    @property
    def bubble(self) -> float:
        """The fraction of the time of its passes in which the rank waits, from 0 to 1."""
        waiting = self.seconds[Part.WAITING]
        passes = waiting + sum(self.seconds[part] for part in _COMPUTING)
        return waiting / passes if passes > 0 else 0.0


def figures_of(ranks: Sequence[RankFigures], best_seconds: float | None = None) -> dict[str, float]:
    """Return the figures of a step by their keys in metrics.jsonl.

    Seconds are means over the ranks, so the parts add up to `seconds/step`.  `best_seconds` is the
    time of a step in which all ranks compute at their peak; without it there is no MFU.
    """
    means = {part: fmean(rank.seconds[part] for rank in ranks) for part in Part}
    step = sum(means.values())
    values = {"seconds/step": step, **{_KEYS[part]: means[part] for part in Part}}
    values["seconds/waiting_worst"] = max(rank.seconds[Part.WAITING] for rank in ranks)
    bubbles = [rank.bubble for rank in ranks]
    values |= {"bubble_mean": fmean(bubbles), "bubble_worst": max(bubbles)}
    trained = step - sum(means[part] for part in _BESIDE)
    if best_seconds is not None and trained > 0:
        values["mfu"] = best_seconds / trained
    values |= _worst_and_mean("memory/allocated", [rank.allocated for rank in ranks])
    if any(rank.reserved for rank in ranks):
        values |= _worst_and_mean("memory/reserved", [rank.reserved for rank in ranks])
    return values


class Spent:
    """The seconds by part of all steps of a process, for its last words."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(Part, 0.0)

    def add(self, figures: Mapping[str, float]) -> None:
        """Add a step, of which `figures` are those of `figures_of`."""
        for part in Part:
            self._seconds[part] += figures.get(_KEYS[part], 0.0)

    def words(self) -> str:
        """Return where the time went, largest part first, "" if no step is known."""
        total = sum(self._seconds.values())
        parts = sorted(self._seconds.items(), key=lambda item: -item[1])
        return "the time: " * bool(total) + ", ".join(
            f"{name_of(part)} {seconds / total:.1%}"
            for part, seconds in parts
            if seconds > 0.0005 * total
        )


def _worst_and_mean(name: str, of_ranks: Sequence[float]) -> dict[str, float]:
    return {f"{name}_worst": max(of_ranks), f"{name}_mean": fmean(of_ranks)}
