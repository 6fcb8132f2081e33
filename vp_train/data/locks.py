"""Locks of the cache: one process at a time makes a corpus, others make other ones meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vp_train.config import printable
from vp_train.data.progress import reported
from vp_train.durable import advising

_BUILDING = "building-"  # before the name of a corpus
_OLD_BUILDING, _OLD_LOCK = "building", ".lock"  # of versions that made one corpus at a time
_POLITE_SECONDS = 1.0  # after which a process says that it waits
_POLL_SECONDS = 0.02
_LONGEST_NAME = 300  # bytes of a lock that are read
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a failed write does not name its file


@contextmanager
def alone(cache_dir: Path, name: str, progress: bool) -> Iterator[None]:
    """Let one process at a time make the file or directory `name` of the cache.

    A process that waits says for whom on stderr if `progress`.  The lock ends when its process
    ends.  Raises OSError with the way out if nothing can be written there, or the disk gets full.
    """
    with advising(cache_dir, "set data.cache_dir to a directory where you may write"):
        lock = _open(_lock_of(cache_dir, name))
    with lock:
        if not _taken_soon(lock):
            what = (
                f"waiting for {_holder(lock)}, which makes {printable(str(cache_dir / name))} "
                "(another data.cache_dir does not wait)"
            )
            with reported(what, "{:.0f} s".format, progress):
                fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(OSError):  # the disk may be full, which the work itself says better
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            os.fsync(lock.fileno())  # for other nodes
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            words = f"{error.strerror}; make room there, or set data.cache_dir to another place"
            raise OSError(error.errno, words, error.filename or str(cache_dir)) from None
        finally:
            with suppress(OSError):
                lock.truncate(0)


def building_place(path: Path) -> Path:
    """Return the directory in which the corpus `path` is built before it gets its name."""
    return path.with_name(_BUILDING + path.name)


def remove_left(cache_dir: Path) -> None:
    """Remove the half-built corpora that killed processes have left.

    Those whose lock is held are being built.
    """
    left = {
        place: _lock_of(cache_dir, place.name.removeprefix(_BUILDING))
        for place in cache_dir.glob(f"{_BUILDING}*")
    }
    if (place := cache_dir / _OLD_BUILDING).is_dir():
        left[place] = cache_dir / _OLD_LOCK
    for place, file in left.items():
        with suppress(OSError), _open(file) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)


def _lock_of(cache_dir: Path, name: str) -> Path:
    """Return the file whose lock is held by who makes `name`."""
    return cache_dir / "locks" / f"{name}.lock"


def _open(lock: Path) -> IO[bytes]:
    """Open the file of a lock, and keep what its holder has written there."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    return lock.open("a+b", buffering=0)


def _taken_soon(lock: IO[bytes]) -> bool:
    """Take the lock if it is free or becomes so within a moment.  Returns whether it was taken.

    Raises OSError with the way out on a file system without locks.
    """
    until = time.monotonic() + _POLITE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            words = f"{error.strerror}; set data.cache_dir to a file system that has locks (flock)"
            raise OSError(error.errno, words, lock.name) from None
        else:
            return True


def _holder(lock: IO[bytes]) -> str:
    """Return who holds the lock, as its holder wrote."""
    words = os.pread(lock.fileno(), _LONGEST_NAME, 0).decode(errors="replace")
    return printable(words) or "another process"
