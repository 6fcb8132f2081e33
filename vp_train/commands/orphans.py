"""A safeguard that no rank outlives its launcher.

A launcher that is killed cannot stop its ranks.  On Linux the kernel does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LAUNCHER = "VP_TRAIN_LAUNCHER"  # environment variable with the launcher's process id
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def launching() -> Iterator[None]:
    """Name this process as the launcher of all ranks that are started inside the context."""
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_LAUNCHER]


def has_launcher() -> bool:
    """Return whether our launcher started this process, not torchrun or a shell."""
    return _LAUNCHER in os.environ


def die_with_launcher() -> None:
    """Ask the kernel to kill this rank when its launcher dies; call it first in a rank.

    Exits at once if the launcher is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(_LAUNCHER, str(os.getppid()))
    if launcher != str(os.getppid()):
        sys.stderr.write(
            f"vp-train: the launcher, process {launcher} by ${_LAUNCHER}, is gone; "
            "this rank ends too\n"
        )
        os._exit(128 + signal.SIGKILL)
