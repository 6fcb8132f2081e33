"""A run whose rank fails ends with a one-line message and an exit code, and no rank is left."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing.connection import wait

import psutil
import pytest
import torch.distributed as dist

from tests.programs import Program, finished
from tests.ranks import free_port, ready_context
from vp_train.commands.train import main
from vp_train.communication import flight_recorder
from vp_train.failures import EXIT_HANG, EXIT_INTERNAL, EXIT_IO, EXIT_TIME
from vp_train.supervision import watcher
from vp_train.train import Run


# Misdeeds of rank 1 in step 2.
def hang():
    time.sleep(1000)


def fill_the_disk():
    raise OSError(28, "No space left on device", "metrics.jsonl")


def lose_nccl(error, record):
    record.parent.mkdir()
    record.write_text("last words")
    Run.nccl_failed(error)


def misbehaving(rank, port, deed, overrides, directory):
    """Run vp-train's main function as a rank of torchrun does.  Rank 1 does `deed` in step 2."""
    os.dup2(os.open(directory / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in given.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }

    def watch(groups, failed):
        Run.nccl_failed = staticmethod(failed)
        return threading.Event()

    inner = Run.train_step

    def failing(self, step):
        if step == 2 and self.mesh.rank == 1:
            deed()
        inner(self, step)

    watcher.watch, Run.train_step = watch, failing
    sys.argv = ["vp-train", *overrides]
    main()


def misbehave(tmp_path, deed, patience):
    """Start two ranks, of which rank 1 does `deed` in step 2, and wait until one has ended.

    Returns their exit codes (None for a rank that still runs) and what they wrote to stderr.
    """
    overrides = [
        "model=nano",
        "data=synthetic",
        f"run.root={tmp_path}/runs",
        "run.steps=100",
        "run.trace_step=0",
    ]
    arguments = (free_port(), deed, [*overrides, f"run.timeout_seconds={patience}"], tmp_path)
    processes = [
        ready_context().Process(target=misbehaving, args=(rank, *arguments), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert wait([process.sentinel for process in processes], 60), "neither rank has ended"
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, [(tmp_path / f"stderr{rank}").read_text() for rank in range(2)]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_when_its_time_is_up(tmp_path):
    codes, (said, _) = misbehave(tmp_path, hang, 8)
    assert codes == [EXIT_HANG, None]
    line = "rank 0: stopped at step 2, another rank has not answered for 8 s (run.timeout_seconds)"
    assert f"vp-train: {line}; rank 1 on {platform.node()} is busy: step " in said
    assert re.search(rf"; log of rank 0: {tmp_path}/runs/default/logs/rank-0\.log\n", said)
    assert "Traceback" not in said.partition("rank 0: stopped")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            "TIMEOUT",
            EXIT_HANG,
            "another rank has not answered for 60 s (run.timeout_seconds)",
        ),
        ("REMOTE_ERROR", EXIT_INTERNAL, "another rank went away"),
    ],
)
def test_an_error_of_nccl_ends_a_rank_with_a_line_that_names_the_record(
    tmp_path, error, code, words
):
    record = flight_recorder.file_of({}, tmp_path / "runs" / "default", 1)
    codes, (_, said) = misbehave(tmp_path, partial(lose_nccl, error, record), 60)
    assert f"rank 1: stopped at step 2, {words}; last communications of rank 1: {record}" in said
    assert codes[1] == code
    assert "Traceback" not in said.partition("rank 1: stopped")[0]


def test_a_file_that_cannot_be_written_ends_a_rank_with_a_line(tmp_path):
    codes, (_, said) = misbehave(tmp_path, fill_the_disk, 60)
    assert "vp-train: metrics.jsonl: No space left on device, at step 2; there is no check" in said
    assert "log of rank 1" not in said  # on a full disk there would be none
    assert "Traceback" not in said
    assert codes[1] == EXIT_IO


RAISING = """
from vp_train.train import Run
from vp_train.commands.train import main as train
inner = Run.train_step
def failing(self, step):
    if step == 2 and self.mesh.rank == 1:
        raise RuntimeError("deliberate failure")
    inner(self, step)
Run.train_step = failing
train()
"""


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job_of_torchrun_with_a_line(programs, tmp_path):
    (tmp_path / "raising.py").write_text(RAISING)
    overrides = [
        "model=nano",
        "data=synthetic",
        f"run.root={tmp_path}/runs",
        "run.steps=100",
        "run.trace_step=0",
    ]
    python = str(programs / "python")
    torchrun = (
        python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    )
    command = [*torchrun, str(tmp_path / "raising.py"), *overrides, "run.timeout_seconds=60"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": python}
    # torchrun ends the job as soon as it sees a dead rank, long before the timeout.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, env=environment, check=False
    )
    assert done.returncode != 0
    log = tmp_path / "runs" / "default" / "logs" / "rank-1.log"
    words = "vp-train: rank 1 failed at step 2: RuntimeError: deliberate failure (in "
    assert words in done.stderr
    assert f"its traceback: {log}\n" in done.stderr
    assert done.stderr.count("deliberate failure") == 1
    assert 'raise RuntimeError("deliberate failure")' in log.read_text()
    # torchrun's report of the failed rank
    assert re.search(rf"rank +: 1 .*\n +exitcode +: {EXIT_INTERNAL} ", done.stderr)


def main_with_a_peer_that_never_comes():
    """Train as `vp-train` does; who destroys all process groups waits for ever."""
    destroy = dist.destroy_process_group

    def waiting(group=None):
        if group is None:
            hang()
        destroy(group)

    dist.destroy_process_group = waiting
    main()


@pytest.mark.parametrize("preflight", [[], ["--preflight"]])
def test_a_rank_that_is_done_waits_for_no_peer(tmp_path, preflight):
    """Nothing watches for silent peers any more."""
    words = ["model=nano", "data=synthetic", "parallel.pp=2", "run.steps=1", "run.trace_step=0"]
    words += [f"run.root={tmp_path}", *preflight]
    done = finished(main_with_a_peer_that_never_comes, *words, seconds=60)
    assert (done.returncode, done.stderr) == (0, "")


def main_with_a_killed_rank():
    """Train as `vp-train` does; rank 0 is killed in step 3."""
    inner = Run.train_step

    def killed(self, step):
        if step == 3 and self.mesh.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(self, step)

    Run.train_step = killed
    main()


def test_a_run_whose_first_rank_is_killed_has_a_report(tmp_path):
    words = ["model=nano", "data=synthetic", "parallel.pp=2", "run.steps=9", "run.trace_step=0"]
    done = finished(main_with_a_killed_rank, *words, f"run.root={tmp_path}")
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    page = (tmp_path / "default" / "report.html").read_text()
    assert "2 of 9 steps are recorded: it runs, or has ended early" in page


@pytest.mark.parametrize("when", ["they train", "they start"])
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path, when):
    overrides = [
        "model=nano",
        "data=synthetic",
        f"run.root={tmp_path}/runs",
        "run.steps=10000",
        "parallel.pp=2",
    ]
    with Program(main, overrides) as launcher:
        if when == "they train":
            assert any(line.startswith("step") for line in launcher.stdout)
        while len(ranks := psutil.Process(launcher.pid).children()) < 2:
            time.sleep(0.01)
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait(30)
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive


def test_a_reader_that_goes_away_ends_the_run_with_a_word(tmp_path):
    overrides = [
        "model=nano",
        "data=synthetic",
        "parallel.pp=2",
        "run.steps=50",
        "run.report=false",
        "run.log_every=1",
        f"run.root={tmp_path}",
    ]
    with Program(main, overrides) as program:
        program.stdout.readline()
        program.stdout.close()
        assert program.wait(90) == EXIT_TIME
        assert "because nobody reads the output any more; a checkpoint" in program.stderr.read()
    assert any((tmp_path / "default" / "checkpoints").glob("step-*"))
    first, *_ = (tmp_path / "default" / "notices.txt").read_text().splitlines()
    assert first.endswith(": nobody reads the output any more; the run saves and ends")


@pytest.mark.slow
def test_a_job_without_any_stream_trains(tmp_path):
    overrides = ["model=nano", "data=synthetic", "parallel.pp=2", "run.steps=1"]
    command = [sys.executable, "-m", "vp_train", *overrides, f"run.root={tmp_path}"]
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(closing, timeout=90, check=False).returncode == 0
    assert (tmp_path / "default" / "report.html").is_file()


@pytest.mark.parametrize("root", ["/dev/null", "/proc"])
def test_a_directory_that_cannot_be_is_one_line(root):
    overrides = ["model=nano", "data=synthetic", "parallel.pp=2", "run.steps=1"]
    done = finished(main, *overrides, f"run.root={root}")
    assert done.returncode == EXIT_IO
    way_out = "set run.root to a directory where you may write"
    assert re.fullmatch(rf"vp-train: {root}/default: [^;]*; {way_out}\n", done.stderr)
