"""The last words of a rank: to its log, and to the agent that started it or to the terminal.

An agent gives each of its ranks a pipe.  It gathers what all ranks say and prints one cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from vp_train.config import printable
from vp_train.durable import UnreadableError, open_to_append, write_all
from vp_train.failures import EXIT_INTERNAL, Ending

PIPE = "VP_TRAIN_ENDING_FD"  # the number of the pipe's end that the rank writes to
_LONGEST = 4096  # bytes of a line: a pipe takes as many without waiting, even the smallest


def leave(ending: Ending, log: Path | None = None) -> NoReturn:
    """Say how this rank ends and end the process at once, without running destructors.

    Destructors of process groups would wait for peers, or abort while their threads still run.  So
    would an explicit `destroy_process_group`, and nothing would watch for a peer that never comes.
    """
    prefix = "" if not ending.code or ending.words.startswith("vp-train: ") else "vp-train: "
    said = "" if _tell_agent(ending) or not ending.words else f"{prefix}{ending.words}\n"
    problem = _write(log, ending.log) if ending.log and log is not None else ""
    if problem and ending.needs_log:
        said += f"{log} cannot be written: {printable(problem)}\n"
        if ending.code == EXIT_INTERNAL:  # a bug, whose traceback is nowhere else
            said += f"{ending.log.rstrip()}\n"
    write_stderr(said)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(ending.code)


def write_stderr(text: str) -> None:
    """Write `text` to stderr in a single write, so that lines of processes do not mix.

    Where nobody reads it any more, it is dropped: the exit code must stay what it is.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _write(log: Path, text: str) -> str:
    """Append `text` to the log.  Returns what went wrong, "" if nothing did."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_to_append(log)
        try:
            write_all(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except (OSError, UnreadableError) as error:
        return str(error)
    return ""


def _tell_agent(ending: Ending) -> bool:
    """Return whether an agent listens and has been told."""
    number = os.environ.get(PIPE)
    if number is None:
        return False
    words, line = ending.words, b""
    while not line or len(line) > _LONGEST:
        line = json.dumps(asdict(ending) | {"words": words, "log": ""}).encode()
        words = f"{words[: len(words) // 2]} ..."
    try:
        os.write(int(number), line)
    except OSError:
        return False
    return True


def heard(text: bytes) -> Ending | None:
    """Return the ending that a rank has written into its pipe, None if it wrote none."""
    try:
        values: Any = json.loads(text)
        return Ending(int(values["code"]), str(values["words"]), follows=bool(values["follows"]))
    except (ValueError, KeyError, TypeError):
        return None
