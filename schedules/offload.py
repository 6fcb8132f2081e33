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
from operator import itemgetter

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
    ranks = [
        _Rank.of(order, numbers, problem, cost, network)
        for order, numbers in zip(schedule.ranks, orders, strict=True)
    ]
    best, lowest = schedule, [peak(rank.changes) for rank in ranks]
    following: list[list[float]] = []

    def try_at(ends: list[list[float]]) -> None:
        """Keep what is placed at these ends of the passes of every rank if it is better."""
        nonlocal best, lowest, following
        placed = [rank.best(of_rank) for rank, of_rank in zip(ranks, ends, strict=True)]
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

    made: int
    read: int
    num_bytes: float
    seconds: float  # of one transfer


# Activations that are away from the pass at one place to that at another.
_Away = tuple[_Kept, int, int]


@dataclass(frozen=True, slots=True)
class _Rank:
    """The passes of one rank, with their seconds and the bytes that they add, and what may move.

    `kept` is sorted by the forward passes. A long step has many, so the loops over it call little.
    """

    order: tuple[Pass, ...]
    seconds: list[float]
    changes: list[float]
    kept: list[_Kept]

    @classmethod
    def of(
        cls,
        order: tuple[Pass, ...],
        numbers: list[int],
        problem: Problem,
        cost: CostModel,
        network: Network,
    ) -> _Rank:
        """Return the rank whose passes have these ids."""
        readers = {
            (item.stage, item.microbatch): place
            for place, item in enumerate(order)
            if item.kind is problem.backward
        }
        kept = []
        for place, item in enumerate(order):
            num_bytes, seconds = cost.offload(item.stage) if item.kind is Kind.F else (0.0, 0.0)
            if num_bytes > 0:
                reader = readers[item.stage, item.microbatch]
                kept.append(_Kept(place, reader, num_bytes, seconds))
        size, seconds_of = network.size, network.seconds
        durations = [seconds_of[number % size] for number in numbers]
        return cls(order, durations, network.byte_changes(numbers), kept)

    def best(self, ends: list[float]) -> tuple[list[Offload], float]:
        """Return what is offloaded with the lowest peak, the fewest of that, and that peak.

        `ends` are those of the passes.
        """
        starts = [end - seconds for end, seconds in zip(ends, self.seconds, strict=True)]
        found: list[_Away] = []
        lowest = peak(self.changes)
        for wait in _WAITS:
            placed, some_stay = self._placed(wait, starts, ends)
            held = self._peak(placed)
            if held < lowest * (1 - 1e-9) or (held <= lowest and len(placed) < len(found)):
                found, lowest = placed, held
            if not some_stay:  # nothing waits longer
                break
        order = self.order
        offloads = [
            Offload(order[kept.made], order[first], order[last]) for kept, first, last in found
        ]
        return offloads, lowest

    def _peak(self, placed: list[_Away]) -> float:
        """Return the most bytes on the device."""
        before, after = [0.0] * len(self.changes), [0.0] * len(self.changes)
        for kept, first, last in placed:
            before[first] += kept.num_bytes
            after[last] += kept.num_bytes
        return device_peak(self.changes, before, after)

    def _placed(
        self, wait: float, starts: list[float], ends: list[float]
    ) -> tuple[list[_Away], bool]:
        """Return what can be offloaded that leaves within `wait` transfers after its forward.

        It is in the order of the forward passes. Also return whether any stays for its wait.
        """
        free, some_stay = 0.0, False
        leaving: list[tuple[int, _Kept, int]] = []  # with the first pass during which it is away
        for kept in self.kept:
            made, read, seconds = kept.made, kept.read, kept.seconds
            end = ends[made]
            start = free if free > end else end
            if start - end > wait * seconds:
                some_stay = True
                continue
            first = bisect_left(starts, start + (1 + _SLACK) * seconds, made + 1)
            # The last pass after which a reload ends in time.
            if first < read and first < bisect_right(ends, starts[read] - seconds):
                free = start + seconds
                leaving.append((-read, kept, first))
        leaving.sort(key=_by_reader)
        found: list[_Away] = []
        busy = math.inf  # from then on the way back is taken
        for _, kept, first in leaving:
            seconds, read = kept.seconds, kept.read
            until = starts[read] - _SLACK * seconds
            if busy < until:
                until = busy
            last = bisect_right(ends, until - seconds)
            last = (read if read < last else last) - 1
            if first <= last:
                found.append((kept, first, last))
                busy = until - seconds
        found.reverse()
        return found, some_stay


_by_reader = itemgetter(0)
