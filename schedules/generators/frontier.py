"""The frontier of bubble against memory: the fastest schedule found under every cap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from schedules.generators.auto import CapError, Option, Shared, Solution, Watch, solve
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
    options: Sequence[Option], caps: Sequence[float], watch: Watch | None = None
) -> Iterator[FrontierPoint]:
    """Yield the best schedule found under each cap in bytes, from the lowest to the highest.

    Caps under which none was found are left out. More memory never makes a step slower: a point
    takes the schedule of the one before it where the search finds none that is faster. It ends
    with the first point that no memory can improve. `watch` may end it earlier, with the last point
    whose search reached its end.

    The highest cap is searched first, and no other search goes on when it is as fast.
    """
    caps, shared = sorted(caps), Shared()

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

    previous: FrontierPoint | None = None
    with contextlib.suppress(_Stopped):
        last = found(caps[-1], []) if caps else None
        if last is None:
            return
        shared.enough = last.timeline.makespan
        for cap in caps:
            if previous is not None and previous.timeline.makespan <= shared.enough:
                point: FrontierPoint | None = previous
            elif cap == last.cap:
                point = last
            else:
                point = found(cap, [] if previous is None else [previous.solution])
            if point is None:
                continue
            if previous is not None and previous.timeline.makespan <= point.timeline.makespan:
                point = previous
            previous = replace(point, cap=cap)
            yield previous
            if previous.is_optimal:
                return


class _Stopped(Exception):
    """The watch has ended a search."""
