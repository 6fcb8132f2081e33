"""The directory of one run, runs/<name>/: locked while it is in use, never overwritten."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import IO

from vp_train.config import ConfigError, RunSettings
from vp_train.durable import UnreadableError, checkpoints_in, naming, open_to_append, replace

# What a run writes in its directory, apart from single files, which replace what is there.
_FILES = ("LOCK", "metrics.jsonl")
_DIRECTORIES = ("checkpoints", "tensorboard", "trace", "logs", "profile")


def refuse_used(settings: RunSettings) -> None:
    """Raise ConfigError if the directory holds a run that is not to be resumed."""
    path = settings.directory
    # The file is empty if a run ended before its first step.  Then there is nothing to lose.
    metrics = path / "metrics.jsonl"
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    used = has_metrics or checkpoints_in(settings.checkpoints)
    if used and not settings.resume:
        raise ConfigError(
            f"{path} already holds a run; "
            "continue it with run.resume=true, or choose another run.name"
        )


def refuse_running(settings: RunSettings) -> None:
    """Raise ConfigError if another process uses the directory now."""
    if settings.directory.exists():
        _acquire(settings.directory).close()


class RunDirectory:
    """The directory `root/name`, whose lock is held as long as the process lives.

    Only rank 0 has one.
    """

    def __init__(self, settings: RunSettings) -> None:
        """Create the directory if needed, and lock it.

        Raises ConfigError if another process uses it, if it holds a run that is not to be resumed,
        or if a symbolic link or a pipe is where the run has a file or folder.
        """
        self.path = settings.directory
        self.path.mkdir(parents=True, exist_ok=True)
        _refuse_others(self.path)
        self._lock = _acquire(self.path)
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        refuse_used(settings)
        self.trace.mkdir(exist_ok=True)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def trace(self) -> Path:
        return self.path / "trace"

    def write(self, name: str, text: str) -> None:
        """Write one text file of the run."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            replace(path, text)  # which replaces a link, too

    def keep_tokenizer(self, path: Path) -> None:
        """Keep a copy of the tokenizer.json that the text made, where vp-export looks for it."""
        self.write("tokenizer.json", path.read_text())

    def write_environment(self) -> None:
        """Write env.json: versions, machine, commit and command line."""
        packages = ("vp_train", "torch", "megatron-core", "hydra-core", "tokenizers", "numpy")
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in packages},
            "host": platform.node(),
            "cpus": os.cpu_count(),
            "commit": _commit(),
        }
        self.write("env.json", json.dumps(environment, indent=1) + "\n")


def _acquire(path: Path) -> IO[str]:
    """Return the lock file of the directory; the lock is held while the file is open.

    Raises ConfigError if another process holds it.
    """
    try:
        file = os.fdopen(open_to_append(path / "LOCK"), "a+")
    except UnreadableError as error:
        raise ConfigError(f"{error}; remove it") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        number = file.read(20).strip()
        file.close()
        process = f"process {number}" if number.isdecimal() else "another process"
        raise ConfigError(
            f"{path} is in use by {process}; wait for it or choose another run.name"
        ) from None
    return file


def _refuse_others(path: Path) -> None:
    """Raise ConfigError if a run in directory `path` would write through a link, or to a pipe."""
    for name in (*_FILES, *_DIRECTORIES):
        place = path / name
        is_right = place.is_file() if name in _FILES else place.is_dir()
        if os.path.lexists(place) and (place.is_symlink() or not is_right):
            what = "a symbolic link" if place.is_symlink() else "of another kind"
            raise ConfigError(
                f"{place} is {what}, and a run writes files and folders of its own; "
                "remove it, or choose another run.root or run.name"
            )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this code, with a + if files differ from it; None if not known."""
    source = Path(__file__).parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
