"""The best ways to run the batch of a plan with, and without, vocabulary parallelism.

Short steps tell what they take.  The best is planned whole where that is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from schedules.vocab import searched_algorithms
from vp_train.config import OptimConfig, RunConfig
from vp_train.planning.choice import Choice, choice_of
from vp_train.planning.cluster import limit_of
from vp_train.planning.compare import (
    Help,
    Look,
    estimated_help,
    fastest_of,
    for_another_plan,
    planned_help,
    proposing,
    with_degrees,
)
from vp_train.planning.found import NO_MORE, Estimate, SearchResult
from vp_train.planning.outlook import MOST_AT_ONCE
from vp_train.planning.report import PlanReport
from vp_train.planning.search import without_vocabulary
from vp_train.planning.shared import Shared
from vp_train.planning.weigh import Scales
from vp_train.units import is_faster

# Passes of the looks at all splits: with microbatches as large as those of a plan, and with others.
_EFFORT, _EFFORT_OF_OTHERS = 360_000, 120_000
_TRIES = 3  # to plan whole what short steps say is the fastest


@dataclass(frozen=True, slots=True)
class Alternative:
    """The best way to run a batch with, or without, vocabulary parallelism.

    splits_vocabulary: which of the two it is.
    best: the best found of any split, that of the plan included; None if nothing fits.
    here: the best of the split of the plan, where only schedule, chunks and placement are free.
    reason: why nothing of that split fits, "" where something does or that is not known.
    is_whole: whether all of that split was looked at.
    """

    splits_vocabulary: bool
    best: Help | None
    here: Help | None = None
    reason: str = ""
    is_whole: bool = False

    @property
    def is_here(self) -> bool:
        """Whether the best is that of the split of the plan, be it planned whole or not."""
        best, here = self.best, self.here
        return best is not None and here is not None and best.overrides == here.overrides

    def beside(self, helps: Sequence[Help]) -> Alternative:
        """Return this with the fastest of the `helps` as the best if that wins, see `_fastest`."""
        found = [
            one
            for one in helps
            if one.choice is not None and one.choice.splits_vocabulary is self.splits_vocabulary
        ]
        return replace(self, best=_fastest(found if self.best is None else [self.best, *found]))

    def beats(self, other: Help) -> bool:
        """Return whether the best is faster than another proposal and nowhere needs more."""
        best = self.best
        return (
            best is not None
            and is_faster(best.seconds, other.seconds)
            and best.memory <= other.memory
            and best.host <= other.host
        )

    def record(self, num_tokens: int) -> dict[str, Any]:
        """Return both for JSON, and why nothing fits; a step has so many tokens."""

        def of(found: Help | None) -> dict[str, Any] | None:
            if found is None or found.choice is None:
                return None
            degrees = found.choice.degrees
            split = {"dp": degrees.dp, "pp": degrees.pp, "tp": degrees.tp}
            return found.record(num_tokens) | split

        return {
            "best": of(self.best),
            "of_this_split": of(self.here),
            "of_this_split_is_whole": self.is_whole,
            "reason": self.reason,
        }


def without_it(
    config: RunConfig, report: PlanReport, choices: Sequence[Choice], shared: Shared
) -> Alternative:
    """Return the best way without vocabulary parallelism to run the batch of a plan.

    On the split of the plan all but schedule, chunks and placement is as the plan is, see
    `without_vocabulary`.  On any split the micro-batch size, recomputation of all stages and
    sequence parallelism are free too, and `zero1` may shard the optimizer.  Only what a plan keeps
    on hosts may be there, but where nothing fits so, any optimizer.  Ways of the own split have the
    memory of `for_another_plan`, others that of a proposal.

    choices: those of `space_of`.
    shared: what other searches know that have the memory of a proposal, see `shared_of`.
    """
    config = with_degrees(config, report.degrees)
    rest = for_another_plan(config, report)
    own = (
        shared if rest == proposing(config) else shared.beside(Scales(rest, limit_of(rest.cluster)))
    )
    pp = report.degrees.pp
    result = without_vocabulary(rest, report.degrees, own) if pp > 1 else None
    here = None if result is None else result.without_vocabulary
    below = math.inf if here is None else here.counted
    known = [] if here is None else [_estimated(config, here)]
    if not report.splits_vocabulary and report.fits:
        below = min(below, report.step_seconds)
        known.append(_itself(config, report))
    found = [one for one in _like(config, choices) if not one.splits_vocabulary]
    same, others = _by_size(config, found)
    optimizers = _optimizers(config)
    rounds = [(_EFFORT, (same, optimizers)), (_EFFORT_OF_OTHERS, (others, optimizers))]
    other = _best(config, rounds, below, shared)
    if other is None and not known:
        other = _best(config, [(_EFFORT, (found, None))], below, shared)
    return Alternative(
        splits_vocabulary=False,
        best=_fastest(known if other is None else [*known, other]),
        here=None if here is None else _estimated(config, here),
        reason=_reason(result),
        is_whole=result is not None and result.num_open == 0,
    )


def _reason(result: SearchResult | None) -> str:
    """Return why nothing of a split fits; "" where something does, or that is not known."""
    if result is None or result.without_vocabulary is not None or result.leanest is None:
        return ""
    return result.leanest.reason


def unbeaten(
    helps: Sequence[Help], others: Sequence[Alternative], report: PlanReport
) -> list[Help]:
    """Return the proposals without the pairs of settings that one of the `others` beats.

    All stay for a plan that does not fit, which needs a small change that lets it.
    """
    if not report.fits:
        return list(helps)
    return [one for one in helps if not (one.is_pair and any(way.beats(one) for way in others))]


def with_it(
    config: RunConfig, report: PlanReport, choices: Sequence[Choice], shared: Shared
) -> Alternative:
    """Return the best way with vocabulary parallelism to run the batch of a plan without it.

    The first algorithm that searches try says what it gains, with microbatches as large as those of
    the plan: first beside all else of the plan, then as in `without_it`.
    """
    config = with_degrees(config, report.degrees)
    own, name = choice_of(config, report.degrees), searched_algorithms()[0]
    found = [one for one in _like(config, choices) if one.splits_vocabulary and one.vocab == name]
    found, _ = _by_size(config, found)
    same = [
        one
        for one in found
        if replace(one, vocab=own.vocab, placement=own.placement, balance=own.balance) == own
    ]
    rounds = [(_EFFORT, (same, (config.optim,))), (_EFFORT, (found, _optimizers(config)))]
    best = _best(config, rounds, math.inf, shared)
    if best is None:
        best = _best(config, [(_EFFORT, (found, None))], math.inf, shared)
    return Alternative(splits_vocabulary=True, best=best)


def _like(config: RunConfig, choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices in which all stages recompute or none, offloading as much as a plan does.

    Which stages recompute is dear to find out.
    """
    part = config.parallel.offload_activations
    return [
        one if one.offload == part else replace(one, offload=part)
        for one in choices
        if not one.recompute_where_needed
    ]


def _by_size(config: RunConfig, choices: Sequence[Choice]) -> tuple[list[Choice], list[Choice]]:
    """Return the choices with microbatches as large as those of a plan, and all others.

    The first say what others have to beat, so that fewer of these are weighed.
    """
    size = config.micro_batch_size
    same = [choice for choice in choices if choice.micro_batch_size == size]
    return same, [choice for choice in choices if choice.micro_batch_size != size]


def _optimizers(config: RunConfig) -> tuple[OptimConfig, ...]:
    """Return the optimizer of a plan, and `zero1` in the memory that the plan uses."""
    return tuple(dict.fromkeys((config.optim, replace(config.optim, name="zero1"))))


def _best(
    config: RunConfig, rounds: Sequence[tuple[int, Look]], below: float, shared: Shared
) -> Help | None:
    """Return the fastest that takes fewer than `below` seconds, planned whole unless it is long.

    It has the memory of a proposal.  What does not fit as it is planned gives way to the next, a
    few times.

    rounds: what to look at, each with its effort; later ones have to beat those before.
    """
    config, refused = proposing(config), set[Choice]()
    for _ in range(_TRIES):
        found = list[Estimate]()
        for effort, (choices, optimizers) in rounds:
            left = [one for one in choices if one not in refused]
            known = min((one.counted for one in found), default=below)
            one = fastest_of(config, [(left, optimizers)], effort, known, shared)
            found += [] if one is None else [one]
        best = min(found, key=lambda one: one.key, default=None)
        if best is None:
            return None
        planned = planned_help(config, best, whole=MOST_AT_ONCE)
        if planned is not None:
            return planned
        refused.add(best.candidate.choice)
    return None


def _itself(config: RunConfig, report: PlanReport) -> Help:
    """Return a plan as one of the ways to run its batch, with nothing to append."""
    choice = replace(choice_of(config, report.degrees), vocab=report.vocab)
    memory = report.ranks[report.worst].memory.total
    return Help("", report.step_seconds, memory, report.host.total, choice=choice)


def _estimated(config: RunConfig, found: Estimate) -> Help:
    return estimated_help(found.choice.changes(config), found, found.choice)


def _fastest(found: Sequence[Help]) -> Help | None:
    """Return the fastest, or what is as fast as that and needs less host memory.

    A plan itself, the one without overrides, wins unless another is faster than it, see
    `is_faster`.
    """
    itself = next((one for one in found if not one.overrides), None)
    if itself is not None:
        found = [one for one in found if is_faster(one.seconds, itself.seconds)]
    if not found:
        return itself
    least = min(one.seconds for one in found)
    as_fast = [one for one in found if not is_faster(least, one.seconds)]
    most = (1 + NO_MORE) * min(one.host for one in as_fast)
    return min((one for one in as_fast if one.host <= most), key=lambda one: one.seconds)
