"""The part of a step that a picture shows: all of it, or all but the middle of a long step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from schedules.timeline import Span, Timeline

_MOST_BOXES = 2_000  # in a picture
_MOST_BOXES_OF_RANK = 250
_WARM_UP = 0.55  # the part of what is shown that comes before the cut


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The part of a step of `makespan` seconds that a picture shows.

    `cut`: from when to when nothing is shown, in seconds, if the step has more passes than a
    picture can show. What remains is the warm-up and the cool-down, each with some steady
    microbatches.
    """

    makespan: float
    cut: tuple[float, float] | None = None

    @classmethod
    def of(cls, timeline: Timeline) -> Excerpt:
        """Return what a picture of `timeline` shows."""
        whole = cls(timeline.makespan)
        most = max(map(len, timeline.compute))
        allowed = min(_MOST_BOXES_OF_RANK, max(60, _MOST_BOXES // timeline.num_ranks))
        if most <= allowed or timeline.makespan <= 0:
            return whole
        shown = timeline.makespan * allowed / most
        longest = max(span.seconds for spans in timeline.compute for span in spans)
        if timeline.makespan - shown <= longest:
            return whole  # a pass could be on both sides of the cut
        return cls(
            timeline.makespan, (_WARM_UP * shown, timeline.makespan - (1 - _WARM_UP) * shown)
        )

    @property
    def left_out(self) -> float:
        """The seconds that are not shown."""
        return 0.0 if self.cut is None else self.cut[1] - self.cut[0]

    @property
    def seconds(self) -> float:
        """The seconds that are shown."""
        return self.makespan - self.left_out

    def place(self, moment: float, gap: float = 0.0) -> float:
        """Return where a moment that is shown lies, in seconds from the left edge.

        gap: the width of what stands for the cut, in seconds too.
        """
        if self.cut is None or moment <= self.cut[0]:
            return moment
        return moment - self.left_out + gap

    def visible(self, span: Span) -> tuple[float, float] | None:
        """Return the part of a span that is shown, as its start and end; None if nothing is."""
        if self.cut is None:
            return span.start, span.end
        left, right = self.cut
        if span.start >= left and span.end <= right and span.end > left and span.start < right:
            return None
        start = right if left < span.start < right else span.start
        end = left if start <= left and span.end > left else span.end
        return start, end

    def ticks(self, factor: float) -> list[float]:
        """Return round values for an axis in units of 1 / factor seconds, without those cut out."""
        step = _round_step(self.seconds * factor)
        values = [step * tick for tick in range(int(self.makespan * factor / step + 1e-9) + 1)]
        left, right = self.cut or (math.inf, math.inf)
        return [value for value in values if not left < value / factor < right]


def _round_step(length: float) -> float:
    """Return the distance between the ticks of an axis of this length.

    It is 1, 2 or 5 times a power of ten and gives at most ten parts; 1 for an empty axis.
    """
    if length <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(length / 10))
    return next(
        factor * power for factor in (1, 2, 5, 10) if length / (factor * power) <= 10 + 1e-9
    )
