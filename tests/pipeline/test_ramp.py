"""Steps of a batch-size ramp compute what one unsharded process computes on their sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.local import run_locally
from tests.pipeline.equivalence import config_of, part_of
from tests.pipeline.truth import Whole, random_batch
from vp_train.optim.adamw import build_adamw, clip_scale, learning_rate
from vp_train.planning.plan import make_plan, replan

SIZES = (1, 2, 3, 6, 2)  # microbatches by step; the last one shows that a program can come back


def batch_of(config, step):
    return random_batch(replace(config, num_microbatches=SIZES[step - 1]), step)


def truth_of(config):
    """Return the losses of all steps, and the parameters after the last one, of one process."""
    whole = Whole(config, torch.float64)
    named, losses = dict(whole.named()), []
    optimizer = build_adamw(named.values(), config.optim)
    for step in range(1, len(SIZES) + 1):
        loss = whole(*batch_of(config, step))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([one.grad.norm() for one in named.values()]).norm().item()
        scale = clip_scale(norm, config.optim.clip_grad_norm)
        for parameter in named.values():
            parameter.grad.mul_(scale)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, len(SIZES))
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in named.items()}


@pytest.mark.parametrize(
    ("p", "options"),
    [
        (2, {"schedule": "1f1b"}),
        (2, {"schedule": "v_half", "num_stages": 4, "tied": True}),
        (3, {"schedule": "zb_h1"}),
        (2, {"schedule": "interleaved", "num_stages": 4}),
    ],
)
def test_steps_of_any_size_train_as_one_process_does(p, options):
    config = config_of(p, max(SIZES), 53, **options)
    config = replace(config, batch_ramp=tuple((n + 1, 2 * size) for n, size in enumerate(SIZES)))
    plan = make_plan(config, p)
    losses, parameters = truth_of(config)

    def work(rank, model, together):
        for step, truth in enumerate(losses, start=1):
            assert plan.ramp.at(step) == SIZES[step - 1]
            model.trainer.follow(replan(config, plan, plan.ramp.at(step)).program)
            model.gradients.zero()
            ours = model.train_step(*batch_of(config, step))
            model.optimizer.reduce()
            norm = model.optimizer.squared_norm()
            health = together.health(rank, ours if model.reports_loss else None, norm)
            assert health.loss == pytest.approx(truth, rel=1e-12)
            rate = learning_rate(config.optim, step, len(SIZES))
            scale = clip_scale(health.grad_norm, config.optim.clip_grad_norm)
            model.optimizer.step(rate, scale)
            model.optimizer.settle()
        for name, parameter in model.parameters.items():
            truth = part_of(parameters[name], name, model.splits)
            torch.testing.assert_close(parameter.detach(), truth, rtol=1e-9, atol=1e-11)

    run_locally(config, plan, work)
