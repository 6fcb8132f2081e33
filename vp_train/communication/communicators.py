"""The process groups of a run as data: members, backend, and the order in which they are made.

All ranks make the groups in the order of this list, which excludes deadlock.  Proof: consider the
first group that is not yet complete; its members wait for no other group.  `mesh.build_mesh`
executes the list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from schedules.ir import Kind, Pass
from schedules.problem import Problem
from schedules.vocab import End, Transfer, evaluation
from vp_train.planning.degrees import Degrees

GLOO, NCCL, BOTH = "gloo", "nccl", "cpu:gloo,cuda:nccl"


class Purpose(StrEnum):
    """The purpose of a process group."""

    WORLD = "world"  # control messages of all ranks around steps and checkpoints
    WORLD_LEADERS = "world leaders"
    STEPS = "steps"  # control messages of all ranks in every step
    STEPS_LEADERS = "steps leaders"
    ALONE = "alone"  # a single rank, where the degree tp or dp is 1
    TENSOR = "tensor"  # tensor-parallel ranks
    DATA = "data"  # data-parallel ranks
    TIED = "tied"  # the first and last stage, with copies of one matrix
    INPUT = "input"  # collectives of the input embedding's shards
    OUTPUT = "output"  # collectives of the output layer's shards
    HOPS = "hops"  # activations and gradients between stages


WORLD_PURPOSES = (Purpose.WORLD, Purpose.WORLD_LEADERS)
CONTROL_PURPOSES = (*WORLD_PURPOSES, Purpose.STEPS, Purpose.STEPS_LEADERS)
END_PURPOSES = {End.INPUT: Purpose.INPUT, End.OUTPUT: Purpose.OUTPUT}


class Collective(StrEnum):
    """A collective as NCCL has it.  Some have a root, among the members of their group."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    BROADCAST = "broadcast"
    REDUCE = "reduce"
    GATHER = "gather"  # to the root; messages between pairs of ranks
    SCATTER = "scatter"  # from the root; messages between pairs of ranks


_COLLECTIVES = {
    Purpose.ALONE: (Collective.ALL_REDUCE,),
    Purpose.TENSOR: (
        Collective.ALL_REDUCE,
        Collective.ALL_GATHER,
        Collective.REDUCE_SCATTER,
        Collective.BROADCAST,
    ),
    Purpose.DATA: (Collective.ALL_REDUCE, Collective.ALL_GATHER, Collective.REDUCE_SCATTER),
    Purpose.TIED: (Collective.ALL_REDUCE,),
}
_OF_TRANSFER = {
    Transfer.BROADCAST: Collective.BROADCAST,
    Transfer.REDUCE: Collective.REDUCE,
    Transfer.GATHER: Collective.GATHER,
    Transfer.SCATTER: Collective.SCATTER,
    Transfer.ALL_MAX: Collective.ALL_REDUCE,
    Transfer.ALL_SUM: Collective.ALL_REDUCE,
    Transfer.ALL_GATHER: Collective.ALL_GATHER,
}


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """One process group: its global ranks in ascending order, and its backend.

    `sender` is set for a pair of ranks that hop over NCCL: the rank that sends in this group.
    """

    purpose: Purpose
    members: tuple[int, ...]
    backend: str
    sender: int | None = None


def plan_groups(
    degrees: Degrees, problem: Problem, *, nccl: bool, row_width: int
) -> tuple[GroupSpec, ...]:
    """Return all groups of a run, in the order in which every rank makes them.

    Without `nccl` all groups use gloo, and the hops of a pipeline share one group.  With `nccl`
    each pair of sender and receiver has its own communicator: NCCL runs the messages of one
    communicator in order, and the opposite direction must not wait.  Host tensors then travel only
    in control groups and among replicas.  `row_width` is the number of ranks in a row of
    `control.ControlGroup`.
    """
    device, mixed = (NCCL, BOTH) if nccl else (GLOO, GLOO)
    d, p, t = range(degrees.dp), range(degrees.pp), range(degrees.tp)
    specs = list(_control_groups(degrees.num_ranks, row_width))

    def add(purpose: Purpose, backend: str, groups: Iterator[Sequence[int]]) -> None:
        specs.extend(GroupSpec(purpose, tuple(members), backend) for members in groups)

    if degrees.tp == 1 or degrees.dp == 1:
        add(Purpose.ALONE, mixed, ([rank] for rank in range(degrees.num_ranks)))
    if degrees.tp > 1:
        add(Purpose.TENSOR, device, ([degrees.rank(i, j, k) for k in t] for i in d for j in p))
    if degrees.dp > 1:
        add(Purpose.DATA, mixed, ([degrees.rank(i, j, k) for i in d] for j in p for k in t))
    roots = sorted({problem.root(end) for end in End})
    if len(roots) > 1 and not problem.algorithm.sharded:
        add(Purpose.TIED, device, ([degrees.rank(i, j, k) for j in roots] for i in d for k in t))
    for end, purpose in END_PURPOSES.items():
        owners = problem.shard_ranks(end)
        if len(owners) * degrees.tp > 1:
            add(purpose, device, ([degrees.rank(i, j, k) for j in owners for k in t] for i in d))
    if degrees.pp > 1:
        specs.extend(_hop_groups(degrees, problem) if nccl else _lanes(degrees))
    return tuple(specs)


def collectives_of(spec: GroupSpec, problem: Problem) -> tuple[Collective, ...]:
    """Return the collectives that a group with device tensors may run in steps and evaluations.

    A pair that hops runs none.
    """
    if spec.purpose in _COLLECTIVES:
        return _COLLECTIVES[spec.purpose]
    barriers = (*problem.algorithm.barriers, *evaluation(problem.algorithm).barriers)
    used = {
        _OF_TRANSFER[barrier.transfer]
        for barrier in barriers
        if END_PURPOSES[barrier.end] is spec.purpose
    }
    return tuple(sorted(used))


def root_of(spec: GroupSpec, degrees: Degrees, problem: Problem) -> int:
    """Return the global rank that is the root of the collectives of `spec`."""
    for end, purpose in END_PURPOSES.items():
        if spec.purpose is purpose:
            replica, *_ = degrees.place(spec.members[0])
            return degrees.rank(replica, problem.root(end), 0)
    return spec.members[0]


def gloo_sockets(specs: Sequence[GroupSpec], rank: int) -> int:
    """Return how many connections gloo opens on `rank`: one to every other member of each group.

    The default group is not counted.  It has no gloo connections with NCCL, and joins all ranks
    with gloo.
    """
    return sum(
        len(spec.members) - 1 for spec in specs if GLOO in spec.backend and rank in spec.members
    )


def _control_groups(num_ranks: int, width: int) -> Iterator[GroupSpec]:
    """Yield the rows and leaders of `control.ControlGroup`, once for each of the two timeouts."""
    firsts = range(0, num_ranks, width)
    for purpose, leaders in (
        (Purpose.WORLD, Purpose.WORLD_LEADERS),
        (Purpose.STEPS, Purpose.STEPS_LEADERS),
    ):
        for first in firsts:
            yield GroupSpec(purpose, tuple(range(first, min(first + width, num_ranks))), GLOO)
        if len(firsts) > 1:
            yield GroupSpec(leaders, tuple(firsts), GLOO)


def _lanes(degrees: Degrees) -> Iterator[GroupSpec]:
    """Yield one group of all ranks per pipeline."""
    for replica in range(degrees.dp):
        for k in range(degrees.tp):
            members = tuple(degrees.rank(replica, j, k) for j in range(degrees.pp))
            yield GroupSpec(Purpose.HOPS, members, GLOO)


def _hop_groups(degrees: Degrees, problem: Problem) -> Iterator[GroupSpec]:
    """Yield a group of two ranks for each pair of sender and receiver.

    Pairs are sorted into classes without a common rank, so that their communicators can be set up
    at the same time.
    """
    flows = sorted(
        hop_flows(problem),
        key=lambda flow: (abs(flow[1] - flow[0]), min(flow) % 2, flow[0] > flow[1], flow),
    )
    for sender, receiver in flows:
        for replica in range(degrees.dp):
            for k in range(degrees.tp):
                ends = [degrees.rank(replica, j, k) for j in (sender, receiver)]
                yield GroupSpec(Purpose.HOPS, (min(ends), max(ends)), NCCL, ends[0])


def hop_flows(problem: Problem) -> set[tuple[int, int]]:
    """Return the pairs (sender, receiver) of pipeline ranks that hop."""
    flows = set()
    for stage in range(problem.last_stage):
        earlier, later = Pass(stage, Kind.F, 0), Pass(stage + 1, Kind.F, 0)
        if problem.is_hop(earlier, later):
            flow = problem.rank_of(earlier), problem.rank_of(later)
            flows |= {flow, flow[::-1]} if not problem.forward_only else {flow}
    return flows
