"""The process groups of a run, made once at its start and passed to whoever communicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from schedules.problem import Problem
from schedules.vocab import End
from vp_train.pipeline.comms import Groups


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of one pipeline.

    `world` carries what all ranks agree on; `alone` is this rank's group of one, for layers; `end_ranks` joins the ranks of
    the first and last stage where both hold the same tied matrix, which only an unsharded vocabulary needs.
    """

    rank: int
    world: dist.ProcessGroup
    alone: dist.ProcessGroup
    end_ranks: dist.ProcessGroup | None
    pipeline: Groups


def build_mesh(problem: Problem) -> Mesh:
    """Make the groups; collective over the default group, whose size is the number of pipeline ranks."""
    ranks = tuple(range(problem.layout.num_ranks))
    assert dist.get_world_size() == len(ranks)
    singles = [dist.new_group([rank]) for rank in ranks]
    ends: dict[End, dist.ProcessGroup | None] = {}
    for end in End:
        members = problem.shard_ranks(end)
        ends[end] = dist.new_group(list(members)) if len(members) > 1 else None
    roots = sorted({problem.root(end) for end in End})
    end_ranks = dist.new_group(roots) if len(roots) > 1 and not problem.algorithm.sharded else None
    groups = Groups(ranks, dist.new_group(list(ranks)), dist.new_group(list(ranks)), ends)
    assert dist.group.WORLD is not None
    return Mesh(dist.get_rank(), dist.group.WORLD, singles[dist.get_rank()], end_ranks, groups)
