"""Where torch's flight recorder leaves the last communications of a rank whose NCCL failed.

The files are pickles: name them, never load them.  torch's `torchfrtrace` reads them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

DUMP_SECONDS = 1.0  # that torch waits for a file; after four times as long it aborts the process
_POLL_SECONDS = 0.2
_PREFIX_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def prefix(directory: Path) -> str:
    """Return what the names of a run's files begin with; a rank number follows."""
    return str((directory / "logs").absolute() / "flight-recorder-rank-")


def file_of(environment: Mapping[str, str], directory: Path, rank: int) -> Path:
    """Return where the recorder of `rank` writes: into the run's directory, or where the user says."""
    given = next((environment[name] for name in _PREFIX_VARIABLES if name in environment), None)
    return Path(f"{given or prefix(directory)}{rank}")


def is_fresh(path: Path, since: float) -> bool:
    """Return whether `path` was written at `since`, in seconds of `time.time`, or later."""
    try:
        return path.stat().st_mtime >= since
    except OSError:
        return False


def wait_for(path: Path, since: float) -> bool:
    """Wait until `path` is written and no longer grows, for as long as torch would; see `is_fresh`."""
    deadline, size = time.monotonic() + 3 * DUMP_SECONDS, -1
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if is_fresh(path, since):
            before, size = size, path.stat().st_size
            if size == before:
                break
    return is_fresh(path, since)
