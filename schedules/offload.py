"""The choice of what waits in host memory between forward and backward, and from when to when.

A stage may send what its offloaded layers keep of a microbatch over the link to its host
(PipeOffload, arXiv 2503.01328). The choice looks at a timeline of the schedule without transfers,
and places them so that they delay none of its passes: a microbatch goes to the host if both of its
ways fit into its life beside the others, and if it is away during at least one pass. It comes back
just in time: its copy back is issued at the end of the last pass from which it still arrives early
enough, because it takes device memory from then on. Both ways get some slack.

In that timeline the forwards are as late as the backwards allow. Those of the warm-up are then as
far apart as those of the steady state where the order permits it, so the link can keep up with
them. Nothing makes them late but the copies that they wait for. So the choice is made once more on
the timeline which that gives.

A link that cannot carry everything must not carry anything late: what waits for the link is neither
on the host nor gone from the device. So microbatches that would wait too long for it stay on the
device. How long is too long is tried, and every rank takes what gives it the lowest peak.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise

from schedules.cost import CostModel
from schedules.ir import Kind, Offload, Pass, Schedule
from schedules.network import Network, Orders
from schedules.problem import Problem
from schedules.simulate import peak, simulate_order, sweep
from schedules.transfers import HostBytes

_SLACK = 0.1  # part of a transfer's time by which its end is early
_WAITS = (0.0, 0.5, 1.0, 2.0, math.inf)  # for the link to the host, in transfers
_LONGER = 1e-6  # part of the step by which transfers may delay it


def place_transfers(schedule: Schedule, problem: Problem, cost: CostModel) -> Schedule:
    """Return `schedule` with what should wait in host memory, and from when to when.

    No peak rises, and the simulated step takes as long as before. Raises ValueError and
    DeadlockError like `simulate`.
    """
    if problem.forward_only or not any(cost.offload_bytes):
        return schedule
    network = Network.of(problem, cost)
    orders = network.orders(schedule)
    swept = sweep(network, orders)
    early = [start + network.seconds[n % network.size] for n, start in enumerate(swept.start)]
    late = _with_late_forwards(network, problem, orders, swept.order, early)
    best, lowest = schedule, [peak(network.byte_changes(order)) for order in orders]
    following: list[list[float]] = []

    def try_at(ends: list[list[float]]) -> None:
        """Keep what is placed at these ends of the passes of every rank if it is better."""
        nonlocal best, lowest, following
        found = replace(schedule, offloads=_placed_at(ends, schedule, problem, cost))
        timeline = simulate_order(found, problem, cost)
        peaks = list(timeline.peak_bytes)
        if timeline.makespan <= swept.makespan * (1 + _LONGER) and _is_lower(peaks, lowest):
            best, lowest = found, peaks
            following = [[span.end for span in spans] for spans in timeline.compute]

    for ends in (late, early):
        if not following:
            try_at([[ends[number] for number in order] for order in orders])
    if following:
        try_at(following)
    return best


def _placed_at(
    ends: list[list[float]], schedule: Schedule, problem: Problem, cost: CostModel
) -> tuple[Offload, ...]:
    """Return what is offloaded if the passes of every rank end at `ends`."""
    ranks = (
        _Rank.of(order, of_rank, problem, cost)
        for order, of_rank in zip(schedule.ranks, ends, strict=True)
    )
    return tuple(offload for rank in ranks for offload in rank.best())


def _with_late_forwards(
    network: Network, problem: Problem, orders: Orders, order: list[int], ends: list[float]
) -> list[float]:
    """Return the ends of all nodes if all before the backwards is as late as these allow.

    The backwards and what comes after them stay at `ends`. `order` respects every dependency.
    """
    size, seconds, late = network.size, network.seconds, list(ends)
    next_on_rank = {before: after for passes in orders for before, after in pairwise(passes)}
    moves = [
        node.kind in (Kind.F, Kind.E, Kind.S, Kind.T)
        if isinstance(node, Pass)
        else problem.algorithm.barrier(node.barrier).after is not Kind.B
        for node in network.nodes
    ]
    for number in reversed(order):
        k = number % size
        if moves[k]:
            waiting = [(number - k + step, travel) for step, travel in network.followers[k]]
            if number in next_on_rank:
                waiting.append((next_on_rank[number], 0.0))
            late[number] = min(
                (late[n] - seconds[n % size] - travel for n, travel in waiting),
                default=late[number],
            )
    return late


def _is_lower(peaks: list[float], others: list[float]) -> bool:
    """Return whether the highest peak is lower, or if it is not, their sum."""
    highest, other = max(peaks), max(others)
    if abs(highest - other) > 1e-9 * other:
        return highest < other
    return sum(peaks) < sum(others) * (1 - 1e-9)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The activations of a stage and microbatch: places of their F and of their first reader."""

    item: Pass
    made: int
    read: int
    seconds: float  # of one transfer


@dataclass(frozen=True, slots=True)
class _Rank:
    """The passes of one rank with their times, and what it may offload."""

    order: tuple[Pass, ...]
    starts: list[float]
    ends: list[float]
    kept: list[_Kept]
    cost: CostModel

    @classmethod
    def of(
        cls, order: tuple[Pass, ...], ends: list[float], problem: Problem, cost: CostModel
    ) -> _Rank:
        """Return the rank; what it may offload is sorted by its forward passes."""
        readers = {
            (item.stage, item.microbatch): place
            for place, item in enumerate(order)
            if item.kind is problem.backward
        }
        kept = []
        for place, item in enumerate(order):
            num_bytes, seconds = cost.offload(item.stage) if item.kind is Kind.F else (0.0, 0.0)
            if num_bytes > 0:
                kept.append(_Kept(item, place, readers[item.stage, item.microbatch], seconds))
        starts = [end - cost.seconds(item) for end, item in zip(ends, order, strict=True)]
        return cls(order, starts, ends, kept, cost)

    def best(self) -> list[Offload]:
        """Return what is offloaded with the lowest peak, the fewest of that, in their order."""
        found: list[Offload] = []
        changes = list(map(self.cost.byte_change, self.order))
        lowest = peak(changes)
        for wait in _WAITS:
            offloads = self._placed(wait)
            held = HostBytes.of(offloads, self.cost).peak(self.order, changes)
            if held < lowest * (1 - 1e-9) or (held <= lowest and len(offloads) < len(found)):
                found, lowest = offloads, held
        return found

    def _placed(self, wait: float) -> list[Offload]:
        """Return what can be offloaded that leaves within `wait` transfers after its forward."""
        free = 0.0
        leaving: list[tuple[_Kept, int]] = []  # with the first pass during which it is away
        for kept in self.kept:
            end = self.ends[kept.made]
            start = max(end, free)
            gone = start + (1 + _SLACK) * kept.seconds
            first = bisect_left(self.starts, gone, kept.made + 1)
            if start - end > wait * kept.seconds:
                continue
            if first <= self._last(kept, self.starts[kept.read]):
                free = start + kept.seconds
                leaving.append((kept, first))
        found: list[tuple[int, Offload]] = []
        busy = math.inf  # from then on the way back is taken
        for kept, first in sorted(leaving, key=lambda pair: -pair[0].read):
            until = min(busy, self.starts[kept.read] - _SLACK * kept.seconds)
            last = self._last(kept, until)
            if first <= last:
                found.append((last, Offload(kept.item, self.order[first], self.order[last])))
                busy = until - kept.seconds
        return [offload for _, offload in reversed(found)]

    def _last(self, kept: _Kept, until: float) -> int:
        """Return the place of the last pass after which a reload ends by `until`."""
        return min(bisect_right(self.ends, until - kept.seconds), kept.read) - 1
