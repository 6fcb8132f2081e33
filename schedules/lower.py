"""Schedule -> Program: the passes of every rank together with its communication.

Every operation gets a place in one global order by its simulated time: a pass by its end, a hop by
the end of the pass that it sends, a collective by the time at which its last input is there. This
order respects all dependencies, and every rank executes its operations in it. So all ranks issue
the collectives of a communicator in the same order. No deadlock is possible, even if every
communication blocks until its partner arrives.

The message of some collectives needs the result of another collective: they continue it. A rank
starts such a collective without waiting for the first one. The runtime waits for that outside the
stream of passes. If the rank waited itself, the next pass would start later than simulated.

A transfer to the host or back follows the pass that issues it, and the wait for it comes right
before the pass that waits. Both concern one rank alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from schedules.cost import CostModel
from schedules.ir import Kind, Pass, Schedule
from schedules.network import Network
from schedules.problem import Collective, Node, Problem
from schedules.simulate import sweep
from schedules.timeline import OFFLOAD
from schedules.transfers import HostLinks, Moves
from schedules.vocab import End, Payload, Transfer

READS_WEIGHTS = (Kind.F, Kind.E, Kind.S)  # the first pass of each stage and matrix in a step


class Action(StrEnum):
    """The kind of an operation: what it does.

    All communication is asynchronous: one operation issues it, another waits for it.
    """

    RUN = "run"  # compute a pass
    SEND = "send"  # issue the send of a pass's output to `peer`
    RECV = "recv"  # issue the receive of a pass's output from `peer`
    ARRIVE = "arrive"  # wait for that receive
    START = "start"  # issue a collective; if it continues another, it begins after that one
    WAIT = "wait"  # wait for that collective
    NEED = "need"  # wait for weights, before the first pass of the step that reads them
    OFFLOAD = "offload"  # begin to copy to the host what the offloaded layers of an F kept
    OFFLOADED = "offloaded"  # wait until that copy has ended; its device memory is free from here
    RELOAD = "reload"  # take device memory and begin to copy that back
    RESTORED = "restored"  # wait until it is back, before the first backward pass that reads it

    @property
    def waits(self) -> bool:
        """Whether the operation waits for what other ranks do."""
        return self in (Action.ARRIVE, Action.WAIT, Action.NEED)


# Between a rank and its host, in the order of what a forward pass keeps.
HOST_TRANSFERS = (Action.OFFLOAD, Action.OFFLOADED, Action.RELOAD, Action.RESTORED)


@dataclass(frozen=True, slots=True)
class Exchange:
    """The part of one rank in a collective.

    `root` is the pipeline rank of the first or last stage. `stage` is the stage whose input, output
    or gradient the root sends or receives. `counted`: the number of rows that a shard sends or
    receives depends on the batch. `contributes`: this rank has something to send. `delivers`: this
    rank receives the result. `continues`: the collective whose result the message needs.
    """

    end: End
    transfer: Transfer
    payload: Payload
    root: int
    stage: int
    counted: bool
    contributes: bool
    delivers: bool
    continues: Collective | None


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of one rank: on a pass, or on the collective of a barrier for one microbatch.

    `peer` is the other rank of a point-to-point transfer. Only START has an `exchange`.
    `completes`: this RUN is the last in the step to add to its gradient, which is then complete.
    """

    action: Action
    item: Pass | Collective
    peer: int | None = None
    exchange: Exchange | None = None
    completes: bool = False

    def __str__(self) -> str:
        if self.action is Action.RUN:
            return f"{self.item}!" if self.completes else str(self.item)
        return f"{self.action}:{self.item}" + ("" if self.peer is None else f"@{self.peer}")


@dataclass(frozen=True, slots=True)
class Program:
    """The operations of every rank, in the order in which it executes them.

    `tied`: input and output vocabulary layer share their weights, so T and G add to one gradient.
    """

    ranks: tuple[tuple[Op, ...], ...]
    num_microbatches: int
    forward_only: bool = False
    tied: bool = False

    def text(self) -> str:
        """Return the operations as text, one line per rank."""
        return "\n".join(" ".join(map(str, ops)) for ops in self.ranks) + "\n"


def lower(schedule: Schedule, problem: Problem, cost: CostModel, *, tied: bool = False) -> Program:
    """Return the program of `schedule`.

    The costs decide where communication is issued. The program is correct whatever they are.
    """
    programs: list[list[Op]] = [[] for _ in range(problem.layout.num_ranks)]
    awaited: list[set[Node]] = [set() for _ in programs]
    needed: list[set[tuple[Kind, int]]] = [set() for _ in programs]
    last = _last_additions(schedule, problem, tied=tied)
    moves = Moves.of(schedule, problem)

    def wait_for_inputs(node: Pass, rank: int) -> None:
        if node.kind in READS_WEIGHTS and (node.kind, node.stage) not in needed[rank]:
            needed[rank].add((node.kind, node.stage))
            programs[rank].append(Op(Action.NEED, node))
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
                exchange = exchange_of(node, rank, problem)
                programs[rank].append(Op(Action.START, node, exchange=exchange))
        else:
            rank = problem.rank_of(node)
            wait_for_inputs(node, rank)
            programs[rank] += [Op(Action.OFFLOADED, item) for item in moves.frees.get(node, ())]
            if node in moves.restores:
                programs[rank].append(Op(Action.RESTORED, moves.restores[node]))
            programs[rank].append(Op(Action.RUN, node, completes=node in last))
            for issue in moves.issues.get(node, ()):
                action = Action.OFFLOAD if issue.kind == OFFLOAD else Action.RELOAD
                programs[rank].append(Op(action, issue.item))
    for node in problem.collectives():
        for rank in problem.receivers(node):
            if node not in awaited[rank]:  # no pass needs its result: the loss of an evaluation
                programs[rank].append(Op(Action.WAIT, node))
    ranks = tuple(map(tuple, programs))
    return Program(ranks, problem.num_microbatches, problem.forward_only, tied)


def exchange_of(node: Collective, rank: int, problem: Problem) -> Exchange:
    """Return the part of `rank` in the collective `node`."""
    barrier = problem.algorithm.barrier(node.barrier)
    root = problem.root(barrier.end)
    continues = barrier.continues
    return Exchange(
        end=barrier.end,
        transfer=barrier.transfer,
        payload=barrier.payload,
        root=root,
        stage=0 if barrier.end is End.INPUT else problem.last_stage,
        counted=barrier.transfer in (Transfer.GATHER, Transfer.SCATTER),
        contributes=rank == root or not barrier.transfer.from_root,
        delivers=rank in problem.receivers(node),
        continues=None if continues is None else Collective(continues, node.microbatch),
    )


def gradient_of(item: Pass, problem: Problem, *, tied: bool) -> tuple[Kind, int] | None:
    """Return the key (kind, stage) of the gradient that a pass adds to; None if it adds to none.

    For T and G the stage is the vocabulary shard. With `tied` weights both have the key of G.
    """
    if item.kind not in (Kind.W if problem.split_backward else Kind.B, Kind.T, Kind.G):
        return None
    return (Kind.G if tied and item.kind is Kind.T else item.kind), item.stage


def _last_additions(schedule: Schedule, problem: Problem, *, tied: bool) -> frozenset[Pass]:
    """Return the passes after which a gradient is complete."""
    last: dict[tuple[Kind, int], Pass] = {}
    for _, item in schedule.passes():
        owner = gradient_of(item, problem, tied=tied)
        if owner is not None:
            last[owner] = item
    return frozenset(last.values())


@dataclass(frozen=True, slots=True)
class _Hop:
    item: Pass
    sender: int
    receiver: int


def _issue_order(
    schedule: Schedule, problem: Problem, cost: CostModel
) -> list[Pass | Collective | _Hop]:
    """Return all nodes in issue order.

    A collective is sorted by the simulated time at which its inputs are available, a pass by its
    end, and a point-to-point transfer by the end of the pass that it sends. The sweep visits nodes
    in an order that respects dependencies, so the index in it breaks ties.
    """
    network = Network.of(problem, cost)
    links = HostLinks.of(schedule, problem, cost, network)
    swept = sweep(network, network.orders(schedule), links)
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
        keyed += [
            (end, index, 1, _Hop(node, network.lanes[k], receiver)) for receiver in receivers[k]
        ]
    return [node for *_, node in sorted(keyed, key=lambda entry: entry[:3])]
