"""A safeguard that no process outlives the agent that started it.

An agent that is killed cannot stop its ranks.  On Linux the kernel does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "VP_TRAIN_LAUNCHER"  # environment variable of ranks with the agent's process id
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def has_launcher() -> bool:
    """Return whether our agent started this process, not torchrun, Slurm or a shell."""
    return LAUNCHER in os.environ


def die_with_launcher(launcher: int) -> None:
    """Ask the kernel to kill this process when its parent `launcher` dies; call it first.

    Exits at once if the parent is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if launcher != os.getppid():
        sys.stderr.write(
            f"vp-train: the launcher, process {launcher}, is gone; this process ends too\n"
        )
        os._exit(128 + signal.SIGKILL)
