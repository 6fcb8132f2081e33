"""Synthetic text has the entropy it claims."""

import numpy as np
import pytest

from vp_train.data.synthetic import SyntheticText


def test_entropy_is_that_of_the_transition_matrix():
    text = SyntheticText(50, seed=3)
    z = text._probabilities
    transition = 0.25 * np.tile(z, (50, 1))
    transition[np.arange(50), text._successor] += 0.75
    stationary = np.full(50, 1 / 50)
    for _ in range(500):
        stationary = stationary @ transition
    expected = -(stationary[:, None] * transition * np.log(transition)).sum()
    assert text.entropy() == pytest.approx(expected, rel=1e-10)


def test_samples_follow_the_transition_matrix_and_repeat():
    text = SyntheticText(20, seed=1)
    sample = text.sample(0, 0, 50_000)
    assert np.array_equal(sample, text.sample(0, 0, 50_000))
    assert not np.array_equal(sample, text.sample(1, 0, 50_000))
    follows = (text._successor[sample[:-1]] == sample[1:]).mean()
    by_chance = text._probabilities[text._successor[sample[:-1]]].mean()
    assert follows == pytest.approx(0.75 + 0.25 * by_chance, abs=0.01)
    assert sample.min() >= 0
    assert sample.max() < 20


def test_a_large_vocabulary_is_quick_and_in_range():
    text = SyntheticText(262_144, seed=1)
    assert 0 < text.entropy() < np.log(262_144)
    assert text.sample(0, 5, 1000).max() < 262_144
