"""Writes that survive a power cut, errors that name their file, and reads of files of others.

A directory may come from somebody else.  So a file is read or written only if it is a regular one:
a symbolic link could lead elsewhere, and a pipe or a device may never end.

A checkpoint gets its name by a rename when it is complete.  What has such a name is said here.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_CHECKPOINT = re.compile(r"step-([0-9]{8,12})")
_POINTER = b"version https://git-lfs.github.com/spec/"  # the beginning of a git-LFS pointer
_LARGEST_POINTER = 1 << 10  # bytes
_MOST_UNSYNCED = 1 << 28  # bytes of a file that a disk need not have taken yet
LARGEST_TEXT = 1 << 20  # bytes; the texts that people write by hand have a few thousand


def checkpoint_name(step: int) -> str:
    """Return the name of the directory of checkpoint `step`."""
    return f"step-{step:08d}"


def checkpoint_step(name: str) -> int | None:
    """Return the step of the checkpoint directory with this name, None if it is none."""
    found = _CHECKPOINT.fullmatch(name)
    return None if found is None else int(found[1])


def homes(place: Path) -> tuple[Path, ...]:
    """Return the directories in which the run, import or checkpoint at `place` may keep files.

    A checkpoint lies in an import, or in the directory of a run's checkpoints.
    """
    found = [place]
    if checkpoint_step(place.name) is not None:
        found.append(place.parent)
    if found[-1].name == "checkpoints":
        found.append(found[-1].parent)
    return tuple(found)


def checkpoints_in(directory: Path) -> list[tuple[int, Path]]:
    """Return step and path of all checkpoints in a directory that may be missing, oldest first.

    They may be damaged.  Raises OSError for a directory that cannot be read.
    """
    names: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(directory)  # Path.glob hides errors, and then there seem to be none
    steps = {directory / name: checkpoint_step(name) for name in names}
    return sorted((step, path) for path, step in steps.items() if step is not None)


def way_on(checkpoints: Path) -> str:
    """Return from which step the run with these checkpoints goes on, in words.

    It is not checked that the newest is whole.  What is wrong with the disk is said, not raised.
    """
    try:
        found = checkpoints_in(checkpoints)
    except OSError as error:  # it must not hide what ended the run
        return f"{checkpoints} cannot be read now ({error.strerror})"
    if not found:
        return "there is no checkpoint to go on from"
    return f"run.resume=true goes on after step {found[-1][0]}"


def is_fresh(path: Path, since: float) -> bool:
    """Return whether `path` was written at or after `since`, in seconds of `time.time`."""
    try:
        return path.stat().st_mtime >= since
    except OSError:
        return False


def similar_names(word: str, names: Collection[str], most: int = 1) -> list[str]:
    """Return the names that are spelt like `word`, the likeliest first.

    Of at most three letters one half must be the same, and the first; of longer words more.
    """
    is_short = len(word) <= 3
    same_first = [name for name in names if name[:1] == word[:1]]
    close = difflib.get_close_matches(
        word, same_first if is_short else names, n=most, cutoff=0.5 if is_short else 0.6
    )
    return sorted(close, key=lambda name: name[:1] != word[:1])


def similar_run(path: Path) -> Path | None:
    """Return the run beside `path` whose name is most like that of `path`, None if none is."""
    names = sorted(place.parent.name for place in path.parent.glob("*/config.yaml"))
    close = similar_names(path.name, names)
    return path.parent / close[0] if close else None


def runs_beside(path: Path, most: int) -> list[str]:
    """Return the names of the runs beside `path` that began or resumed last, at most so many."""
    found: list[tuple[float, str]] = []
    for place in path.parent.glob("*/config.yaml"):
        with suppress(OSError):  # somebody may remove it meanwhile
            found.append((place.stat().st_mtime, plain(place.parent.name)))
    return [name for _, name in sorted(found, reverse=True)[:most]]


def meant_run(path: Path) -> str:
    """Return a hint at `similar_run` for a message, empty if there is none."""
    close = similar_run(path)
    return "" if close is None else f" (did you mean {plain(str(close))}?)"


def other_place(path: Path, way_out: str) -> str:
    """Return the way out for a directory that is no run: that of a model is to be imported."""
    if (path / "config.json").is_file():
        words = "it looks like a model of Hugging Face: vp-import"
        return f"{words} {shlex.quote(str(path))} DIRECTORY, and give that"
    return way_out


def missing_directories(path: Path) -> list[Path]:
    """Return which of directory `path` and those above it are not there, the deepest first."""
    return [place for place in (path, *path.parents) if not os.path.lexists(place)]


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
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def advising(path: Path, way_out: str) -> Iterator[None]:
    """Add `path` and the way out to any OSError raised inside."""
    try:
        yield
    except OSError as error:
        words = f"{error.strerror or error}; {way_out}"
        raise OSError(error.errno, words, str(path)) from None


def replace(path: Path, text: str) -> None:
    """Write a text file so that it is the old one or the new one at any moment.

    A symbolic link at `path` is replaced, not followed.  Raises OSError that names it; the old file
    is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        temporary.unlink(missing_ok=True)  # what a killed process with the same number has left
        try:
            write_new(temporary, [text.encode()])
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_output(path: Path, text: str) -> None:
    """Write the text file that a user has named, and make the directories above it.

    It is the old one or the new one at any moment.  Only what is there and no regular file, such as
    /dev/stdout, is written to as it is.  Raises OSError.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text)


def write_new(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a new file from its parts, and sync it to disk.  Raises OSError that names it.

    The disk must have taken what was written before much more is.  So whoever counts the parts sees
    that a slow disk gets on, and the end is no wait for all of a large file.
    """
    with naming(path):
        descriptor = open_new(path)
        num_unsynced = 0
        try:
            for part in parts:
                write_all(descriptor, part)
                num_unsynced += len(part)
                if num_unsynced >= _MOST_UNSYNCED:
                    os.fsync(descriptor)
                    num_unsynced = 0
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_new(path: Path) -> int:
    """Return a descriptor that writes to a new file, with the permissions that the umask allows.

    Raises OSError, also if there is something at `path`.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def open_to_append(path: Path) -> int:
    """Return a descriptor that reads a regular file and appends to it; it is made if it is absent.

    Raises OSError, and UnreadableError if there is something else at `path`.
    """
    if os.path.lexists(path):
        with open_regular(path, follow=False):
            pass
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data` (bytes of one dimension).  Raises OSError."""
    left = memoryview(data)
    while len(left):
        left = left[os.write(descriptor, left[: 1 << 30]) :]  # the system's limit is 2 GiB


class UnreadableError(ValueError):
    """A file that cannot be read as what it should be.  The message names it in one line."""


class PointerError(UnreadableError):
    """What git-LFS leaves in the place of a file.  The message has the way out."""


@contextmanager
def open_regular(path: Path, *, follow: bool = True) -> Iterator[BinaryIO]:
    """Open a file for reading if it is a regular one.

    A FIFO would block, and a device may have no end.  What git keeps in the place of a large file
    is refused, and without `follow` a symbolic link too.  Raises UnreadableError.
    """
    try:
        kind = os.stat(path, follow_symlinks=follow).st_mode
        if stat.S_ISLNK(kind):
            raise UnreadableError(f"{path} is a symbolic link")
        if not stat.S_ISREG(kind):  # opening some devices has effects, so this comes first
            what = "a directory" if stat.S_ISDIR(kind) else "a device, a pipe or a socket"
            raise UnreadableError(f"{path} is {what}, not a file")
        # The file may have been exchanged for a FIFO or a link since.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise UnreadableError(f"{path} is not there") from None
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a null byte in the name
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(f"{path}: {error}") from None
    with file:
        now = os.fstat(file.fileno())
        if not stat.S_ISREG(now.st_mode):
            raise UnreadableError(f"{path} is not a file any more")
        if now.st_size <= _LARGEST_POINTER and os.pread(file.fileno(), len(_POINTER), 0) == (
            _POINTER
        ):
            raise PointerError(
                f"{path} is a git-LFS pointer, not the file itself; run git lfs pull there"
            )
        yield file


def read_bytes(path: Path, most: int = LARGEST_TEXT, *, follow: bool = True) -> bytes:
    """Return the contents of a regular file of at most `most` bytes.  Raises UnreadableError."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            content = b"" if size > most else file.read(most + 1)  # files of /proc have size 0
        except OSError as error:
            raise UnreadableError(f"{path}: {error.strerror or error}") from None
    size = max(size, len(content))
    if size > most:
        raise UnreadableError(f"{path} has {size:,} bytes; at most {most:,} are read")
    return content


def read_text(path: Path, most: int = LARGEST_TEXT, *, follow: bool = True) -> str:
    """Return the text of a small file, without the byte order mark that spreadsheets write.

    Raises UnreadableError if it is not a regular file of at most `most` bytes in UTF-8.
    """
    try:
        return read_bytes(path, most, follow=follow).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path} is not text in UTF-8 (byte {error.start})") from None


def read_json(path: Path, most: int = LARGEST_TEXT, *, follow: bool = True) -> Any:
    """Return the value in a small JSON file.  Raises UnreadableError."""
    text = read_text(path, most, follow=follow)
    try:
        return json.loads(text)
    except RecursionError:
        raise UnreadableError(f"{path} is not JSON that can be read: it is too deep") from None
    except ValueError as error:
        raise UnreadableError(f"{path} is not JSON: {error}") from None


def shown(value: object) -> str:
    """Return a JSON value of a foreign file for a message: short, and without control codes."""
    try:
        text = json.dumps(value, default=repr)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(text: str) -> str:
    """Return a name or a message of a foreign file: short, and without control codes."""
    return shown(text).strip('"')
