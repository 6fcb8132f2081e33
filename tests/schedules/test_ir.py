"""The text form round-trips, and malformed text is refused."""

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules.ir import Kind, Pass, Schedule
from schedules.vocab import Barrier, End, Payload, Transfer

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


@pytest.mark.parametrize("transfer", Transfer)
@pytest.mark.parametrize("before", [(), (Kind.B,), (Kind.T,), (Kind.B, Kind.S), (Kind.G, Kind.T)])
def test_no_shard_waits_for_what_the_root_alone_receives(transfer, before):
    waiting = ", ".join(kind for kind in before if kind.is_vocabulary)
    refused = bool(waiting) and transfer in (Transfer.REDUCE, Transfer.GATHER)
    words = f"barrier C9 is a {transfer}, .* but {waiting} waits for it on every shard"
    with pytest.raises(ValueError, match=words) if refused else nullcontext():
        Barrier("C9", End.OUTPUT, transfer, Payload.MAXIMUM, before, after=Kind.S)


@pytest.mark.parametrize("given", [{}, {"after": Kind.S, "continues": "C1"}])
def test_a_barrier_follows_a_pass_or_continues_another_one(given):
    with pytest.raises(ValueError, match=r"barrier C9 has .*; give exactly one of them"):
        Barrier("C9", End.OUTPUT, Transfer.ALL_MAX, Payload.MAXIMUM, (), **given)
