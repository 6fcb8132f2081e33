"""The last table of a run fits the smallest usual terminal and names no quantity twice."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from schedules.timeline import Span, Timeline
from vp_train.metrics.summary import explain_words, rank_table, step_words, summarize
from vp_train.planning.degrees import Degrees


def timeline(busy, peaks):
    rows = tuple(
        (Span(rank, f"{rank}F0", "F", rank, 0, 0.0, seconds),) for rank, seconds in enumerate(busy)
    )
    return Timeline(rows, (), peaks, (1,) * len(busy))


def rows():
    planned, measured = (
        timeline((4.0, 3.0), (2.0**20, 2.0**21)),
        timeline((2.0, 5.0), (3.0 * 2**20, 3.5 * 2**20)),
    )
    return summarize(
        planned,
        measured,
        layers=[[range(2)], [range(2, 3), range(5, 7)]],
        rows=[16_384, 16_384],
        parameters=[17_660_000, 2_500_000_000],
        peaks=[405.5 * 2**20, 61.0 * 2**30],
    )


def test_a_row_sets_the_plan_beside_the_measurement_of_the_same_rank():
    first, second = rows()
    assert (first.layers, second.layers) == ("0-1", "2,5-6")
    assert (first.predicted_bubble, second.predicted_bubble) == (0.0, 0.25)
    assert (first.measured_bubble, second.measured_bubble) == (0.6, 0.0)
    assert first.busy == 1 - first.measured_bubble
    assert (second.predicted_bytes, second.measured_bytes) == (2.0**21, 3.5 * 2**20)


def test_the_table_of_a_usual_run_fits_80_columns_uncut():
    out = io.StringIO()
    Console(file=out, width=80).print(rank_table(rows(), "planned and measured", Degrees(1, 2, 1)))
    assert "…" not in out.getvalue()
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "0 0-1 16,384 17.66 M 40.0% 0.0% 60.0% 1.0 MiB 3.0 MiB 405.5 MiB" in lines
    assert "1 2,5-6 16,384 2.50 B 100.0% 25.0% 0.0% 2.0 MiB 3.5 MiB 61.00 GiB" in lines


@pytest.mark.parametrize(
    ("degrees", "head", "names"),
    [
        (Degrees(1, 2, 1), "rank", ["0", "1"]),
        (Degrees(2, 2, 1), "rank", ["0", "1"]),
        (Degrees(1, 2, 2), "ranks", ["0-1", "2-3"]),
        (Degrees(2, 2, 4), "ranks", ["0-3", "4-7"]),
    ],
)
def test_a_row_has_the_ranks_that_share_its_layers(degrees, head, names):
    column = rank_table(rows(), "ranks", degrees).columns[0]
    assert (column.header, list(column.cells)) == (head, names)


def test_a_terminal_that_is_too_narrow_cuts_rows_and_never_wraps_them():
    heights = set()
    for width in (80, 60, 40):
        out = io.StringIO()
        Console(file=out, width=width).print(rank_table(rows(), "ranks", Degrees(1, 2, 1)))
        heights.add(len(out.getvalue().splitlines()))
    assert len(heights) == 1


@pytest.mark.parametrize(("seconds", "said"), [(1.05, False), (1.2, True), (0.8, True)])
def test_a_step_far_from_its_plan_names_the_command_that_explains_it(seconds, said):
    planned, measured = (
        Timeline(((Span(0, "0F0", "F", 0, 0, 0.0, end),),), (), (0.0,), (1,))
        for end in (1.0, seconds)
    )
    words = explain_words(planned, measured, Path("runs/my run"))
    assert (words is not None) == said
    if said:
        assert words.startswith("vp-explain 'runs/my run' says")


@pytest.mark.parametrize(
    ("device", "more"), [("cuda", ""), ("cpu", " (passes took 4.5 times what")]
)
def test_the_step_is_planned_and_measured_in_one_line(device, more):
    planned, measured = (
        Timeline(((Span(0, "0F0", "F", 0, 0, 0.0, seconds),),), (), (0.0,), (1,))
        for seconds in (0.0222, 0.101)
    )
    words = step_words(planned, measured, device)
    assert words.startswith("the step: planned 22.2 ms, took 101 ms" + more)
    assert (device == "cpu") == ("vp-profile" in words)
