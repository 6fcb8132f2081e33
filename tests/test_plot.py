"""Laws of the pictures that matplotlib draws."""

from __future__ import annotations

import importlib
import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest

from schedules.generators import GENERATORS, generate
from schedules.render import LINK, MEANINGS, notes, present
from schedules.simulate import simulate
from schedules.timeline import OFFLOAD, HostTransfer, Span
from schedules.vocab import VOCAB_ALGORITHMS
from tests.schedules.cases import cost, problem
from vp_train.commands.labels import Box, Ground, Wish
from vp_train.commands.plot import (
    Frontier,
    Marker,
    comparison_figure,
    frontier_figure,
    schedule_figure,
)
from vp_train.commands.simulate import simulate_step
from vp_train.settings import load_config

EVERY = list(product(GENERATORS, VOCAB_ALGORITHMS))


@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0], ids=["one point", "crowded", "apart"])
def test_labels_never_overlap_and_the_keys_name_every_colour_and_shape(spread):
    draw = random.Random(3)
    marks = [
        Marker(schedule, vocab, 0.1 + spread * draw.random(), 2**30 * (1 + spread * draw.random()))
        for schedule, vocab in EVERY
    ]
    figure = comparison_figure(marks, "title")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [text for text in axes.texts if text.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    assert len(labels) >= (len(marks) if spread == 1.0 else 8)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(axes.bbox.count_contains(box.corners()) == 4 for box in boxes)
    named = {text.get_text() for key in figure.legends for text in key.get_texts()}
    assert named == {*GENERATORS, *VOCAB_ALGORITHMS}


def test_no_two_schedules_of_a_comparison_share_colour_and_filling():
    """A comparison of `all,auto` has at most every name twice: named, and as a start of auto."""
    names = [*GENERATORS, *(f"auto from {name}" for name in GENERATORS)]
    marks = [Marker(name, "none", 0.1 + 0.02 * k, 2**30) for k, name in enumerate(names)]
    figure = comparison_figure(marks, "title")
    (axes,) = figure.axes
    drawn = [(line.get_color(), line.get_fillstyle()) for line in axes.lines]
    assert len(drawn) == len(set(drawn)) == len(names)
    assert len({ink for ink, _ in drawn[: len(GENERATORS)]}) == len(GENERATORS)
    assert all(line.get_markeredgecolor() != "white" for line in axes.lines[12:]), "not invisible"
    key = figure.legends[0]
    keys = [(line.get_color(), line.get_fillstyle()) for line in key.legend_handles]
    assert dict(zip([text.get_text() for text in key.get_texts()], keys, strict=True)) == dict(
        zip(names, drawn, strict=True)
    )


@pytest.mark.parametrize(
    ("is_offloaded", "has_all", "rows"),
    [(False, False, 1), (True, False, 1), (True, True, 2)],
    ids=["on the device", "offloaded", "all kinds"],
)
def test_the_legend_of_a_step_is_inside_the_picture_and_read_by_rows(is_offloaded, has_all, rows):
    words = ["schedule=v_half", "parallel.pp=2", "num_microbatches=2", "cost=a100_4b"]
    step = simulate_step(load_config([*words, "vocab=one_barrier"])).timeline
    if is_offloaded:
        span = Span(0, OFFLOAD, OFFLOAD, 0, 0, 0.0, step.makespan)
        step = replace(step, transfers=(HostTransfer(span, 0.0, 1.0),))
    if has_all:
        whole = Span(0, "0B2", "B", 0, 2, step.makespan, step.makespan)
        step = replace(step, compute=((*step.compute[0], whole), *step.compute[1:]))
        assert len(present(step)) == len(MEANINGS)
    figure = schedule_figure(step, "title")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    inside = figure.bbox.padded(1.0)
    texts = [legend.get_title(), *legend.get_texts()]
    for text in texts:
        box = text.get_window_extent()
        assert inside.count_contains(box.corners()) == 4, text.get_text()
    boxes = {text.get_text(): text.get_window_extent() for text in legend.get_texts()}
    words = [f"{kind} {meaning}" for kind, meaning in present(step).items()]
    words += [meaning for _, _, meaning in LINK.values()] if is_offloaded else []
    assert sorted(boxes, key=lambda word: (-round(boxes[word].y0), boxes[word].x0)) == words
    assert len({round(box.y0) for box in boxes.values()}) == rows
    assert legend.get_title().get_text() == notes(step, "white")


@pytest.mark.parametrize(("num_microbatches", "is_cut"), [(8, False), (256, True)])
def test_a_long_step_is_drawn_without_its_middle(num_microbatches, is_cut):
    case, costs = problem(8, num_microbatches), cost(8)
    step = simulate(generate("1f1b", case, costs), case, costs)
    (axes,) = schedule_figure(step, "title").axes
    _, right = axes.get_xlim()  # in seconds: the step takes longer than 10
    assert (right < step.makespan / 2) == is_cut
    assert any("not shown" in text.get_text() for text in axes.texts) == is_cut
    ticks = [float(label.get_text()) for label in axes.get_xticklabels()]
    assert ticks[0] == 0
    assert ticks[-1] > 0.9 * step.makespan


FOUND = Path(__file__).parents[1] / "benchmarks" / "results" / "frontier.json"
# The named schedules of four and sixteen ranks on the costs of the family: microbatches that the
# fullest rank keeps, and the mean bubble in per cent (`python benchmarks/frontier.py --ranks 4`).
NAMED = {
    4: {
        "one_barrier": {
            "1f1b": (5.3, 6.622),
            "interleaved": (6.8, 3.518),
            "zb_h1": (5.15, 2.519),
            "zb_h2": (8.15, 2.519),
            "zb_v": (5.15, 1.363),
            "v_half": (4.15, 1.635),
            "v_min": (3.15, 2.424),
        },
        "none": {
            "1f1b": (4, 42.74),
            "interleaved": (5.5, 41.59),
            "zb_h1": (4, 41.76),
            "zb_h2": (7, 41.76),
            "zb_v": (4, 40.95),
            "v_half": (3, 41.37),
            "v_min": (2, 41.64),
        },
    },
    16: {
        "one_barrier": {
            "1f1b": (17.3, 10.07),
            "interleaved": (24.95, 5.538),
            "zb_h1": (17.15, 4.117),
            "zb_h2": (32.15, 3.658),
            "zb_v": (17.15, 1.913),
            "v_half": (10.15, 4.605),
            "v_min": (7.15, 9.81),
        },
        "none": {
            "1f1b": (16, 53.52),
            "interleaved": (23.5, 52.36),
            "zb_h1": (16, 52.01),
            "zb_h2": (31, 52.01),
            "zb_v": (16, 51.18),
            "v_half": (9, 51.61),
            "v_min": (6, 51.78),
        },
    },
}


def case_of(num_ranks):
    """Return the frontiers and marks of a picture on the costs of the family."""
    if num_ranks == 8:
        return importlib.import_module("frontier").read(json.loads(FOUND.read_text()))
    marks = [
        Marker(name, vocab, bubble / 100, kept)
        for vocab, points in NAMED[num_ranks].items()
        for name, (kept, bubble) in points.items()
    ]
    lines = [
        Frontier(vocab, staircase([mark for mark in marks if mark.vocab == vocab]))
        for vocab in NAMED[num_ranks]
    ]
    return lines, marks


def staircase(marks):
    """Return a line below all marks, with steps between them."""
    points, best = [(0.8 * min(mark.peak_bytes for mark in marks), 0.9)], math.inf
    for mark in sorted(marks, key=lambda mark: mark.peak_bytes):
        if mark.bubble < best:
            best = mark.bubble
            points += [(mark.peak_bytes, best), (1.04 * mark.peak_bytes, best - 0.001)]
    return points


def drawn_boxes(figure):
    """Return what a picture of a frontier has, in pixels: labels, marks, curves and leaders."""
    figure.draw_without_rendering()
    labels, marks, curves, leaders = {}, [], [], []
    for axes in figure.axes:
        frame = Box(*axes.bbox.extents)
        for text in axes.texts:
            if text.get_text():
                labels[text.get_text(), text.get_color(), len(labels)] = Box(
                    *text.get_window_extent().extents
                )
                assert labels[[*labels][-1]].is_within(frame)
            if getattr(text, "arrow_patch", None) is not None:
                path = text.arrow_patch.get_path()
                leaders.append(
                    tuple(
                        map(
                            tuple,
                            text.arrow_patch.get_transform().transform(path.vertices)[[0, -1]],
                        )
                    )
                )
        for line in axes.lines:
            at = line.get_transform().transform(np.column_stack(line.get_data()))
            if line.get_marker() == "o":
                size = line.get_markersize() / 72 * figure.dpi / 2
                marks.append(Box.around([tuple(at[0])], size))
            elif line.get_drawstyle() == "steps-post":
                corners = [at[0]]
                for x, y in at[1:]:
                    corners += [(x, corners[-1][1]), (x, y)]
                inside = [frame.nearest(corner) for corner in corners]
                width = line.get_linewidth() / 72 * figure.dpi / 2
                curves += [
                    Box.around(part, width) for part in pairwise(inside) if part[0] != part[1]
                ]
    return labels, marks, curves, leaders


def assert_nothing_overlaps(figure, *, marks_too):
    labels, marks, curves, leaders = drawn_boxes(figure)
    for (name, box), (other, taken) in combinations(labels.items(), 2):
        assert not box.overlaps(taken), (name, other)
    for name, box in labels.items():
        assert not any(box.overlaps(mark) for mark in marks), name
        assert not any(box.overlaps(curve) for curve in curves), name
        assert not any(box.padded(-1).is_crossed(*leader) for leader in leaders), name
    if marks_too:
        assert not any(one.overlaps(other) for one, other in combinations(marks, 2))
    return labels


@pytest.mark.parametrize("num_ranks", [4, 8, 16])
def test_a_frontier_names_every_mark_and_line_and_nothing_overlaps(num_ranks):
    lines, marks = case_of(num_ranks)
    labels = assert_nothing_overlaps(frontier_figure(lines, marks, "title", 1.0), marks_too=True)
    words = [name for name, *_ in labels]
    assert sorted(words) == sorted(
        [mark.schedule for mark in marks] + [f"vocab {line.vocab}" for line in lines]
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0], ids=["one point", "crowded", "apart"])
def test_labels_of_any_frontier_cover_nothing_and_few_have_no_room(seed, spread):
    draw = random.Random(seed)
    lines, marks = [], []
    for number, vocab in enumerate(VOCAB_ALGORITHMS):
        start = draw.choice([0.02, 0.03, 0.4])
        marks += (
            own := [
                Marker(
                    name,
                    vocab,
                    start + spread * 0.2 * draw.random(),
                    2**30 * (2 + spread * 9 * draw.random()),
                )
                for name in list(GENERATORS)[number:]
            ]
        )
        lines.append(Frontier(vocab, staircase(own)))
    labels = assert_nothing_overlaps(frontier_figure(lines, marks, "title"), marks_too=False)
    written = Counter((word, ink) for name, ink, _ in labels for word in name.split(", "))
    assert max(written.values()) == 1, "a name per mark and line; an algorithm has one colour"
    assert len(marks) + len(lines) - written.total() <= 3, "no room for the names of so many"


def test_an_axis_has_a_cut_only_where_most_of_it_would_be_empty_and_one_scale():
    for bubbles, is_cut in (((0.02, 0.5), True), ((0.02, 0.06), False), ((0.3, 0.31), False)):
        lines = [
            Frontier(name, [(1.0, b + 0.02), (3.0, b)])
            for name, b in zip("ab", bubbles, strict=True)
        ]
        figure = frontier_figure(lines, [], "title", 1.0)
        assert (len(figure.axes) == 2) == is_cut
        figure.draw_without_rendering()
        scales = [axes.bbox.height / np.ptp(axes.get_ylim()) for axes in figure.axes]
        assert scales == pytest.approx([scales[0]] * len(scales))
        for line in lines:
            for _, bubble in line.points:
                inside = [
                    low <= 100 * bubble <= high
                    for low, high in (axes.get_ylim() for axes in figure.axes)
                ]
                assert sum(inside) == 1


def test_a_frontier_of_one_point_without_marks_or_bubble_is_drawn():
    frontier_figure([Frontier("none", [(0.0, 0.0)])], [], "title").draw_without_rendering()
    marks = [Marker("1f1b", "none", 0.0, 0.0)]
    frontier_figure([Frontier("none", [(0.0, 0.0)])], marks, "title").draw_without_rendering()


def test_a_line_crosses_a_box_if_a_point_of_it_is_inside():
    draw = random.Random(7)
    for _ in range(300):
        box = Box.around([(draw.uniform(0, 9), draw.uniform(0, 9)) for _ in range(2)])
        start, end = ((draw.uniform(0, 9), draw.uniform(0, 9)) for _ in range(2))
        parts = [k / 2000 for k in range(2001)]
        inside = any(
            box.left < start[0] + t * (end[0] - start[0]) < box.right
            and box.bottom < start[1] + t * (end[1] - start[1]) < box.top
            for t in parts
        )
        # A line that only cuts a corner is missed by the points.
        assert box.is_crossed(start, end) == inside or not box.padded(-0.01).is_crossed(start, end)
    assert not Box(0, 0, 2, 2).is_crossed((0, -1), (0, 3)), "along a side"
    assert Box(0, 0, 2, 2).is_crossed((1, -1), (1, 3))


def test_a_label_without_a_free_place_gets_none_and_a_far_one_gets_a_leader_line():
    mark = Box.around([(50.0, 50.0)], 5)
    wish = Wish(((50.0, 50.0),), 20, 8, mark, farthest=60)
    assert Ground(Box(40, 40, 62, 62), [mark]).place(wish) is None
    near = Ground(Box(0, 0, 100, 100), [mark]).place(wish)
    assert near is not None
    assert near.leader is None
    walls = [
        Box.around([(50.0 + x, 50.0 + y)], 8) for x in (-20, 0, 20) for y in (-20, 0, 20) if x or y
    ]
    far = Ground(Box(0, 0, 100, 100), [mark], walls).place(wish)
    assert far is not None
    assert far.leader is not None
    assert far.leader[0] == (50.0, 50.0)
    assert not any(far.box.overlaps(wall) for wall in walls)


def test_a_label_that_could_be_taken_for_that_of_another_mark_gets_a_leader_line():
    own, other = (Box.around([(100.0, y)], 5) for y in (100.0, 128.0))
    walls = [Box(60, 88, 94, 112), Box(106, 88, 140, 112), Box(90, 60, 110, 93)]
    wish = Wish(((100.0, 100.0),), 20, 8, own, farthest=80)
    places = [
        Ground(Box(0, 0, 200, 200), marks, walls).place(wish) for marks in ([own], [own, other])
    ]
    leaders = [None if place is None else place.leader for place in places]
    assert places[0] is not None
    assert places[0].box.bottom > own.top, "above its mark"
    assert leaders[0] is None
    assert leaders[1] is not None
