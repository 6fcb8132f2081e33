"""Refinement: it fills the gaps of a schedule, mostly of warm-up and cool-down, under a memory cap.

Forward in time, a rank may find that its next pass is not ready or does not fit into its memory.
Then it takes the first later pass that is ready, fits, and does not delay the next one. The same in
reversed time closes the gaps of the cool-down. Both directions alternate while the makespan falls.
Such an order cannot deadlock, because a pass is only taken after its inputs.

The order changes only where a rank would wait. So the steady state, in which a list scheduler would
lose most, stays as it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from schedules.generators.clock import Clock
from schedules.ir import Pass
from schedules.network import EMBEDDINGS_AHEAD, Network, Orders
from schedules.simulate import peak, sweep

# Values to try: the fraction of its own duration by which a filler may delay the next pass.
_PATIENCE = (0.35, 0.0, 0.7, 1.0)
_KICK_EFFORT = 20_000  # nodes placed after each kick
LOOSE = 1 + 1e-9  # factor on caps: sums of bytes in another order differ in the last digit

# The start times of all nodes for given orders, in forward (False) and in reversed (True) time.
_Starts = dict[bool, list[float]]


@dataclass(frozen=True, slots=True)
class Refined:
    """Orders of passes, with their makespan in seconds and the bytes above the cap.

    `excess` is that of the rank that exceeds its cap most; 0 if no rank does.
    """

    orders: Orders
    makespan: float
    excess: float

    @property
    def quality(self) -> tuple[float, float]:
        """A key to compare orders by: first the excess, then the makespan. Smaller is better."""
        return self.excess, self.makespan


# Called with the best orders so far; returns whether the search goes on.
GoesOn = Callable[[Refined], bool]


def _to_the_end(best: Refined) -> bool:
    return True


def refine(
    network: Network,
    orders: Orders,
    caps: list[float],
    budget: int,
    goes_on: GoesOn = _to_the_end,
) -> Refined:
    """Return `orders` improved until nothing helps or `budget` nodes were placed.

    `caps[r]` bounds what rank r keeps, in the unit of `network.byte_change`. Orders above a cap are
    brought below it if possible. The result never has a larger excess than `orders`. `goes_on` may
    end it earlier.
    """
    backwards, nodes = network.reversed(), network.size * network.num_microbatches
    best = judge(network, orders, caps)
    known: _Starts = {}
    improved = True
    while improved and budget > 0:
        improved = False
        for patience in _PATIENCE:
            for turns in ((network, backwards), (backwards, network)):
                if budget <= 0 or not goes_on(best):
                    return best
                budget -= 2 * nodes
                filled = _both_ways(network, turns, best.orders, caps, patience, known)
                found = (
                    None
                    if filled is None or filled is best.orders
                    else judge(network, filled, caps)
                )
                if found is not None and found.quality < (best.excess, best.makespan * (1 - 1e-9)):
                    best, known, improved = found, {}, True
    return best


def search(
    network: Network,
    start: Refined,
    caps: list[float],
    budget: int,
    enough: float,
    goes_on: GoesOn = _to_the_end,
) -> Refined:
    """Return `start` improved by kicks.

    A kick refines the order under lower caps, which changes the order, and then under the true
    caps. The search ends when `budget` nodes were placed or a makespan of `enough` is reached. The
    kicks come from a fixed seed, so that every rank finds the same schedule. `goes_on` may end it
    earlier.
    """
    backwards, nodes = network.reversed(), network.size * network.num_microbatches
    best, known, random = start, _Starts(), Random(0)
    for _ in range(budget // (2 * nodes + max(2 * nodes, _KICK_EFFORT))):
        if (best.excess == 0 and best.makespan <= enough) or not goes_on(best):
            break
        squeeze, unequal = random.uniform(0.8, 1.0), random.random() < 0.25
        squeezed = [cap * (random.uniform(0.85, 1.0) if unequal else squeeze) for cap in caps]
        turns = (network, backwards) if random.random() < 0.5 else (backwards, network)
        stirred = _both_ways(
            network, turns, best.orders, squeezed, random.choice(_PATIENCE[:3]), known
        )
        if stirred is None:
            continue
        found = refine(network, stirred, caps, _KICK_EFFORT)
        if found.quality <= best.quality:
            best, known = found, {}
    return best


def judge(network: Network, orders: Orders, caps: list[float]) -> Refined:
    """Return `orders` with their makespan and excess."""
    over = [
        peak(network.byte_changes(order)) - cap * LOOSE
        for order, cap in zip(orders, caps, strict=True)
    ]
    return Refined(orders, sweep(network, orders).makespan, max(0.0, *over))


def _both_ways(
    network: Network,
    turns: tuple[Network, Network],
    given: Orders,
    caps: list[float],
    patience: float,
    known: _Starts,
) -> Orders | None:
    """Return the orders `given` after filling gaps in one direction, then in the other.

    `turns` are the network in forward and in reversed time, in the order to try.

    The result is `given` itself if no pass moves, and None if the caps leave a rank no pass to
    take. `known` caches the start times of `given` between calls.
    """
    orders = given
    for direction in turns:
        backwards = direction is not network
        turned = [order[::-1] for order in orders] if backwards else orders
        starts = known.get(backwards) if orders is given else None
        if starts is None:
            starts = sweep(direction, turned).start
            if orders is given:
                known[backwards] = starts
        filled = _Filler(direction, turned, starts, caps, patience).run()
        if filled is None:
            return None
        if filled == turned:
            continue
        orders = [order[::-1] for order in filled] if backwards else filled
        if orders == given:
            orders = given
    return orders


class _Filler:
    """One run of time over all ranks, in which gaps are filled.

    Planning spends most of its time in `run` and `_overtaking`, so they read local variables.
    """

    def __init__(
        self,
        network: Network,
        orders: Orders,
        expected: list[float],
        caps: list[float],
        patience: float,
    ) -> None:
        """Prepare a run; `expected` are the start times of all nodes in `orders`."""
        self._network, self._expected = network, expected
        self._remaining = [order[::-1] for order in orders]  # the next pass is the last of the list
        self._reach = 4 * network.num_ranks + 20  # how many passes, from the next one, may be taken
        self._room = [cap * LOOSE for cap in caps]
        self._placed = [0] * network.size
        passes = [node for node in network.nodes if isinstance(node, Pass)]
        self._of_stage = [not item.kind.is_vocabulary for item in passes]
        self._shard_bytes = [0.0] * network.num_ranks  # what one shard keeps from S to T
        for k, item in enumerate(passes):
            if item.kind.is_vocabulary:
                self._shard_bytes[network.lanes[k]] = max(
                    self._shard_bytes[network.lanes[k]], network.byte_change[k]
                )
        self._shards_held = [0.0] * network.num_ranks  # in bytes
        # The part of a filler that must end before the next pass is due.
        self._hurried = [seconds * (1 - patience) for seconds in network.seconds]
        self._clock = Clock(network)

    def run(self) -> Orders | None:
        """Return the new orders; None if the caps leave a rank no pass to take."""
        network, remaining, clock = self._network, self._remaining, self._clock
        free_at, missing, arrived_at, run = (
            clock.free_at,
            clock.missing,
            clock.arrived_at,
            clock.run,
        )
        size, lanes, change_of, of_stage = (
            network.size,
            network.lanes,
            network.byte_change,
            self._of_stage,
        )
        room, placed, overtaking = self._room, self._placed, self._overtaking
        shards_held, shard_bytes = self._shards_held, self._shard_bytes
        push, pop, num_ranks = heapq.heappush, heapq.heappop, network.num_ranks
        wakes = [(0.0, rank) for rank in range(num_ranks)]
        filled: Orders = [[] for _ in remaining]
        leaders = set(network.leaders.values())
        # A wake is a time at which a rank may be able to take a pass: the next of its order if that
        # is ready and fits, or else one that overtakes it.
        while wakes:
            now, rank = pop(wakes)
            queue = remaining[rank]
            if now < free_at[rank] or not queue:
                continue
            head = queue[-1]
            k = head % size
            # A stage leaves room for one shard. Else the S that all ranks wait for might never fit.
            spared = max(0.0, shard_bytes[rank] - shards_held[rank])
            fits = (
                change_of[k] <= 0.0 or change_of[k] + (spared if of_stage[k] else 0.0) <= room[rank]
            )
            if fits and not missing[head] and arrived_at[head] <= now:
                number = queue.pop()
            else:
                place = overtaking(rank, now, fits, spared)
                if place is None:
                    if not missing[head] and arrived_at[head] > now:
                        push(wakes, (arrived_at[head], rank))
                    continue
                number = queue.pop(place)
                k = number % size
            filled[rank].append(number)
            room[rank] -= change_of[k]
            if not of_stage[k]:
                shards_held[rank] += change_of[k]
            readied = run(number, now)
            push(wakes, (free_at[rank], rank))
            # A busy rank already has a wake at the end of its pass.
            for ready in readied:
                lane = lanes[ready % size]
                if arrived_at[ready] > free_at[lane]:
                    push(wakes, (arrived_at[ready], lane))
                elif free_at[lane] <= now:
                    push(wakes, (free_at[lane], lane))
            placed[k] += 1
            if k in leaders:
                for other in range(num_ranks):
                    if free_at[other] <= now:
                        push(wakes, (now, other))
        return None if any(remaining) else filled

    def _overtaking(self, rank: int, now: float, fits: bool, spared: float) -> int | None:
        """Return the index in the rank's queue of a pass to run before the next one; None to wait.

        The next pass cannot run now. `fits`: its bytes fit under the cap. A pass of a stage leaves
        `spared` bytes for a shard.
        """
        clock, leaders = self._clock, self._network.leaders
        missing, arrived_at, hurried = clock.missing, clock.arrived_at, self._hurried
        change_of, of_stage = self._network.byte_change, self._of_stage
        queue, room, size = self._remaining[rank], self._room[rank], len(self._placed)
        last = len(queue) - 1
        head = queue[last]
        due = (
            max(now, self._expected[head] if missing[head] else arrived_at[head])
            if fits
            else float("inf")
        )
        kept = most_kept = 0.0  # bytes that the overtaken passes will keep, and their peak
        for place in range(last, max(-1, last - self._reach), -1):
            number = queue[place]
            k = number % size
            change = change_of[k]
            if (
                not missing[number]
                and arrived_at[number] <= now
                and now + hurried[k] <= due
                and (k not in leaders or self._may_lead(k))
            ):
                if change <= 0.0:
                    return place
                if not fits:
                    # The next pass waits for bytes to be freed. A stage must not take them.
                    if change <= room and not of_stage[k]:
                        return place
                elif change + most_kept + (spared if of_stage[k] else 0.0) <= room:
                    return place
            kept += change
            if kept > most_kept:
                most_kept = kept
        return None

    def _may_lead(self, k: int) -> bool:
        """Return whether one more pass of node `k` stays within EMBEDDINGS_AHEAD of its leader."""
        return self._placed[k] < self._placed[self._network.leaders[k]] + EMBEDDINGS_AHEAD
