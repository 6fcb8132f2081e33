"""A long search shows how far it is, and Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from schedules.generators.auto import SoFar
from vp_train.commands.searching import Searching
from vp_train.failures import EXIT_OK

BEST = SoFar("zb_v", "one_barrier", makespan=0.25, excess=0.0, tried=1_200)


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only element is the time."""
    now = [100.0]
    monkeypatch.setattr("vp_train.commands.searching.time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds_and_none_of_a_short_search(clock, capsys):
    with Searching() as searching:
        for _ in range(260):
            clock[0] += 0.1
            assert searching.watch(BEST)
    lines = capsys.readouterr().err.splitlines()
    words = (
        "schedule=auto: 1,200 orders tried, the best so far takes 250 ms (zb_v with one_barrier)"
    )
    assert lines == [f"{seconds} s: {words}" for seconds in (2, 12, 22)]
    with Searching() as searching:
        clock[0] += 1.9
        searching.watch(BEST)
    assert capsys.readouterr().err == ""


def test_what_says_nothing_for_long_is_named_and_leaves_no_thread(clock, capsys):
    before = threading.active_count()
    with Searching() as searching:
        searching.work_on("planning")
        clock[0] += 3
        for _ in range(100):
            err = capsys.readouterr().err
            if err:
                break
            time.sleep(0.05)
    assert err == "3 s: planning\n"
    assert threading.active_count() == before


def test_a_best_above_the_cap_says_so_and_orders_of_several_searches_all_count(clock, capsys):
    with Searching() as searching:
        searching.watch(BEST)
        clock[0] += 3
        searching.watch(SoFar("gpipe", "none", makespan=2.0, excess=3 * 2**20, tried=2))
    said = capsys.readouterr().err
    assert "takes 2.00 s (gpipe with none) but keeps 3.0 MiB more" in said
    assert "1,202 orders tried" in said


def test_a_terminal_gets_one_line_that_is_gone_at_the_end(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with Searching() as searching:
        for _ in range(10):
            clock[0] += 1
            searching.watch(BEST)
        during = capsys.readouterr().err
    assert "4 s: schedule=auto: 1,200 orders tried" in during
    assert "…" in during, "a narrow terminal gets one line"
    assert capsys.readouterr().err.endswith("\x1b[2K"), "the line is erased"


def test_the_first_interrupt_ends_the_search_with_its_best_and_the_second_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Searching() as searching:
            assert (searching.show("x"), searching.exit_code, searching.words) == (
                True,
                EXIT_OK,
                [],
            )
            os.kill(os.getpid(), signal.SIGINT)
            assert not searching.show("x")
            assert searching.exit_code == 130
            assert "best so far" in searching.words[-1]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with Searching(keeps_best=False), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err.count("Ctrl-C again leaves at once") == 1


def test_signals_of_a_launcher_stay_with_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Searching():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
