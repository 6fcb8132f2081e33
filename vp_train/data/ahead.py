"""Prefetching: the batch of the next step is made in a thread while the current step runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Ahead(Generic[Batch]):
    """A prefetcher of batches: it makes the next batch while a step runs, up to step `last`.

    `make` returns the batch of a step.  If it raises, `take` of that step raises the same error.
    """

    def __init__(self, make: Callable[[int], Batch], last: int) -> None:
        self._make, self._last = make, last
        self._thread = ThreadPoolExecutor(1, "next batch")
        self._next: tuple[int, Future[Batch]] | None = None

    def take(self, step: int) -> Batch:
        """Return the batch of `step`, and start making the batch of the next step."""
        made, future = self._next or (None, None)
        batch = future.result() if future is not None and made == step else self._make(step)
        self._next = None
        if step < self._last:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return batch
