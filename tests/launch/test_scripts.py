"""The shell scripts choose what they say they choose, from any directory."""

from __future__ import annotations

import os
import shutil
import subprocess
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


@pytest.mark.parametrize(
    ("script", "variables", "said"),
    [
        ("slurm.sbatch", {}, "vp_train: no Slurm job; submit this script: sbatch "),
        (
            "slurm.sbatch",
            {"SLURM_JOB_ID": "7", "SETUP": "/nowhere"},
            "vp_train: SETUP=/nowhere cannot",
        ),
        ("torchrun.sh", {"NODES": "2", "NODE": "0"}, "vp_train: NODES=2 needs HEAD, the address"),
        ("torchrun.sh", {"NODES": "2", "HEAD": "a"}, "and NODE, 0 on that one"),
    ],
)
def test_what_a_script_lacks_is_one_line(tmp_path, script, variables, said):
    done = run(["bash", str(LAUNCH / script), "model=nano"], tmp_path, **variables)
    assert (done.returncode, done.stdout) == (78, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("model=nano",), "run.name=job-7"),
        (("a='x y'", "model.run.name=1"), "run.name=job-7"),
        (("model=nano", "run.name=mine"), None),
        (("run=mine.yaml",), None),
        (("-m", "--only", "0", "optim.lr=1,2"), None),
    ],
)
def test_a_job_without_a_name_never_goes_on_with_the_run_of_another(tmp_path, words, name):
    for program, output in (("scontrol", "JobState=RUNNING"), ("srun", "vp-train: $*")):
        (tmp_path / program).write_text(f'#!/bin/sh\necho "{output}"\n')
        (tmp_path / program).chmod(0o755)
    done = run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *words],
        tmp_path,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="a",
    )
    assert done.returncode == 0, done.stderr
    own = " ".join([*filter(None, [name]), *words, "run.resume=true"])
    assert f"vp-train {own}\n" in done.stdout
    assert ("vp_train: run.name=job-7, as none is given" in done.stdout) == (name is not None)


def test_the_folder_of_the_scripts_may_have_a_blank(tmp_path):
    """Slurm runs a copy of a script, and names the original with its arguments."""
    folder, copy = tmp_path / "my scripts", tmp_path / "spool"
    for place in (folder, copy):
        place.mkdir()
        shutil.copy(SWEEP, place)
    (folder / "slurm.sbatch").write_text("echo found\n")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho '   Command={folder / SWEEP.name} optim.lr=1,2 a b'\n")
    scontrol.chmod(0o755)
    done = run(
        ["bash", str(copy / SWEEP.name), "optim.lr=1,2"],
        tmp_path,
        SLURM_ARRAY_TASK_ID="0",
        SLURM_JOB_ID="7",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


def test_the_index_of_an_array_chooses_one_run_of_a_sweep(sweep):
    words = ["grid.txt", "optim.lr=1e-3,3e-4", "data.path=two words"]
    assert sweep(3, *words) == ["-m", "--only", "3", *words]


@pytest.mark.parametrize(
    ("index", "words", "said"),
    [
        ("", ["optim.lr=1,2"], "SLURM_ARRAY_TASK_ID is ''"),
        (0, [], "give a file of overrides"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_78(index, words, said, tmp_path):
    done = run(["bash", str(SWEEP), *words], tmp_path, SLURM_ARRAY_TASK_ID=str(index))
    assert done.returncode == 78
    assert said in done.stderr


def test_without_slurm_a_sweep_runs_vp_train_itself(tmp_path):
    program = tmp_path / "vp-train"
    program.write_text('#!/bin/sh\necho trained "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(["bash", str(SWEEP), "run.seed=1,2"], "/", SLURM_ARRAY_TASK_ID="1", PATH=path)
    assert done.stdout.splitlines()[-1] == "trained -m --only 1 run.seed=1,2"


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
    for alone in ({"NODES": "1"}, {"SLURM_JOB_NUM_NODES": "1"}):
        found = environment_after(tmp_path, HEAD="127.0.0.1", **alone)
        assert "GLOO_SOCKET_IFNAME" not in found  # vp-train keeps it on the loopback interface


SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_pass_shellcheck(script):
    assert run(["bash", "-n", str(script)], "/").stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not on the PATH (Debian: shellcheck)")
    found = run(["shellcheck", "--severity=warning", str(script)], "/")
    assert found.returncode == 0, found.stdout
