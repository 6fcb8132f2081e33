"""Curves of any length become short ones in which every extreme is kept."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from vp_train.report.curves import Curves, finite

VALUES = st.floats(-1e6, 1e6)


def curve_of(values, first=1, stride=1, most=8):
    curves = Curves(most)
    for index, value in enumerate(values):
        curves.add(first + stride * index, {"loss": value})
    return curves


@given(
    st.lists(VALUES, min_size=1, max_size=200),
    st.integers(0, 1 << 50),
    st.integers(1, 1_000),
)
def test_a_thinned_curve_is_short_and_keeps_the_extremes(values, first, stride):
    curves = curve_of(values, first, stride)
    points = curves.points("loss")
    assert len(points) <= 2 * 8
    assert len(curves.means("loss")) <= 8
    assert [step for step, _ in points] == sorted(step for step, _ in points)
    own = {first + stride * index: value for index, value in enumerate(values)}
    assert all(own[step] == value for step, value in points)
    shown = [value for _, value in points]
    assert (min(shown), max(shown)) == (min(values), max(values))
    assert curves.lowest("loss")[1] == min(values)
    assert curves.latest("loss") == values[-1]
    assert math.isclose(curves.total("loss"), math.fsum(values), rel_tol=1e-9, abs_tol=1e-3)


def test_a_short_curve_is_whole():
    values = [3.0, 1.0, 2.0]
    assert curve_of(values).points("loss") == [(1, 3.0), (2, 1.0), (3, 2.0)]
    assert curve_of(values).means("loss") == [(1, 3.0), (2, 1.0), (3, 2.0)]
    assert curve_of(values).median("loss") == 2.0


def test_many_steps_make_a_thousand_points():
    curves = Curves()
    for step in range(1, 100_001):
        curves.add(
            step, {"loss": step * 7919 % 1000, "rare" if step % 40_000 == 0 else "often": 5.0}
        )
    assert 500 <= len(curves.points("loss")) <= 1_000
    assert [step for step, _ in curves.points("rare")] == [40_000, 80_000]
    assert (curves.num_steps, curves.last) == (100_000, 100_000)


def test_steps_that_go_back_are_left_out():
    curves = curve_of([1.0, 2.0])
    curves.add(1, {"loss": 9.0})
    assert curves.highest("loss") == (2, 2.0)
    assert curves.num_steps == 2


def test_only_numbers_are_values():
    odd = {"a": 1, "b": True, "c": "1", "d": None, "e": math.nan, "f": math.inf, "g": 10**400}
    assert finite(odd | {"h": [1]}, 1e30) == {"a": 1.0}


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from("ab"), VALUES), min_size=1, max_size=60),
    st.integers(0, 50),
)
def test_a_mean_stands_in_the_middle_of_its_bucket_and_every_value_counts_once(records, first):
    """Steps have gaps, and each has a value of one of two keys."""
    curves, step, own = Curves(6), first, {}
    for stride, key, value in records:
        curves.add(step, {key: value})
        own[step] = key, value
        step += stride
    width = 1
    while len({each // width for each in own}) > 6:
        width *= 2
    for key in "ab":
        expected = []
        for place in sorted({each // width for each in own}):
            values = [v for s, (k, v) in own.items() if s // width == place and k == key]
            middle = float(place) if width == 1 else (place + 0.5) * width
            expected.append((middle, sum(values) / len(values) if values else 0.0))
        found = curves.means(key)
        assert [at for at, _ in found] == [at for at, _ in expected]
        for (_, mine), (_, true) in zip(found, expected, strict=True):
            assert math.isclose(mine, true, rel_tol=1e-9, abs_tol=1e-6)
    num_steps = len(own) - (0 in own)  # step 0 is before the first one
    assert (curves.first, curves.last, curves.num_steps) == (first, max(own), num_steps)


def test_of_equal_extremes_the_first_counts_however_much_is_joined():
    curves = curve_of([1.0, 2.0, 0.5] * 40)
    assert (curves.lowest("loss"), curves.highest("loss")) == ((3, 0.5), (2, 2.0))
    assert (curves.lowest("other"), curves.highest("other"), curves.latest("other")) == (None,) * 3
    assert (curves.median("other"), curves.total("other"), curves.points("other")) == (None, 0, [])


def test_a_curve_is_joined_only_when_it_has_more_buckets_than_fit():
    for count, most in ((8, 8), (9, 8)):
        points = curve_of([float(i) for i in range(count)], first=0, most=most).means("loss")
        assert len(points) == (8 if count == 8 else 5)


def test_as_large_as_the_largest_number_is_a_value_with_either_sign():
    assert finite({"a": 2.0, "b": -2.0, "c": 2.1, "d": -2.1, "e": 0}, 2.0) == {
        "a": 2.0,
        "b": -2.0,
        "e": 0.0,
    }
