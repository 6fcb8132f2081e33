"""No rank outlives its launcher: one that is killed cannot stop them; on Linux the kernel does it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_LAUNCHER = "VP_TRAIN_LAUNCHER"  # its process id, for its ranks
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def announce_launcher() -> None:
    """For the ranks this process is going to start."""
    os.environ[_LAUNCHER] = str(os.getpid())


def die_with_launcher() -> None:
    """The first thing a rank does; it leaves at once if its launcher is gone already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(_LAUNCHER, str(os.getppid())) != str(os.getppid()):
        os._exit(128 + signal.SIGKILL)
