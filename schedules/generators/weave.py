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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from schedules.generators.fill import LOOSE
from schedules.graph import DeadlockError, require_acyclic
from schedules.ir import Kind, Pass
from schedules.network import EMBEDDINGS_AHEAD, Network, Orders
from schedules.problem import Node, Problem
from schedules.simulate import peak


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
    Preference(_T_TOO, 3, 0.5),
    Preference(_S_FIRST, 3, 0.5),
    Preference(_S_FIRST, 2, 1.0),
    Preference(_S_FIRST, 2, 0.0),
)
STARTS = (
    Preference(_S_FIRST, 1, 1.0),
    Preference(_S_FIRST, 2, 0.0),
    Preference(_T_TOO, 2, 1.0),
    Preference(_S_FIRST, 2, 0.5),
)

# A rank alone sends nothing that others wait for, so each pass may come when it is needed, which
# keeps least. Where collectives of tensor-parallel ranks take time, another one may be faster.
ALONE = Preference((Kind.S, Kind.T), 1, 0.0)

_RECOMPUTES = 2  # times as much as from F to I is kept from I to W where most is computed again

BaseOrder = tuple[tuple[Pass, ...], ...]


def preferences_of(problem: Problem) -> tuple[Preference, ...]:
    """Return the preferences to try; of equally fast orders that of the first is to be taken."""
    return (ALONE, *PREFERENCES) if problem.layout.num_ranks == 1 else PREFERENCES


def waits_for_weights(kept: float, for_weights: float) -> bool:
    """Return whether a stage keeps far more from I to W than from F to I, because I recomputes."""
    return for_weights > _RECOMPUTES * kept


def in_flight_weights(network: Network, problem: Problem) -> dict[Kind, float]:
    """Return by how much a stage pass of each kind changes the stages in flight on its rank.

    A stage counts as one from its F to its last backward. Where it keeps far more from its I to its
    W than before, because I computes its activations again, it counts as one from I only, and from
    F as the part of that which it keeps. Else W would wait as long as if nothing were recomputed.
    """
    if problem.forward_only:
        return {}
    if not problem.split_backward:
        return {Kind.F: 1.0, Kind.B: -1.0}
    held = dict.fromkeys((Kind.F, Kind.W), 0.0)
    for node, change in zip(network.nodes, network.byte_change, strict=False):
        if isinstance(node, Pass) and node.kind in held:
            held[node.kind] += abs(change)
    whole = waits_for_weights(held[Kind.F], held[Kind.W])
    part = held[Kind.F] / held[Kind.W] if whole else 1.0
    return {Kind.F: part, Kind.I: 1.0 - part, Kind.W: -1.0}


def most_in_flight(order: Sequence[Pass], weights: Mapping[Kind, float]) -> float:
    """Return how many stages may be in flight on a rank: the peak of its base order `order`.

    Where a stage counts as one from its I only, at most one waits for its W beside the next.
    """
    most = peak(weights.get(item.kind, 0.0) for item in order)
    if not weights.get(Kind.I):
        return most
    at_once = {Kind.F: (weights[Kind.F],), Kind.I: (weights[Kind.I], weights[Kind.W])}
    least = peak(change for item in order for change in at_once.get(item.kind, ()))
    return min(most, least + 1.0)


def weave(base: BaseOrder, problem: Problem, network: Network, preference: Preference) -> Orders:
    """Return the order `base` with the vocabulary passes of `problem`, as ids of `network`.

    Raises DeadlockError, naming a cycle or microbatches out of order, if it cannot be executed.
    """
    try:
        return _Weaver(base, problem, network, preference).run()
    except DeadlockError:
        require_acyclic(_waits(base, problem), rank_of=problem.rank_of)
        _require_ascending(base)
        raise


def _require_ascending(base: BaseOrder) -> None:
    """Raise DeadlockError for passes of a stage and kind that are not in order of microbatches.

    What is added here is in that order, so such passes may wait for each other.
    """
    for rank, order in enumerate(base):
        last: dict[tuple[int, Kind], Pass] = {}
        for item in order:
            before = last.setdefault((item.stage, item.kind), item)
            if item.microbatch < before.microbatch:
                raise DeadlockError(
                    f"rank {rank} runs {before} before {item}, but the passes that are added come "
                    "in order of microbatches; order those of a stage so, or write all passes"
                )
            last[item.stage, item.kind] = item


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


# What a rank may take next: the next pass of its base order, or the next movable pass of a kind.
_BASE, _S, _T, _W, _G, _E = range(6)
_SLOTS = {Kind.S: _S, Kind.T: _T, Kind.W: _W, Kind.G: _G, Kind.E: _E}
_FILLERS = (_S, _T, _W, _G, _E)
_NEVER = float("inf")


class _Weaver:
    """One run of the list scheduler over all ranks.

    Collectives run without being placed, as soon as their inputs arrive. All microbatches are
    equal, so the passes of a kind are taken in the order of microbatches. Planning a long step
    takes most of its time here, so `run` reads local variables and calls little.
    """

    def __init__(
        self, base: BaseOrder, problem: Problem, network: Network, preference: Preference
    ) -> None:
        self._network, self._preference = network, preference
        count, size = network.num_microbatches, network.size
        passes = [node for node in network.nodes if isinstance(node, Pass)]
        keys = {(node.stage, node.kind): k for k, node in enumerate(passes)}
        orders = [
            [(item.kind, item.microbatch * size + keys[item.stage, item.kind]) for item in order]
            for order in base
        ]
        # The passes of every rank by slot, in the order in which they are taken, the last one
        # first. W is movable where the backward is split.
        self._left: list[list[list[int]]] = [[[] for _ in range(6)] for _ in base]
        for left, order in zip(self._left, orders, strict=True):
            for kind, number in reversed(order):
                left[_W if kind is Kind.W else _BASE].append(number)
            if not problem.split_backward:
                left[_W].clear()
        fixed = {number % size for order in orders for _, number in order}
        for k, node in enumerate(passes):
            if node.kind.is_vocabulary and k not in fixed:
                numbers = range(k + (count - 1) * size, -1, -size)
                self._left[node.stage][_SLOTS[node.kind]] = list(numbers)
        weights = in_flight_weights(network, problem)
        self._change = [weights.get(node.kind, 0.0) for node in passes]
        self._most_in_flight = [LOOSE * most_in_flight(order, weights) for order in base]
        self._forward_only = problem.forward_only
        self._is_gradient = [node.kind is Kind.G for node in passes]
        self._first_forward = keys[0, Kind.F]
        self._missing = [len(before) for before in network.inputs] * count
        self._arrived_at = [0.0] * (size * count)  # when the last input of a node arrives

    def run(self) -> Orders:
        """Place every pass and return the orders. Raises DeadlockError if the base order blocks."""
        network, preference = self._network, self._preference
        push, pop = heapq.heappush, heapq.heappop
        size, num_passes, num_ranks = network.size, network.num_passes, network.num_ranks
        lanes, seconds, followers = network.lanes, network.seconds, network.followers
        missing, arrived_at, left_of = self._missing, self._arrived_at, self._left
        changes, most_in_flight, in_flight = self._change, self._most_in_flight, [0.0] * num_ranks
        held_shards, held_gradients = [0] * num_ranks, [0] * num_ranks
        max_held, patience = preference.max_held, preference.patience
        most_shards = _NEVER if self._forward_only else max_held
        eager = [_SLOTS[kind] for kind in preference.eager]
        fillers = [slot for slot in _FILLERS if slot not in eager]
        free_at = [0.0] * network.num_lanes
        orders: Orders = [[] for _ in range(num_ranks)]
        embedded = EMBEDDINGS_AHEAD * size  # every E with an id from here on runs too far ahead
        # A wake is a time at which a rank may be able to choose a pass.
        wakes = [(0.0, rank) for rank in range(num_ranks)]
        while wakes:
            now, rank = pop(wakes)
            if now < free_at[rank]:
                continue  # the rank has taken a pass since this wake was pushed
            # Choose the `slot` from which it takes its next pass. What is eager goes first, then T
            # and G where too many wait for theirs, W where too much is in flight, the base order,
            # and the fillers. If there is none, it chooses again at `later`, or if that is never,
            # when another rank has made progress.
            left, shards, later = left_of[rank], held_shards[rank], _NEVER
            is_full = shards >= most_shards  # no S before a T
            for slot in eager:
                if not (numbers := left[slot]) or missing[number := numbers[-1]]:
                    continue
                if (slot == _E and number >= embedded) or (slot == _S and is_full):
                    continue
                at = arrived_at[number]
                if at <= now:
                    break
                if at < later:
                    later = at
            else:
                slot, base_at = -1, _NEVER
                if numbers := left[_BASE]:
                    number = numbers[-1]
                    if left[_W] and in_flight[rank] + changes[number % size] > most_in_flight[rank]:
                        # F must wait for W, or I where W frees what it keeps.
                        number = left[_W][-1]
                        if not missing[number] and arrived_at[number] <= now:
                            slot = _W
                    elif not missing[number]:
                        base_at = arrived_at[number]
                        if base_at <= now:
                            slot = _BASE
                        elif base_at < later:
                            later = base_at
                # Too many gradients wait for their G, or shards for their T.
                if held_gradients[rank] >= max_held and (numbers := left[_G]):
                    number = numbers[-1]
                    if not missing[number] and arrived_at[number] <= now:
                        slot = _G
                if shards >= max_held and (numbers := left[_T]):
                    number = numbers[-1]
                    if not missing[number] and arrived_at[number] <= now:
                        slot = _T
                if slot < 0:
                    for slot in fillers:
                        if not (numbers := left[slot]) or missing[number := numbers[-1]]:
                            continue
                        if (slot == _E and number >= embedded) or (slot == _S and is_full):
                            continue
                        at = arrived_at[number]
                        if at <= now:
                            took = seconds[number % size]
                            if now + took - base_at <= patience * took:
                                break
                        elif at < later:
                            later = at
                    else:
                        if later < _NEVER:
                            push(wakes, (later, rank))
                        continue
            number = left[slot].pop()
            orders[rank].append(number)
            k = number % size
            in_flight[rank] += changes[k]
            if slot == _S:
                held_shards[rank] += 1
            elif slot == _T:
                held_shards[rank] -= 1
            elif slot == _G:
                held_gradients[rank] -= 1
            end = free_at[rank] = now + seconds[k]
            push(wakes, (end, rank))
            if k == self._first_forward:
                embedded += size
                for other in range(num_ranks):
                    if free_at[other] <= now:
                        push(wakes, (now, other))
            # Deliver the result, and run the collectives that it completes.
            base, delivered = number - k, [(k, end)]
            while delivered:
                node, end = delivered.pop()
                for step, travel in followers[node]:
                    follower, arrival = base + step, end + travel
                    if arrival > arrived_at[follower]:
                        arrived_at[follower] = arrival
                    missing[follower] -= 1
                    if missing[follower]:
                        continue
                    lane, arrival = lanes[step], arrived_at[follower]
                    if step >= num_passes:
                        if free_at[lane] > arrival:
                            arrival = free_at[lane]
                        free_at[lane] = arrival = arrival + seconds[step]
                        delivered.append((step, arrival))
                        continue
                    if self._is_gradient[step]:
                        held_gradients[lane] += 1
                        arrival = now  # an earlier gradient may have to go first now
                    if free_at[lane] <= now:  # else the rank has a wake at the end of its pass
                        push(wakes, (arrival if arrival > now else now, lane))
        waiting = [str(network.node(left[_BASE][-1])) for left in left_of if left[_BASE]]
        if waiting:
            raise DeadlockError(
                f"the base order blocks: {', '.join(waiting)} wait for passes behind them"
            )
        return orders
