"""Timers: marks of moments on a device, and the seconds between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import pairwise
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor

from vp_train.tensors.pending import Pending


class Timer(Protocol):
    """Measures time on a device without stopping it."""

    def mark(self, used: Any = None) -> Any:
        """Return a mark for the moment at which the work issued so far is done.

        `used` is a mark that is no longer needed; it may be set again.
        """
        ...

    def between(self, marks: Sequence[Any]) -> list[float]:
        """Return the seconds from each mark to the next.  On a GPU this waits for the last one."""
        ...

    def seconds(self, mark: Any) -> float:
        """Return the seconds from `start` to `mark`.  On a GPU this waits for the mark."""
        ...

    def start(self) -> None:
        """Set the origin of `seconds` to now."""
        ...

    def settle(self) -> None:
        """Return when the work that was issued to the stream of the passes is done."""
        ...

    def watch(self, pending: Pending, channel: str, done: Callable[[Any], None]) -> Pending:
        """Return `pending`, perhaps wrapped; call `done` with a mark for its end.

        Those of one `channel` end in the order of these calls.
        """
        ...


class HostTimer:
    """A timer by the clock of the host: on a CPU work is done when a call returns."""

    def __init__(self) -> None:
        self._origin = 0.0

    def start(self, at: float | None = None) -> None:
        """Set the origin of `seconds` to now, or to the moment `at` of time.perf_counter."""
        self._origin = time.perf_counter() if at is None else at

    def settle(self) -> None:
        pass

    def mark(self, used: Any = None) -> float:
        return time.perf_counter()

    def between(self, marks: Sequence[float]) -> list[float]:
        return [after - before for before, after in pairwise(marks)]

    def seconds(self, mark: float) -> float:
        return mark - self._origin

    def watch(self, pending: Pending, channel: str, done: Callable[[float], None]) -> Pending:
        return _WaitedFor(pending, lambda: done(self.mark()))


class CudaTimer:
    """A timer by events on the streams of a GPU, which do not change how the work runs.

    With `host_waits`, as over gloo, waiting for a communication blocks the host, so communications
    are not timed.
    """

    def __init__(self, device: torch.device, *, host_waits: bool = False) -> None:
        self._device, self._host_waits = device, host_waits
        self._probes: dict[str, torch.cuda.Stream] = {}
        self._origin = self.mark()

    def start(self) -> None:
        self._origin = self.mark()

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def mark(self, used: Any = None) -> Any:
        event = used or torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, marks: Sequence[Any]) -> list[float]:
        marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]

    def seconds(self, mark: Any) -> float:
        mark.synchronize()
        return float(self._origin.elapsed_time(mark)) / 1e3

    def watch(self, pending: Pending, channel: str, done: Callable[[Any], None]) -> Pending:
        if not self._host_waits:
            # A stream for each message would be too many: torch has 32 and gives them out again,
            # and a message would wait for those of other channels.
            probe = self._probes.get(channel)
            if probe is None:
                probe = self._probes[channel] = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(probe):  # waits without delaying passes and communications
                pending.wait()
                done(self.mark())
        return pending


class _WaitedFor:
    """A communication that a thread waits for, so that its end is recorded when it happens."""

    def __init__(self, pending: Pending, done: Callable[[], None]) -> None:
        self._result: Future[Tensor] = Future()

        def wait() -> None:
            try:
                result = pending.wait()
                done()
                self._result.set_result(result)
            except BaseException as error:  # raised in the thread that waits
                self._result.set_exception(error)

        Thread(target=wait, daemon=True).start()

    def wait(self) -> Tensor:
        return self._result.result()

    def is_completed(self) -> bool:
        return self._result.done()


def timer_of(device: torch.device, *, host_waits: bool = False) -> HostTimer | CudaTimer:
    """Return the timer of `device`; see CudaTimer for `host_waits`."""
    return CudaTimer(device, host_waits=host_waits) if device.type == "cuda" else HostTimer()
