"""The process groups of a run, made once at its start and passed to whoever communicates: one for each purpose."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from schedules.problem import Problem
from schedules.vocab import End
from vp_train.degrees import Degrees
from vp_train.pipeline.groups import Groups


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's place among dp x pp x tp ranks, and the groups it belongs to.

    `world` carries what all ranks agree on around steps and checkpoints, `steps` what they tell each other in every step.
    `tensor` joins the ranks that split the same layers, `data` those that hold the same values in every replica.
    """

    degrees: Degrees
    rank: int
    world: dist.ProcessGroup
    steps: dist.ProcessGroup
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipeline: Groups

    @property
    def data_rank(self) -> int:
        """The replica."""
        return self.degrees.place(self.rank)[0]

    @property
    def pipeline_rank(self) -> int:
        return self.degrees.place(self.rank)[1]

    @property
    def tensor_rank(self) -> int:
        return self.degrees.place(self.rank)[2]


def build_mesh(degrees: Degrees, problem: Problem, timeout: timedelta | None = None) -> Mesh:
    """Make the groups; collective over the default group, whose ranks are those of `degrees`.

    `timeout` is for all groups but `world`, which is the default group; None: torch's default.
    """
    assert dist.get_world_size() == degrees.num_ranks
    assert dist.group.WORLD is not None
    rank = dist.get_rank()
    here = degrees.place(rank)
    pipeline_ranks = tuple(range(degrees.pp))
    lanes = [[degrees.rank(replica, p, t) for p in pipeline_ranks] for replica in range(degrees.dp) for t in range(degrees.tp)]
    tensors = [
        [degrees.rank(replica, p, t) for t in range(degrees.tp)] for replica in range(degrees.dp) for p in pipeline_ranks
    ]
    copies = [[degrees.rank(d, p, t) for d in range(degrees.dp)] for p in pipeline_ranks for t in range(degrees.tp)]
    roots = sorted({problem.root(end) for end in End})
    tied = []
    if len(roots) > 1 and not problem.algorithm.sharded:
        tied = [[degrees.rank(d, p, t) for p in roots] for d in range(degrees.dp) for t in range(degrees.tp)]
    ends = {}
    for end in End:
        members = [
            [degrees.rank(d, p, t) for p in problem.shard_ranks(end) for t in range(degrees.tp)] for d in range(degrees.dp)
        ]
        ends[end] = _own(members, rank, timeout) if len(members[0]) > 1 else None
    everyone = _own([list(range(degrees.num_ranks))], rank, timeout)
    assert everyone is not None
    tensor, data = _own(tensors, rank, timeout), _own(copies, rank, timeout)
    assert tensor is not None
    assert data is not None
    forward, backward = _own(lanes, rank, timeout), _own(lanes, rank, timeout)
    assert forward is not None
    assert backward is not None
    groups = Groups(
        tuple(degrees.rank(here[0], p, here[2]) for p in pipeline_ranks),
        tuple(degrees.rank(here[0], p, 0) for p in pipeline_ranks),
        forward,
        backward,
        ends,
        tensor if degrees.tp > 1 else None,
        _own(tied, rank, timeout),
    )
    return Mesh(degrees, rank, dist.group.WORLD, everyone, tensor, data, groups)


def _own(groups: list[list[int]], rank: int, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """Make all `groups`, as every rank must; that of `rank`, or None if it is in none."""
    own = None
    for members in groups:
        group = dist.new_group(members, timeout)
        if rank in members:
            own = group
    return own
