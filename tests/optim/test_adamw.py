"""The learning rate follows its shape, decay spares norms, and clipping is by the norm over all ranks."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vp_train.config import OptimConfig
from vp_train.control import ControlGroup
from vp_train.optim.adamw import build_adamw, clip_scale, gather_health, learning_rate
from vp_train.optim.optimizer import squared_norm


def test_cosine_warms_up_and_ends_at_the_minimum():
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(optim, step, 110) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[59] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(rates[9:]))


def test_wsd_holds_and_then_decays_linearly():
    optim = OptimConfig(lr=1.0, min_lr=0.0, schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    assert learning_rate(optim, 80, 100) == 1.0
    assert learning_rate(optim, 90, 100) == pytest.approx(0.5)
    assert learning_rate(optim, 100, 100) == 0.0


def test_a_run_without_warm_up_starts_at_the_full_rate():
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=0), 1, 1000) == pytest.approx(1.0, rel=1e-3)


def test_only_matrices_decay_and_a_fresh_state_is_complete():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_adamw([matrix, vector], OptimConfig(lr=0.1, weight_decay=0.5))
    for parameter in (matrix, vector):
        assert optimizer.state[parameter]["exp_avg"].abs().sum() == 0
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(vector, torch.ones(2))
    assert torch.allclose(matrix, torch.full((2, 2), 0.95))


def health_of(rank, num_ranks, gradient, loss):
    values = torch.full((4,), gradient[rank])
    mine = None if loss[rank] is None else torch.tensor(loss[rank])
    everyone = ControlGroup.flat(dist.group.WORLD)
    health = gather_health(mine, squared_norm([values]), everyone, peak_bytes=100.0 * (rank + 1))
    return health, values.norm().item() * clip_scale(health.grad_norm, 1.0)


def test_all_ranks_know_the_same_and_clip_to_the_same_norm(ranks):
    results = ranks(2).run(health_of, [3.0, 4.0], [None, 2.5])
    for health, _ in results:
        assert health == results[0][0]
        assert health.loss == 2.5
        assert health.grad_norm == pytest.approx(10.0)
        assert health.peak_bytes == 200.0
        assert health.culprits == ()
    assert math.hypot(*(norm for _, norm in results)) == pytest.approx(1.0)


def test_nonfinite_values_name_their_rank(ranks):
    for health, _ in ranks(2).run(health_of, [1.0, math.inf], [None, math.nan]):
        assert health.culprits == ((1, "loss"),)
    for health, _ in ranks(2).run(health_of, [math.nan, 1.0], [None, 1.0]):
        assert health.culprits == ((0, "gradient"),)
