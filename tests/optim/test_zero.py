"""ZeRO-1 gives its whole state to one replica, and takes it back part by part."""

import torch
import torch.distributed as dist
from torch import nn

from tests.vocab.test_memory import growth
from vp_train.config import OptimConfig
from vp_train.optim.adamw import MOMENTS
from vp_train.optim.gradients import Gradients

SHAPES = {"a.weight": (64, 32), "b.weight": (64, 33), "b.bias": (33,), "none": (0, 4), "c.weight": (32, 64)}


def there_and_back(rank, num_ranks):
    """The values given and those found again, and by how many bytes giving and taking grew."""
    from vp_train.optim.zero import ZeroAdamW

    generator = torch.Generator().manual_seed(0)
    given = {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for kind in ("parameter", *MOMENTS)
    }
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    zero = ZeroAdamW(parameters, Gradients(parameters), frozenset(), OptimConfig("zero1"), dist.group.WORLD)
    taking = growth(lambda: zero.restore(lambda kind, name: given[kind][name].clone()))
    found = []
    giving = growth(lambda: found.append(zero.state()))
    same = all(torch.equal(parameters[name], value) for name, value in given["parameter"].items())
    if rank == 0:
        same = same and all(torch.equal(found[0][kind][name], value) for kind in given for name, value in given[kind].items())
    return same, taking, giving


def test_only_the_first_replica_has_it_all_and_none_takes_more_than_a_tensor_at_a_time(ranks):
    whole = 4 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    for rank, (same, taking, giving) in enumerate(ranks(3).run(there_and_back)):
        assert same
        assert taking < whole / 2
        assert giving < (4 * whole if rank == 0 else whole / 2)
