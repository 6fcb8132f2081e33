"""The sharded embedding equals the whole one; its gradient touches only the rows of the tokens."""

import pytest
import torch

from schedules.vocab import Payload
from tests.vocab.ranks import make_layer
from vp_train.vocab.input import InputLayer
from vp_train.vocab.reference import cross_entropy
from vp_train.vocab.shard import Shard, split_rows


def test_the_rows_of_all_shards_in_order_are_the_embedding_and_gradients_go_back_the_same_way():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(101, 8, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 101, (3, 50), generator=generator)
    dy = torch.randn(3, 50, 8, generator=generator, dtype=torch.float64)
    grad = torch.zeros_like(weight)
    shards = split_rows(101, 4, [0, 60, 1, 40])
    layers = [
        InputLayer(weight[s.start : s.stop], grad[s.start : s.stop], shards, i)
        for i, s in enumerate(shards)
    ]
    layers = [layer.begin(tokens) for layer in layers]
    for i in range(3):
        rows = [layer.e(i) for layer in layers]
        assert [len(found) for found in rows] == layers[0].counts(i)
        assert sum(layers[0].counts(i)) == 50
        assert torch.equal(layers[0].in_order(i, torch.cat(rows)), weight[tokens[i]])
        for layer, part in zip(
            layers, layers[0].by_shard(i, dy[i]).split(layers[0].counts(i)), strict=True
        ):
            layer.g(i, part)
    leaf = weight.clone().requires_grad_()
    leaf[tokens].backward(dy)
    assert torch.allclose(grad, leaf.grad, rtol=1e-13)


def test_a_gradient_of_less_precision_is_added_in_fp32():
    tokens, dy = (
        torch.tensor([[2, 2, 2]]),
        torch.tensor([[1.0], [2.0**-9], [2.0**-9]], dtype=torch.bfloat16),
    )
    grad = torch.zeros(3, 1)
    layer = InputLayer(torch.zeros(3, 1, dtype=torch.bfloat16), grad, (Shard(0, 3),), 0)
    layer.begin(tokens).g(0, dy)
    assert grad.flatten().tolist() == [0.0, 0.0, 1 + 2.0**-8]


def test_the_same_token_many_times_gives_the_same_bits_every_time():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (1, 4096), generator=generator)
    dy = torch.randn(4096, 16, generator=generator)
    results = []
    for _ in range(3):
        grad = torch.zeros(3, 16)
        layer = InputLayer(torch.zeros(3, 16), grad, (Shard(0, 3),), 0)
        layer.begin(tokens).g(0, dy)
        results.append(grad)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_token_outside_the_vocabulary_is_refused():
    layer = InputLayer(torch.zeros(40, 8), torch.zeros(40, 8), split_rows(64, 2, [40, 24]), 0)
    for token in (64, -1):
        with pytest.raises(
            IndexError, match=rf"token {token} is not in the vocabulary, whose ids are 0 to 63"
        ):
            layer.begin(torch.tensor([[3, 63, token], [1, 2, 4]]))


def test_tied_layers_share_weight_and_gradient():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    x, dy = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    tokens, targets = torch.randint(0, 64, (2, 5), generator=generator)
    ones = torch.ones(5, dtype=torch.float64)
    grad = torch.zeros_like(weight)
    embedding = InputLayer(weight, grad, (Shard(0, 64),), 0)
    output = make_layer(weight, grad, Shard(0, 64), "one_barrier", "chunked")
    embedding.begin(tokens[None]).g(0, dy)
    step = output.begin(targets[None], ones[None])
    step.s(0, x)
    step.absorb(Payload.STATISTICS, 0, step.message(Payload.STATISTICS, 0)[None])
    step.t(0)
    expected = cross_entropy(x, weight, targets, ones)[2].index_add_(0, tokens, dy)
    assert torch.allclose(grad, expected, rtol=1e-12)
