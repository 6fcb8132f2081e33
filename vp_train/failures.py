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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vp_train.config import ConfigError, RunSettings

# Exit codes: a job scheduler decides by them whether to start a run again.
EXIT_OK = 0
EXIT_INTERNAL = 70  # a bug, or a peer that died
EXIT_IO = 74  # disk full, directory not writable
EXIT_TIME = 75  # a search ran out of time without a result; a longer one may have one
# Something that the user must change, also a diverging run: starting again cannot help.
EXIT_CONFIG = 78
EXIT_HANG = 124  # a rank did not answer in time

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
)


class SharedFailure(Exception):
    """A failure that all ranks notice together, so that rank 0 alone reports it."""

    exit_code = EXIT_INTERNAL


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process or a job ends: its exit code, and the words for stderr; "" for none."""

    code: int
    words: str


def ending_of_rank(error: BaseException, settings: RunSettings, rank: int, step: int) -> Ending:
    """Return how rank `rank` ends after `error` at step `step`; ConfigError is not for this."""
    if isinstance(error, SharedFailure):
        return Ending(error.exit_code, f"vp-train: {error}" if rank == 0 else "")
    if isinstance(error, BrokenPipeError | SystemExit):  # rich turns the first into the second
        words = f"nobody reads the output any more, stopped at step {step}"
        return Ending(128 + signal.SIGPIPE, f"vp-train: {words}")
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        way_out = "run.resume=true goes on from the newest checkpoint there is"
        words = f"{error}, at step {step}; once that is mended, {way_out}"
        return Ending(EXIT_IO, f"vp-train: {words}")
    if (failure := peer_failure(error, settings)) is not None:
        return Ending(failure.code, f"rank {rank}: stopped at step {step}, {failure.words}")
    text = "".join(traceback.format_exception(error))
    return Ending(EXIT_INTERNAL, f"rank {rank} failed at step {step}\n{text}")


def ending_of_command(error: BaseException, name: str) -> Ending:
    """Return how the command `name` ends after `error`: a line, or a traceback for a bug."""
    if isinstance(error, ConfigError):
        return Ending(EXIT_CONFIG, f"{name}: {error}")
    if isinstance(error, BrokenPipeError):  # a reader like `head` has seen enough
        return Ending(128 + signal.SIGPIPE, "")
    if isinstance(error, OSError):
        return Ending(EXIT_IO, f"{name}: {error}")
    if isinstance(error, KeyboardInterrupt):
        return Ending(128 + signal.SIGINT, "")
    return Ending(EXIT_INTERNAL, "".join(traceback.format_exception(error)).rstrip())


LOST_PEER = Ending(EXIT_INTERNAL, "another rank went away")


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
    words = f"another rank has not answered for {seconds:g} s (run.{setting}); it may hang"
    return Ending(EXIT_HANG, words)


def explain_deaths(
    codes: Mapping[int, int],
    settings: RunSettings,
    record_of: Callable[[int], Path | None],
) -> Ending:
    """Return the exit code of a job and the sentence to print, from the exit codes of its ranks.

    `codes` are those of failed ranks in the order in which they died; -n stands for signal n.
    `record_of` returns the flight recorder's file of a rank if NCCL's watchdog wrote it before an
    abort.  Causes come before consequences, in this order: a rank with an exit code of its own, a
    killed rank, a rank that waited in vain, ranks that only lost a peer, and ranks that torch
    stopped because another one failed.  The sentence is empty if the rank has printed its own.
    """
    own = [code for code in codes.values() if code > 0 and code != EXIT_INTERNAL]
    if own:
        return Ending(own[0], "")
    signals = {rank: signal.Signals(-code) for rank, code in codes.items() if code < 0}
    aborted = [rank for rank, number in signals.items() if number == signal.SIGABRT]
    stopped = [rank for rank, number in signals.items() if number == signal.SIGTERM]  # by torch
    killed = [rank for rank in signals if rank not in aborted and rank not in stopped]
    for rank in () if killed else aborted:
        if (record := record_of(rank)) is not None:
            waited = silent_peer(settings.timeout_seconds, settings)
            words = f"rank {rank} was aborted by NCCL's watchdog: {waited.words}"
            return Ending(waited.code, f"{words}; its last communications: {record}")
    lost_a_peer = EXIT_INTERNAL in codes.values()
    for rank in (*killed, *aborted, *(() if lost_a_peer else stopped)):
        words = f"rank {rank} was killed by signal {signals[rank]:d}; the other ranks were stopped"
        return Ending(128 + signals[rank], words)
    return Ending(EXIT_INTERNAL, "")
