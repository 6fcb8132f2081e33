"""Two nodes train over a cable, refuse to differ, and end together when one of them is lost."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.namespaces import Job, Node, two_nodes, why_not

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
]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    with two_nodes(tmp_path) as both:
        yield both


def start_ranks(nodes: tuple[Node, Node], directory: Path, *overrides: str) -> list[Job]:
    """Start one rank on each node without a launcher, which saves its imports."""
    command = [sys.executable, "-m", "vp_train", *SETTINGS, *overrides]
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    common |= {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": str(PORT)}
    return [
        node.start(command, directory, common | {"RANK": str(rank)})
        for rank, node in enumerate(nodes)
    ]


def start_launchers(nodes: tuple[Node, Node], directory: Path, *overrides: str) -> list[Job]:
    """Start one launcher with one rank on each node."""
    jobs = []
    for number, node in enumerate(nodes):
        place = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
        meeting = ["--master-addr", nodes[0].address, "--master-port", str(PORT)]
        launcher = [sys.executable, "-m", "torch.distributed.run", *place, *meeting]
        jobs.append(node.start([*launcher, "-m", "vp_train", *SETTINGS, *overrides], directory))
    return jobs


def lines_of_ranks(job: Job) -> list[str]:
    return [line for line in job.lines if re.match(r"(vp-train: |rank \d+[: ])", line)]


def test_two_nodes_train_and_a_killed_launcher_ends_both(nodes, tmp_path):
    first, second = start_launchers(nodes, tmp_path, "data=synthetic", "run.steps=100000")
    first.wait_for("^node      vpnode1, rank 0: Python", START_SECONDS)
    first.wait_for("^node      vpnode2, rank 1: Python", 5)
    first.wait_for(r"^network   all-reduce of 16 MiB over 2 ranks: .* GB/s", 20)
    first.wait_for(r"^step +2/", 60)
    os.kill(second.process.pid, signal.SIGKILL)
    began = time.monotonic()
    assert first.wait(STEP_SECONDS + 30) != 0
    assert time.monotonic() - began < STEP_SECONDS + 20
    assert len(lines_of_ranks(first)) == 1, first.text
    assert "another rank" in lines_of_ranks(first)[0]


def test_a_cut_link_ends_both_nodes(nodes, tmp_path):
    jobs = start_ranks(nodes, tmp_path, "data=synthetic", "run.steps=100000")
    jobs[0].wait_for(r"^step +2/", START_SECONDS)
    nodes[1].cut_link()
    began = time.monotonic()
    assert {job.wait(STEP_SECONDS + 60) for job in jobs} <= {70, 124}
    assert time.monotonic() - began < STEP_SECONDS + 45
    for job in jobs:
        (line,) = lines_of_ranks(job)
        assert "another rank" in line


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
    jobs = start_ranks(nodes, tmp_path, *text, "model.vocab_size=300")
    assert [job.wait(START_SECONDS) for job in jobs] == [78, 78]
    unshared, other_text = [line for line in jobs[0].lines if "node vpnode2: " in line]
    assert unshared.startswith(f"vp-train: node vpnode2: {tmp_path / 'runs' / 'two'} is not")
    assert "the run's directory of node vpnode1" in unshared
    assert "run.root" in unshared
    assert other_text.startswith("node vpnode2: the text of data ")
    assert not list((tmp_path / "runs").rglob("*checkpoints*"))
