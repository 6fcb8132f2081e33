"""A small run of text that the tests of this package open."""

from __future__ import annotations

import json
import sys

import pytest

from tests.training import run_command

WORDS = [
    "model=nano",
    "model.num_layers=2",
    "model.vocab_size=300",
    "run.steps=4",
    "run.eval_every=0",
]
SENTENCE = "the cat sat on the mat and the dog sat on the cat. "


def train(place):
    """Train on two ranks in `place`, and return the directory of the run."""
    (place / "text").mkdir()
    (place / "text/a.txt").write_text(SENTENCE * 400)
    words = [*WORDS, "data=text", "data.path=text", "parallel.pp=2", "run.name=one"]
    run_command(words, place)
    return place / "runs" / "one"


def command(main, capsys, name, *words):
    """Run a command in this process; return its exit code, output and errors."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


def records(out):
    return [json.loads(line) for line in out.splitlines()]
