"""Which process groups a run makes, as data: who is in each, over which backend, in which order.

All ranks make the groups in the order of this list, so no two can wait for each other: of the
groups not yet complete, every member of the first one has nothing else left to wait for.
`mesh.build_mesh` executes the list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from schedules.ir import Kind, Pass
from schedules.problem import Problem
from schedules.vocab import End
from vp_train.planning.degrees import Degrees

GLOO, NCCL, BOTH = "gloo", "nccl", "cpu:gloo,cuda:nccl"


class Purpose(StrEnum):
    """What a process group is for."""

    WORLD = "world"  # what all ranks agree on around steps and checkpoints
    WORLD_LEADERS = "world leaders"
    STEPS = "steps"  # what all ranks tell each other in every step
    STEPS_LEADERS = "steps leaders"
    ALONE = "alone"  # a rank that has nobody to split with
    TENSOR = "tensor"
    DATA = "data"
    TIED = "tied"  # the first and last stage, with copies of one matrix
    INPUT = "input"
    OUTPUT = "output"
    HOPS = "hops"  # activations and gradients between the ranks of stages


WORLD_PURPOSES = (Purpose.WORLD, Purpose.WORLD_LEADERS)
CONTROL_PURPOSES = (*WORLD_PURPOSES, Purpose.STEPS, Purpose.STEPS_LEADERS)
END_PURPOSES = {End.INPUT: Purpose.INPUT, End.OUTPUT: Purpose.OUTPUT}


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """One process group: its global ranks in rising order and the backend that joins them.

    `sender`, of a pair that hops over NCCL: which of the two sends in this group.
    """

    purpose: Purpose
    members: tuple[int, ...]
    backend: str
    sender: int | None = None


def plan_groups(
    degrees: Degrees, problem: Problem, *, nccl: bool, row_width: int
) -> tuple[GroupSpec, ...]:
    """Return all groups of a run, in the order in which every rank makes them.

    `row_width`: how many ranks a row of control messages has.  Without `nccl` all groups use gloo,
    and the hops of a pipeline share one group.  With it each sender and receiver have a communicator
    of their own, for NCCL runs what shares one in order, and what goes the other way must not wait;
    host tensors travel only in control groups and among replicas.
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


def gloo_sockets(specs: Sequence[GroupSpec], rank: int) -> int:
    """Return to how many others gloo connects `rank`: to every other member of each of its groups.

    The default group comes on top; it has none with NCCL, and joins all ranks with gloo.
    """
    return sum(
        len(spec.members) - 1 for spec in specs if GLOO in spec.backend and rank in spec.members
    )


def _control_groups(num_ranks: int, width: int) -> Iterator[GroupSpec]:
    """Yield rows and leaders, see `vp_train.communication.control`, once per timeout."""
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
    """Yield all ranks of each pipeline."""
    for replica in range(degrees.dp):
        for k in range(degrees.tp):
            members = tuple(degrees.rank(replica, j, k) for j in range(degrees.pp))
            yield GroupSpec(Purpose.HOPS, members, GLOO)


def _hop_groups(degrees: Degrees, problem: Problem) -> Iterator[GroupSpec]:
    """Yield a pair of ranks per sender and receiver.

    Pairs come in classes without a common rank, so that their communicators start side by side.
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
    """Return which pipeline rank sends to which."""
    flows = set()
    for stage in range(problem.last_stage):
        earlier, later = Pass(stage, Kind.F, 0), Pass(stage + 1, Kind.F, 0)
        if problem.is_hop(earlier, later):
            flow = problem.rank_of(earlier), problem.rank_of(later)
            flows |= {flow, flow[::-1]} if not problem.forward_only else {flow}
    return flows
