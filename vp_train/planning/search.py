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
7. Estimate vocab.balance in the place of what may be among the best with it, then 6 again.
8. Estimate other passes in the stages of the best, which recompute as was found in 6 and 7.
9. Plan the best estimates as a run would plan them.
10. Let schedule=auto order the passes of what may become the best by that.

Links to hosts and their memory are assumed, so a step with offloaded activations counts as half a
percent longer wherever it is compared (`counted`).

Its effort is counted in passes, not in seconds, so that every machine finds the same plans.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from schedules.generators import GENERATORS
from vp_train.config import ConfigError, RunConfig
from vp_train.planning.book import Book
from vp_train.planning.choice import Choice, as_typed
from vp_train.planning.cluster import limit_of
from vp_train.planning.degrees import Degrees
from vp_train.planning.explore import Explorer
from vp_train.planning.found import Estimate, Limits, SearchResult, counted
from vp_train.planning.kept import ALL, Kept
from vp_train.planning.moves import (
    in_the_same_stages,
    neighbours,
    offloading,
    with_larger_microbatches,
    with_other_chunks,
)
from vp_train.planning.no_choice import no_choice_words, nothing_kept_words
from vp_train.planning.shared import Shared
from vp_train.planning.short import order_nodes, plan_nodes
from vp_train.planning.space import TOO_LONG, Space, space_of, without_vocabulary_of
from vp_train.planning.trials import WORTH_ORDER, Almost, Effort, Trials
from vp_train.planning.weigh import Candidate, Scales

_FOR_ESTIMATES = 0.5  # part of the effort; the rest is for whole plans
# A whole step may take so much less than its estimate.
_SLACK = 0.01
_KEPT_REFUSALS = 100
_TRIES_OF_OTHER_KIND, _TRIES_TO_FIT = 20, 50
# Parts of the effort: after which activations are offloaded, and for estimates with that.
_BEFORE_OFFLOADING, _FOR_OFFLOADING = 0.35, 0.3
_FOR_NEIGHBOURS = 0.15  # part of the effort for what is next to the best, see `_look_around`
# Parts of the effort for single stages, at once and in all, see `_change_stages`.
_FOR_STAGES_AT_ONCE, _FOR_STAGES = 0.05, 0.15
_FOR_PASSES = 0.03  # for other passes in the same stages
_TRIES_NEARLY = 8  # of what almost fits, in more stages
_MOST_CONFIRMED = 3  # plans that are made before the best is known, see `_confirm`
_FOR_ORDER = 0.3  # part of the effort that the search of one order may take
_MOST_BEYOND = 3  # plans that are made after the effort, each faster than the first if it holds
# Part of the effort for vocab.balance, and the least part of the passes that it must save.
_FOR_BALANCE, _LEAST_BALANCED = 0.1, 0.002
_EFFORT_OF_ONE_LINE = 360_000


def search(
    config: RunConfig,
    limits: Limits,
    in_time: Callable[[], bool],
    progress: Callable[[str], object],
    space: Space | None = None,
) -> SearchResult:
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


class _Search:
    """One search: what is left to look at, what was found, and the effort that was spent.

    What takes at least `below` seconds is not looked for.  Without `plans` no whole step is
    planned, and the fastest is looked for, with or without vocabulary parallelism.
    """

    def __init__(
        self,
        config: RunConfig,
        limits: Limits,
        in_time: Callable[[], bool],
        progress: Callable[[str], object],
        space: Space,
        *,
        plans: bool = True,
        below: float = math.inf,
        shared: Shared | None = None,
    ) -> None:
        self._plans, self._limits, self._space = plans, limits, space
        self._typed = as_typed(config)
        if shared is None:
            limit = limit_of(config.cluster, limits.margin)
            shared = Shared(Scales(config, limit, margin=limits.margin), keeps_steps=False)
        self._scales = shared.scales.with_optimizers(space.optimizers)
        self._effort = Effort(limits.effort, in_time)
        self._book = Book(Counter(space.excluded), below, has_kinds=plans)
        self._num_layers = config.model.num_layers
        self._trials = Trials(
            self._scales,
            shared,
            self._book,
            self._effort,
            num_layers=self._num_layers,
            cluster=config.cluster,
            kept=space.kept,
        )
        self._explorer = Explorer(
            space, self._trials, self._book, scales=self._scales, shared=shared, progress=progress
        )
        self._offloads = config.run.device == "cuda" and plans
        self._balanced: set[Choice] = set()  # those that were looked at with vocab.balance
        self._looked_around: set[Choice] = set()
        self._unordered: dict[Choice, Choice] = {}  # what is too dear to order, with schedule=auto
        # Those of which single stages were changed, and whether they recompute less then.
        self._changed: set[tuple[Choice, bool]] = set()
        self._with_stages: set[Choice] = set()  # what was simulated of what came of that
        self._for_stages = _FOR_STAGES * limits.effort  # that is left for these

    def run(self, firsts: Sequence[Choice] = ()) -> SearchResult:
        """Search.  `firsts` are estimated before others, whatever effort that takes."""
        offloads = self._offloads
        part = _BEFORE_OFFLOADING if offloads else _FOR_ESTIMATES
        self._explorer.until = part * self._limits.effort
        self._explorer.weigh()
        for choice in firsts:
            self._explorer.estimate_first(self._explorer.prospects[choice])
        if self._plans:
            self._estimate_typed()
        while True:
            before = self._seen
            self._explorer.estimate(self._limits.top)
            if offloads and self._effort.in_time():
                self._offload_instead()
                self._explorer.estimate(self._limits.top)
                offloads = False
            if self._plans:
                self._estimate_other_kind()
                self._confirm()
                self._look_around()
                self._change_stages()
                self._balance()
                self._change_stages()
                self._change_passes()
                self._plan()
            if not self._plans or self._seen == before or not self._explorer.goes_on():
                self._order_anew()
                return self._result()

    def _result(self) -> SearchResult:
        rows, spare = self._book.distinct()
        first = next((estimate for estimate in rows if estimate.is_planned), None)
        top = rows[: self._limits.top]
        if first is not None and first not in top:  # one plan is made and shown in any case
            top[-1] = first
        best = tuple(self._book.planned[e.candidate.choice] for e in top if e.is_planned)
        last = top[-1].counted if len(top) == self._limits.top else float("inf")
        left, unweighed = self._explorer.queue.left, self._explorer.unweighed
        num_open = len(unweighed) + sum(self._explorer.key(prospect) < last for prospect in left)
        num_open += sum(
            not estimate.is_planned and estimate.counted * (1 - _SLACK) < last
            for estimate in self._book.as_planned()
            if estimate.candidate.choice not in spare
        )
        refused = sorted(self._book.refused, key=lambda refusal: refusal.bound)
        return SearchResult(
            best=best,
            with_vocabulary=self._book.first(splits_vocabulary=True),
            without_vocabulary=self._book.first(splits_vocabulary=False),
            without_offloading=self._book.without_offloading(),
            leaner=self._book.leaner(best[0] if best else None, self._scales.limit),
            unordered=self._unordered.get(replace(best[0].choice, optimizer=None))
            if best
            else None,
            estimated=tuple(estimate for estimate in top if not estimate.is_planned),
            leanest=self._book.closest(self._scales),
            refused=tuple(refused[:_KEPT_REFUSALS]),
            excluded=+self._book.excluded,  # without those that ruled out nothing
            num_choices=len(self._explorer.prospects) + self._num_excluded - self._book.num_same,
            num_added=len(self._explorer.prospects) - len(self._space.choices),
            num_same=self._book.num_same,
            num_estimated=self._trials.num_estimated,
            num_planned=len(self._book.planned),
            num_open=num_open,
            num_unseen=Counter(prospect.splits_vocabulary for prospect in (*left, *unweighed)),
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
        return self._trials.num_estimated, len(self._book.estimates), len(self._book.planned)

    @property
    def _ended(self) -> str:
        return "effort" if self._effort.in_time() else "time"

    def _estimate_typed(self) -> None:
        """Estimate the run as it was typed if it seems to fit, so that no result is slower."""
        prospect = None if self._typed is None else self._explorer.prospects.get(self._typed)
        if prospect is not None:
            self._explorer.estimate_first(prospect, is_sure=False)

    def _estimate_other_kind(self) -> None:
        """Estimate a choice with or without vocabulary parallelism if only the other was found.

        A few that seem to fit are tried, the lowest bounds first, whatever effort is left.
        """
        kinds = {estimate.splits_vocabulary for estimate in self._book.estimates}
        if len(kinds) != 1 or not self._effort.in_time():
            return
        left = [
            prospect
            for prospect in self._explorer.queue.left
            if prospect.splits_vocabulary not in kinds
        ]
        for prospect in heapq.nsmallest(_TRIES_OF_OTHER_KIND, left, key=self._explorer.key):
            try:
                item = prospect.candidate or self._trials.draft(prospect.choice)
                prospect.candidate = item
                if item.seems_to_fit:
                    self._book.add(self._trials.estimate(item))
                    prospect.is_done = True
                    return
            except ConfigError as error:
                self._explorer.refuse(prospect, error)

    def _confirm(self) -> None:
        """Plan the best estimate whole, and if that is slower estimate what it had ruled out.

        That goes on up to three times, as far as the effort suffices.  Short steps say least of a
        whole one where the backward is split, so only such an estimate is doubted.
        """
        for _ in range(_MOST_CONFIRMED):
            best = self._book.fastest()
            if best is None or best.is_planned or not self._effort.in_time():
                return
            candidate = best.candidate
            if not GENERATORS[candidate.choice.schedule].split_backward:
                return
            if self._effort.spent + plan_nodes(candidate) > self._limits.effort:
                return
            self._plan_one(best)
            self._explorer.estimate(self._limits.top)

    def _offload_instead(self) -> None:
        """Estimate offloaded activations where device memory alone may rule out faster choices.

        They have a queue of their own, in which only the best of each kind is looked for.
        """
        queue = self._explorer.queue_of(self._offloading())
        effort, spent = self._limits.effort, self._effort.spent
        self._explorer.until = max(_FOR_ESTIMATES * effort, spent + _FOR_OFFLOADING * effort)
        self._explorer.estimate_apart(queue)

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
        binding += self._explorer.pressed
        drafted = [
            (o.choice, o.candidate) for o in self._explorer.prospects.values() if o.candidate
        ]
        binding += [choice for choice, item in drafted if item.is_pressed or not item.seems_to_fit]
        return [
            choice
            for choice in dict.fromkeys(
                other for bound in binding for other in offloading(bound, self._num_layers)
            )
            if choice not in self._explorer.prospects and self._space.kept.against(choice) is None
        ]

    def _look_around(self) -> None:
        """Estimate what differs in one thing from the best of each kind, as long as that helps.

        There are kinds with and without vocabulary parallelism, with and without offloading, and
        with some stages that recompute beside that.  The effort ends before many bounds are tight,
        and what is offloaded was weighed for some of the choices only.  What is next to the best is
        the likeliest to be better.
        """
        before, part = self._explorer.until, _FOR_NEIGHBOURS * self._limits.effort
        until = self._effort.spent + part
        while not self._effort.is_over(until):
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
            kinds = sorted({choice.kind for choice in found}, reverse=True)
            for kind in kinds:
                queue = self._explorer.queue_of(choice for choice in found if choice.kind == kind)
                self._explorer.until = min(until, self._effort.spent + part / len(kinds))
                self._explorer.estimate_apart(queue)
        self._explorer.until = before

    def _around(self, choice: Choice) -> list[Choice]:
        """Return the choices that `_look_around` tries."""
        found = neighbours(choice, self._space.choices)
        found += with_other_chunks(choice, self._num_layers)
        found += with_larger_microbatches(choice)
        if self._offloads and (choice.offload or choice.recompute != "none"):
            found += offloading(choice, self._num_layers, where_needed=True)
        return [one for one in found if self._space.kept.against(one) is None]

    def _in_more_stages(self, choice: Choice) -> list[Choice]:
        """Return the choice with one more stage on every rank, if there may be one."""
        return [
            one
            for one in with_other_chunks(choice, self._num_layers)
            if one.layout.num_stages > choice.layout.num_stages
            and self._space.kept.against(one) is None
        ]

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
        found = [
            (counted(choice, almost.seconds), place, choice)
            for place, (choice, almost) in enumerate(self._trials.almost.items())
            if self._book.may_be_first(choice, almost.seconds)
            and (choice.num_chunks is not None or not has_chunks)
        ]
        return [choice for _, _, choice in heapq.nsmallest(_TRIES_NEARLY, found)]

    def _change_stages(self) -> None:
        """Let single stages recompute less in the best of each kind, and more in what almost fits.

        Where the backward is split, no sum over stages says what a rank keeps.  So each is tried.
        Which stages recompute also changes the order of passes.  So stages of other ranks than the
        one that needs most may be better, and have their turn at last.
        """
        for change in (self._change_stages_of_fullest, self._change_any_stages):
            before, most = self._effort.spent, _FOR_STAGES_AT_ONCE * self._limits.effort
            change(before + min(most, self._for_stages))
            self._for_stages -= self._effort.spent - before

    def _change_stages_of_fullest(self, until: float) -> None:
        for estimate in self._first_estimates():
            self._recompute_less(estimate.candidate, until)
        for choice in self._nearly():
            fitting = self._made_to_fit(self._trials.almost[choice], until)
            if fitting is not None:
                self._recompute_less(fitting, until)

    def _change_any_stages(self, until: float) -> None:
        for choice in self._nearly():
            almost = self._trials.almost[choice].candidate
            for other in self._with_other_stage(almost, until, fewer=False):
                if self._effort.is_over(until):
                    return
                self._estimate_stages(other)

    def _recompute_less(self, candidate: Candidate, until: float) -> None:
        """Let one stage after the other recompute less while a step is the fastest of its kind."""
        while not self._effort.is_over(until) and (candidate.choice, True) not in self._changed:
            self._changed.add((candidate.choice, True))
            for other in self._with_other_stage(candidate, until, fewer=True):
                if self._effort.is_over(until):
                    return
                is_first, _ = self._estimate_stages(other)
                if is_first:
                    candidate = other
                    break

    def _made_to_fit(self, almost: Almost, until: float) -> Candidate | None:
        """Let stages of the rank that needs most recompute more, one by one, until a step fits.

        Returns None if none does that is the fastest of its kind.
        """
        while not self._effort.is_over(until):
            candidate = almost.candidate
            if (candidate.choice, False) in self._changed:
                return None
            self._changed.add((candidate.choice, False))
            others = self._with_other_stage(candidate, until, fewer=False, rank=almost.rank)
            for other in others:
                if self._effort.is_over(until):
                    return None
                is_first, left = self._estimate_stages(other)
                if is_first:
                    return other
                if left is not None and almost.is_relieved_by(left):
                    almost = left
                    break
        return None

    def _with_other_stage(
        self, candidate: Candidate, until: float, *, fewer: bool, rank: int | None = None
    ) -> list[Candidate]:
        """Return those in which one stage recomputes less, or more, the fastest first.

        Only those that were not simulated and may be the fastest of their kind; none if the effort
        does not suffice.
        """
        drafts = list[Candidate]()
        for choice in candidate.choice.with_other_stage(fewer=fewer, rank=rank):
            if self._is_done(choice):
                continue
            if self._effort.is_over(until):
                return []
            draft = self._trials.draft_stages(candidate, choice)
            if draft is not None and self._book.may_be_first(choice, draft.seconds):
                drafts.append(draft)
        return sorted(drafts, key=lambda one: one.seconds)

    def _is_done(self, choice: Choice) -> bool:
        """Return whether a choice was simulated, or is ruled out by what is kept."""
        prospect = self._explorer.prospects.get(choice)
        is_known = choice in self._with_stages or (prospect is not None and prospect.is_done)
        return is_known or self._space.kept.against(choice) is not None

    def _estimate_stages(self, candidate: Candidate) -> tuple[bool, Almost | None]:
        """Estimate a candidate of `_with_other_stage`.

        Returns whether it is the first of its kind, and what almost fits.  Where balanced rows may
        make it the first, it is booked, too.
        """
        choice = candidate.choice
        self._with_stages.add(choice)
        if choice in self._explorer.prospects:
            self._explorer.prospects[choice].is_done = True
        estimate, almost = self._trials.estimate_as_it_is(candidate)
        if estimate is None:
            return False, almost
        is_first = self._book.may_be_first(choice, estimate.seconds)
        if is_first or (choice.splits_vocabulary and not choice.balance):
            self._book.add(estimate)
            self._explorer.say()
        return is_first, almost

    def _change_passes(self) -> None:
        """Let the best of each kind have other passes in the same stages.

        What recomputes there, and its balanced rows, were found for its own passes, so neighbours
        do not have them.
        """
        until = self._effort.spent + _FOR_PASSES * self._limits.effort
        for candidate in [estimate.candidate for estimate in self._first_estimates()]:
            own = candidate.choice
            is_balanced = own.balance and own.splits_vocabulary
            if own.degrees.pp == 1 or not (is_balanced or own.recompute_per_stage):
                continue
            for choice in in_the_same_stages(own):
                if self._effort.is_over(until):
                    return
                if self._is_done(choice):
                    continue
                self._with_stages.add(choice)
                draft = self._trials.draft_stages(candidate, choice)
                if draft is None or not self._book.may_be_first(choice, draft.seconds):
                    continue
                is_first, _ = self._estimate_stages(draft)
                if is_first:
                    self._recompute_less(draft, until)

    def _balance(self) -> None:
        """Estimate vocab.balance in the place of what may be among the best with it.

        It gives rows to ranks with less other work.  Two bounds say about how much that saves.  The
        busiest rank then keeps less, too, so what almost fits has its turn as well.
        """
        if "vocab.balance" in self._space.kept.values:
            return
        found = {one.candidate.choice: one for one in self._book.estimates}
        tried = {choice: (one.seconds, one.candidate) for choice, one in found.items()}
        # With an optimizer that is faster than the one that fits.
        tried |= {c: (one.seconds, one.candidate) for c, one in self._trials.almost.items()}
        promising: list[tuple[float, int, Candidate, Estimate | None]] = []
        for place, (choice, (seconds, candidate)) in enumerate(tried.items()):
            if not choice.splits_vocabulary or choice.balance or choice in self._balanced:
                continue
            if not self._effort.in_time():
                break
            self._balanced.add(choice)
            try:
                item = self._trials.draft_as_it_is(replace(choice, balance=True))
            except ConfigError:
                continue
            saved = candidate.passes - item.passes
            if saved > _LEAST_BALANCED * candidate.passes:
                least = counted(choice, seconds - saved)
                promising.append((least, place, item, found.get(choice)))
        enough = self._effort.spent + _FOR_BALANCE * self._limits.effort
        for seconds, _, item, estimate in sorted(promising, key=lambda one: one[:2]):
            is_slow = seconds >= self._book.to_beat(self._limits.top)[item.choice.kind]
            if is_slow or self._effort.is_over(enough):
                return
            try:
                balanced = self._trials.estimate(item)
            except ConfigError:
                continue
            self._balanced.add(balanced.candidate.choice)
            if estimate is None:
                self._book.add(balanced)
            elif balanced.seconds < (1 - _LEAST_BALANCED) * estimate.seconds:
                self._book.replace(estimate, replace(balanced, unbalanced=estimate))
            self._explorer.say()

    def _plan(self) -> None:
        """Plan the best estimates, as far as the effort suffices.

        After that a few are planned which should be faster than the first plan, so that this is no
        slower than what was not planned.  Of what is alike only one is planned.
        """
        effort, top = self._effort, self._limits.top
        queue = sorted(self._book.estimates, key=lambda estimate: estimate.key)
        firsts: dict[bool | str, Estimate] = {}
        for estimate in queue:
            firsts.setdefault(estimate.splits_vocabulary, estimate)
            if not estimate.candidate.choice.offload:
                firsts.setdefault("on the device", estimate)
        ahead = [one for one in queue if any(one is first for first in firsts.values())]
        beyond = 0
        for estimate in [*ahead, *(e for e in queue if e not in ahead)]:
            times = [one.counted for one in self._book.distinct()[0] if one.is_planned]
            enough = len(times) >= top and estimate not in ahead
            if enough and estimate.counted * (1 - _SLACK) >= times[top - 1]:
                continue  # estimates are sorted by three digits, so others may be faster
            if estimate.candidate.choice in self._book.planned:
                continue
            if any(other.makes_spare(estimate) for other in self._book.held()):
                continue
            cost = plan_nodes(estimate.candidate)
            if self._book.planned and effort.spent + cost > self._limits.effort:
                effort.spent = self._limits.effort
                if estimate.counted >= times[0] or beyond == _MOST_BEYOND:
                    continue
                beyond += 1
            if self._book.planned and not effort.in_time():
                return
            self._plan_one(estimate)

    def _order_anew(self) -> None:
        """Let schedule=auto order what is planned and may become the best of its kind by that.

        The lowest bounds come first.  The first is ordered whatever effort is left.  Activations
        that wait on hosts are left out, since the search of an order knows nothing of them.  So is
        what has no chunks where their number is kept: loops of another number would take part.
        """
        kept = self._space.kept.values
        if "schedule.name" in kept:
            return
        num_ordered = 0
        planned = [one for one in self._book.as_planned() if one.is_planned]
        for one in sorted(planned, key=lambda one: one.candidate.seconds):
            choice = one.candidate.choice
            if choice.degrees.pp == 1 or choice.offload:
                continue
            if choice.num_chunks is None and "schedule.num_chunks" in kept:
                continue
            if not self._book.may_be_first(choice, one.candidate.seconds / (1 - WORTH_ORDER)):
                continue
            effort = order_nodes(one.candidate)
            is_dear = num_ordered > 0 and self._effort.spent + effort > self._limits.effort
            is_dear |= effort > _FOR_ORDER * self._limits.effort or not self._effort.in_time()
            if is_dear:
                self._note_unordered(one)
                continue
            num_ordered += 1
            self._explorer.say("; searching for a faster order")
            if not self._trials.order_anew(one):
                self._note_unordered(one)

    def _note_unordered(self, planned: Estimate) -> None:
        choice = planned.candidate.choice
        if caps := self._trials.caps_of(planned):
            self._unordered[choice] = replace(choice, cap_gib=caps[0])

    def _plan_one(self, estimate: Estimate) -> None:
        self._explorer.say("; planning a step whole")
        self._trials.plan(estimate)
        self._explorer.say()


def without_vocabulary(
    config: RunConfig, degrees: Degrees, shared: Shared | None = None
) -> SearchResult:
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
) -> SearchResult:
    """Return the fastest of `space` by short steps of `effort` passes, without a margin.

    `firsts` are estimated before others, whatever effort that takes.  What cannot take fewer than
    `below` seconds is not looked at, and no step that is `shared` is simulated again.
    """
    limits = Limits(top=1, margin=0.0, effort=effort)
    search = _Search(
        config,
        limits,
        lambda: True,
        lambda words: None,
        space,
        plans=False,
        below=below,
        shared=shared,
    )
    return search.run(firsts)


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
