"""All ranks of a pipeline in the process of the tests; see `vp_train.pipeline.local`."""

from __future__ import annotations

from collections.abc import Callable
from threading import Barrier
from typing import Any

import torch

from schedules.lower import Exchange
from schedules.problem import Collective
from schedules.vocab import End, Payload, Transfer
from tests.meshes import alone
from vp_train.assembly import RankModel, build_rank
from vp_train.communication.control import ControlGroup
from vp_train.config import RunConfig
from vp_train.mesh import Mesh
from vp_train.optim.adamw import StepHealth, gather_health
from vp_train.pipeline.groups import Groups
from vp_train.pipeline.local import Switchboard, run_ranks
from vp_train.planning.degrees import Degrees
from vp_train.planning.plan import RunPlan


def local_mesh(plan: RunPlan, rank: int) -> Mesh:
    """Return the mesh of `rank`, with process groups of this process alone."""
    group = alone()
    assert plan.degrees == Degrees(1, plan.num_ranks, 1)
    groups = Groups((), (), {}, {}, {})
    control = ControlGroup.flat(group)
    return Mesh(plan.degrees, rank, control, control, group, group, groups, ())


def exchange(
    transfer: Transfer, rank: int, *, end: End = End.OUTPUT, continues: Collective | None = None
) -> Exchange:
    """Return the exchange of a collective as `rank` starts it; its root is rank 1."""
    to_root = transfer in (Transfer.REDUCE, Transfer.GATHER)
    return Exchange(
        end,
        transfer,
        Payload.SUMS,
        1,
        0,
        counted=False,
        contributes=True,
        delivers=rank == 1 or not to_root,
        continues=continues,
    )


class Together:
    """The exchange of values between the ranks of one process, between steps."""

    def __init__(self, num_ranks: int) -> None:
        self._values: list[Any] = [None] * num_ranks
        self._barrier = Barrier(num_ranks, timeout=60)

    def gather(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order."""
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def health(self, rank: int, loss: Any, squared_norm: Any) -> StepHealth:
        """Return the result of `gather_health` for the terms of all ranks."""
        pairs = self.gather(rank, (loss, squared_norm))
        nothing = torch.zeros((), dtype=torch.float64)
        losses = [nothing if term is None else term.double() for term, _ in pairs]
        norms = [nothing if term is None else term for _, term in pairs]
        return gather_health(
            torch.stack(losses).sum(), torch.stack(norms).sum(), ControlGroup.flat(alone())
        )

    def abort(self) -> None:
        """Wake the ranks that wait for a rank that has failed."""
        self._barrier.abort()


def run_locally(
    config: RunConfig,
    plan: RunPlan,
    work: Callable[[int, RankModel, Together], Any],
    **board: Any,
) -> list[Any]:
    """Run work(rank, model, together) on every rank of `plan`; return the results in rank order."""
    together = Together(plan.num_ranks)
    alone()
    switchboard = Switchboard(plan.problem, torch.device(config.run.device), **board)

    def run(rank: int) -> Any:
        try:
            model = build_rank(config, plan, local_mesh(plan, rank), switchboard.transport(rank))
            return work(rank, model, together)
        except BaseException:
            together.abort()
            raise

    return run_ranks(switchboard, run)
