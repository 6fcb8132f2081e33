"""A run on Slurm from Python, with submitit (pip install submitit).

    python launch/examples/submitit_run.py --nodes 4 --gpus-per-node 8 --folder logs \
        model=llama3_8b parallel.tp=2 parallel.pp=4 run.device=cuda run.dtype=bfloat16 \
        data=text data.path=text optim.lr=1e-4 run.steps=10000 run.name=first

Every node runs one task, and the task is `vp-train`, which reads its place from SLURM_*.  Before
the time limit and at a preemption submitit calls `checkpoint`, which asks vp-train to save and
leave, and queues the job again.  submitit keeps the task in `--folder` as a pickle: use a directory
that only you may write to.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_STOPPED = 75  # the run was asked to stop, and has saved
_SAVE_SECONDS = 600
_POLL_SECONDS = 0.1


@dataclass
class Train:
    """One node's share of a run: a process of vp-train.

    `command` is put before the overrides.  A run that has a checkpoint goes on from it.
    """

    overrides: Sequence[str]
    command: Sequence[str] = ("vp-train",)
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self) -> int:
        """Train, and return the exit code: 0, 75, or that of SIGTERM before it could save.

        Raises RuntimeError for any other code.
        """
        self.process = subprocess.Popen([*self.command, *self.overrides, "run.resume=true"])
        # submitit calls `checkpoint` in a signal handler, in the midst of this call.  `wait` would
        # keep a lock here that `checkpoint` needs to see the end.
        while (code := self.process.poll()) is None:
            time.sleep(_POLL_SECONDS)
        if code not in (0, _STOPPED, -signal.SIGTERM):
            raise RuntimeError(f"vp-train left with {code}; its last lines say why")
        return code

    def checkpoint(self) -> Any:
        """Let vp-train save and leave, and return what submitit queues next."""
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + _SAVE_SECONDS
            while self.process.poll() is None and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
        return submitit.helpers.DelayedSubmission(Train(self.overrides, self.command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Submit a run, and print the id of its job."""
    import submitit

    parser = argparse.ArgumentParser(description="Submit a run of vp-train to Slurm.")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--cpus-per-task", type=int, default=32)
    parser.add_argument("--minutes", type=int, default=24 * 60)
    parser.add_argument("--partition", default=None)
    parser.add_argument("--folder", default="submitit-logs")
    parser.add_argument("--cluster", default=None, help="slurm, local or debug; found if not given")
    options, overrides = parser.parse_known_args(arguments)
    executor = submitit.AutoExecutor(options.folder, cluster=options.cluster)
    executor.update_parameters(
        name="vp_train",
        nodes=options.nodes,
        tasks_per_node=1,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_task,
        timeout_min=options.minutes,
        slurm_partition=options.partition,
        slurm_signal_delay_s=120,
    )
    print(executor.submit(Train(overrides)).job_id)


if __name__ == "__main__":
    main()
