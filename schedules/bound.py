"""Lower bounds on the time of a step, which no schedule can beat. The largest of them counts.

Each bound drops constraints. A one-machine bound lets all ranks and communicators but one do any
number of things at once. The critical path lets all of them do so. The memory bound keeps only the
memory cap of one rank. The bound of both ends keeps that cap and the work of the rank: until a
first backward pass can come, the rank has only as much work as its memory takes, and after the last
forward only the work of what its memory still holds.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from schedules.cost import CostModel
from schedules.ir import Kind, Pass
from schedules.network import Network
from schedules.problem import Problem

_TINY = 1e-9
_MOST_ITEMS = 6  # of different size, whose exact numbers are looked for


@dataclass(frozen=True, slots=True)
class Bound:
    """A lower bound: no schedule takes less than `seconds`, because of `reason`."""

    seconds: float
    reason: str


def step_bound(problem: Problem, cost: CostModel, caps: tuple[float, ...] = ()) -> Bound:
    """Return the largest lower bound on the time of a step.

    With `caps` it holds for schedules in which rank r keeps at most `caps[r]` bytes.
    """
    network = Network.of(problem, cost)
    heads, tails = longest(network), longest(network.reversed())
    path = max(
        head + seconds + tail
        for head, seconds, tail in zip(heads, network.seconds, tails, strict=True)
    )
    bounds = [Bound(path, "the critical path of one microbatch")]
    jobs_of: list[list[tuple[float, float, float]]] = [[] for _ in range(network.num_lanes)]
    for k, lane in enumerate(network.lanes):
        jobs_of[lane].append((heads[k], network.seconds[k], tails[k]))
    for lane, jobs in enumerate(jobs_of):
        name = (
            f"the work of rank {lane}"
            if lane < network.num_ranks
            else "a communicator's collectives"
        )
        bounds.append(Bound(one_machine(jobs, problem.num_microbatches), name))
    for rank, cap in enumerate(caps):
        bounds.append(
            Bound(
                _memory_seconds(rank, problem, network, cap, heads, tails),
                f"the memory of rank {rank}",
            )
        )
    known = max(bound.seconds for bound in bounds)
    for rank, cap in enumerate(caps):
        bounds.append(
            Bound(
                _ends_seconds(rank, problem, network, cap, heads, tails, known),
                f"the memory of rank {rank} in warm-up and cool-down",
            )
        )
    return max(bounds, key=lambda bound: bound.seconds)


def one_machine(jobs: Iterable[tuple[float, float, float]], copies: int) -> float:
    """Return Jackson's preemptive bound for `copies` of each job on one machine, in seconds.

    A job is (head, duration, tail), in seconds: the time before it can start, its own time, and the
    time that must follow it. The machine always works on the available job with the longest tail.
    No order can beat that.
    """
    waiting = sorted(jobs)
    available: list[tuple[float, float]] = []  # (-tail, work left of all copies)
    now = bound = 0.0
    while waiting or available:
        if not available:
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now:
            _, duration, tail = waiting.pop(0)
            heapq.heappush(available, (-tail, duration * copies))
        tail, work = heapq.heappop(available)
        until = waiting[0][0] if waiting else float("inf")
        if now + work > until:
            heapq.heappush(available, (tail, work - (until - now)))
            now = until
        else:
            now += work
            bound = max(bound, now - tail)
    return bound


def longest(network: Network, sources: Collection[int] | None = None) -> list[float]:
    """Return for each node the longest path from the start of a source to the start of the node.

    Times are in seconds; -inf where no source comes before the node. Without `sources`, the sources
    are the nodes without inputs.
    """
    heads = [float("-inf")] * network.size
    for k in range(network.size):
        if not network.inputs[k] if sources is None else k in sources:
            heads[k] = 0.0
    missing = [len(before) for before in network.inputs]
    ready = [k for k, count in enumerate(missing) if count == 0]
    while ready:
        k = ready.pop()
        for later, travel in network.followers[k]:
            heads[later] = max(heads[later], heads[k] + network.seconds[k] + travel)
            missing[later] -= 1
            if missing[later] == 0:
                ready.append(later)
    return heads


def _memory_seconds(
    rank: int,
    problem: Problem,
    network: Network,
    cap: float,
    heads: list[float],
    tails: list[float],
) -> float:
    """Return the seconds a step needs if `rank` keeps at most `cap` bytes (Little's law).

    The byte-seconds that the rank keeps during a step are at most its cap times the time in which
    it can keep anything. That time starts with its first F and ends with its last backward pass.
    """
    kept = lives(rank, problem, network)
    byte_seconds = _byte_seconds(kept, network)
    first = min((heads[start] for start, _, _ in kept), default=0.0)
    last = min((tails[end] for _, _, end in kept), default=0.0)
    if byte_seconds == 0.0:
        return 0.0
    if cap <= 0:
        return float("inf")
    return first + problem.num_microbatches * byte_seconds / cap + last


def _ends_seconds(
    rank: int,
    problem: Problem,
    network: Network,
    cap: float,
    heads: list[float],
    tails: list[float],
    known: float,
) -> float:
    """Return the seconds a step needs if `rank` keeps at most `cap` bytes at both of its ends.

    `known` is another bound. The result is 0 if both ends may overlap in a step that takes so long.
    The rank runs no backward before the earliest one can start. Until then no bytes are freed, so
    the forwards and S that fit into the cap are all its work. After the last forward its work is
    what belongs to the bytes that it then keeps. What these leave of both times is idle.
    """
    passes = {
        (node.stage, node.kind): k for k, node in enumerate(network.nodes) if isinstance(node, Pass)
    }
    stages, m = problem.layout.stages_of(rank), problem.num_microbatches
    if problem.forward_only or cap <= 0:
        return 0.0
    begin = min(heads[passes[stage, problem.backward]] for stage in stages)
    end = min(tails[passes[stage, Kind.F]] for stage in stages)
    if begin + end > known:
        return 0.0

    def seconds(kinds: Iterable[tuple[int, Kind]]) -> float:
        return sum(network.seconds[passes[key]] for key in kinds if key in passes)

    kept = [network.byte_change[passes[stage, Kind.F]] for stage in stages]
    back = (Kind.I, Kind.W) if problem.split_backward else (Kind.B,)
    output = seconds([(rank, Kind.S), (rank, Kind.T)])
    # A microbatch that has run S has run the F of all stages of the rank, and none of their I.
    first = [
        (sum(kept[: count + 1]), seconds((stage, Kind.F) for stage in stages[: count + 1]))
        for count in range(len(stages))
    ]
    first.append((first[-1][0], first[-1][1] + output))
    last = [(sum(kept), seconds((s, kind) for s in stages for kind in back) + output)]
    for stage, size in zip(stages, kept, strict=True):
        last.append((size, seconds((stage, kind) for kind in back)))
        if problem.split_backward:
            last.append((-network.byte_change[passes[stage, Kind.W]], seconds([(stage, Kind.W)])))
    if (rank, Kind.T) in passes:
        last.append((network.byte_change[passes[rank, Kind.S]], seconds([(rank, Kind.T)])))
    # E can run long before its F, and G long after its I.
    before = m * seconds([(rank, Kind.E)]) + most_work(first, cap, m)
    after = m * seconds([(rank, Kind.G)]) + most_work(last, cap, m)
    work = m * sum(network.seconds[k] for k, lane in enumerate(network.lanes) if lane == rank)
    return max(0.0, begin - before) + work + max(0.0, end - after)


def most_work(items: Sequence[tuple[float, float]], room: float, copies: int) -> float:
    """Return the most seconds of work whose bytes fit into `room`, or somewhat more.

    An item is (bytes, seconds); at most `copies` of each are taken. Fractions of an item count
    where exact numbers would take long to find.
    """
    free = copies * sum(seconds for size, seconds in items if size <= 0)
    # Of items with the same bytes, the one with the most work is enough.
    best: dict[float, float] = {}
    for size, seconds in items:
        if size > 0:
            best[size] = max(best.get(size, 0.0), seconds)
    densest = sorted(best.items(), key=lambda item: item[1] / item[0], reverse=True)
    room *= 1 + _TINY
    if not densest:
        return free
    if len(densest) > _MOST_ITEMS or room / min(best) > _MOST_ITEMS**2:
        return free + room * densest[0][1] / densest[0][0]
    return free + _packed(densest, room)


def _packed(densest: list[tuple[float, float]], room: float) -> float:
    """Return the most work of whole items within `room`. The items come densest first."""
    (size, seconds), others = densest[0], densest[1:]
    most = int(room / size)
    if not others:
        return most * seconds
    best = 0.0
    for count in range(most, -1, -1):
        left = room - count * size
        if count * seconds + left * others[0][1] / others[0][0] <= best:
            break
        best = max(best, count * seconds + _packed(others, left))
    return best


def _byte_seconds(tensors: Iterable[tuple[int, float, int]], network: Network) -> float:
    """Return the least byte-seconds for which the tensors of `lives` are kept."""
    return sum(
        kept * ((longest(network, [start])[end] if start != end else 0.0) + network.seconds[end])
        for start, kept, end in tensors
    )


def steady_bytes(rank: int, problem: Problem, network: Network) -> float:
    """Return the least bytes that `rank` keeps on average in a steady state without a bubble.

    In such a state a microbatch starts whenever the busiest rank has done the work of one.
    """
    work = [0.0] * network.num_lanes
    for lane, seconds in zip(network.lanes, network.seconds, strict=True):
        work[lane] += seconds
    return _byte_seconds(lives(rank, problem, network), network) / max(work) if any(work) else 0.0


def lives(rank: int, problem: Problem, network: Network) -> list[tuple[int, float, int]]:
    """Return the tensors that `rank` keeps for one microbatch, as (first pass, bytes, last pass).

    Passes are indices of nodes in `network`. A tensor is kept from the start of its first pass to
    the end of its last.
    """
    passes = {
        (node.stage, node.kind): k for k, node in enumerate(network.nodes) if isinstance(node, Pass)
    }
    change = network.byte_change
    found = []
    for stage in problem.layout.stages_of(rank):
        first = passes[stage, Kind.F]
        if (stage, Kind.W) in passes:
            until_input, until_weights = passes[stage, Kind.I], passes[stage, Kind.W]
            found.append((first, change[first], until_input))
            found.append((until_weights, -change[until_weights], until_weights))
        elif (stage, Kind.B) in passes:
            found.append((first, change[first], passes[stage, Kind.B]))
    if (rank, Kind.T) in passes:
        found.append((passes[rank, Kind.S], change[passes[rank, Kind.S]], passes[rank, Kind.T]))
    return found
