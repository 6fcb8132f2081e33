"""The learning rate has its shape, norms do not decay, and clipping uses the norm of all ranks."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vp_train.communication.control import ControlGroup
from vp_train.config import ConfigError, OptimConfig
from vp_train.optim.adamw import build_adamw, clip_scale, gather_health, learning_rate
from vp_train.optim.optimizer import squared_norm


def test_cosine_warms_up_and_ends_at_the_minimum():
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(optim, step, 110) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    # After a quarter of the decay the cosine is cos(pi / 4).
    assert rates[34] == pytest.approx(0.1 + 0.9 * (2 + math.sqrt(2)) / 4)
    assert rates[59] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(rates[9:]))


def test_wsd_holds_and_then_decays_linearly():
    optim = OptimConfig(lr=1.0, min_lr=0.0, schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    assert learning_rate(optim, 80, 100) == 1.0
    assert learning_rate(optim, 90, 100) == pytest.approx(0.5)
    assert learning_rate(optim, 100, 100) == 0.0


def test_a_run_without_warm_up_starts_at_the_full_rate():
    for schedule in ("cosine", "wsd"):
        assert learning_rate(
            OptimConfig(lr=1.0, schedule=schedule, warmup_steps=0), 1, 1000
        ) == pytest.approx(1.0, rel=1e-3)


def rates_of(optim, num_steps):
    """Return the rates from step 0, where a warm-up begins, to the last step."""
    first = 0.0 if optim.warmup_steps else optim.lr
    return [first, *(learning_rate(optim, step, num_steps) for step in range(1, num_steps + 1))]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["cosine", "wsd"]),
    st.floats(1e-6, 10.0),
    st.none() | st.floats(0.0, 1.0),
    st.integers(0, 40),
    st.floats(0.0, 0.99),
    st.integers(1, 60),
)
def test_the_rate_rises_to_lr_once_and_falls_to_its_end_without_a_jump(
    schedule, lr, fraction, warmup, decay, num_steps
):
    """All rates lie between their bounds, whatever the lengths of warm-up, decay and run.

    No rate is above lr, and after the warm-up no rate is below the last.
    """
    min_lr = None if fraction is None else lr * fraction
    optim = OptimConfig(
        lr=lr, min_lr=min_lr, schedule=schedule, warmup_steps=warmup, decay_fraction=decay
    )
    end = lr / 10 if min_lr is None else min_lr
    rates = rates_of(optim, num_steps)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    close = 1e-9 * lr
    assert all(0 <= rate <= lr + close for rate in rates)
    assert all(later - earlier == pytest.approx(lr / warmup) for earlier, later in pairwise(rising))
    if num_steps < warmup:
        assert len(rising) == num_steps + 1
        return
    assert falling[0] == pytest.approx(lr)  # reached even if the decay is longer than the rest
    assert all(later <= earlier + close for earlier, later in pairwise(falling))
    assert all(rate >= end - close for rate in falling)
    left = num_steps - warmup
    if schedule == "cosine":
        steepest = math.pi / 2 / max(1, left)
    else:
        length = min(left, max(1, round(decay * num_steps)) if decay else 0)
        steepest = 1 / max(1, length)
        assert falling[: left - length + 1] == pytest.approx([lr] * (left - length + 1))
    assert all(
        earlier - later <= (lr - end) * min(1.0, steepest) + close
        for earlier, later in pairwise(falling)
    )
    if left and (schedule == "cosine" or decay):
        assert rates[-1] == pytest.approx(end)


def test_wsd_without_a_decay_keeps_the_rate_to_the_last_step():
    optim = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=2, decay_fraction=0.0)
    assert rates_of(optim, 6) == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_wsd_decays_from_the_rate_that_the_warm_up_has_reached():
    optim = OptimConfig(lr=1.0, min_lr=0.0, schedule="wsd", warmup_steps=6, decay_fraction=0.8)
    assert rates_of(optim, 10) == pytest.approx(
        [*(step / 6 for step in range(7)), 0.75, 0.5, 0.25, 0.0]
    )


@pytest.mark.parametrize("lr", [2e-3, 1e-4, 1e-6])
def test_the_rate_ends_at_a_tenth_unless_min_lr_is_set(lr):
    assert learning_rate(OptimConfig(lr=lr, warmup_steps=0), 90, 90) == pytest.approx(lr / 10)
    assert learning_rate(
        OptimConfig(lr=lr, min_lr=lr / 2, warmup_steps=0), 90, 90
    ) == pytest.approx(lr / 2)
    assert learning_rate(OptimConfig(lr=lr, min_lr=lr, warmup_steps=0), 45, 90) == pytest.approx(lr)


def test_a_rate_that_would_rise_to_its_end_is_refused():
    message = (
        r"optim.min_lr=0.0002 is above optim.lr=0.0001, which decays to it; "
        r"lower it, or leave it out for a tenth"
    )
    with pytest.raises(ConfigError, match=message):
        OptimConfig(lr=1e-4, min_lr=2e-4)
    with pytest.raises(ConfigError, match=r"optim.min_lr=-1 is too small; it must be at least 0"):
        OptimConfig(min_lr=-1)


def test_only_matrices_decay_and_a_fresh_state_is_complete():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_adamw([matrix, vector], OptimConfig(lr=0.1, weight_decay=0.5))
    for parameter in (matrix, vector):
        assert optimizer.state[parameter]["exp_avg"].abs().sum() == 0
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(vector, torch.ones(2))
    assert torch.allclose(matrix, torch.full((2, 2), 0.95))


@pytest.mark.parametrize(
    ("norm", "limit", "expected"),
    [(4.0, 1.0, 0.25), (1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (9.0, 0.0, 1.0)],
)
def test_only_gradients_above_the_limit_are_scaled_and_a_limit_of_zero_is_none(
    norm, limit, expected
):
    assert clip_scale(norm, limit) == expected


def health_of(rank, num_ranks, gradient, loss):
    values = torch.full((4,), gradient[rank])
    own_loss = None if loss[rank] is None else torch.tensor(loss[rank])
    control = ControlGroup.flat(dist.group.WORLD)
    health = gather_health(
        own_loss,
        squared_norm([values]),
        control,
        peak_bytes=100.0 * (rank + 1),
        figures=lambda: [0.5, 10.0 + rank],
    )
    return health, values.norm().item() * clip_scale(health.grad_norm, 1.0)


def test_all_ranks_know_the_same_and_clip_to_the_same_norm(ranks):
    results = ranks(2).run(health_of, [3.0, 4.0], [None, 2.5])
    for health, _ in results:
        assert health == results[0][0]
        assert health.loss == 2.5
        assert health.grad_norm == pytest.approx(10.0)
        assert health.peak_bytes == 200.0
        assert health.culprits == ()
        assert health.figures == ((0.5, 10.0), (0.5, 11.0))
    assert math.hypot(*(norm for _, norm in results)) == pytest.approx(1.0)


def test_nonfinite_values_name_their_rank(ranks):
    for health, _ in ranks(2).run(health_of, [1.0, math.inf], [None, math.nan]):
        assert health.culprits == ((1, "loss"),)
    for health, _ in ranks(2).run(health_of, [math.nan, 1.0], [None, 1.0]):
        assert health.culprits == ((0, "gradient"),)
