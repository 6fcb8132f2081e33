"""Process groups for ranks that live through many tests.

Only few are kept, because every gloo group has threads that wake up a hundred times a second.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from schedules.vocab import End
from vp_train.mesh import Mesh, build_mesh
from vp_train.planning.plan import RunPlan

_KEPT = 2
_latest: dict[object, Mesh] = {}


def mesh_for(plan: RunPlan) -> Mesh:
    """Return a mesh for `plan`: a kept one with the same groups, else a new one.  Collective.

    The meshes of the last `_KEPT` plans are kept, and older ones are destroyed.
    """
    key = plan.degrees, *(plan.problem.shard_ranks(end) for end in End)
    mesh = _latest.pop(key, None)
    if mesh is None:
        for old in list(_latest)[: 1 - _KEPT]:
            _latest.pop(old).destroy()
            gc.collect()  # models in reference cycles hold groups too
        mesh = build_mesh(plan.degrees, plan.problem)
    _latest[key] = mesh
    return mesh


def forget(rank: int, world_size: int) -> None:
    """Destroy all meshes of this process; collective."""
    while _latest:
        _latest.pop(next(iter(_latest))).destroy()
    gc.collect()


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Make this process rank `rank` of torch's fake default group, without other ranks."""
    if dist.is_initialized():  # a test with all ranks in this process has done so
        dist.destroy_process_group()
        alone.cache_clear()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@cache
def alone() -> dist.ProcessGroup:
    """Return the group of this rank alone.  Collective.

    Without a default group, this makes one with a single rank.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() == 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
