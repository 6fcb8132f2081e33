"""Hashes of the files of a corpus, block by block, and the memory of what was checked.

A corpus of 100 GB takes a minute to hash.  It is hashed when it is prepared and once on every
machine that finds it.  Size, times and inode of its files say whether that was done.  The time
of the last change (ctime) cannot be set back, so a byte that is changed in place is always noticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vp_train.config import ConfigError, printable
from vp_train.data.progress import reported
from vp_train.durable import UnreadableError, open_regular, read_json, replace

BLOCK = 1 << 22  # bytes of a block
DIGITS = 32  # of the hash of a block
_THREADS = 4


def block_hashes(path: Path) -> list[str]:
    """Return the hash of every block of a file.  Raises UnreadableError if it is no regular file.

    Links are not followed.
    """
    with open_regular(path, follow=False) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size

        def digest(start: int) -> str:
            block = os.pread(descriptor, BLOCK, start)  # hashing leaves the interpreter's lock
            return hashlib.blake2b(block, digest_size=DIGITS // 2).hexdigest()

        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            return list(threads.map(digest, range(0, size, BLOCK)))


def check_blocks(path: Path, expected: Sequence[str], way_out: str) -> None:
    """Raise ConfigError, which names file and offset, unless the blocks have the expected hashes.

    `way_out` ends the message.
    """
    try:
        found = block_hashes(path)
    except UnreadableError as error:
        raise ConfigError(f"{error}; {way_out}") from None
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours != theirs:
            raise ConfigError(
                f"{path}: bytes from offset {number * BLOCK:,} to {(number + 1) * BLOCK:,} are not "
                f"what was prepared; {way_out}"
            )
    if len(found) != len(expected):
        raise ConfigError(
            f"{path} has {len(found):,} blocks instead of {len(expected):,}; {way_out}"
        )


def check_once(
    memory: Path, files: Sequence[Path], check: Callable[[], None], progress: bool = False
) -> None:
    """Run `check` unless the directory `memory` remembers it for these files as they are.

    Of several processes one checks, and the others wait for it; with `progress` stderr says so
    where that takes long.  If nothing can be written to
    `memory`, every process checks.  A check of files that change meanwhile is not remembered.
    Raises what `check` raises.
    """
    record = _record(memory, files)
    if _remembered(record) == _identities(files):
        return
    what = f"checking {printable(str(files[0].parent))}, or waiting for who does"
    with reported(what, "{:.0f} s".format, progress, at_once=False):
        _check_alone(record, files, check)


def _check_alone(record: Path, files: Sequence[Path], check: Callable[[], None]) -> None:
    """Run `check` alone, unless another process does meanwhile, and remember it in `record`."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        lock = record.with_suffix(".lock").open("w")
    except OSError:
        check()
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = _identities(files)
        if _remembered(record) != state:  # else another process has checked meanwhile
            check()
            if _identities(files) == state:
                with contextlib.suppress(OSError):
                    replace(record, json.dumps(state))


def _record(memory: Path, files: Sequence[Path]) -> Path:
    """Return where a check of these files of one directory is remembered."""
    place = os.fsencode(os.path.realpath(files[0].parent))
    return memory / f"{hashlib.blake2b(place, digest_size=16).hexdigest()}.json"


def _identities(files: Sequence[Path]) -> list[list[int]]:
    """Return what changes with a file: inode, size, and times of the last write and change."""
    stats = [file.lstat() for file in files]
    return [[stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for stat in stats]


def _remembered(record: Path) -> object:
    try:
        return read_json(record)
    except UnreadableError:
        return None
