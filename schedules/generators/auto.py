"""`schedule=auto`: the fastest order that fits into a cap on memory, over base schedules, placements and vocabulary algorithms.

Every base schedule is a start: woven in several ways, then refined under the cap.  So are V-shaped blocks that come close to
the cap, which other steps and turns than those of V-Min and V-Half give; they count as V-Min.  The starts that do best with a
little effort get more.  The named schedules themselves take part, so the result is never slower than one of them within the
cap.

No building block is solved for the costs: at a cap of p microbatches the refined starts end within 1 % of the lower bound,
for equal and unequal ranks alike (benchmarks/family.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from schedules.bound import Bound, lives, steady_bytes, step_bound
from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.generators.refine import LOOSE, Refined, judge, refine, search
from schedules.generators.v_shape import Block, blocks
from schedules.generators.weave import STARTS, weave
from schedules.ir import Kind, Pass, Schedule
from schedules.network import Network, Orders
from schedules.problem import Problem
from schedules.simulate import peak

_FIRST = 60_000  # nodes placed to refine each start
_ROUNDS = (
    (5, 200_000),
    (1, 1_500_000),
)  # then: so many of the best, searched on with so many nodes each
_ENOUGH = 5e-4  # a gap that ends the search
_BLOCKS, _BLOCKS_PER_LEVEL = (
    6,
    3,
)  # V-shaped blocks to start from; and of those with equally many stages in flight


@dataclass(frozen=True, slots=True)
class Option:
    """A base schedule to start from, and the problem and cost it would have."""

    name: str
    problem: Problem
    cost: CostModel


@dataclass(frozen=True, slots=True)
class Solution:
    """The best order found, the option it came from, and the bound on any order of that option's problem under the cap."""

    option: Option
    schedule: Schedule
    bound: Bound


class CapError(ValueError):
    """No order was found within the cap.  All in bytes, of the rank that exceeds its cap most.

    `reached` by the best order found, which a higher cap would accept; `alone` is what a single microbatch keeps, below
    which nothing goes; `steady` what a steady state without a bubble keeps on average.
    """

    def __init__(self, rank: int, cap: float, reached: float, alone: float, steady: float) -> None:
        super().__init__(
            f"no schedule was found that keeps at most {cap:.4g} bytes on rank {rank}; the least reached is {reached:.4g}, "
            f"one microbatch alone keeps {alone:.4g}, and a step without a bubble at least {steady:.4g} on average"
        )
        self.rank, self.cap, self.reached, self.alone, self.steady = (
            rank,
            cap,
            reached,
            alone,
            steady,
        )


def solve(options: Sequence[Option], caps: Sequence[float]) -> Solution:
    """The fastest schedule found in which rank r keeps at most caps[r] bytes.

    Raises CapError with the least that was reached, and what no schedule can go below.
    """
    found = [
        (refined, option, network)
        for option in options
        for network in [Network.of(option.problem, option.cost)]
        for refined in _starts(option, network, list(caps))
    ]
    for survivors, effort in _ROUNDS:
        best_first = sorted(found, key=lambda start: start[0].quality)[:survivors]
        found = []
        for refined, option, network in best_first:
            enough = step_bound(option.problem, option.cost, tuple(caps)).seconds * (1 + _ENOUGH)
            found.append((search(network, refined, list(caps), effort, enough), option, network))
    best, option, network = found[0]
    if best.excess > 0:
        raise _cap_error(best, option, network, caps)
    bound = step_bound(option.problem, option.cost, tuple(caps))
    return Solution(option, network.schedule(f"auto from {option.name}", best.orders), bound)


def _starts(option: Option, network: Network, caps: list[float]) -> Iterator[Refined]:
    """Orders of one option: as named, and refined under the caps from every weaving."""
    named = network.orders(generate(option.name, option.problem, option.cost))
    yield judge(network, named, caps)
    if option.name == "interlaced":
        return  # a comparison: its meetings are what it is
    yield judge(network, _one_by_one(option, network), caps)
    base = GENERATORS[option.name].base_order(option.problem)
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
        yield refine(network, orders, caps, max(2 * _nodes(network), _FIRST))


def _one_by_one(option: Option, network: Network) -> Orders:
    """Each microbatch after the one before has left: slow, but no order keeps less."""
    alone = network.orders(
        generate(option.name, replace(option.problem, num_microbatches=1), option.cost)
    )
    return [
        [i * network.size + k for i in range(network.num_microbatches) for k in order]
        for order in alone
    ]


def _blocks(problem: Problem, network: Network, caps: list[float]) -> list[Block]:
    """Blocks that fit under the caps with a shard held: first those with most in flight, of these the shortest."""
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
    return network.size * network.num_microbatches


def _cap_error(best: Refined, option: Option, network: Network, caps: Sequence[float]) -> CapError:
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
