"""`schedule=auto`: a search for the fastest schedule that keeps every rank under its memory cap.

It searches over base schedules, placements of the layers, and vocabulary algorithms. Every base
schedule is a start: it is woven in several ways, then refined under the caps. Further starts are
V-shaped blocks that come close to the caps. They have other steps and turns than V-Min and V-Half,
and count as V-Min. The starts that are best after a little effort get more. The named schedules
take part unchanged. So the result is never slower than any of them that fits.

Effort is counted in nodes that are placed, so that every machine finds the same. In a long step of
many ranks even a named schedule takes seconds to make. There the search goes on from short steps of
the named schedules. It makes a whole one only where its short step promises to be faster, so one
that was not made may be faster than the result.

The blocks are not optimised for the given costs. That is not needed: with a cap of p microbatches
the refined starts end within 1 % of the lower bound, for equal and for unequal ranks
(benchmarks/family.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from schedules.bound import Bound, lives, steady_bytes, step_bound
from schedules.cost import CostModel
from schedules.generators import base_order, ordered
from schedules.generators.ends import Ends
from schedules.generators.fill import LOOSE
from schedules.generators.gpipe import gpipe
from schedules.generators.order import in_turn
from schedules.generators.refine import GoesOn, Refined, Refiner, excess, judge, refine
from schedules.generators.steady import Ring, tighten
from schedules.generators.tight import tight_rings
from schedules.generators.v_shape import Block, blocks
from schedules.generators.weave import PREFERENCES, STARTS, BaseOrder, weave
from schedules.graph import DeadlockError
from schedules.ir import Kind, Pass, Schedule
from schedules.network import Network, Orders
from schedules.problem import Problem
from schedules.simulate import peak, timed

_FIRST = 24_000  # nodes placed to refine each start
# Then per round: how many of the best go on, and how many nodes are placed to search from each.
_ROUNDS = ((8, 24_000), (4, 150_000), (1, 1_000_000))
_CLOSE = 6e-3  # the gap below which steady states are not searched for
_NEAR = 4e-3  # the gap below which whole steps are searched
_KICKS = 20  # of a whole step must be possible for that
_KICK = 6  # times the nodes of a step are placed in one kick
_ENOUGH = 5e-4  # the gap to the lower bound at which the search ends
_SHORT = 3  # microbatches per rank of the step that is searched
_MORE = 16  # microbatches of it beyond two per rank, at most
_LONG = 60_000  # nodes of a step from which on named schedules take part as short steps
_LARGE = 30_000  # nodes of a short step above which steady states and kicks take too long
_DRAFTS = 2  # named schedules of a long step that are searched on from
_ABOVE_CAP = 0.25  # part of a cap by which they may exceed it
_OFF = 1e-4  # part of a step by which one may be longer than its short step says
_UNREFINED = 1e-3  # part of a step by which a named schedule is faster than hoped, at most
_TIGHTENED = 20_000  # passes to move in search of a steady state, over those of a microbatch
_STEADY = 12  # steady states to start from, at most
_TIGHT = 4  # of them without a bubble
_SLOWER = 1.03  # times the shortest period: with a longer one there is no start
_FAR = 0.5  # the gap to the lower bound above which groups of microbatches take part
_SMALLER_GROUPS = 4  # sizes to try, see `_in_groups`
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

    No schedule of that option's problem is faster than `bound` under the caps. `is_stopped` says
    that the search did not reach its end.
    """

    option: Option
    schedule: Schedule
    bound: Bound
    is_stopped: bool = False


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


@dataclass(slots=True)
class Shared:
    """The facts that searches of the same options under several caps share.

    enough: the seconds of a step with which a search ends.
    named: by the names of an option and its algorithm, its named schedule and that of one
    microbatch after the other, with their makespans in seconds.
    """

    enough: float = 0.0
    named: dict[tuple[str, str], list[tuple[Orders, float]]] = field(default_factory=dict)


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
    shared: Shared | None = None,
) -> Solution:
    """Return the fastest schedule found in which rank r keeps at most `caps[r]` bytes.

    `watch` sees the search go on, and may end it with the best schedule so far. The result is not
    slower than a solution in `known`, of one of the options, that fits. What is `shared` with other
    searches of the options changes it only by `shared.enough`. Raises CapError, with the
    least bytes that were reached, if none was found.
    """
    watched = _Watched(watch)
    entries = [_Entry.of(option, caps, shared, short=True) for option in options]
    entries.sort(key=lambda entry: entry.bound.seconds)
    is_long = any(entry.is_long for entry in entries)
    whole = [
        _Found(judge(entry.network, entry.network.orders(solution.schedule), caps), entry)
        for entry in entries
        for solution in known
        if solution.option is entry.option
    ]
    whole, is_extended = _race(entries, whole, watched)
    if not (is_extended or is_long or watched.is_stopped):
        # No short step that was found has a steady state, so the whole ones are searched.
        entries = [_Entry.of(entry.option, caps, shared, short=False) for entry in entries]
        whole, _ = _race(entries, whole, watched)
    fastest = min((f.refined.makespan for f in whole if f.refined.excess == 0), default=math.inf)
    if fastest > min(entry.enough(_FAR) for entry in entries):
        whole += _in_groups(entries, watched)
    if is_long and not any(found.refined.excess == 0 for found in whole):
        whole.append(_leanest(entries))
    best = min(whole, key=_quality)
    entry, refined = best.entry, best.refined
    if refined.excess > 0:
        error = _cap_error(refined, entry.option, entry.network, caps)
        error.is_stopped = watched.is_stopped
        raise error
    name = f"auto from {entry.option.name}"
    schedule = entry.network.schedule(name, refined.orders)
    return Solution(entry.option, schedule, entry.bound, watched.is_stopped)


def searched_microbatches(problem: Problem) -> int:
    """Return the microbatches of the step in which orders are searched for; others are added."""
    m, p = problem.num_microbatches, problem.layout.num_ranks
    least = min(_SHORT * p, 2 * p + _MORE)
    return least + (m - least) % 4 if m > least + 4 else m


def _race(
    entries: Sequence[_Entry], known: Sequence[_Found], watched: _Watched
) -> tuple[list[_Found], bool]:
    """Return `known` and what is found from `entries`, and whether a short step was extended.

    All are orders of whole steps. `entries` come in the order of their bounds.
    """
    whole, starts, drafts = [*known], list[_Found](), list[_Found]()
    ended = list[_Found]()  # starts that fit and need no search, since they are as fast as bounds
    skipped = list[_Entry]()

    def can_win(entry: _Entry) -> bool:
        """Return whether schedules of `entry` can be faster than all found so far."""
        enough = entry.enough(_ENOUGH if entry.is_long else 0.0)
        return not any(
            found.refined.excess == 0 and found.refined.makespan <= enough
            for found in (*whole, *starts, *ended, *drafts)
        )

    for entry in entries:
        if (whole or drafts) and (watched.is_stopped or not can_win(entry)):
            skipped.append(entry)
            continue
        if entry.is_long:
            drafts.append(entry.draft(watched))
            continue
        whole += [_Found(refined, entry) for refined in entry.named(watched)]
        starts += [_Found(refined, entry) for refined in entry.starts(watched)]
    refinable = [draft for draft in drafts if draft.entry.is_refinable]
    starts += [*refinable, *_searched(refinable, watched)]
    starts += _steady_starts(starts, watched)
    pool = sorted(starts, key=_quality)
    for survivors, effort in _ROUNDS:
        starts = sorted(starts, key=_quality)[:survivors]
        if survivors == 1 and any(start.is_worth_its_length for start in starts):
            starts += sorted(ended, key=_quality)[:1]
            return whole + [f for start in starts if (f := start.whole()) is not None], False
        ended += [s for s in starts if s.refined.excess == 0 and not can_win(s.entry)]
        starts = [
            start.search(effort, watched)
            for start in starts
            if not (watched.is_stopped or start.entry.is_large) and can_win(start.entry)
        ] or starts
    starts = sorted((*starts, *ended), key=_quality)
    if drafts:  # any start that fits will do
        starts = [s for s in (*starts, *pool) if s.refined.excess == 0]
    extended = (start.whole() for start in starts)
    first = next((found for found in extended if found is not None), None)
    whole += [] if first is None else [first]
    fastest = min((f.refined.makespan for f in whole if f.refined.excess == 0), default=math.inf)
    whole += _named(drafts, fastest, watched)
    # A whole step may be slower than the short one promised that ruled these out.
    for entry in () if watched.is_stopped else skipped:
        if not entry.is_long and entry.enough(_UNREFINED) < fastest:
            whole += [_Found(refined, entry) for refined in entry.named(watched)]
    return whole, first is not None or not starts


def _named(drafts: Sequence[_Found], fastest: float, watched: _Watched) -> list[_Found]:
    """Return the whole named schedules that promise to be faster than `fastest` seconds.

    To make each takes seconds. So the most promising comes first, those whose short step exceeds a
    cap come last, and after one that fits the others must promise to be faster and to fit.
    """
    made, one_fits = list[_Found](), False
    for draft in sorted(drafts, key=lambda draft: (draft.refined.excess > 0, draft.hope)):
        slack = 1.0 if one_fits else 1 + _UNREFINED
        exceeds = draft.refined.excess > 0
        if watched.is_stopped or draft.hope >= fastest * slack or (one_fits and exceeds):
            continue
        named = draft.named()
        made.append(named)
        if named.refined.excess == 0:
            one_fits, fastest = True, min(fastest, named.refined.makespan)
    return made


def _searched(drafts: Sequence[_Found], watched: _Watched) -> list[_Found]:
    """Return the most promising short steps of named schedules, refined under the caps.

    Those that exceed a cap by little may be the fastest that can be made to fit. Empty if one comes
    close to the lower bound already.
    """
    if any(found.hope < math.inf and found.is_close for found in drafts):
        return []
    promising = sorted(
        drafts,
        key=lambda found: (
            found.refined.excess > _ABOVE_CAP * max(found.entry.caps),
            found.refined.makespan,
        ),
    )
    return [found.refine(watched) for found in promising[:_DRAFTS] if not watched.is_stopped]


def _in_groups(entries: Sequence[_Entry], watched: _Watched) -> list[_Found]:
    """Return orders in groups of as many microbatches as the caps allow.

    Every group runs forward, then backward, which takes far less time than one microbatch after the
    other. Where the vocabulary passes keep more than expected, the groups are smaller.
    """
    found, seen = list[_Found](), set[Problem]()
    for entry in entries:
        problem, network = entry.option.problem, entry.network
        if problem in seen:
            continue
        seen.add(problem)
        keeps = [0.0] * network.num_ranks
        for k, node in enumerate(network.nodes):
            if isinstance(node, Pass) and node.kind is Kind.F:
                keeps[network.lanes[k]] += network.byte_change[k]
        most = min(
            (int(cap * LOOSE / kept) for cap, kept in zip(entry.caps, keeps, strict=True) if kept),
            default=problem.num_microbatches,
        )
        for size in range(most, max(0, most - _SMALLER_GROUPS), -1):
            orders = weave(gpipe(problem, size), problem, network, PREFERENCES[0])
            refined = judge(network, orders, entry.caps)
            if not entry.is_long and refined.excess == 0:
                effort, goes_on = max(4 * _nodes(network), _FIRST), watched.of(entry.option)
                refined = refine(network, orders, entry.caps, effort, goes_on)
            found.append(_Found(refined, entry))
            if found[-1].refined.excess == 0:
                break
    return found


def _leanest(entries: Sequence[_Entry]) -> _Found:
    """Return the order of one microbatch after the other that comes closest to the caps."""
    alone: list[tuple[tuple[float, float], _Entry]] = []
    for entry in entries:
        option = entry.option
        single = replace(option, problem=replace(option.problem, num_microbatches=1))
        network = replace(entry.network, num_microbatches=1)
        refined = judge(network, _one_by_one(single, network), entry.caps)
        alone.append((refined.quality, entry))
    entry = min(alone, key=lambda pair: pair[0])[1]
    return _Found(judge(entry.network, _one_by_one(entry.option, entry.network), entry.caps), entry)


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
    shared: Shared | None

    @classmethod
    def of(
        cls, option: Option, caps: Sequence[float], shared: Shared | None = None, *, short: bool
    ) -> _Entry:
        problem, network = option.problem, Network.of(option.problem, option.cost)
        m = problem.num_microbatches
        few = searched_microbatches(problem) if short else m
        bound = step_bound(problem, option.cost, tuple(caps))
        refiner = Refiner(replace(network, num_microbatches=few), caps, m - few)
        fewer = replace(problem, num_microbatches=few)
        return cls(option, network, list(caps), bound, fewer, refiner, shared)

    def enough(self, gap: float = _ENOUGH) -> float:
        """Return the makespan in seconds with which a search ends: the bound, with a gap."""
        least = self.bound.seconds * (1 + gap)
        return max(least, self.shared.enough) if self.shared else least

    @property
    def is_refinable(self) -> bool:
        """Return whether orders may change; interlaced, a comparison, keeps its output layer."""
        return self.option.name != "interlaced"

    @property
    def is_long(self) -> bool:
        """Return whether even a named schedule of the whole step takes long to make."""
        return self.short != self.option.problem and _nodes(self.network) >= _LONG

    @property
    def is_large(self) -> bool:
        """Return whether a kick or a steady state takes long even in the short step."""
        return self.refiner.nodes > _LARGE and self.is_long

    def draft(self, watched: _Watched) -> _Found:
        """Return the short step of the named schedule, unrefined."""
        refiner, base = self.refiner, base_order(self.option.name, self.short)
        preference = (STARTS if self.short.split_backward else PREFERENCES)[0]
        orders = in_turn(refiner.network, weave(base, self.short, refiner.network, preference))
        found = refiner.judge(orders)
        watched.of(self.option)(found)
        least = refiner.swept(orders).makespan + refiner.extra * refiner.work
        return _Found(found, self, hope=least if self._may_fit(base) else math.inf)

    def _may_fit(self, base: BaseOrder) -> bool:
        """Return whether an order with these stage passes may fit, with every W after its I."""
        kept = {
            node.stage: self.network.byte_change[k]
            for k, node in enumerate(self.network.nodes)
            if isinstance(node, Pass) and node.kind is Kind.F
        }
        back = self.short.backward
        return all(
            peak(
                kept[item.stage] * ((item.kind is Kind.F) - (item.kind is back))
                for item in order
                if not item.kind.is_vocabulary
            )
            <= cap * LOOSE
            for order, cap in zip(base, self.caps, strict=True)
        )

    def named(self, watched: _Watched) -> Iterator[Refined]:
        """Yield the named schedule, and that of one microbatch after the other."""
        option, network = self.option, self.network
        known = {} if self.shared is None else self.shared.named
        key = option.name, option.problem.algorithm.name
        if key not in known:
            one_by_one = _one_by_one(option, network)
            known[key] = [
                ordered(option.name, option.problem, network),
                (one_by_one, timed(network, one_by_one).makespan),
            ]
        first, alone = (
            Refined(orders, makespan, excess(network, orders, self.caps))
            for orders, makespan in known[key]
        )
        watched.of(option)(first)
        yield first
        yield alone

    def whole_named(self) -> Refined:
        """Return the named schedule of the whole step."""
        orders, makespan = ordered(self.option.name, self.option.problem, self.network)
        return Refined(orders, makespan, excess(self.network, orders, self.caps))

    def starts(self, watched: _Watched) -> Iterator[Refined]:
        """Yield refined orders of the short step from several starts."""
        option = self.option
        if not self.is_refinable:
            return
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
        enough, goes_on = self.enough(), watched.of(self.option)
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


@dataclass(frozen=True, slots=True)
class _Found:
    """Orders of an entry: of its short step for a start, of the whole one for a result."""

    refined: Refined
    entry: _Entry
    ends: Ends | None = None  # if it comes from a steady state
    hope: float = math.inf  # seconds of the whole named schedule, at least, if it may fit

    def refine(self, watched: _Watched) -> _Found:
        """Return this short step refined under the caps."""
        refiner, goes_on = self.entry.refiner, watched.of(self.entry.option)
        refined = refiner.refine(self.refined, 2 * refiner.nodes, goes_on)
        return _Found(refined, self.entry)

    @property
    def is_worth_its_length(self) -> bool:
        """Return whether kicks of the whole step may find what those of the short one do not."""
        entry = self.entry
        return (
            entry.short != entry.option.problem
            and not entry.is_long
            and self.refined.excess == 0
            and self.refined.makespan < entry.bound.seconds * (1 + _NEAR)
            and _KICK * _nodes(entry.network) <= _ROUNDS[-1][1] // _KICKS
        )

    def search(self, effort: int, watched: _Watched) -> _Found:
        """Return better orders: of warm-up and cool-down, or improved by kicks."""
        entry = self.entry
        enough, goes_on = entry.enough(), watched.of(entry.option)
        if self.ends is not None and not self.is_close:
            return replace(self, refined=self.ends.search(effort, enough, goes_on))
        # Near the bound, kicks find more than the search of the ends.
        refined = entry.refiner.search(self.refined, effort, enough, goes_on)
        return replace(self, refined=refined, ends=None)

    def whole(self) -> _Found | None:
        """Return orders of the short step as those of the whole one; None if that fails."""
        entry, option = self.entry, self.entry.option
        if entry.short == option.problem:
            return self
        nodes = _nodes(entry.network)
        extended = self.ends.extended() if self.ends else None
        found: list[Refined] = []
        for orders in (
            entry.refiner.extensions(self.refined.orders) if extended is None else [extended]
        ):
            with contextlib.suppress(DeadlockError):  # rare: it repeats what does not fit together
                found.append(judge(entry.network, orders, entry.caps))
                if entry.is_long and found[-1].makespan <= self.refined.makespan * (1 + _OFF):
                    break
        if not found:
            return None
        best = min(found, key=lambda extended: extended.quality)
        if entry.is_long:
            return replace(self, refined=best)
        effort = max(4 * nodes, _FIRST)
        return replace(self, refined=refine(entry.network, best.orders, entry.caps, effort))

    def named(self) -> _Found:
        """Return the whole named schedule, of which this is a short step."""
        return _Found(self.entry.whole_named(), self.entry)

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
    alone, _ = ordered(
        option.name,
        replace(option.problem, num_microbatches=1),
        replace(network, num_microbatches=1),
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
    return [] if entry is None or entry.is_large else list(entry.steady(watched))


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
