"""The comparison of the equivalence tests can fail.

It fails for NaN, infinity, different shapes, and names that no rank has compared.
"""

import math

import pytest
import torch

from tests.pipeline.compare import Comparison, assert_all_close, largest_difference

BROKEN = [math.nan, math.inf, -math.inf]


def comparison(expected=("loss",), **pairs):
    made = Comparison(frozenset(expected))
    for name, pair in pairs.items():
        made.add(name, *pair)
    return made


def test_a_difference_is_relative_to_the_largest_entry():
    theirs = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
    assert largest_difference(theirs, theirs) == 0.0
    assert largest_difference(theirs + torch.tensor([0.0, 0.2]), theirs) == pytest.approx(0.05)
    assert largest_difference(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0
    assert largest_difference(torch.ones(2), torch.zeros(2)) > 1e9


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("place", range(3))
def test_a_value_that_is_not_finite_differs_from_everything_even_from_itself(value, place):
    whole = torch.ones(3)
    broken = whole.clone()
    broken[place] = value
    for ours, theirs in ((broken, whole), (whole, broken), (broken, broken)):
        assert largest_difference(ours, theirs) == math.inf


@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 3), (), (0,)])
def test_shapes_that_would_broadcast_are_refused(shape):
    with pytest.raises(AssertionError, match=r"is compared with \[3\]"):
        largest_difference(torch.ones(shape), torch.ones(3))


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("order", [1, -1])
def test_one_broken_value_fails_whatever_was_compared_before_or_after(value, order):
    """`max(0.0, nan)` is 0.0, and `max(nan, 0.0)` is nan, which is not above any tolerance."""
    made = comparison()
    for loss in [1.0, value, 1.0][::order]:
        made.add("loss", loss, 1.0)
        made.add("gradient", torch.tensor([1.0]), torch.tensor([1.0]))
    with pytest.raises(AssertionError, match="rank 1"):
        assert_all_close([comparison(loss=(1.0, 1.0)), made], 1e-9)


def test_the_largest_of_several_steps_counts_and_is_named():
    made = comparison(loss=(1.0, 1.0), gradient=(1.0, 1.0))
    made.add("gradient", 1.5, 1.0)
    made.add("gradient", 1.0, 1.0)
    assert made.largest == {"loss": 0.0, "gradient": 0.5}
    with pytest.raises(AssertionError, match=r"'gradient': 0\.5.*the case"):
        assert_all_close([made], 0.5, "the case")
    assert_all_close([made], 0.51)


def test_a_name_that_no_rank_compares_is_reported():
    parts = [comparison(("a", "b"), a=(1.0, 1.0)), comparison(("a", "b"), b=(2.0, 2.0))]
    assert_all_close(parts, 1e-9)
    with pytest.raises(AssertionError, match=r"compared by no rank: \['b'\].*the case"):
        assert_all_close(parts[:1], 1e-9, "the case")


@pytest.mark.parametrize("ranks", [[], [comparison(())]])
def test_comparing_nothing_is_no_success(ranks):
    with pytest.raises(AssertionError, match="nothing was to be compared"):
        assert_all_close(ranks, 1e-9)
