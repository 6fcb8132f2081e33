"""Schedule + Problem + CostModel -> Timeline.

One sweep in time order over the union of the data edges and the rank orders.  Every pass starts as soon as its rank and its
inputs allow; a barrier starts when its last input is there and its communicator is free, first come first served.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from schedules.cost import CostModel
from schedules.graph import DeadlockError, describe_cycle
from schedules.ir import Kind, Pass, Schedule
from schedules.problem import Collective, Node, Problem
from schedules.timeline import Span, Timeline
from schedules.vocab import End


@dataclass(frozen=True, slots=True)
class Event:
    """When a node runs, in the order of the sweep: an order that rises along every dependency."""

    node: Node
    ready: float  # its last input is there (for a pass: and its rank is free)
    start: float
    end: float


def simulate(schedule: Schedule, problem: Problem, cost: CostModel) -> Timeline:
    """The timeline of one step.  Raises DeadlockError, naming passes that wait for each other in a circle."""
    return timeline_of(list(events(schedule, problem, cost)), problem, cost)


def predecessors(schedule: Schedule, problem: Problem) -> dict[Node, tuple[Node, ...]]:
    """The union graph: for each node its inputs and, for a pass, the one before it on its rank."""
    graph: dict[Node, tuple[Node, ...]] = {node: problem.inputs_of(node) for node in problem.collectives()}
    for order in schedule.ranks:
        previous: tuple[Node, ...] = ()
        for item in order:
            graph[item] = problem.inputs_of(item) + previous
            previous = (item,)
    return graph


def events(schedule: Schedule, problem: Problem, cost: CostModel) -> Iterator[Event]:
    """Every node of the step, in time order.  Raises DeadlockError or, for a pass whose input is missing, ValueError."""
    graph = predecessors(schedule, problem)
    followers: dict[Node, list[Node]] = {node: [] for node in graph}
    for node, before in graph.items():
        for earlier in before:
            if earlier not in followers:
                raise ValueError(f"{node} needs {earlier}, which is not in schedule {schedule.name!r}")
            followers[earlier].append(node)
    missing = {node: len(before) for node, before in graph.items()}
    ready_at = dict.fromkeys(graph, 0.0)
    free_at = dict.fromkeys(End, 0.0)
    heap: list[tuple[float, int, Node]] = []
    for node, count in missing.items():
        if count == 0:
            heapq.heappush(heap, (0.0, len(heap), node))
    pushed = len(heap)
    done = 0
    while heap:
        ready, _, node = heapq.heappop(heap)
        start = ready
        if isinstance(node, Collective):
            end_of_model = problem.algorithm.barrier(node.barrier).end
            start = max(ready, free_at[end_of_model])
            end = free_at[end_of_model] = start + cost.barrier(node.barrier)
        else:
            end = start + cost.seconds(node)
        done += 1
        yield Event(node, ready, start, end)
        for later in followers[node]:
            arrival = end + cost.hop_seconds if problem.is_hop(node, later) else end
            ready_at[later] = max(ready_at[later], arrival)
            missing[later] -= 1
            if missing[later] == 0:
                heapq.heappush(heap, (ready_at[later], pushed, later))
                pushed += 1
    if done < len(graph):
        stuck = {node: graph[node] for node, count in missing.items() if count > 0}
        raise DeadlockError(describe_cycle(stuck))


def timeline_of(happened: list[Event], problem: Problem, cost: CostModel) -> Timeline:
    """Collect events into a Timeline."""
    num_ranks = problem.layout.num_ranks
    compute: list[list[Span]] = [[] for _ in range(num_ranks)]
    comm: list[Span] = []
    for event in happened:
        node = event.node
        if isinstance(node, Collective):
            rank = problem.root(problem.algorithm.barrier(node.barrier).end)
            comm.append(Span(rank, str(node), node.barrier, -1, node.microbatch, event.start, event.end))
        else:
            rank = problem.rank_of(node)
            compute[rank].append(Span(rank, str(node), node.kind.value, node.stage, node.microbatch, event.start, event.end))
    orders = [[Pass(span.stage, Kind(span.kind), span.microbatch) for span in spans] for spans in compute]
    return Timeline(
        tuple(map(tuple, compute)),
        tuple(comm),
        tuple(peak_bytes(order, problem, cost) for order in orders),
        tuple(peak_in_flight(order, problem) for order in orders),
    )


def peak_bytes(order: list[Pass], problem: Problem, cost: CostModel) -> float:
    """Peak bytes of activations and held shards on one rank; its passes run one after the other, so their order decides."""
    if problem.forward_only:
        return 0.0
    held = peak = 0.0
    for item in order:
        change = cost.byte_change(item)
        peak = max(peak, held + max(0.0, change))
        held += change
    return peak


def peak_in_flight(order: list[Pass], problem: Problem) -> int:
    """Peak number of (stage, microbatch) pairs of one rank between their F and the end of their last backward pass."""
    last = problem.stage_kinds[-1]
    flying = peak = 0
    for item in order:
        flying += item.kind is Kind.F
        peak = max(peak, flying)
        flying -= item.kind is last
    return peak
