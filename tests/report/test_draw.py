"""A picture shows all of its curves, begins at zero where it is told to, and cuts no usual step."""

from __future__ import annotations

import math
import re

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
        ([5.0, 1.0, 2.0, 1.0, 2.0, 1.0], False, 5.25),
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


def box_of(axes):
    """Return left, bottom, width and height of the axes in points of the picture."""
    left, bottom, width, height = axes.get_position().bounds
    return 400 * left, 210 * bottom, 400 * width, 210 * height


def test_the_box_of_a_picture_leaves_room_for_its_numbers_and_no_more(drawn):
    """Numbers are on the left and below; 400 x 210 points as the element says."""
    text = draw.lines([(Style(3, 2), [(0, 0.0), (1, 10.0)])], name="a")
    ((figure, axes),) = drawn
    assert text.startswith('<svg viewBox="0 0 400 210">')
    assert (figure.get_figwidth(), figure.get_figheight()) == pytest.approx((400 / 72, 210 / 72))
    assert figure.dpi == 72
    assert box_of(axes) == pytest.approx((46, 24, 400 - 46 - 12, 210 - 24 - 10))
    shown = {name: spine.get_visible() for name, spine in axes.spines.items()}
    assert shown == {"left": False, "right": False, "top": False, "bottom": True}
    assert axes.get_axisbelow() is True
    for axis, has_grid in ((axes.xaxis, False), (axes.yaxis, True)):
        tick = axis.get_major_ticks()[0]
        assert tick.gridline.get_visible() is has_grid
        assert (tick.tick1line.get_markersize(), tick.get_pad()) == (0, 4)
        assert (tick.label1.get_fontsize(), tick.label1.get_color()) == (11, draw._INK)
    grid = axes.yaxis.get_gridlines()[0]
    assert (grid.get_color(), grid.get_linewidth()) == (draw._GRID, 0.8)
    assert axes.spines["bottom"].get_edgecolor()[:3] == pytest.approx((1 / 255, 2 / 255, 4 / 255))
    (curve,) = axes.get_lines()
    assert (curve.get_color(), curve.get_linestyle()) == (draw._COLOURS[3], ":")
    assert (curve.get_linewidth(), curve.get_markersize()) == (1.5, 3)
    # The points stand where they belong, within matplotlib's margins of a twentieth.
    x, y = axes.transData.transform([(0, 0.0), (1, 10.0)]).T
    assert x == pytest.approx([46 + 342 / 22, 46 + 342 * 21 / 22])
    assert y == pytest.approx([24 + 176 / 22, 24 + 176 * 21 / 22])


@pytest.mark.parametrize("most", [1, 7, 90, 300, 12_345])
def test_numbers_of_an_axis_are_few_and_round_and_steps_are_whole(drawn, most):
    draw.lines([(Style(0), [(0, 0.0), (most, most / 9)])], name="a", from_zero=True)
    ((_, axes),) = drawn

    def inside(axis, limits):
        return [t for t in axis.get_majorticklocs() if limits[0] <= t <= limits[1]]

    steps, values = inside(axes.xaxis, axes.get_xlim()), inside(axes.yaxis, axes.get_ylim())
    for places, fewest, count, allowed in (
        (steps, 2, 7, (1, 2, 5)),
        (values, 3, 6, (1, 2, 2.5, 5)),
    ):
        assert fewest <= len(places) <= count
        apart = places[1] - places[0]
        first = apart / 10 ** math.floor(math.log10(apart * (1 + 1e-9)))
        assert any(first == pytest.approx(one) for one in allowed), apart
    assert all(step == round(step) for step in steps)
    words = [axes.yaxis.get_major_formatter()(value) for value in values]
    assert words == [draw._short(value) for value in values]
    assert [axes.xaxis.get_major_formatter()(step) for step in steps] == list(
        map(draw._short, steps)
    )


def test_a_picture_has_the_colours_and_the_font_of_its_page():
    """No colour of its own, no font, no link, and the same text each time."""
    curves = [(Style.of(index), [(0, 1.0), (1, 2.0 + index)]) for index in range(NUM_COLOURS)]
    text = draw.lines(curves, name="a")
    for index in range(NUM_COLOURS):
        assert f"var(--c{index})" in text
    assert "var(--muted)" in text
    assert "var(--line)" in text
    for word in ("#0102", "font-family", "<metadata", "<style", "http", "\n", "<?xml", "xmlns"):
        assert word not in text, word
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#(\w+)\)", text)) <= set(ids)
    assert draw.lines(curves, name="a") == text
    others = re.findall(r' id="([^"]*)"', draw.lines(curves, name="b"))
    assert not set(ids) & set(others), "another picture of the page has other names"


def test_parts_stand_on_each_other_in_their_colours(drawn):
    parts = [(Style(7), [(3, 1.0), (4, 2.0)]), (Style(2), [(3, 10.0), (4, 20.0)])]
    draw.stack(parts, name="a")
    ((_, axes),) = drawn
    low, high = axes.collections
    for area, colour, bounds in ((low, 7, (0.0, 2.0)), (high, 2, (1.0, 22.0))):
        heights = area.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == bounds
        expected = tuple(int(draw._COLOURS[colour][at : at + 2], 16) / 255 for at in (1, 3, 5))
        assert tuple(area.get_facecolor()[0][:3]) == pytest.approx(expected)
        assert area.get_linewidth()[0] == 0


@pytest.mark.parametrize(
    ("most", "steps", "values"),
    [
        (6, [0, 2, 4, 6], [0, 0.2, 0.4, 0.6]),
        (27, [0, 5, 10, 15, 20, 25], [0, 1, 2, 3]),
        (90, [0, 20, 40, 60, 80], [0, 2.5, 5, 7.5, 10]),
        (450, [0, 100, 200, 300, 400], [0, 20, 40]),
    ],
)
def test_an_axis_has_the_numbers_that_readers_expect(drawn, most, steps, values):
    """An axis has at most six intervals of steps, and five of values."""
    draw.lines([(Style(0), [(0, 0.0), (most, most / 9)])], name="a", from_zero=True)
    ((_, axes),) = drawn
    for axis, limits, expected in (
        (axes.xaxis, axes.get_xlim(), steps),
        (axes.yaxis, axes.get_ylim(), values),
    ):
        found = [t for t in axis.get_majorticklocs() if limits[0] <= t <= limits[1]]
        assert found == pytest.approx(expected)
