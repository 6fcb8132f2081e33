"""Names of the processes of a job, as `ps -o comm` and `top` show them."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_NAME = 15  # linux/prctl.h
_MOST_BYTES = 15


def entitle(title: str) -> None:
    """Give this process a name of at most 15 bytes, on Linux; its later threads have it too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, title.encode()[:_MOST_BYTES])
