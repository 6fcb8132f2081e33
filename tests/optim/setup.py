"""Parameters, gradients and optimizers of a few data-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from vp_train.config import OptimConfig
from vp_train.optim.buckets import lay_out
from vp_train.optim.gradients import Gradients
from vp_train.optim.offload import OffloadedAdamW
from vp_train.optim.optimizer import ReplicatedAdamW
from vp_train.optim.replicas import Replicas
from vp_train.optim.zero import ZeroAdamW

SHAPES = {
    "b.weight": (64, 33),
    "b.bias": (33,),
    "a.weight": (64, 32),
    "norm": (7,),
    "none": (0, 4),
    "c.weight": (32, 64),
}
RUNS = [[("b.weight", "b.bias"), ("a.weight", "norm")], [("none",)], [("c.weight",)]]
NAMES = {"adamw": ReplicatedAdamW, "zero1": ZeroAdamW}
WITH_OFFLOAD = NAMES | {"offload": OffloadedAdamW}


def values(seed, dtype=torch.float64):
    """Return random values for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def build(
    name, *, dtype=torch.float64, max_elements=3000, copied=frozenset(), optim=None, num_parts=None
):
    """Return the parameters of seed 0, their gradients, and an optimizer over all ranks."""
    parameters = {key: nn.Parameter(value) for key, value in values(0, dtype).items()}
    replicas = Replicas(dist.group.WORLD)
    layout = lay_out(
        parameters,
        RUNS,
        max_elements=max_elements,
        num_parts=num_parts or replicas.size,
        copied=frozenset(copied),
    )
    gradients = Gradients(parameters, layout)
    optim = optim or (
        OptimConfig("zero1", offload=True) if name == "offload" else OptimConfig(name)
    )
    return parameters, gradients, WITH_OFFLOAD[name](parameters, gradients, optim, replicas)


def accumulate(gradients, seed, rank):
    """Set the gradients to those of replica `rank`."""
    gradients.zero()
    for name, value in values(seed + 100 * rank, gradients.dtype).items():
        gradients[name].copy_(value)
