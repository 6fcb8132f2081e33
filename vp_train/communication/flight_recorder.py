"""The files in which torch's flight recorder leaves the last communications of a failed rank.

torch writes them when NCCL fails.  They are pickles, so this project only names them and never
loads them.  torch's `torchfrtrace` reads them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from vp_train.durable import is_fresh

# torch waits this long for a file; after 4 times as long it aborts the process.  By then a rank has
# waited for its own file and looked for the rank that hangs.
DUMP_SECONDS = 3.0
_POLL_SECONDS = 0.2
_PREFIX_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def prefix(directory: Path) -> str:
    """Return the common prefix of the paths of a run's files; the rank number follows it."""
    return str((directory / "logs").absolute() / "flight-recorder-rank-")


def file_of(environment: Mapping[str, str], directory: Path, rank: int) -> Path:
    """Return the file of `rank`, in the run's directory unless the `environment` names another."""
    given = next((environment[name] for name in _PREFIX_VARIABLES if name in environment), None)
    return Path(f"{given or prefix(directory)}{rank}")


def wait_for(path: Path, since: float) -> bool:
    """Wait until `path` is written and no longer grows, a second longer than torch does.

    Returns `is_fresh(path, since)`.
    """
    deadline, size = time.monotonic() + DUMP_SECONDS + 1.0, -1
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if is_fresh(path, since):
            before, size = size, path.stat().st_size
            if size == before:
                break
    return is_fresh(path, since)
