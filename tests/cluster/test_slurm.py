"""Jobs of a real Slurm with two nodes on this machine: `slurm.sbatch`, agents, and ranks as tasks.

What only concerns the batch script runs a small program in place of vp-train.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, missing

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing() or "a Slurm can run"),
    pytest.mark.timeout(400),
]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def no_job_is_left(request):
    """End the jobs of a test before the next one begins."""
    yield
    if "slurm" in request.fixturenames:
        cluster = request.getfixturevalue("slurm")
        cluster.call("scancel", "--user=root", check=False)
        cluster.wait_for(lambda: cluster.call("squeue", "-h") == "")


STUB = """#!/usr/bin/env bash
echo "node $SLURM_NODEID at start ${SLURM_RESTART_COUNT:-0} of run $VP_TRAIN_RUN_ID: $*"
trap 'echo "node $SLURM_NODEID was asked"; kill $!; exit ${STUB_CODE:-75}' USR1 TERM
if [ "${SLURM_RESTART_COUNT:-0}" = "${STUB_DONE:-1}" ]; then exit 0; fi
echo "node $SLURM_NODEID works with $STUB_SETUP"
while true; do  # Slurm may signal sleep before this shell
  sleep 60 &
  wait
done
"""


@pytest.fixture
def stub(slurm, tmp_path):
    """Submit a job whose vp-train only waits for signals; its second start ends with 0."""
    program = tmp_path / "bin" / "vp-train"
    program.parent.mkdir()
    program.write_text(STUB)
    program.chmod(0o755)
    setup = tmp_path / "setup.sh"
    hooks = 'echo "$NOBODY_SETS_THIS" >/dev/null; false'  # as those of modules and of conda do
    setup.write_text(f"export PATH={program.parent}:$PATH STUB_SETUP=modules\n{hooks}\n")

    def submit(*options, **variables):
        job = slurm.submit(
            SCRIPT, "model=nano", "a=b c", options=options, SETUP=str(setup), **variables
        )
        for node in (0, 1):
            job.wait_for(f"node {node} works with modules")
        return job

    return submit


@pytest.mark.slow
def test_a_signal_before_the_time_limit_requeues_the_job(slurm, stub):
    job = stub()
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)  # as --signal=B:USR1@120 does
    job.wait_for("vp_train: exit code 75, requeued after 0 restarts")
    job.start_again()
    job.wait_for_state("COMPLETED")
    assert "node 0 at start 0 of run" in job.said  # the output is appended to
    starts = re.findall(r"at start (\d) of run (\w+): (.*)", job.said)
    assert sorted(number for number, _, _ in starts) == ["0", "0", "1", "1"]
    assert len({run for _, run, _ in starts}) == 2  # a new random word for every start
    assert {words for _, _, words in starts} == {
        f"run.name=job-{job.number} model=nano a=b c run.resume=true"
    }


@pytest.mark.slow
def test_a_preempted_job_has_its_grace_time_and_is_requeued(slurm, stub):
    job = stub()
    short = slurm.directory / "short.sh"
    short.write_text("#!/bin/sh\nsleep 0.1\n")
    urgent = slurm.submit(short, options=("--partition=high", "--exclusive"))
    job.wait_for("was asked")
    # Two nodes on one machine: srun sometimes misses the end of a task, and Slurm ends it later.
    urgent.wait_for_state("COMPLETED")
    job.start_again()
    job.wait_for_state("COMPLETED")
    assert job.fact("Restarts") == "1"
    assert "requeued after" not in job.said  # Slurm itself has requeued it


def test_a_cancelled_job_is_asked_to_end_and_does_not_come_back(slurm, stub):
    job = stub()
    slurm.call("scancel", job.number)
    job.wait_for_state("CANCELLED")
    slurm.wait_for(lambda: slurm.call("squeue", "-h") == "")
    assert job.fact("Restarts") == "0"
    assert "requeued" not in job.said


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"STUB_CODE": "78"}, ""),
        ({"RESTARTS": "0"}, "vp_train: exit code 75, not requeued: RESTARTS=0 are over"),
    ],
)
def test_what_a_new_start_cannot_mend_ends_the_job(slurm, stub, variables, words):
    job = stub(**variables)
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for_state("FAILED")
    assert job.fact("ExitCode") == f"{variables.get('STUB_CODE', '75')}:0"
    assert words in job.said


NANO = (
    "model=nano",
    "data=synthetic",
    "parallel.pp=2",
    "run.eval_every=0",
    "run.trace_step=0",
    "run.log_every=1",
    "run.report=false",
)


@pytest.mark.slow
def test_two_nodes_train_are_requeued_and_resume(slurm, programs, tmp_path):
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export PATH={programs}:$PATH\n")
    words = (*NANO, f"run.root={tmp_path}", "run.checkpoint_every=2", "run.steps=9999")
    job = slurm.submit(SCRIPT, *words, SETUP=str(setup))
    job.wait_for("mesh      2 ranks")
    job.wait_for("step    2/9999")
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for("a checkpoint is saved, run.resume=true goes on")
    job.wait_for("vp_train: exit code 75, requeued after 0 restarts")
    checkpoints = tmp_path / f"job-{job.number}" / "checkpoints"
    saved = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
    job.start_again()
    job.wait_for(f"step {saved + 1:>4}/9999")
    slurm.call("scancel", job.number)
    job.wait_for_state("CANCELLED")
    assert job.said.count("vp-train: stopped after step") == 2  # scancel too leaves time to save


@pytest.mark.slow
def test_the_exit_code_of_a_rank_is_that_of_the_job_and_one_line_says_why(
    slurm, programs, tmp_path
):
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export PATH={programs}:$PATH\n")
    words = (*NANO, f"run.root={tmp_path}", f"run.init_from={tmp_path}")  # holds no checkpoint
    job = slurm.submit(SCRIPT, *words, SETUP=str(setup))
    job.wait_for_state("FAILED")
    assert job.fact("ExitCode") == "78:0"
    said = [line for line in job.said.splitlines() if line.startswith("vp-train: ")]
    assert len(said) == 1


@pytest.mark.slow
def test_one_task_per_rank_is_a_rank(slurm, programs, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/sh\nexec srun {programs}/vp-train "$@"\n')
    words = (*NANO, f"run.root={tmp_path}", "run.steps=2", "run.checkpoint_every=0")
    job = slurm.submit(script, *words, options=("--ntasks-per-node=2",))
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.fact("JobState") == "COMPLETED", job.said
    assert "mesh      4 ranks = dp=2 x pp=2 x tp=1" in job.said
    assert job.said.count("step 2/2") == 1
