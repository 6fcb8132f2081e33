"""The choices that a search has left to look at, in the order in which it looks at them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

from vp_train.planning.choice import KINDS, Choice, ChoiceKind
from vp_train.planning.weigh import Candidate

# Drafts without an estimate after which the lowest is estimated, see `Explorer.estimate`.
_FIRST_DRAFTS = 32


@dataclass(slots=True, eq=False)
class Prospect:
    """A choice and what a search knows of it.

    number: its place among all, which decides between equals.
    bound: the lower bound of its step in seconds, None before it is weighed.
    is_exact: whether the step takes just that.
    candidate: its draft, None before it is made.
    is_done: whether it was estimated, or refused after it was weighed.
    """

    number: int
    choice: Choice
    bound: float | None = None
    is_exact: bool = False
    candidate: Candidate | None = None
    is_done: bool = False

    def __lt__(self, other: Prospect) -> bool:
        return self.number < other.number

    @property
    def is_weighed(self) -> bool:
        return self.bound is not None

    @property
    def splits_vocabulary(self) -> bool:
        return self.choice.splits_vocabulary


class Queue:
    """Prospects by the least seconds that `key` expects of them, and by their least bytes.

    drafted: those that were drafted since something fits.
    next_drafts: how many of these there are when one of them is estimated.
    doubtful: those that wait until all others were estimated.
    looks_at_all: whether these have their turn now.
    passed_over: those to look at after all others.
    """

    def __init__(self, key: Callable[[Prospect], float]) -> None:
        self._key = key
        self._by_seconds: dict[ChoiceKind, list[tuple[float, Prospect]]] = {
            kind: [] for kind in KINDS
        }
        self._by_bytes: list[tuple[float, Prospect]] = []
        self.drafted: list[Prospect] = []
        self.next_drafts = _FIRST_DRAFTS
        self.doubtful: list[Prospect] = []
        self.looks_at_all = False
        self.passed_over: list[Prospect] = []

    def push(self, prospect: Prospect, num_bytes: float | None = None) -> None:
        """Put a prospect into the queue; by its bytes, too, if they are given."""
        heapq.heappush(self._by_seconds[prospect.choice.kind], (self._key(prospect), prospect))
        if num_bytes is not None:
            heapq.heappush(self._by_bytes, (num_bytes, prospect))

    def add(self, other: Queue) -> None:
        """Add what another queue has left."""
        for kind, heap in self._by_seconds.items():
            heap += other._by_seconds[kind]
            heapq.heapify(heap)
        self._by_bytes = sorted(self._by_bytes + other._by_bytes)
        self.drafted += other.drafted
        self.next_drafts = 2 * max(_FIRST_DRAFTS, len(self.drafted))
        self.doubtful += other.doubtful
        self.looks_at_all = False
        self.passed_over += other.passed_over

    @property
    def left(self) -> list[Prospect]:
        """Those that were not estimated yet, the first ones first."""
        waiting = {prospect for heap in self._by_seconds.values() for _, prospect in heap}
        waiting.update(self.doubtful, self.passed_over)
        return sorted(prospect for prospect in waiting if not prospect.is_done)

    @property
    def is_empty(self) -> bool:
        return not any(self._by_seconds.values())

    def first(self, kind: ChoiceKind) -> float:
        """Return the seconds expected of the first of a kind, infinite if none is left.

        Later simulations may have raised them.
        """
        heap = self._by_seconds[kind]
        while heap:
            known, prospect = heap[0]
            key = self._key(prospect)
            if prospect.is_done:
                heapq.heappop(heap)
            elif key > known:
                heapq.heapreplace(heap, (key, prospect))
            else:
                return key
        return math.inf

    def pop(self, kind: ChoiceKind) -> Prospect:
        """Take the first of a kind, after `first`."""
        return heapq.heappop(self._by_seconds[kind])[1]

    def pop_leanest(self) -> Prospect | None:
        """Take the one that seems to need least memory, None if none is left."""
        while self._by_bytes:
            _, prospect = heapq.heappop(self._by_bytes)
            if not prospect.is_done:
                return prospect
        return None

    def renew(self) -> None:
        """Order the prospects again, since simulations may have lowered what is expected."""
        for heap in self._by_seconds.values():
            heap[:] = [
                (self._key(prospect), prospect) for _, prospect in heap if not prospect.is_done
            ]
            heapq.heapify(heap)
