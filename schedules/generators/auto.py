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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from schedules.bound import Bound, lives, steady_bytes, step_bound
from schedules.cost import CostModel
from schedules.generators import base_order, generate
from schedules.generators.refine import LOOSE, GoesOn, Refined, judge, refine, search
from schedules.generators.v_shape import Block, blocks
from schedules.generators.weave import STARTS, weave
from schedules.ir import Kind, Pass, Schedule
from schedules.network import Network, Orders
from schedules.problem import Problem
from schedules.simulate import peak

_FIRST = 60_000  # nodes placed to refine each start
# Then per round: how many of the best go on, and how many nodes are placed to search from each.
_ROUNDS = ((5, 200_000), (1, 1_500_000))
_ENOUGH = 5e-4  # the gap to the lower bound at which the search ends
_BLOCKS = 6  # V-shaped blocks to start from
_BLOCKS_PER_LEVEL = 3  # of these at most so many with the same number of stages in flight


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


def solve(options: Sequence[Option], caps: Sequence[float], watch: Watch | None = None) -> Solution:
    """Return the fastest schedule found in which rank r keeps at most `caps[r]` bytes.

    `watch` sees the search go on, and may end it with the best schedule so far. Raises CapError,
    with the least bytes that were reached, if none was found.
    """
    watched = _Watched(watch)
    found = [
        (refined, option, network)
        for option in watched.until_stopped(options)
        for network in [Network.of(option.problem, option.cost)]
        for refined in _starts(option, network, list(caps), watched)
    ]
    for survivors, effort in _ROUNDS:
        best_first = sorted(found, key=lambda start: start[0].quality)[:survivors]
        found = []
        for refined, option, network in best_first:
            enough = step_bound(option.problem, option.cost, tuple(caps)).seconds * (1 + _ENOUGH)
            goes_on = watched.of(option)
            searched = search(network, refined, list(caps), effort, enough, goes_on)
            found.append((searched, option, network))
    best, option, network = found[0]
    if best.excess > 0:
        error = _cap_error(best, option, network, caps)
        error.is_stopped = watched.is_stopped
        raise error
    bound = step_bound(option.problem, option.cost, tuple(caps))
    return Solution(option, network.schedule(f"auto from {option.name}", best.orders), bound)


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

    def until_stopped(self, options: Sequence[Option]) -> Iterator[Option]:
        """Yield the options; none after the search has been ended."""
        for option in options:
            if not self.is_stopped:
                yield option


def _starts(
    option: Option, network: Network, caps: list[float], watched: _Watched
) -> Iterator[Refined]:
    """Yield orders of one option: the named schedule, and refined ones from several starts."""
    goes_on = watched.of(option)
    named = network.orders(generate(option.name, option.problem, option.cost))
    first = judge(network, named, caps)
    yield first
    if not goes_on(first) or option.name == "interlaced":
        return  # it serves as a comparison; refining would break up its synchronous output layer
    yield judge(network, _one_by_one(option, network), caps)
    base = base_order(option.name, option.problem)
    woven = [
        weave(base, option.problem, network, preference)
        for preference in STARTS[: max(2, _FIRST // _nodes(network))]
    ]
    if option.name == "v_min":
        for block in _blocks(option.problem, network, caps):
            order = block.order(option.problem)
            woven += [
                weave(order, option.problem, network, preference) for preference in STARTS[:2]
            ]
    for orders in [named, *woven] if option.problem.split_backward else woven[:1]:
        if watched.is_stopped:
            return
        yield refine(network, orders, caps, max(2 * _nodes(network), _FIRST), goes_on)


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
    room = [cap - keeps.get((rank, Kind.S), 0.0) for rank, cap in enumerate(caps)]
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
    return shortest[: min(_BLOCKS, max(2, _FIRST // _nodes(network)))]


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
