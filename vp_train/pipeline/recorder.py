"""Measures a step: the times of passes and communications, and the bytes kept for later passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from schedules.ir import Kind, Pass
from schedules.lower import HOST_TRANSFERS, Action
from schedules.timeline import Span
from vp_train.pipeline.executor import BLIND, Observer
from vp_train.pipeline.timers import Timer
from vp_train.tensors.pending import Pending


@dataclass(slots=True)
class _Timed:
    """A pass or communication with the marks of its begin and its end."""

    name: str
    kind: str
    stage: int
    microbatch: int
    begin: Any
    end: Any = None
    processor: float = 0.0


@dataclass
class Recorder:
    """An observer that records one step of one rank, around another observer, `inner`.

    It does not count the storage of `parameters` as activation memory.
    """

    rank: int
    timer: Timer
    parameters: list[nn.Parameter]
    inner: Observer = BLIND
    peak_bytes: int = 0
    _passes: list[_Timed] = field(default_factory=list)
    _communications: list[_Timed] = field(default_factory=list)
    _saved: dict[tuple[int, int], int] = field(default_factory=dict)
    _held_bytes: Callable[[], int] = int

    def __post_init__(self) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}

    @contextmanager
    def observe(self, item: Pass, held_bytes: Callable[[], int]) -> Iterator[None]:
        """Time the pass `item`, and update the peak of activation memory.

        What autograd saves in F counts until B or I of the same stage and microbatch has run.
        """
        self._held_bytes = held_bytes
        timed = _Timed(str(item), item.kind.value, item.stage, item.microbatch, self.timer.mark())
        processor = time.thread_time()
        if item.kind is Kind.F:
            storages: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._weights:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with self.inner.observe(item, held_bytes), hooks:
                yield
            self._saved[item.stage, item.microbatch] = sum(storages.values())
        else:
            with self.inner.observe(item, held_bytes):
                yield
        timed.processor = time.thread_time() - processor
        timed.end = self.timer.mark()
        self._passes.append(timed)
        if item.kind in (Kind.B, Kind.I):  # held_bytes has what I keeps for W
            self._saved.pop((item.stage, item.microbatch), None)
        self._count()

    def _count(self) -> None:
        held = sum(self._saved.values()) + self._held_bytes()
        self.peak_bytes = max(self.peak_bytes, held)

    def waits(self, action: Action, item: object) -> AbstractContextManager[None]:
        inner = self.inner.waits(action, item)
        if action in HOST_TRANSFERS and isinstance(item, Pass):
            return self._transfer(action, item, inner)
        return inner

    @contextmanager
    def _transfer(
        self, action: Action, item: Pass, inner: AbstractContextManager[None]
    ) -> Iterator[None]:
        """Record a copy to the host or back that the passes make themselves, or wait for."""
        name, kind = f"{action}:{item}", action.value
        timed = _Timed(name, kind, item.stage, item.microbatch, self.timer.mark())
        with inner:
            yield
        timed.end = self.timer.mark()
        self._communications.append(timed)
        self._count()

    def watch(self, name: str, channel: str, pending: Pending) -> Pending:
        """Time the communication `name`.

        That is a pass whose result hops, a barrier such as `C0.3`, or a copy such as `offload:0F3`.
        """
        barrier, _, microbatch = name.partition(".")
        kind, number = (barrier, int(microbatch)) if microbatch else ("hop", -1)
        copy, _, item = name.partition(":")
        kind = copy if item else kind
        timed = _Timed(name, kind, -1, number, self.timer.mark())
        self._communications.append(timed)

        def done(mark: Any) -> None:
            timed.end = mark

        return self.timer.watch(pending, channel, done)

    @property
    def spans(self) -> list[Span]:
        """Return the passes in order, in seconds since the timer started."""
        return list(map(self._span, self._passes))

    @property
    def processor_seconds(self) -> list[float]:
        """Return for each pass how long this thread was on a processor in it.

        On a CPU that is its time without the moments in which the thread had to wait.
        """
        return [timed.processor for timed in self._passes]

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


@dataclass(frozen=True, slots=True)
class Named:
    """An observer that gives passes and waits names in torch's profiler, around another one."""

    inner: Observer

    @contextmanager
    def observe(self, item: Pass, held_bytes: Callable[[], int]) -> Iterator[None]:
        with record_function(str(item)), self.inner.observe(item, held_bytes):
            yield

    @contextmanager
    def waits(self, action: Action, item: object) -> Iterator[None]:
        with record_function(f"{action}:{item}"), self.inner.waits(action, item):
            yield

    def watch(self, name: str, channel: str, pending: Pending) -> Pending:
        return self.inner.watch(name, channel, pending)


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
