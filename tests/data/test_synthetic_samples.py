"""Statistics of synthetic samples, measured on drawn tokens only."""

from __future__ import annotations

import numpy as np
import pytest

from vp_train.data.synthetic import SyntheticText


def test_entropy_is_that_of_the_pairs_drawn() -> None:
    vocab_size = 16
    text = SyntheticText(vocab_size, seed=3)
    tokens = text.sample(0, 0, 400_000)
    pairs = np.zeros((vocab_size, vocab_size))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    joint = pairs / pairs.sum()
    conditional = joint / joint.sum(axis=1, keepdims=True)
    measured = -(joint[joint > 0] * np.log(conditional[joint > 0])).sum()
    assert text.entropy() == pytest.approx(measured, abs=0.01)
    assert measured < np.log(vocab_size) / 2


def test_samples_are_stationary_from_their_first_token() -> None:
    text = SyntheticText(8, seed=5)
    always = np.bincount(text.sample(0, 0, 200_000), minlength=8) / 200_000
    num_samples = 20_000
    first = np.bincount([text.sample(1, index, 1)[0] for index in range(num_samples)], minlength=8)
    deviation = np.sqrt(num_samples * always * (1 - always))
    assert np.all(np.abs(first - num_samples * always) < 4.5 * deviation)


def test_sample_depends_on_seed_stream_and_index_alone() -> None:
    text = SyntheticText(1000, seed=1)
    sample = text.sample(0, 7, 64)
    assert sample.dtype == np.int64
    assert np.array_equal(sample, SyntheticText(1000, seed=1).sample(0, 7, 64))
    for other in (
        text.sample(0, 8, 64),
        text.sample(1, 7, 64),
        SyntheticText(1000, seed=2).sample(0, 7, 64),
    ):
        assert not np.array_equal(sample, other)


@pytest.mark.parametrize("vocab_size", [1, 2])
def test_smallest_vocabularies_have_no_more_than_uniform_entropy(vocab_size: int) -> None:
    text = SyntheticText(vocab_size, seed=1)
    assert set(text.sample(0, 0, 1000)) == set(range(vocab_size))
    assert -1e-12 < text.entropy() <= np.log(vocab_size) + 1e-12
