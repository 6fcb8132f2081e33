"""No rank outlives its launcher: one that is killed cannot stop them; on Linux the kernel does it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LAUNCHER = "VP_TRAIN_LAUNCHER"  # its process id, for its ranks
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def launching() -> Iterator[None]:
    """Ranks started inside know this process as their launcher."""
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_LAUNCHER]


def has_launcher() -> bool:
    """Return whether our launcher started this process, not torchrun or a shell."""
    return _LAUNCHER in os.environ


def die_with_launcher() -> None:
    """The first thing a rank does; it leaves at once if its launcher is gone already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(_LAUNCHER, str(os.getppid()))
    if launcher != str(os.getppid()):
        sys.stderr.write(
            f"vp-train: the launcher, process {launcher} by ${_LAUNCHER}, is gone; so is this rank\n"
        )
        os._exit(128 + signal.SIGKILL)
