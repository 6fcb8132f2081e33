"""Files of runs and checkpoints: safe to open, bounded to read, and complete or absent on disk.

A directory may come from somebody else.  So a file is opened only if it is a regular file: a
symbolic link could lead elsewhere, and reading a pipe or a device may never end.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# Neither flag exists on every system; without them the check before the open remains.
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC


class NotRegularError(OSError):
    """A symbolic link, directory, pipe, socket or device where a regular file must be."""


def require_regular(path: Path) -> None:
    """Raise NotRegularError unless `path` is a regular file.  Raises OSError if it is absent."""
    _require_regular(path, os.lstat(path).st_mode)


def _require_regular(path: Path, mode: int) -> None:
    for is_kind, words in _KINDS:
        if is_kind(mode):
            raise NotRegularError(f"{path} is {words}, but it must be a regular file")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, and nothing else.

    Raises NotRegularError, and other OSErrors as `open` does.
    """
    require_regular(path)  # because even opening a pipe or a device can have an effect
    return os.fdopen(_descriptor(path, os.O_RDONLY), "rb")


def open_to_append(path: Path) -> int:
    """Return a descriptor that appends to a regular file, which is made if it is absent.

    The file can be read, too.  A new one has the permissions that the umask allows.  Raises OSError
    and NotRegularError.
    """
    if os.path.lexists(path):
        require_regular(path)
    return _descriptor(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)


def open_new(path: Path) -> int:
    """Return a descriptor that writes to a new file, with the permissions that the umask allows.

    Raises OSError, also if there is something at `path`.
    """
    return _descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def _descriptor(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | _SAFE, 0o666)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data` (bytes of one dimension).  Raises OSError."""
    left = memoryview(data)
    while len(left):
        left = left[os.write(descriptor, left[: 1 << 30]) :]  # the system's limit is 2 GiB


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return the contents of a regular file.

    Raises ValueError for a file of more than `most_bytes`, and OSError as `open_regular` does.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} has more than {most_bytes >> 20} MiB, which is too large for it")
    return content


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.  Raises ValueError, also for one that nests too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def shown(value: object) -> str:
    """Return a JSON value from a foreign file for a message: short, and without control codes."""
    try:
        text = json.dumps(value, default=repr)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(text: str) -> str:
    """Return a name or a message from a foreign file: short, and without control codes."""
    return shown(text).strip('"')


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to disk so that they survive a power cut.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to any OSError raised inside.  A failed write does not name its file itself."""
    try:
        yield
    except NotRegularError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_new(path: Path, data: bytes | memoryview) -> None:
    """Write a new file and sync it to disk.  Raises OSError that names it."""
    with naming(path):
        descriptor = open_new(path)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Write a text file so that it is the old one or the new one at any moment.

    A symbolic link at `path` is replaced, not followed.  Raises OSError; the old file is then as it
    was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # what a killed process with the same number has left
    try:
        write_new(temporary, text.encode())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
