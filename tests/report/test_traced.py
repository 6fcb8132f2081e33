"""A trace is read up to the limits of its numbers and names, and no further."""

from __future__ import annotations

import copy
import json

import pytest

from vp_train.durable import UnreadableError
from vp_train.report.traced import read_timelines


def side(**changes):
    """Return one timeline of two ranks as a run writes it."""
    record = {
        "passes": [
            {"names": "0F0 0B0", "starts": [0.0, 3.0], "ends": [1.0, 5.0]},
            {"names": "1F0 1S0", "starts": [1.5, 2.0], "ends": [2.0, 2.5]},
        ],
        "communications": {
            "names": "0F0>1F0 C1b.0",
            "starts": [1.0, 2.5],
            "ends": [1.5, 3.0],
            "ranks": [0, 1],
        },
        "peak_bytes": [7, 8.5],
        "bound_seconds": 4.0,
    }
    return copy.deepcopy(record) | changes


def read(tmp_path, **changes):
    record = {"step": 5, "schedule": "1f1b", "vocabulary": "one_barrier"}
    record |= {"planned": side(), "measured": side()} | changes
    path = tmp_path / "step_times.json"
    path.write_text(json.dumps(record))
    return read_timelines(path)


def test_what_a_run_writes_of_a_step_is_read_as_it_is(tmp_path):
    found = read(tmp_path, measured=side(peak_bytes=[1, 2], bound_seconds=0))
    assert (found.step, found.schedule, found.vocabulary) == (5, "1f1b", "one_barrier")
    assert found.num_passes == 4
    plan = found.planned
    assert [
        [(s.rank, s.name, s.kind, s.stage, s.microbatch) for s in row] for row in plan.compute
    ] == [
        [(0, "0F0", "F", 0, 0), (0, "0B0", "B", 0, 0)],
        [(1, "1F0", "F", 1, 0), (1, "1S0", "S", 1, 0)],
    ]
    assert [(s.start, s.end) for s in plan.compute[1]] == [(1.5, 2.0), (2.0, 2.5)]
    assert [(s.rank, s.name, s.kind, s.stage, s.microbatch, s.start, s.end) for s in plan.comm] == [
        (0, "0F0>1F0", "0F0>1F0", -1, -1, 1.0, 1.5),
        (1, "C1b.0", "C1b", -1, -1, 2.5, 3.0),
    ]
    assert (plan.peak_bytes, plan.bound, plan.makespan) == ((7.0, 8.5), 4.0, 5.0)
    assert plan.peak_in_flight == (0, 0)
    assert (found.measured.peak_bytes, found.measured.bound) == ((1.0, 2.0), 0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 2**53}, None),
        ({"step": 2**53 + 2}, "is not a number from 0 to 9.0072e+15"),
        ({"step": -1}, "-1 is not a number from 0"),
        ({"step": 0}, None),
        ({"schedule": "a" * 60}, None),
        ({"schedule": "a" * 61}, "is not a name"),
        ({"vocabulary": ""}, '"" is not a name'),
        ({"vocabulary": 5}, "5 is not a name"),
        ({"planned": side(peak_bytes=[1e18, 0])}, None),
        ({"planned": side(peak_bytes=[1.001e18, 0])}, "is not a number from 0 to 1e+18"),
        ({"planned": side(peak_bytes=[1])}, "2 ranks have 1 peaks of memory"),
        ({"planned": side(bound_seconds=1e6)}, None),
        ({"planned": side(bound_seconds=1.001e6)}, "is not a number from 0 to 1e+06"),
        ({"planned": side(bound_seconds=True)}, "true is not a number"),
        (
            {
                "planned": side(
                    communications={"names": "a", "starts": [0], "ends": [1], "ranks": [1]}
                )
            },
            None,
        ),
        (
            {
                "planned": side(
                    communications={"names": "a", "starts": [0], "ends": [1], "ranks": [2]}
                )
            },
            "2 is not a number from 0 to 1",
        ),
        (
            {
                "planned": side(
                    communications={"names": "a", "starts": [0], "ends": [1], "ranks": []}
                )
            },
            "1 communications have 0 ranks",
        ),
        (
            {
                "planned": side(
                    passes=[{"names": "0F0", "starts": [0], "ends": [0]}],
                    peak_bytes=[1],
                    communications={"names": "", "starts": [], "ends": [], "ranks": []},
                )
            },
            "no pass takes any time",
        ),
    ],
)
def test_a_number_or_name_may_be_at_its_limit_and_not_beyond(tmp_path, changes, words):
    if words is None:
        read(tmp_path, **changes)
        return
    with pytest.raises(UnreadableError) as raised:
        read(tmp_path, **changes)
    assert words in str(raised.value)


@pytest.mark.parametrize("count", [4_096, 4_097])
def test_a_trace_has_so_many_ranks_at_most(tmp_path, count):
    nothing = {"names": "", "starts": [], "ends": []}
    rows = [{"names": "0F0", "starts": [0], "ends": [1]}, *[nothing] * (count - 1)]
    long = side(passes=rows, peak_bytes=[0] * count, communications=nothing | {"ranks": []})
    if count == 4_096:
        assert len(read(tmp_path, planned=long, measured=long).planned.compute) == count
        return
    with pytest.raises(UnreadableError, match="it has passes of 4,097 ranks"):
        read(tmp_path, planned=long)
