"""Process groups for ranks that live through many tests: every gloo group has threads that wake up a hundred times a second."""

from __future__ import annotations

import gc
from functools import cache

import torch.distributed as dist

from schedules.vocab import End
from vp_train.mesh import Mesh, build_mesh
from vp_train.plan import RunPlan

_latest: dict[object, Mesh] = {}


def mesh_for(plan: RunPlan) -> Mesh:
    """Collective.  That of the call before, if it has the same groups; else that one's groups are gone."""
    key = plan.degrees, *(plan.problem.shard_ranks(end) for end in End)
    if key not in _latest:
        for mesh in _latest.values():
            _destroy(mesh)
        _latest.clear()
        gc.collect()  # of models in cycles, which hold groups too
        _latest[key] = build_mesh(plan.degrees, plan.problem)
    return _latest[key]


def _destroy(mesh: Mesh) -> None:
    pipeline = mesh.pipeline
    groups = [mesh.tensor, mesh.data, mesh.end_ranks, pipeline.forward, pipeline.backward, *pipeline.ends.values()]
    for group in groups:
        if group is not None:
            dist.destroy_process_group(group)


@cache
def alone() -> dist.ProcessGroup:
    """Collective: the group of this rank only."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
