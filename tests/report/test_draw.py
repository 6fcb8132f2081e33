"""A picture shows all of its curves, begins at zero where it is told to, and cuts no usual step."""

from __future__ import annotations

import pytest

from vp_train.report import draw
from vp_train.report.draw import NUM_COLOURS, NUM_STYLES, Style


def test_as_many_curves_as_there_are_styles_can_be_told_apart():
    styles = [Style.of(index) for index in range(NUM_STYLES)]
    assert len(set(styles)) == NUM_STYLES
    assert Style.of(NUM_STYLES) == styles[0]
    assert all(style.colour < NUM_COLOURS for style in styles)
    assert len({style.dash_array for style in styles}) == NUM_STYLES // NUM_COLOURS
    assert len({style.dashes for style in styles[:NUM_COLOURS]}) == 1, "colours differ first"


@pytest.fixture
def drawn(monkeypatch):
    """Return the axes of the pictures that are drawn."""
    made, figure_of = [], draw._figure

    def figure():
        made.append(figure_of())
        return made[-1]

    monkeypatch.setattr(draw, "_figure", figure)
    return made


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("values", [(3.0, 5.0), (0.0, 0.0), (-1.0, 2.0)])
def test_a_picture_has_all_values_and_zero_where_it_begins_there(drawn, values, from_zero):
    draw.lines([(Style(0), list(enumerate(values)))], name="a", from_zero=from_zero)
    ((_, axes),) = drawn
    low, high = axes.get_ylim()
    assert high > max(values) or (from_zero and high >= max(values))
    assert low < high
    assert low == 0.0 if from_zero else low < min(values)


def test_points_of_short_curves_are_marked(drawn):
    for count in (40, 41):
        draw.lines([(Style(0), [(step, 1.0 * step) for step in range(count)])], name="a")
    marks = [axes.get_lines()[0].get_marker() for _, axes in drawn]
    assert [bool(mark) and mark != "None" for mark in marks] == [True, False]


@pytest.mark.parametrize(
    ("heights", "is_cut", "top"),
    [
        ([1.0, 1.0, 3.0], False, 3.15),
        ([1.0, 1.0, 3.01], True, 3.0),
        ([1.0, 2.0], False, 2.1),
        ([5.0], False, 5.25),
        ([0.0, 0.0], False, 1e-12),
        ([0.0, 0.0, 1.0], False, 1.05),
    ],
)
def test_only_steps_of_three_times_the_median_are_cut_off(drawn, heights, is_cut, top):
    parts = [
        (Style(colour), [(step, height / 2) for step, height in enumerate(heights)])
        for colour in range(2)
    ]
    _, cut = draw.stack(parts, name="a")
    ((_, axes),) = drawn
    assert cut == is_cut
    assert axes.get_ylim() == pytest.approx((0.0, top))
    left, right = axes.dataLim.intervalx
    assert (left, right) == ((-0.5, 0.5) if len(heights) == 1 else (0, len(heights) - 1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.5, "0.5"), (999, "999"), (9_999, "9999"), (10_000, "10 k"), (-2e4, "-20 k")),
        *((123_456, "123.5 k"), (999_999, "1000 k"), (1e6, "1 M"), (2.5e9, "2.5 G"), (1e12, "1 T")),
        (1e15, "1000 T"),
    ],
)
def test_a_number_of_an_axis_is_short(value, text):
    assert draw._short(value) == text
