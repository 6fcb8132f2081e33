"""The last words of a rank reach the agent through its pipe, else the terminal, and the log."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vp_train.commands.agent import say
from vp_train.commands.command import guarded
from vp_train.config import ConfigError
from vp_train.failures import EXIT_CONFIG, EXIT_TIME, Ending
from vp_train.supervision import ending
from vp_train.supervision.ending import heard

LEAVE = """
import sys
from pathlib import Path
from vp_train.failures import Ending
from vp_train.supervision.ending import leave
follows = len(sys.argv) > 2
leave(Ending(70, "rank 1 failed", "Traceback: long", follows=follows), Path(sys.argv[1]))
"""


def leave(log, environment, *words, **options):
    command = [sys.executable, "-c", LEAVE, str(log), *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | environment,
        check=False,
        **options,
    )


def test_an_agent_hears_the_words_and_the_log_has_the_traceback(tmp_path):
    reading, writing = os.pipe()
    log = tmp_path / "logs" / "rank-1.log"
    done = leave(log, {"VP_TRAIN_ENDING_FD": str(writing)}, "follows", pass_fds=[writing])
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert heard(pipe.read()) == Ending(70, "rank 1 failed", follows=True)
    assert (done.returncode, done.stderr) == (70, "")
    assert log.read_text() == "Traceback: long"


@pytest.mark.parametrize("environment", [{}, {"VP_TRAIN_ENDING_FD": "999"}])
def test_without_an_agent_the_words_go_to_the_terminal(tmp_path, environment):
    done = leave(tmp_path / "logs" / "rank-1.log", environment)
    assert (done.returncode, done.stderr) == (70, "vp-train: rank 1 failed\n")


def test_a_traceback_that_no_log_takes_goes_to_the_terminal(tmp_path):
    log = tmp_path / "a file" / "logs" / "rank-1.log"
    (tmp_path / "a file").touch()
    done = leave(log, {})
    assert done.stderr.startswith(f"vp-train: rank 1 failed\n{log} cannot be written: ")


@pytest.fixture
def no_reader(monkeypatch):
    """A stderr whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield


def refused():
    raise ConfigError("run.steps=0")


@pytest.mark.parametrize("code", [EXIT_TIME, EXIT_CONFIG])
def test_the_code_stays_where_nobody_reads_the_words(no_reader, monkeypatch, code):
    monkeypatch.setattr(sys, "argv", ["vp-train"])
    with pytest.raises(SystemExit) as left:
        guarded("vp-train", refused if code == EXIT_CONFIG else lambda: say("stopped") or code)
    assert left.value.code == code


def test_a_rank_keeps_its_code_where_nobody_reads_its_words(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", LEAVE, str(tmp_path / "rank-1.log")]
    with os.fdopen(writing, "w") as stream:
        assert subprocess.run(command, stderr=stream, timeout=30, check=False).returncode == 70


def test_long_words_are_shortened_to_what_any_pipe_takes(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setenv("VP_TRAIN_ENDING_FD", str(writing))
    assert ending._tell_agent(Ending(70, "é" * 100_000))
    told = heard(os.read(reading, 1 << 20))
    assert told.code == 70
    assert 300 < len(told.words) < 4096


def test_a_log_that_is_a_pipe_is_not_opened(tmp_path):
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "rank-1.log")
    done = leave(tmp_path / "logs" / "rank-1.log", {})
    assert "rank-1.log cannot be written: " in done.stderr
    assert done.stderr.endswith("\nTraceback: long\n")


@pytest.mark.parametrize("text", [b"", b"[]", b'{"code": 70}', b"\x80\x04N."])
def test_what_is_no_ending_counts_as_none(text):
    assert heard(text) is None


class LeftError(BaseException):
    """A stand-in for the end of the process."""


@pytest.fixture
def left(monkeypatch, capsys):
    """Return a function that lets a rank leave: ending, log -> (exit code, what it says)."""
    monkeypatch.delenv("VP_TRAIN_ENDING_FD", raising=False)

    def leave(code):
        raise LeftError(code)

    monkeypatch.setattr(ending.os, "_exit", leave)

    def call(said, log=None):
        with pytest.raises(LeftError) as caught:
            ending.leave(said, log)
        return caught.value.args[0], capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Ending(0, ""), ""),
        (Ending(0, "done already"), "done already\n"),
        (Ending(70, ""), ""),
        (Ending(78, "run.steps=0"), "vp-train: run.steps=0\n"),
        (Ending(78, "vp-train: run.steps=0"), "vp-train: run.steps=0\n"),
    ],
)
def test_only_a_failure_begins_with_the_name_of_the_command_and_once(left, said, words):
    assert left(said) == (said.code, words)


@pytest.mark.parametrize("code", [70, 78, 124])
def test_only_the_traceback_of_a_bug_is_shown_where_no_log_takes_it(left, tmp_path, code):
    log = tmp_path / "a file" / "rank-1.log"
    log.parent.touch()
    found, said = left(Ending(code, "failed", "Traceback: long\n\n"), log)
    first, second, *others = said.splitlines()
    assert (found, first) == (code, "vp-train: failed")
    assert second.startswith(f"{log} cannot be written: ")
    assert others == (["Traceback: long"] if code == 70 else [])
    assert left(Ending(code, "failed", "Traceback"))[1] == "vp-train: failed\n"


@pytest.mark.parametrize(
    "said",
    [Ending(74, "the disk is full", "Traceback: long")]
    + [
        Ending(code, "another rank went away", "Traceback: long", follows=True)
        for code in (70, 124)
    ],
)
def test_words_that_say_all_stand_alone_where_no_log_takes_the_rest(left, tmp_path, said):
    (tmp_path / "a file").touch()
    found = left(said, tmp_path / "a file" / "rank-1.log")
    assert found == (said.code, f"vp-train: {said.words}\n")
    assert left(said, tmp_path / "logs" / "rank-1.log") == found
    assert (tmp_path / "logs" / "rank-1.log").read_text() == said.log


def test_a_log_is_appended_to(left, tmp_path):
    for _ in range(2):
        assert left(Ending(70, "", "again\n"), tmp_path / "logs" / "rank-0.log") == (70, "")
    assert (tmp_path / "logs" / "rank-0.log").read_text() == "again\n" * 2


def test_words_that_fit_into_a_pipe_are_whole(monkeypatch):
    for length in (10, 4096 - len('{"code": 70, "words": "", "log": "", "follows": false}'), 4096):
        reading, writing = os.pipe()
        monkeypatch.setenv("VP_TRAIN_ENDING_FD", str(writing))
        assert ending._tell_agent(Ending(70, "x" * length))
        told = os.read(reading, 1 << 20)
        assert len(told) <= 4096
        whole = length < 4096
        assert (heard(told).words == "x" * length) == whole
        assert whole or heard(told).words == f"{'x' * 2048} ..."
        os.close(reading)
        assert not ending._tell_agent(Ending(70, "nobody hears")), "the agent has gone"
        os.close(writing)
