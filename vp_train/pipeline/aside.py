"""A thread beside the passes, for collectives whose message depends on an earlier collective.

With gloo a wait blocks the calling thread.  A collective that continues another would therefore
stop the passes.  So a separate thread waits for the earlier one, forms the message and issues it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, current_thread

from torch import Tensor

from vp_train.tensors.pending import Pending

_STOP_SECONDS = 5.0  # how long to wait for a thread whose message never arrives


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
    """A thread that issues communications in order, each as soon as its message is complete.

    It is a daemon, unlike the threads of concurrent.futures: a failed rank must be able to exit
    while a message never arrives.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        thread = Thread(target=_serve, args=(self._queue,), daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._queue, thread)

    def issue(self, action: Callable[[], Pending]) -> Pending:
        """Queue `action`, which issues a communication.  `wait` raises its error."""
        issued: Future[Pending] = Future()
        self._queue.put((issued, action))
        return _Queued(issued)


def _serve(queue: SimpleQueue[_Task | None]) -> None:
    while True:
        task = queue.get()
        if task is None:
            return
        _settle(*task)
        del task  # otherwise its tensors would live until the next task


def _settle(issued: Future[Pending], action: Callable[[], Pending]) -> None:
    try:
        issued.set_result(action())
    except BaseException as error:  # raised in the thread that waits
        issued.set_exception(error)


def _stop(queue: SimpleQueue[_Task | None], thread: Thread) -> None:
    """Stop the thread, also at exit, where freeing communications in it would abort the process."""
    queue.put(None)
    if thread is not current_thread():
        thread.join(_STOP_SECONDS)
