"""The sharded embedding equals the whole one; its gradient touches only the rows of the tokens."""

import torch

from vp_train.vocab.input import InputLayer
from vp_train.vocab.output import OutputLayer
from vp_train.vocab.reference import cross_entropy
from vp_train.vocab.shard import Shard, split_rows


def test_the_sum_over_shards_is_the_embedding_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(101, 8, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 101, (50,), generator=generator)
    dy = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    grad = torch.zeros_like(weight)
    layers = [InputLayer(weight[s.start : s.stop], grad[s.start : s.stop], s) for s in split_rows(101, 4, [0, 60, 1, 40])]
    assert torch.equal(sum(layer.e(tokens) for layer in layers), weight[tokens])
    for layer in layers:
        layer.g(tokens, dy)
    leaf = weight.clone().requires_grad_()
    leaf[tokens].backward(dy)
    assert torch.allclose(grad, leaf.grad, rtol=1e-13)


def test_tied_layers_share_weight_and_gradient():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    x, dy = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    tokens, targets = torch.randint(0, 64, (2, 5), generator=generator)
    ones = torch.ones(5, dtype=torch.float64)
    grad = torch.zeros_like(weight)
    embedding = InputLayer(weight, grad, Shard(0, 64))
    output = OutputLayer(weight, grad, Shard(0, 64), "one_barrier", "chunked")
    embedding.g(tokens, dy)
    output.s(0, x, targets)
    output.absorb("C1", 0, output.message("C1", 0)[None])
    output.t(0, ones)
    expected = cross_entropy(x, weight, targets, ones)[2].index_add_(0, tokens, dy)
    assert torch.allclose(grad, expected, rtol=1e-12)
