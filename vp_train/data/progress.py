"""Progress of long work on stderr: a live line on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, cycle
from threading import Event, Thread

from vp_train.units import human_bytes

_PLAIN_SECONDS = (10.0, 20.0, 40.0, 60.0)  # before the next plain line; the last one stays
_LIVE_SECONDS = (0.25,)


@contextmanager
def reported(
    what: str, state: Callable[[float], str], shown: bool = True, *, at_once: bool = True
) -> Iterator[None]:
    """Say what is done inside, and its state now and then; only if `shown`.

    `state` gets the seconds since the beginning.  It is called in a thread.  Without `at_once` a
    plain line comes only where it takes 10 s.
    """
    if not shown:
        yield
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text  # paths may look like markup

        status = Console(stderr=True).status(Text(what))

        def show(words: str) -> None:
            status.update(Text(f"{what}: {words}"))

        with status, _repeated(_LIVE_SECONDS, show, state):
            yield
        return
    if at_once:
        _say(what)
    with _repeated(_PLAIN_SECONDS, lambda words: _say(f"{what}: {words}"), state):
        yield


def far(done: int, total: int, seconds: float) -> str:
    """Say how far work is that did `done` of `total` bytes in so many seconds.

    `94.2 MiB of 286.1 MiB, 0.4 MiB/s, 8 min left`: the rest is taken to go on as fast.
    """
    words = f"{human_bytes(done)} of {human_bytes(total)}"
    if not 0 < done <= total or seconds <= 0:
        return f"{words}, {seconds:.0f} s"
    left = (total - done) * seconds / done
    return f"{words}, {human_bytes(done / seconds)}/s, {_roughly(left)} left"


def _roughly(seconds: float) -> str:
    """Format seconds for a guess: 75 -> 75 s, 480 -> 8 min, 9000 -> 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3_600:.1f} h"


@contextmanager
def _repeated(
    pauses: Sequence[float], show: Callable[[str], None], state: Callable[[float], str]
) -> Iterator[None]:
    """Show the state after each pause, in seconds, while the block runs; the last one repeats."""
    started, over = time.monotonic(), Event()

    def repeat() -> None:
        for pause in chain(pauses, cycle(pauses[-1:])):
            if over.wait(pause):
                return
            show(state(time.monotonic() - started))

    thread = Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
