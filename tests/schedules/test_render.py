"""Drawings are to scale, contain every span and stay inside their frame."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from schedules.excerpt import Excerpt
from schedules.generators import generate
from schedules.ir import Pass
from schedules.offload import place_transfers
from schedules.render import _Frame, chrome_trace, duration, svg, text_grid
from schedules.simulate import simulate
from schedules.timeline import Span, Timeline
from tests.schedules.cases import cost, problem
from tests.schedules.test_offload import costs_of, problem_of

SVG = "{http://www.w3.org/2000/svg}"


def timeline(*rows, comm=()):
    """Return a timeline from rows of (pass, start, end), one row per rank."""
    compute = []
    for rank, row in enumerate(rows):
        items = [(Pass.parse(name), start, end) for name, start, end in row]
        compute.append(
            tuple(
                Span(rank, str(i), i.kind.value, i.stage, i.microbatch, start, end)
                for i, start, end in items
            )
        )
    return Timeline(tuple(compute), tuple(comm), (0.0,) * len(rows), (0,) * len(rows))


def two_ranks():
    """Return one microbatch on two ranks, with a barrier on rank 1."""
    barrier = Span(1, "C0.0", "C0", -1, 0, 0.004, 0.005)
    return timeline(
        [("0F0", 0.0, 0.002), ("0B0", 0.007, 0.010)],
        [("1F0", 0.002, 0.004), ("1B0", 0.005, 0.007)],
        comm=[barrier],
    )


def staircase(p, m):
    """Return m microbatches that run forward through p ranks, then back, with barriers between."""
    rows = []
    for rank in range(p):
        forward = [(f"{rank}F{i}", float(rank + i), float(rank + i + 1)) for i in range(m)]
        back = [
            (f"{rank}B{i}", 2.0 * p + m - rank + i, 2.0 * p + m - rank + i + 1) for i in range(m)
        ]
        rows.append(forward + back)
    return timeline(
        *rows,
        comm=[Span(p - 1, f"C0.{i}", "C0", -1, i, p + i + 0.0, p + i + 0.5) for i in range(m)],
    )


def boxes(picture):
    """Map the hover text of every box to its (x, y, width, height) in pixels of the picture."""
    found = {}
    for lane in ElementTree.fromstring(picture).iter(f"{SVG}g"):
        left, top = map(
            float, lane.attrib["transform"].removeprefix("translate(").rstrip(")").split(",")
        )
        for box in lane.iter(f"{SVG}rect"):
            name = box.find(f"{SVG}title")
            if name is not None:
                x, y = float(box.attrib["x"]), float(box.attrib.get("y", 0))
                found[name.text] = (
                    left + x,
                    top + y,
                    float(box.attrib["width"]),
                    float(box.attrib["height"]),
                )
    return found


def words(picture):
    """Return all texts of a picture."""
    return [text.text for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_the_grid_is_to_scale_and_blanks_are_bubbles():
    assert text_grid(two_ranks(), columns=44).splitlines() == [
        "  0 F0------                    B0----------",
        "  1         F0------    B0------",
        "    10 ms, mean bubble 55.0%",
        "    F forward, B backward",
    ]


def test_a_pass_that_takes_no_time_is_not_drawn_unless_none_does():
    passes = [("0F0", 0.0, 0.4), ("0F1", 0.6, 1.0)]
    drawn = text_grid(timeline([passes[0], ("0S0", 0.5, 0.5), passes[1], ("0T0", 1.0, 1.0)]), 44)
    assert drawn.splitlines()[0] == "  0 F0" + "-" * 14 + " " * 8 + "F1" + "-" * 14
    assert text_grid(timeline([("0F0", 0.0, 0.0)]), 44).splitlines()[0] == "  0 F"


def test_the_beginning_of_a_step_is_drawn_to_its_own_scale():
    drawn = text_grid(two_ranks(), 44, seconds=0.004).splitlines()
    assert drawn[:2] == ["  0 F0" + "-" * 18, "  1 " + " " * 20 + "F0" + "-" * 18]
    assert drawn[2].strip().startswith("10 ms")  # the legend describes the whole step


def test_a_microbatch_that_does_not_fit_is_left_out_rather_than_cut():
    drawn = text_grid(
        timeline([("0F7", 0.0, 0.2), ("0F12", 0.2, 0.4), ("0F123", 0.4, 1.0)]), columns=14
    )
    assert drawn.splitlines()[0] == "  0 F7F-F123--"


@pytest.mark.parametrize("columns", [60, 120])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (8, 16)])
def test_no_line_of_the_grid_is_wider_than_asked(p, m, columns):
    drawn = text_grid(staircase(p, m), columns).splitlines()
    assert max(map(len, drawn)) <= columns
    assert [line.split()[0] for line in drawn[:p]] == [str(rank) for rank in range(p)]


def test_the_picture_draws_time_to_scale():
    picture = svg(two_ranks(), "two ranks")
    drawn = boxes(picture)
    assert picture.count("<title>") == len(drawn)  # every box is drawn once
    assert sorted(drawn) == ["0B0 3 ms", "0F0 2 ms", "1B0 2 ms", "1F0 2 ms", "C0.0 1 ms"]
    per_ms = (drawn["0B0 3 ms"][0] - drawn["0F0 2 ms"][0]) / 7
    assert drawn["1F0 2 ms"][0] - drawn["0F0 2 ms"][0] == pytest.approx(2 * per_ms, abs=0.2)
    # A box is narrower than its span by the gap to its neighbour.
    assert drawn["0B0 3 ms"][2] == pytest.approx(3 * per_ms, abs=1.0)
    # Barriers lie under the passes of their rank.
    assert drawn["C0.0 1 ms"][1] >= drawn["1F0 2 ms"][1] + drawn["1F0 2 ms"][3]


@pytest.mark.parametrize(("p", "m"), [(1, 1), (3, 2), (16, 20), (32, 30)])
def test_the_picture_shows_every_span_inside_its_frame_and_no_lane_covers_another(p, m):
    shown = staircase(p, m)
    picture = svg(shown, "any size")
    frame = ElementTree.fromstring(picture).attrib
    drawn = boxes(picture)
    assert {text.split()[0] for text in drawn} == {
        span.name for row in (*shown.compute, shown.comm) for span in row
    }
    for x, y, width, height in drawn.values():
        assert x >= 0
        assert x + width <= float(frame["width"])
        assert y + height <= float(frame["height"])
    lanes = [
        sorted(drawn[text][1] for text in drawn if text.split()[0] == f"{rank}F0")[0]
        for rank in range(p)
    ]
    height = max(box[3] for box in drawn.values())
    assert all(later - earlier > height for earlier, later in pairwise(lanes))


def test_under_the_passes_of_a_rank_lie_its_barriers_and_under_these_its_link():
    """Both directions of the link in turn; the name of the barriers stands beside them."""
    case = problem_of("1f1b", "one_barrier", 3, 8)
    costs = costs_of(case, 0.5)
    step = simulate(place_transfers(generate("1f1b", case, costs), case, costs), case, costs)
    assert step.transfers
    picture = svg(step, "offloaded")
    lanes = list(ElementTree.fromstring(picture).iter(f"{SVG}g"))
    begins = [float(lane.attrib["transform"].split(",")[1].rstrip(")")) for lane in lanes]
    frame = float(ElementTree.fromstring(picture).attrib["height"])
    for lane, begin, end in zip(lanes, begins, (*begins[1:], frame), strict=True):
        rows: dict[str, set[tuple[float, float]]] = {}
        for box in lane.iter(f"{SVG}rect"):
            name = box.find(f"{SVG}title")
            if name is not None:
                top, height = float(box.attrib.get("y", 0)), float(box.attrib["height"])
                kind = name.text.partition(":")[0] if ":" in name.text else name.text[0]
                row = kind if kind in ("offload", "reload") else "C" if kind == "C" else "passes"
                rows.setdefault(row, set()).add((top, top + height))
        order = [row for row in ("passes", "C", "offload", "reload") if row in rows]
        assert len(order) == len(rows)
        edges = [edge for row in order for edge in sorted(rows[row])]
        assert len(edges) == len(rows), "every row has one height"
        assert all(above[1] < below[0] for above, below in pairwise(edges))
        assert begin + edges[-1][1] < end
        (names,) = [text for text in lane.iter(f"{SVG}text") if text.text == "barriers"] or [None]
        assert (names is None) == ("C" not in rows)
        if names is not None:
            ((_, bottom),) = rows["C"]
            assert float(names.attrib["y"]) == bottom, "where letters stand"


def test_the_picture_states_makespan_and_the_bubble_of_each_rank_and_escapes_its_title():
    shown = words(svg(two_ranks(), "<1F1B & friends>"))
    assert {
        "<1F1B & friends>",
        "10 ms, mean bubble 55.0%",
        "50.0%",
        "60.0%",
        "F forward",
        "B backward",
        "barriers",
    } <= set(shown)
    assert "S output layer: softmax" not in shown  # the legend names only kinds that occur


def test_microbatch_numbers_are_written_only_where_all_of_a_lane_fit():
    wide, narrow = svg(staircase(2, 12), "wide"), svg(staircase(32, 64), "narrow")
    assert words(wide).count("3") > 0
    assert words(narrow).count("3") == 0


@pytest.mark.parametrize(
    ("makespan", "first", "last"),
    [
        (0.0005, "0 µs", "500 µs"),
        (0.010, "0 ms", "10 ms"),
        (0.47, "0 ms", "450 ms"),
        (30.0, "0 s", "30 s"),
    ],
)
def test_the_axis_has_round_values_in_one_unit(makespan, first, last):
    unit = last.split()[1]
    ticks = [
        text
        for text in words(svg(timeline([("0F0", 0.0, makespan)]), "axis"))
        if text.endswith(f" {unit}")
    ]
    assert (ticks[0], ticks[-1]) == (first, last)
    assert 5 <= len(ticks) <= 11


@pytest.mark.parametrize("makespan", [0.1, 1.0, 2.0, 3.3, 10.0, 10.1, 20.0, 49.9, 50.0, 99.0, 1e4])
def test_ticks_are_as_close_as_ten_parts_of_1_2_or_5_allow(makespan):
    found = Excerpt(makespan).ticks(1.0)
    steps = [factor * 10.0**power for power in range(-4, 5) for factor in (1, 2, 5)]
    step = next(step for step in steps if makespan / step <= 10 + 1e-9)
    assert found == pytest.approx([step * n for n in range(int(makespan / step + 1e-9) + 1)])
    assert Excerpt(0.0).ticks(1e3) == [0.0]


def test_a_later_stage_of_a_rank_is_marked_by_a_band():
    one_stage = svg(timeline([("0F0", 0.0, 1.0), ("0S0", 1.0, 2.0)]), "linear")
    two_stages = svg(timeline([("0F0", 0.0, 1.0), ("3F0", 1.0, 2.0)]), "v")
    assert "number: microbatch; hatched: bubble" in words(one_stage)
    assert any("dark band: a later stage of the rank" in text for text in words(two_stages))
    assert two_stages.count("<title>3F0") == 2  # the box and its band


def test_a_later_stage_of_a_rank_is_lower_case_in_the_grid():
    drawn = text_grid(
        timeline([("0F0", 0.0, 1.0), ("3F0", 1.0, 2.0), ("0S0", 2.0, 3.0), ("3B0", 3.0, 4.0)]), 44
    )
    assert drawn.startswith("  0 F0--------f0--------S0--------b0--------\n")
    assert "lower case: a later stage of the rank" in " ".join(drawn.split())
    assert "lower case" not in text_grid(two_ranks(), 44)


def test_an_empty_step_can_be_drawn():
    empty = timeline([], [])
    assert words(svg(empty, "nothing")).count("0.0%") == 2
    assert text_grid(empty).splitlines()[:2] == ["  0", "  1"]
    assert [event["ph"] for event in chrome_trace({"nothing": empty})["traceEvents"]].count(
        "X"
    ) == 0


def test_a_trace_has_one_process_per_timeline_and_rank_and_loses_nothing():
    predicted, measured = two_ranks(), timeline([("0F0", 0.0, 0.003)], [("1F0", 0.003, 0.004)])
    trace = json.loads(
        json.dumps(chrome_trace({"predicted": predicted, "measured": measured}), allow_nan=False)
    )
    named = {
        event["pid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "process_name"
    }
    assert named == {
        0: "predicted rank 0",
        1: "predicted rank 1",
        2: "measured rank 0",
        3: "measured rank 1",
    }
    seen = {
        (named[event["pid"]], event["tid"], event["name"], round(event["ts"]), round(event["dur"]))
        for event in trace["traceEvents"]
        if event["ph"] == "X"
    }
    assert seen == {
        ("predicted rank 0", 0, "0F0", 0, 2000),
        ("predicted rank 0", 0, "0B0", 7000, 3000),
        ("predicted rank 1", 0, "1F0", 2000, 2000),
        ("predicted rank 1", 0, "1B0", 5000, 2000),
        ("predicted rank 1", 1, "C0.0", 4000, 1000),
        ("measured rank 0", 0, "0F0", 0, 3000),
        ("measured rank 1", 0, "1F0", 3000, 1000),
    }


def test_a_trace_event_carries_stage_and_microbatch_and_a_barrier_no_stage():
    args = {
        event["name"]: event["args"]
        for event in chrome_trace({"a": two_ranks()})["traceEvents"]
        if event["ph"] == "X"
    }
    assert args["1B0"] == {"stage": 1, "microbatch": 0}
    assert args["C0.0"] == {"microbatch": 0}


def test_a_long_step_is_shown_without_its_middle():
    """Warm-up and cool-down stay, boxes are where their time is, and the file stays small."""
    costs = cost(8, S=0.4, T=0.2)
    case = problem(8, 512, "one_barrier")
    long = simulate(generate("1f1b", case, costs), case, costs)
    picture = svg(long, "long")
    assert len(picture) < 300_000
    assert "s not shown" in " ".join(words(picture))
    titles = [element.text for element in ElementTree.fromstring(picture).iter(f"{SVG}title")]
    shown = {title.split()[0] for title in titles}
    for rank in range(8):
        assert {f"{rank}F0", f"{rank}B511"} <= shown
    assert not {"0F250", "7B250"} & shown
    short = problem(8, 8, "one_barrier")
    whole = svg(simulate(generate("1f1b", short, costs), short, costs), "short")
    assert "not shown" not in whole
    assert "barriers" in words(whole)


@pytest.mark.parametrize("num_microbatches", [8, 256])
def test_an_excerpt_keeps_the_order_of_what_it_shows(num_microbatches):
    """Boxes of a lane follow one another from the left edge to the right."""
    case, costs = problem(4, num_microbatches), cost(4)
    step = simulate(generate("1f1b", case, costs), case, costs)
    shown, gap = Excerpt.of(step), 3.0
    assert (shown.left_out > 0) == (num_microbatches == 256)
    for spans in step.compute:
        parts = [part for span in spans if (part := shown.visible(span)) is not None]
        places = [shown.place(moment, gap) for part in parts for moment in part]
        assert places == sorted(places)
        assert places[0] >= 0
        assert places[-1] <= shown.seconds + (gap if shown.cut else 0) + 1e-9
        for start, end in parts:  # nothing is stretched, and nothing lies across the cut
            assert shown.place(end, gap) - shown.place(start, gap) == pytest.approx(end - start)


def test_what_touches_a_cut_from_the_right_is_shown():
    shown = Excerpt(10.0, (2.0, 6.0))
    for start, end, expected in (
        *((6.0, 6.0, (6.0, 6.0)), (6.0, 7.0, (6.0, 7.0)), (2.0, 2.0, (2.0, 2.0))),
        *((5.0, 7.0, (6.0, 7.0)), (1.0, 3.0, (1.0, 2.0)), (2.0, 6.0, None), (3.0, 5.0, None)),
    ):
        assert shown.visible(Span(0, "0F1", "F", 0, 1, start, end)) == expected


def test_a_lane_has_no_room_for_transfers_or_barriers_that_its_rank_lacks():
    case, costs = problem(3, 4), cost(3)
    step = simulate(generate("1f1b", case, costs), case, costs)
    frame = _Frame.of(step)
    heights = [after - before for before, after in pairwise((*frame.tops, frame.bottom))]
    ends = {span.rank for span in step.comm}
    plain = frame.lane + frame.lane // 4
    assert 0 < len(ends) < 3
    assert all(
        height > plain if rank in ends else height == plain for rank, height in enumerate(heights)
    )


def offloaded():
    """Return a step with transfers to the host on unequal stages, two of them on each rank."""
    case = problem_of("v_half", "one_barrier", 2, 8)
    costs = costs_of(case, 0.5)
    return simulate(place_transfers(generate("v_half", case, costs), case, costs), case, costs)


def scaled(step, factor):
    """Return a timeline in which everything takes `factor` times as long, and its bound is half."""

    def rows(spans):
        return tuple(replace(s, start=factor * s.start, end=factor * s.end) for s in spans)

    compute = tuple(map(rows, step.compute))
    return replace(step, compute=compute, comm=rows(step.comm), bound=factor * step.makespan / 2)


@pytest.mark.parametrize("make", [offloaded, lambda: staircase(3, 4)])
def test_the_beginning_of_a_step_has_what_begins_in_it(make):
    step = make()
    moments = {span.start for spans in (*step.compute, step.comm) for span in spans}
    moments |= {copy.span.start for copy in step.transfers}
    for until in sorted(moments - {0.0}):
        begun = tuple(tuple(s for s in spans if s.start < until) for spans in step.compute)
        copies = tuple(copy for copy in step.transfers if copy.span.start < until)
        longest = replace(step.comm[0], end=step.makespan)  # not in the grid
        cut = replace(step, compute=begun, comm=(longest,), transfers=copies)
        rows = [text_grid(each, 60, until).splitlines() for each in (step, cut)]
        drawn = [[row for row in some if row.strip(" v^")] for some in rows]
        count = len([row for row in drawn[1] if not row.startswith("    ")])
        assert drawn[0][:count] == drawn[1][:count]


# Look at a picture that has changed, then write its digest here.
PICTURES = {
    "all kinds": (offloaded, "b57210 fee8f4 0937ea fd3cdb"),
    "8 ranks, s": (lambda: scaled(staircase(8, 11), 10 / 35), "effc76 e62b00 1e7f44 5e7b46"),
    "9 ranks, ms": (lambda: scaled(staircase(9, 3), 1e-3 / 12), "ec350f aa2b8d 96c88f f9bd09"),
    "17 ranks, us": (lambda: scaled(staircase(17, 2), 1e-6), "7b4661 73b586 65660a f48552"),
    "16 ranks": (lambda: staircase(16, 120), "faa3be 5efaba f46af6 d65934"),
    "cut": (lambda: staircase(2, 200), "0dd2c7 990c4e 03db30 5dcc95"),
    "whole": (lambda: staircase(2, 125), "1a007d b27b1c 046d81 b223af"),
    "ranks of 60": (lambda: staircase(40, 30), "46501c 4cefc9 9a56c4 7310e6"),
    "ranks of 62": (lambda: staircase(40, 31), "bf24af 26488a 52112f 090d8d"),
}


@pytest.mark.parametrize(("make", "expected"), PICTURES.values(), ids=PICTURES)
def test_pictures_look_as_they_looked(make, expected, tmp_path):
    step = make()
    drawn = [svg(step, "a step"), text_grid(step), text_grid(step, 60, step.makespan / 3)]
    drawn.append(json.dumps(chrome_trace({"a": step, "b": step})))
    (tmp_path / "picture.svg").write_text(drawn[0])
    found = [hashlib.sha256(text.encode()).hexdigest()[:6] for text in drawn]
    assert " ".join(found) == expected, f"look at {tmp_path}/picture.svg"


def test_no_duration_is_rounded_to_a_thousand_of_its_unit():
    shown = {
        0.0: "0 ms",
        0.9996: "1.00 s",
        0.9994: "999 ms",
        0.9996e-3: "1 ms",
        12e-6: "12 µs",
        1234.5: "1,234.50 s",
    }
    assert {seconds: duration(seconds) for seconds in shown} == shown
