"""The frontier of bubble against memory: the fastest schedule found under every cap."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from schedules.generators.auto import CapError, Option, Shared, Solution, Watch, solve
from schedules.generators.fill import LOOSE
from schedules.simulate import simulate
from schedules.timeline import Timeline


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """The best schedule found in which every rank keeps at most `cap` bytes."""

    cap: float
    solution: Solution
    timeline: Timeline

    @property
    def is_optimal(self) -> bool:
        """Return whether the step takes no longer than the lower bound without a cap, by 0.1 %."""
        return (self.timeline.gap or 0.0) < 1e-3

    def is_faster_than(self, other: FrontierPoint | None) -> bool:
        """Return whether the step takes less time than that of `other`; true if that is None."""
        return other is None or self.timeline.makespan * LOOSE < other.timeline.makespan


def caps_of(options: Sequence[Option], most: int) -> list[float]:
    """Return caps in bytes from what one microbatch keeps on to p + 1 microbatches and two shards.

    They are multiples of the stages of half a microbatch, plus one held shard, since what a rank
    keeps is made of these. If those are more than `most`, they are equally spaced among them.
    """
    option = options[0]
    num_ranks, cost = option.problem.layout.num_ranks, option.cost
    unit = cost.microbatch_bytes(num_ranks) / 2
    held = max(cost.shard_bytes, default=0.0)
    steps = min(most - 1, 2 * num_ranks)
    counts = [2 + round(step * 2 * num_ranks / steps) for step in range(steps + 1)]
    return [count * unit + held for count in counts] + [counts[-1] * unit + 2 * held]


def frontier(
    options: Sequence[Option],
    caps: Sequence[float],
    watch: Watch | None = None,
    named: Sequence[FrontierPoint] = (),
) -> Iterator[FrontierPoint]:
    """Yield the best schedule known under each cap in bytes, from the lowest to the highest.

    It is what a search finds, or one of the `named` schedules, whose caps are what they keep. Such
    a cap is added if that schedule is faster than all under lower caps. More memory never makes a
    step slower: a point takes the schedule of the one before it where none is faster. Caps under
    which nothing was found are left out. The searches end with the first cap that no memory can
    improve. `watch` may end them earlier, after the last one that reached its end.

    The highest cap is searched first, and no other search goes on when it is as fast as that or as
    a named schedule.
    """
    caps, shared = sorted(caps), Shared()
    waiting = sorted(named, key=lambda point: (point.cap, point.timeline.makespan))
    best: FrontierPoint | None = None

    def found(cap: float, known: Sequence[Solution]) -> FrontierPoint | None:
        """Return the point of a search; None if nothing fits. Raises _Stopped."""
        num_ranks = options[0].problem.layout.num_ranks
        try:
            solution = solve(options, [cap] * num_ranks, watch, known, shared)
        except CapError as error:
            if error.is_stopped:
                raise _Stopped from None
            return None
        if solution.is_stopped:
            raise _Stopped
        option = solution.option
        timeline = simulate(solution.schedule, option.problem, option.cost)
        return FrontierPoint(cap, solution, timeline)

    def faster_up_to(cap: float) -> Iterator[FrontierPoint]:
        """Take the named schedules that keep at most `cap`; yield each that is the best so far."""
        nonlocal best
        while waiting and waiting[0].cap <= cap * LOOSE:
            known = waiting.pop(0)
            if known.is_faster_than(best):
                best = known
                yield known

    with contextlib.suppress(_Stopped):
        last = found(caps[-1], []) if caps else None
        fitting = [known for known in named if caps and known.cap <= caps[-1] * LOOSE]
        seconds = [point.timeline.makespan for point in (last, *fitting) if point is not None]
        shared.enough = min(seconds, default=0.0)
        if last is None:
            raise _Stopped  # nothing fits under any cap
        for cap in caps:
            for known in faster_up_to(cap):
                if known.cap * LOOSE < cap:
                    yield known
            if best is not None and best.timeline.makespan <= shared.enough:
                point: FrontierPoint | None = best
            elif cap == last.cap:
                point = last
            else:
                point = found(cap, [] if best is None else [best.solution])
            if point is not None and point.is_faster_than(best):
                best = point
            if best is None:
                continue
            best = replace(best, cap=cap)
            yield best
            if best.is_optimal:
                break
    yield from faster_up_to(math.inf)


class _Stopped(Exception):
    """Nothing more is searched for."""
