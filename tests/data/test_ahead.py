"""A prefetched batch is the one that its step would have made."""

import threading

import pytest

from vp_train.data.ahead import Ahead


def test_each_step_gets_its_batch_made_once_and_none_is_made_after_the_last():
    made = []

    def make(step):
        made.append((step, threading.current_thread().name))
        return f"batch {step}"

    ahead = Ahead(make, last=7)
    assert [ahead.take(step) for step in (3, 4, 5, 7)] == [
        "batch 3",
        "batch 4",
        "batch 5",
        "batch 7",
    ]
    ahead._thread.shutdown()
    here = threading.current_thread().name
    found = [(step, name == here) for step, name in sorted(made)]
    assert found == [(3, True), (4, False), (5, False), (6, False), (7, True)]  # 6 was skipped


def test_the_next_batch_is_made_before_it_is_asked_for():
    begun = threading.Event()

    def make(step):
        if step == 2:
            begun.set()

    Ahead(make, last=2).take(1)
    assert begun.wait(10)


def test_an_error_is_raised_at_its_step():
    def make(step):
        if step == 2:
            raise ZeroDivisionError("no batch")

    ahead = Ahead(make, last=3)
    ahead.take(1)
    with pytest.raises(ZeroDivisionError, match="no batch"):
        ahead.take(2)
