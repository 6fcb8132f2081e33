"""Is a schedule, or a program, right?  Both checks are pure and run before a process starts.

A schedule: every pass once, on its rank, and no circle of waiting.  A program: every input waited for before its use, sends
that match receives, one order of collectives on all ranks of a communicator, and no deadlock even if every communication
is a rendezvous, that is, blocks all its ranks until the last of them arrives.
"""

from __future__ import annotations

from collections import Counter

from schedules.graph import require_acyclic
from schedules.ir import Kind, Pass, Schedule
from schedules.lower import READS_WEIGHTS, Action, Op, Program, exchange_of, gradient_of
from schedules.problem import Collective, Problem
from schedules.simulate import predecessors
from schedules.vocab import End


def check_schedule(schedule: Schedule, problem: Problem) -> None:
    """Raise ValueError naming the pass that is missing, repeated or misplaced; DeadlockError naming a circle."""
    _check_passes(schedule, problem, tuple(Kind))
    require_acyclic(predecessors(schedule, problem))


def check_base(schedule: Schedule, problem: Problem) -> None:
    """The same for a base order from elsewhere, before it is completed: stage passes only.  Completing it finds circles."""
    _check_passes(schedule, problem, problem.stage_kinds)


def _check_passes(schedule: Schedule, problem: Problem, kinds: tuple[Kind, ...]) -> None:
    if schedule.num_ranks != problem.layout.num_ranks:
        raise ValueError(
            f"schedule {schedule.name!r} has {schedule.num_ranks} ranks, the layout {problem.layout.num_ranks}"
        )
    for rank, order in enumerate(schedule.ranks):
        needed = {item for item in problem.passes_of(rank) if item.kind in kinds}
        for item, count in Counter(order).items():
            if item not in needed:
                raise ValueError(f"rank {rank} runs {item}, which is not among its passes")
            if count > 1:
                raise ValueError(f"rank {rank} runs {item} {count} times; every pass runs once")
        missing = needed.difference(order)
        if missing:
            raise ValueError(
                f"rank {rank} never runs {min(missing)} ({len(missing)} passes missing)"
            )


def check_program(program: Program, problem: Problem) -> None:
    """Raise ValueError or DeadlockError naming what is wrong with `program`."""
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
        odd = sorted(map(str, ran.symmetric_difference(needed)))
        raise ValueError(
            f"rank {rank} does not run its passes once each; first difference: {odd[0]}"
        )


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
    """Check that exactly the last pass which adds to a gradient completes it."""
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


def _check_pairs(program: Program) -> None:
    """Check that sends match receives, in one order from each rank to each other."""
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
        for ours, theirs in zip(sent, received, strict=True):
            if ours != theirs:
                raise ValueError(
                    f"rank {sender} sends {ours} to rank {receiver}, which receives {theirs} in its place"
                )


def _check_collective_order(program: Program, problem: Problem) -> None:
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
                f"rank {ranks[0]} does not start every {end} collective: {len(first)} of {len(expected)}"
            )
        for rank, order in orders.items():
            if order != first:
                at = next(
                    (
                        i
                        for i, pair in enumerate(zip(first, order, strict=False))
                        if pair[0] != pair[1]
                    ),
                    len(order),
                )
                mine, other = [str(o[at]) if at < len(o) else "nothing" for o in (order, first)]
                raise ValueError(
                    f"ranks order the {end} collectives differently: at place {at}, "
                    f"rank {rank} starts {mine}, rank {ranks[0]} {other}"
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
    """Every communication is one node, which all its ranks enter together: the graph of the rank orders has no circle."""
    graph: dict[str, list[str]] = {}
    for ops in program.ranks:
        previous: str | None = None
        for op in ops:
            if op.action in (Action.ARRIVE, Action.WAIT, Action.NEED):
                continue  # nothing is left to wait for once issuing has blocked
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
