"""The process groups of a run, made once at its start and passed to everything that communicates.

`communicators.plan_groups` lists the groups, and this module creates them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from schedules.problem import Problem
from schedules.vocab import End
from vp_train.communication import flight_recorder
from vp_train.communication.communicators import (
    CONTROL_PURPOSES,
    END_PURPOSES,
    GLOO,
    NCCL,
    WORLD_PURPOSES,
    Collective,
    GroupSpec,
    Purpose,
    collectives_of,
    plan_groups,
    root_of,
)
from vp_train.communication.control import ControlGroup, row_width
from vp_train.communication.nccl import communicator_options, take_gpu
from vp_train.communication.rendezvous import join_world
from vp_train.config import RunConfig, RunSettings
from vp_train.pipeline.groups import Groups
from vp_train.planning.degrees import Degrees
from vp_train.planning.plan import RunPlan
from vp_train.supervision.watcher import Watcher
from vp_train.tensors.collectives import all_gather_single, reduce_scatter_single

_Made = Sequence[tuple[GroupSpec, dist.ProcessGroup]]


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's place among dp x pp x tp ranks, and the groups it belongs to.

    world: all ranks, for host messages around steps and checkpoints.
    steps: all ranks, for host messages in every step; it has a shorter timeout.
    tensor: the tensor-parallel ranks, which split the same layers.
    data: the data-parallel ranks, which hold the same parameters.
    made: every group of this rank once, in the order in which all ranks made them.

    With tp = 1 `tensor`, and with dp = 1 `data`, is a group of this rank alone.
    """

    degrees: Degrees
    rank: int
    world: ControlGroup
    steps: ControlGroup
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipeline: Groups
    made: tuple[dist.ProcessGroup, ...]

    @property
    def data_rank(self) -> int:
        """Return the index of the replica."""
        return self.degrees.place(self.rank)[0]

    @property
    def pipeline_rank(self) -> int:
        return self.degrees.place(self.rank)[1]

    @property
    def tensor_rank(self) -> int:
        return self.degrees.place(self.rank)[2]

    def destroy(self) -> None:
        """Destroy the groups.  All ranks must call this, but they do not wait for each other."""
        for group in self.made:
            dist.destroy_process_group(group)


def connect(
    config: RunConfig,
    plan: RunPlan,
    watcher: Watcher,
    comparing: Callable[[ControlGroup], None] | None = None,
) -> Mesh:
    """Initialise torch.distributed and build the mesh of process groups.

    Control messages go over gloo.  On CUDA with run.comm_backend=nccl, tensors go over NCCL.
    `watcher` watches the groups.  `comparing` is as in `build_mesh`.  Raises ConfigError like
    `take_gpu`, before the ranks connect.
    """
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    backend = take_gpu(os.environ, config.run)
    if backend == "nccl":  # every node needs the directory that its ranks write flight records to
        flight_recorder.file_of(os.environ, config.run.directory, 0).parent.mkdir(
            parents=True, exist_ok=True
        )
    watcher.note("connecting to the other ranks", waits=True)
    join_world(backend, timedelta(seconds=config.run.world_timeout_seconds))
    return build_mesh(
        plan.degrees, plan.problem, config.run, watching=watcher.watch, comparing=comparing
    )


def build_mesh(
    degrees: Degrees,
    problem: Problem,
    settings: RunSettings | None = None,
    *,
    watching: Callable[[Sequence[dist.ProcessGroup]], None] | None = None,
    comparing: Callable[[ControlGroup], None] | None = None,
) -> Mesh:
    """Make all groups and connect them.  Collective over the default group.

    The ranks of the default group are those of `degrees`.  If its backend is `nccl`, the groups
    that move tensors use NCCL on the current device; otherwise all groups use its backend.
    Connecting takes at most `settings.world_timeout_seconds`, which is also the timeout of messages
    in `world`.  The timeout of all other messages is `settings.timeout_seconds`.  `watching` is
    called with the groups of this rank before NCCL connects them.  `comparing` is called with
    `world` before the groups are made that depend on the settings.
    """
    assert dist.get_world_size() == degrees.num_ranks
    settings = settings or RunSettings()
    rank, backend, width = dist.get_rank(), dist.get_backend(), row_width(degrees.num_ranks)
    specs = plan_groups(degrees, problem, nccl=backend == NCCL, row_width=width)
    in_world = [spec for spec in specs if spec.purpose in WORLD_PURPOSES]
    others = [spec for spec in specs if spec.purpose not in WORLD_PURPOSES]
    made = _make(in_world, rank, settings, backend)
    world = _control(Purpose.WORLD, Purpose.WORLD_LEADERS, made, degrees.num_ranks, width)
    if backend in (GLOO, NCCL):
        # Wait for ranks that start slowly: below, gloo waits only for a step's timeout.
        world.barrier()
    if comparing is not None:
        comparing(world)
    made += _make(others, rank, settings, backend)
    if watching is not None:
        watching([group for _, group in made])
    if backend == NCCL:
        device = torch.device("cuda", torch.cuda.current_device())
        _warm_up(made, rank, degrees, problem, device)
        torch.cuda.synchronize(device)
        world.barrier()
        for spec, group in made:
            if spec.purpose not in CONTROL_PURPOSES:
                _set_pg_timeout(timedelta(seconds=settings.timeout_seconds), group)
    groups = {spec.purpose: group for spec, group in made}
    tensor = groups[Purpose.TENSOR if degrees.tp > 1 else Purpose.ALONE]
    data = groups[Purpose.DATA if degrees.dp > 1 else Purpose.ALONE]
    pipeline = _pipeline(degrees, rank, made)
    steps = _control(Purpose.STEPS, Purpose.STEPS_LEADERS, made, degrees.num_ranks, width)
    every = tuple(group for _, group in made)
    return Mesh(
        degrees,
        rank,
        world=world,
        steps=steps,
        tensor=tensor,
        data=data,
        pipeline=pipeline,
        made=every,
    )


@contextmanager
def starting(group: dist.ProcessGroup, settings: RunSettings) -> Iterator[None]:
    """Within this context messages of `group` wait as long as all ranks do at the start.

    Its ranks may have very different work there, such as compiling.  Afterwards the timeout is that
    of a step again.
    """
    if group.size() == 1 or dist.get_backend() not in (GLOO, NCCL):
        yield
        return
    _set_pg_timeout(timedelta(seconds=settings.world_timeout_seconds), group)
    try:
        yield
    finally:
        _set_pg_timeout(timedelta(seconds=settings.timeout_seconds), group)


def _make(
    specs: Sequence[GroupSpec], rank: int, settings: RunSettings, backend: str
) -> list[tuple[GroupSpec, dist.ProcessGroup]]:
    """Make the groups, and return those of `rank`.

    Every rank calls `new_group` for every group in the same order, because torch numbers groups by
    that order.  Without TORCH_DIST_INIT_BARRIER a rank that is not a member returns at once.
    `use_local_synchronization` is not usable here: it names a group by the number of groups its
    rank has made before, which differs between a middle rank and the ends of a pipeline.
    """
    made = []
    for spec in specs:
        on_nccl = NCCL in spec.backend
        in_world = spec.purpose in WORLD_PURPOSES
        long = in_world or on_nccl  # NCCL connects at the first message, under its timeout
        seconds = settings.world_timeout_seconds if long else settings.timeout_seconds
        # These run beside the passes, so they must leave thread blocks to them.  Sums over replicas
        # come at the end of a step, where few passes are left.
        most_ctas = 0
        if spec.purpose in END_PURPOSES.values():
            most_ctas = settings.collective_ctas
        elif spec.purpose is Purpose.HOPS:  # memory of its collectives, which never run
            most_ctas = settings.hop_channels
        is_member = rank in spec.members
        timeout = timedelta(seconds=seconds)
        group = dist.new_group(
            list(spec.members),
            timeout,
            spec.backend if backend in (GLOO, NCCL) else backend,
            communicator_options(settings, timeout, most_ctas=most_ctas)
            if on_nccl and is_member
            else None,
            group_desc=str(spec.purpose),
        )
        if is_member:
            made.append((spec, group))
    return made


def _warm_up(
    made: _Made, rank: int, degrees: Degrees, problem: Problem, device: torch.device
) -> None:
    """Run all that each communicator will run, so that NCCL connects here and not in a step.

    NCCL connects two ranks at the first message between them.  `set_environment` lets it connect
    the rings and trees of collectives at once; where somebody has set that otherwise, it connects
    those at the first collective that takes them.  A pair sends and receives, as in a step, because
    point-to-point messages use other NCCL communicators than collectives.
    """
    for spec, group in made:
        if spec.sender is not None:
            element = torch.zeros(1, device=device)
            (receiver,) = set(spec.members) - {spec.sender}
            if rank == spec.sender:
                dist.send(element, receiver, group=group)
            else:
                dist.recv(element, spec.sender, group=group)
        elif NCCL in spec.backend:
            root = root_of(spec, degrees, problem)
            for collective in collectives_of(spec, problem):
                _run_once(collective, group, root, device)


def _run_once(
    collective: Collective, group: dist.ProcessGroup, root: int, device: torch.device
) -> None:
    """Run a collective over one element of every rank; `root` is a global rank."""
    size = group.size()
    whole, part = torch.zeros(size, device=device), torch.zeros(1, device=device)
    match collective:
        case Collective.ALL_REDUCE:
            dist.all_reduce(part, group=group)
        case Collective.ALL_GATHER:
            all_gather_single(whole, part, group)
        case Collective.REDUCE_SCATTER:
            reduce_scatter_single(part, whole, group)
        case Collective.BROADCAST:
            dist.broadcast(part, root, group=group)
        case Collective.REDUCE:
            dist.reduce(part, root, group=group)
        case Collective.GATHER | Collective.SCATTER:
            many = [int(dist.get_rank() == root)] * size
            one = [int(member == dist.get_group_rank(group, root)) for member in range(size)]
            sent, received = (one, many) if collective is Collective.GATHER else (many, one)
            source, result = whole.new_zeros(sum(sent)), whole.new_zeros(sum(received))
            dist.all_to_all_single(result, source, received, sent, group=group)


def _control(
    row: Purpose, leaders: Purpose, made: _Made, num_ranks: int, width: int
) -> ControlGroup:
    groups = {spec.purpose: group for spec, group in made}
    return ControlGroup(dist.get_rank(), num_ranks, width, groups[row], groups.get(leaders))


def _pipeline(degrees: Degrees, rank: int, made: _Made) -> Groups:
    replica, here, k = degrees.place(rank)
    sends: dict[int, dist.ProcessGroup] = {}
    receives: dict[int, dist.ProcessGroup] = {}
    ends: dict[End, dist.ProcessGroup | None] = dict.fromkeys(End)
    for spec, group in made:
        for member in spec.members if spec.purpose is Purpose.HOPS else ():
            peer = degrees.place(member)[1]
            if peer != here and spec.sender != member:
                sends[peer] = group
            if peer != here and spec.sender in (member, None):
                receives[peer] = group
        for end, purpose in END_PURPOSES.items():
            if spec.purpose is purpose:
                ends[end] = group
    groups = {spec.purpose: group for spec, group in made}
    pipeline_ranks = range(degrees.pp)
    return Groups(
        ranks=tuple(degrees.rank(replica, j, k) for j in pipeline_ranks),
        leaders=tuple(degrees.rank(replica, j, 0) for j in pipeline_ranks),
        sends=sends,
        receives=receives,
        ends=ends,
        tensor=groups.get(Purpose.TENSOR),
        end_ranks=groups.get(Purpose.TIED),
    )
