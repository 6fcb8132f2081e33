"""Schedule + Problem + CostModel -> Timeline.

One sweep in time order over the union of the data edges and the rank orders.  Every pass starts as soon as its rank and its
inputs allow; a barrier starts when its last input is there and its communicator is free, first come first served.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from schedules.bound import step_bound
from schedules.cost import CostModel
from schedules.graph import DeadlockError, describe_cycle
from schedules.ir import Kind, Pass, Schedule
from schedules.network import Network, Orders
from schedules.problem import Node, Problem
from schedules.timeline import Span, Timeline
from schedules.vocab import End


@dataclass(frozen=True, slots=True)
class Sweep:
    """When every node runs, by its id in the network; an end is its start and its seconds.

    `order` lists the ids as the sweep met them, which rises along every dependency.  `ready`: the last input is there (for a
    pass: and its rank is free).
    """

    order: list[int]
    ready: list[float]
    start: list[float]
    makespan: float


def simulate(
    schedule: Schedule, problem: Problem, cost: CostModel, caps: tuple[float, ...] = ()
) -> Timeline:
    """The timeline of one step, with the bound on all orders or, if given, those in which rank r keeps at most caps[r] bytes.

    Raises DeadlockError, naming passes that wait for each other in a circle.
    """
    network = Network.of(problem, cost)
    timeline = _timeline_of(sweep(network, network.orders(schedule)), network, problem)
    return replace(timeline, bound=step_bound(problem, cost, caps).seconds)


def predecessors(schedule: Schedule, problem: Problem) -> dict[Node, tuple[Node, ...]]:
    """The union graph: for each node its inputs and, for a pass, the one before it on its rank."""
    graph: dict[Node, tuple[Node, ...]] = {
        node: problem.inputs_of(node) for node in problem.collectives()
    }
    for order in schedule.ranks:
        previous: tuple[Node, ...] = ()
        for item in order:
            graph[item] = problem.inputs_of(item) + previous
            previous = (item,)
    return graph


def sweep(network: Network, orders: Orders) -> Sweep:
    """Run every rank's passes in their order.  Raises DeadlockError or, for a pass that no rank runs, ValueError."""
    size = network.size
    total = size * network.num_microbatches
    missing = [len(before) for before in network.inputs] * network.num_microbatches
    next_on_rank = [-1] * total
    for order in orders:
        for earlier, later in pairwise(order):
            next_on_rank[earlier] = later
            missing[later] += 1
    if sum(map(len, orders)) < network.num_passes * network.num_microbatches:
        run = {number for order in orders for number in order}
        absent = next(n for n in range(total) if n % size < network.num_passes and n not in run)
        raise ValueError(f"{network.node(absent)} is missing: no rank of the schedule runs it")
    seconds, followers, lanes, num_passes = (
        network.seconds,
        network.followers,
        network.lanes,
        network.num_passes,
    )
    push, pop = heapq.heappush, heapq.heappop
    ready, start = [0.0] * total, [0.0] * total
    free_at = [0.0] * network.num_lanes
    met: list[int] = []
    makespan = 0.0
    heap: list[tuple[float, int, int]] = [
        (0.0, number, number) for number in range(total) if missing[number] == 0
    ]
    pushed = total
    while heap:
        now, _, number = pop(heap)
        k = number % size
        base = number - k
        met.append(number)
        if k >= num_passes:
            lane = lanes[k]
            begin = free_at[lane]
            if now > begin:
                begin = now
            end = free_at[lane] = begin + seconds[k]
        else:
            begin, end = now, now + seconds[k]
            later = next_on_rank[number]
            if later >= 0:
                if end > ready[later]:
                    ready[later] = end
                missing[later] -= 1
                if not missing[later]:
                    pushed += 1
                    push(heap, (ready[later], pushed, later))
        start[number] = begin
        if end > makespan:
            makespan = end
        for step, travel in followers[k]:
            later, arrival = base + step, end + travel
            if arrival > ready[later]:
                ready[later] = arrival
            missing[later] -= 1
            if not missing[later]:
                pushed += 1
                push(heap, (ready[later], pushed, later))
    if len(met) < total:
        raise DeadlockError(_circle(network, orders, missing))
    return Sweep(met, ready, start, makespan)


def _circle(network: Network, orders: Orders, missing: list[int]) -> str:
    stuck = {number for number, count in enumerate(missing) if count > 0}
    waiting = {
        number: [
            number - number % network.size + k for k, _ in network.inputs[number % network.size]
        ]
        for number in stuck
    }
    for order in orders:
        for earlier, later in pairwise(order):
            if later in stuck:
                waiting[later].append(earlier)
    return describe_cycle(waiting, lambda number: str(network.node(number)))


def _timeline_of(swept: Sweep, network: Network, problem: Problem) -> Timeline:
    """The spans of a sweep, and the peaks of every rank."""
    size, num_ranks = network.size, network.num_ranks
    compute: list[list[Span]] = [[] for _ in range(num_ranks)]
    comm: list[Span] = []
    orders: Orders = [[] for _ in range(num_ranks)]
    roots = [problem.root(end) for end in End]
    for number in swept.order:
        microbatch, k = divmod(number, size)
        node, lane, start = network.nodes[k], network.lanes[k], swept.start[number]
        end = start + network.seconds[k]
        if isinstance(node, Pass):
            name = f"{node.stage}{node.kind.value}{microbatch}"
            compute[lane].append(
                Span(lane, name, node.kind.value, node.stage, microbatch, start, end)
            )
            orders[lane].append(number)
        else:
            comm.append(
                Span(
                    roots[lane - num_ranks],
                    f"{node.barrier}.{microbatch}",
                    node.barrier,
                    -1,
                    microbatch,
                    start,
                    end,
                )
            )
    flying = [
        in_flight_change(node, problem) if isinstance(node, Pass) else 0 for node in network.nodes
    ]
    return Timeline(
        tuple(map(tuple, compute)),
        tuple(comm),
        tuple(peak(network.byte_changes(order)) for order in orders),
        tuple(int(peak([flying[number % size] for number in order])) for order in orders),
    )


def in_flight_change(item: Pass, problem: Problem) -> int:
    """+1 for the pass that puts a (stage, microbatch) in flight, its F, and -1 for its last backward pass."""
    return (item.kind is Kind.F) - (item.kind is problem.stage_kinds[-1])


def peak(changes: Iterable[float]) -> float:
    """The highest running sum; a rank's passes run one after the other, so their order alone decides."""
    held = highest = 0.0
    for change in changes:
        held += change
        highest = max(highest, held)
    return highest


def peak_in_flight(order: Iterable[Pass], problem: Problem) -> int:
    """Peak number of (stage, microbatch) pairs of one rank between their F and the end of their last backward pass."""
    return int(peak(in_flight_change(item, problem) for item in order))
