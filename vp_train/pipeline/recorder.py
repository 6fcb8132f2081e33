"""Measures a step: when each pass and each communication ran, and the bytes kept for later passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from schedules.ir import Kind, Pass
from schedules.timeline import Span
from vp_train.pipeline.aside import Pending


class Timer(Protocol):
    """Takes the time on a device without stopping it."""

    def mark(self) -> Any:
        """Return the moment that the work issued so far is done."""
        ...

    def seconds(self, mark: Any) -> float:
        """Return the seconds of `mark` since `start`.  On a GPU it waits until then."""
        ...

    def start(self) -> None:
        """Begin to count."""
        ...

    def watch(self, pending: Pending, done: Callable[[Any], None]) -> Pending:
        """Return `pending`; call `done` with the moment at which it has ended."""
        ...


class HostTimer:
    """The clock of the host: on a CPU work is done when a call returns."""

    def __init__(self) -> None:
        self._origin = 0.0

    def start(self, at: float | None = None) -> None:
        """Begin to count, now or `at` a moment of time.perf_counter."""
        self._origin = time.perf_counter() if at is None else at

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark - self._origin

    def watch(self, pending: Pending, done: Callable[[float], None]) -> Pending:
        return _WaitedFor(pending, lambda: done(self.mark()))


class CudaTimer:
    """Events on the streams of a GPU: what is timed runs as it does untimed.

    With `host_waits`, as over gloo, to wait for a communication stops the host, so none is timed.
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
            with torch.cuda.stream(probe):  # waits beside the passes and other communications
                pending.wait()
                done(self.mark())
        return pending


class _WaitedFor:
    """A communication that a thread waits for, so that its end is seen when it comes."""

    def __init__(self, pending: Pending, done: Callable[[], None]) -> None:
        self._result: Future[Tensor] = Future()

        def wait() -> None:
            try:
                result = pending.wait()
                done()
                self._result.set_result(result)
            except BaseException as error:  # for whoever waits
                self._result.set_exception(error)

        Thread(target=wait, daemon=True).start()

    def wait(self) -> Tensor:
        return self._result.result()

    def is_completed(self) -> bool:
        return self._result.done()


def timer_of(device: torch.device, *, host_waits: bool = False) -> HostTimer | CudaTimer:
    """Return the timer of `device`; for `host_waits` see CudaTimer."""
    return CudaTimer(device, host_waits=host_waits) if device.type == "cuda" else HostTimer()


@dataclass(slots=True)
class _Timed:
    """A pass or communication of microbatch `microbatch`, with the marks of its begin and end."""

    name: str
    kind: str
    stage: int
    microbatch: int
    begin: Any
    end: Any = None


@dataclass
class Recorder:
    """An observer of one step of one rank.  Storage of `parameters` is not activation memory."""

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
        """Time `item`.

        Count what autograd saves in F, until the B of the same stage and microbatch has run.
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
        if item.kind in (Kind.B, Kind.I):  # what I leaves for W is among the held bytes
            self._saved.pop((item.stage, item.microbatch), None)
        self.peak_bytes = max(self.peak_bytes, sum(self._saved.values()) + held_bytes())

    def watch(self, name: str, pending: Pending) -> Pending:
        """Time the communication `name`: a pass whose result hops, or a barrier as `C0.3`."""
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
        """Return the hops and barriers of this rank, from their issue to their end."""
        return [self._span(timed) for timed in self._communications if timed.end is not None]

    def _span(self, timed: _Timed) -> Span:
        begin, end = self.timer.seconds(timed.begin), self.timer.seconds(timed.end)
        return Span(self.rank, timed.name, timed.kind, timed.stage, timed.microbatch, begin, end)


def joined_communications(of_ranks: list[list[Span]]) -> tuple[Span, ...]:
    """Return each communication once, from the spans of all ranks of a pipeline.

    It begins when the last rank has issued it, and ends, on the rank that is shown, when it has
    ended there: the rank that waits longest.
    """
    begins: dict[str, float] = {}
    last: dict[str, Span] = {}
    for span in (span for spans in of_ranks for span in spans):
        begins[span.name] = max(span.start, begins.get(span.name, span.start))
        if span.name not in last or span.end > last[span.name].end:
            last[span.name] = span
    joined = [
        Span(
            span.rank,
            span.name,
            span.kind,
            span.stage,
            span.microbatch,
            min(begins[name], span.end),
            span.end,
        )
        for name, span in last.items()
    ]
    return tuple(sorted(joined, key=lambda span: span.start))
