"""Schedule -> Program: the passes of every rank with its communication woven in.

Every operation gets a place in one global order that rises along all dependencies (the simulated time at which its inputs
are there), and every rank executes its operations in that order.  So all ranks issue the collectives of a communicator in
the same order, and nothing can wait in a circle even if each communication blocks until its partner arrives.

A collective that continues another (its message needs what that one delivers) is started without waiting for it: the runtime
sees to it beside the passes.  If the rank waited, the pass that the simulation shows meanwhile would start late.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from schedules.cost import CostModel
from schedules.ir import Kind, Pass, Schedule
from schedules.network import Network
from schedules.problem import Collective, Node, Problem
from schedules.simulate import sweep


class Action(StrEnum):
    """What a rank does with an operation.  All communication is asynchronous: issued by one operation, awaited by another."""

    RUN = "run"  # compute a pass
    SEND = "send"  # issue the send of a pass's output to `peer`
    RECV = "recv"  # issue the receive of a pass's output from `peer`
    ARRIVE = "arrive"  # wait for that receive
    START = "start"  # issue a collective; one that continues another is issued as soon as that has ended
    WAIT = "wait"  # wait for it
    READY = "ready"  # a gradient is complete: this pass was the last that adds to it


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of one rank: on a pass, or on a barrier of one microbatch."""

    action: Action
    item: Pass | Collective
    peer: int | None = None

    def __str__(self) -> str:
        if self.action is Action.RUN:
            return str(self.item)
        return f"{self.action}:{self.item}" + ("" if self.peer is None else f"@{self.peer}")


@dataclass(frozen=True, slots=True)
class Program:
    """What each rank executes, in order."""

    ranks: tuple[tuple[Op, ...], ...]

    def text(self) -> str:
        """One line per rank."""
        return "\n".join(" ".join(map(str, ops)) for ops in self.ranks) + "\n"


def lower(schedule: Schedule, problem: Problem, cost: CostModel, *, tied: bool = False) -> Program:
    """The program of `schedule`.  Costs choose where communication is issued, never whether the program is correct.

    `tied`: the vocabulary layers of a rank have one gradient, which T and G add to.
    """
    programs: list[list[Op]] = [[] for _ in range(problem.layout.num_ranks)]
    awaited: list[set[Node]] = [set() for _ in programs]

    def wait_for_inputs(node: Node, rank: int) -> None:
        for earlier in problem.inputs_of(node):
            if earlier in awaited[rank]:
                continue
            if isinstance(earlier, Collective):
                awaited[rank].add(earlier)
                programs[rank].append(Op(Action.WAIT, earlier))
            elif problem.is_hop(earlier, node):
                awaited[rank].add(earlier)
                programs[rank].append(Op(Action.ARRIVE, earlier, problem.rank_of(earlier)))

    for node in _issue_order(schedule, problem, cost):
        if isinstance(node, _Hop):
            programs[node.sender].append(Op(Action.SEND, node.item, node.receiver))
            programs[node.receiver].append(Op(Action.RECV, node.item, node.sender))
        elif isinstance(node, Collective):
            for rank in problem.shard_ranks(problem.algorithm.barrier(node.barrier).end):
                programs[rank].append(Op(Action.START, node))
        else:
            rank = problem.rank_of(node)
            wait_for_inputs(node, rank)
            programs[rank].append(Op(Action.RUN, node))
    for node in problem.collectives():
        for rank in problem.receivers(node):
            if node not in awaited[rank]:  # no pass needs it (the loss of an evaluation): the end of the step does
                programs[rank].append(Op(Action.WAIT, node))
    return Program(tuple(tuple(_with_ready(ops, problem, tied=tied)) for ops in programs))


def _with_ready(ops: list[Op], problem: Problem, *, tied: bool) -> list[Op]:
    """Say of every gradient of a rank when it is complete."""
    last: dict[tuple[Kind, int], int] = {}
    for index, op in enumerate(ops):
        if op.action is Action.RUN and isinstance(op.item, Pass):
            owner = gradient_of(op.item, problem, tied=tied)
            if owner is not None:
                last[owner] = index
    complete = set(last.values())
    marked = []
    for index, op in enumerate(ops):
        marked.append(op)
        if index in complete:
            marked.append(Op(Action.READY, op.item))
    return marked


def gradient_of(item: Pass, problem: Problem, *, tied: bool) -> tuple[Kind, int] | None:
    """Which gradient a pass adds to; None for passes that add to none."""
    if item.kind not in (Kind.W if problem.split_backward else Kind.B, Kind.T, Kind.G):
        return None
    return (Kind.G if tied and item.kind is Kind.T else item.kind), item.stage


@dataclass(frozen=True, slots=True)
class _Hop:
    item: Pass
    sender: int
    receiver: int


def _issue_order(schedule: Schedule, problem: Problem, cost: CostModel) -> list[Pass | Collective | _Hop]:
    """All nodes in issue order: a communication as soon as its inputs are there, a pass at its end.

    The sweep meets nodes in an order that rises along dependencies, so its index breaks ties of time.
    """
    network = Network.of(problem, cost)
    swept = sweep(network, network.orders(schedule))
    receivers = [
        {network.lanes[k] for k, _ in followers if problem.is_hop(node, network.nodes[k])}
        for node, followers in zip(network.nodes, network.followers, strict=True)
    ]
    keyed: list[tuple[float, int, int, Pass | Collective | _Hop]] = []
    for index, number in enumerate(swept.order):
        k, node = number % network.size, network.node(number)
        if isinstance(node, Collective):
            keyed.append((swept.ready[number], index, 0, node))
            continue
        end = swept.start[number] + network.seconds[k]
        keyed.append((end, index, 0, node))
        keyed += [(end, index, 1, _Hop(node, network.lanes[k], receiver)) for receiver in receivers[k]]
    return [node for *_, node in sorted(keyed, key=lambda entry: entry[:3])]
