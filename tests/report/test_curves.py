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
