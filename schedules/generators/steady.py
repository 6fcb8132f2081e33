"""Steady states for little memory: an order of the passes of one period, repeated for all others.

In a steady state every rank runs each of its passes once per period, each for another microbatch.
The order within a period fixes what a rank keeps, and the rate: the mean time along the slowest
circle of passes that wait for each other (as in software pipelining; Rau, MICRO 1994). The search
starts from a V-shaped block, which keeps little but was made for equal passes without vocabulary.
Passes on the slowest circle change places with their neighbours, from a fixed seed, as long as no
rank keeps more than its cap. It looks at one period only, so it is fast for any step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from schedules.generators.extend import Repeat
from schedules.generators.order import topological
from schedules.generators.v_shape import INTERVAL, Block
from schedules.ir import Kind, Pass
from schedules.network import Network, Orders
from schedules.problem import Problem

_TINY = 1e-9
_PERIODS = 24  # are simulated, and the rate is measured over the last of them
_MEASURED = 8
_HEAT = 0.02  # how much slower a change may make a period, in mean passes, at the beginning
_PLACES = (1, 1, 2, 2, 3, 4)  # by which a pass may move
_PENALTY = 1.0  # of a pass's bytes above a cap, in mean passes per period

# What a node waits for: another node, the seconds from its start, the periods between the two.
_Wait = tuple[int, float, int]


class Ring:
    """The order of the passes of every rank within a period.

    `words[r]` are the passes of rank r in a period. Microbatch i runs pass k in period
    `turn[k]` + i.
    """

    def __init__(self, network: Network, words: list[list[int]], turn: list[int]) -> None:
        self._network, self.words, self.turn = network, words, turn
        self._collectives = [k for k in topological(network) if k >= network.num_passes]

    @classmethod
    def of_block(cls, network: Network, problem: Problem, block: Block) -> Ring:
        """Return the ring of a V-shaped block, with the vocabulary passes where they are due."""
        starts = block.starts(problem.layout.num_ranks)
        at: dict[tuple[int, Kind], float] = {}
        for rank, (f0, f1, i1, i0) in enumerate(starts):
            first, second = problem.layout.stages_of(rank)
            at[first, Kind.F], at[second, Kind.F] = f0, f1
            at[second, Kind.I], at[second, Kind.W] = i1, i1 + 1
            at[first, Kind.I], at[first, Kind.W] = i0, i0 + 1
        begin, end, back = starts[0][0], starts[0][1] + 1, starts[0][3] + 1
        due = {Kind.E: begin - 0.1, Kind.S: end + 0.1, Kind.T: end + 0.2, Kind.G: back + 0.1}
        turn, timed = [0] * network.size, []
        for k, node in enumerate(network.nodes):
            if isinstance(node, Pass):
                start = due[node.kind] if node.kind in due else at[node.stage, node.kind]
                turns, within = divmod(start, INTERVAL)
                turn[k] = int(turns)
                timed.append((within, k))
        words: list[list[int]] = [[] for _ in range(network.num_ranks)]
        for _, k in sorted(timed):
            words[network.lanes[k]].append(k)
        return cls(network, words, turn)

    @classmethod
    def of_repeat(cls, network: Network, orders: Orders, repeat: Repeat) -> Ring:
        """Return the ring of the part of `orders` that can be repeated for one microbatch."""
        size, since = network.size, repeat.since
        turn = [*(-count for count in since), *[0] * (size - network.num_passes)]
        return cls(
            network,
            [[n % size for n in own if n // size == since[n % size]] for own in orders],
            turn,
        )

    def copy(self) -> Ring:
        """Return a copy that can be changed."""
        return Ring(self._network, [word[:] for word in self.words], self.turn[:])

    def orders(self) -> Orders:
        """Return the order of all passes of a step on every rank."""
        size, count = self._network.size, self._network.num_microbatches
        periods = range(min(self.turn), max(self.turn) + count)
        return [
            [
                (period - self.turn[k]) * size + k
                for period in periods
                for k in word
                if 0 <= period - self.turn[k] < count
            ]
            for word in self.words
        ]

    def excess(self, rank: int, cap: float) -> float:
        """Return the bytes that the rank keeps above its cap; 0 if it fits."""
        change, turn, word = self._network.byte_change, self.turn, self.words[rank]
        level = -sum(change[k] * turn[k] for k in word)
        highest = level
        for k in word:
            level += change[k]
            if level > highest:
                highest = level
        return max(0.0, highest - cap * (1 + _TINY))

    def advance(self, k: int, places: int) -> None:
        """Let pass k overtake so many passes before it on its rank, and those without duration."""
        rank, seconds = self._network.lanes[k], self._network.seconds
        for _ in range(2 * len(self.words[rank])):
            word = self.words[rank]
            at = word.index(k)
            before = word[at - 1]
            if not places and seconds[before]:
                return
            if at:
                word[at - 1], word[at] = k, before
            elif len(word) > 1:  # it runs in the period before, as its last but one
                self.words[rank] = [*word[1:-1], k, before]
                self.turn[k] -= 1
            places -= seconds[before] > 0.0

    def delay(self, k: int, places: int) -> None:
        """Let so many passes after pass k on its rank overtake it, and those without duration."""
        rank, seconds = self._network.lanes[k], self._network.seconds
        for _ in range(2 * len(self.words[rank])):
            word = self.words[rank]
            after = word[(word.index(k) + 1) % len(word)]
            if not places and seconds[after]:
                return
            if word[0] == after and len(word) > 1:
                # Pass k, the last of the period, runs as the second of the next one.
                self.words[rank] = [after, k, *word[1:-1]]
                self.turn[k] += 1
            else:
                at = word.index(k)
                word[at], word[at + 1] = after, k
            places -= seconds[after] > 0.0

    def waits(self) -> list[list[_Wait]] | None:
        """Return what every node waits for, its predecessor on the rank first.

        None if a node would wait for one of a later period.
        """
        network, turn = self._network, self.turn
        inputs, seconds = network.inputs, network.seconds
        for k in self._collectives:
            turn[k] = max(turn[earlier] for earlier, _ in inputs[k])
        found: list[list[_Wait]] = [[] for _ in range(network.size)]
        for word in self.words:
            before, periods = word[-1], 1
            for k in word:
                found[k].append((before, seconds[before], periods))
                before, periods = k, 0
        for k, earlier_ones in enumerate(inputs):
            for earlier, travel in earlier_ones:
                if turn[k] < turn[earlier]:
                    return None
                found[k].append((earlier, seconds[earlier] + travel, turn[k] - turn[earlier]))
        return found

    def rate(self) -> tuple[float, list[tuple[int, int]]] | None:
        """Return the seconds of a period, and the pairs of passes on a rank that set them.

        A pair are neighbours on the slowest circle. None if passes wait in a circle for ever.
        Communicators count as if they served all collectives at once.
        """
        waits = self.waits()
        starts = None if waits is None else _starts(waits)
        if waits is None or starts is None:
            return None
        last = _PERIODS - 1
        seconds = max(own[last] - own[last - _MEASURED] for own in starts) / _MEASURED
        k, period, pairs = max(range(len(starts)), key=lambda k: starts[k][last]), last, []
        num_passes, lanes = self._network.num_passes, self._network.lanes
        while period > last - _MEASURED:
            reached = starts[k][period] - _TINY
            for earlier, after, periods in waits[k]:
                if periods <= period and starts[earlier][period - periods] + after >= reached:
                    break
            else:
                break
            if max(earlier, k) < num_passes and lanes[earlier] == lanes[k]:
                pairs.append((earlier, k))
            k, period = earlier, period - periods
        return seconds, pairs


def _starts(waits: list[list[_Wait]]) -> list[list[float]] | None:
    """Return the start of every node in every period in seconds; None if they wait in a circle."""
    missing = [sum(not periods for *_, periods in own) for own in waits]
    followers: list[list[int]] = [[] for _ in waits]
    for k, own in enumerate(waits):
        for earlier, _, periods in own:
            if not periods:
                followers[earlier].append(k)
    ready = [k for k, count in enumerate(missing) if not count]
    order = []
    while ready:
        k = ready.pop()
        order.append(k)
        for later in followers[k]:
            missing[later] -= 1
            if not missing[later]:
                ready.append(later)
    if len(order) < len(waits):
        return None
    starts = [[0.0] * _PERIODS for _ in waits]
    program = [
        (starts[k], [(starts[earlier], after, periods) for earlier, after, periods in waits[k]])
        for k in order
    ]
    for period in range(_PERIODS):
        for times, awaited in program:
            begin = 0.0
            for others, after, periods in awaited:
                if period >= periods:
                    at = others[period - periods] + after
                    if at > begin:
                        begin = at
            times[period] = begin
    return starts


def tighten(
    ring: Ring, network: Network, caps: Sequence[float], tries: int, seed: int = 0
) -> tuple[float, Ring] | None:
    """Return the fastest ring within the caps that was reached, and the seconds of its period.

    `caps[r]` bounds what rank r keeps. None if none was reached from `ring`, or if it deadlocks.
    """
    random, num_ranks = Random(seed), network.num_ranks
    rated = ring.rate()
    if rated is None:
        return None
    mean = sum(network.seconds[: network.num_passes]) / network.num_passes
    unit = max(map(abs, network.byte_change)) or 1.0
    penalty = _PENALTY * mean / unit  # seconds per byte above a cap
    least = max(sum(network.seconds[k] for k in word) for word in ring.words) * (1 + _TINY)
    ring = ring.copy()
    over = [ring.excess(rank, caps[rank]) for rank in range(num_ranks)]
    rate, pairs = rated
    cost = rate + penalty * sum(over)
    found = None if any(over) else (rate, ring.copy())
    for attempt in range(tries):
        if found is not None and found[0] <= least:
            break
        words, turn = [word[:] for word in ring.words], ring.turn[:]
        places, draw = random.choice(_PLACES), random.random()
        if any(over) and draw < 0.5:
            # A rank that exceeds its cap begins something later, or ends something earlier.
            rank = random.choice([rank for rank in range(num_ranks) if over[rank]])
            k = random.choice(ring.words[rank])
            if network.byte_change[k] > 0:
                ring.delay(k, places)
            else:
                ring.advance(k, places)
        elif pairs and draw < 0.85:
            earlier, k = random.choice(pairs)
            if random.random() < 0.5:
                ring.advance(k, places)
            else:
                ring.delay(earlier, places)
        else:
            k = random.randrange(network.num_passes)
            ring.advance(k, random.choice((1, 2)))
        rank = network.lanes[k]
        heat = _HEAT * mean * (1 - attempt / tries)
        most = cost - heat * math.log(1 - random.random())
        before, over[rank] = over[rank], ring.excess(rank, caps[rank])
        above = penalty * sum(over)
        rated = ring.rate() if above <= most else None
        if rated is None or rated[0] + above > most:
            ring.words, ring.turn, over[rank] = words, turn, before
            continue
        rate, pairs = rated
        cost = rate + above
        if not any(over) and (found is None or rate < found[0] - _TINY):
            found = rate, ring.copy()
    return found
