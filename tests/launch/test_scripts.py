"""The shell scripts choose what they say they choose, from any directory."""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SWEEP = LAUNCH / "sweep.sbatch"


def run(words, directory, **environment):
    """Run a command in `directory`, without variables of a job around the tests."""
    kept = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    return subprocess.run(
        words, cwd=directory, env=kept | environment, capture_output=True, text=True, timeout=20
    )


@pytest.fixture
def sweep(tmp_path):
    """Return a function that runs the script for an index, and returns what it would train."""
    copied = tmp_path / "scripts"
    copied.mkdir()
    shutil.copy(SWEEP, copied)
    (copied / "slurm.sbatch").write_text("printf '%s\\n' 'slurm:' \"$@\"\n")

    def start(index, *words):
        done = run(
            ["bash", str(copied / "sweep.sbatch"), *words],
            tmp_path,
            SLURM_ARRAY_TASK_ID=str(index),
            SLURM_JOB_ID="7",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[done.stdout.splitlines().index("slurm:") + 1 :]

    return start


def test_every_combination_of_lists_has_one_index(sweep):
    words = ["model=nano", "optim.lr=1e-3,3e-4", "cluster.shape=[1,2]", "run.seed=1,2,3"]
    runs = [sweep(index, *words) for index in range(6)]
    assert [run[-1] for run in runs] == [f"run.name=sweep-{index}" for index in range(6)]
    chosen = [(run[-2], run[-3]) for run in runs]
    assert chosen == [
        (f"optim.lr={rate}", f"run.seed={seed}")
        for rate, seed in product(("1e-3", "3e-4"), (1, 2, 3))
    ]
    assert all(run[:2] == ["model=nano", "cluster.shape=[1,2]"] for run in runs)


def test_a_line_of_a_file_is_a_run_and_nothing_in_it_is_executed(sweep, tmp_path):
    (tmp_path / "grid.txt").write_text(
        "# rate and seed\n\n"
        "optim.lr=1e-3 run.seed=1\n"
        f"optim.lr=3e-4 'data.path=two words' data.cache_dir=$(touch {tmp_path}/ran)\n"
        "run.name=mine\r\n"
    )
    assert sweep(0, "grid.txt", "model=nano") == [
        "model=nano",
        "optim.lr=1e-3",
        "run.seed=1",
        "run.name=grid-0",
    ]
    assert "data.path=two words" in sweep(1, "grid.txt")
    assert not (tmp_path / "ran").exists()
    assert sweep(2, "grid.txt") == ["run.name=mine"]
    both = [sweep(index, "grid.txt", "model.num_layers=2,4") for index in (1, 2)]
    assert [run[:2] for run in both] == [
        ["model.num_layers=4", "optim.lr=1e-3"],
        ["model.num_layers=2", "optim.lr=3e-4"],
    ]


def test_a_name_in_the_words_is_the_base_of_all_names(sweep):
    assert sweep(1, "run.name=rates", "optim.lr=1,2")[-1] == "run.name=rates-1"


@pytest.mark.parametrize(
    ("index", "words", "said"),
    [
        (2, ["optim.lr=1,2"], "index 2 of 2 runs; submit with sbatch --array 0-1"),
        ("", ["optim.lr=1,2"], "SLURM_ARRAY_TASK_ID is ''"),
        (0, [], "give a file of overrides"),
        (0, ["missing.txt"], "missing.txt is not a file"),
        (0, ["empty.txt"], "empty.txt has no line"),
        (0, ["quote.txt"], "quote.txt: quotes of"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_78(index, words, said, tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "quote.txt").write_text("data.path='half\n")
    done = run(["bash", str(SWEEP), *words], tmp_path, SLURM_ARRAY_TASK_ID=str(index))
    assert done.returncode == 78
    assert said in done.stderr


def test_without_slurm_a_sweep_runs_vp_train_itself(tmp_path):
    program = tmp_path / "vp-train"
    program.write_text('#!/bin/sh\necho trained "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(["bash", str(SWEEP), "run.seed=1,2"], "/", SLURM_ARRAY_TASK_ID="1", PATH=path)
    assert done.stdout.splitlines()[-1] == "trained run.seed=2 run.name=sweep-1"


def environment_after(directory, **given):
    """Return the variables after reading env.sh."""
    done = run(
        ["bash", "-euo", "pipefail", "-c", f". {LAUNCH / 'env.sh'}; echo ---; env"],
        directory,
        **given,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.partition("---\n")[2].splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_the_environment_sets_what_is_not_set_and_keeps_the_rest(tmp_path):
    found = environment_after(tmp_path, OMP_NUM_THREADS="3", NCCL_DEBUG="INFO")
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["NCCL_DEBUG"] == "INFO"
    assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "GLOO_SOCKET_IFNAME" not in found
    assert not [name for name in found if name.startswith("vp_")]


@pytest.mark.skipif(shutil.which("ip") is None, reason="ip is not on the PATH (Debian: iproute2)")
def test_the_network_is_the_one_that_leads_to_the_head(tmp_path):
    for head in ("127.0.0.1", "localhost:29500"):
        found = environment_after(tmp_path, HEAD=head)
        assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "lo"
    chosen = environment_after(tmp_path, HEAD="127.0.0.1", NCCL_SOCKET_IFNAME="eth7")
    assert chosen["NCCL_SOCKET_IFNAME"] == "eth7"
    assert "GLOO_SOCKET_IFNAME" not in chosen
    assert "GLOO_SOCKET_IFNAME" not in environment_after(tmp_path, HEAD="no.such.host.invalid")


SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_pass_shellcheck(script):
    assert run(["bash", "-n", str(script)], "/").stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not on the PATH (Debian: shellcheck)")
    found = run(["shellcheck", "--severity=warning", str(script)], "/")
    assert found.returncode == 0, found.stdout
