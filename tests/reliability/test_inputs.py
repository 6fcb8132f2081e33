"""Short forms of the campaigns of overrides and files; their judge finds what may not happen."""

from __future__ import annotations

import os
import sys
import time

import pytest

from tests.reliability import inputs, overrides
from vp_train.commands.command import guarded
from vp_train.config import ConfigError


@pytest.mark.slow
def test_every_override_ends_with_78_or_runs():
    assert overrides.campaign(seed=7, count=20) == []


@pytest.mark.slow
def test_every_crafted_file_is_refused_in_one_line():
    assert inputs.campaign(seed=7, count=30) == []


@pytest.mark.slow
def test_every_change_of_a_corpus_is_found(monkeypatch):
    monkeypatch.setattr(inputs, "CASES", {})
    assert inputs.campaign(seed=7, count=100) == []


def test_a_corpus_that_is_not_compared_is_a_failure(monkeypatch):
    monkeypatch.setattr(inputs, "CASES", {"link": inputs.CASES["corpus tokens.bin is a link"]})
    monkeypatch.setattr("vp_train.data.corpus._check_contents", lambda corpus: None)
    monkeypatch.setattr("vp_train.data.manifest.size_of", lambda path: os.stat(path).st_size)
    (failure,) = inputs.campaign(seed=1, count=1)
    assert "it was used" in failure


def ends(*, words="", code=0, error=None, seconds=0.0):
    """Return a command that prints, takes its time, and ends."""

    def body():
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        sys.stderr.write(words)
        if error is not None:
            raise error
        return code

    return lambda: guarded("vp", body)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({}, None),
        ({"error": ConfigError("no")}, None),
        ({"error": ConfigError("a\x1bb\nc" * 5_000)}, None),
        ({"error": ValueError("x")}, "exit code 70"),
        ({"code": 78}, "without a word"),
        ({"code": 78, "words": "a\n" * 11}, "11 lines"),
        ({"code": 78, "words": "a" * 3_000}, "the longest of 3000 characters"),
        ({"code": 0, "words": "\x1b[31m"}, "control characters"),
        ({"code": 1, "words": "no"}, "exit code 1"),
    ],
    ids=range(9),
)
def test_the_judge_sees_what_may_not_happen(given, wrong):
    found, _ = overrides.judged(ends(**given), [])
    assert (found is None) if wrong is None else (wrong in str(found))


def test_the_judge_has_a_clock(monkeypatch):
    monkeypatch.setattr(overrides, "MOST_SECONDS", 0.01)
    found, _ = overrides.judged(ends(error=ConfigError("no"), seconds=0.1), [])
    assert "refused after" in str(found)
