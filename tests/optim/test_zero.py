"""ZeRO-1 gives its whole state to one replica, and restores it part by part."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.optim.setup import RUNS, SHAPES
from tests.vocab.test_memory import growth
from vp_train.config import OptimConfig
from vp_train.optim.adamw import MOMENTS
from vp_train.optim.buckets import lay_out
from vp_train.optim.gradients import Gradients
from vp_train.optim.replicas import Replicas
from vp_train.optim.zero import ZeroAdamW


def optimizer_of(parameters, offload):
    replicas = Replicas(dist.group.WORLD)
    layout = lay_out(parameters, RUNS, max_elements=3000, num_parts=replicas.size)
    optim = OptimConfig("zero1", offload=offload)
    if not offload:
        return ZeroAdamW(parameters, Gradients(parameters, layout), optim, replicas)
    from vp_train.optim.offload import OffloadedAdamW

    return OffloadedAdamW(parameters, Gradients(parameters, layout), optim, replicas)


def there_and_back(rank, num_ranks, offload):
    """Return whether `state` returns what `restore` loaded, and the bytes both allocate at most."""

    generator = torch.Generator().manual_seed(0)
    given = {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for kind in ("parameter", *MOMENTS)
    }
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    zero = optimizer_of(parameters, offload)
    taking = growth(lambda: zero.restore(lambda kind, name: given[kind][name].clone()))
    found = []
    giving = growth(lambda: found.append(zero.state()))
    same = all(torch.equal(parameters[name], value) for name, value in given["parameter"].items())
    if rank == 0:
        same = same and all(
            torch.equal(found[0][kind][name], value)
            for kind in given
            for name, value in given[kind].items()
        )
    return same, taking, giving


@pytest.mark.parametrize("offload", [False, True])
def test_only_the_first_replica_has_it_all_and_none_takes_more_than_a_tensor_at_a_time(
    ranks, offload
):
    whole = 4 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    for rank, (same, taking, giving) in enumerate(ranks(3).run(there_and_back, offload)):
        assert same
        assert taking < whole / 2
        assert giving < (4 * whole if rank == 0 else whole / 2)
