"""Two nodes train over a cable, refuse to differ, and end together when one of them is lost."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.namespaces import Job, Node, two_nodes, why_not
from vp_train.commands.train import main

pytestmark = [
    pytest.mark.skipif(bool(reason := why_not()), reason=reason or "nodes can be made"),
    pytest.mark.timeout(180),
]

PORT = 29500
STEP_SECONDS = 8  # run.timeout_seconds: more than the slowest step of this tiny model
START_SECONDS = 90  # imports, on a machine that does other things too
SETTINGS = [
    "model=nano",
    "parallel.pp=2",
    f"run.timeout_seconds={STEP_SECONDS}",
    "run.name=two",
    "run.trace_step=0",
    "run.eval_every=0",
    "run.log_every=1",
    "run.report=false",
]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    with two_nodes(tmp_path) as both:
        yield both


def start(nodes: tuple[Node, Node], directory: Path, *overrides: str) -> list[Job]:
    """Start the agent of each node, with one rank."""
    jobs = []
    for number, node in enumerate(nodes):
        place = ["--nodes", "2", "--node", str(number), "--head", f"{nodes[0].address}:{PORT}"]
        jobs.append(node.start(main, [*place, *SETTINGS, *overrides], directory))
    return jobs


def last_words(job: Job) -> list[str]:
    """Return the lines with which a job has ended."""
    return [line for line in job.lines if re.match(r"(vp-train: |rank \d+[: ])", line)]


def test_two_nodes_train_and_a_killed_agent_ends_both(nodes, tmp_path):
    first, second = start(nodes, tmp_path, "data=synthetic", "run.steps=100000")
    first.wait_for("^node      vpnode1, rank 0: Python", START_SECONDS)
    first.wait_for("^node      vpnode2, rank 1: Python", 5)
    first.wait_for(r"^network   all-reduce of 16 MiB over 2 ranks: .* GB/s", 20)
    first.wait_for(r"^step +2/", 60)
    os.kill(second.program.pid, signal.SIGKILL)
    began = time.monotonic()
    assert first.wait(60) == 70
    assert time.monotonic() - began < 20
    (words,) = last_words(first)
    assert words.startswith("vp-train: the agent of node 1 (vpnode2) was killed")


@pytest.mark.slow
def test_a_cut_link_ends_both_nodes(nodes, tmp_path):
    jobs = start(nodes, tmp_path, "data=synthetic", "run.steps=100000")
    jobs[0].wait_for(r"^step +2/", START_SECONDS)
    nodes[1].cut_link()
    began = time.monotonic()
    codes = [job.wait(STEP_SECONDS + 60) for job in jobs]
    assert time.monotonic() - began < STEP_SECONDS + 45
    assert codes == [124, 124]
    for job in jobs:
        assert len(last_words(job)) == 1, job.text


@pytest.mark.slow
def test_different_text_and_a_directory_that_is_not_shared_are_refused(nodes, tmp_path):
    words = ["the first node has this text. ", "the second has other text. "]
    for name, text in zip(("text", "other"), words, strict=True):
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / f"{number}.txt").write_text(f"{number} {text}" * 100)
    (tmp_path / "runs").mkdir()
    nodes[1].replace(tmp_path / "text", tmp_path / "other")
    nodes[1].hide(tmp_path / "runs")
    text = ["data=text", f"data.path={tmp_path / 'text'}"]
    jobs = start(nodes, tmp_path, *text, "model.vocab_size=300")
    assert [job.wait(START_SECONDS) for job in jobs] == [78, 78]
    unshared, other_text = [line for line in jobs[0].lines if "node vpnode2: " in line]
    assert unshared.startswith(f"vp-train: node vpnode2: {tmp_path / 'runs' / 'two'} is not")
    assert "the run's directory of node vpnode1" in unshared
    assert "run.root" in unshared
    assert other_text.startswith("node vpnode2: the text of data ")
    assert not list((tmp_path / "runs").rglob("*checkpoints*"))
