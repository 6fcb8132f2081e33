"""What simulations of short steps tell about similar choices that were not simulated."""

from __future__ import annotations

from schedules.generators import GENERATORS
from vp_train.planning.choice import Choice
from vp_train.planning.weigh import Candidate

# Choices of the same schedule and step exceed their lower bounds by similar factors, at least by
# this part of the one that was seen; those with other vocabulary passes or recomputation by that.
_ALIKE, _RELATED = 0.97, 0.9


class Learned:
    """By how much the least of similar choices exceeded what was expected: seconds and bytes."""

    def __init__(self) -> None:
        self._factors: dict[tuple[object, ...], float] = {}
        self._excess_bytes: dict[tuple[object, ...], float] = {}

    def note(self, candidate: Candidate, seconds: float, num_bytes: float) -> None:
        """Note the seconds of all passes and, with the first optimizer, the bytes of a rank."""
        choice = candidate.choice
        factor = seconds / candidate.passes
        _note_least(self._factors, alike(choice), max(1.0, _ALIKE * factor))
        _note_least(self._factors, _related(choice), max(1.0, _RELATED * factor))
        _note_least(self._excess_bytes, _similar_memory(choice), num_bytes - candidate.expected[0])

    def factor(self, choice: Choice) -> float:
        """Return about the least factor by which a step takes longer than its lower bound."""
        known = self._factors.get(alike(choice))
        return self._factors.get(_related(choice), 1.0) if known is None else known

    def excess_bytes(self, choice: Choice) -> float:
        """Return how many bytes more than expected a rank needs at least, or -inf."""
        return self._excess_bytes.get(_similar_memory(choice), float("-inf"))


def _related(choice: Choice) -> tuple[object, ...]:
    """Return what choices have in common whose order of passes leaves ranks as idle.

    V-Min alone exceeds its bounds by more than a tenth: by 28 to 39 % in six steps of 32 stages,
    whatever their vocabulary passes and recomputation were.
    """
    degrees = choice.degrees
    return choice.schedule, choice.num_chunks, degrees.pp, choice.num_microbatches


def alike(choice: Choice) -> tuple[object, ...]:
    """Return what choices have in common which exceed their bounds by similar factors.

    With a split backward more microbatches are in flight where stages recompute, so less is waited
    for slow links.
    """
    degrees, count = choice.degrees, choice.num_microbatches
    step = choice.schedule, choice.num_chunks, choice.vocab, degrees.pp, degrees.tp, count
    splits = GENERATORS[choice.schedule].split_backward
    return (*step, choice.recompute, choice.recomputes_partly) if splits else step


def _similar_memory(choice: Choice) -> tuple[object, ...]:
    """Return what choices have in common which need about as much more than is expected.

    Where only some stages recompute, memory has chosen them, so these count only if they are same.
    """
    degrees = choice.degrees
    return (
        *(choice.schedule, degrees.pp, degrees.tp, choice.micro_batch_size),
        *(choice.sequence_parallel, choice.recompute, choice.recompute_per_stage),
        choice.offload > 0,
    )


def _note_least(
    known: dict[tuple[object, ...], float], similar: tuple[object, ...], value: float
) -> None:
    known[similar] = min(value, known.get(similar, value))
