"""The exit codes of a run, and the exit code and sentence for a lost, silent or dead rank.

Peers that fail are recognised by the messages of gloo, of torch's store and of NCCL.
`tests/test_failures.py` has samples of these messages.
"""

from __future__ import annotations

import errno
import math
import re
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vp_train.config import ConfigError, RunSettings, printable
from vp_train.durable import way_on

# Exit codes: a job scheduler decides by them whether to start a run again.  `docs/reliability.md`
# has them as a table.
EXIT_OK = 0
EXIT_INTERNAL = 70  # a bug, a lost node, or a lost process that is no rank
EXIT_IO = 74  # a file that cannot be written, or that the disk does not give back
# Stopped on request with a checkpoint: start it again.  Also a search that ran out of time without
# a result; a longer one may have one.
EXIT_TIME = 75
# Something that the user must change: what was typed, a file that it names, a run that diverges.
# Starting again cannot help.
EXIT_CONFIG = 78
EXIT_HANG = 124  # a rank did not answer in time
# 128 + n, as in a shell: signal n ended the command, or one of its ranks.

# A peer went away.  Its own message has the reason.
_LOST = (
    "Connection closed by peer",  # gloo
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Connection was likely closed",  # the store
    "NCCL communicator was aborted",
    "Communicator was aborted",
    "ncclRemoteError",
    "remote process exited or there was a network error",
)
# A peer did not answer in this time.
_WAITED = (
    (re.compile(r"Timed out waiting (\d+)ms"), 1000),  # gloo
    (re.compile(r"wait timeout after (\d+)ms"), 1000),  # the store
    (re.compile(r"Timed out after (\d+) seconds waiting for clients"), 1),
    (re.compile(r"Watchdog caught collective operation timeout: .*Timeout\(ms\)=(\d+)"), 1000),
)
# After a timeout gloo closes the connection, and all other waits on it get only this message.
_CLOSED_BY_TIMEOUT = "Application timeout caused pair closure"


# Errors of the file system that the user can repair.
_UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.EISDIR,  # a folder in the place of a file
    errno.EBUSY,  # a run's directory that another process has taken
)


class SharedFailure(Exception):
    """A failure that all ranks notice together, so that rank 0 alone reports it."""

    exit_code = EXIT_INTERNAL


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process or a job ends.

    words: at most ten lines for stderr; "" for none.  Control characters are escaped.
    log: what goes into the log of the rank, such as a traceback.
    follows: whether the failure only follows from that of another rank.
    """

    code: int
    words: str
    log: str = ""
    follows: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", "\n".join(map(printable, self.words.split("\n"))))

    @property
    def needs_log(self) -> bool:
        """Return whether to name the log.

        Not for a full disk, whose line says all, nor for a lost peer, whose traceback says nothing
        new.
        """
        return bool(self.log) and self.code != EXIT_IO and not self.follows


@dataclass(frozen=True, slots=True)
class RankEnd:
    """The end of one rank as its launcher sees it.

    code: the exit code; -n stands for signal n, which somebody else than the launcher has sent.
    ending: what the rank said of its end, None if it could say nothing.
    """

    rank: int
    code: int
    ending: Ending | None = None
    host: str = ""

    @property
    def name(self) -> str:
        """The rank, and the host that it was on if that is known."""
        return f"rank {self.rank}" + (f" on {self.host}" if self.host else "")


def log_of(settings: RunSettings, rank: int) -> Path:
    """Return the file with the traceback of a rank that has failed."""
    return settings.directory / "logs" / f"rank-{rank}.log"


_MOST_CHARACTERS = 400  # of the message of an exception; the log has it whole


def ending_of_rank(error: BaseException, settings: RunSettings, rank: int, step: int) -> Ending:
    """Return how rank `rank` ends after `error` at step `step`; ConfigError is not for this."""
    if isinstance(error, SharedFailure):
        way = f"; {way_on(settings.checkpoints)}" if error.exit_code == EXIT_IO else ""
        return Ending(error.exit_code, f"vp-train: {error}{way}" if rank == 0 else "")
    if isinstance(error, BrokenPipeError):  # a line of the start; later ones are a request to leave
        words = f"nobody reads the output any more, stopped at step {step}"
        return Ending(128 + signal.SIGPIPE, f"vp-train: {words}")
    log = "".join(traceback.format_exception(error))
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = f", at step {step}" if step else ""
        words = f"{_os_words(error)}{where}; {way_on(settings.checkpoints)}"
        return Ending(EXIT_IO, f"vp-train: {words}", log)
    if (failure := peer_failure(error, settings)) is not None:
        words = f"rank {rank}: stopped at step {step}, {failure.words}"
        return replace(failure, words=words, log=log)
    way_out = _MEMORY_ADVICE if _is_out_of_memory(error) else ""
    words = f"rank {rank} failed at step {step}: {_in_one_line(error)}{_place_of(error)}{way_out}"
    return Ending(EXIT_INTERNAL, f"{words}; its traceback: {log_of(settings, rank)}", log)


def _os_words(error: OSError) -> str:
    """Return the file and what is wrong with it, where the error has both."""
    has_place = isinstance(error.filename, str) and error.strerror and not error.filename2
    return f"{error.filename}: {error.strerror}" if has_place else str(error)


_MEMORY_ADVICE = (
    "; vp-plan with the same settings says what every rank keeps, and a smaller micro_batch_size "
    "or parallel.recompute=full keeps less"
)


def _is_out_of_memory(error: BaseException) -> bool:
    is_torch = type(error).__name__ == "OutOfMemoryError"  # this module does without torch
    return is_torch or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"something called sys.exit({error.code!r})"
    said = " ".join(str(error).split())
    said = said if len(said) <= _MOST_CHARACTERS else f"{said[:_MOST_CHARACTERS]}..."
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _place_of(error: BaseException) -> str:
    """Return the last line of this package that `error` went through, in words."""
    ours = f"{Path(__file__).parent.name}/"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        _, package, file = frame.filename.rpartition(f"/{ours}")
        if package:
            return f" (in {frame.name}, {ours}{file}:{frame.lineno})"
    return ""


def ending_of_command(error: BaseException, name: str) -> Ending:
    """Return how the command `name` ends after `error`: a line, or a traceback for a bug."""
    if isinstance(error, ConfigError):
        return Ending(EXIT_CONFIG, f"{name}: {error}")
    if isinstance(error, BrokenPipeError):  # a reader like `head` has seen enough
        return Ending(128 + signal.SIGPIPE, "")
    if isinstance(error, OSError):
        return Ending(EXIT_IO, f"{name}: {_os_words(error)}")
    if isinstance(error, KeyboardInterrupt):
        words = f"{name}: {error}" if str(error) else ""
        return Ending(128 + signal.SIGINT, words)
    return Ending(EXIT_INTERNAL, "".join(traceback.format_exception(error)).rstrip())


LOST_PEER = Ending(EXIT_INTERNAL, "another rank went away", follows=True)


def peer_failure(error: BaseException, settings: RunSettings) -> Ending | None:
    """Return the failure of another rank that `error` is about, or None if it is about none."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if any(words in text for words in _LOST):
        return LOST_PEER
    for pattern, per_second in _WAITED:
        if found := pattern.search(text):
            return silent_peer(int(found[1]) / per_second, settings)
    if _CLOSED_BY_TIMEOUT in text:
        return silent_peer(settings.timeout_seconds, settings)
    return None


def silent_peer(seconds: float, settings: RunSettings) -> Ending:
    """Return the failure of a peer that has not answered for `seconds`.

    Its words name the timeout setting that is over.
    """
    is_of_step = math.isclose(seconds, settings.timeout_seconds, abs_tol=0.01)
    setting = "timeout_seconds" if is_of_step else "world_timeout_seconds"
    words = f"another rank has not answered for {seconds:g} s (run.{setting})"
    return Ending(EXIT_HANG, words)


def root_cause(
    ends: Sequence[RankEnd],
    settings: RunSettings,
    record_of: Callable[[int], Path | None] = lambda rank: None,
    advice: Callable[[], str] = str,
) -> Ending:
    """Return how a job ends whose ranks ended as `ends` says, in the order in which they died.

    Leave out ranks that the launcher itself has killed.  `record_of` returns the flight recorder's
    file of a rank if NCCL's watchdog wrote it before it aborted the rank.  `advice` is called
    only where a rank was killed, and what it returns is added.  Causes come before consequences:
    what a rank found wrong, a rank that was killed, one that raised or crashed, one that left too
    early, one that waited in vain, one that NCCL's watchdog aborted, and ranks that only lost
    another one.
    """
    failed = [end for end in ends if end.code]
    own = [end for end in failed if end.code > 0 and not _follows(end)]
    found = [end for end in own if end.code not in (EXIT_HANG, EXIT_INTERNAL)]
    aborted = [end for end in failed if end.code == -signal.SIGABRT]
    killed = [end for end in failed if end.code in (-signal.SIGKILL, -signal.SIGTERM)]
    raised = [end for end in own if end.code == EXIT_INTERNAL]
    crashed = [end for end in failed if end.code < 0 and end not in (*aborted, *killed)]
    early = [end for end in ends if not end.code] if failed else []
    hung = [end for end in own if end.code == EXIT_HANG]
    if found:  # all ranks may have found the same, and only one of them says it
        same = [end for end in found if end.code == found[0].code]
        return Ending(same[0].code, next(filter(None, map(_words_of, same)), ""))
    if killed:
        return _killed(killed[0], advice)
    if early and not raised and not crashed:
        words = "left with code 0 while others still ran; something in it called exit"
        return Ending(EXIT_INTERNAL, f"{early[0].name} {words}")
    for end in failed:  # a rank may crash as it leaves after another has raised
        if end in crashed:
            return _killed(end, advice)
        if end in raised:
            return Ending(end.code, _words_of(end))
    for end in hung:
        return Ending(end.code, _words_of(end))
    for end in aborted:
        if (record := record_of(end.rank)) is not None:
            waited = silent_peer(settings.timeout_seconds, settings)
            words = f"{end.name} was aborted by NCCL's watchdog: {waited.words}"
            return Ending(waited.code, f"{words}; last communications of rank {end.rank}: {record}")
    if aborted:
        return _killed(aborted[0], advice)
    if failed:
        return Ending(failed[0].code, _words_of(failed[0]))
    return Ending(EXIT_OK, next(filter(None, map(_words_of, ends)), ""))


def _follows(end: RankEnd) -> bool:
    """Return whether a rank failed only because another one did, as far as one can tell."""
    return end.code == EXIT_INTERNAL if end.ending is None else end.ending.follows


def _words_of(end: RankEnd) -> str:
    return "" if end.ending is None else end.ending.words


def _killed(end: RankEnd, advice: Callable[[], str]) -> Ending:
    words = [f"{end.name} {end_of_process(end.code)}", "the other ranks were stopped", advice()]
    return Ending(128 - end.code, "; ".join(filter(None, words)))


def end_of_process(code: int) -> str:
    """Return how a process with this exit code has ended, -n after signal n, as a predicate."""
    if code >= 0:
        return f"left with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # between SIGRTMIN and SIGRTMAX
        name = f"signal {-code}"
    why = " (somebody, or the kernel as memory ran out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{why}"
