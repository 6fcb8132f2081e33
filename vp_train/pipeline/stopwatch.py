"""Where the time of a step goes: a stopwatch that charges every moment of a rank to one part.

It runs in every step.  Each switch to another part sets a mark, on a GPU an event on the stream of
the passes, so nothing waits for the device until `take`, which a rank calls when the device is done
anyway.  What a GPU does on its other streams is charged to nothing: it is time only if the stream
of the passes waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any

from schedules.ir import Kind, Pass
from schedules.lower import Action
from vp_train.pipeline.timers import Timer
from vp_train.tensors.pending import Pending


class Part(StrEnum):
    """A part of a step.  The values are those of the metrics `seconds/...`."""

    DATA = "data"  # waiting for the batch, and what the passes read of it
    FORWARD_BACKWARD = "forward_backward"  # F, B, I and W, and issuing the messages after them
    VOCABULARY = "vocabulary"  # the same of S, T, E and G
    WAITING = "waiting"  # for messages of the pipeline, and for all ranks at the end of a step
    GRADIENT_SUM = "gradient_sum"  # waiting for sums over replicas, and for updated parameters
    OPTIMIZER = "optimizer"  # clearing the gradients, their norm, and the update
    CHECKPOINT = "checkpoint"  # what a save, or going back to one, stops the steps for
    VALIDATION = "validation"
    REST = "rest"


_PART_OF = {kind: Part.VOCABULARY if kind.is_vocabulary else Part.FORWARD_BACKWARD for kind in Kind}


class Stopwatch:
    """An observer that sums the seconds of a rank by part.  One thread may use it."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._parts: list[Part] = [Part.REST]
        self._marks: list[Any] = [timer.mark()]  # part i begins at mark i
        self._used: list[Any] = []
        self._pass: Part | None = None  # of the pass that runs
        self._after: Part | None = None  # what a wait interrupts
        self._leaves_pass, self._leaves_wait = _Leaving(self._end_pass), _Leaving(self._end_wait)

    def restart(self) -> None:
        """Forget the time until now."""
        self._parts, self._marks = [Part.REST], [self._timer.mark()]

    def switch(self, part: Part) -> None:
        """Charge the time from now on to `part`."""
        if part is not self._parts[-1]:
            self._parts.append(part)
            self._marks.append(self._timer.mark(self._used.pop() if self._used else None))

    def take(self) -> dict[Part, float]:
        """Return the seconds of every part, from the last call to the last switch.

        Every moment between these two is counted once.  On a GPU this waits for that switch.
        """
        seconds = dict.fromkeys(Part, 0.0)
        if len(self._marks) > 1:
            for part, passed in zip(
                self._parts[:-1], self._timer.between(self._marks), strict=True
            ):
                seconds[part] += passed
        self._used += self._marks[:-1]
        del self._marks[:-1], self._parts[:-1]
        return seconds

    def observe(self, item: Pass, held_bytes: Callable[[], int]) -> AbstractContextManager[None]:
        self._pass = _PART_OF[item.kind]
        self.switch(self._pass)
        return self._leaves_pass

    def _end_pass(self) -> None:
        self._pass = None

    def waits(self, action: Action, item: object) -> AbstractContextManager[None]:
        # What follows a wait between passes is the pass that needed it, so nothing switches back.
        self._after = Part.DATA if self._parts[-1] is Part.DATA else self._pass
        self.switch(Part.GRADIENT_SUM if action is Action.NEED else Part.WAITING)
        return self._leaves_wait

    def _end_wait(self) -> None:
        if self._after is not None:
            self.switch(self._after)

    def watch(self, name: str, channel: str, pending: Pending) -> Pending:
        return pending


class _Leaving:
    """A context that calls `leave` at its end, made once: a step enters thousands."""

    __slots__ = ("_leave",)

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._leave()
