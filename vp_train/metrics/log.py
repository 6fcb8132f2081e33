"""The metrics of every step, in metrics.jsonl, for TensorBoard and for other writers.

Metrics are worth less than the run: a file that cannot be written is a warning, once, and the run
goes on.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from vp_train.durable import (
    UnreadableError,
    naming,
    open_new,
    open_regular,
    open_to_append,
    replace,
    write_all,
)


class Writer(Protocol):
    """A place where metrics go.  All methods may raise OSError, with the place as its file name."""

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step, or nothing if that fails."""
        ...

    def go_back(self, step: int) -> None:
        """Drop the records after `step`, where the place can do that."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Return when everything is where it belongs.  `failed` says whether the run has."""
        ...


class MetricsLog:
    """A log with one record per step, in metrics.jsonl, for TensorBoard, and in other writers.

    When a run resumes, records of steps after its checkpoint are dropped, so no step appears twice.
    """

    def __init__(
        self, jsonl: Path, tensorboard: Path, last_step: int, others: Iterable[Writer] = ()
    ) -> None:
        """Open the log after `last_step`, the step of the checkpoint; -1 drops step 0 too.

        Raises OSError that names metrics.jsonl if that cannot be opened.
        """
        self._warned: set[str] = set()
        continues = jsonl.exists()
        self._writers: list[Writer] = [_Lines(jsonl, last_step)]
        self._attempt(
            lambda: self._writers.append(_Events(tensorboard, last_step + 1 if continues else None))
        )
        self._writers += others

    def go_back(self, step: int) -> None:
        """Drop the records after `step`.

        A file in which that fails, as on a full disk, gets no more records until the next call: no
        step appears twice.
        """
        for writer in self._writers:
            self._attempt(lambda writer=writer: writer.go_back(step))  # type: ignore[misc]

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record {"step": ..., **values}.

        In metrics.jsonl numbers that are not finite become null, so that every line is JSON.
        """
        for writer in self._writers:
            self._attempt(
                lambda writer=writer: writer.record(step, values),  # type: ignore[misc]
                "steps that it cannot take are missing there",
            )

    def close(self, *, failed: bool = False) -> None:
        """Close the files.  One whose last bytes a disk does not take keeps no other one open.

        `failed` says whether the run has failed.
        """
        for writer in self._writers:
            self._attempt(lambda writer=writer: writer.close(failed=failed))  # type: ignore[misc]
        self._writers = []

    def _attempt(self, action: Callable[[], None], follows: str = "going on without") -> None:
        """Call `action`.  Say once of each file that it cannot be written, and what follows."""
        try:
            action()
        except OSError as error:
            place = str(error.filename or "metrics")
            if place not in self._warned:
                self._warned.add(place)
                warn_unwritten(Path(place), error, follows)


def warn_unwritten(path: Path, error: OSError, follows: str = "going on without") -> None:
    """Say on stderr that a file which a run can do without was not written, and what follows.

    `path` is its name if the error does not have it.
    """
    place, reason = error.filename or path, error.strerror or error
    print(f"{place} cannot be written ({reason}); {follows}", file=sys.stderr, flush=True)


class _Lines:
    """A text file to which a line of JSON per step is appended."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open the file after `last_step`.  Raises OSError that names it."""
        self.path = path
        self._descriptor: int | None = None  # None after a failure
        self._open(last_step)

    def _open(self, last_step: int) -> None:
        with naming(self.path):
            if self.path.exists():
                _drop_after(self.path, last_step)
            self._descriptor = open_to_append(self.path)

    def go_back(self, step: int) -> None:
        self.close()
        try:
            self._open(step)
        except UnreadableError as error:
            raise OSError(None, str(error), str(self.path)) from None

    def record(self, step: int, values: Mapping[str, float]) -> None:
        if self._descriptor is None:
            return
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with naming(self.path):
            self._append(self._descriptor, json.dumps({"step": step, **line}))

    def _append(self, descriptor: int, line: str) -> None:
        status = os.fstat(descriptor)
        if not status.st_nlink:
            raise FileNotFoundError(None, "it was removed", str(self.path))
        try:
            write_all(descriptor, f"{line}\n".encode())
        except OSError:
            os.ftruncate(descriptor, status.st_size)  # a part of the line may be there
            raise

    def close(self, *, failed: bool = False) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with naming(self.path):
                os.close(descriptor)


class _Events:
    """A file of TensorBoard's events.

    torch's SummaryWriter writes in a thread.  When the disk is full the thread dies with a
    traceback, and the run with it, so the records are written here.
    """

    def __init__(self, directory: Path, first_step: int | None) -> None:
        """Make a new file.  TensorBoard forgets what earlier files hold from `first_step` on.

        Raises OSError.
        """
        self._directory = directory
        self._file: FileIO | None = None  # None after a failure
        self._open(first_step)

    def _open(self, first_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory = self._directory
        if directory.is_symlink():
            raise OSError(None, "it is a symbolic link", str(directory))
        directory.mkdir(exist_ok=True)
        host = "".join(char if char.isalnum() else "-" for char in socket.gethostname())
        self.path = directory / f"events.out.tfevents.{time.time():.0f}.{host}.{os.getpid()}.0"
        while os.path.lexists(self.path):  # another log of this process in the same second
            self.path = self.path.with_suffix(f".{int(self.path.suffix[1:]) + 1}")
        self._file = FileIO(open_new(self.path), "wb")
        self._writer = RecordWriter(self._file)
        try:
            self._write(self._file, Event(file_version="brain.Event:2"))
            if first_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._write(self._file, Event(step=first_step, session_log=start))
        except OSError:
            self.close()
            raise

    def go_back(self, step: int) -> None:
        self.close()
        self._open(step + 1)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._file is None:
            return
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._write(self._file, Event(step=step, summary=Summary(value=scalars)))

    def _write(self, file: FileIO, event: Any) -> None:
        event.wall_time = time.time()
        size = os.fstat(file.fileno()).st_size
        try:
            with naming(self.path):
                self._writer.write(event.SerializeToString())
        except OSError:
            os.ftruncate(file.fileno(), size)
            os.lseek(file.fileno(), size, os.SEEK_SET)
            raise

    def close(self, *, failed: bool = False) -> None:
        file, self._file = self._file, None
        if file is not None:
            with naming(self.path):
                file.close()


def _drop_after(jsonl: Path, last_step: int) -> None:
    """Drop the lines after `last_step`.

    The new file replaces the old one by a rename, so that a kill leaves one of the two.
    """
    with open_regular(jsonl, follow=False) as file:
        lines = file.read().decode(errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= last_step]
    replace(jsonl, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity for a line that a kill has cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
