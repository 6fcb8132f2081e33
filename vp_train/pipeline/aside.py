"""A thread beside the passes, for communication whose message must be waited for on the host.

With gloo a wait blocks the thread that waits.  A collective that continues another would stop the
passes, so a thread of its own waits, forms the message and issues it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Protocol

from torch import Tensor

_STOP_SECONDS = 5.0  # of patience with a thread whose message never comes


class Pending(Protocol):
    """A communication under way.  It holds everything that it reads and writes."""

    def wait(self) -> Tensor:
        """Return the delivered tensor.  On CUDA the current stream waits, not the host."""
        ...

    def is_completed(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Queued:
    """A communication that the thread has issued or will issue."""

    issued: Future[Pending]

    def wait(self) -> Tensor:
        return self.issued.result().wait()

    def is_completed(self) -> bool:
        return self.issued.done() and self.issued.result().is_completed()


_Task = tuple[Future[Pending], Callable[[], Pending]]


class Aside:
    """A thread that issues one communication after the other, each once its message is there.

    It is a daemon, unlike those of concurrent.futures: a rank that failed must be able to exit while
    a message never comes.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        thread = Thread(target=_serve, args=(self._queue,), daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._queue, thread)

    def issue(self, action: Callable[[], Pending]) -> Pending:
        """Queue `action`, which issues a communication.  Its error is raised by `wait`."""
        issued: Future[Pending] = Future()
        self._queue.put((issued, action))
        return _Queued(issued)


def _serve(queue: SimpleQueue[_Task | None]) -> None:
    while True:
        task = queue.get()
        if task is None:
            return
        _settle(*task)
        del task  # tensors must not live until the next one comes


def _settle(issued: Future[Pending], action: Callable[[], Pending]) -> None:
    try:
        issued.set_result(action())
    except BaseException as error:  # for whoever waits
        issued.set_exception(error)


def _stop(queue: SimpleQueue[_Task | None], thread: Thread) -> None:
    """Stop the thread; at exit too, where one that lets go of communications aborts the process."""
    queue.put(None)
    if thread is not current_thread():
        thread.join(_STOP_SECONDS)
