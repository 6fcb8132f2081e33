"""The ranks of one attempt on this machine: how they start, how they end, and what they said.

Every rank is a child of the agent with a process group of its own.  It gets a pipe for the words
with which it ends (`supervision.ending`).  A signal asks a rank to finish its step, to save and to
end; it waits until the rank listens (`supervision.requests`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from vp_train.commands.orphans import LAUNCHER, die_with_launcher
from vp_train.failures import Ending, RankEnd
from vp_train.supervision.ending import PIPE, heard
from vp_train.supervision.requests import SIGNALS, held, is_ignored, pass_on

_MOST_BYTES = 65536  # of the line that a rank leaves; it writes fewer
_REAP_SECONDS = 10.0  # for ranks to go after SIGKILL; one that waits for a driver does not
_POLL_SECONDS = 0.02

# Starts one rank with these variables and the write end of its pipe; returns the process id.
Starter = Callable[[Mapping[str, str], int], int]


def new_process(command: Sequence[str]) -> Starter:
    """Return a starter of ranks that runs `command` in a new process."""

    def start(variables: Mapping[str, str], pipe: int) -> int:
        os.set_inheritable(pipe, True)
        return os.posix_spawn(
            command[0],
            list(command),
            {**os.environ, **variables},
            setpgroup=0,
            setsigmask=held(),
            setsigdef=[number for number in SIGNALS if not is_ignored(number)],
        )

    return start


def search_options() -> list[str]:
    """Return the options of Python with which a new process finds modules where this one does.

    `python -m` would look into the current directory first, where a folder named like a library
    takes the library's place.
    """
    first = sys.path[0] if sys.path else None
    has_current = first is not None and os.path.realpath(first) == os.path.realpath("")
    return [] if has_current else ["-P"]


def forked(body: Callable[[], None]) -> Starter:
    """Return a starter of ranks that are copies of this process; each calls `body`.

    This process must have no other threads.  `body` is to end the process; what follows it is an
    exit with 70.
    """
    gc.collect()
    gc.freeze()  # collections in the ranks would copy the pages of every object

    def start(variables: Mapping[str, str], pipe: int) -> int:
        agent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, held())
        if process := fork():
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            with contextlib.suppress(OSError):  # the child may have done so, or be gone
                os.setpgid(process, process)
            return process
        default_signals()
        _run_child(lambda: os.setpgid(0, 0), lambda: die_with_launcher(agent), _unbuffer)
        os.environ.update(variables)
        _run_child(body)
        os._exit(70)

    return start


def child(body: Callable[[], None]) -> int:
    """Start a copy of this process that ignores what asks an agent to end, and return its id.

    It serves the agent, and must live as long.  It exits with 0 after `body`, with 70 after an
    error, which it prints.
    """
    agent = os.getpid()
    if process := fork():
        return process
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _run_child(lambda: die_with_launcher(agent), body)
    os._exit(0)


def fork() -> int:
    """Fork without what is still to be written in the buffers of both processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def _run_child(*bodies: Callable[[], None]) -> None:
    """Call `bodies`; an error never leaves them, since the stack above is that of the agent."""
    try:
        for body in bodies:
            body()
    except BaseException:
        _fail()


def _fail() -> NoReturn:
    """Print the current error and end this process."""
    import traceback

    traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(70)


def _unbuffer() -> None:
    """Write every line of this process at once, as python -u does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(write_through=True, line_buffering=True)


def default_signals() -> None:
    """Undo the handlers of the agent in a copy of it."""
    for number in SIGNALS:
        if not is_ignored(number):
            signal.signal(number, signal.SIG_DFL)


class LocalRanks:
    """The running ranks of this machine, by their numbers in the job."""

    def __init__(
        self, start: Starter, environments: Mapping[int, Mapping[str, str]], host: str
    ) -> None:
        """Start a rank for each of `environments`, which hold what torchrun would set."""
        self._host = host
        self._processes: dict[int, int] = {}
        self._pipes: dict[int, int] = {}
        self._codes: dict[int, tuple[int, float]] = {}  # and the time of the end
        self._running: set[int] = set()
        self._ended_by_us: set[int] = set()
        self._endings: dict[int, Ending | None] = {}
        try:
            for rank, environment in environments.items():
                self._start(start, rank, environment)
        except BaseException:  # as where the system has no more processes
            self.kill()
            raise

    def _start(self, start: Starter, rank: int, environment: Mapping[str, str]) -> None:
        self._pipes[rank], theirs = os.pipe()
        own = {PIPE: str(theirs), LAUNCHER: str(os.getpid())}
        try:
            self._processes[rank] = start({**environment, **own}, theirs)
        finally:
            os.close(theirs)
        self._running.add(rank)

    @property
    def running(self) -> frozenset[int]:
        return frozenset(self._running)

    def poll(self) -> None:
        """Note which ranks have ended since the last call."""
        for rank in sorted(self._running):
            process, status = os.waitpid(self._processes[rank], os.WNOHANG)
            if process:
                self._note(rank, status)

    def _note(self, rank: int, status: int) -> None:
        self._codes[rank] = os.waitstatus_to_exitcode(status), time.time()
        self._running.discard(rank)

    def request_end(self, number: int) -> None:
        """Ask every rank to finish its step, to save and to end, because signal `number` came."""
        for rank in self._running:
            with contextlib.suppress(ProcessLookupError):
                pass_on(number, self._processes[rank])

    def kill(self) -> list[str]:
        """End the ranks that still run, and whatever any rank has started, and wait for them.

        Returns a sentence about every rank that does not go within some seconds.
        """
        self.poll()
        left = self.running
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process, signal.SIGKILL)
        until = time.monotonic() + _REAP_SECONDS
        self.poll()
        while self._running and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            self.poll()
        stuck = sorted(self._running)
        self._running.clear()
        self._ended_by_us |= set(stuck)
        for rank in left - set(stuck):
            if self._codes[rank][0] == -signal.SIGKILL:
                self._ended_by_us.add(rank)
        self.ends()
        while self._pipes:  # of ranks that were killed, or did not start
            os.close(self._pipes.popitem()[1])
        return [
            f"rank {rank} on {self._host} (process {self._processes[rank]}) has not gone "
            f"{_REAP_SECONDS:g} s after SIGKILL"
            for rank in stuck
        ]

    def ends(self) -> list[tuple[RankEnd, float]]:
        """Return the ends of the ranks that ended by themselves, with their times in seconds."""
        found = []
        for rank, (code, when) in self._codes.items():
            if rank not in self._ended_by_us:
                if rank in self._pipes:
                    self._endings[rank] = _ending(self._pipes.pop(rank))
                found.append((RankEnd(rank, code, self._endings[rank], self._host), when))
        return found


def _ending(pipe: int) -> Ending | None:
    """Return what a rank has left in its pipe, None if it left nothing; close the pipe."""
    os.set_blocking(pipe, False)  # a process that the rank has started may hold the other end
    try:
        return heard(os.read(pipe, _MOST_BYTES))
    except BlockingIOError:
        return None
    finally:
        os.close(pipe)
