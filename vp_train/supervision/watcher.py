"""The watch over one rank: its heartbeat says where it stands, and its end names the cause."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event
from typing import NoReturn

from torch.distributed import ProcessGroup

from vp_train.communication import flight_recorder
from vp_train.communication.nccl import watch
from vp_train.config import RunSettings
from vp_train.failures import (
    EXIT_HANG,
    LOST_PEER,
    Ending,
    ending_of_rank,
    log_of,
    silent_peer,
)
from vp_train.supervision.ending import leave
from vp_train.supervision.heartbeat import Activity, Heartbeat


class Watcher:
    """Ends this rank with a message when it, or another rank, fails."""

    def __init__(self, settings: RunSettings, rank: int, num_ranks: int) -> None:
        self._settings, self._rank, self._num_ranks = settings, rank, num_ranks
        self._heartbeat, self._started = Heartbeat.of_job(os.environ, rank), time.time()
        self._watches: list[Event] = []
        self._step: Callable[[], int] = lambda: 0
        self._timeout_seconds = settings.world_timeout_seconds  # until all ranks have connected

    def note(self, doing: str, *, waits: bool = False) -> None:
        """Note what the rank does before its steps, and whether it waits for others."""
        self._follow(lambda: Activity(doing, waits))

    def follow(self, step: Callable[[], int], activity: Callable[[], Activity]) -> None:
        """Say from now on the step, and the activity, that these return.

        Ranks wait for each other no longer than run.timeout_seconds then.
        """
        self._timeout_seconds, self._step = self._settings.timeout_seconds, step
        self._follow(activity)

    def _follow(self, activity: Callable[[], Activity]) -> None:
        if self._heartbeat is not None:
            self._heartbeat.follow(activity)

    def watch(self, groups: Sequence[ProcessGroup]) -> None:
        """Watch the NCCL communicators of `groups`."""
        self._watches.append(watch(groups, self._leave_with_nccl))

    def stop(self) -> None:
        """End the watch and the heartbeat."""
        for watched in self._watches:
            watched.set()
        if self._heartbeat is not None:
            self._heartbeat.stop()

    def leave(self, error: BaseException) -> NoReturn:
        """End the process after `error`."""
        self._leave(ending_of_rank(error, self._settings, self._rank, self._step()))

    def _leave_with_nccl(self, error: str) -> None:
        """End the process before torch's NCCL watchdog aborts it."""
        silent = silent_peer(self._timeout_seconds, self._settings)
        failure = silent if error == "TIMEOUT" else LOST_PEER
        record = flight_recorder.file_of(os.environ, self._settings.directory, self._rank)
        last = (
            f"; last communications of rank {self._rank}: {record}"
            if flight_recorder.wait_for(record, self._started)
            else ""
        )
        words = f"rank {self._rank}: stopped at step {self._step()}, {failure.words}{last}"
        self._leave(replace(failure, words=words))

    def _leave(self, ending: Ending) -> NoReturn:
        """End the process; if it has waited in vain, say which rank has not answered."""
        if ending.code == EXIT_HANG and self._heartbeat is not None:
            stall = self._heartbeat.look(self._num_ranks)
            if stall is not None:
                words, log = f"{ending.words}; {stall.words()}", f"{ending.log}\n{stall.table()}"
                ending = replace(ending, words=words, log=log)
        path = log_of(self._settings, self._rank)
        if ending.words and ending.needs_log and str(path) not in ending.words:
            ending = replace(ending, words=f"{ending.words}; log of rank {self._rank}: {path}")
        leave(ending, path)
