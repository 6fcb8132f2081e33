"""The table of schedules, and `generate`, which constructs one of them for a problem.

A base schedule orders the stage passes. `generate` checks that order, then adds the vocabulary
passes of the problem. If the backward is split, it also refines the order: passes of the warm-up
and the cool-down move where that closes gaps. No rank then has more microbatches in flight than in
the base order. Where stages recompute their activations in I, what waits for W counts instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from schedules.check import check_base
from schedules.cost import CostModel
from schedules.generators.gpipe import gpipe
from schedules.generators.interlaced import interlaced
from schedules.generators.interleaved import interleaved
from schedules.generators.one_f_one_b import one_f_one_b
from schedules.generators.refine import refine
from schedules.generators.v_shape import v_half, v_min
from schedules.generators.weave import (
    ALONE,
    STARTS,
    BaseOrder,
    Preference,
    in_flight_weights,
    most_in_flight,
    preferences_of,
    weave,
)
from schedules.generators.zero_bubble import zb_h1, zb_h2, zb_v
from schedules.graph import DeadlockError
from schedules.ir import Kind, Pass, Schedule
from schedules.layout import Layout
from schedules.network import Network, Orders
from schedules.problem import Problem
from schedules.simulate import timed

# The nodes that may be placed in search of a better order, which takes about a second. A single try
# may take more.
_EFFORT = 120_000
_SHORT = 3  # microbatches per rank of a step that tells which order suits a long one
_LIKELY = 2  # of the preferences, the ones that are best in nearly all long steps
# Where ranks wait in the steady state, a microbatch more takes by this part longer than the busiest
# of them works on it.
_WAITING = 0.01


@dataclass(frozen=True, slots=True)
class BaseSchedule:
    """A base schedule: its order of stage passes, its layout, and whether it splits the backward.

    `layout` and `num_chunks` are those of `Layout`. `split_backward`: every B becomes I and W.
    `searched`: whether `vp-plan --search` tries it. Of a problem's algorithm a base order may read
    `extra_in_flight` alone.
    """

    base_order: Callable[[Problem], BaseOrder]
    layout: str = "linear"
    num_chunks: int = 1
    split_backward: bool = False
    searched: bool = False

    def layout_of(self, num_ranks: int, num_chunks: int | None = None) -> Layout:
        """Return the layout on `num_ranks` ranks, with `num_chunks` stages per rank if it is given.

        Raises ValueError for a number of chunks that the layout cannot have.
        """
        return Layout(self.layout, num_ranks, self.num_chunks if num_chunks is None else num_chunks)


GENERATORS: dict[str, BaseSchedule] = {
    "gpipe": BaseSchedule(gpipe),  # not searched: as slow as 1f1b, and it keeps more
    "1f1b": BaseSchedule(one_f_one_b, searched=True),
    "interleaved": BaseSchedule(interleaved, "loop", 2, searched=True),
    "interlaced": BaseSchedule(interlaced),  # not searched: it serves as a comparison
    "zb_h1": BaseSchedule(zb_h1, split_backward=True, searched=True),
    "zb_h2": BaseSchedule(zb_h2, split_backward=True, searched=True),
    "zb_v": BaseSchedule(zb_v, "v", 2, split_backward=True, searched=True),
    "v_half": BaseSchedule(v_half, "v", 2, split_backward=True, searched=True),
    "v_min": BaseSchedule(v_min, "v", 2, split_backward=True, searched=True),
}


class BaseOrderError(ValueError):
    """The error of a generator with a mistake: names the schedule, the pass and the defect."""

    def __init__(self, name: str, defect: ValueError) -> None:
        function = GENERATORS[name].base_order
        super().__init__(
            f"schedule {name}: {defect}; "
            f"mend the base order that {function.__module__}.{function.__name__} returns"
        )


def searched_schedules() -> tuple[str, ...]:
    """Return the names of the schedules that a search tries, in the order of the table."""
    return tuple(name for name, family in GENERATORS.items() if family.searched)


def base_order(name: str, problem: Problem) -> BaseOrder:
    """Return the base order of the schedule `name`, which has every stage pass once on its rank.

    Raises BaseOrderError, naming the pass, if the generator's does not. `complete` finds passes
    that wait in a cycle.
    """
    base = GENERATORS[name].base_order(problem)
    try:
        check_base(Schedule(name, base), problem)
    except ValueError as error:
        raise BaseOrderError(name, error) from None
    return base


def generate(
    name: str, problem: Problem, cost: CostModel, *, effort: int | None = None
) -> Schedule:
    """Return the schedule `name` for `problem`.

    effort: the nodes that may be placed in search of a better order; None: what takes a second.

    Raises ValueError for a name that is not in GENERATORS, and for a layout that it cannot have,
    and BaseOrderError for a base order with a missing, repeated or misplaced pass or a deadlock.
    """
    network = Network.of(problem, cost)
    return network.schedule(name, ordered(name, problem, network, effort=effort)[0])


def ordered(
    name: str, problem: Problem, network: Network, *, effort: int | None = None
) -> tuple[Orders, float]:
    """Return the orders of the schedule `name` by the ids of `network`, and their makespan.

    `effort` is that of `generate`, which says what it raises. The makespan is in seconds.
    """
    if name not in GENERATORS:
        raise ValueError(f"schedule {name!r} is not known; choose one of {', '.join(GENERATORS)}")
    base = base_order(name, problem)
    try:
        return _woven(base, problem, network, effort=effort)
    except DeadlockError as error:
        raise BaseOrderError(name, error) from None


@dataclass(frozen=True, slots=True)
class Shortened:
    """Short steps, which are made as `generate` makes a long one.

    schedules, seconds: those of the steps and their makespans.
    waits: whether ranks wait in the steady state, as two steps tell. Where the work of the busiest
        rank binds, a long step takes what they promise. Where ranks wait, other orders may be
        faster, and what is split may become slower or faster later.
    num_orders: how many orders were woven for each step, of which one was taken. A split backward
        is refined instead.
    """

    schedules: tuple[Schedule, ...]
    seconds: tuple[float, ...]
    waits: bool
    num_orders: int


def shortened(
    name: str, problem: Problem, cost: CostModel, counts: Sequence[int], efforts: Sequence[int]
) -> Shortened:
    """Return steps with `counts` microbatches, made as `generate` makes that of `problem`.

    `efforts` are those of `generate`, as many for every microbatch. Then all are tried and refined
    as often, and what one microbatch more takes between them is what it takes in the long step.
    More orders are tried where ranks wait, since a long step takes the best of all. `generate` says
    what is raised.
    """
    network, whole = Network.of(problem, cost), problem.num_microbatches
    nears = [replace(network, num_microbatches=count) for count in counts]
    fews = [replace(problem, num_microbatches=count) for count in counts]

    def waits(steps: Sequence[tuple[Orders, float]]) -> bool:
        return _waits(network, counts, [seconds for _, seconds in steps])

    if problem.split_backward:
        num_orders = 1
        found = [
            ordered(name, few, near, effort=effort)
            for few, near, effort in zip(fews, nears, efforts, strict=True)
        ]
    else:
        bases = [base_order(name, few) for few in fews]

        def tried(preference: Preference) -> list[tuple[Orders, float]]:
            try:
                woven = [
                    weave(*of_one, preference) for of_one in zip(bases, fews, nears, strict=True)
                ]
            except DeadlockError as error:
                raise BaseOrderError(name, error) from None
            return [
                (one, timed(near, one).makespan) for near, one in zip(nears, woven, strict=True)
            ]

        def seconds_of(tries: Sequence[tuple[Orders, float]]) -> float:
            return _rounded(promised(whole, counts, [seconds for _, seconds in tries]))

        num_orders = max(_LIKELY, efforts[-1] // (network.size * counts[-1]))
        preferences = preferences_of(problem)
        num_orders = min(num_orders, len(preferences))
        found = min(map(tried, preferences[:num_orders]), key=seconds_of)
        if _is_long(problem) and waits(found):
            found = min([found, *map(tried, preferences[num_orders:])], key=seconds_of)
            num_orders = len(preferences)
    return Shortened(
        tuple(near.schedule(name, orders) for near, (orders, _) in zip(nears, found, strict=True)),
        tuple(seconds for _, seconds in found),
        waits(found),
        num_orders,
    )


def _rounded(seconds: float) -> float:
    """Return seconds by which orders compare: of equally fast ones the first is taken.

    Without it the rounding of sums would choose, and another one in a short step than in a long.
    """
    return float(f"{seconds:.9g}")


def promised(num_microbatches: int, counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the seconds of a long step, if steps with one or two `counts` take `seconds`."""
    if len(counts) == 1:
        return seconds[0]
    rate = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
    return seconds[1] + (num_microbatches - counts[1]) * rate


def _waits(network: Network, counts: Sequence[int], seconds: Sequence[float]) -> bool:
    """Return whether ranks wait in the steady state, if steps with `counts` take `seconds`."""
    if len(counts) == 1:
        return False
    work = [0.0] * network.num_lanes
    for lane, took in zip(network.lanes, network.seconds, strict=True):
        work[lane] += took
    busiest = max(work[: network.num_ranks])
    return seconds[-1] - seconds[0] > (1 + _WAITING) * (counts[-1] - counts[0]) * busiest


def complete(
    name: str,
    base: BaseOrder,
    problem: Problem,
    cost: CostModel,
    *,
    keep_order: bool = False,
) -> Schedule:
    """Return the schedule `name`: the order `base` with the vocabulary passes of `problem`.

    `base` has the stage passes of every rank. If the backward is split, passes may change places.
    With `keep_order` only W may. Raises DeadlockError if the base order cannot be executed.
    """
    network = Network.of(problem, cost)
    return network.schedule(name, _woven(base, problem, network, keep_order=keep_order)[0])


def _woven(
    base: BaseOrder,
    problem: Problem,
    network: Network,
    *,
    keep_order: bool = False,
    effort: int | None = None,
) -> tuple[Orders, float]:
    """Return the best orders found of `base` with the vocabulary passes, and their makespan."""
    effort = _EFFORT if effort is None else effort
    nodes = network.size * network.num_microbatches

    def tried(preference: Preference) -> tuple[Orders, float]:
        orders = weave(base, problem, network, preference)
        return orders, timed(network, orders).makespan

    def seconds_of(found: tuple[Orders, float]) -> float:
        return _rounded(found[1])

    if keep_order or not problem.split_backward:
        preferences = _preferred(base, problem, network, max(1, effort // nodes))
        return min(map(tried, preferences), key=seconds_of)
    counted, caps = _in_flight(network, problem, base)
    starts = [
        weave(base, problem, network, preference)
        for preference in STARTS[: 2 if nodes < effort // 3 else 1]
    ]
    refined = [refine(counted, orders, caps, max(2 * nodes, effort // 2)) for orders in starts]
    best = min(refined, key=lambda found: found.quality)
    found = best.orders, best.makespan
    return found if problem.layout.num_ranks > 1 else min(tried(ALONE), found, key=seconds_of)


def _preferred(
    base: BaseOrder, problem: Problem, network: Network, count: int
) -> tuple[Preference, ...]:
    """Return `count` of the preferences, of a long step those that are best in a short one."""
    few, preferences = _SHORT * problem.layout.num_ranks, preferences_of(problem)
    if count >= len(preferences) or not _is_long(problem):
        return preferences[:count]
    short = replace(problem, num_microbatches=few)
    near = replace(network, num_microbatches=few)
    cut = tuple(tuple(item for item in order if item.microbatch < few) for order in base)

    def seconds(preference: Preference) -> float:
        return _rounded(timed(near, weave(cut, short, near, preference)).makespan)

    return tuple(sorted(preferences, key=seconds)[:count])


def _is_long(problem: Problem) -> bool:
    """Return whether a short step tells which order suits a step of `problem`."""
    return problem.num_microbatches >= 2 * _SHORT * problem.layout.num_ranks


def _in_flight(network: Network, problem: Problem, base: BaseOrder) -> tuple[Network, list[float]]:
    """Return `network` with memory counted in stages in flight, and the cap of every rank.

    The cap is the peak of the base order plus one shard between its S and T. Such a shard counts as
    the fraction of a stage that its bytes are, but at least 0.1 and at most 0.9. Then S cannot run
    far ahead of T, and no stage fits into the place of a shard.
    """
    passes = [node for node in network.nodes if isinstance(node, Pass)]
    weights = in_flight_weights(network, problem)
    whole = Kind.F if weights[Kind.F] == 1.0 else Kind.W
    stage_bytes = [abs(network.byte_change[k]) for k, one in enumerate(passes) if one.kind is whole]
    shard_bytes = [network.byte_change[k] for k, one in enumerate(passes) if one.kind is Kind.S]
    stage = sum(stage_bytes) / len(stage_bytes)
    shard = min(0.9, max(0.1, max(shard_bytes, default=0.0) / stage)) if stage > 0 else 0.1
    held = {**weights, Kind.S: shard, Kind.T: -shard}
    changes = [held.get(item.kind, 0.0) for item in passes]
    changes += [0.0] * (network.size - len(passes))
    caps = [most_in_flight(order, weights) + shard for order in base]
    return replace(network, byte_change=tuple(changes)), caps
