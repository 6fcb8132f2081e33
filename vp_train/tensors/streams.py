"""The order of work on a device, and the one rule for tensors that more than one stream uses.

The passes of a rank run on the current stream of its thread.  Work that must not delay them runs on
a side stream.  When a stream needs a result of another stream, the stream waits for an event; the
host does not wait.

The rule: a tensor must outlive its last use on every stream.  Three things ensure it.

1. Code that uses a tensor on a stream that may not have allocated it calls `lend`.  The allocator
   then reuses the memory only when that stream has passed the point where the tensor was freed.
2. Tensors that a step keeps to its end need no `lend`.  The step ends when the passes have waited
   for all communications, and a side stream allocates again only after a pass of the next step.
   The stream that copies the next batch does so at any time, so a step lends what it copied.
3. A `Pending` (`tensors.pending`) holds the tensors that a communication reads and writes, until
   the stream of the passes has waited for it or the host has seen that it is complete.  torch
   itself holds them only until the first stream waits, which may be a side stream.
"""

from __future__ import annotations

from collections import deque
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

    def reach(self, mark: Mark) -> None:
        """Let the host wait until the device has reached `mark`."""
        ...

    def beside(self, name: object) -> AbstractContextManager[None]:
        """Return a context in which the side stream `name` is current."""
        ...


class HostOrder:
    """Streams of a CPU, where work is done in order and there is nothing to wait for."""

    def mark(self) -> Mark:
        return None

    def follow(self, mark: Mark) -> None:
        pass

    def reach(self, mark: Mark) -> None:
        pass

    @contextmanager
    def beside(self, name: object) -> Iterator[None]:
        yield


class CudaStreams:
    """Streams on one GPU.

    Side streams have high priority: their work is short, and others wait for it.
    """

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

    def reach(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    @contextmanager
    def beside(self, name: object) -> Iterator[None]:
        side = self._sides.get(name)
        if side is None:
            side = self._sides[name] = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        # A new thread has GPU 0, and `stream` would start CUDA there to restore its stream.
        with torch.cuda.device(self._device), torch.cuda.stream(side):
            yield


def streams_of(device: torch.device) -> Streams:
    """Return the streams of `device`."""
    return CudaStreams(device) if device.type == "cuda" else HostOrder()


class Lead:
    """Keeps the host at most `most` passes ahead of the device.

    The third part of the rule above holds a sent message, and `lend` holds a tensor, until the host
    has seen that the device is done.  A host that runs a whole step ahead would hold all of them.
    """

    def __init__(self, streams: Streams, most: int) -> None:
        self._streams, self._most = streams, most
        self._marks: deque[Mark] = deque()

    def passed(self) -> None:
        """Record that a pass was issued; wait for the device if the host is too far ahead."""
        self._marks.append(self._streams.mark())
        if len(self._marks) > self._most:
            self._streams.reach(self._marks.popleft())


def with_index(device: torch.device) -> torch.device:
    """Return `device`, with the index of the current GPU if it is CUDA without an index.

    Without an index every thread would take its own current GPU, which is GPU 0 in a new thread.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`.  A copy from the host does not wait for work on the device."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # a copy from pageable memory would wait
    return tensor.to(device, non_blocking=True)


def lend(tensor: Tensor) -> Tensor:
    """Record that the current stream uses `tensor`, and return it; see the rule above."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
