"""Laws of the pictures that matplotlib draws."""

from __future__ import annotations

import random
from itertools import combinations, product

import pytest

from schedules.generators import GENERATORS, generate
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS
from tests.schedules.cases import cost, problem
from vp_train.commands.plot import Marker, comparison_figure, schedule_figure

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
