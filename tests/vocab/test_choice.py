"""The next token does not depend on the shards, and draws have the probabilities of the softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vp_train.vocab.choice import Sampling, _mixed, choose, gumbel, nothing, offers
from vp_train.vocab.shard import Shard, split_rows

V, H = 37, 8
SAMPLINGS = [Sampling(), Sampling(0.7, seed=3), Sampling(1.3, top_k=5, seed=4), Sampling(1.0, 50)]


def logits_of(weight, x, softcap=None):
    logits = weight.double() @ x.double()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def chosen(weight, x, shards, sampling, place=0, softcap=None):
    offered = [offers(x, weight[s.start : s.stop], s, softcap, sampling, place) for s in shards] + [
        nothing(sampling)
    ]
    return choose(torch.stack(offered), sampling, place)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_choice_does_not_depend_on_the_shards(sampling, softcap):
    made = torch.Generator().manual_seed(0)
    splits = [split_rows(V, n) for n in (1, 2, 3, 5)] + [split_rows(V, 3, [0, 36, 1])]
    seen = set()
    for place in range(40):
        weight, x = torch.randn(V, H, generator=made), torch.randn(H, generator=made)
        found = {chosen(weight, x, shards, sampling, place, softcap) for shards in splits}
        assert len(found) == 1
        seen |= found
        if not sampling.temperature:
            assert found == {int(logits_of(weight, x, softcap).argmax())}
    assert len(seen) > 10


def test_of_equal_logits_the_smallest_id_is_taken():
    weight, x = torch.ones(V, H), torch.ones(H)
    assert chosen(weight, x, split_rows(V, 3), Sampling()) == 0
    among = Sampling(1.0, top_k=4)
    drawn = {chosen(weight, x, split_rows(V, 3), among, place) for place in range(200)}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("top_k", [None, 4])
def test_draws_have_the_probabilities_of_the_softmax(top_k):
    made = torch.Generator().manual_seed(1)
    weight, x = torch.randn(V, H, generator=made) / 2, torch.randn(H, generator=made)
    logits = logits_of(weight, x) / 0.8
    if top_k is not None:
        logits[logits < logits.sort(descending=True).values[top_k - 1]] = -torch.inf
    expected = logits.softmax(0).numpy()
    sampling, n = Sampling(0.8, top_k, seed=2), 2000
    draws = [chosen(weight, x, split_rows(V, 2), sampling, place) for place in range(n)]
    counts = np.bincount(draws, minlength=V)
    assert (counts[expected == 0] == 0).all()
    assert counts.sum() == n
    deviation = (counts - expected * n) / np.sqrt(expected * (1 - expected) * n + 1e-9)
    assert np.abs(deviation).max() < 5  # standard deviations; a rare token may be drawn twice
    assert (deviation**2).mean() < 2


def test_the_noise_is_that_of_gumbel_and_differs_by_seed_and_place():
    ids = np.arange(5000)
    noise = gumbel(1, 7, ids)
    reached = np.sort(np.exp(-np.exp(-noise)))  # uniform, if the noise is Gumbel
    distance = np.abs(reached - (ids + 0.5) / len(ids)).max()
    assert distance < 1.95 / np.sqrt(len(ids))  # Kolmogorov-Smirnov, p = 0.001
    for other in (gumbel(2, 7, ids), gumbel(1, 8, ids)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.05
    assert np.array_equal(gumbel(1, 7, ids[100:200]), noise[100:200])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_logit_that_is_no_number_is_seen_by_all(sampling):
    x = torch.full((H,), torch.nan)
    assert offers(x, torch.ones(3, H), Shard(0, 3), None, sampling, 0).isnan().all()


def test_numbers_are_mixed_as_published():
    """The first two numbers of splitmix64 with seed 0."""
    step = 0x9E3779B97F4A7C15
    mixed = _mixed(np.array([0, step], dtype=np.uint64))
    assert mixed.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
