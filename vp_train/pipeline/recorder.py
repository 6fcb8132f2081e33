"""Measures a step: the times of passes and communications, and the bytes kept for later passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from schedules.ir import Kind, Pass
from schedules.timeline import Span
from vp_train.pipeline.aside import Pending


class Timer(Protocol):
    """Measures time on a device without stopping it."""

    def mark(self) -> Any:
        """Return a mark for the moment at which the work issued so far is done."""
        ...

    def seconds(self, mark: Any) -> float:
        """Return the seconds from `start` to `mark`.  On a GPU this waits for the mark."""
        ...

    def start(self) -> None:
        """Set the origin of `seconds` to now."""
        ...

    def watch(self, pending: Pending, done: Callable[[Any], None]) -> Pending:
        """Return `pending`, perhaps wrapped; call `done` with a mark for its end."""
        ...


class HostTimer:
    """A timer by the clock of the host: on a CPU work is done when a call returns."""

    def __init__(self) -> None:
        self._origin = 0.0

    def start(self, at: float | None = None) -> None:
        """Set the origin of `seconds` to now, or to the moment `at` of time.perf_counter."""
        self._origin = time.perf_counter() if at is None else at

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark - self._origin

    def watch(self, pending: Pending, done: Callable[[float], None]) -> Pending:
        return _WaitedFor(pending, lambda: done(self.mark()))


class CudaTimer:
    """A timer by events on the streams of a GPU, which do not change how the work runs.

    With `host_waits`, as over gloo, waiting for a communication blocks the host, so communications
    are not timed.
    """

    def __init__(self, device: torch.device, *, host_waits: bool = False) -> None:
        self._device, self._host_waits = device, host_waits
        self._origin = self.mark()

    def start(self) -> None:
        self._origin = self.mark()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, mark: Any) -> float:
        mark.synchronize()
        return float(self._origin.elapsed_time(mark)) / 1e3

    def watch(self, pending: Pending, done: Callable[[Any], None]) -> Pending:
        if not self._host_waits:
            probe = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
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


@dataclass(slots=True)
class _Timed:
    """A pass or communication with the marks of its begin and its end."""

    name: str
    kind: str
    stage: int
    microbatch: int
    begin: Any
    end: Any = None


@dataclass
class Recorder:
    """An observer that records one step of one rank.

    It does not count the storage of `parameters` as activation memory.
    """

    rank: int
    timer: Timer
    parameters: list[nn.Parameter]
    peak_bytes: int = 0
    _passes: list[_Timed] = field(default_factory=list)
    _communications: list[_Timed] = field(default_factory=list)
    _saved: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}

    @contextmanager
    def observe(self, item: Pass, held_bytes: Callable[[], int]) -> Iterator[None]:
        """Time the pass `item`, and update the peak of activation memory.

        What autograd saves in F counts until B or I of the same stage and microbatch has run.
        """
        timed = _Timed(str(item), item.kind.value, item.stage, item.microbatch, self.timer.mark())
        if item.kind is Kind.F:
            storages: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._weights:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
            self._saved[item.stage, item.microbatch] = sum(storages.values())
        else:
            yield
        timed.end = self.timer.mark()
        self._passes.append(timed)
        if item.kind in (Kind.B, Kind.I):  # held_bytes has what I keeps for W
            self._saved.pop((item.stage, item.microbatch), None)
        self.peak_bytes = max(self.peak_bytes, sum(self._saved.values()) + held_bytes())

    def watch(self, name: str, pending: Pending) -> Pending:
        """Time the communication `name`: a pass whose result hops, or a barrier such as `C0.3`."""
        barrier, _, microbatch = name.partition(".")
        kind, number = (barrier, int(microbatch)) if microbatch else ("hop", -1)
        timed = _Timed(name, kind, -1, number, self.timer.mark())
        self._communications.append(timed)

        def done(mark: Any) -> None:
            timed.end = mark

        return self.timer.watch(pending, done)

    @property
    def spans(self) -> list[Span]:
        """Return the passes in order, in seconds since the timer started."""
        return list(map(self._span, self._passes))

    @property
    def communications(self) -> list[Span]:
        """Return the hops and barriers of this rank, from issue to end."""
        return [self._span(timed) for timed in self._communications if timed.end is not None]

    def _span(self, timed: _Timed) -> Span:
        return Span(
            self.rank,
            name=timed.name,
            kind=timed.kind,
            stage=timed.stage,
            microbatch=timed.microbatch,
            start=self.timer.seconds(timed.begin),
            end=self.timer.seconds(timed.end),
        )


def joined_communications(of_ranks: list[list[Span]]) -> tuple[Span, ...]:
    """Return each communication once, given the spans of all ranks of a pipeline.

    The begin is when the last rank has issued it.  The end and the rank are those of the rank on
    which it ends last.
    """
    begins: dict[str, float] = {}
    last: dict[str, Span] = {}
    for span in (span for spans in of_ranks for span in spans):
        begins[span.name] = max(span.start, begins.get(span.name, span.start))
        if span.name not in last or span.end > last[span.name].end:
            last[span.name] = span
    joined = [replace(span, start=min(begins[name], span.end)) for name, span in last.items()]
    return tuple(sorted(joined, key=lambda span: span.start))
