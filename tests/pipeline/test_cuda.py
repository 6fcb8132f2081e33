"""The same program on a GPU gives the same numbers."""

from dataclasses import replace

import pytest
import torch

from tests.pipeline.test_equivalence import config_of
from tests.pipeline.truth import random_batch
from vp_train.assembly import build_rank
from vp_train.config import VocabConfig
from vp_train.mesh import build_mesh
from vp_train.plan import make_plan


def gradients_on(rank, num_ranks, config, device):
    config = replace(config, run=replace(config.run, device=device))
    plan = make_plan(config, num_ranks)
    model = build_rank(config, plan, build_mesh(plan.problem))
    loss = model.train_step(*(tensor.to(device) for tensor in random_batch(config, 1)))
    return loss.item(), {name: parameter.grad.cpu() for name, parameter in model.parameters.items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("algorithm", ["none", "naive", "two_barrier", "one_barrier"])
def test_one_rank_on_a_gpu_equals_the_cpu_in_float64(ranks, algorithm):
    config = config_of(1, 4, 101, vocab=VocabConfig(algorithm))
    ((cpu_loss, cpu),) = ranks(1).run(gradients_on, config, "cpu")
    ((gpu_loss, gpu),) = ranks(1).run(gradients_on, config, "cuda")
    assert gpu_loss == pytest.approx(cpu_loss, rel=1e-9)
    for name, expected in cpu.items():
        assert torch.allclose(gpu[name], expected, rtol=1e-9, atol=1e-12), name
