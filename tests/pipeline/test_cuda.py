"""The same program on a GPU gives the same numbers."""

from dataclasses import replace

import pytest
import torch

from tests.meshes import mesh_for
from tests.pipeline.test_equivalence import config_of
from tests.pipeline.truth import random_batch
from vp_train.assembly import build_rank
from vp_train.config import VocabConfig
from vp_train.plan import make_plan


def gradients_on(rank, num_ranks, config, device):
    config = replace(config, run=replace(config.run, device=device, comm_backend="gloo"))
    plan = make_plan(config, num_ranks)
    model = build_rank(config, plan, mesh_for(plan))
    loss = model.train_step(*(tensor.to(device) for tensor in random_batch(config, 1)))
    return None if loss is None else loss.item(), {name: parameter.grad.cpu() for name, parameter in model.parameters.items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("p", [1, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "v_half"])
@pytest.mark.parametrize("algorithm", ["none", "naive", "two_barrier", "one_barrier"])
def test_ranks_that_share_a_gpu_equal_the_cpu_in_float64(ranks, p, schedule, algorithm):
    config = config_of(p, 4, 101, schedule=schedule, vocab=VocabConfig(algorithm), num_stages=2 * p)
    on_cpu, on_gpu = (ranks(p).run(gradients_on, config, device) for device in ("cpu", "cuda"))
    for (cpu_loss, cpu), (gpu_loss, gpu) in zip(on_cpu, on_gpu, strict=True):
        assert (gpu_loss is None) == (cpu_loss is None)
        assert gpu_loss is None or gpu_loss == pytest.approx(cpu_loss, rel=1e-9)
        for name, expected in cpu.items():
            assert torch.allclose(gpu[name], expected, rtol=1e-9, atol=1e-12), name
