"""Schedule + Problem + CostModel -> Timeline.

The simulation is one sweep in order of time over a graph. Its edges are the data dependencies and
the order of the passes on every rank. A pass starts when its rank is free and its inputs have
arrived. A collective starts when its inputs have arrived and its communicator is free. A
communicator serves its collectives in the order in which they become ready. A rank's link to its
host runs beside the passes, see `transfers`.
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
from schedules.transfers import HostBytes, HostLinks
from schedules.vocab import End


@dataclass(frozen=True, slots=True)
class Sweep:
    """The times of a simulated step, in seconds from its start, indexed by the id of the node.

    `order`: the ids in the order of the sweep, which respects every dependency.
    `ready`: when the last input has arrived and, for a pass, its rank is free.
    `start`: when the node starts. It ends at its start plus its duration.
    `makespan`: the duration of the step.
    """

    order: list[int]
    ready: list[float]
    start: list[float]
    makespan: float


@dataclass(frozen=True, slots=True)
class SweepTimes:
    """The `start` of every node and the `makespan` of a `Sweep`, in seconds."""

    start: list[float]
    makespan: float


def simulate(
    schedule: Schedule, problem: Problem, cost: CostModel, caps: tuple[float, ...] = ()
) -> Timeline:
    """Return the timeline of one step, with the lower bound on the time of any schedule.

    With `caps` the bound holds for schedules in which rank r keeps at most `caps[r]` bytes. Raises
    ValueError for a missing or misplaced pass, and DeadlockError, naming the passes, if some wait
    for each other in a cycle.
    """
    timeline = simulate_order(schedule, problem, cost)
    return replace(timeline, bound=step_bound(problem, cost, caps).seconds)


def simulate_order(schedule: Schedule, problem: Problem, cost: CostModel) -> Timeline:
    """Return the timeline of one step like `simulate`, without a lower bound."""
    network = Network.of(problem, cost)
    orders, links = network.orders(schedule), HostLinks.of(schedule, problem, cost, network)
    timeline = _timeline_of(sweep(network, orders, links), network, problem)
    if links is None:
        return timeline
    host = HostBytes.of(schedule.offloads, cost)
    peaks = (
        host.peak(order, network.byte_changes(numbers))
        for order, numbers in zip(schedule.ranks, orders, strict=True)
    )
    return replace(timeline, peak_bytes=tuple(peaks), transfers=links.transfers)


def predecessors(schedule: Schedule, problem: Problem) -> dict[Node, tuple[Node, ...]]:
    """Return for each node its inputs and, for a pass, also the previous pass of its rank."""
    graph: dict[Node, tuple[Node, ...]] = {
        node: problem.inputs_of(node) for node in problem.collectives()
    }
    for order in schedule.ranks:
        previous: tuple[Node, ...] = ()
        for item in order:
            graph[item] = problem.inputs_of(item) + previous
            previous = (item,)
    return graph


def sweep(network: Network, orders: Orders, links: HostLinks | None = None) -> Sweep:
    """Simulate the passes of every rank in the given order, and the transfers on `links`.

    Raises ValueError for a pass that no rank runs, and DeadlockError if passes wait in a cycle.
    """
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
    seconds, followers = network.seconds, network.followers
    lanes, num_passes = network.lanes, network.num_passes
    push, pop = heapq.heappush, heapq.heappop
    ready, start = [0.0] * total, [0.0] * total
    free_at = [0.0] * network.num_lanes
    met: list[int] = []
    makespan = 0.0
    heap: list[tuple[float, int, int]] = [
        (0.0, number, number) for number in range(total) if missing[number] == 0
    ]
    pushed = total
    # Nodes leave the heap in order of the time at which they are ready, so their start is final.
    # Every node that ends delivers its result to its followers and, for a pass, frees its rank.
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
            if links is not None and number in links.issues:
                links.issue(number, lanes[k], end, ready)
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
        raise DeadlockError(_cycle(network, orders, missing))
    return Sweep(met, ready, start, makespan)


def timed(network: Network, orders: Orders) -> SweepTimes:
    """Return the times that `sweep` finds, for orders that hold each pass at most once.

    It takes about two thirds of the time of `sweep`, and raises what that does. Where it does not
    come to an end, or two collectives of a communicator become ready at once, it asks `sweep`.

    A rank runs ahead of the others until a pass waits for one of them. Only collectives go in order
    of time, because a communicator serves them in the order in which they become ready. While all
    ranks wait, no collective becomes ready before the first one that is.
    """
    size, num_passes, count = network.size, network.num_passes, network.num_microbatches
    seconds, followers, lanes = network.seconds, network.followers, network.lanes
    push, pop = heapq.heappush, heapq.heappop
    missing = [len(before) for before in network.inputs] * count
    start, free_at = [0.0] * (size * count), [0.0] * network.num_lanes
    # The orders of ranks, and those in which communicators serve. Of every lane how many of its
    # nodes have run, the node that it waits to run, and when the last collective was ready.
    queues = [*orders, *([] for _ in range(network.num_ranks, network.num_lanes))]
    done, awaited = [0] * network.num_lanes, [-1] * network.num_lanes
    served = [-1.0] * network.num_lanes
    takes_time = any(seconds[num_passes:])  # else it does not matter which of two comes first
    awake, ready = list(range(network.num_ranks)), list[tuple[float, int]]()
    while awake or ready:
        if not awake:
            at, number = pop(ready)
            lane = lanes[number % size]
            if at == served[lane] and takes_time:
                break  # which of two comes first, only a sweep says
            served[lane] = at
            queues[lane].append(number)
            awake.append(lane)
        lane = awake.pop()
        queue, head, now = queues[lane], done[lane], free_at[lane]
        end_of_queue = len(queue)
        while head < end_of_queue:
            number = queue[head]
            if missing[number]:
                awaited[lane] = number
                break
            head += 1
            if start[number] > now:
                now = start[number]
            else:
                start[number] = now
            k = number % size
            base = number - k
            now += seconds[k]
            for step, travel in followers[k]:
                later, arrival = base + step, now + travel
                if arrival > start[later]:
                    start[later] = arrival
                missing[later] -= 1
                if not missing[later]:
                    if step >= num_passes:
                        push(ready, (start[later], later))
                    elif awaited[lanes[step]] == later:
                        awake.append(lanes[step])
        done[lane], free_at[lane] = head, now
    if sum(done) < size * count:
        swept = sweep(network, orders)
        return SweepTimes(swept.start, swept.makespan)
    return SweepTimes(start, max(free_at))


def _cycle(network: Network, orders: Orders, missing: list[int]) -> str:
    """Return one cycle among the nodes that could not start, as text."""
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
    """Return the spans of a sweep and the peaks of every rank, without a bound."""
    size, num_ranks, num_passes = network.size, network.num_ranks, network.num_passes
    lanes, seconds, starts = network.lanes, network.seconds, swept.start
    compute: list[list[Span]] = [[] for _ in range(num_ranks)]
    comm: list[Span] = []
    orders: Orders = [[] for _ in range(num_ranks)]
    roots = [problem.root(end) for end in End]
    # Of every node: the beginning of its name, its kind and its stage.
    names = [
        (f"{node.stage}{node.kind}", node.kind.value, node.stage)
        if isinstance(node, Pass)
        else (f"{node.barrier}.", node.barrier, -1)
        for node in network.nodes
    ]
    numerals = list(map(str, range(network.num_microbatches)))
    for number in swept.order:
        microbatch, k = divmod(number, size)
        (name, kind, stage), lane, start = names[k], lanes[k], starts[number]
        name += numerals[microbatch]
        end = start + seconds[k]
        if k < num_passes:
            compute[lane].append(Span(lane, name, kind, stage, microbatch, start, end))
            orders[lane].append(number)
        else:
            root = roots[lane - num_ranks]
            comm.append(Span(root, name, kind, stage, microbatch, start, end))
    changes = [
        in_flight_change(node, problem) if isinstance(node, Pass) else 0 for node in network.nodes
    ]
    return Timeline(
        compute=tuple(map(tuple, compute)),
        comm=tuple(comm),
        peak_bytes=tuple(peak(network.byte_changes(order)) for order in orders),
        peak_in_flight=tuple(
            int(peak([changes[number % size] for number in order])) for order in orders
        ),
    )


def in_flight_change(item: Pass, problem: Problem) -> int:
    """Return by how much `item` changes the number of (stage, microbatch) pairs in flight.

    That is +1 for the F of a stage, -1 for its last backward pass (B or W), else 0.
    """
    return (item.kind is Kind.F) - (item.kind is problem.stage_kinds[-1])


def peak(changes: Iterable[float]) -> float:
    """Return the highest running sum of `changes`, at least 0.

    The passes of a rank run one after the other. So a rank's peak depends on their order only.
    """
    held = highest = 0.0
    for change in changes:
        held += change
        if held > highest:
            highest = held
    return highest


def peak_in_flight(order: Iterable[Pass], problem: Problem) -> int:
    """Return the peak number of (stage, microbatch) pairs in flight on the rank with this `order`.

    A pair is in flight from its F to the end of its last backward pass.
    """
    last = problem.stage_kinds[-1]  # as in `in_flight_change`, in less time
    return int(peak((item.kind is Kind.F) - (item.kind is last) for item in order))
