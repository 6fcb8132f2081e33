"""Fill the gaps of a schedule, above all those of its warm-up and cool-down, within a cap on memory.

Forwards in time: a rank whose next pass is not ready, or does not fit into its memory, takes the first pass behind it that
is ready, fits, and does not hold the next one up.  The same with time reversed closes the gaps of the cool-down.  Both
directions alternate while the makespan falls.  An order made in this way cannot deadlock: a pass is taken after its inputs.

The steady state, in which a list scheduler would lose most, is inherited: the order changes only where a rank would wait.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from random import Random

from schedules.generators.clock import Clock
from schedules.ir import Pass
from schedules.network import EMBEDDINGS_AHEAD, Network, Orders
from schedules.simulate import peak, sweep

_PATIENCE = (0.35, 0.0, 0.7, 1.0)  # the part of its own duration by which a filler may hold the next pass up
_KICK_EFFORT = 20_000  # nodes placed after each kick
LOOSE = 1 + 1e-9  # sums of bytes in another order differ in the last digit


@dataclass(frozen=True, slots=True)
class Refined:
    """Orders, how long they take, and by how many bytes the worst rank exceeds its cap (0: none does)."""

    orders: Orders
    makespan: float
    excess: float

    @property
    def quality(self) -> tuple[float, float]:
        """Smaller is better: first the cap, then the time."""
        return self.excess, self.makespan


def refine(network: Network, orders: Orders, caps: list[float], budget: int) -> Refined:
    """`orders` improved until nothing helps or `budget` nodes were placed.

    `caps[r]` bounds what rank r keeps, in the unit of `network.byte_change`.  Orders that exceed it are brought below where
    that is possible; the result never exceeds it by more than `orders` do.
    """
    backwards = network.reversed()
    best = judge(network, orders, caps)
    improved = True
    while improved and budget > 0:
        improved = False
        for patience in _PATIENCE:
            for turns in ((network, backwards), (backwards, network)):
                if budget <= 0:
                    break
                budget -= 2 * network.size * network.num_microbatches
                filled = _both_ways(network, turns, best.orders, caps, patience)
                found = None if filled is None else judge(network, filled, caps)
                if found is not None and found.quality < (best.excess, best.makespan * (1 - 1e-9)):
                    best, improved = found, True
    return best


def search(network: Network, start: Refined, caps: list[float], budget: int, enough: float) -> Refined:
    """`start` improved by kicks: squeezed under a lower cap, which stirs the order, and refined again under the true one.

    It ends when `budget` nodes were placed or a makespan of `enough` is reached.  The kicks come from a fixed seed: every rank
    finds the same.
    """
    backwards, nodes = network.reversed(), network.size * network.num_microbatches
    best, random = start, Random(0)
    for _ in range(budget // (2 * nodes + max(2 * nodes, _KICK_EFFORT))):
        if best.excess == 0 and best.makespan <= enough:
            break
        squeeze, unequal = random.uniform(0.8, 1.0), random.random() < 0.25
        squeezed = [cap * (random.uniform(0.85, 1.0) if unequal else squeeze) for cap in caps]
        turns = (network, backwards) if random.random() < 0.5 else (backwards, network)
        stirred = _both_ways(network, turns, best.orders, squeezed, random.choice(_PATIENCE[:3]))
        if stirred is not None:
            best = min(refine(network, stirred, caps, _KICK_EFFORT), best, key=lambda found: found.quality)
    return best


def judge(network: Network, orders: Orders, caps: list[float]) -> Refined:
    """How good `orders` are."""
    over = [peak(network.byte_changes(order)) - cap * LOOSE for order, cap in zip(orders, caps, strict=True)]
    return Refined(orders, sweep(network, orders).makespan, max(0.0, *over))


def _both_ways(
    network: Network, turns: tuple[Network, Network], orders: Orders, caps: list[float], patience: float
) -> Orders | None:
    for direction in turns:
        backwards = direction is not network
        turned = [order[::-1] for order in orders] if backwards else orders
        filled = _Filler(direction, turned, caps, patience).run()
        if filled is None:
            return None
        orders = [order[::-1] for order in filled] if backwards else filled
    return orders


class _Filler:
    """One run of time over all ranks."""

    def __init__(self, network: Network, orders: Orders, caps: list[float], patience: float) -> None:
        self._network, self._caps, self._patience = network, caps, patience
        self._expected = sweep(network, orders).start
        self._remaining = [order[::-1] for order in orders]  # the next pass is the last of the list
        self._reach = 4 * network.num_ranks + 20  # passes behind the next one that are looked at
        self._clock = Clock(network)
        self._room = [cap * LOOSE for cap in caps]
        self._placed = [0] * network.size
        passes = [node for node in network.nodes if isinstance(node, Pass)]
        self._of_stage = [not item.kind.is_vocabulary for item in passes]
        self._shard_bytes = [0.0] * network.num_ranks  # what one shard keeps
        for k, item in enumerate(passes):
            if item.kind.is_vocabulary:
                self._shard_bytes[network.lanes[k]] = max(self._shard_bytes[network.lanes[k]], network.byte_change[k])
        self._shards_held = [0.0] * network.num_ranks  # in bytes

    def run(self) -> Orders | None:
        """The new orders; None where the caps leave no pass to take."""
        network, remaining, clock = self._network, self._remaining, self._clock
        wakes = [(0.0, rank) for rank in range(network.num_ranks)]
        filled: Orders = [[] for _ in remaining]
        leaders = set(network.leaders.values())
        while wakes:
            now, rank = heapq.heappop(wakes)
            queue = remaining[rank]
            if now < clock.free_at[rank] or not queue:
                continue
            place = self._choose(rank, now)
            if place is None:
                head = queue[-1]
                if not clock.missing[head] and clock.arrived_at[head] > now:
                    heapq.heappush(wakes, (clock.arrived_at[head], rank))
                continue
            number = queue.pop(place)
            filled[rank].append(number)
            k = number % network.size
            self._room[rank] -= network.byte_change[k]
            if not self._of_stage[k]:
                self._shards_held[rank] += network.byte_change[k]
            readied = clock.run(number, now)
            heapq.heappush(wakes, (clock.free_at[rank], rank))
            for ready in readied:
                lane = network.lanes[ready % network.size]
                heapq.heappush(wakes, (max(clock.arrived_at[ready], clock.free_at[lane]), lane))
            self._placed[k] += 1
            if k in leaders:
                for other in range(network.num_ranks):
                    heapq.heappush(wakes, (max(now, clock.free_at[other]), other))
        return None if any(remaining) else filled

    def _choose(self, rank: int, now: float) -> int | None:
        """The place in the rank's queue of the pass to run now; None to wait."""
        missing, arrived_at, size = self._clock.missing, self._clock.arrived_at, self._network.size
        change_of, seconds = self._network.byte_change, self._network.seconds
        queue, room = self._remaining[rank], self._room[rank]
        last = len(queue) - 1
        head = queue[last]
        spared = max(0.0, self._shard_bytes[rank] - self._shards_held[rank])  # or the S that all wait for might never fit
        needed = change_of[head % size] + (spared if self._of_stage[head % size] else 0.0)
        fits = change_of[head % size] <= 0.0 or needed <= room
        if fits and not missing[head] and arrived_at[head] <= now:
            return last
        due = max(now, self._expected[head] if missing[head] else arrived_at[head]) if fits else float("inf")
        kept = most_kept = 0.0  # by the passes overtaken
        for place in range(last, max(-1, last - self._reach), -1):
            number = queue[place]
            k = number % size
            change = change_of[k]
            if (
                not missing[number]
                and arrived_at[number] <= now
                and now + seconds[k] * (1 - self._patience) <= due
                and self._may_lead(k)
            ):
                if change <= 0.0:
                    return place
                if not fits:  # what is overtaken waits for bytes to be freed; a stage must not take them instead
                    if change <= room and not self._of_stage[k]:
                        return place
                elif change + most_kept + (spared if self._of_stage[k] else 0.0) <= room:
                    return place
            kept += change
            most_kept = max(most_kept, kept)
        return None

    def _may_lead(self, k: int) -> bool:
        leader = self._network.leaders.get(k)
        return leader is None or self._placed[k] < self._placed[leader] + EMBEDDINGS_AHEAD
