"""Messages of all ranks arrive in rank order, for any width of the rows."""

from __future__ import annotations

import math
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from vp_train.communication.communicators import Purpose, _control_groups
from vp_train.communication.control import ControlGroup, row_width
from vp_train.config import RunSettings
from vp_train.mesh import starting


def exchange(rank, num_ranks, width):
    specs = [spec for spec in _control_groups(num_ranks, width) if "world" in spec.purpose]
    own = {}
    for spec in specs:
        group = dist.new_group(list(spec.members))
        if rank in spec.members:
            own[spec.purpose] = group
    control = ControlGroup(
        rank, num_ranks, width, own[Purpose.WORLD], own.get(Purpose.WORLD_LEADERS)
    )
    tensors = control.all_gather(torch.tensor([[rank, rank / 3]], dtype=torch.float64))
    values = control.all_gather_json(
        {"rank": rank, "text": "ä" * rank, "nothing": None, "inf": math.inf}
    )
    control.barrier()
    for group in own.values():
        dist.destroy_process_group(group)
    return tensors, values


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_rank_gets_the_values_of_all_ranks_in_rank_order(ranks, width):
    for tensors, values in ranks(4).run(exchange, width):
        assert tensors.tolist() == [[[rank, rank / 3]] for rank in range(4)]
        assert values == [
            {"rank": rank, "text": "ä" * rank, "nothing": None, "inf": math.inf}
            for rank in range(4)
        ]


def summed_late(rank, num_ranks):
    """Return the sum of a rank that comes late, and the timeout of the group afterwards."""
    settings = RunSettings(timeout_seconds=1.0, world_timeout_seconds=60.0)
    group = dist.new_group([0, 1], timedelta(seconds=60))
    dist.barrier(group)
    _set_pg_timeout(timedelta(seconds=0.1), group)
    one = torch.ones(())
    with starting(group, settings):
        time.sleep(0.5 * rank)
        dist.all_reduce(one, group=group)
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    dist.destroy_process_group(group)
    return one.item(), timeout.total_seconds()


def test_ranks_that_start_wait_longer_for_each_other_than_in_a_step(ranks):
    assert ranks(2).run(summed_late) == [(2.0, 1.0)] * 2


def test_rows_stay_small():
    assert [row_width(n) for n in (1, 4, 32, 33, 512, 1024, 4096)] == [1, 4, 32, 32, 32, 32, 64]
