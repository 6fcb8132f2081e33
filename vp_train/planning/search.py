"""The search for the fastest ways to run a model on a cluster, over every split of its GPUs.

It goes from cheap to dear, and each stage sees fewer choices:

1. Weigh every choice by arithmetic: bytes of state and leanest activations, of which too many
   refuse it, and a lower bound on the time of its step.
2. Draft those with the lowest bounds: the costs of all passes, and with them tighter bounds.
3. Estimate them by the simulation of short steps, from which the time of a long one follows.  The
   run as it was typed comes first, and while none fits, the leanest.
4. Estimate with offloaded activations what device memory alone rules out and may be faster.
5. Estimate what differs in one setting from the best with and without vocabulary parallelism.
6. Estimate single stages that recompute less in the best, and more in what almost fits.
7. Estimate vocab.balance in the place of what may be among the best with it.
8. Plan the best estimates as a run would plan them.

Links to hosts and their memory are assumed, so a step with offloaded activations counts as half a
percent longer wherever it is compared (`counted`).

Its effort is counted in passes, not in seconds, so that every machine finds the same plans.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from schedules.generators import GENERATORS
from schedules.render import duration
from vp_train.config import ConfigError, OptimConfig, RunConfig
from vp_train.planning.book import Book
from vp_train.planning.choice import (
    ALL,
    TOO_LONG,
    Choice,
    Kept,
    Space,
    as_typed,
    beside,
    neighbours,
    offloading,
    space_of,
    without_vocabulary_of,
)
from vp_train.planning.cluster import limit_of
from vp_train.planning.degrees import Degrees
from vp_train.planning.found import Estimate, Found, Limits, Result, counted
from vp_train.planning.memory import most_host_bytes
from vp_train.planning.no_choice import no_choice_words, nothing_kept_words
from vp_train.planning.plan import StepPlan
from vp_train.planning.report import report_of
from vp_train.planning.shared import Shared
from vp_train.planning.short import draft_nodes, effort_of, placed_by_short, plan_nodes
from vp_train.planning.weigh import (
    NEARLY,
    SIMULATED,
    Candidate,
    HostMemoryError,
    Scales,
    TooLargeError,
    Weight,
    check_hosts,
)

_WEIGH_NODES = 4  # nodes that can be placed while a choice is weighed
# Drafts without an estimate after which the most promising of them is estimated, see `_estimate`.
_FIRST_DRAFTS = 32
_DEAR = 0.1  # part of the effort that one estimate may take before others had their turn
_FOR_OTHER_KIND = 1 / 3  # part of the effort of estimates, see `_lowest`
_FOR_ESTIMATES = 0.5  # part of the effort; the rest is for whole plans
# A whole step may take so much less than its estimate.
_SLACK = 0.01
# Choices of the same schedule and step exceed their lower bounds by similar factors, at least by
# this part of the one that was seen.
_ALIKE = 0.97
_MEMORY_TOLERANCE = 0.02  # the part of the limit by which what they need may differ
_KEPT_REFUSALS = 100
_TRIES_OF_OTHER_KIND, _TRIES_OF_DOUBTFUL, _TRIES_TO_FIT = 20, 3, 50
# Parts of the effort: after which activations are offloaded, and for estimates with that.
_BEFORE_OFFLOADING, _FOR_OFFLOADING = 0.35, 0.3
_FOR_NEIGHBOURS = 0.15  # part of the effort for what is next to the best, see `_look_around`
_FOR_STAGES = 0.05  # part of the effort for single stages, see `_change_stages`
_TRIES_NEARLY = 8  # of what almost fits, in more stages
_ROUNDS = 4  # of more stages that recompute, see `_Search._estimate_of`
_MOST_CONFIRMED = 3  # plans that are made before the best is known, see `_confirm`
_MOST_BEYOND = 3  # plans that are made after the effort, each faster than the first if it holds
# Part of the effort for vocab.balance, and the least part of the passes that it must save.
_FOR_BALANCE, _LEAST_BALANCED = 0.1, 0.002
_MUCH_BALANCED = 0.02  # the part that balanced rows must save to come at once, see `_draft`
_EFFORT_OF_ONE_LINE = 360_000


def search(
    config: RunConfig,
    limits: Limits,
    in_time: Callable[[], bool],
    progress: Callable[[str], object],
    space: Space | None = None,
) -> Result:
    """Return the fastest choices that fit, as far as they are found while `in_time()`.

    `progress` gets lines to show.  `space` limits the choices.  At least one choice is estimated
    and planned unless it cannot fit.  Raises ConfigError if there is no choice at all.
    """
    space = space_of(config) if space is None else space
    if not space.choices:
        if space.excluded[TOO_LONG] and not space.kept.values:
            raise ConfigError(f"every choice has {TOO_LONG}; use a smaller batch, or more GPUs")
        if space.kept.values and space_of(config).choices:
            raise ConfigError(nothing_kept_words(config, space))
        raise ConfigError(no_choice_words(config))
    return _Search(config, limits, in_time, progress, space).run()


@dataclass(slots=True)
class _Queue:
    """The numbers of the choices that are left to look at.

    by_bound: heaps of them by the lower bound of their step in seconds, one without (False) and one
        with (True) vocabulary parallelism.
    by_bytes: a heap of them by their least bytes.
    drafted: those that were drafted since something fits.
    next_drafts: how many of these there are when one is estimated, see `_Search._estimate`.
    doubtful: those that wait until all others were estimated.
    looks_at_all: whether these have their turn now.
    passed_over: those to look at after all others.
    """

    by_bound: tuple[list[tuple[float, int]], ...] = field(default_factory=lambda: ([], []))
    by_bytes: list[tuple[float, int]] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    next_drafts: int = _FIRST_DRAFTS
    doubtful: list[int] = field(default_factory=list)
    looks_at_all: bool = False
    passed_over: list[int] = field(default_factory=list)

    def add(self, other: _Queue) -> None:
        """Add what another queue has left."""
        for ours, theirs in zip(self.by_bound, other.by_bound, strict=True):
            ours += theirs
            heapq.heapify(ours)
        self.by_bytes = sorted(self.by_bytes + other.by_bytes)
        self.drafted += other.drafted
        self.next_drafts = 2 * max(_FIRST_DRAFTS, len(self.drafted))
        self.doubtful += other.doubtful
        self.looks_at_all = False
        self.passed_over += other.passed_over

    @property
    def numbers(self) -> set[int]:
        """All of them, and some that were estimated since."""
        waiting = {number for heap in self.by_bound for _, number in heap}
        return waiting.union(self.doubtful, self.passed_over)


class _Search:
    """One search: what is left to look at, what was found, and the effort that was spent."""

    def __init__(
        self,
        config: RunConfig,
        limits: Limits,
        in_time: Callable[[], bool],
        progress: Callable[[str], object],
        space: Space,
        *,
        below: float = math.inf,
        shared: Shared | None = None,
    ) -> None:
        self._below = below  # the seconds that a choice must be faster than to be looked for
        self._plans = True  # and looks for the best with and without vocabulary parallelism
        self._cluster, self._limits, self._space = config.cluster, limits, space
        self._typed = as_typed(config)
        self._in_time, self._progress = in_time, progress
        if shared is None:
            limit = limit_of(config.cluster, limits.margin)
            shared = Shared(Scales(config, limit, margin=limits.margin), keeps_steps=False)
        self._shared = shared
        self._scales = shared.scales.with_optimizers(space.optimizers)
        self._spent = self._num_estimated = self._num_drafted = 0
        self._spent_on = [0, 0]  # by `_estimate`: without and with vocabulary parallelism
        self._num_layers = config.model.num_layers
        self._num_before = 0  # estimates of what was typed and does not fit
        self._enough = 0.0  # effort for estimates once something fits
        self._is_on_gpus = config.run.device == "cuda"
        self._queue = _Queue()
        self._unweighed: list[int] = []
        # By number of the choice: itself, the lower bound of its step, and what was drafted.
        self._choices = list(space.choices)
        self._numbers = {choice: number for number, choice in enumerate(self._choices)}
        self._bounds: dict[int, float] = {}
        self._exact: set[int] = set()  # those whose bound is what they take
        self._items: list[Candidate | None] = [None] * len(space.choices)
        self._factors: dict[tuple[object, ...], float] = {}  # of estimates above bounds
        self._excess_bytes: dict[tuple[object, ...], float] = {}  # above what was expected
        self._done: set[int] = set()
        self._book = Book(Counter(space.excluded))
        self._balanced: set[Choice] = set()  # those that were looked at with vocab.balance
        self._pressed: list[Choice] = []  # those that seem to fit with an optimizer on hosts only
        self._offloads: set[Choice] = set()  # those beyond the space that were weighed
        self._looked_around: set[Choice] = set()
        # Those of which single stages were changed, and whether they recompute less then.
        self._changed: set[tuple[Choice, bool]] = set()
        self._for_stages = _FOR_STAGES * limits.effort  # that is left for these
        # What almost fits, with the seconds of its step.
        self._almost: dict[Choice, tuple[float, Candidate]] = {}

    def run(self, firsts: Sequence[Choice] = (), *, plans: bool = True) -> Result:
        offloads = self._is_on_gpus and plans
        self._plans = plans
        part = _BEFORE_OFFLOADING if offloads else _FOR_ESTIMATES
        self._enough = part * self._limits.effort
        self._weigh()
        for choice in firsts:
            self._estimate_first(self._numbers[choice])
        if plans:
            self._estimate_typed()
        while True:
            before = self._seen
            self._estimate(self._queue, self._limits.top)
            if offloads and self._in_time():
                self._offload_instead()
                self._estimate(self._queue, self._limits.top)
                offloads = False
            if plans:
                self._estimate_other_kind()
                self._confirm()
                self._look_around()
                self._change_stages()
                self._balance()
                self._plan()
            if not plans or self._seen == before or not self._goes_on():
                break
        rows, spare = self._book.distinct()
        first = next((estimate for estimate in rows if estimate.is_planned), None)
        top = rows[: self._limits.top]
        if first is not None and first not in top:  # one plan is made and shown in any case
            top[-1] = first
        best = tuple(self._book.planned[e.candidate.choice] for e in top if e.is_planned)
        last = top[-1].counted if len(top) == self._limits.top else float("inf")
        left = self._queue.numbers - self._done
        num_open = len(self._unweighed) + sum(self._key(number) < last for number in left)
        num_open += sum(
            not estimate.is_planned and estimate.counted * (1 - _SLACK) < last
            for estimate in self._book.as_planned()
            if estimate.candidate.choice not in spare
        )
        refused = sorted(self._book.refused, key=lambda refusal: refusal.bound)
        return Result(
            best=best,
            with_vocabulary=self._book.first(splits_vocabulary=True),
            without_vocabulary=self._book.first(splits_vocabulary=False),
            without_offloading=self._book.without_offloading(),
            leaner=self._book.leaner(best[0] if best else None),
            estimated=tuple(estimate for estimate in top if not estimate.is_planned),
            leanest=self._book.closest(self._scales),
            refused=tuple(refused[:_KEPT_REFUSALS]),
            excluded=+self._book.excluded,  # without those that ruled out nothing
            num_choices=len(self._choices) + self._num_excluded - self._book.num_same,
            num_added=len(self._choices) - len(self._space.choices),
            num_same=self._book.num_same,
            num_estimated=self._num_estimated,
            num_planned=len(self._book.planned),
            num_open=num_open,
            num_unseen=Counter(
                self._choices[number].splits_vocabulary for number in (*left, *self._unweighed)
            ),
            ended=self._ended if num_open else "",
            kept=self._space.kept,
        )

    @property
    def _num_excluded(self) -> int:
        """The choices that are ruled out before any is weighed."""
        return sum(self._space.excluded.values())

    @property
    def _seen(self) -> tuple[int, int, int]:
        """What grows, or shrinks where a plan does not fit, while the search finds something."""
        return self._num_estimated, len(self._book.estimates), len(self._book.planned)

    @property
    def _ended(self) -> str:
        return "effort" if self._in_time() else "time"

    def _weigh(self) -> None:
        """Weigh all choices.  Out of time, those that were weighed are a sample of all."""
        self._scales.check(self._choices)
        numbers = list(range(len(self._choices)))
        random.Random(1).shuffle(numbers)
        before = self._num_excluded  # a summary counts them too
        for place, number in enumerate(numbers):
            if place % 128 == 0:
                total = before + len(numbers)
                self._progress(f"{before + place:,} of {total:,} choices weighed")
                if any(self._queue.by_bound) and not self._in_time():
                    self._unweighed = numbers[place:]
                    break
            choice = self._choices[number]
            self._spent += _WEIGH_NODES
            try:
                if self._below < math.inf and self._scales.bound(choice) >= self._below:
                    continue  # it will not be looked at, whatever memory it needs
                weight = self._scales.weigh(choice)
            except ConfigError as error:
                self._book.refuse(choice, error, 0.0)
            else:
                self._put(self._queue, number, weight)

    def _put(self, queue: _Queue, number: int, weight: Weight) -> None:
        """Put a choice that was weighed into a queue."""
        self._bounds[number] = weight.seconds
        if weight.optimizer is not None and weight.optimizer.offload:
            self._pressed.append(self._choices[number])
        self._push(queue, number, weight.needs)

    def _push(self, queue: _Queue, number: int, num_bytes: float | None = None) -> None:
        """Put a choice into a queue; by its bytes, too, if they are given."""
        splits = self._choices[number].splits_vocabulary
        heapq.heappush(queue.by_bound[splits], (self._key(number), number))
        if num_bytes is not None:
            heapq.heappush(queue.by_bytes, (num_bytes, number))

    def _goes_on(self) -> bool:
        """Return whether to estimate another choice: the first one always, if no time is known."""
        enough = self._enough
        if not self._knows_time:
            if self._num_estimated == self._num_before:
                return True
            enough = max(self._limits.effort, self._enough)
        return self._spent < enough and self._in_time()

    @property
    def _knows_time(self) -> bool:
        """Whether a time is known which others have to beat."""
        return bool(self._book.estimates) or self._below < math.inf

    def _estimate_typed(self) -> None:
        """Estimate the run as it was typed if it seems to fit, so that no result is slower."""
        number = None if self._typed is None else self._numbers.get(self._typed)
        if number is not None:
            self._estimate_first(number, is_sure=False)

    def _estimate_first(self, number: int, *, is_sure: bool = True) -> None:
        """Estimate a choice before others; unless `is_sure` only if it seems to fit cheaply."""
        if number not in self._bounds:
            return
        try:
            item = self._items[number] = self._draft(self._choices[number])
            self._spent += draft_nodes(item)
            self._bounds[number] = item.seconds
            if not is_sure and self._is_doubtful(item, self._queue):
                return
            self._done.add(number)
            self._book.add(self._estimate_of(item))
        except ConfigError as error:
            self._done.add(number)
            self._refuse(number, error)
            self._num_before = self._num_estimated  # the leanest is estimated in any case

    def _estimate(self, queue: _Queue, top: int) -> None:
        """Estimate choices until none left could be among the `top`, or the effort is spent.

        What seems not to fit comes last, and what takes a large part of the effort.  It may take
        thousands of drafts, which tighten the bounds, to know the choice with the lowest bound.  So
        after 32, 64, 128 ... drafts the lowest of those is estimated: a search that ends early has
        then seen more than the leanest choice.
        """
        # Plans may be slower than their estimates were, or not fit.
        for passed in queue.passed_over:
            self._push(queue, passed)
        queue.passed_over = []
        while self._goes_on():
            number = self._next(queue, top)
            if number is None:
                if not queue.doubtful:
                    return
                self._look_at_doubtful(queue)
                continue
            item, choice = self._items[number], self._choices[number]
            before = self._spent
            try:
                if item is None:
                    item = self._items[number] = self._draft(choice)
                    self._spent += draft_nodes(item)
                    self._bounds[number] = item.seconds
                    least = self._shared.least(item)
                    if least is not None:
                        self._bounds[number] = least
                        self._exact.add(number)
                    if self._knows_time:
                        self._push(queue, number)
                        queue.drafted.append(number)
                        self._num_drafted += 1
                        self._progress(f"{self._num_drafted:,} looked at, {self._words()}")
                        continue
                if self._is_doubtful(item, queue):
                    queue.doubtful.append(number)
                    continue
                self._done.add(number)
                self._book.add(self._estimate_of(item))
            except ConfigError as error:
                self._done.add(number)
                self._refuse(number, error)
            finally:
                self._spent_on[choice.splits_vocabulary] += self._spent - before
            self._progress(self._words())

    def _draft(self, choice: Choice) -> Candidate:
        """Return the draft of a choice, with balanced rows where these save much.

        They may where ranks have different numbers of layers.  Raises ConfigError like `draft`.
        """
        is_even = self._num_layers % choice.degrees.pp == 0
        if is_even or not choice.splits_vocabulary or "vocab.balance" in self._space.kept.values:
            return self._scales.draft(choice)
        drafts, refusal = list[Candidate](), None
        for one in (choice, replace(choice, balance=True)):
            try:
                drafts.append(self._scales.draft(one))
            except ConfigError as error:
                refusal = refusal or error
            else:
                if drafts[0].vocabulary_part <= _MUCH_BALANCED:
                    return drafts[0]
        if not drafts:
            assert refusal is not None
            raise refusal
        self._spent += draft_nodes(drafts[0])
        best = min(drafts, key=lambda item: item.passes)
        return drafts[0] if drafts[0].passes <= (1 + _MUCH_BALANCED) * best.passes else best

    def _refuse(self, number: int, error: ConfigError) -> None:
        """Book a choice as refused, with the stages that recompute once they are known."""
        item = self._items[number]
        choice = self._choices[number] if item is None else item.choice
        self._book.refuse(choice, error, self._bounds[number])

    def _estimate_other_kind(self) -> None:
        """Estimate a choice with or without vocabulary parallelism if only the other was found.

        A few that seem to fit are tried, the lowest bounds first, whatever effort is left.
        """
        kinds = {estimate.splits_vocabulary for estimate in self._book.estimates}
        if len(kinds) != 1 or not self._in_time():
            return
        left = sorted((self._key(number), number) for number in self._queue.numbers)
        tries = 0
        for _, number in left:
            choice = self._choices[number]
            if number in self._done or choice.splits_vocabulary in kinds:
                continue
            tries += 1
            if tries > _TRIES_OF_OTHER_KIND:
                return
            try:
                item = self._items[number] = self._items[number] or self._draft(choice)
                if item.seems_to_fit:
                    self._book.add(self._estimate_of(item))
                    self._done.add(number)
                    return
            except ConfigError as error:
                self._done.add(number)
                self._refuse(number, error)

    def _confirm(self) -> None:
        """Plan the best estimate whole, and if that is slower estimate what it had ruled out.

        That goes on up to three times, as far as the effort suffices.  Short steps say least of a
        whole one where the backward is split, so only such an estimate is doubted.
        """
        for _ in range(_MOST_CONFIRMED):
            best = self._book.fastest()
            if best is None or best.is_planned or not self._in_time():
                return
            candidate = best.candidate
            if not GENERATORS[candidate.choice.schedule].split_backward:
                return
            if self._spent + plan_nodes(candidate) > self._limits.effort:
                return
            self._progress(f"{self._words()}; planning a step whole")
            self._plan_one(best)
            self._progress(self._words())
            self._estimate(self._queue, self._limits.top)

    def _offload_instead(self) -> None:
        """Estimate offloaded activations where device memory alone may rule out faster choices.

        They have a queue of their own, in which only the best of each kind is looked for.
        """
        queue = _Queue()
        self._weigh_into(queue, self._offloading())
        effort = self._limits.effort
        self._enough = max(_FOR_ESTIMATES * effort, self._spent + _FOR_OFFLOADING * effort)
        self._estimate(queue, 1)
        self._queue.add(queue)

    def _weigh_into(self, queue: _Queue, choices: Iterable[Choice]) -> None:
        """Put choices that are not in the space into a queue if they may be the best of a kind."""
        _, first_of = self._to_beat(1)
        for choice in choices:
            if choice in self._offloads:
                continue
            self._offloads.add(choice)
            self._spent += _WEIGH_NODES
            try:
                weight = self._scales.weigh(choice)
            except ConfigError:
                continue
            is_faster = counted(choice, weight.seconds) < first_of[choice.splits_vocabulary]
            if is_faster and weight.seems_to_fit:
                number = self._numbers[choice] = len(self._choices)
                self._choices.append(choice)
                self._items.append(None)
                self._put(queue, number, weight)

    def _look_around(self) -> None:
        """Estimate what differs in one thing from the best of each kind, as long as that helps.

        There are kinds with and without vocabulary parallelism, with and without offloading, and
        with some stages that recompute beside that.  The effort ends before many bounds are tight,
        and what is offloaded was weighed for some of the choices only.  What is next to the best is
        the likeliest to be better.
        """
        before, part = self._enough, _FOR_NEIGHBOURS * self._limits.effort
        until = self._spent + part
        while self._spent < until and self._in_time():
            firsts = [estimate.candidate.choice for estimate in self._first_estimates()]
            new = [choice for choice in firsts if choice not in self._looked_around]
            nearly = [
                choice
                for choice in self._nearly(has_chunks=True)
                if choice not in self._looked_around
            ]
            if not new and not nearly:
                break
            self._looked_around.update(new, nearly)
            around = [other for one in new for other in self._around(one)]
            around += [other for one in nearly for other in self._in_more_stages(one)]
            found = list(dict.fromkeys(around))
            for splits in (True, False):
                queue = _Queue()
                of_kind = [choice for choice in found if choice.splits_vocabulary is splits]
                for choice in of_kind:
                    number = self._numbers.get(choice)
                    if number in self._bounds and number not in self._done:
                        self._push(queue, number, 0.0)
                self._weigh_into(queue, (one for one in of_kind if one not in self._numbers))
                self._enough = min(until, self._spent + part / 2)
                self._estimate(queue, 1)
                self._queue.add(queue)
        self._enough = before

    def _first_estimates(self) -> list[Estimate]:
        """Return the fastest of each kind of `_look_around`."""
        found: dict[tuple[bool, bool, bool], Estimate] = {}
        for estimate in sorted(self._book.as_planned(), key=lambda estimate: estimate.known_key):
            choice = estimate.candidate.choice
            moves = choice.offload > 0
            kind = choice.splits_vocabulary, moves, moves and choice.recomputes_partly
            found.setdefault(kind, estimate)
        return list(found.values())

    def _nearly(self, *, has_chunks: bool = False) -> list[Choice]:
        """Return what would be the fastest of its kind if it needed a little less memory.

        With `has_chunks` the number of its chunks has to be free.
        """
        _, first_of = self._to_beat(1)
        found = [
            (counted(choice, seconds), place, choice)
            for place, (choice, (seconds, _)) in enumerate(self._almost.items())
            if counted(choice, seconds) < first_of[choice.splits_vocabulary]
            and (choice.num_chunks is not None or not has_chunks)
        ]
        return [choice for _, _, choice in heapq.nsmallest(_TRIES_NEARLY, found)]

    def _in_more_stages(self, choice: Choice) -> list[Choice]:
        """Return the choice with one more stage on every rank, if there may be one."""
        return [
            one
            for one in beside(choice, self._num_layers)
            if one.layout.num_stages > choice.layout.num_stages
            and self._space.kept.against(one) is None
        ]

    def _change_stages(self) -> None:
        """Let single stages recompute less in the best of each kind, and more in what almost fits.

        Where the backward is split, no sum over stages says what a rank keeps.  So each is tried.
        """
        tried = [(estimate.candidate, True) for estimate in self._first_estimates()]
        tried += [(self._almost[choice][1], False) for choice in self._nearly()]
        before = self._spent
        until = before + self._for_stages
        for candidate, fits in tried:
            while (candidate.choice, fits) not in self._changed:
                if self._is_over(until):
                    break
                self._changed.add((candidate.choice, fits))
                better = self._with_other_stage(candidate, until, fewer=fits)
                if better is None:
                    break
                self._book.add(better)
                self._progress(self._words())
                candidate, fits = better.candidate, True
        self._for_stages -= self._spent - before

    def _is_over(self, until: float) -> bool:
        """Return whether the effort `until` some point, or the time, is spent."""
        return self._spent >= until or not self._in_time()

    def _with_other_stage(
        self, candidate: Candidate, until: float, *, fewer: bool
    ) -> Estimate | None:
        """Return the first that beats its kind of those in which one stage recomputes otherwise.

        That is less with `fewer`, else more.  None if none does.
        """
        drafts = list[Candidate]()
        for choice in candidate.choice.with_other_stage(fewer=fewer):
            number = self._numbers.get(choice)
            if number in self._done or self._space.kept.against(choice) is not None:
                continue
            if self._is_over(until):
                return None
            self._spent += draft_nodes(replace(candidate, choice=choice))
            with suppress(ConfigError):
                drafts.append(self._scales.draft(choice))
        for other in sorted(drafts, key=lambda one: one.seconds):
            choice, number = other.choice, self._numbers.get(other.choice)
            if self._is_over(until):
                return None
            if not self._may_be_first(choice, other.seconds):
                return None
            if number is not None:
                self._done.add(number)
            self._num_estimated += 1
            estimate = self._tried(other)[1]
            if estimate is not None and self._may_be_first(choice, estimate.seconds):
                return estimate
        return None

    def _around(self, choice: Choice) -> list[Choice]:
        """Return the choices that `_look_around` tries."""
        found = neighbours(choice, self._space.choices) + beside(choice, self._num_layers)
        if self._is_on_gpus and (choice.offload or choice.recompute != "none"):
            found += offloading(choice, self._num_layers, where_needed=True)
        return [one for one in found if self._space.kept.against(one) is None]

    def _offloading(self) -> list[Choice]:
        """Return the choices with offloaded activations to try.

        They take the place of what was refused for memory, seems not to fit or fits with an
        optimizer in host memory only, and of the best of each kind, where it recomputes.
        """
        best = [
            first for kind in (True, False) if (first := self._book.first(splits_vocabulary=kind))
        ]
        binding = [e.candidate.choice for e in best if e.choice.recompute != "none"]
        binding += [e.candidate.choice for e in self._book.estimates if e.optim.offload]
        binding += [refusal.choice for refusal in self._book.refused if refusal.needs is not None]
        binding += self._pressed
        binding += [
            choice
            for choice, item in zip(self._choices, self._items, strict=True)
            if item is not None and (item.is_pressed or not item.seems_to_fit)
        ]
        return [
            choice
            for choice in dict.fromkeys(
                other for bound in binding for other in offloading(bound, self._num_layers)
            )
            if choice not in self._numbers and self._space.kept.against(choice) is None
        ]

    def _look_at_doubtful(self, queue: _Queue) -> None:
        """Let what is dear or seems not to fit have its turn.

        Of the latter hardly any fits, so where a time is known by short steps only a few are tried.
        """
        numbers = queue.doubtful
        if not self._plans and self._knows_time:
            items = {number: self._items[number] for number in sorted(numbers, key=self._key)}
            numbers = [number for number, item in items.items() if item and item.seems_to_fit]
            others = [number for number in items if number not in numbers]
            numbers += others[:_TRIES_OF_DOUBTFUL]
            queue.passed_over += others[_TRIES_OF_DOUBTFUL:]
        for place, number in enumerate(numbers):
            self._push(queue, number, float(place))
        queue.doubtful, queue.looks_at_all = [], True

    def _key(self, number: int) -> float:
        """Return about the least seconds of a choice: its bound and what others are above it."""
        choice, item, bound = self._choices[number], self._items[number], self._bounds[number]
        if item is not None and len(item.optimizers) > 1:
            room = (1 + _MEMORY_TOLERANCE) * self._scales.limit - self._excess_of(item.choice)
            seconds = item.seconds_within(room)
            bound += seconds - item.seconds if item.seconds < seconds < math.inf else 0.0
        factor = 1.0 if number in self._exact else self._factors.get(_alike(choice), 1.0)
        return counted(choice, bound) * factor

    def _excess_of(self, choice: Choice) -> float:
        """Return how many bytes more than expected similar choices need at least, or -inf."""
        return self._excess_bytes.get(_similar_memory(choice), -math.inf)

    def _next(self, queue: _Queue, top: int) -> int | None:
        """Take the choice to look at next, None if no other could be among the `top`."""
        if not self._knows_time:
            return self._leanest(queue)
        if len(queue.drafted) >= queue.next_drafts:
            queue.next_drafts *= 2
            seen = self._done.union(queue.doubtful, queue.passed_over)
            waiting = [
                (self._key(number), number)
                for number in queue.drafted
                if number not in seen and not self._is_doubtful(self._items[number], queue)
            ]
            last, first_of = self._to_beat(top)
            key, number = min(waiting, default=(math.inf, 0))
            if key < max(last, first_of[self._choices[number].splits_vocabulary]):
                return number
        return self._lowest(queue, top)

    def _is_doubtful(self, item: Candidate | None, queue: _Queue) -> bool:
        """Return whether a draft waits until all others were estimated."""
        assert item is not None, "it was drafted"
        is_dear = placed_by_short(item.draft.problem) > _DEAR * self._limits.effort
        needs = min(item.expected) + self._excess_of(item.choice)
        fits = item.seems_to_fit and needs <= NEARLY * self._scales.limit
        return (is_dear or not fits) and not queue.looks_at_all

    def _lowest(self, queue: _Queue, top: int) -> int | None:
        """Take what may be the fastest choice that is left, unless it cannot be among the `top`.

        Where the best of both kinds are looked for, with and without vocabulary parallelism, each
        has a third of the effort at least.
        """
        last, first_of = self._to_beat(top)

        def open_kinds() -> dict[bool, float]:
            keys = {splits: self._first(queue.by_bound[splits]) for splits in (False, True)}
            return {
                splits: key for splits, key in keys.items() if key < max(last, first_of[splits])
            }

        kinds = open_kinds()
        if not kinds:
            self._renew(queue)
            kinds = open_kinds()
        if not kinds:
            return None
        least = _FOR_OTHER_KIND * sum(self._spent_on) if self._plans else 0.0
        splits = min(kinds, key=lambda splits: (self._spent_on[splits] >= least, kinds[splits]))
        return heapq.heappop(queue.by_bound[splits])[1]

    def _renew(self, queue: _Queue) -> None:
        """Renew the keys in heaps, since simulations may have lowered what is expected."""
        for heap in queue.by_bound:
            left = [number for _, number in heap if number not in self._done]
            heap[:] = [(self._key(number), number) for number in left]
            heapq.heapify(heap)

    def _first(self, heap: list[tuple[float, int]]) -> float:
        """Return the key of the first choice in a heap, where it stays; infinite if none is left.

        Others were estimated, or exceed their bounds as those did that are alike.
        """
        while heap:
            known, number = heap[0]
            key = self._key(number)
            if number in self._done:
                heapq.heappop(heap)
            elif key > known:
                heapq.heapreplace(heap, (key, number))
            else:
                return key
        return math.inf

    def _to_beat(self, top: int) -> tuple[float, dict[bool, float]]:
        """Return the seconds of the last of the `top`, and of the first of each kind."""
        shown = sorted(one.counted for one in self._book.distinct()[0])
        last = min(shown[top - 1] if len(shown) >= top else math.inf, self._below)
        if not self._plans:
            return last, {True: last, False: last}
        first_of = {
            splits: min(
                (e.counted for e in self._book.as_planned() if e.splits_vocabulary is splits),
                default=float("inf"),
            )
            for splits in (True, False)
        }
        return last, first_of

    def _leanest(self, queue: _Queue) -> int | None:
        """Take the choice that is left which seems to need least memory."""
        while queue.by_bytes:
            _, number = heapq.heappop(queue.by_bytes)
            if number not in self._done:
                return number
        return None

    def _estimate_of(self, candidate: Candidate) -> Estimate:
        """Return the estimate for the fastest optimizer that fits.

        Where some stages may recompute, more of them do until one fits, beside offloading up to
        `_ROUNDS` times, else once; then fewer of them do, up to `_ROUNDS` times, as long as that is
        faster.  That goes on only while it may be the fastest of its kind.  Raises TooLargeError if
        none fits, and HostMemoryError if only the hosts lack memory.
        """
        self._num_estimated += 1
        step, best, refusal = self._tried(candidate)
        for _ in range(_ROUNDS if candidate.choice.offload else 1):
            if best is not None:
                break
            more = self._other(self._scales.with_more_recompute, candidate, step)
            if more is None:
                break
            candidate = more
            step, best, _ = self._tried(candidate)
        if best is None:
            assert refusal is not None
            raise refusal
        for _ in range(_ROUNDS):
            which = best.candidate, step, best.optim
            fewer = self._other(self._scales.with_fewer_recompute, *which)
            if fewer is None:
                break
            fewer_step, other, _ = self._tried(fewer)
            if other is None or other.seconds >= best.seconds:
                break
            step, best = fewer_step, other
        return best

    def _other(
        self, drafted: Callable[..., Candidate | None], *arguments: object
    ) -> Candidate | None:
        """Return a candidate in which other stages recompute if it may be the first of its kind."""
        try:
            other = drafted(*arguments)
        except ConfigError:
            return None
        if other is None or self._space.kept.against(other.choice) is not None:
            return None
        self._spent += draft_nodes(other)
        return other if self._may_be_first(other.choice, other.seconds) else None

    def _tried(self, candidate: Candidate) -> tuple[StepPlan, Estimate | None, ConfigError | None]:
        """Return a short step, and the estimate for the fastest optimizer that fits, else why not.

        What almost fits is noted.
        """
        step, passes, placed = self._shared.short_step(candidate)
        self._spent += effort_of(candidate.choice, placed)
        passes = max(passes, candidate.passes)
        factor = max(1.0, _ALIKE * passes / candidate.passes)
        _note_least(self._factors, _alike(candidate.choice), factor)
        refusal: ConfigError | None = None
        found: list[Estimate] = []
        almost: list[float] = []
        totals = self._scales.needs(step, candidate.optimizers)
        excess = totals[0][0] - candidate.expected[0]
        _note_least(self._excess_bytes, _similar_memory(candidate.choice), excess)
        for optim, (needs, rank) in zip(candidate.optimizers, totals, strict=True):
            if needs > self._scales.limit:
                refusal = TooLargeError(needs, self._scales.limit, SIMULATED, rank)
                if needs <= NEARLY * self._scales.limit:
                    almost.append(passes + self._scales.after(step, optim))
                continue
            try:
                host = self._host_bytes(step, optim)
            except HostMemoryError as error:
                refusal = refusal or error
                continue
            seconds = passes + self._scales.after(step, optim)
            found.append(Estimate(candidate, optim, seconds, needs, host))
        best = min(found, key=lambda estimate: estimate.seconds, default=None)
        if almost and (best is None or min(almost) < best.seconds):
            self._almost[candidate.choice] = min(almost), candidate
        return step, best, refusal

    def _may_be_first(self, choice: Choice, seconds: float) -> bool:
        """Return whether a step of so many seconds would be the fastest of its kind."""
        _, first_of = self._to_beat(1)
        return counted(choice, seconds) < first_of[choice.splits_vocabulary]

    def _host_bytes(self, step: StepPlan, optim: OptimConfig) -> float:
        """Return what a step keeps in host memory.  Raises HostMemoryError for too much."""
        if not optim.offload and not step.cost.offload_bytes:
            return 0.0
        needs = most_host_bytes(step, optim, self._cluster.gpus_per_node).total
        check_hosts(needs, self._scales.host_limit)
        return needs

    def _balance(self) -> None:
        """Estimate vocab.balance in the place of what may be among the best with it.

        It gives rows to ranks with less other work.  Two bounds say about how much that saves.  The
        busiest rank then keeps less, too, so what almost fits has its turn as well.
        """
        if "vocab.balance" in self._space.kept.values:
            return
        found = {one.candidate.choice: one for one in self._book.estimates}
        tried = {choice: (one.seconds, one.candidate) for choice, one in found.items()}
        tried |= self._almost  # with an optimizer that is faster than the one that fits
        promising: list[tuple[float, int, Candidate, Estimate | None]] = []
        for place, (choice, (seconds, candidate)) in enumerate(tried.items()):
            if not choice.splits_vocabulary or choice.balance or choice in self._balanced:
                continue
            if not self._in_time():
                break
            self._balanced.add(choice)
            try:
                item = self._scales.draft(replace(choice, balance=True))
            except ConfigError:
                continue
            self._spent += draft_nodes(item)
            saved = candidate.passes - item.passes
            if saved > _LEAST_BALANCED * candidate.passes:
                least = counted(choice, seconds - saved)
                promising.append((least, place, item, found.get(choice)))
        enough = self._spent + _FOR_BALANCE * self._limits.effort
        for seconds, _, item, estimate in sorted(promising, key=lambda one: one[:2]):
            last, first_of = self._to_beat(self._limits.top)
            if seconds >= max(last, first_of[True]) or self._is_over(enough):
                return
            try:
                balanced = self._estimate_of(item)
            except ConfigError:
                continue
            self._balanced.add(balanced.candidate.choice)
            if estimate is None:
                self._book.add(balanced)
            elif balanced.seconds < (1 - _LEAST_BALANCED) * estimate.seconds:
                self._book.replace(estimate, replace(balanced, unbalanced=estimate))
            self._progress(self._words())

    def _plan(self) -> None:
        """Plan the best estimates, as far as the effort suffices.

        After that a few are planned which should be faster than the first plan, so that this is no
        slower than what was not planned.  Of what is alike only one is planned.
        """
        queue = sorted(self._book.estimates, key=lambda estimate: estimate.key)
        firsts = [
            next((e for e in queue if e.splits_vocabulary is splits), None)
            for splits in (True, False)
        ]
        ahead = sorted((e for e in firsts if e is not None), key=lambda estimate: estimate.key)
        beyond = 0
        for estimate in [*ahead, *(e for e in queue if e not in ahead)]:
            times = [one.counted for one in self._book.distinct()[0] if one.is_planned]
            enough = len(times) >= self._limits.top and estimate not in ahead
            if enough and estimate.counted * (1 - _SLACK) >= times[self._limits.top - 1]:
                continue  # estimates are sorted by three digits, so others may be faster
            if estimate.candidate.choice in self._book.planned:
                continue
            if any(other.makes_spare(estimate) for other in self._book.held()):
                continue
            cost = plan_nodes(estimate.candidate)
            if self._book.planned and self._spent + cost > self._limits.effort:
                self._spent = self._limits.effort
                if estimate.counted >= times[0] or beyond == _MOST_BEYOND:
                    continue
                beyond += 1
            if self._book.planned and not self._in_time():
                return
            self._progress(f"{self._words()}; planning a step whole")
            self._plan_one(estimate)
            self._progress(self._words())

    def _plan_one(self, estimate: Estimate) -> None:
        """Plan the whole step of an estimate, and drop the estimate if no optimizer fits.

        The step may need more than it seemed to, and another optimizer less.
        """
        choice, candidate = estimate.candidate.choice, estimate.candidate
        self._spent += plan_nodes(candidate)
        step = candidate.draft.with_named(choice.schedule)
        others = [optim for optim in candidate.optimizers if optim != estimate.optim]
        refusal: ConfigError | None = None
        for optimizers in ([estimate.optim], others):
            found = list[Found]()
            for optim in optimizers:
                try:
                    found.append(self._found(step, choice, optim))
                except ConfigError as error:
                    refusal = refusal or error
            if found:
                self._book.plan(choice, min(found, key=lambda one: one.report.step_seconds))
                return
        assert refusal is not None, "nothing was found"
        if isinstance(refusal, TooLargeError) and refusal.needs <= NEARLY * self._scales.limit:
            self._almost[choice] = estimate.seconds, candidate
        self._book.refuse(choice, refusal, estimate.seconds)
        self._book.replace(estimate, estimate.unbalanced)
        if estimate.unbalanced is not None:
            self._plan_one(estimate.unbalanced)

    def _found(self, step: StepPlan, choice: Choice, optim: OptimConfig) -> Found:
        """Return the report of a whole step.  Raises ConfigError if it does not fit."""
        report = report_of(step, self._cluster, optim, cost=self._scales.cost_of(choice))
        check_hosts(report.host.total, self._scales.host_limit)
        needs = report.ranks[report.worst].memory.total
        if needs > self._scales.limit:
            raise TooLargeError(needs, self._scales.limit, SIMULATED, report.worst)
        return Found(replace(choice, optimizer=optim), report)

    def _words(self) -> str:
        best = min((e.seconds for e in self._book.estimates), default=None)
        shown = "none fits yet" if best is None else f"the best takes about {duration(best)}"
        planned = f", {len(self._book.planned)} planned" if self._book.planned else ""
        return f"{self._num_estimated:,} simulated{planned}; {shown}"


def _alike(choice: Choice) -> tuple[object, ...]:
    """Return what choices have in common which exceed their bounds by similar factors.

    With a split backward more microbatches are in flight where stages recompute, so less is waited
    for slow links.
    """
    degrees, count = choice.degrees, choice.num_microbatches
    step = choice.schedule, choice.num_chunks, choice.vocab, degrees.pp, degrees.tp, count
    splits = GENERATORS[choice.schedule].split_backward
    return (*step, choice.recompute, choice.recomputes_partly) if splits else step


def _similar_memory(choice: Choice) -> tuple[object, ...]:
    """Return what choices have in common which need about as much more than is expected.

    Where only some stages recompute, memory has chosen them, so these count only if they are same.
    """
    degrees = choice.degrees
    return (
        *(choice.schedule, degrees.pp, degrees.tp, choice.micro_batch_size),
        *(choice.sequence_parallel, choice.recompute, choice.recompute_per_stage),
        choice.offload > 0,
    )


def _note_least(
    known: dict[tuple[object, ...], float], similar: tuple[object, ...], value: float
) -> None:
    """Note the least value that simulations of similar choices gave."""
    known[similar] = min(value, known.get(similar, value))


def without_vocabulary(config: RunConfig, degrees: Degrees, shared: Shared | None = None) -> Result:
    """Return the fastest ways to run `config` without vocabulary parallelism on the same degrees.

    Its schedule, chunks and placement are free, and short steps are simulated, which are `shared`
    with other searches.  Its own schedule comes first, whatever effort that takes.
    """
    space, own = without_vocabulary_of(config, degrees), config.schedule
    same = [
        choice
        for choice in space.choices
        if choice.schedule == own.name and choice.num_chunks in (None, own.num_chunks)
    ]
    return simulated(config, space, _EFFORT_OF_ONE_LINE, same, shared=shared)


def simulated(
    config: RunConfig,
    space: Space,
    effort: int,
    firsts: Sequence[Choice] = (),
    *,
    below: float = math.inf,
    shared: Shared | None = None,
) -> Result:
    """Return the fastest of `space` by short steps of `effort` passes, without a margin.

    `firsts` are estimated before others, whatever effort that takes.  What cannot take fewer than
    `below` seconds is not looked at, and no step that is `shared` is simulated again.
    """
    limits = Limits(top=1, margin=0.0, effort=effort)
    search = _Search(
        config, limits, lambda: True, lambda words: None, space, below=below, shared=shared
    )
    return search.run(firsts, plans=False)


def fits_on(config: RunConfig, margin: float, kept: Kept = ALL) -> Choice | None:
    """Return a choice whose draft fits with the leanest activations, None if none is found.

    Those that weigh least are drafted, for what a weight says may be too little.
    """
    space = space_of(config, kept)
    scales = Scales(config, limit_of(config.cluster, margin), space.optimizers, margin)
    leanest = kept.values.get("parallel.recompute", "full")
    found = list[tuple[float, int, Choice]]()
    for number, choice in enumerate(space.choices):
        if choice.recompute != leanest or choice.recompute_where_needed:
            continue
        try:
            weight = scales.weigh(choice)
        except ConfigError:
            continue
        found.append((weight.needs, number, replace(choice, optimizer=weight.optimizer)))
    for _, _, choice in heapq.nsmallest(_TRIES_TO_FIT, found):
        try:
            scales.draft(replace(choice, optimizer=None))
        except ConfigError:
            continue
        return choice
    return None
