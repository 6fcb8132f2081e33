"""The order of work on a device, and the one rule for tensors that more than one stream uses.

The passes of a rank run on one stream, the current one of its thread.  What must not delay them runs
on a side stream, and a stream that needs a result of another waits for an event, never the host.

The rule: a tensor must outlive its last use on every stream.  Three things see to it.

1. Whoever uses a tensor on a stream that may not have allocated it calls `lend`.  The allocator then
   gives the memory away only when that stream has passed the moment at which the tensor was dropped.
2. What a step keeps to its end needs no `lend`: the step ends when the passes have waited for all
   communications, and a side stream allocates again only after a pass of the next step.
3. What a communication reads and writes is held by its `Pending` until the stream of the passes has
   waited for it, or the host has seen that it is complete: torch holds these tensors only until the
   first stream waits, which may be a side stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

Mark = Any  # an event of a device; None on a CPU, where work is done when a call returns


class Streams(Protocol):
    """Streams and events of one rank."""

    def mark(self) -> Mark:
        """Return the point that the current stream has reached."""
        ...

    def follow(self, mark: Mark) -> None:
        """Let the current stream wait for `mark`."""
        ...

    def beside(self, name: object) -> AbstractContextManager[None]:
        """Return a context in which the side stream `name` is current."""
        ...


class HostOrder:
    """Work on a CPU: one thing after the other, so there is nothing to wait for."""

    def mark(self) -> Mark:
        return None

    def follow(self, mark: Mark) -> None:
        pass

    @contextmanager
    def beside(self, name: object) -> Iterator[None]:
        yield


class CudaStreams:
    """Streams on one GPU.  Side streams have high priority: what they run is short and awaited."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sides: dict[object, torch.cuda.Stream] = {}

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def follow(self, mark: Mark) -> None:
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    @contextmanager
    def beside(self, name: object) -> Iterator[None]:
        side = self._sides.get(name)
        if side is None:
            side = self._sides[name] = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            yield


def streams_of(device: torch.device) -> Streams:
    """Return the streams of `device`."""
    return CudaStreams(device) if device.type == "cuda" else HostOrder()


def with_index(device: torch.device) -> torch.device:
    """Return `device`; CUDA without an index becomes the current GPU, as `torch.cuda.set_device` has set it.

    Without an index it would be the current GPU of whichever thread asks, and that is GPU 0 in every new thread.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`, without waiting for what runs there if it comes from the host."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # from other memory the copy would wait
    return tensor.to(device, non_blocking=True)


def lend(tensor: Tensor) -> Tensor:
    """Say that the current stream uses `tensor`; return it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
