"""`schedule=auto`: a search for the fastest schedule that keeps every rank under its memory cap.

It searches over base schedules, placements of the layers, and vocabulary algorithms. Every base
schedule is a start: it is woven in several ways, then refined under the caps. Further starts are
V-shaped blocks that come close to the caps. They have other steps and turns than V-Min and V-Half,
and count as V-Min. The starts that are best after a little effort get more. The named schedules
take part unchanged. So the result is never slower than any of them that fits.

The blocks are not optimised for the given costs. That is not needed: with a cap of p microbatches
the refined starts end within 1 % of the lower bound, for equal and for unequal ranks
(benchmarks/family.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from schedules.bound import Bound, lives, steady_bytes, step_bound
from schedules.cost import CostModel
from schedules.generators import base_order, generate
from schedules.generators.ends import Ends
from schedules.generators.fill import LOOSE
from schedules.generators.order import in_turn
from schedules.generators.refine import GoesOn, Refined, Refiner, judge, refine
from schedules.generators.steady import Ring, tighten
from schedules.generators.tight import tight_rings
from schedules.generators.v_shape import Block, blocks
from schedules.generators.weave import STARTS, weave
from schedules.graph import DeadlockError
from schedules.ir import Kind, Pass, Schedule
from schedules.network import Network, Orders
from schedules.problem import Problem
from schedules.simulate import peak

_FIRST = 24_000  # nodes placed to refine each start
# Then per round: how many of the best go on, and how many nodes are placed to search from each.
_ROUNDS = ((8, 24_000), (4, 150_000), (1, 1_000_000))
_CLOSE = 6e-3  # the gap below which steady states are not searched for
_NEAR = 4e-3  # the gap below which whole steps are searched
_KICKS = 20  # of a whole step must be possible for that
_KICK = 6  # times the nodes of a step are placed in one kick
_ENOUGH = 5e-4  # the gap to the lower bound at which the search ends
_SHORT = 3  # microbatches per rank of the step that is searched
_TIGHTENED = 20_000  # passes to move in search of a steady state, over those of a microbatch
_STEADY = 12  # steady states to start from, at most
_TIGHT = 4  # of them without a bubble
_SLOWER = 1.03  # times the shortest period: with a longer one there is no start
_BEYOND = 1  # stages by which a block may exceed the cap
_BLOCKS = 12  # V-shaped blocks to make them of
_BLOCKS_PER_LEVEL = 4  # of these at most so many with the same number of stages in flight


@dataclass(frozen=True, slots=True)
class Option:
    """A base schedule to start from, with its problem and its costs."""

    name: str
    problem: Problem
    cost: CostModel


@dataclass(frozen=True, slots=True)
class Solution:
    """The best schedule found, and the option it came from.

    No schedule of that option's problem is faster than `bound` under the caps.
    """

    option: Option
    schedule: Schedule
    bound: Bound


@dataclass(frozen=True, slots=True)
class SoFar:
    """The state of a search: the best schedule so far.

    name, algorithm: the base schedule that it comes from, and its vocabulary algorithm.
    makespan: seconds of the step.
    excess: bytes above the cap of the rank that exceeds its cap most; 0 if it fits.
    tried: how often an order was tried.
    """

    name: str
    algorithm: str
    makespan: float
    excess: float
    tried: int


# Called with the state of a search; returns whether the search goes on.
Watch = Callable[[SoFar], bool]


class CapError(ValueError):
    """The error if no schedule was found under the caps.

    `is_stopped` says that the search did not reach its end. The other attributes are of the rank
    that exceeds its cap most, in bytes.
    - `cap`: the cap of the rank.
    - `reached`: the peak of the best schedule found. With all caps raised by `reached - cap`, a
      schedule is found.
    - `alone`: what a single microbatch keeps. No schedule keeps less.
    - `steady`: what a steady state without a bubble keeps on average.
    """

    is_stopped = False

    def __init__(self, rank: int, cap: float, reached: float, alone: float, steady: float) -> None:
        super().__init__(
            f"no schedule was found that keeps at most {cap:.4g} bytes on rank {rank}; "
            f"the least reached is {reached:.4g}, one microbatch alone keeps {alone:.4g}, "
            f"and a step without a bubble at least {steady:.4g} on average"
        )
        self.rank, self.cap, self.reached = rank, cap, reached
        self.alone, self.steady = alone, steady


def solve(
    options: Sequence[Option],
    caps: Sequence[float],
    watch: Watch | None = None,
    known: Sequence[Solution] = (),
) -> Solution:
    """Return the fastest schedule found in which rank r keeps at most `caps[r]` bytes.

    `watch` sees the search go on, and may end it with the best schedule so far. The result is not
    slower than a solution in `known`, of one of the options, that fits. Raises CapError, with the
    least bytes that were reached, if none was found.
    """
    watched = _Watched(watch)
    entries = [_Entry.of(option, caps, short=True) for option in options]
    entries.sort(key=lambda entry: entry.bound.seconds)
    best = min(
        (
            _Found(judge(entry.network, entry.network.orders(solution.schedule), caps), entry)
            for entry in entries
            for solution in known
            if solution.option is entry.option
        ),
        key=_quality,
        default=None,
    )
    best, is_extended = _race(entries, best, watched)
    if not is_extended and not watched.is_stopped:
        # No short step that was found has a steady state, so the whole ones are searched.
        entries = [_Entry.of(entry.option, caps, short=False) for entry in entries]
        best, _ = _race(entries, best, watched)
    entry, refined = best.entry, best.refined
    if refined.excess > 0:
        error = _cap_error(refined, entry.option, entry.network, caps)
        error.is_stopped = watched.is_stopped
        raise error
    name = f"auto from {entry.option.name}"
    return Solution(entry.option, entry.network.schedule(name, refined.orders), entry.bound)


def _race(entries: Sequence[_Entry], best: _Found | None, watched: _Watched) -> tuple[_Found, bool]:
    """Return the best of `best` and what is found from `entries`, and whether a start was extended.

    `entries` come in the order of their bounds.
    """
    starts: list[_Found] = []

    def can_win(entry: _Entry) -> bool:
        """Return whether schedules of `entry` can be faster than all found so far."""
        known = [found.refined for found in ([] if best is None else [best]) + starts]
        return not any(
            refined.excess == 0 and refined.makespan <= entry.bound.seconds for refined in known
        )

    for entry in entries:
        if best is not None and (watched.is_stopped or not can_win(entry)):
            continue
        named = [_Found(refined, entry) for refined in entry.named(watched)]
        best = min([*([] if best is None else [best]), *named], key=_quality)
        starts += [_Found(refined, entry) for refined in entry.starts(watched)]
    assert best is not None
    starts += _steady_starts(starts, watched)
    for survivors, effort in _ROUNDS:
        starts = sorted(starts, key=_quality)[:survivors]
        if survivors == 1 and any(start.is_worth_its_length for start in starts):
            starts = [found for start in starts if (found := start.whole()) is not None]
            best = min([best, *starts], key=_quality)
            return best, False
        starts = [
            start.search(effort, watched)
            for start in starts
            if not watched.is_stopped and can_win(start.entry)
        ] or starts
    is_extended = not starts
    for start in starts:
        found = start.whole()
        if found is not None:
            is_extended = True
            best = min(best, found, key=_quality)
    return best, is_extended


def _quality(found: _Found) -> tuple[float, float]:
    return found.refined.quality


@dataclass(frozen=True, slots=True)
class _Entry:
    """An option in a search.

    Orders are searched for in a step of fewer microbatches, `refiner`'s, and then extended.
    """

    option: Option
    network: Network
    caps: list[float]
    bound: Bound
    short: Problem
    refiner: Refiner

    @classmethod
    def of(cls, option: Option, caps: Sequence[float], *, short: bool) -> _Entry:
        problem, network = option.problem, Network.of(option.problem, option.cost)
        m = problem.num_microbatches
        least = _SHORT * problem.layout.num_ranks
        few = least + (m - least) % 4 if short and m > least + 4 else m
        bound = step_bound(problem, option.cost, tuple(caps))
        refiner = Refiner(replace(network, num_microbatches=few), caps, m - few)
        return cls(
            option, network, list(caps), bound, replace(problem, num_microbatches=few), refiner
        )

    def named(self, watched: _Watched) -> Iterator[Refined]:
        """Yield the named schedule, and that of one microbatch after the other."""
        option, network = self.option, self.network
        named = network.orders(generate(option.name, option.problem, option.cost))
        first = judge(network, named, self.caps)
        watched.of(option)(first)
        yield first
        yield judge(network, _one_by_one(option, network), self.caps)

    def starts(self, watched: _Watched) -> Iterator[Refined]:
        """Yield refined orders of the short step from several starts."""
        option = self.option
        if option.name == "interlaced":
            return  # it serves as a comparison; refining would break up its output layer
        network = replace(self.network, num_microbatches=self.short.num_microbatches)
        base = base_order(option.name, self.short)
        woven = [
            weave(base, self.short, network, preference)
            for preference in STARTS[: max(2, _FIRST // _nodes(network) // 2)]
        ]
        chosen = woven if self.short.split_backward else woven[:1]
        yield from self.refined([in_turn(network, orders) for orders in chosen], watched)

    def steady(self, watched: _Watched) -> Iterator[_Found]:
        """Yield refined orders of the short step from steady states."""
        network = replace(self.network, num_microbatches=self.short.num_microbatches)
        enough, goes_on = self.bound.seconds * (1 + _ENOUGH), watched.of(self.option)
        for period, ring in _steady(self.short, network, self.caps):
            if not watched.is_stopped:
                ends = Ends(self.refiner, ring, period)
                yield _Found(ends.search(_FIRST, enough, goes_on), self, ends)

    def refined(self, starts: Sequence[Orders], watched: _Watched) -> Iterator[Refined]:
        """Yield the orders `starts` of the short step, refined with little effort."""
        nodes, goes_on = (
            _nodes(self.network) // self.option.problem.num_microbatches,
            watched.of(self.option),
        )
        nodes *= self.short.num_microbatches
        for orders in starts:
            if watched.is_stopped:
                return
            yield self.refiner.refine(self.refiner.judge(orders), max(2 * nodes, _FIRST), goes_on)

    def extensions(self, refined: Refined) -> list[Orders]:
        """Return orders of the short step as those of the whole one, in several ways."""
        return self.refiner.extensions(refined.orders)


@dataclass(frozen=True, slots=True)
class _Found:
    """Orders of an entry: of its short step for a start, of the whole one for a result."""

    refined: Refined
    entry: _Entry
    ends: Ends | None = None  # if it comes from a steady state

    @property
    def is_worth_its_length(self) -> bool:
        """Return whether kicks of the whole step may find what those of the short one do not."""
        entry = self.entry
        return (
            entry.short != entry.option.problem
            and self.refined.excess == 0
            and self.refined.makespan < entry.bound.seconds * (1 + _NEAR)
            and _KICK * _nodes(entry.network) <= _ROUNDS[-1][1] // _KICKS
        )

    def search(self, effort: int, watched: _Watched) -> _Found:
        """Return better orders: of warm-up and cool-down, or improved by kicks."""
        entry = self.entry
        enough, goes_on = entry.bound.seconds * (1 + _ENOUGH), watched.of(entry.option)
        if self.ends is not None and not self.is_close:
            return replace(self, refined=self.ends.search(effort, enough, goes_on))
        # Near the bound, kicks find more than the search of the ends.
        refined = entry.refiner.search(self.refined, effort, enough, goes_on)
        return replace(self, refined=refined, ends=None)

    def whole(self) -> _Found | None:
        """Return orders of the short step as those of the whole one; None if that fails."""
        entry, extended = self.entry, self.ends.extended() if self.ends else None
        if entry.short == entry.option.problem:
            return self
        found: list[Refined] = []
        for orders in entry.extensions(self.refined) if extended is None else [extended]:
            with contextlib.suppress(DeadlockError):  # rare: it repeats what does not fit together
                found.append(judge(entry.network, orders, entry.caps))
        if not found:
            return None
        best = min(found, key=lambda extended: extended.quality)
        effort = max(4 * _nodes(entry.network), _FIRST)
        return replace(self, refined=refine(entry.network, best.orders, entry.caps, effort))

    @property
    def is_close(self) -> bool:
        """Return whether steady states are not worth a search."""
        return self.refined.makespan < self.entry.bound.seconds * (1 + _CLOSE)


class _Watched:
    """Tells a Watch the best of all options so far, and remembers that it has ended the search."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch, self._best, self._tried = watch, (float("inf"), float("inf")), 0
        self._names = ("", "")
        self.is_stopped = False

    def of(self, option: Option) -> GoesOn:
        """Return what `refine` and `search` ask with the orders of one option."""
        names = option.name, option.problem.algorithm.name

        def goes_on(found: Refined) -> bool:
            if self._watch is None:
                return True
            self._tried += 1
            if found.quality < self._best:
                self._best, self._names = found.quality, names
            excess, makespan = self._best
            if not self.is_stopped:
                self.is_stopped = not self._watch(
                    SoFar(*self._names, makespan, excess, self._tried)
                )
            return not self.is_stopped

        return goes_on


def _one_by_one(option: Option, network: Network) -> Orders:
    """Return the order in which every microbatch starts after the previous one has ended.

    It is slow, but no order keeps less memory.
    """
    alone = network.orders(
        generate(option.name, replace(option.problem, num_microbatches=1), option.cost)
    )
    return [
        [i * network.size + k for i in range(network.num_microbatches) for k in order]
        for order in alone
    ]


def _steady_starts(starts: Sequence[_Found], watched: _Watched) -> list[_Found]:
    """Return starts from steady states, unless others come close to the lower bound already."""
    if any(s.refined.excess == 0 and s.is_close for s in starts):
        return []
    entries = {start.entry.option.name: start.entry for start in starts}
    entry = entries.get("v_min")
    return [] if entry is None else list(entry.steady(watched))


def _steady(problem: Problem, network: Network, caps: list[float]) -> list[tuple[float, Ring]]:
    """Return steady states to start from, with the seconds of their periods.

    The first have no bubble, the others are tightened from V-shaped blocks.
    """
    period = _period(network)
    rings = [(period, ring) for ring in islice(tight_rings(network, problem, caps, period), _TIGHT)]
    tries = _TIGHTENED // network.size
    tightened = [
        (tighten(Ring.of_block(network, problem, block), network, caps, tries), block)
        for block in _blocks(problem, network, caps)
    ]
    fitting = [(found, block) for found, block in tightened if found is not None]
    fitting.sort(key=lambda pair: (pair[0][0], pair[1].length(problem.layout.num_ranks)))
    fastest = min((rate for (rate, _), _ in fitting), default=0.0)
    most = (period if rings else fastest) * _SLOWER
    for (rate, ring), _ in fitting[: _STEADY - len(rings)]:
        if rate > most:
            break
        further = tighten(ring, network, caps, 3 * tries, 1)
        rings.append((rate, ring) if further is None or further[0] >= rate else further)
    return rings


def _blocks(problem: Problem, network: Network, caps: list[float]) -> list[Block]:
    """Return the V-shaped blocks to start from: those that fit under the caps with a shard held.

    Those with the most microbatches in flight come first, and among these the shortest.
    """
    layout = problem.layout
    keeps = {
        (node.stage, node.kind): network.byte_change[k]
        for k, node in enumerate(network.nodes)
        if isinstance(node, Pass)
    }
    spare = _BEYOND * max(keeps.values())
    room = [cap - keeps.get((rank, Kind.S), 0.0) + spare for rank, cap in enumerate(caps)]
    chunks = [
        [keeps[stage, Kind.F] for stage in layout.stages_of(rank)]
        for rank in range(layout.num_ranks)
    ]
    levels: dict[int, list[tuple[int, Block]]] = {}
    for block in blocks(problem):
        peaks = block.in_flight(layout.num_ranks)
        if all(
            first * kept[0] + second * kept[1] <= free * LOOSE
            for pair, kept, free in zip(peaks, chunks, room, strict=True)
            for first, second in pair
        ):
            level = max(sum(counts) for pair in peaks for counts in pair)
            levels.setdefault(level, []).append((block.length(layout.num_ranks), block))
    shortest = [
        block
        for level in sorted(levels, reverse=True)
        for _, block in sorted(levels[level], key=lambda found: found[0])[:_BLOCKS_PER_LEVEL]
    ]
    return shortest[:_BLOCKS]


def _period(network: Network) -> float:
    """Return the seconds that the busiest rank or communicator works for a microbatch."""
    work = [0.0] * network.num_lanes
    for lane, seconds in zip(network.lanes, network.seconds, strict=True):
        work[lane] += seconds
    return max(work)


def _nodes(network: Network) -> int:
    """Return the number of nodes of a step."""
    return network.size * network.num_microbatches


def _cap_error(best: Refined, option: Option, network: Network, caps: Sequence[float]) -> CapError:
    """Return the error for the rank that exceeds its cap most in the best orders found."""
    peaks = [peak(network.byte_changes(order)) for order in best.orders]
    rank = max(range(len(peaks)), key=lambda r: peaks[r] - caps[r])
    begins = {
        k
        for k, node in enumerate(network.nodes)
        if isinstance(node, Pass) and node.kind in (Kind.F, Kind.S)
    }
    alone = sum(kept for start, kept, _ in lives(rank, option.problem, network) if start in begins)
    return CapError(
        rank, caps[rank], peaks[rank], alone, steady_bytes(rank, option.problem, network)
    )
