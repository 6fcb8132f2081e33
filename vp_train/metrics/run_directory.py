"""The directory of one run, runs/<name>/: locked while it is in use, never overwritten."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO

from vp_train.config import ConfigError, RunSettings
from vp_train.durable import (
    UnreadableError,
    advising,
    checkpoints_in,
    missing_directories,
    naming,
    open_to_append,
    read_text,
    replace,
)
from vp_train.units import human_bytes

# What a run writes in its directory, apart from single files, which replace what is there.
_FILES = ("LOCK", "metrics.jsonl", "notices.txt")
_DIRECTORIES = ("checkpoints", "tensorboard", "trace", "logs", "profile", "trackers")
_WAY_OUT = "set run.root to a directory where you may write"
_MOST_TRIES = 5  # to lock a file that is removed meanwhile


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


def disk_warning(settings: RunSettings, checkpoint_bytes: int) -> str | None:
    """Return in words that the disk has no room for the checkpoints of a run, None if it has.

    checkpoint_bytes: of one checkpoint.  Those that are there already, and are replaced, count as
    room.
    """
    there = checkpoints_in(settings.checkpoints)
    done = there[-1][0] if there else 0
    num_saves = _num_saves(settings, done)
    num_new = min(num_saves, max(1, settings.keep_checkpoints + 1 - len(there)))
    above = (settings.directory, *settings.directory.absolute().parents)
    try:
        free = shutil.disk_usage(next(path for path in above if path.exists())).free
    except OSError:  # what is wrong with it is said where it is written to
        return None
    if free >= num_new * checkpoint_bytes:
        return None
    return (
        f"{settings.directory} is on a disk with {human_bytes(free)} free, and checkpoints take "
        f"{human_bytes(num_new * checkpoint_bytes)} more ({human_bytes(checkpoint_bytes)} each; "
        f"run.keep_checkpoints={settings.keep_checkpoints}, and one more while it is written); "
        "make room, or set run.root to another disk"
    )


def _num_saves(settings: RunSettings, done: int) -> float:
    """Return how many checkpoints a run writes after step `done`, infinity if that is not known."""
    if settings.checkpoint_minutes > 0:
        return math.inf
    every, steps = settings.checkpoint_every, settings.steps
    if every == 0 or steps <= done:
        return 0
    return steps // every - done // every + (steps % every > 0)


def refuse_running(settings: RunSettings) -> None:
    """Raise ConfigError if another process uses the directory now."""
    if settings.directory.exists():
        with _locked(settings.directory):
            pass


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of directory `path`, and leave no lock file that no run has written to.

    Raises ConfigError like `_acquire`.
    """
    with _acquire(path) as lock:
        yield
        if _is_at(lock, path / "LOCK") and not os.fstat(lock.fileno()).st_size:
            (path / "LOCK").unlink()


@contextmanager
def removed_if_unused(settings: RunSettings) -> Iterator[None]:
    """Remove the directory of a run at the end if nothing was written to it, as of a refused start.

    Those above it are removed too, unless they were there before.
    """
    new = missing_directories(settings.directory)
    try:
        yield
    finally:
        # Where another process uses it, or somebody has removed it, there is nothing to do.
        with suppress(OSError, ConfigError):
            if settings.directory.exists():
                with _locked(settings.directory):
                    _remove_unused(settings.directory, new)


def _remove_unused(path: Path, new: Sequence[Path]) -> None:
    """Remove the directories `new` if `path` has nothing but what `RunDirectory` makes itself.

    The lock of `path` must be held.  Raises OSError.
    """
    if set(os.listdir(path)) <= {"LOCK", "trace"}:
        with suppress(FileNotFoundError):
            (path / "trace").rmdir()
        (path / "LOCK").unlink()
        for directory in new:
            directory.rmdir()


def make_directory(settings: RunSettings) -> None:
    """Make the directory of a run if it is not there.

    Raises OSError with the way out, also where no file can be made in what is there.
    """
    directory = settings.directory
    with advising(directory, _WAY_OUT):
        directory.mkdir(parents=True, exist_ok=True)
    for place in (directory, *(directory / name for name in _DIRECTORIES)):
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            words = f"{os.strerror(errno.EACCES)}; let this user write there, or {_WAY_OUT}"
            raise OSError(errno.EACCES, words, str(place))


class _InUseError(ConfigError):
    """A directory whose lock another process holds."""

    def __init__(self, path: Path, process: str) -> None:
        super().__init__(f"{path} is in use by {process}; wait for it or choose another run.name")
        self.process = process


class TakenError(OSError):
    """A run's directory was removed, and another process uses the one that is there now."""


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
        self._new = missing_directories(self.path)
        make_directory(settings)
        self._texts: dict[str, str] = {}  # by name, to write them again
        self._take()
        refuse_used(settings)
        self.trace.mkdir(exist_ok=True)

    def _take(self) -> None:
        _refuse_others(self.path)
        self._lock = _acquire(self.path)
        self._mark = f"{os.getpid()}\n{secrets.token_hex(8)}\n{_identity(self.path)}\n"
        with naming(self.path / "LOCK"):
            self._lock.truncate(0)
            self._lock.write(self._mark)
            self._lock.flush()

    def forsake(self) -> None:
        """Remove the directory if nothing was written to it: the run does not start."""
        with suppress(OSError):
            _remove_unused(self.path, self._new)

    def hold(self) -> str | None:
        """Make the directory again if somebody has removed it, and return what was lost in words.

        Returns None if it is as it was.  Raises TakenError if another process has made and locked
        it meanwhile, and OSError if it cannot be made.
        """
        place = self.path / "LOCK"
        if _is_at(self._lock, place) or _has_text(place, self._mark):
            return None
        is_gone = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            self.trace.mkdir(exist_ok=True)
            for name, text in list(self._texts.items()):
                self.write(name, text)
        except _InUseError as error:
            words = f"the directory was removed while this run used it, and {error.process} uses it"
            raise TakenError(errno.EBUSY, f"{words} now", str(self.path)) from None
        except ConfigError as error:
            raise OSError(None, str(error), str(self.path)) from None
        if is_gone:
            return f"{self.path} was removed while this run used it; it is made again"
        return f"{place} was removed while this run used it; it is made again"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def notices(self) -> Path:
        return self.path / "notices.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def trace(self) -> Path:
        return self.path / "trace"

    def write(self, name: str, text: str) -> None:
        """Write one text file of the run."""
        self._texts[name] = text
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text)  # which replaces a link, too

    def keep_tokenizer(self, path: Path, config: Mapping[str, object]) -> None:
        """Keep a copy of the text's tokenizer.json, where vp-export and run.init_from look for it.

        config: the content of tokenizer_config.json, which names the token that ends documents.
        """
        self.write("tokenizer.json", path.read_bytes().decode())
        self.write("tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def write_environment(self, warnings: Sequence[str] = ()) -> None:
        """Write env.json: versions, machine, commit, command line, first warnings."""
        packages = ("vp_train", "torch", "megatron-core", "hydra-core", "tokenizers", "numpy")
        program, *words = sys.argv
        if Path(program).name == "__main__.py":  # as a sweep starts its runs; no shell can
            program = "vp-train"
        environment = {
            "command": [program, *words],
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in packages},
            "host": platform.node(),
            "cpus": os.cpu_count(),
            "commit": _commit(),
            "warnings": list(warnings),
        }
        self.write("env.json", json.dumps(environment, indent=1) + "\n")


def is_original(path: Path) -> bool:
    """Return whether a run on this file system has made the directory `path`, or has resumed there.

    A directory that was copied or unpacked is another one than its LOCK says.  Its settings may be
    those of somebody else.
    """
    try:
        lines = read_text(path / "LOCK", follow=False).splitlines()
        return len(lines) == 3 and lines[2] == _identity(path)
    except (OSError, UnreadableError):
        return False


def _identity(path: Path) -> str:
    """Return a word for a directory that a copy of it does not have."""
    return f"directory {path.stat().st_ino}"


def _acquire(path: Path) -> IO[str]:
    """Return the lock file of the directory; the lock is held while the file is open.

    Raises ConfigError if another process holds it.
    """
    place = path / "LOCK"
    for _ in range(_MOST_TRIES):
        try:
            with advising(place, _WAY_OUT):
                file = os.fdopen(open_to_append(place), "a+")
        except UnreadableError as error:
            raise ConfigError(f"{error}; remove it") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            number = file.readline(20).strip()
            file.close()
            process = f"process {number}" if number.isdecimal() else "another process"
            raise _InUseError(path, process) from None
        if _is_at(file, place):
            break  # else somebody has removed it since it was opened
    return file


def _is_at(file: IO[str], place: Path) -> bool:
    """Return whether an open file is the one at `place`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(place))
    except FileNotFoundError:
        return False
    except OSError:  # as of a server that does not answer: nothing says that it is gone
        return True


def _has_text(place: Path, text: str) -> bool:
    """Return whether the file at `place` has this text; inodes of some file systems change."""
    try:
        return read_text(place, follow=False) == text
    except UnreadableError:
        return False


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
