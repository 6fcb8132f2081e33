"""What a long search shows on stderr, and what Ctrl-C does to it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from schedules.generators.auto import SoFar
from schedules.render import duration
from vp_train.failures import EXIT_OK
from vp_train.units import count_words, human_bytes

_SILENT_SECONDS = 2.0  # a search that ends within them shows nothing
# Seconds between two lines of progress, by whether stderr is a terminal.
_EVERY_SECONDS = {True: 0.2, False: 10.0}
_LOOK_SECONDS = 0.2  # between two looks at the clock while something goes on
_STOPPING = b"\nstopping with the best so far; Ctrl-C again leaves at once\n"


class Searching:
    """The progress of a search: a line that replaces itself on a terminal, else one now and then.

    The first Ctrl-C inside only asks the search to end with its best so far, which `is_stopped`
    says; another one raises KeyboardInterrupt.  With `keeps_best=False` the first one does.  Only
    `work_on` starts a thread, and none is left afterwards, so that a launcher may fork.
    """

    def __init__(self, *, keeps_best: bool = True) -> None:
        self.is_stopped = False
        self._keeps_best = keeps_best
        self._live: Live | None = None
        self._started = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._next = self._started + _SILENT_SECONDS
        self._handles = False
        self._words, self._lock = "", threading.Lock()
        self._tried = self._tried_before = 0  # orders: in this search, and in those before it
        self._ended = threading.Event()
        self._clock: threading.Thread | None = None

    def __enter__(self) -> Self:
        # Not under nohup or a launcher, which have their own way with signals.
        if self._keeps_best and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._handles = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._ended.set()
        if self._clock is not None:
            self._clock.join()
        if self._live is not None:
            self._live.stop()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_stopped:
            raise KeyboardInterrupt
        self.is_stopped = True
        os.write(2, _STOPPING)

    @property
    def exit_code(self) -> int:
        """The exit code of a command that has shown the result of this search."""
        return 128 + signal.SIGINT if self.is_stopped else EXIT_OK

    @property
    def words(self) -> list[str]:
        """A line on a result that is not the end of the search; nothing else."""
        if not self.is_stopped:
            return []
        return ["", "the search was stopped: this is the best so far, a whole search may find more"]

    def show(self, words: str) -> bool:
        """Show what the search has found if it is time to; return whether it goes on."""
        self._words = words
        self._show()
        return not self.is_stopped

    def work_on(self, words: str) -> None:
        """Show what goes on until something else does, also if that says nothing for long."""
        self.show(words)
        if self._clock is None:
            self._clock = threading.Thread(target=self._remind, daemon=True)
            self._clock.start()

    def print(self, text: str) -> None:
        """Print text to stdout, before which the line of progress disappears from a terminal."""
        if not text:
            return
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
            print(text, flush=True)

    def _remind(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self._show()

    def _show(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _EVERY_SECONDS[self._is_terminal]
            line = f"{now - self._started:.0f} s: {self._words}"
            if self._is_terminal:
                self._redraw(line)
            else:
                print(line, file=sys.stderr, flush=True)

    def watch(self, state: SoFar) -> bool:
        """Show the state of a search of schedule=auto; return whether it goes on.

        Of several searches in a row, all orders count.
        """
        if state.tried < self._tried:
            self._tried_before += self._tried
        self._tried = state.tried
        name = f"{state.name} with {state.algorithm}"
        best = f"the best so far takes {duration(state.makespan)} ({name})"
        if state.excess > 0:
            best += f" but keeps {human_bytes(state.excess)} more than the cap"
        tried = count_words(self._tried_before + state.tried, "order")
        return self.show(f"schedule=auto: {tried} tried, {best}")

    def _redraw(self, line: str) -> None:
        if self._live is None:
            self._live = Live(
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True)
