"""Checks of schedules and programs. They are pure and run before a process group exists.

A schedule is right if every pass runs once, on its rank, and no passes wait for each other in a
cycle.

A program is right if
- a rank waits for every input before it uses it, and for every result that it receives,
- sends match receives,
- all ranks of a communicator issue its collectives in the same order,
- exactly the last pass that adds to a gradient completes it,
- what is offloaded is copied to the host right after its forward pass, awaited, copied back, and
  awaited right before its first backward pass, each once,
- it cannot deadlock, even if every communication is a rendezvous: it blocks each of its ranks until
  the last of them arrives.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from schedules.cost import CostModel
from schedules.graph import require_acyclic
from schedules.ir import Kind, Pass, Schedule
from schedules.lower import (
    HOST_TRANSFERS,
    READS_WEIGHTS,
    Action,
    Op,
    Program,
    exchange_of,
    gradient_of,
)
from schedules.network import Network
from schedules.problem import Collective, Problem
from schedules.simulate import predecessors
from schedules.vocab import End


def check_schedule(schedule: Schedule, problem: Problem) -> None:
    """Check that `schedule` solves `problem`.

    Raises ValueError, naming the pass, for a missing, repeated or misplaced pass. Raises
    DeadlockError, naming a cycle, if passes wait for each other.
    """
    _check_passes(schedule, problem, tuple(Kind))
    _check_offloads(schedule, problem)
    if _is_acyclic(schedule, problem):
        return
    require_acyclic(
        predecessors(schedule, problem),
        rank_of=lambda node: problem.rank_of(node) if isinstance(node, Pass) else None,
    )


def _check_offloads(schedule: Schedule, problem: Problem) -> None:
    """Check that what is offloaded is away between its forward and its first backward pass."""
    if not schedule.offloads:
        return
    places = {item: place for order in schedule.ranks for place, item in enumerate(order)}
    seen: set[Pass] = set()
    for offload in schedule.offloads:
        item, free, back = offload.item, offload.free_before, offload.reload_after
        if item.kind is not Kind.F or item not in places or problem.forward_only:
            raise ValueError(f"{item} is offloaded, but no forward pass of a step with backward")
        if item in seen:
            raise ValueError(f"{item} is offloaded twice")
        seen.add(item)
        reader = Pass(item.stage, problem.backward, item.microbatch)
        ranks = {problem.rank_of(one) for one in (item, free, back) if one in places}
        if (
            not {free, back} <= places.keys()
            or len(ranks) > 1
            or not places[item] < places[free] <= places[back] < places[reader]
        ):
            raise ValueError(
                f"{item} is offloaded from {free} to {back}, which is not a time between {item} "
                f"and {reader} on their rank"
            )


def _is_acyclic(schedule: Schedule, problem: Problem) -> bool:
    """Return whether no passes wait for each other: fast, but without the words for those that do.

    The passes of the schedule are those of the problem.
    """
    network = Network.of(problem, CostModel({}))
    size, count = network.size, network.num_microbatches
    missing = [len(before) for before in network.inputs] * count
    next_on_rank = [-1] * (size * count)
    for order in network.orders(schedule):
        for earlier, later in pairwise(order):
            next_on_rank[earlier] = later
            missing[later] += 1
    ready = [number for number, inputs in enumerate(missing) if not inputs]
    num_done = 0
    while ready:
        number = ready.pop()
        num_done += 1
        k = number % size
        followers = [number - k + step for step, _ in network.followers[k]]
        if next_on_rank[number] >= 0:
            followers.append(next_on_rank[number])
        for later in followers:
            missing[later] -= 1
            if not missing[later]:
                ready.append(later)
    return num_done == size * count


def check_base(schedule: Schedule, problem: Problem) -> None:
    """Check that a base order, such as one read from a file, has the stage passes of `problem`.

    Vocabulary passes are added later. A rank may have some already, then all of their kind. Raises
    ValueError, naming the pass, for a missing, repeated or misplaced pass. It does not look for
    cycles: `generators.complete` finds them.
    """
    _check_passes(schedule, problem, problem.stage_kinds)


def _check_passes(schedule: Schedule, problem: Problem, kinds: tuple[Kind, ...]) -> None:
    """Check that each rank runs all its passes of `kinds`, and of the vocabulary kinds it has."""
    if schedule.num_ranks != problem.layout.num_ranks:
        raise ValueError(
            f"schedule {schedule.name!r} has {schedule.num_ranks} ranks, "
            f"the layout {problem.layout.num_ranks}"
        )
    for rank, order in enumerate(schedule.ranks):
        if _runs_each_once(order, rank, problem, kinds):
            continue
        present = {item.kind for item in order if item.kind.is_vocabulary}
        needed = {item for item in problem.passes_of(rank) if item.kind in present.union(kinds)}
        for item, count in Counter(order).items():
            if item not in needed:
                raise ValueError(
                    f"rank {rank} runs {item}, which is not among its passes; "
                    f"{_own_passes(rank, item.kind, problem)}"
                )
            if count > 1:
                raise ValueError(f"rank {rank} runs {item} {count} times; every pass runs once")
        missing = needed.difference(order)
        if missing:
            many = f"{len(missing)} passes" if len(missing) > 1 else "1 pass"
            raise ValueError(
                f"rank {rank} never runs {min(missing)} ({many} missing); "
                f"{_own_passes(rank, min(missing).kind, problem)}"
            )


def _runs_each_once(
    order: tuple[Pass, ...], rank: int, problem: Problem, kinds: tuple[Kind, ...]
) -> bool:
    """Return whether a rank runs all its passes of `kinds` once, and no other pass of a stage.

    It is fast. If it is not so, vocabulary passes may still make the order right.
    """
    num_microbatches = problem.num_microbatches
    found = {
        (item.stage, item.kind): bytearray(num_microbatches)
        for item in problem.passes_of(rank, 0)
        if item.kind in kinds
    }
    for item in order:
        ran = found.get((item.stage, item.kind))
        if ran is None or not 0 <= item.microbatch < num_microbatches or ran[item.microbatch]:
            return False
        ran[item.microbatch] = 1
    return len(order) == len(found) * num_microbatches


def _own_passes(rank: int, kind: Kind, problem: Problem) -> str:
    """Return the passes a rank must have, in words: vocabulary passes if `kind` is one of them."""
    if kind.is_vocabulary:
        words = []
        for end, kinds in problem.shard_kinds.items():
            where = "every rank" if problem.algorithm.sharded else f"rank {problem.root(end)}"
            words.append(f"{' and '.join(kinds)} on {where}")
        return f"vocabulary {problem.algorithm.name} has {', '.join(words)}"
    stages = ", ".join(map(str, problem.layout.stages_of(rank)))
    return (
        f"its passes are {', '.join(problem.stage_kinds)} of stage {stages}, "
        f"microbatches 0 to {problem.num_microbatches - 1}"
    )


def check_program(program: Program, problem: Problem) -> None:
    """Check that `program` solves `problem` on every rank.

    Raises ValueError, naming the operation, or DeadlockError, naming a cycle of waiting.
    """
    if (program.num_microbatches, program.forward_only) != (
        problem.num_microbatches,
        problem.forward_only,
    ):
        raise ValueError(
            f"the program is of {program.num_microbatches} microbatches, forward_only="
            f"{program.forward_only}; the problem of {problem.num_microbatches}, "
            f"forward_only={problem.forward_only}"
        )
    for rank, ops in enumerate(program.ranks):
        _check_rank(rank, ops, problem)
        _check_gradients(rank, ops, problem, tied=program.tied)
        _check_transfers(rank, ops, problem)
    _check_pairs(program)
    _check_collective_order(program, problem)
    _check_rendezvous(program)


_Key = tuple[Action, Pass | Collective, int | None]


def _check_rank(rank: int, ops: tuple[Op, ...], problem: Problem) -> None:
    needed = set(problem.passes_of(rank))
    done: set[_Key] = set()
    read: set[tuple[Kind, int]] = set()
    for op in ops:
        key = (op.action, op.item, op.peer)
        if key in done:
            raise ValueError(f"rank {rank} does {op} twice")
        for before in _needs(op, rank, problem):
            if before not in done:
                raise ValueError(f"rank {rank} does {op} before {Op(*before)}")
        if (
            op.action is Action.START
            and isinstance(op.item, Collective)
            and op.exchange != exchange_of(op.item, rank, problem)
        ):
            raise ValueError(f"rank {rank} does {op} with the exchange {op.exchange}")
        if isinstance(op.item, Pass) and op.item.kind in READS_WEIGHTS:
            weights = op.item.kind, op.item.stage
            if op.action is Action.NEED:
                read.add(weights)
            elif op.action is Action.RUN and weights not in read:
                raise ValueError(f"rank {rank} does {op} before it needs the weights of that pass")
        done.add(key)
    ran = {op.item for op in ops if op.action is Action.RUN}
    if ran != needed:
        differing = sorted(map(str, ran.symmetric_difference(needed)))
        raise ValueError(
            f"rank {rank} does not run each of its passes once; first difference: {differing[0]}"
        )
    for op in ops:
        if op.exchange and op.exchange.delivers and (Action.WAIT, op.item, None) not in done:
            raise ValueError(f"rank {rank} never waits for {op.item}, whose result it receives")


def _needs(op: Op, rank: int, problem: Problem) -> list[_Key]:
    """Return the operations of the same rank that must come before `op`."""
    match op.action:
        case Action.SEND:
            return [(Action.RUN, op.item, None)]
        case Action.ARRIVE:
            return [(Action.RECV, op.item, op.peer)]
        case Action.WAIT:
            return [(Action.START, op.item, None)]
        case Action.RECV | Action.NEED:
            return []
        case Action.OFFLOAD:
            return [(Action.RUN, op.item, None)]
        case Action.OFFLOADED:
            return [(Action.OFFLOAD, op.item, None)]
        case Action.RELOAD:
            return [(Action.OFFLOADED, op.item, None)]
        case Action.RESTORED:
            return [(Action.RELOAD, op.item, None)]
    before: list[_Key] = []
    for earlier in problem.inputs_of(op.item):
        if isinstance(earlier, Collective):
            waits = Action.WAIT if op.action is Action.RUN else Action.START
            before.append((waits, earlier, None))
        elif problem.rank_of(earlier) == rank:
            before.append((Action.RUN, earlier, None))
        elif op.action is Action.RUN:
            before.append((Action.ARRIVE, earlier, problem.rank_of(earlier)))
    return before


def _check_gradients(rank: int, ops: tuple[Op, ...], problem: Problem, *, tied: bool) -> None:
    """Check that exactly the last pass that adds to a gradient completes it."""
    last: dict[tuple[Kind, int], Op] = {}
    for op in ops:
        if op.action is Action.RUN and isinstance(op.item, Pass):
            owner = gradient_of(op.item, problem, tied=tied)
            if owner is not None:
                if owner in last and last[owner].completes:
                    raise ValueError(f"rank {rank} does {op} after {last[owner]}, which completes")
                last[owner] = op
            elif op.completes:
                raise ValueError(f"rank {rank} completes no gradient with {op}")
    for op in last.values():
        if not op.completes:
            raise ValueError(f"rank {rank} never completes the gradient that {op} is the last for")


def _check_transfers(rank: int, ops: tuple[Op, ...], problem: Problem) -> None:
    """Check the copies to the host and back of what forward passes keep.

    OFFLOAD comes right after its pass, and RESTORED right before the first backward pass.
    """
    offloaded = {op.item for op in ops if op.action is Action.OFFLOAD}
    for action in HOST_TRANSFERS[1:]:
        found = {op.item for op in ops if op.action is action}
        if found != offloaded:
            first = min(map(str, found ^ offloaded))
            raise ValueError(
                f"rank {rank} does only one of {Action.OFFLOAD} and {action} of {first}"
            )
    if not offloaded:
        return
    if problem.forward_only:
        raise ValueError(f"rank {rank} offloads in a program without backward passes")
    before = ops[0]
    for op in ops:
        item = op.item
        if op.action is Action.OFFLOAD:
            if not isinstance(item, Pass) or item.kind is not Kind.F:
                raise ValueError(f"rank {rank} does {op}, which is not a forward pass")
            if (before.action, before.item) != (Action.RUN, item):
                raise ValueError(f"rank {rank} does {op} not right after {item}, but {before}")
        elif op.action is Action.RUN and isinstance(item, Pass) and item.kind is problem.backward:
            kept = Pass(item.stage, Kind.F, item.microbatch)
            if kept in offloaded and (before.action, before.item) != (Action.RESTORED, kept):
                raise ValueError(f"rank {rank} does {op} not right after restored:{kept}")
        before = op


def _check_pairs(program: Program) -> None:
    """Check that the sends from one rank to another match the receives there, in the same order."""
    sends: dict[tuple[int, int], list[Pass]] = {}
    receives: dict[tuple[int, int], list[Pass]] = {}
    for rank, ops in enumerate(program.ranks):
        for op in ops:
            if op.peer is None or not isinstance(op.item, Pass):
                continue
            if op.action is Action.SEND:
                sends.setdefault((rank, op.peer), []).append(op.item)
            elif op.action is Action.RECV:
                receives.setdefault((op.peer, rank), []).append(op.item)
    for sender, receiver in sorted(sends.keys() | receives.keys()):
        sent, received = (of.get((sender, receiver), []) for of in (sends, receives))
        for item in sorted(set(sent) ^ set(received)):
            raise ValueError(
                f"the transfer of {item} from rank {sender} to rank {receiver} has only one side"
            )
        for sent_item, received_item in zip(sent, received, strict=True):
            if sent_item != received_item:
                raise ValueError(
                    f"rank {sender} sends {sent_item} to rank {receiver}, "
                    f"which receives {received_item} in its place"
                )


def _check_collective_order(program: Program, problem: Problem) -> None:
    """Check that all ranks start all collectives of a communicator in the same order."""
    for end in End:
        ranks = problem.shard_ranks(end)
        orders = {rank: _collectives(program.ranks[rank], end, problem) for rank in ranks}
        first = orders[ranks[0]]
        expected = {
            node
            for node in problem.collectives()
            if problem.algorithm.barrier(node.barrier).end is end
        }
        if set(first) != expected:
            raise ValueError(
                f"rank {ranks[0]} does not start every {end} collective: "
                f"{len(first)} of {len(expected)}"
            )
        for rank, order in orders.items():
            if order != first:
                place = next(
                    (
                        i
                        for i, pair in enumerate(zip(first, order, strict=False))
                        if pair[0] != pair[1]
                    ),
                    len(order),
                )
                here, there = [
                    str(nodes[place]) if place < len(nodes) else "nothing"
                    for nodes in (order, first)
                ]
                raise ValueError(
                    f"ranks order the {end} collectives differently: at place {place}, "
                    f"rank {rank} starts {here}, rank {ranks[0]} {there}"
                )


def _collectives(ops: tuple[Op, ...], end: End, problem: Problem) -> list[Collective]:
    return [
        op.item
        for op in ops
        if op.action is Action.START
        and isinstance(op.item, Collective)
        and problem.algorithm.barrier(op.item.barrier).end is end
    ]


def _check_rendezvous(program: Program) -> None:
    """Check that the program cannot deadlock if every communication is a rendezvous.

    Every communication is then one node, which all its ranks enter together. The graph of the
    orders of all ranks must not have a cycle.
    """
    graph: dict[str, list[str]] = {}
    for ops in program.ranks:
        previous: str | None = None
        for op in ops:
            if op.action.waits or op.action in HOST_TRANSFERS:
                # Issuing blocked until the end, so there is nothing left to wait for. Transfers to
                # the host wait for no other rank.
                continue
            node = (
                str(op.item)
                if op.action in (Action.RUN, Action.START)
                else f"the transfer of {op.item}"
            )
            before = graph.setdefault(node, [])
            if previous is not None:
                before.append(previous)
            previous = node
    require_acyclic(graph)
