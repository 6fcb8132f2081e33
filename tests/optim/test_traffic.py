"""Bytes per parameter in bfloat16, except for padding: ZeRO-1 moves 6, replicated AdamW 8."""

import os
import sys
from pathlib import Path

import pytest

from tests.ranks import in_processes
from vp_train.tensors import compiling

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def plainly(rank, function, *arguments):
    """Call function(rank, *arguments) without torch.compile, which sends nothing."""
    compiling.turn_off(os.environ)
    function(rank, *arguments)


def start(function, arguments, nprocs):
    in_processes(plainly, (function, *arguments), nprocs)


@pytest.mark.parametrize(("optimizer", "limit"), [("adamw", 8), ("zero1", 6)])
def test_bytes_per_parameter_and_step(monkeypatch, optimizer, limit):
    monkeypatch.syspath_prepend(BENCHMARKS)
    sys.modules.pop("traffic", None)
    import traffic

    monkeypatch.setattr(traffic.multiprocessing, "spawn", start)
    row = traffic.measured(optimizer, 2)
    assert limit <= row.limit < limit + 0.01
    assert row.sent == pytest.approx(row.limit / 2)
