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

from vp_train.failures import Ending

PIPE = "VP_TRAIN_ENDING_FD"  # the number of the pipe's end that the rank writes to
_LONGEST = 1 << 16  # bytes of a pipe's line


def leave(ending: Ending, log: Path | None = None) -> NoReturn:
    """Say how this rank ends and end the process at once, without running destructors.

    Destructors of process groups would wait for peers, or abort while their threads still run.
    """
    words = ending.words
    if ending.log and log is not None and (problem := _write(log, ending.log)):
        words = f"{words}\n{log} cannot be written: {problem}\n{ending.log}"
    if not _tell_agent(ending) and words:
        sys.stderr.write(f"{words}\n")  # a single write, so that lines of ranks do not mix
    sys.stderr.flush()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(ending.code)


def _write(log: Path, text: str) -> str:
    """Append `text` to the log.  Returns what went wrong, "" if nothing did."""
    try:
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as file:
            file.write(text)
    except OSError as error:
        return str(error)
    return ""


def _tell_agent(ending: Ending) -> bool:
    """Return whether an agent listens and has been told."""
    number = os.environ.get(PIPE)
    if number is None:
        return False
    line = json.dumps(asdict(ending) | {"log": ""})
    try:
        os.write(int(number), line.encode()[:_LONGEST])
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
