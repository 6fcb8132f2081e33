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
    in `run`, so its loop reads local variables and calls little.
    """

    def __init__(self, network: Network, *, backwards: bool) -> None:
        """Prepare runs of `network`. With `backwards` it is a reversed one."""
        self.network, self.backwards = network, backwards
        passes = [node for node in network.nodes if isinstance(node, Pass)]
        self.of_stage = [not item.kind.is_vocabulary for item in passes]
        self.kinds: list[list[int]] = [[] for _ in range(network.num_ranks)]
        self.shard_bytes = [0.0] * network.num_ranks  # what one shard keeps from S to T
        for k, item in enumerate(passes):
            rank = network.lanes[k]
            self.kinds[rank].append(k)
            if item.kind.is_vocabulary:
                self.shard_bytes[rank] = max(self.shard_bytes[rank], network.byte_change[k])
        self.missing = [len(before) for before in network.inputs] * network.num_microbatches
        self.is_leader = [False] * network.size
        for leader in network.leaders.values():
            self.is_leader[leader] = True

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
        network, push, pop = self.network, heapq.heappush, heapq.heappop
        size, count, num_ranks = network.size, network.num_microbatches, network.num_ranks
        num_passes, lanes, seconds = network.num_passes, network.lanes, network.seconds
        followers, change_of, of_stage = network.followers, network.byte_change, self.of_stage
        state = _State(self, orders, expected, patience, frozen)
        missing, arrived_at, placed = state.missing, state.arrived_at, state.placed
        upcoming, taken, overtaker = state.upcoming, state.taken, state.overtaker
        shard_bytes, is_leader = self.shard_bytes, self.is_leader
        starts, free_at = [0.0] * len(missing), [0.0] * network.num_lanes
        room, shards_held = [cap * LOOSE for cap in caps], [0.0] * num_ranks  # in bytes
        stride = -size if self.backwards else size
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
            number, free = order[at], room[rank]
            k = number % size
            change = change_of[k]
            # A stage leaves room for one shard. Else the S that all ranks wait for might never fit.
            spared = shard_bytes[rank] - shards_held[rank]
            if spared < 0.0:
                spared = 0.0
            fits = change <= 0.0 or change + (spared if of_stage[k] else 0.0) <= free
            if not fits or missing[number] or arrived_at[number] > now:
                head, number = number, overtaker(rank, now, at, fits, free, spared)
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


class _State:
    """The state of a run: its passes, and the choice of one that overtakes.

    By ids of nodes: `missing` counts the inputs that have not been placed, `arrived_at` is when the
    last of the others arrives, `taken` says whether the pass has run. By kinds of passes: `placed`
    counts those that have run, `upcoming` is the next one, -1 after the last.
    """

    def __init__(
        self,
        filler: Filler,
        orders: Orders,
        expected: Sequence[float],
        patience: float,
        frozen: Sequence[tuple[int, int]] | None,
    ) -> None:
        network = filler.network
        size, count = network.size, network.num_microbatches
        self._filler, self._orders, self._expected, self._frozen = filler, orders, expected, frozen
        self._hurried = [  # how long before the next pass is due a filler must start
            duration * (1 - patience) for duration in network.seconds
        ]
        self._reach = 4 * network.num_ranks + 20  # how many places ahead a pass may be
        self._place_of = [0] * (size * count)
        for order in orders:
            for place, number in enumerate(order):
                self._place_of[number] = place
        self.missing, self.arrived_at = filler.missing[:], [0.0] * (size * count)
        self.taken, self.placed = bytearray(size * count), [0] * size
        first = (count - 1) * size if filler.backwards else 0
        self.upcoming = list(range(first, first + size))

    def overtaker(
        self, rank: int, now: float, at: int, fits: bool, free: float, spared: float
    ) -> int:
        """Return the nearest pass that may overtake the one at place `at` of a rank, or -1.

        `fits`: whether the overtaken pass fits into the memory. `free`: the bytes that the rank has
        left, of which a stage leaves the bytes `spared`.
        """
        filler, missing, arrived_at = self._filler, self.missing, self.arrived_at
        order, place_of, hurried = self._orders[rank], self._place_of, self._hurried
        placed, upcoming, leaders = self.placed, self.upcoming, filler.network.leaders
        of_stage, change_of = filler.of_stage, filler.network.byte_change
        head, due = order[at], float("inf")
        if fits:
            due = self._expected[head] if missing[head] else arrived_at[head]
            if due < now:
                due = now
        found, nearest = -1, at + self._reach
        if self._frozen is not None:
            since, until = self._frozen[rank]
            if at < since < nearest:
                nearest = since
            elif since <= at < until:
                return -1
        for kind in filler.kinds[rank]:
            other = upcoming[kind]
            if (
                other < 0
                or missing[other]
                or arrived_at[other] > now
                or now + hurried[kind] > due
                or place_of[other] >= nearest
                or (kind in leaders and placed[kind] >= placed[leaders[kind]] + EMBEDDINGS_AHEAD)
            ):
                continue
            place, change = place_of[other], change_of[kind]
            if change > 0.0:
                if not fits:
                    # The next pass waits for bytes to be freed. A stage must not take them.
                    if of_stage[kind] or change > free:
                        continue
                else:
                    wanted = change + (spared if of_stage[kind] else 0.0)
                    if not self._leaves_room(order, at, place, wanted, free):
                        continue
            found, nearest = other, place
        return found

    def _leaves_room(
        self, order: list[int], at: int, place: int, wanted: float, free: float
    ) -> bool:
        """Return whether the passes from `at` to before `place` still fit beside `wanted` bytes."""
        if wanted > free:
            return False
        taken, change_of = self.taken, self._filler.network.byte_change
        size = self._filler.network.size
        for overtaken in order[at:place]:
            if not taken[overtaken]:
                wanted += change_of[overtaken % size]
                if wanted > free:
                    return False
        return True
