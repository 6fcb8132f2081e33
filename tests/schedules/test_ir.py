"""The text form round-trips, and malformed text is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules.ir import Kind, Pass, Schedule

passes = st.builds(Pass, st.integers(0, 99), st.sampled_from(Kind), st.integers(0, 999))


@given(st.lists(st.lists(passes, max_size=8).map(tuple), max_size=5).map(tuple))
def test_text_round_trips(ranks):
    schedule = Schedule("any name", ranks)
    assert Schedule.parse(schedule.text()) == schedule


@pytest.mark.parametrize(
    "token", ["", "2F", "F0", "2f0", "2F0 ", "02F0", "2F00", "2X0", "-1F0", "2F0x"]
)
def test_malformed_tokens_are_refused_by_name(token):
    with pytest.raises(ValueError, match="is not a pass"):
        Pass.parse(token)


def test_a_malformed_line_is_named():
    with pytest.raises(ValueError, match="line 3: '1F'"):
        Schedule.parse("# x\n0F0\n1F\n")
