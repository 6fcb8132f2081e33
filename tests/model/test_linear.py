"""A linear layer whose tokens are split over ranks equals the whole one."""

from __future__ import annotations

import torch
import torch.distributed as dist

from vp_train.model.linear import PLAIN, LinearRule, SequenceSplit, WeightGradStore, _LinearFunction


def halves(rank, world_size):
    """Return whether y, dx and dW of a rank with a part of the sequence are those of the whole."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randn(sizes, generator=generator, dtype=torch.float64)
        for sizes in ((6, 2, 4), (8, 4), (6, 2, 8))
    )
    whole, rows = x.clone().requires_grad_(), weight.clone().requires_grad_()
    (whole @ rows.T).backward(dy)
    # Every rank has a part of the rows; the sum over ranks of dx is that of the whole layer.
    own = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    steps = 6 // world_size
    place = slice(rank * steps, (rank + 1) * steps)
    parameter = torch.nn.Parameter(weight[own].clone())
    part = x[place].clone().requires_grad_()
    split = SequenceSplit(dist.group.WORLD)
    rule = LinearRule(WeightGradStore(), PLAIN, dist.group.WORLD, split)
    y = _LinearFunction.apply(part, parameter, None, rule, None, None)
    y.backward(dy[..., own])
    return [
        torch.allclose(y, (x @ weight.T)[..., own]),
        torch.allclose(part.grad, whole.grad[place]),
        torch.allclose(parameter.grad, rows.grad[own]),
    ]


def test_a_layer_of_split_sequences_equals_the_whole_one(ranks):
    assert ranks(2).run(halves) == [[True] * 3] * 2
