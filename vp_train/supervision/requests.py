"""Requests to a run from outside: to save, or to save and leave, at the end of the current step.

A rank learns of a request by a signal, and the first rank also by the clock or by a file.  The
ranks exchange what they know with the health of each step, so that all act after the same step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vp_train.config import RunSettings
from vp_train.failures import EXIT_INTERNAL, EXIT_TIME, Ending

# A request is a number, so that it fits into the message of a step.  The largest one of all ranks
# counts.  _SIGNALS + n is a request to leave by signal n, _PASSED_ON + n by one that the launcher
# of the rank got and passed on.
NOTHING = 0
_SAVE = 1
_TIME_IS_OVER = 2
_STOP_FILE = 3
NO_READER = 4
NO_STORE = 5
_SIGNALS = 100
_PASSED_ON = 200
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# A launcher sends it before a signal that it passes on, so that a rank can say who was asked.
_FROM_LAUNCHER = signal.SIGUSR2
_STARTED = "VP_TRAIN_STARTED"  # environment variable: when the command began, by time.monotonic
_TOGETHER_SECONDS = 0.1  # between the two signals of `pass_on`
_SAME_REQUEST_SECONDS = 1.0  # a terminal and a launcher may both pass on the same Ctrl-C


def start_clock() -> None:
    """Let run.max_minutes of all ranks that this process starts count from now."""
    os.environ.setdefault(_STARTED, str(time.monotonic()))


def leaves(request: int) -> bool:
    """Return whether the run is to leave, not only to save."""
    return request >= _TIME_IS_OVER


def exit_code(request: int) -> int:
    """Return the exit code of a run after a request to leave; a lost store is a failure."""
    return EXIT_INTERNAL if request == NO_STORE else EXIT_TIME


def words(request: int, rank: int, *, spans_nodes: bool = False) -> str:
    """Return what asked for `request`, which `rank` was the first to know, for a message."""
    if request == _TIME_IS_OVER:
        return "run.max_minutes is over"
    if request == NO_READER:
        return "nobody reads the output any more"
    if request == _STOP_FILE:
        return "the file STOP was there"
    if request == NO_STORE:
        return f"the store of the ranks, a process of rank {rank}, was killed"
    if request < _PASSED_ON:
        return f"{signal.Signals(request - _SIGNALS).name} reached rank {rank}"
    launcher = f"the launcher on the node of rank {rank}" if spans_nodes else "the launcher"
    return f"{signal.Signals(request - _PASSED_ON).name} reached {launcher}"


@dataclass(frozen=True, slots=True)
class Interruption:
    """The end of a run before its last step, for a request that all ranks follow.

    reason: in words.
    code: the exit code.
    """

    reason: str
    code: int

    @classmethod
    def of(cls, request: int, rank: int, *, spans_nodes: bool = False) -> Interruption | None:
        """Return the interruption that `request` asks for, None if it asks for none.

        `rank` was the first to know of it.
        """
        if not leaves(request):
            return None
        return cls(words(request, rank, spans_nodes=spans_nodes), exit_code(request))

    def ending(self, step: int, *, is_saved: bool) -> Ending:
        """Return how a run ends that leaves after `step`."""
        saved = (
            "a checkpoint is saved, run.resume=true goes on"
            if is_saved
            else "no checkpoint is saved, for run.checkpoint_every=0"
        )
        words = f"vp-train: stopped after step {step}, because {self.reason}; {saved}"
        return Ending(self.code, words)


def is_ignored(number: int) -> bool:
    """Return whether whoever started this process lets it ignore a signal, as nohup SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


def held() -> tuple[signal.Signals, ...]:
    """Return the signals that a rank keeps back until it listens."""
    return (*SIGNALS, _FROM_LAUNCHER)


def hold_signals() -> None:
    """Keep signals back until `Requests.listen`; call it before the long imports of a rank."""
    signal.pthread_sigmask(signal.SIG_BLOCK, held())


def pass_on(number: int, process: int) -> None:
    """Ask a rank to leave, because its launcher, this process, got signal `number`.

    Raises ProcessLookupError if the rank is gone.
    """
    os.kill(process, _FROM_LAUNCHER)
    os.kill(process, number)


class Requests:
    """What this rank knows of requests.

    `stop_file` and the times of `settings` are for the first rank; pass None and no times on the
    others, see `of_rank`.
    """

    def __init__(
        self,
        stop_file: Path | None = None,
        *,
        max_minutes: float = 0.0,
        checkpoint_minutes: float = 0.0,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        has_lost_store: Callable[[], bool] = lambda: False,
    ) -> None:
        """Count max_minutes from `started`, in seconds of `clock`; by default from now.

        `has_lost_store` returns whether the store has ended that this rank serves for all.
        """
        self._stop_file, self._clock = stop_file, clock
        self._has_lost_store = has_lost_store
        self._max_seconds, self._save_seconds = 60 * max_minutes, 60 * checkpoint_minutes
        self._saved = clock()
        self._started = self._saved if started is None else started
        self._signal, self._signalled = 0, 0.0
        self._is_passed_on = False

    @classmethod
    def of_rank(
        cls, rank: int, settings: RunSettings, has_lost_store: Callable[[], bool] = lambda: False
    ) -> Requests:
        """Return the requests that rank `rank` looks for; only the first one serves a store."""
        if rank:
            return cls()
        return cls(
            settings.directory / "STOP",
            max_minutes=settings.max_minutes,
            checkpoint_minutes=settings.checkpoint_minutes,
            started=float(os.environ.get(_STARTED, time.monotonic())),
            has_lost_store=has_lost_store,
        )

    def listen(self) -> None:
        """Take the SIGNALS as requests to leave.  A second one ends the process."""
        signal.signal(_FROM_LAUNCHER, self._note_launcher)
        for number in SIGNALS:
            if number != signal.SIGHUP or not is_ignored(number):
                signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held())

    def _note_launcher(self, number: int, frame: Any) -> None:
        # Python calls the handlers of two signals that are both pending in the order of numbers.
        is_later = self._signal and self._clock() > self._signalled + _TOGETHER_SECONDS
        self._is_passed_on |= not is_later

    def _note(self, number: int, frame: Any) -> None:
        now = self._clock()
        if not self._signal:
            self._signal, self._signalled = number, now
        elif now > self._signalled + _SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def current(self) -> int:
        """Return what is asked for now: NOTHING, or a request for `leaves` and `words`."""
        now = self._clock()
        if self._signal:
            return (_PASSED_ON if self._is_passed_on else _SIGNALS) + self._signal
        if self._has_lost_store():
            return NO_STORE
        if self._stop_file is not None and self._stop_file.exists():
            return _STOP_FILE
        if 0 < self._max_seconds <= now - self._started:
            return _TIME_IS_OVER
        return _SAVE if 0 < self._save_seconds <= now - self._saved else NOTHING

    def saved(self) -> None:
        """Count the minutes to the next checkpoint from now."""
        self._saved = self._clock()

    def clear(self) -> str:
        """Remove the stop file, so that it does not stop the next run as well.

        Returns a warning if that failed, else "".
        """
        if self._stop_file is not None:
            try:
                self._stop_file.unlink(missing_ok=True)
            except OSError as error:
                return f"\nvp-train: remove {self._stop_file} yourself ({error.strerror})"
        return ""
