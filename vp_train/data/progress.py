"""Progress of long work on stderr: a live line on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

_SILENT_SECONDS = 10.0  # between two plain lines
_LIVE_SECONDS = 0.25


@contextmanager
def reported(what: str, state: Callable[[], str], shown: bool = True) -> Iterator[None]:
    """Say what is done inside, and its state with the time it took so far; only if `shown`.

    `state` is called in a thread.
    """
    if not shown:
        yield
        return
    if sys.stderr.isatty():
        from rich.console import Console

        status = Console(stderr=True).status(what)

        def show(words: str) -> None:
            status.update(f"{what}: {words}")

        with status, _repeated(_LIVE_SECONDS, show, state):
            yield
        return
    _say(what)
    with _repeated(_SILENT_SECONDS, lambda words: _say(f"{what}: {words}"), state):
        yield


@contextmanager
def _repeated(
    seconds: float, show: Callable[[str], None], state: Callable[[], str]
) -> Iterator[None]:
    """Show the state every so many seconds while the block runs."""
    started, over = time.monotonic(), Event()

    def repeat() -> None:
        while not over.wait(seconds):
            show(f"{state()}, {time.monotonic() - started:.0f} s")

    thread = Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
