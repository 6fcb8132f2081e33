"""How fast can any schedule be?  Lower bounds on the seconds of a step, the largest of which counts.

Each bound drops constraints: the one-machine bounds let every rank but one (or every communicator but one) do any number of
things at once, the critical path all of them, and the memory bound all but one rank's memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from schedules.cost import CostModel
from schedules.ir import Kind, Pass
from schedules.network import Network
from schedules.problem import Problem


@dataclass(frozen=True, slots=True)
class Bound:
    """No schedule takes less than `seconds`, because of `reason`."""

    seconds: float
    reason: str


def step_bound(problem: Problem, cost: CostModel, caps: tuple[float, ...] = ()) -> Bound:
    """The largest lower bound on a step; with `caps`, bytes per rank, also what that memory allows."""
    network = Network.of(problem, cost)
    heads, tails = _longest(network), _longest(network.reversed())
    path = max(head + seconds + tail for head, seconds, tail in zip(heads, network.seconds, tails, strict=True))
    bounds = [Bound(path, "the critical path of one microbatch")]
    for lane in range(network.num_lanes):
        jobs = [(heads[k], network.seconds[k], tails[k]) for k, at in enumerate(network.lanes) if at == lane]
        name = f"the work of rank {lane}" if lane < network.num_ranks else "a communicator's collectives"
        bounds.append(Bound(one_machine(jobs, problem.num_microbatches), name))
    for rank, cap in enumerate(caps):
        bounds.append(Bound(_memory_seconds(rank, problem, network, cap, heads, tails), f"the memory of rank {rank}"))
    return max(bounds, key=lambda bound: bound.seconds)


def one_machine(jobs: Iterable[tuple[float, float, float]], copies: int) -> float:
    """Jackson's preemptive bound: `copies` of each (head, duration, tail) on one machine.

    The machine always works on the available job with the longest tail, which no order can beat.
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


def _longest(network: Network) -> list[float]:
    """For each node the longest time from a source to its start, with nothing else in the way."""
    heads: dict[int, float] = {}

    def head(k: int) -> float:
        if k not in heads:
            heads[k] = max((head(j) + network.seconds[j] + travel for j, travel in network.inputs[k]), default=0.0)
        return heads[k]

    return [head(k) for k in range(network.size)]


def least_life(network: Network, first: int, last: int) -> float:
    """Seconds from the start of `first` to the end of `last`, at the least."""
    longest: dict[int, float] = {}

    def from_first(k: int) -> float:
        if k == first:
            return 0.0
        if k not in longest:
            longest[k] = max(
                (from_first(j) + network.seconds[j] + travel for j, travel in network.inputs[k]), default=float("-inf")
            )
        return longest[k]

    return from_first(last) + network.seconds[last]


def _memory_seconds(rank: int, problem: Problem, network: Network, cap: float, heads: list[float], tails: list[float]) -> float:
    """Little's law: what a rank keeps, over a step, is at most its cap times the time in which it can keep anything."""
    byte_seconds = 0.0
    first, last = float("inf"), float("inf")
    for start, kept, end in lives(rank, problem, network):
        byte_seconds += kept * least_life(network, start, end)
        first, last = min(first, heads[start]), min(last, tails[end])
    if byte_seconds == 0.0:
        return 0.0
    if cap <= 0:
        return float("inf")
    return first + problem.num_microbatches * byte_seconds / cap + last


def lives(rank: int, problem: Problem, network: Network) -> list[tuple[int, float, int]]:
    """What a rank keeps of one microbatch: (the pass that begins it, bytes, the pass whose end frees it)."""
    passes = {(node.stage, node.kind): k for k, node in enumerate(network.nodes) if isinstance(node, Pass)}
    change: Callable[[int], float] = network.byte_change.__getitem__
    found = []
    for stage in problem.layout.stages_of(rank):
        first = passes[stage, Kind.F]
        if problem.split_backward:
            until_input, until_weights = passes[stage, Kind.I], passes[stage, Kind.W]
            found.append((first, -change(until_weights), until_weights))
            found.append((first, change(first) + change(until_weights), until_input))
        elif (stage, Kind.B) in passes:
            found.append((first, change(first), passes[stage, Kind.B]))
    if (rank, Kind.T) in passes:
        found.append((passes[rank, Kind.S], change(passes[rank, Kind.S]), passes[rank, Kind.T]))
    return found
