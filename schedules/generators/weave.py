"""Weave vocabulary passes and weight gradients into a base order: one insertion for every schedule and every algorithm.

The base order of F and B (or I) on each rank stays as it is, for it fixes the memory; W may move, but never so far that more
microbatches are in flight than the base order has.  Time runs forward on all ranks at once; whenever a rank is free it takes
the next pass of its base order or another pass that is ready.  S goes first, because every rank's next T and the last stage's
next backward wait for it; T, G and W, for which nothing waits (or which are held back only by memory), fill the gaps.

A handful of preferences is tried and the fastest result kept, because greedy choices have anomalies: each is simulated, so no
choice can make the result worse than the plainest.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from schedules.cost import CostModel
from schedules.graph import DeadlockError
from schedules.ir import Kind, Pass, Schedule
from schedules.problem import Collective, Node, Problem
from schedules.simulate import peak_in_flight, simulate
from schedules.vocab import End

_EMBEDDINGS_AHEAD = 2  # E of this many microbatches is ready before F of stage 0 asks for it


@dataclass(frozen=True, slots=True)
class Preference:
    """How a free rank chooses.  `eager`: kinds that go before the base order when ready, first to last.

    `max_held`: shards that may wait for their T (or embedding gradients for their G) before these go first.
    `patience`: a filler may delay a base pass that is about to arrive by at most this fraction of its own duration.
    """

    eager: tuple[Kind, ...]
    max_held: int
    patience: float


_PREFERENCES = tuple(
    Preference(eager, max_held, patience)
    for eager in ((Kind.E, Kind.S), (Kind.E, Kind.S, Kind.T), (Kind.E,))
    for max_held in (2, 3)
    for patience in (1.0, 0.5)
)


def weave(name: str, base: tuple[tuple[Pass, ...], ...], problem: Problem, cost: CostModel) -> Schedule:
    """`base` with the vocabulary passes of `problem`.  Raises DeadlockError if the base order cannot be executed."""
    candidates = [_Weaver(base, problem, cost, preference).run(name) for preference in _PREFERENCES]
    unique = list(dict.fromkeys(candidates))
    timelines = [simulate(schedule, problem, cost) for schedule in unique]
    return min(zip(unique, timelines, strict=True), key=lambda pair: (pair[1].makespan, max(pair[1].peak_bytes)))[0]


class _Weaver:
    """One run of time over all ranks.  Passes are placed in the order in which their ranks decide on them."""

    def __init__(self, base: tuple[tuple[Pass, ...], ...], problem: Problem, cost: CostModel, preference: Preference) -> None:
        self._problem, self._cost, self._preference = problem, cost, preference
        self._base = [deque(item for item in order if item.kind is not Kind.W) for order in base]
        self._others = [_movable_queues(rank, order, problem) for rank, order in enumerate(base)]
        self._most_in_flight = [peak_in_flight(list(order), problem) for order in base]
        self._in_flight = [0] * len(base)
        self._orders: list[list[Pass]] = [[] for _ in base]
        self._free_at = [0.0] * len(base)
        self._communicator_free_at = dict.fromkeys(End, 0.0)
        self._held = [{Kind.T: 0, Kind.G: 0} for _ in base]
        self._embedded = 0  # forwards of stage 0 already placed
        self._ready_at: dict[Node, float] = {}  # of passes whose inputs are all there
        self._missing: dict[Node, int] = {item: 0 for order in base for item in order}
        self._missing |= {item: 0 for queues in self._others for queue in queues.values() for item in queue}
        self._missing |= dict.fromkeys(problem.collectives(), 0)
        self._arrived_at = dict.fromkeys(self._missing, 0.0)  # the latest input so far
        self._followers: dict[Node, list[Node]] = {node: [] for node in self._missing}
        for node in self._missing:
            inputs = problem.inputs_of(node)
            self._missing[node] = len(inputs)
            for earlier in inputs:
                self._followers[earlier].append(node)

    def run(self, name: str) -> Schedule:
        """Place every pass; DeadlockError if the base order blocks."""
        for node, missing in self._missing.items():
            if missing == 0:
                self._ready_at[node] = 0.0
        wakes = [(0.0, rank) for rank in range(len(self._orders))]
        while wakes:
            now, rank = heapq.heappop(wakes)
            if now < self._free_at[rank]:
                continue  # outdated: the rank has taken a pass since
            item, later = self._choose(rank, now)
            if item is not None:
                for touched in self._place(rank, item, now):
                    heapq.heappush(wakes, (max(now, self._free_at[touched]), touched))
            elif later is not None and later > now:
                heapq.heappush(wakes, (later, rank))
        waiting = [queue[0] for queue in self._base if queue]
        if waiting:
            raise DeadlockError(
                f"the base order of {name!r} blocks: {', '.join(map(str, waiting))} wait for passes behind them"
            )
        return Schedule(name, tuple(map(tuple, self._orders)))

    def _choose(self, rank: int, now: float) -> tuple[Pass | None, float | None]:
        """The pass to run on a free rank, or the time at which to look again (None: when another rank makes progress)."""
        heads = {kind: queue[0] for kind, queue in self._others[rank].items() if queue and self._allowed(rank, queue[0])}
        times = {kind: self._ready_at[head] for kind, head in heads.items() if head in self._ready_at}
        ready = [kind for kind, time in times.items() if time <= now]
        queue = self._base[rank]
        full = Kind.W in heads and queue and queue[0].kind is Kind.F and self._in_flight[rank] >= self._most_in_flight[rank]
        base_at = self._ready_at.get(queue[0]) if queue and not full else None
        for kind in self._preference.eager:
            if kind in ready:
                return heads[kind], None
        for kind, held in self._held[rank].items():
            if held >= self._preference.max_held and kind in ready:
                return heads[kind], None
        if full and Kind.W in ready:
            return heads[Kind.W], None
        if base_at is not None and base_at <= now:
            return queue[0], None
        for kind in (Kind.S, Kind.T, Kind.W, Kind.G, Kind.E):
            if kind in ready:
                seconds = self._cost.seconds(heads[kind])
                if base_at is None or now + seconds - base_at <= self._preference.patience * seconds:
                    return heads[kind], None
        upcoming = [time for time in (base_at, *times.values()) if time is not None and time > now]
        return None, min(upcoming, default=None)

    def _allowed(self, rank: int, head: Pass) -> bool:
        if head.kind is Kind.E:
            return head.microbatch < self._embedded + _EMBEDDINGS_AHEAD
        if head.kind is Kind.S and not self._problem.forward_only:
            return self._held[rank][Kind.T] < self._preference.max_held
        return True

    def _place(self, rank: int, item: Pass, now: float) -> set[int]:
        """Put `item` at the end of the rank's order; returns the ranks that may now have something to choose."""
        self._others[rank].get(item.kind, self._base[rank]).popleft()
        self._orders[rank].append(item)
        end = self._free_at[rank] = now + self._cost.seconds(item)
        touched = {rank}
        self._in_flight[rank] += item.kind is Kind.F
        self._in_flight[rank] -= item.kind is self._problem.stage_kinds[-1]
        match item.kind:
            case Kind.S:
                self._held[rank][Kind.T] += 1
            case Kind.T | Kind.G:
                self._held[rank][item.kind] -= 1
            case Kind.F if item.stage == 0:
                self._embedded += 1
                touched.update(self._problem.shard_ranks(End.INPUT))
        self._finish(item, end, touched)
        return touched

    def _finish(self, node: Node, end: float, touched: set[int]) -> None:
        for later in self._followers[node]:
            arrival = end + self._cost.hop_seconds if self._problem.is_hop(node, later) else end
            self._arrived_at[later] = max(self._arrived_at[later], arrival)
            self._missing[later] -= 1
            if self._missing[later]:
                continue
            self._ready_at[later] = self._arrived_at[later]
            if isinstance(later, Collective):
                communicator = self._problem.algorithm.barrier(later.barrier).end
                start = max(self._ready_at[later], self._communicator_free_at[communicator])
                finish = self._communicator_free_at[communicator] = start + self._cost.barrier(later.barrier)
                self._finish(later, finish, touched)
            else:
                touched.add(self._problem.rank_of(later))
                if later.kind is Kind.G:
                    self._held[later.stage][Kind.G] += 1


def _movable_queues(rank: int, base: tuple[Pass, ...], problem: Problem) -> dict[Kind, deque[Pass]]:
    """The passes of a rank that have no place yet, per kind.  First in, first out: microbatches are alike."""
    weights = deque(item for item in base if item.kind is Kind.W)
    return ({Kind.W: weights} if weights else {}) | {
        kind: deque(Pass(rank, kind, i) for i in range(problem.num_microbatches))
        for end, kinds in problem.shard_kinds.items()
        if rank in problem.shard_ranks(end)
        for kind in kinds
    }
