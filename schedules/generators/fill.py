"""Gap filling: one run of time over all ranks, in which passes overtake others that must wait.

A rank may find that its next pass is not ready or does not fit into its memory. Then it takes the
first later pass that is ready, fits, and does not delay the next one. Such an order cannot
deadlock, because a pass is only taken after its inputs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from schedules.ir import Pass
from schedules.network import EMBEDDINGS_AHEAD, Network, Orders

LOOSE = 1 + 1e-9  # factor on caps: sums of bytes in another order differ in the last digit


@dataclass(frozen=True, slots=True)
class Filled:
    """The orders of a run, and its times in seconds.

    `starts` has the start of every pass by its id. `makespan` is that of the run.
    """

    orders: Orders
    starts: list[float]
    makespan: float


class Filler:
    """A network in one direction of time, prepared for many runs.

    The microbatches of a kind run in their order, with reversed time in the opposite one. So of
    every kind of pass only the next microbatch can be taken. Searches spend most of their time
    in `run`, so it reads local variables and calls nothing.
    """

    def __init__(self, network: Network, *, backwards: bool) -> None:
        """Prepare runs of `network`. With `backwards` it is a reversed one."""
        self._network, self._backwards = network, backwards
        passes = [node for node in network.nodes if isinstance(node, Pass)]
        self._of_stage = [not item.kind.is_vocabulary for item in passes]
        self._kinds: list[list[int]] = [[] for _ in range(network.num_ranks)]
        self._shard_bytes = [0.0] * network.num_ranks  # what one shard keeps from S to T
        for k, item in enumerate(passes):
            rank = network.lanes[k]
            self._kinds[rank].append(k)
            if item.kind.is_vocabulary:
                self._shard_bytes[rank] = max(self._shard_bytes[rank], network.byte_change[k])
        self._missing = [len(before) for before in network.inputs] * network.num_microbatches
        self._is_leader = [False] * network.size
        for leader in network.leaders.values():
            self._is_leader[leader] = True

    def run(
        self,
        orders: Orders,
        expected: Sequence[float],
        caps: Sequence[float],
        patience: float,
        frozen: Sequence[tuple[int, int]] | None = None,
    ) -> Filled | None:
        """Return new orders; None if the caps leave a rank no pass to take.

        `orders` and the start times `expected` of all nodes in them are in the direction of time
        of this network. `caps[r]` bounds what rank r keeps. A filler may delay the next pass by
        the fraction `patience` of its own duration. No pass of rank r moves into, out of or over
        its places from `frozen[r][0]` to before `frozen[r][1]`.
        """
        network, push, pop = self._network, heapq.heappush, heapq.heappop
        size, count, num_ranks = network.size, network.num_microbatches, network.num_ranks
        num_passes, lanes, seconds = network.num_passes, network.lanes, network.seconds
        followers, change_of, leaders = network.followers, network.byte_change, network.leaders
        of_stage, shard_bytes, kinds = self._of_stage, self._shard_bytes, self._kinds
        is_leader, total = self._is_leader, size * count
        hurried = [duration * (1 - patience) for duration in seconds]  # must end before it is due
        reach = 4 * num_ranks + 20  # how many places ahead a pass may be
        missing, arrived_at, starts = self._missing[:], [0.0] * total, [0.0] * total
        free_at, room = [0.0] * network.num_lanes, [cap * LOOSE for cap in caps]
        shards_held, placed = [0.0] * num_ranks, [0] * size  # the former in bytes
        position, taken = [0] * total, bytearray(total)
        for order in orders:
            for place, number in enumerate(order):
                position[number] = place
        stride = -size if self._backwards else size
        first = (count - 1) * size if self._backwards else 0
        upcoming = list(range(first, first + size))  # the next microbatch of every kind
        heads, ends = [0] * num_ranks, [len(order) for order in orders]
        filled: Orders = [[] for _ in orders]
        makespan = 0.0
        # A wake is a time at which a rank may be able to take a pass: the next of its order if that
        # is ready and fits, or else one that overtakes it.
        wakes = [(0.0, rank) for rank in range(num_ranks)]
        while wakes:
            now, rank = pop(wakes)
            if now < free_at[rank]:
                continue
            order, at, end_of_order = orders[rank], heads[rank], ends[rank]
            while at < end_of_order and taken[order[at]]:
                at += 1
            heads[rank] = at
            if at == end_of_order:
                continue
            head, free = order[at], room[rank]
            k = head % size
            change = change_of[k]
            # A stage leaves room for one shard. Else the S that all ranks wait for might never fit.
            spared = shard_bytes[rank] - shards_held[rank]
            if spared < 0.0:
                spared = 0.0
            fits = change <= 0.0 or change + (spared if of_stage[k] else 0.0) <= free
            number = head
            if not fits or missing[head] or arrived_at[head] > now:
                # The next pass cannot run now. Look for the nearest one that may overtake it.
                due = float("inf")
                if fits:
                    due = expected[head] if missing[head] else arrived_at[head]
                    if due < now:
                        due = now
                number, nearest = -1, at + reach
                if frozen is not None:
                    since, until = frozen[rank]
                    if at < since < nearest:
                        nearest = since
                    elif since <= at < until:
                        nearest = at
                for kind in kinds[rank]:
                    other = upcoming[kind]
                    if (
                        other < 0
                        or missing[other]
                        or arrived_at[other] > now
                        or now + hurried[kind] > due
                        or position[other] >= nearest
                        or (
                            kind in leaders
                            and placed[kind] >= placed[leaders[kind]] + EMBEDDINGS_AHEAD
                        )
                    ):
                        continue
                    place, change = position[other], change_of[kind]
                    if change > 0.0:
                        if not fits:
                            # The next pass waits for bytes to be freed. A stage must not take them.
                            if of_stage[kind] or change > free:
                                continue
                        else:
                            kept = most_kept = 0.0  # of the overtaken passes
                            for overtaken in order[at:place]:
                                if not taken[overtaken]:
                                    kept += change_of[overtaken % size]
                                    if kept > most_kept:
                                        most_kept = kept
                            if change + most_kept + (spared if of_stage[kind] else 0.0) > free:
                                continue
                    number, nearest = other, place
                if number < 0:
                    if not missing[head] and arrived_at[head] > now:
                        push(wakes, (arrived_at[head], rank))
                    continue
                k = number % size
                change = change_of[k]
            taken[number] = 1
            filled[rank].append(number)
            starts[number] = now
            room[rank] = free - change
            if not of_stage[k]:
                shards_held[rank] += change
            placed[k] += 1
            upcoming[k] = number + stride if placed[k] < count else -1
            end = free_at[rank] = now + seconds[k]
            if end > makespan:
                makespan = end
            push(wakes, (end, rank))
            # Deliver the result, and run the collectives that it completes.
            base, delivered = number - k, [(k, end)]
            while delivered:
                node, end = delivered.pop()
                for step, travel in followers[node]:
                    later, arrival = base + step, end + travel
                    if arrival > arrived_at[later]:
                        arrived_at[later] = arrival
                    missing[later] -= 1
                    if missing[later]:
                        continue
                    lane, arrival = lanes[step], arrived_at[later]
                    if step >= num_passes:
                        if free_at[lane] > arrival:
                            arrival = free_at[lane]
                        free_at[lane] = arrival = arrival + seconds[step]
                        if arrival > makespan:
                            makespan = arrival
                        delivered.append((step, arrival))
                    elif arrival > free_at[lane] or free_at[lane] <= now:
                        push(wakes, (arrival if arrival > now else now, lane))
                    # Else the rank is busy and has a wake at the end of its pass.
            if is_leader[k]:
                for other in range(num_ranks):
                    if free_at[other] <= now:
                        push(wakes, (now, other))
        if min(placed[:num_passes]) < count:
            return None
        return Filled(filled, starts, makespan)
