"""Weights of tokens add up to one over all data-parallel ranks."""

import pytest
import torch
import torch.distributed as dist

from vp_train.vocab.loss import token_weights

SHAPE = (3, 2, 5)  # m, b, s


def batch_of(rank):
    generator = torch.Generator().manual_seed(rank)
    labels = torch.randint(0, 9, SHAPE, generator=generator)
    labels[torch.rand(SHAPE, generator=generator) < 0.4] = -100
    labels[rank, 0] = -100
    return labels, torch.rand(SHAPE, generator=generator, dtype=torch.float64)


def over_replicas(total):
    dist.all_reduce(total)
    return total


def weights_of(rank, world_size, normalisation, masked):
    labels, mask = batch_of(rank)
    return token_weights(
        labels, mask if masked else None, normalisation, torch.float64, over_replicas
    ).tolist()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_data_parallel_ranks_weigh_tokens_as_one_process_with_all_of_them(
    ranks, normalisation, masked
):
    labels, masks = (torch.cat(parts) for parts in zip(*map(batch_of, range(2)), strict=True))
    counted = (labels != -100) * (masks if masked else torch.ones_like(masks))
    if normalisation == "sequence":
        sums = counted.sum(-1, keepdim=True)
        counted = counted / sums.clamp_min(1e-30) / (sums > 0).sum()
    else:
        counted = counted / counted.sum()
    ours = torch.cat(
        [
            torch.tensor(part, dtype=torch.float64)
            for part in ranks(2).run(weights_of, normalisation, masked)
        ]
    )
    assert torch.allclose(ours, counted, rtol=1e-12)
    assert ours.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_a_batch_without_a_label_weighs_nothing(normalisation):
    weights = token_weights(torch.full(SHAPE, -100), None, normalisation, torch.float32, None)
    assert torch.equal(weights, torch.zeros(SHAPE))
