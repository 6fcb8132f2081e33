"""Looks at choices in the order of the seconds that they may take at least."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

from schedules.render import duration
from vp_train.config import ConfigError
from vp_train.planning.book import Book
from vp_train.planning.choice import KINDS, Choice, ChoiceKind
from vp_train.planning.found import counted
from vp_train.planning.queue import Prospect, Queue
from vp_train.planning.shared import Shared
from vp_train.planning.short import placed_by_short
from vp_train.planning.space import Space
from vp_train.planning.trials import Trials
from vp_train.planning.weigh import NEARLY, Candidate, Scales, Weight

_WEIGH_NODES = 4  # nodes that can be placed while a choice is weighed
_DEAR = 0.1  # part of the effort that one estimate may take before others had their turn
_FOR_OTHER_KIND = 1 / 3  # part of the effort of estimates, see `_lowest`
_MEMORY_TOLERANCE = 0.02  # the part of the limit by which what they need may differ
_TRIES_OF_DOUBTFUL = 3


class Explorer:
    """Weighs all choices of a space, and drafts and estimates those with the lowest bounds.

    prospects: the choices of the space, and those that were added, in this order.
    queue: what is left of the space.
    unweighed: those for which there was no time.
    pressed: the choices that seem to fit with an optimizer on hosts only.
    until: the effort at which estimates end once something fits.
    """

    def __init__(
        self,
        space: Space,
        trials: Trials,
        book: Book,
        *,
        scales: Scales,
        shared: Shared,
        progress: Callable[[str], object],
    ) -> None:
        self._scales, self._shared, self._trials, self._book = scales, shared, trials, book
        self._effort, self._progress = trials.effort, progress
        self._spent_on = [0.0, 0.0]  # without and with vocabulary parallelism
        self._num_drafted = 0
        self._num_before = 0  # estimates of what came first and does not fit
        self._beyond: set[Choice] = set()  # those beyond the space that were weighed
        self.prospects = {
            choice: Prospect(number, choice) for number, choice in enumerate(space.choices)
        }
        self.queue = Queue(self.key)
        self.unweighed: list[Prospect] = []
        self.pressed: list[Choice] = []
        self.until = 0.0

    def weigh(self) -> None:
        """Weigh all choices.  Out of time, those that were weighed are a sample of all."""
        self._scales.check(self.prospects)
        prospects = list(self.prospects.values())
        random.Random(1).shuffle(prospects)
        before = sum(self._book.excluded.values())  # a summary counts them too
        for place, prospect in enumerate(prospects):
            if place % 128 == 0:
                total = before + len(prospects)
                self._progress(f"{before + place:,} of {total:,} choices weighed")
                if not self.queue.is_empty and not self._effort.in_time():
                    self.unweighed = prospects[place:]
                    break
            choice = prospect.choice
            self._effort.spent += _WEIGH_NODES
            try:
                if self._book.below < math.inf and self._scales.bound(choice) >= self._book.below:
                    continue  # it will not be looked at, whatever memory it needs
                weight = self._scales.weigh(choice)
            except ConfigError as error:
                self._book.refuse(choice, error, 0.0)
            else:
                self._put(self.queue, prospect, weight)

    def queue_of(self, choices: Iterable[Choice]) -> Queue:
        """Return a queue of choices that were not estimated.

        Those that are not among the prospects are weighed, and left out if none may be the best of
        its kind.
        """
        queue = Queue(self.key)
        for choice in choices:
            prospect = self.prospects.get(choice)
            if prospect is None:
                self._add(choice, queue)
            elif prospect.is_weighed and not prospect.is_done:
                queue.push(prospect, 0.0)
        return queue

    def _add(self, choice: Choice, queue: Queue) -> None:
        """Put a choice that is no prospect yet into a queue, once, if it may be the best."""
        if choice in self._beyond:
            return
        self._beyond.add(choice)
        self._effort.spent += _WEIGH_NODES
        try:
            weight = self._scales.weigh(choice)
        except ConfigError:
            return
        if weight.seems_to_fit and self._book.may_be_first(choice, weight.seconds):
            prospect = self.prospects[choice] = Prospect(len(self.prospects), choice)
            self._put(queue, prospect, weight)

    def _put(self, queue: Queue, prospect: Prospect, weight: Weight) -> None:
        """Put a prospect that was weighed into a queue."""
        prospect.bound = weight.seconds
        if weight.optimizer is not None and weight.optimizer.offload:
            self.pressed.append(prospect.choice)
        queue.push(prospect, weight.needs)

    def estimate_first(self, prospect: Prospect, *, is_sure: bool = True) -> None:
        """Estimate a prospect before others; unless `is_sure` only if it seems to fit cheaply."""
        if not prospect.is_weighed:
            return
        try:
            item = prospect.candidate = self._trials.draft(prospect.choice)
            prospect.bound = item.seconds
            if not is_sure and self._is_doubtful(item, self.queue):
                return
            prospect.is_done = True
            self._book.add(self._trials.estimate(item))
        except ConfigError as error:
            self.refuse(prospect, error)
            self._num_before = self._trials.num_estimated  # the leanest is estimated in any case

    def estimate_apart(self, queue: Queue) -> None:
        """Estimate a queue until none left could be the best of its kind, then add what is left."""
        self.estimate(1, queue)
        self.queue.add(queue)

    def estimate(self, top: int, queue: Queue | None = None) -> None:
        """Estimate choices until none left could be among the `top`, or the effort is spent.

        What seems not to fit comes last, and what takes a large part of the effort.  It may take
        thousands of drafts, which tighten the bounds, to know the choice with the lowest bound.  So
        after 32, 64, 128 ... drafts the lowest of those is estimated: a search that ends early has
        then seen more than the leanest choice.
        """
        queue = self.queue if queue is None else queue
        # Plans may be slower than their estimates were, or not fit.
        for passed in queue.passed_over:
            queue.push(passed)
        queue.passed_over = []
        while self.goes_on():
            prospect = self._next(queue, top)
            if prospect is None:
                if not queue.doubtful:
                    return
                self._look_at_doubtful(queue)
                continue
            before = self._effort.spent
            try:
                self._look_at(prospect, queue)
            except ConfigError as error:
                self.refuse(prospect, error)
                self.say()
            finally:
                self._spent_on[prospect.splits_vocabulary] += self._effort.spent - before

    def _look_at(self, prospect: Prospect, queue: Queue) -> None:
        """Draft a prospect, or estimate it if it was drafted or nothing fits yet.

        Raises ConfigError if it does not fit.
        """
        item = prospect.candidate
        if item is None:
            item = prospect.candidate = self._trials.draft(prospect.choice)
            least = self._shared.least(item)
            prospect.bound, prospect.is_exact = (
                (item.seconds, False) if least is None else (least, True)
            )
            if self._book.knows_time:
                queue.push(prospect)
                queue.drafted.append(prospect)
                self._num_drafted += 1
                self._progress(f"{self._num_drafted:,} looked at, {self._words()}")
                return
        if self._is_doubtful(item, queue):
            queue.doubtful.append(prospect)
            return
        prospect.is_done = True
        self._book.add(self._trials.estimate(item))
        self.say()

    def refuse(self, prospect: Prospect, error: ConfigError) -> None:
        """Book a prospect as refused, with the stages that recompute once they are known."""
        prospect.is_done = True
        item, bound = prospect.candidate, prospect.bound
        assert bound is not None, "it was weighed"
        self._book.refuse(prospect.choice if item is None else item.choice, error, bound)

    def goes_on(self) -> bool:
        """Return whether to estimate another choice: the first one always, if no time is known."""
        enough = self.until
        if not self._book.knows_time:
            if self._trials.num_estimated == self._num_before:
                return True
            enough = max(self._effort.total, self.until)
        return not self._effort.is_over(enough)

    def key(self, prospect: Prospect) -> float:
        """Return about the least seconds of a prospect: its bound and what others are above it."""
        choice, item, bound = prospect.choice, prospect.candidate, prospect.bound
        assert bound is not None, "it was weighed"
        learned = self._trials.learned
        if item is not None and len(item.optimizers) > 1:
            room = (1 + _MEMORY_TOLERANCE) * self._scales.limit - learned.excess_bytes(item.choice)
            seconds = item.seconds_within(room)
            bound += seconds - item.seconds if item.seconds < seconds < math.inf else 0.0
        factor = 1.0 if prospect.is_exact else learned.factor(choice)
        return counted(choice, bound) * factor

    def _next(self, queue: Queue, top: int) -> Prospect | None:
        """Take the prospect to look at next, None if no other could be among the `top`."""
        if not self._book.knows_time:
            return queue.pop_leanest()
        if len(queue.drafted) >= queue.next_drafts:
            queue.next_drafts *= 2
            seen = {*queue.doubtful, *queue.passed_over}
            waiting = [
                (self.key(prospect), prospect)
                for prospect in queue.drafted
                if not prospect.is_done
                and prospect not in seen
                and prospect.candidate is not None
                and not self._is_doubtful(prospect.candidate, queue)
            ]
            if waiting:
                key, prospect = min(waiting)
                if key < self._book.to_beat(top)[prospect.choice.kind]:
                    return prospect
        return self._lowest(queue, top)

    def _lowest(self, queue: Queue, top: int) -> Prospect | None:
        """Take what may be the fastest choice that is left, unless it cannot be among the `top`.

        Where the best of both kinds are looked for, with and without vocabulary parallelism, each
        has a third of the effort at least.
        """
        to_beat = self._book.to_beat(top)

        def open_kinds() -> dict[ChoiceKind, float]:
            keys = {kind: queue.first(kind) for kind in KINDS}
            return {kind: key for kind, key in keys.items() if key < to_beat[kind]}

        kinds = open_kinds()
        if not kinds:
            queue.renew()
            kinds = open_kinds()
        if not kinds:
            return None
        least = _FOR_OTHER_KIND * sum(self._spent_on) if self._book.has_kinds else 0.0
        return queue.pop(
            min(kinds, key=lambda kind: (self._spent_on[kind[0]] >= least, kinds[kind]))
        )

    def _is_doubtful(self, item: Candidate, queue: Queue) -> bool:
        """Return whether a draft waits until all others were estimated."""
        is_dear = placed_by_short(item.draft.problem) > _DEAR * self._effort.total
        needs = min(item.expected) + self._trials.learned.excess_bytes(item.choice)
        fits = item.seems_to_fit and needs <= NEARLY * self._scales.limit
        return (is_dear or not fits) and not queue.looks_at_all

    def _look_at_doubtful(self, queue: Queue) -> None:
        """Let what is dear or seems not to fit have its turn.

        Of the latter hardly any fits, so where a time is known by short steps only a few are tried.
        """
        prospects = queue.doubtful
        if not self._book.has_kinds and self._book.knows_time:
            ordered = sorted(prospects, key=lambda prospect: (self.key(prospect), prospect))
            prospects = [one for one in ordered if one.candidate and one.candidate.seems_to_fit]
            others = [one for one in ordered if one not in prospects]
            prospects += others[:_TRIES_OF_DOUBTFUL]
            queue.passed_over += others[_TRIES_OF_DOUBTFUL:]
        for place, prospect in enumerate(prospects):
            queue.push(prospect, float(place))
        queue.doubtful, queue.looks_at_all = [], True

    def say(self, more: str = "") -> None:
        """Show how far the search is."""
        self._progress(f"{self._words()}{more}")

    def _words(self) -> str:
        best = min((e.seconds for e in self._book.estimates), default=None)
        shown = "none fits yet" if best is None else f"the best takes about {duration(best)}"
        planned = f", {len(self._book.planned)} planned" if self._book.planned else ""
        return f"{self._trials.num_estimated:,} simulated{planned}; {shown}"
