"""Refinement: it fills the gaps of a schedule, mostly of warm-up and cool-down, under a memory cap.

Gaps are filled forward in time (`fill`), which closes those of the warm-up. The same in reversed
time closes the gaps of the cool-down. Both directions alternate while the makespan falls.

The order changes only where a rank would wait. So the steady state, in which a list scheduler would
lose most, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from random import Random

from schedules.generators.extend import Repeat, repeat_of, repeats_of
from schedules.generators.fill import LOOSE, Filler
from schedules.generators.order import in_turn
from schedules.generators.steady import Ring
from schedules.network import Network, Orders
from schedules.simulate import peak, sweep, timed

# Values to try: the fraction of its own duration by which a filler may delay the next pass.
_PATIENCE = (0.35, 0.0, 0.7, 1.0)
_KICK_EFFORT = 8_000  # nodes placed after each kick, at least two turns in both directions
_EXTENSIONS = 6  # of a short step that are simulated
_CLOSE = 1.004  # times the best makespan: a kick that comes so close gets as many again


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


@dataclass(slots=True)
class Swept:
    """Orders of passes, with the starts of all nodes by their ids and the makespan, in seconds.

    `back` are the starts in reversed time, None until they are needed. `fillings` are the results
    of filling gaps, by whether time was reversed and by the patience, None where that failed.
    """

    orders: Orders
    starts: list[float]
    makespan: float
    back: list[float] | None = None
    fillings: dict[tuple[bool, float], Swept | None] = field(default_factory=dict)


# Called with the best orders so far; returns whether the search goes on.
GoesOn = Callable[[Refined], bool]


def _to_the_end(best: Refined) -> bool:
    return True


def refine(
    network: Network,
    orders: Orders,
    caps: Sequence[float],
    budget: int,
    goes_on: GoesOn = _to_the_end,
) -> Refined:
    """Return `orders` improved until nothing helps or `budget` nodes were placed.

    `caps[r]` bounds what rank r keeps, in the unit of `network.byte_change`. Orders above a cap are
    brought below it if possible. The result never has a larger excess than `orders`. `goes_on` may
    end it earlier.
    """
    refiner = Refiner(network, caps)
    return refiner.refine(refiner.judge(in_turn(network, orders)), budget, goes_on)


class Refiner:
    """Refinement and search under the caps of one network, in both directions of time."""

    def __init__(self, network: Network, caps: Sequence[float], extra: int = 0) -> None:
        """Prepare; `caps[r]` bounds what rank r keeps, in the unit of `network.byte_change`.

        Makespans are those of a step with `extra` more microbatches in its steady state.
        """
        self.network, self.nodes = network, network.size * network.num_microbatches
        backwards = network.reversed()
        self._networks = network, backwards
        self._fillers = Filler(network, backwards=False), Filler(backwards, backwards=True)
        self.caps = list(caps)
        self._judged = Swept([], [], 0.0)  # what was judged last
        self._known: dict[tuple[int, ...], _Known] = {}  # of orders that were refined
        self.extra, work = extra, [0.0] * network.num_lanes
        for lane, seconds in zip(network.lanes, network.seconds, strict=True):
            work[lane] += seconds
        self.work = max(work)  # the least seconds of a microbatch

    def judge(self, orders: Orders) -> Refined:
        """Return `orders` with their makespan and excess."""
        if not self.extra:
            times = timed(self.network, orders)
            self._judged = Swept(orders, times.start, times.makespan)
            return Refined(orders, times.makespan, excess(self.network, orders, self.caps))
        swept = sweep(self.network, orders)
        self._judged = Swept(orders, swept.start, swept.makespan)
        repeat = repeat_of(self.network, swept, self.extra)
        makespan = swept.makespan + self.extra * self._rate(orders, swept.makespan, repeat)
        return Refined(orders, makespan, excess(self.network, orders, self.caps))

    def _rate(self, orders: Orders, makespan: float, repeat: Repeat | None) -> float:
        """Return the seconds of one more microbatch where `repeat` is repeated."""
        if repeat is None:  # the whole step counts, with its bubble at both ends
            return makespan / self.network.num_microbatches
        if repeat.microbatches > 1:
            return repeat.rate
        rated = Ring.of_repeat(self.network, orders, repeat).rate()
        return repeat.rate if rated is None else max(rated[0], self.work)

    def filled(
        self,
        swept: Swept,
        *,
        backwards: bool,
        patience: float,
        frozen: Sequence[tuple[int, int]],
    ) -> Swept | None:
        """Return the orders of `swept` after filling gaps in one direction, with their times.

        No pass moves into, out of or over the places of rank r from `frozen[r][0]` to before
        `frozen[r][1]`, which are the same in every call for `swept`. None if the caps leave a rank
        no pass to take.
        """
        key = backwards, patience
        if key not in swept.fillings:
            swept.fillings[key] = self._filled(swept, backwards, patience, frozen)
        return swept.fillings[key]

    def _filled(
        self, swept: Swept, backwards: bool, patience: float, frozen: Sequence[tuple[int, int]]
    ) -> Swept | None:
        orders, starts = swept.orders, swept.starts
        if backwards:
            orders = [order[::-1] for order in orders]
            if swept.back is None:
                swept.back = timed(self._networks[1], orders).start
            starts = swept.back
            frozen = [
                (len(order) - until, len(order) - since)
                for order, (since, until) in zip(orders, frozen, strict=True)
            ]
        filled = self._fillers[backwards].run(orders, starts, self.caps, patience, frozen)
        if filled is None:
            return None
        if not backwards:
            return Swept(filled.orders, filled.starts, filled.makespan)
        return self.swept([order[::-1] for order in filled.orders])

    def swept(self, orders: Orders) -> Swept:
        """Return `orders` of the step with their times."""
        if orders is self._judged.orders:
            return self._judged
        times = timed(self.network, orders)
        return Swept(orders, times.start, times.makespan)

    def extensions(self, orders: Orders) -> Iterator[Orders]:
        """Yield `orders` with the extra microbatches, once for every part that can be repeated.

        The parts that take least time come first, and each order of a part once.
        """
        parts = repeats_of(self.network, sweep(self.network, orders), self.extra)
        found: list[Orders] = []
        for part in sorted(parts, key=lambda part: part.rate):
            if len(found) == _EXTENSIONS:
                return
            extended = part.extend(self.network, orders, self.extra)
            if extended not in found:
                found.append(extended)
                yield extended

    def refine(self, best: Refined, budget: int, goes_on: GoesOn = _to_the_end) -> Refined:
        """Return `best` improved until nothing helps or `budget` nodes were placed.

        What was placed for the same orders before counts again.
        """
        known = self._known_of(best.orders)
        improved = True
        while improved and budget > 0:
            improved = False
            for patience in _PATIENCE:
                for turns in ((False, True), (True, False)):
                    if budget <= 0 or not goes_on(best):
                        return best
                    budget -= 2 * self.nodes
                    if (turns, patience) not in known.better:
                        found = self._better(best, turns, patience, known)
                        known.better[turns, patience] = found
                    found = known.better[turns, patience]
                    if found is not None:
                        best, known, improved = found, self._known_of(found.orders), True
        return best

    def _known_of(self, orders: Orders) -> _Known:
        """Return what is known of `orders`, of which many kicks lead to the same ones."""
        return self._known.setdefault(tuple(chain.from_iterable(orders)), _Known())

    def _better(
        self, best: Refined, turns: tuple[bool, bool], patience: float, known: _Known
    ) -> Refined | None:
        """Return the orders of `best` filled in both directions if they are better, else None."""
        filled = self._both_ways(best.orders, turns, self.caps, patience, known)
        if filled is None or filled[0] is best.orders:
            return None
        orders, makespan = filled
        limit = best.makespan * (1 - 1e-9)
        # The caps were kept, so a slower order without excess needs no closer look.
        if best.excess <= 0.0 and makespan + self.extra * self.work >= limit:
            return None
        found = self.judge(orders)
        return found if found.quality < (best.excess, limit) else None

    def search(
        self, best: Refined, budget: int, enough: float, goes_on: GoesOn = _to_the_end
    ) -> Refined:
        """Return `best` improved by kicks.

        A kick refines the order under lower caps, which changes the order, and then under the true
        caps. The search ends when `budget` nodes were placed or a makespan of `enough` is reached.
        The kicks come from a fixed seed, so that every rank finds the same schedule. `goes_on` may
        end it earlier.
        """
        known, random, caps = _Known(), Random(0), self.caps
        effort = max(4 * self.nodes, _KICK_EFFORT)
        kick = 2 * self.nodes + effort
        while budget >= kick:
            budget -= kick
            if (best.excess == 0 and best.makespan <= enough) or not goes_on(best):
                break
            squeeze, unequal = random.uniform(0.8, 1.0), random.random() < 0.25
            squeezed = [cap * (random.uniform(0.85, 1.0) if unequal else squeeze) for cap in caps]
            turns = (False, True) if random.random() < 0.5 else (True, False)
            patience = random.choice(_PATIENCE[:3])
            known.unmoved.clear()  # it holds for the true caps only
            stirred = self._both_ways(best.orders, turns, squeezed, patience, known)
            if stirred is None:
                continue
            found = self.refine(self.judge(stirred[0]), effort)
            if found.excess <= best.excess and found.makespan < best.makespan * _CLOSE:
                budget -= effort
                found = self.refine(found, effort)
            if found.quality <= best.quality:
                best, known = found, _Known()
        return best

    def _both_ways(
        self,
        given: Orders,
        turns: tuple[bool, bool],
        caps: Sequence[float],
        patience: float,
        known: _Known,
    ) -> tuple[Orders, float] | None:
        """Return the orders `given` after filling gaps in two directions, and their makespan.

        `turns` says for each whether time is reversed. The result is `given` itself if no pass
        moves, and None if the caps leave a rank no pass to take. The makespan is that of the last
        run that moved a pass, which in reversed time may differ from the true one: communicators
        serve their collectives in the order in which they become ready.
        """
        orders, makespan = given, 0.0
        for backwards in turns:
            if orders is given and (backwards, patience) in known.unmoved:
                continue
            turned = [order[::-1] for order in orders] if backwards else orders
            starts = known.starts.get(backwards) if orders is given else None
            if starts is None and not backwards and orders is given is self._judged.orders:
                starts = known.starts[backwards] = self._judged.starts
            if starts is None:
                starts = timed(self._networks[backwards], turned).start
                if orders is given:
                    known.starts[backwards] = starts
            filled = self._fillers[backwards].run(turned, starts, caps, patience)
            if filled is None:
                return None
            if filled.orders == turned:
                if orders is given:
                    known.unmoved.add((backwards, patience))
                continue
            orders = [order[::-1] for order in filled.orders] if backwards else filled.orders
            makespan = filled.makespan
            if orders == given:  # what is known of `given` holds again
                orders = given
        return orders, makespan


@dataclass(slots=True)
class _Known:
    """Facts about orders that were found, by whether time is reversed.

    `starts` are the start times of all their nodes, `unmoved` the directions and patiences with
    which filling moves no pass. `better` are the orders that filling in two directions finds, None
    where they are no better.
    """

    starts: dict[bool, list[float]] = field(default_factory=dict)
    unmoved: set[tuple[bool, float]] = field(default_factory=set)
    better: dict[tuple[tuple[bool, bool], float], Refined | None] = field(default_factory=dict)


def judge(network: Network, orders: Orders, caps: Sequence[float]) -> Refined:
    """Return `orders` with their makespan and excess."""
    return Refined(orders, timed(network, orders).makespan, excess(network, orders, caps))


def excess(network: Network, orders: Orders, caps: Sequence[float]) -> float:
    """Return by how much the rank that exceeds its cap most does so; 0 if none does."""
    over = [
        peak(network.byte_changes(order)) - cap * LOOSE
        for order, cap in zip(orders, caps, strict=True)
    ]
    return max(0.0, *over)
