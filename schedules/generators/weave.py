"""Insertion of vocabulary passes and weight gradients into the base order of any schedule.

The order of F and B (or I) on a rank stays as in the base order, because it fixes the memory. W may
move, but not so far that more microbatches are in flight than in the base order. Vocabulary passes
that the base order contains stay where they are.

This is list scheduling: time runs forward on all ranks at once. A rank that is free takes the next
pass of its base order or another pass that is ready. S goes first, because the next T of every rank
and the next backward of the last stage wait for it. T, G and W fill the gaps, because no pass waits
for them, or only memory does.

Greedy choices can make a schedule slower. So there are several preferences to try, and the callers
simulate the results and keep the best.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from schedules.generators.clock import Clock
from schedules.graph import DeadlockError, require_acyclic
from schedules.ir import Kind, Pass
from schedules.network import EMBEDDINGS_AHEAD, Network, Orders
from schedules.problem import Node, Problem
from schedules.simulate import peak_in_flight


@dataclass(frozen=True, slots=True)
class Preference:
    """The rules by which a free rank chooses its next pass.

    - `eager`: the kinds that go before the base order when they are ready, first kind first.
    - `max_held`: when so many shards wait for their T, T goes before the base order, and S must
      wait. When so many embedding gradients wait for their G, G goes before the base order.
    - `patience`: a filler may delay the next base pass by at most this fraction of the filler's own
      duration.
    """

    eager: tuple[Kind, ...]
    max_held: int
    patience: float


_S_FIRST, _T_TOO = (Kind.E, Kind.S), (Kind.E, Kind.S, Kind.T)
# PREFERENCES gave the best orders without refinement, STARTS the best orders to refine. The best
# comes first. Both were found with all generators and equal and unequal stages.
PREFERENCES = (
    Preference(_S_FIRST, 2, 0.5),
    Preference(_S_FIRST, 3, 0.5),
    Preference(_S_FIRST, 2, 1.0),
    Preference(_T_TOO, 3, 0.5),
    Preference(_S_FIRST, 2, 0.0),
)
STARTS = (
    Preference(_S_FIRST, 1, 1.0),
    Preference(_S_FIRST, 2, 0.0),
    Preference(_T_TOO, 2, 1.0),
    Preference(_S_FIRST, 2, 0.5),
)
_FILLERS = (Kind.S, Kind.T, Kind.W, Kind.G, Kind.E)

BaseOrder = tuple[tuple[Pass, ...], ...]


def weave(base: BaseOrder, problem: Problem, network: Network, preference: Preference) -> Orders:
    """Return the order `base` with the vocabulary passes of `problem`, as ids of `network`.

    Raises DeadlockError, naming a cycle, if the base order cannot be executed.
    """
    try:
        return _Weaver(base, problem, network, preference).run()
    except DeadlockError:
        require_acyclic(_waits(base, problem), rank_of=problem.rank_of)
        raise


def _waits(base: BaseOrder, problem: Problem) -> dict[Pass, list[Pass]]:
    """Return for every pass of `base` the passes of it that must end before.

    What lies between them, collectives and passes that are not in `base`, is passed over.
    """
    own = {item for order in base for item in order}

    def inputs(node: Node) -> Iterator[Pass]:
        for before in problem.inputs_of(node):
            if isinstance(before, Pass) and before in own:
                yield before
            else:
                yield from inputs(before)

    return {
        item: [*inputs(item), *order[max(0, place - 1) : place]]
        for order in base
        for place, item in enumerate(order)
    }


class _Weaver:
    """One run of the list scheduler over all ranks."""

    def __init__(
        self, base: BaseOrder, problem: Problem, network: Network, preference: Preference
    ) -> None:
        self._problem, self._network, self._preference = problem, network, preference
        count, size = network.num_microbatches, network.size
        self._size, self._last_kind = size, problem.stage_kinds[-1]
        passes = [node for node in network.nodes if isinstance(node, Pass)]
        self._kinds = [node.kind for node in passes]
        keys = {(node.stage, node.kind): k for k, node in enumerate(passes)}
        orders = [
            [(item.kind, item.microbatch * size + keys[item.stage, item.kind]) for item in order]
            for order in base
        ]
        self._base = [
            deque(number for kind, number in order if kind is not Kind.W) for order in orders
        ]
        # All microbatches are equal, so the passes of a kind are taken in the order of
        # microbatches.
        self._movable: list[dict[Kind, deque[int]]] = [{} for _ in base]
        for queues, order in zip(self._movable, orders, strict=True):
            if problem.split_backward:
                queues[Kind.W] = deque(number for kind, number in order if kind is Kind.W)
        fixed = {number for order in orders for _, number in order}
        for k, node in enumerate(passes):
            if node.kind.is_vocabulary and k not in fixed:
                self._movable[node.stage][node.kind] = deque(range(k, count * size, size))
        self._most_in_flight = [peak_in_flight(order, problem) for order in base]
        self._in_flight = [0] * len(base)
        self._orders: Orders = [[] for _ in base]
        self._held = [{Kind.T: 0, Kind.G: 0} for _ in base]
        self._first_forward = keys[0, Kind.F]
        self._embedded = 0  # number of forwards of stage 0 that are already placed
        self._clock = Clock(network)

    def run(self) -> Orders:
        """Place every pass and return the orders. Raises DeadlockError if the base order blocks."""
        free_at = self._clock.free_at
        # A wake is a time at which a rank may be able to choose a pass.
        wakes = [(0.0, rank) for rank in range(len(self._orders))]
        while wakes:
            now, rank = heapq.heappop(wakes)
            if now < free_at[rank]:
                continue  # the rank has taken a pass since this wake was pushed
            kind, later = self._choose(rank, now)
            if kind is not None:
                for touched in self._place(rank, kind, now):
                    heapq.heappush(wakes, (max(now, free_at[touched]), touched))
            elif later is not None and later > now:
                heapq.heappush(wakes, (later, rank))
        waiting = [str(self._network.node(queue[0])) for queue in self._base if queue]
        if waiting:
            raise DeadlockError(
                f"the base order blocks: {', '.join(waiting)} wait for passes behind them"
            )
        return self._orders

    def _choose(self, rank: int, now: float) -> tuple[Kind | None, float | None]:
        """Return the kind to run on a free rank, or else the time at which to choose again.

        F stands for the next pass of the base order. Without a kind and a time, the rank chooses
        again when another rank has made progress.
        """
        preference, missing, arrived_at = (
            self._preference,
            self._clock.missing,
            self._clock.arrived_at,
        )
        queue, movable = self._base[rank], self._movable[rank]
        times = {
            kind: arrived_at[queue[0]]
            for kind, queue in movable.items()
            if queue and not missing[queue[0]]
        }
        self._withhold(rank, times, movable)
        head = queue[0] if queue else None
        held = self._held[rank]
        full = (
            head is not None
            and self._in_flight[rank] >= self._most_in_flight[rank]
            and bool(movable.get(Kind.W))
            and self._kinds[head % self._size] is Kind.F
        )
        base_at = arrived_at[head] if head is not None and not full and not missing[head] else None
        for kind in preference.eager:
            if kind in times and times[kind] <= now:
                return kind, None
        for kind, count in held.items():
            if count >= preference.max_held and kind in times and times[kind] <= now:
                return kind, None
        if full and Kind.W in times and times[Kind.W] <= now:
            return Kind.W, None
        if base_at is not None and base_at <= now:
            return Kind.F, None
        for kind in _FILLERS:
            if kind in times and times[kind] <= now:
                if base_at is None:
                    return kind, None
                seconds = self._network.seconds[movable[kind][0] % self._size]
                if now + seconds - base_at <= preference.patience * seconds:
                    return kind, None
        upcoming = [time for time in (base_at, *times.values()) if time is not None and time > now]
        return None, min(upcoming, default=None)

    def _withhold(
        self, rank: int, times: dict[Kind, float], movable: dict[Kind, deque[int]]
    ) -> None:
        """Drop E from `times` if it would run too far ahead, S if too many shards wait for T."""
        if (
            Kind.E in times
            and movable[Kind.E][0] // self._size >= self._embedded + EMBEDDINGS_AHEAD
        ):
            del times[Kind.E]
        if (
            Kind.S in times
            and not self._problem.forward_only
            and self._held[rank][Kind.T] >= self._preference.max_held
        ):
            del times[Kind.S]

    def _place(self, rank: int, kind: Kind, now: float) -> set[int]:
        """Place the next pass of a kind on the rank, and return the ranks that may now choose.

        For F, B and I that is the next pass of the base order.
        """
        number = self._movable[rank].get(kind, self._base[rank]).popleft()
        self._orders[rank].append(number)
        k = number % self._size
        touched = {rank}
        kind = self._kinds[k]
        self._in_flight[rank] += (kind is Kind.F) - (kind is self._last_kind)
        if kind is Kind.S:
            self._held[rank][Kind.T] += 1
        elif kind in (Kind.T, Kind.G):
            self._held[rank][kind] -= 1
        elif k == self._first_forward:
            self._embedded += 1
            touched.update(range(len(self._orders)))
        for ready in self._clock.run(number, now):
            lane = self._network.lanes[ready % self._size]
            touched.add(lane)
            self._held[lane][Kind.G] += self._kinds[ready % self._size] is Kind.G
        return touched
