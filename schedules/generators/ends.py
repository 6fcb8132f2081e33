"""The search for the warm-up and the cool-down of a steady state.

The orders in the middle of the step stay those of the steady state. So what comes before and what
comes after can be searched apart: the best warm-up of one try goes together with the best cool-down
of another. A try fills gaps in both directions of time, with another patience each time.
"""

from __future__ import annotations

from random import Random

from schedules.generators.refine import GoesOn, Refined, Refiner, Swept, excess
from schedules.generators.steady import Ring
from schedules.network import Orders

# Values to try: the fraction of its own duration by which a filler may delay the next pass.
_PATIENCE = (0.0, 0.2, 0.35, 0.5, 0.7, 1.0)
# The directions of a try, whether time is reversed.
_TURNS = ((False, True), (True, False), (False, True, False), (True, False, True))
_TRIES = 8  # between two looks at the best
_FRESH = 6  # tries that begin with the ring; later every second one begins with the best


class Ends:
    """The search from one ring. It can go on where it stopped, and always finds the same."""

    def __init__(self, refiner: Refiner, ring: Ring, period: float) -> None:
        """Prepare to search in the step of `refiner`, whose network is that of `ring`.

        `period`: the seconds of a period of the ring.
        """
        self._refiner, self._random, self._tries = refiner, Random(0), 0
        self._drawn, self._period = ring, period
        size, turn = refiner.network.size, ring.turn
        orders = ring.orders()
        periods = [[number // size + turn[number % size] for number in own] for own in orders]
        self._middle = middle = (min(map(min, periods)) + max(map(max, periods)) + 1) // 2
        self._cuts = [sum(period < middle for period in own) for own in periods]
        self._frozen = [
            (sum(period < middle - 1 for period in own), sum(period <= middle for period in own))
            for own in periods
        ]
        # The warm-up lasts until the first pass behind the cut of rank 0. Rings are V-shaped
        # (`auto._steady`), so rank 0 begins and ends every microbatch: it has passes on both sides
        # of the cut.
        self._mark = orders[0][self._cuts[0]]
        self._ring = self._first = self._last = self._both = refiner.swept(orders)
        self._joined = self._first, self._last  # of which `_both` is made

    def search(self, budget: int, enough: float, goes_on: GoesOn) -> Refined:
        """Return the best orders after placing `budget` more nodes, or with a makespan of `enough`.

        The makespan is that of the step with the extra microbatches of the refiner. `goes_on` may
        end the search earlier.
        """
        while True:
            best = self._best()
            if budget <= 0 or (best.excess == 0 and best.makespan <= enough) or not goes_on(best):
                return best
            for _ in range(_TRIES):
                budget -= self._try()

    def _best(self) -> Refined:
        refiner, joined = self._refiner, self._join()
        makespan = joined.makespan + refiner.extra * self._period
        return Refined(
            joined.orders, makespan, excess(refiner.network, joined.orders, refiner.caps)
        )

    def extended(self) -> Orders | None:
        """Return the best orders with the extra microbatches; None if the step is too short."""
        size, count = self._refiner.network.size, self._refiner.network.num_microbatches
        extra, turn = self._refiner.extra, self._drawn.turn
        since = range(self._middle, self._middle + extra)
        if not all(turn[k] <= self._middle < turn[k] + count for w in self._drawn.words for k in w):
            return None
        return [
            first[:cut]
            + [(period - turn[k]) * size + k for period in since for k in word]
            + [number + extra * size for number in last[cut:]]
            for first, last, cut, word in zip(
                self._first.orders, self._last.orders, self._cuts, self._drawn.words, strict=True
            )
        ]

    def _try(self) -> int:
        """Fill gaps once in several directions, and return the nodes that were placed."""
        random, placed = self._random, 0
        fresh = self._tries < _FRESH or self._tries % 2 == 0
        self._tries += 1
        swept = self._ring if fresh else self._join()
        for backwards in random.choice(_TURNS):
            patience = random.choice(_PATIENCE)
            placed += self._refiner.nodes * (3 if backwards else 1)
            found = self._refiner.filled(
                swept, backwards=backwards, patience=patience, frozen=self._frozen
            )
            if found is None:
                break
            swept = found
            if self._before(swept) <= self._before(self._first):
                self._first = swept
            if self._behind(swept) <= self._behind(self._last):
                self._last = swept
        return placed

    def _before(self, swept: Swept) -> float:
        return swept.starts[self._mark]

    def _behind(self, swept: Swept) -> float:
        return swept.makespan - swept.starts[self._mark]

    def _join(self) -> Swept:
        """Return the best warm-up with the best cool-down."""
        first, last = self._joined
        if first is not self._first or last is not self._last:
            self._joined = first, last = self._first, self._last
            pairs = zip(first.orders, last.orders, self._cuts, strict=True)
            self._both = self._refiner.swept([begin[:c] + end[c:] for begin, end, c in pairs])
        return self._both
