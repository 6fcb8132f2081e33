"""Requests from outside: which count, and when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from vp_train.commands.store_server import StoreServer
from vp_train.config import RunSettings
from vp_train.failures import EXIT_INTERNAL, EXIT_TIME
from vp_train.supervision.requests import (
    NO_READER,
    NOTHING,
    SIGNALS,
    Interruption,
    Requests,
    exit_code,
    held,
    leaves,
    pass_on,
    start_clock,
    words,
)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def hears_hangups():
    """Let tests hear SIGHUP also where `nohup` has started them."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def handlers():
    """Restore the handlers of signals after a test."""
    before = {number: signal.getsignal(number) for number in held()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_is_asked_for_by_default(tmp_path):
    clock = Clock()
    requests = Requests(tmp_path / "STOP", clock=clock)
    clock.now += 1e9
    assert requests.current() == NOTHING
    assert not leaves(NOTHING)


def test_a_run_is_interrupted_only_by_a_request_to_leave():
    assert Interruption.of(NOTHING, 0) is None
    clock = Clock()
    to_save = Requests(checkpoint_minutes=1, clock=clock)
    clock.now += 60
    assert Interruption.of(to_save.current(), 0) is None
    interruption = Interruption.of(NO_READER, 1)
    assert interruption == Interruption(words(NO_READER, 1), exit_code(NO_READER))
    for is_saved, said in ((True, "run.resume=true goes on"), (False, "no checkpoint is saved")):
        ending = interruption.ending(7, is_saved=is_saved)
        assert ending.code == EXIT_TIME
        assert said in ending.words
        assert f"stopped after step 7, because {interruption.reason}" in ending.words


def test_the_minutes_between_checkpoints_count_from_the_last_one():
    clock = Clock()
    requests = Requests(checkpoint_minutes=10, clock=clock)
    for _ in range(3):
        clock.now += 599
        assert requests.current() == NOTHING
        clock.now += 1
        assert requests.current() != NOTHING
        assert not leaves(requests.current())
        requests.saved()


def test_time_that_is_over_leaves_and_outweighs_a_checkpoint():
    clock = Clock()
    requests = Requests(checkpoint_minutes=1, max_minutes=2, clock=clock)
    clock.now += 119.9
    assert not leaves(requests.current())
    clock.now += 0.1
    requests.saved()
    assert leaves(requests.current())
    assert words(requests.current(), 3) == "run.max_minutes is over"


def test_a_stop_file_leaves_once(tmp_path):
    stop = tmp_path / "STOP"
    requests = Requests(stop)
    stop.touch()
    assert leaves(requests.current())
    assert words(requests.current(), 0) == "the file STOP was there"
    requests.clear()
    assert not stop.exists()
    assert requests.current() == NOTHING


def test_a_store_that_is_killed_ends_the_run_with_a_save_and_as_a_failure(tmp_path):
    server = StoreServer()
    requests = Requests.of_rank(0, RunSettings(root=str(tmp_path)), server.has_ended)
    assert requests.current() == NOTHING
    os.kill(server._process, signal.SIGKILL)
    os.waitid(os.P_PID, server._process, os.WEXITED | os.WNOWAIT)
    for _ in range(2):
        assert leaves(requests.current())
    assert words(requests.current(), 0).startswith("the store of the ranks, a process of rank 0, ")
    assert (exit_code(requests.current()), exit_code(NO_READER)) == (EXIT_INTERNAL, EXIT_TIME)


def test_a_stop_file_that_cannot_be_removed_is_said_and_ends_nothing(tmp_path):
    (tmp_path / "STOP").mkdir()
    warning = Requests(tmp_path / "STOP").clear()
    assert f"remove {tmp_path / 'STOP'} yourself" in warning


def test_the_time_limit_counts_from_the_start_of_the_command(tmp_path, monkeypatch):
    settings = RunSettings(root=str(tmp_path), name="run", max_minutes=1.0)
    monkeypatch.setenv("VP_TRAIN_STARTED", str(time.monotonic() - 61))
    assert leaves(Requests.of_rank(0, settings).current())
    monkeypatch.setenv("VP_TRAIN_STARTED", str(time.monotonic() - 50))
    assert not leaves(Requests.of_rank(0, settings).current())


def test_only_the_first_rank_looks_at_files_and_the_clock(tmp_path):
    settings = RunSettings(root=str(tmp_path), name="run", max_minutes=1e-9)
    time.sleep(0.01)
    assert leaves(Requests.of_rank(0, settings).current())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    assert Requests.of_rank(1, settings).current() == NOTHING


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_and_its_echo_does_no_more(handlers, number):
    requests = Requests()
    requests.listen()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGINT)  # of the same Ctrl-C
    assert leaves(requests.current())
    assert words(requests.current(), 2) == f"{number.name} reached rank 2"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_the_launcher_passes_on_is_said_to_have_reached_the_launcher(
    handlers, number
):
    requests = Requests()
    requests.listen()
    pass_on(number, os.getpid())
    assert words(requests.current(), 0) == f"{number.name} reached the launcher"
    of_several = words(requests.current(), 4, spans_nodes=True)
    assert of_several == f"{number.name} reached the launcher on the node of rank 4"


def test_what_reached_a_rank_itself_is_not_the_launchers(handlers):
    clock = Clock()
    requests = Requests(clock=clock)
    requests.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    clock.now += 0.5
    pass_on(signal.SIGUSR1, os.getpid())
    assert words(requests.current(), 1) == "SIGTERM reached rank 1"


def test_a_rank_is_as_deaf_to_a_hangup_as_nohup_made_it(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requests = Requests()
    requests.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert requests.current() == NOTHING


IMPATIENT = """
import os, signal, time
from vp_train.supervision.requests import Requests, hold_signals, pass_on, words
hold_signals()
pass_on(signal.SIGHUP, os.getpid())
requests = Requests()
assert not requests.current()
requests.listen()
assert words(requests.current(), 1) == "SIGHUP reached the launcher"
time.sleep(1.1)
os.kill(os.getpid(), signal.SIGUSR1)
raise SystemExit("the second signal did not end the process")
"""


def test_a_signal_is_held_until_the_rank_listens_and_a_second_one_ends_it():
    command = [sys.executable, "-c", IMPATIENT]
    done = subprocess.run(command, timeout=30, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGUSR1, "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_once_it_cannot_be_the_same_ctrl_c(monkeypatch, number):
    clock, left = Clock(), []
    monkeypatch.setattr(os, "_exit", left.append)
    requests = Requests(clock=clock)
    requests._note(signal.SIGTERM, None)
    for seconds in (0.0, 1.0):
        clock.now = 1000.0 + seconds
        requests._note(number, None)
        assert left == []
    assert words(requests.current(), 0) == "SIGTERM reached rank 0", "the first one counts"
    clock.now += 0.001
    requests._note(number, None)
    assert left == [128 + number]


def test_a_launcher_counts_only_together_with_the_first_signal():
    for later, passed_on in ((0.0, True), (0.1, True), (0.101, False), (5.0, False)):
        clock = Clock()
        requests = Requests(clock=clock)
        requests._note(signal.SIGTERM, None)
        clock.now += later
        requests._note_launcher(signal.SIGUSR2, None)
        assert ("the launcher" in words(requests.current(), 1)) == passed_on, later
        clock.now += 5.0
        requests._note_launcher(signal.SIGUSR2, None)
        assert ("the launcher" in words(requests.current(), 1)) == passed_on, "it stays so"


def test_a_signal_outweighs_the_stop_file_that_the_time_and_that_a_checkpoint(tmp_path):
    clock, seen = Clock(), []
    requests = Requests(tmp_path / "STOP", max_minutes=2, checkpoint_minutes=1, clock=clock)
    for happen in (
        lambda: setattr(clock, "now", 1060.0),
        lambda: setattr(clock, "now", 1120.0),
        (tmp_path / "STOP").touch,
        lambda: requests._note(signal.SIGINT, None),
    ):
        happen()
        seen.append(requests.current())
    assert [leaves(request) for request in seen] == [False, True, True, True]
    assert [words(request, 5) for request in seen[1:]] == [
        "run.max_minutes is over",
        "the file STOP was there",
        "SIGINT reached rank 5",
    ]
    assert words(NO_READER, 0) == "nobody reads the output any more"
    assert leaves(NO_READER)


def test_the_clock_of_the_command_starts_once(monkeypatch):
    monkeypatch.delenv("VP_TRAIN_STARTED", raising=False)
    start_clock()
    first = os.environ["VP_TRAIN_STARTED"]
    assert abs(float(first) - time.monotonic()) < 5
    start_clock()
    assert os.environ["VP_TRAIN_STARTED"] == first


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_start_of_the_command_the_time_counts_from_now(tmp_path, monkeypatch, rank):
    monkeypatch.delenv("VP_TRAIN_STARTED", raising=False)
    settings = RunSettings(root=str(tmp_path), name="run", max_minutes=1.0, checkpoint_minutes=2.0)
    requests = Requests.of_rank(rank, settings)
    assert requests.current() == NOTHING
    assert abs(requests._started - time.monotonic()) < 5
    times = (requests._max_seconds, requests._save_seconds)
    assert times == ((60.0, 120.0) if rank == 0 else (0.0, 0.0))
    assert requests.clear() == ""
