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
from schedules.simulate import peak, sweep
from schedules.transfers import HostLinks, device_peak

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
        placed = [
            _Rank.of(order, of_rank, problem, cost).best()
            for order, of_rank in zip(schedule.ranks, ends, strict=True)
        ]
        peaks = [of_rank for _, of_rank in placed]
        if not _is_lower(peaks, lowest):
            return
        offloads = tuple(offload for of_rank, _ in placed for offload in of_rank)
        found = replace(schedule, offloads=offloads)
        again = sweep(network, orders, HostLinks.of(found, problem, cost, network))
        if again.makespan <= swept.makespan * (1 + _LONGER):
            best, lowest = found, peaks
            following = [
                [again.start[number] + network.seconds[number % network.size] for number in order]
                for order in orders
            ]

    for ends in (late, early):
        if not following:
            try_at([[ends[number] for number in order] for order in orders])
    if following:
        try_at(following)
    return best


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
class _Away:
    """Activations that are away from the pass at the place `first` to that at `last`."""

    kept: _Kept
    first: int
    last: int


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

    def best(self) -> tuple[list[Offload], float]:
        """Return what is offloaded with the lowest peak, the fewest of that, and that peak."""
        found: list[_Away] = []
        changes = list(map(self.cost.byte_change, self.order))
        lowest = peak(changes)
        for wait in _WAITS:
            placed = self._placed(wait)
            held = self._peak(placed, changes)
            if held < lowest * (1 - 1e-9) or (held <= lowest and len(placed) < len(found)):
                found, lowest = placed, held
        offloads = [
            Offload(one.kept.item, self.order[one.first], self.order[one.last]) for one in found
        ]
        return offloads, lowest

    def _peak(self, placed: list[_Away], changes: list[float]) -> float:
        """Return the most bytes on the device, where passes add `changes`."""
        before, after = [0.0] * len(changes), [0.0] * len(changes)
        for one in placed:
            num_bytes, _ = self.cost.offload(one.kept.item.stage)
            before[one.first] += num_bytes
            after[one.last] += num_bytes
        return device_peak(changes, before, after)

    def _placed(self, wait: float) -> list[_Away]:
        """Return what can be offloaded that leaves within `wait` transfers after its forward.

        It is in the order of the forward passes.
        """
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
        found: list[_Away] = []
        busy = math.inf  # from then on the way back is taken
        for kept, first in sorted(leaving, key=lambda pair: -pair[0].read):
            until = min(busy, self.starts[kept.read] - _SLACK * kept.seconds)
            last = self._last(kept, until)
            if first <= last:
                found.append(_Away(kept, first, last))
                busy = until - kept.seconds
        return found[::-1]

    def _last(self, kept: _Kept, until: float) -> int:
        """Return the place of the last pass after which a reload ends by `until`."""
        return min(bisect_right(self.ends, until - kept.seconds), kept.read) - 1
