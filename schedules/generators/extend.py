"""Extension: a schedule of few microbatches becomes one of many by repeating its steady state.

Two moments of a step look alike if the passes that every rank has started differ by the same number
of microbatches for all kinds of passes. What lies between them can be repeated: every rank then
keeps what it kept, and no rank keeps more than before at any time. So searches need not look at
more microbatches than fill the pipeline a few times.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules.generators.order import in_turn
from schedules.network import Network, Orders
from schedules.simulate import Sweep

_LONGEST = 4  # microbatches of what is repeated


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part of a step that can be repeated.

    `since` and `until` say for each pass of a microbatch how many of it come before the part and
    before its end. `microbatches` is the difference, the same for all. The part takes `seconds`.
    """

    since: tuple[int, ...]
    until: tuple[int, ...]
    microbatches: int
    seconds: float

    @property
    def rate(self) -> float:
        """The seconds per microbatch."""
        return self.seconds / self.microbatches

    def extend(self, short: Network, orders: Orders, extra: int) -> Orders:
        """Return `orders` of the step `short` with `extra` more microbatches.

        `extra` is a multiple of `microbatches`. In rare cases the result deadlocks or is slower
        than `rate` says, so the caller must simulate it.
        """
        kinds: list[list[int]] = [[] for _ in range(short.num_ranks)]
        for k in range(short.num_passes):
            kinds[short.lanes[k]].append(k)
        extended: Orders = []
        for order, own in zip(orders, kinds, strict=True):
            begin, end = (sum(cut[k] for k in own) for cut in (self.since, self.until))
            copies = extra // self.microbatches
            extended.append(order[:end] + order[begin:end] * copies + order[end:])
        return in_turn(short, extended)


def repeat_of(network: Network, swept: Sweep, extra: int) -> Repeat | None:
    """Return the part of a step that adds `extra` microbatches in the least time.

    A part of one microbatch is preferred. None if no part can be repeated.
    """
    found = repeats_of(network, swept, extra)
    return min(found, key=lambda part: (part.microbatches > 1, round(part.rate, 9)), default=None)


def repeats_of(network: Network, swept: Sweep, extra: int) -> list[Repeat]:
    """Return the parts of a step that can be repeated to add `extra` microbatches."""
    cuts = _cuts(network, swept)
    found: list[Repeat] = []
    for later, (until, counts) in enumerate(cuts):
        for earlier in range(max(0, later - _LONGEST), later):
            since, before = cuts[earlier]
            added = later - earlier
            if extra % added or counts[0] - before[0] != added:
                continue
            if all(now - then == added for now, then in zip(counts, before, strict=True)):
                found.append(Repeat(tuple(before), tuple(counts), added, until - since))
    return found


def _cuts(network: Network, swept: Sweep) -> list[tuple[float, list[int]]]:
    """Return the moments just before every F of stage 0, and how many of each pass came before.

    Of passes that start at the same time, one that depends on another comes after it.
    """
    size, num_passes = network.size, network.num_passes
    first = next(iter(network.leaders.values()))
    counts = [0] * num_passes
    cuts: list[tuple[float, list[int]]] = []
    for number in swept.order:  # passes leave the sweep in the order of their starts
        k = number % size
        if k == first:
            cuts.append((swept.start[number], counts[:]))
        if k < num_passes:
            counts[k] += 1
    return cuts
