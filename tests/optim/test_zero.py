"""ZeRO-1 gives its whole state to one replica, and restores it part by part."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.setup import RUNS, SHAPES, accumulate, build
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


class LateCopies(TorchDispatchMode):
    """A device whose copies that the host does not wait for run when it waits for their event."""

    def __init__(self):
        super().__init__()
        self._copies = []

    def synchronize(self):
        for target, source in self._copies:
            target.copy_(source)
        self._copies.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[2:] == (True,):
            self._copies.append(args[:2])
            return args[0]
        return func(*args, **(kwargs or {}))


def norms(rank, num_ranks, late):
    """Return the squared norms of two steps, copied as on a GPU if `late`."""
    _, gradients, optimizer = build("offload")
    device, zero = LateCopies(), optimizer._zero
    copy_gradient = zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu

    def copied(parameter):
        with device:
            copy_gradient(parameter)
        zero._pending_offload_events[None] = device  # by its stream

    if late:
        zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu = copied
    found = []
    for seed in (1, 2):
        accumulate(gradients, seed, rank)
        optimizer.reduce()
        found.append(optimizer.squared_norm().item())
        optimizer.step(1e-3, 1.0)
    return found


def test_the_norm_is_that_of_gradients_that_have_come_to_the_host(ranks):
    assert ranks(2).run(norms, True) == ranks(2).run(norms, False)
