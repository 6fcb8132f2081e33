"""The metrics of every step, in metrics.jsonl and for TensorBoard.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vp_train.durable import (
    UnreadableError,
    naming,
    open_new,
    open_regular,
    open_to_append,
    replace,
    write_all,
)


class MetricsLog:
    """A log with one record per step.

    When a run resumes, records of steps after its checkpoint are dropped, so no step appears twice.
    """

    def __init__(self, jsonl: Path, tensorboard: Path, last_step: int) -> None:
        """Open the log after `last_step`, the step of the checkpoint; 0 for a new run.

        Raises OSError that names metrics.jsonl if that cannot be opened.
        """
        self._jsonl, self._tensorboard = jsonl, tensorboard
        self._lines: _Lines | None = None
        self._events: _Events | None = None
        self._warned: set[Path] = set()
        continues = jsonl.exists()
        self._open_lines(last_step)
        self._open_events(last_step + 1 if continues else None)

    def _open_lines(self, last_step: int) -> None:
        """Open metrics.jsonl after `last_step`.  Raises OSError that names it."""
        with naming(self._jsonl):
            if self._jsonl.exists():
                _drop_after(self._jsonl, last_step)
            self._lines = _Lines(self._jsonl)

    def _open_events(self, first_step: int | None) -> None:
        try:
            self._events = _Events(self._tensorboard, first_step)
        except OSError as error:
            self._warn(self._tensorboard, error)

    def go_back(self, step: int) -> None:
        """Drop the records after `step`.

        A file in which that fails, as on a full disk, gets no more records: no step appears twice.
        """
        self.close()
        try:
            self._open_lines(step)
        except OSError as error:
            self._warn(self._jsonl, error)
        except UnreadableError as error:
            self._warn(self._jsonl, OSError(None, str(error), str(self._jsonl)))
        self._open_events(step + 1)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line {"step": ..., **values}.

        Numbers that are not finite become null, so that every line is JSON.
        """
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        if self._lines is not None:
            try:
                self._lines.append(json.dumps({"step": step, **line}))
            except OSError as error:
                self._warn(self._jsonl, error)
        if self._events is not None:
            try:
                self._events.append(step, values)
            except OSError as error:
                self._warn(self._events.path, error)

    def close(self) -> None:
        """Close the files."""
        for file in (self._lines, self._events):
            if file is not None:
                file.close()
        self._lines = self._events = None

    def _warn(self, path: Path, error: OSError) -> None:
        """Say once that a file cannot be written."""
        if path not in self._warned:
            self._warned.add(path)
            warn_unwritten(path, error)


def warn_unwritten(path: Path, error: OSError) -> None:
    """Say on stderr that a file which a run can do without was not written.

    `path` is its name if the error does not have it.
    """
    place, reason = error.filename or path, error.strerror or error
    print(f"{place} cannot be written ({reason}); going on without", file=sys.stderr, flush=True)


class _Lines:
    """A text file to which whole lines are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_to_append(path)

    def append(self, line: str) -> None:
        """Append a line, or nothing if that fails.  Raises OSError."""
        status = os.fstat(self._descriptor)
        if not status.st_nlink:
            raise FileNotFoundError(None, "it was removed", str(self.path))
        try:
            write_all(self._descriptor, f"{line}\n".encode())
        except OSError:
            os.ftruncate(self._descriptor, status.st_size)  # a part of the line may be there
            raise

    def close(self) -> None:
        os.close(self._descriptor)


class _Events:
    """A file of TensorBoard's events.

    torch's SummaryWriter writes in a thread.  When the disk is full the thread dies with a
    traceback, and the run with it, so the records are written here.
    """

    def __init__(self, directory: Path, first_step: int | None) -> None:
        """Make a new file.  TensorBoard forgets what earlier files hold from `first_step` on.

        Raises OSError.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        if directory.is_symlink():
            raise OSError(None, "it is a symbolic link", str(directory))
        directory.mkdir(exist_ok=True)
        host = "".join(char if char.isalnum() else "-" for char in socket.gethostname())
        self.path = directory / f"events.out.tfevents.{time.time():.0f}.{host}.{os.getpid()}.0"
        while os.path.lexists(self.path):  # another log of this process in the same second
            self.path = self.path.with_suffix(f".{int(self.path.suffix[1:]) + 1}")
        self._file = os.fdopen(open_new(self.path), "wb", buffering=0)
        self._writer = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=first_step, session_log=start))

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step, or nothing if that fails.  Raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        size = os.fstat(self._file.fileno()).st_size
        try:
            with naming(self.path):
                self._writer.write(event.SerializeToString())
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            os.lseek(self._file.fileno(), size, os.SEEK_SET)
            raise

    def close(self) -> None:
        self._file.close()


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
