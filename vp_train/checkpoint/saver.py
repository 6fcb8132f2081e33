"""Writing of checkpoints beside training: a step waits for a copy to host memory only.

A checkpoint is written into a temporary directory, synced to disk, and then renamed.  A process
killed at any moment therefore leaves only complete checkpoints behind.

A save has two phases, and a thread of the rank does the slow part of each: every rank writes its
file, then rank 0 commits.  Threads use no process group.  Between the phases the main threads
exchange hashes and errors, so that all ranks fail or none does.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vp_train.checkpoint.manifest import (
    StoredFile,
    StoredTensor,
    file_name,
    write_manifest,
)
from vp_train.checkpoint.store import CheckpointTensor
from vp_train.checkpoint.stream import Described, header_of, write_tensors
from vp_train.communication.control import ControlGroup
from vp_train.durable import checkpoint_name, checkpoints_in, sync, write_new
from vp_train.failures import EXIT_IO, SharedFailure

_NICENESS = 10  # of the writing thread: a step has about nine tenths of a CPU that both want
_SHARE = 0.05  # of the CPU time of a rank that computes on CPUs, for the writing thread
_WAIT_SECONDS = 0.5  # between two messages of ranks that wait for a save
_CHUNK = 4 << 20  # bytes that are hashed and written at a time


class CheckpointError(SharedFailure, OSError):
    """A failure to write a checkpoint.  Earlier checkpoints are untouched."""

    exit_code = EXIT_IO


class StuckDiskError(CheckpointError):
    """A disk that has taken nothing for so long that the run must end."""


@dataclass(frozen=True, slots=True)
class _Save:
    """A save that is under way: its second phase has begun if `is_committing`.

    work: the thread's part of the phase on this rank.
    """

    step: int
    state: Mapping[str, Any]
    work: Future[Any]
    is_committing: bool = False


class Saver:
    """The saves of one rank.  All methods but `is_ready` and `take_failure` are collective."""

    def __init__(
        self,
        directory: Path,
        group: ControlGroup,
        keep: int,
        *,
        device: str = "cpu",
        patience_seconds: float = math.inf,
    ) -> None:
        """Save below `directory`, and keep the newest `keep` checkpoints.

        `device` is run.device: where the steps compute, wherever the saved tensors are.
        `patience_seconds` is how long to wait for a disk on which no rank gets on.
        """
        self._patience = patience_seconds
        self._directory, self._group, self._keep = directory, group, keep
        self._share = _SHARE if device == "cpu" else None
        self._damaged: frozenset[str] = frozenset()
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_give_way)
        self._copy, self._pace = _HostCopy(), _Pace()
        self._save: _Save | None = None
        self._failure: CheckpointError | None = None

    @property
    def is_ready(self) -> bool:
        """Return whether a save is under way and this rank's part of its phase is done.

        When that is so on all ranks, call `advance`.
        """
        return self._save is not None and self._save.work.done()

    def take_failure(self) -> CheckpointError | None:
        """Return why the newest save failed, the same on all ranks, and forget it."""
        failure, self._failure = self._failure, None
        return failure

    def leave_uncounted(self, damaged: Collection[str]) -> None:
        """Let the checkpoints of these names, which are damaged, push no other ones out."""
        self._damaged |= frozenset(damaged)

    def begin(
        self, step: int, pieces: Mapping[str, CheckpointTensor], state: Mapping[str, Any]
    ) -> None:
        """Begin checkpoint `step`, and return when `pieces` are copied to host memory.

        A save that is under way is finished first.  The `pieces` of all ranks together must cover
        every global tensor exactly once.  `state` must be JSON.
        """
        self.finish()
        _, temporary = _final_and_temporary(self._directory, step)
        made = _done(None)
        if self._group.rank == 0:
            made = self._thread.submit(_attempt, lambda: _make_empty(temporary))
        self._await(made, f"make {temporary}")
        if self._exchange(step, made.result()) is None:
            return
        path = temporary / file_name(self._group.rank)
        tensors = {name: piece.stored for name, piece in pieces.items()}
        error = _attempt(lambda: self._copy.take(pieces))
        self._pace = pace = _Pace(self._share)
        if error is None:
            image = self._copy.image
            work = self._thread.submit(_attempt, lambda: _write(path, image, tensors, pace))
        else:
            work = _done(error)
        self._save = _Save(step, state, work)

    def advance(self) -> None:
        """Go on with the save that is under way, whose phase is done on all ranks."""
        if (save := self._save) is None:
            return
        self._pace.hurry()
        self._save = None
        results = self._exchange(save.step, save.work.result())
        if results is None or save.is_committing:
            return
        files = {file_name(rank): entry for rank, entry in enumerate(results)}
        work = (
            self._thread.submit(_attempt, lambda: self._commit(save, files))
            if self._group.rank == 0
            else _done(None)
        )
        self._save = _Save(save.step, save.state, work, is_committing=True)

    def finish(self) -> None:
        """Return when the save that is under way is complete or has failed on all ranks.

        Raises StuckDiskError on all ranks if no rank gets on for `patience_seconds`.
        """
        self._pace.hurry()
        while (save := self._save) is not None:
            self._save = None
            final, temporary = _final_and_temporary(self._directory, save.step)
            what = f"complete {final}" if save.is_committing else f"write its file in {temporary}"
            self._await(save.work, what)
            self._save = save
            self.advance()

    def _await(self, work: Future[Any], what: str) -> None:
        """Return when `work` is done on all ranks; `what` says in words what it does.

        The ranks exchange messages while they wait.  So a slow disk does not look like a rank that
        hangs, and a rank that hangs is found after the timeout of the group.  Raises StuckDiskError
        on all ranks; the thread that works cannot be stopped.
        """
        before: list[Any] = []
        since = time.monotonic()
        while True:
            done, _ = wait([work], _WAIT_SECONDS)
            is_late = time.monotonic() - since > self._patience  # the first rank's clock counts
            told = self._group.all_gather_json((bool(done), self._pace.chunks, is_late))
            stuck = [rank for rank, (is_done, *_) in enumerate(told) if not is_done]
            if not stuck:
                return
            now = [entry[:2] for entry in told]
            if now != before:
                before, since = now, time.monotonic()
            elif told[0][2]:
                more = f" (and {len(stuck) - 1} more)" if len(stuck) > 1 else ""
                raise StuckDiskError(
                    f"rank {stuck[0]}{more} could not {what}: the disk has taken nothing for "
                    f"{self._patience:g} s (run.world_timeout_seconds)"
                )

    def _exchange(self, step: int, value: Any) -> list[Any] | None:
        """Return the values of all ranks.  A string is an error: return None and keep it."""
        gathered = self._group.all_gather_json(value)
        for rank, result in enumerate(gathered):
            if isinstance(result, str):
                self._failure = CheckpointError(
                    f"rank {rank} could not write the checkpoint of step {step}: {result}"
                )
                if self._group.rank == 0:  # frees space on a full disk
                    temporary = _final_and_temporary(self._directory, step)[1]
                    shutil.rmtree(temporary, ignore_errors=True)
                return None
        return gathered

    def _commit(self, save: _Save, files: Mapping[str, Any]) -> None:
        final, temporary = _final_and_temporary(self._directory, save.step)
        _commit(save.step, save.state, files, temporary, final)
        damaged = self._damaged - {final.name}  # a save replaces a damaged one of its step
        self._damaged = damaged
        left = _attempt(lambda: _retain(self._directory, save.step, self._keep, damaged))
        if left is not None:
            print(
                f"{final} is complete, but older checkpoints could not be removed: {left}",
                file=sys.stderr,
                flush=True,
            )


def set_aside(directory: Path, name: str) -> Path | None:
    """Rename a checkpoint whose bytes were altered, and return its new path.

    It is then no checkpoint for any later process: it is not resumed from, not counted and not
    removed.  Returns None where it cannot be renamed.
    """
    path = directory / name
    aside = path.with_name(f"{name}.damaged")
    try:
        if os.path.lexists(aside):  # an earlier one of the same step
            _remove(aside)
        path.rename(aside)
        sync(directory)
    except OSError:
        return None
    return aside


def save(
    directory: Path,
    step: int,
    pieces: Mapping[str, CheckpointTensor],
    state: Mapping[str, Any],
    group: ControlGroup,
    keep: int,
) -> Path:
    """Write a checkpoint as a `Saver` does, wait until it is complete, and return its path.

    Collective over `group`.  Raises CheckpointError on all ranks if any rank could not write.
    """
    saver = Saver(directory, group, keep)
    saver.begin(step, pieces, state)
    saver.finish()
    if (failure := saver.take_failure()) is not None:
        raise failure
    return _final_and_temporary(directory, step)[0]


def save_stream(
    directory: Path,
    step: int,
    described: Sequence[Described],
    tensors: Iterable[Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write checkpoint `step` from a single process and return its path.

    Only one of `tensors` is in memory at a time.  They must match `described` in order, shape and
    dtype.
    """
    final, temporary = _final_and_temporary(directory, step)
    path = temporary / file_name(0)
    _make_empty(temporary)
    write_tensors(path, described, tensors)
    stored = {
        tensor.name: StoredTensor(str(tensor.dtype).removeprefix("torch."), tensor.shape)
        for tensor in described
    }
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    entry = StoredFile(path.stat().st_size, digest, stored)
    _commit(step, state, {path.name: entry.as_json()}, temporary, final)
    return final


class _HostCopy:
    """The bytes of a rank's file, in host memory that all saves of a run use."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = 0
        self._is_registered = False  # the buffer, with CUDA
        self._side: torch.cuda.Stream | None = None

    @property
    def image(self) -> memoryview:
        """All bytes of the file."""
        return self._buffer[: self._num_bytes].numpy().data

    @torch.no_grad()
    def take(self, pieces: Mapping[str, CheckpointTensor]) -> None:
        """Copy `pieces`, and return when they may change.

        Raises ValueError for a dtype that the file cannot hold, and RuntimeError if there is too
        little memory.
        """
        # Wide elements come first, so that every tensor begins at a multiple of its element size.
        tensors = {
            name: piece.tensor.detach()
            for name, piece in sorted(
                pieces.items(), key=lambda item: -item[1].tensor.dtype.itemsize
            )
        }
        described = [
            Described(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
        ]
        header = header_of(described)
        self._num_bytes = len(header) + sum(entry.num_bytes for entry in described)
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        self._reserve(self._num_bytes, pinned=device is not None)
        self.image[: len(header)] = header
        if device is None:
            self._fill(described, tensors, len(header))
            return
        self._side = self._side or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            self._fill(described, tensors, len(header))
        self._side.synchronize()

    def _fill(
        self, described: Sequence[Described], tensors: Mapping[str, Tensor], start: int
    ) -> None:
        for entry in described:
            place = self._buffer[start : start + entry.num_bytes]
            start += entry.num_bytes
            if entry.num_bytes:
                place.view(entry.dtype).view(entry.shape).copy_(
                    tensors[entry.name], non_blocking=True
                )

    def _reserve(self, num_bytes: int, *, pinned: bool) -> None:
        """Make the buffer large enough.

        It is registered with CUDA, since torch's own pinned memory has a power of two of bytes.
        Where the system allows no more pinned memory, copies are slower but right.
        """
        if len(self._buffer) >= num_bytes:
            return
        # Nothing uses the old buffer: a save begins only when the one before is complete.
        pins = pinned or self._is_registered
        runtime: Any = torch.cuda.cudart() if pins else None  # type: ignore[no-untyped-call]
        if self._is_registered:
            runtime.cudaHostUnregister(self._buffer.data_ptr())
            self._is_registered = False
        self._buffer = torch.empty(0, dtype=torch.uint8)  # frees it before the next is allocated
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if not pinned:
            return
        self._is_registered = not int(
            runtime.cudaHostRegister(self._buffer.data_ptr(), num_bytes, 1)
        )
        if not self._is_registered:
            # CUDA keeps the error for the next launch that asks, so let one ask that may fail.
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")


def _give_way() -> None:
    """Give this thread a lower priority on the CPUs.  Only Linux has priorities of threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def _done(result: Any) -> Future[Any]:
    """Return a future that has this result."""
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def _attempt(work: Callable[[], Any]) -> Any:
    """Return the result of `work`, or the text of the exception that it raised."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class _Pace:
    """Keeps a thread to a share of its process's CPU time, until somebody waits for it.

    On CPUs the passes need the CPUs themselves.  A low priority is not enough: each rank has
    its own thread, and what one of them takes makes all ranks wait.
    """

    def __init__(self, share: float | None = None) -> None:
        """Begin to count.  Without `share` the thread never rests."""
        self._share, self._hurry = share, threading.Event()
        self._begin, self._used = time.process_time(), 0.0
        self.chunks = 0  # that were written

    def hurry(self) -> None:
        """Let the thread rest no more."""
        self._hurry.set()

    def rest(self, used: float) -> None:
        """Return when the thread is within its share.

        It has just written a chunk, which took it `used` seconds of CPU time.
        """
        self.chunks += 1
        self._used += used
        while self._share is not None and not self._hurry.is_set():
            if self._used <= self._share * (time.process_time() - self._begin):
                return
            self._hurry.wait(0.01)


def _write(
    path: Path, image: memoryview, tensors: Mapping[str, StoredTensor], pace: _Pace
) -> dict[str, Any]:
    """Write this rank's file, and return its entry in the manifest.

    The hash is that of memory, so it also covers the way to the disk.  Hashing and writing do not
    hold the interpreter's lock, which a step needs.
    """
    digest = hashlib.blake2b()

    def chunks() -> Iterator[memoryview]:
        for start in range(0, len(image), _CHUNK):
            before = time.thread_time()
            chunk = image[start : start + _CHUNK]
            digest.update(chunk)
            yield chunk
            pace.rest(time.thread_time() - before)

    write_new(path, chunks())
    return StoredFile(len(image), digest.hexdigest(), tensors).as_json()


def _final_and_temporary(directory: Path, step: int) -> tuple[Path, Path]:
    """Return where checkpoint `step` ends up, and where it is written before the rename."""
    name = checkpoint_name(step)
    return directory / name, directory / f".writing-{name}"


def _make_empty(directory: Path) -> None:
    if directory.parent.is_symlink():
        raise OSError(f"{directory.parent} is a symbolic link; checkpoints are not written there")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _commit(
    step: int, state: Mapping[str, Any], files: Mapping[str, Any], temporary: Path, final: Path
) -> None:
    """Write the manifest, sync, and rename the checkpoint to its final name."""
    write_manifest(temporary, step, state, files)
    sync(temporary)
    if os.path.lexists(final):  # a run that resumed from an earlier step reached this step again
        _remove(final)
    temporary.rename(final)
    sync(final.parent)


def _retain(directory: Path, step: int, keep: int, damaged: Collection[str]) -> None:
    """Remove what is older than the newest `keep` checkpoints, and what killed processes left.

    Checkpoints of steps after `step` were passed over as damaged when the run began.  They are
    neither counted nor removed.  Those with a name in `damaged` are not counted.
    """
    for stray in (*directory.glob(".writing-*"), *directory.glob(".removing-*")):
        shutil.rmtree(stray, ignore_errors=True)
    upto = [entry for entry in checkpoints_in(directory) if entry[0] <= step]
    counted = [entry for entry in upto if entry[1].name not in damaged]
    for entry in upto:
        if entry < counted[-keep:][0]:
            _remove(entry[1])


def _remove(path: Path) -> None:
    """Remove a checkpoint.  It is renamed first, since a half-deleted one must not look valid."""
    doomed = path.with_name(f".removing-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    if doomed.is_symlink():
        doomed.unlink()
    else:
        shutil.rmtree(doomed)
