"""A run whose disk fails keeps what it has saved, says which file failed, and goes on if it can."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil

import pytest

from tests.training import config_of, metrics_of, release_locks, train
from vp_train.checkpoint import saver
from vp_train.checkpoint.saver import CheckpointError
from vp_train.checkpoint.store import latest
from vp_train.failures import EXIT_IO, ending_of_rank
from vp_train.metrics.reporter import Reporter
from vp_train.metrics.run_directory import RunDirectory
from vp_train.train import Run

OPTIONS = {"eval_every": 0, "trace_step": 3, "checkpoint_every": 2}


def observed(rank, num_ranks, config):
    """Train, and return the error that ended it, the lines of the console, and stderr."""
    lines, say, said = [], Reporter.say, io.StringIO()
    Reporter.say = lambda self, line: lines.append(line)
    try:
        with contextlib.redirect_stderr(said):
            train(rank, num_ranks, config)
        ending = None
    except CheckpointError as error:
        ending = ending_of_rank(error, config.run, rank, config.run.steps)
    finally:
        Reporter.say = say
    return ending and (ending.code, ending.words), lines, said.getvalue().splitlines()


def fail_at(rank, num_ranks, config, step):
    """Let rank 1 fail to write its file of the checkpoint of `step`."""
    inner = saver.write_new

    def write(path, data):
        if f"step-{step:08d}" in str(path) and rank == 1:
            raise OSError(28, "No space left on device", str(path))
        inner(path, data)

    saver.write_new = write
    try:
        return observed(rank, num_ranks, config)
    finally:
        saver.write_new = inner


def test_a_save_that_fails_within_a_run_is_a_warning(ranks, tmp_path):
    config = config_of(tmp_path, **OPTIONS)
    (first, lines, _), (second, others, _) = ranks(2).run(fail_at, config, 4)
    ranks(2).run(release_locks)
    assert first is second is None
    (line,) = lines
    assert line.startswith("rank 1 could not write the checkpoint of step 4: OSError: [Errno 28]")
    assert "rank-00001.safetensors'; going on, the checkpoints before it are untouched" in line
    assert others == []
    names = sorted(os.listdir(config.run.directory / "checkpoints"))
    assert names == ["step-00000006", "step-00000008"]


def test_a_save_that_fails_at_the_end_ends_the_run_with_the_file_on_all_ranks(ranks, tmp_path):
    config = config_of(tmp_path, **OPTIONS)
    answers = ranks(2).run(fail_at, config, 8)
    ranks(2).run(release_locks)
    assert [ending[0] for ending, *_ in answers] == [EXIT_IO] * 2
    assert [line for _, lines, _ in answers for line in lines] == []
    words = answers[0][0][1]
    assert words.startswith("vp-train: rank 1 could not write the checkpoint of step 8: ")
    assert "rank-00001.safetensors" in words
    assert len(words.splitlines()) == 1
    assert answers[1][0][1] == ""  # rank 0 alone says it
    assert latest(config.run.directory / "checkpoints").name == "step-00000006"


def with_small_files(rank, num_ranks, config):
    """Let no file grow beyond 8 kB from step 1 on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(step):
        if step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))

    try:
        with doing(limit):
            return observed(rank, num_ranks, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def doing(deed):
    """Call deed(step) before every step."""
    inner = Run.train_step

    def train_step(self, step):
        deed(step)
        inner(self, step)

    Run.train_step = train_step
    try:
        yield
    finally:
        Run.train_step = inner


def test_on_a_full_disk_a_run_computes_to_its_end_and_says_what_is_lost(ranks, tmp_path):
    config = config_of(tmp_path, **OPTIONS)
    (ending, lines, said), _ = ranks(2).run(with_small_files, config)
    ranks(2).run(release_locks)
    assert ending[0] == EXIT_IO
    assert "rank-00000.safetensors" in ending[1]
    assert len(lines) == 3  # the saves of steps 2, 4 and 6
    assert [record["step"] for record in metrics_of(config)] == list(range(1, 9))
    (line,) = said
    assert "trace/step.json cannot be written (File too large); going on without" in line
    assert os.listdir(config.run.directory / "checkpoints") == []


def without_directory(rank, num_ranks, config):
    """Remove the directory of the run before step 4, beside the writing of step 2."""

    def remove(step):
        if step == 4 and rank == 0:
            moved = config.run.directory.rename(config.run.directory.with_name("moved"))
            shutil.rmtree(moved)

    with doing(remove):
        return observed(rank, num_ranks, config)


def test_a_run_goes_on_when_its_directory_is_removed(ranks, tmp_path):
    config = config_of(tmp_path, **OPTIONS)
    (ending, lines, said), _ = ranks(2).run(without_directory, config)
    ranks(2).run(release_locks)
    assert ending is None
    assert said == []
    words = "was removed while this run used it; it is made again, without what was in it"
    assert sum(words in line for line in lines) == 1
    assert len(lines) <= 2  # a save that was being written may fail
    assert [record["step"] for record in metrics_of(config)] == [4, 5, 6, 7, 8]
    assert (config.run.directory / "config.yaml").exists()
    assert latest(config.run.directory / "checkpoints").name == "step-00000008"


def without_last_checkpoint(rank, num_ranks, config, taken):
    """Remove the run's directory when the last checkpoint is saved.

    Let another run take it if `taken`.
    """
    inner = Run.finish_save

    def finish_save(self):
        inner(self)
        if rank == 0:
            shutil.rmtree(config.run.directory)
            if taken:
                others.append(RunDirectory(config.run))

    others, Run.finish_save = [], finish_save
    try:
        return observed(rank, num_ranks, config)
    finally:
        Run.finish_save = inner


@pytest.mark.parametrize(
    ("taken", "words"),
    [(False, "step-00000008 is not there any more"), (True, "while this run used it, and process")],
)
def test_a_run_whose_last_checkpoint_is_removed_does_not_end_as_if_it_were_there(
    ranks, tmp_path, taken, words
):
    config = config_of(tmp_path, **OPTIONS)
    (ending, *_), (second, *_) = ranks(2).run(without_last_checkpoint, config, taken)
    ranks(2).run(release_locks)
    assert (ending[0], second) == (EXIT_IO, (EXIT_IO, ""))
    assert words in ending[1]
    assert len(ending[1].splitlines()) == 1
