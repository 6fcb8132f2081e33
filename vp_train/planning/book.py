"""The book of a search: what it estimated, planned and refused, and what stands out of that."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from vp_train.config import ConfigError
from vp_train.planning.choice import KINDS, Choice, ChoiceKind
from vp_train.planning.found import (
    NO_MORE,
    SAME,
    Estimate,
    Found,
    Refusal,
    counted,
    memory_of,
    order_of,
)
from vp_train.planning.weigh import (
    LEANEST,
    HostMemoryError,
    SameChoiceError,
    Scales,
    TooLargeError,
)
from vp_train.units import is_faster

_MUCH_LEANER = 0.1  # part of the memory; a plan that needs so much less is worth a line


@dataclass(slots=True)
class Book:
    """What was found so far.

    excluded: how many choices each constraint rules out.
    below: the seconds that a choice must be faster than to be looked for.
    has_kinds: whether the best with and without vocabulary parallelism are looked for.
    num_same: how many choices are another one, too.
    """

    excluded: Counter[str]
    below: float = math.inf
    has_kinds: bool = True
    num_same: int = 0
    refused: list[Refusal] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)
    planned: dict[Choice, Found] = field(default_factory=dict)
    # What follows from these, until something is added: estimates as planned, `distinct`, and what
    # a choice of each kind has to beat to be the first in something.
    _as_planned: list[Estimate] | None = None
    _distinct: tuple[list[Estimate], set[Choice]] | None = None
    _to_be_first: dict[ChoiceKind, float] | None = None

    def _forget(self) -> None:
        self._as_planned = self._distinct = self._to_be_first = None

    def add(self, estimate: Estimate) -> None:
        self._forget()
        self.estimates.append(estimate)

    def replace(self, estimate: Estimate, other: Estimate | None) -> None:
        """Put `other` in the place of an estimate; None: drop the estimate."""
        self._forget()
        place = next(n for n, one in enumerate(self.estimates) if one is estimate)
        self.estimates[place : place + 1] = [] if other is None else [other]

    def plan(self, choice: Choice, found: Found) -> None:
        """Add the plan of the whole step of an estimate."""
        self._forget()
        self.planned[choice] = found

    def refuse(self, choice: Choice, error: ConfigError, bound: float) -> None:
        """Add a choice that cannot be, whose step would take at least `bound` seconds."""
        if isinstance(error, SameChoiceError):
            self.num_same += 1
            return
        constraint, needs = str(error), None
        if isinstance(error, TooLargeError):
            constraint, needs = error.constraint, error.needs
        host_needs = error.needs if isinstance(error, HostMemoryError) else None
        self.excluded[constraint] += 1
        self.refused.append(Refusal(choice, str(error), bound, needs, host_needs))

    def first(self, *, splits_vocabulary: bool) -> Estimate | None:
        """Return the fastest with or without vocabulary parallelism, as planned if it was."""
        return _fastest(e for e in self.as_planned() if e.splits_vocabulary is splits_vocabulary)

    @property
    def knows_time(self) -> bool:
        """Whether a time is known which others have to beat."""
        return bool(self.estimates) or self.below < math.inf

    def to_beat(self, top: int) -> dict[ChoiceKind, float]:
        """Return the seconds that a choice of each kind has to beat.

        Those of the last of the `top`, or what makes it the first in something if that is slower.
        """
        shown = sorted(one.counted for one in self.distinct()[0])
        last = min(shown[top - 1] if len(shown) >= top else math.inf, self.below)
        if not self.has_kinds:
            return dict.fromkeys(KINDS, last)
        return {kind: max(last, first) for kind, first in self._firsts().items()}

    def may_be_first(self, choice: Choice, seconds: float) -> bool:
        """Return whether a step of so many seconds would be the first in something.

        That is the fastest with or without vocabulary parallelism, or of all that offload nothing.
        """
        firsts = self._firsts() if self.has_kinds else self.to_beat(1)
        return counted(choice, seconds) < firsts[choice.kind]

    def _firsts(self) -> dict[ChoiceKind, float]:
        """Return the seconds below which a choice of each kind is the first in something."""
        if self._to_be_first is None:
            of_kinds = dict.fromkeys(KINDS, math.inf)
            for one in self.as_planned():
                kind = one.candidate.choice.kind
                of_kinds[kind] = min(of_kinds[kind], one.counted)
            on_device = min(of_kinds[splits, False] for splits in (False, True))
            self._to_be_first = {
                (splits, moves): max(
                    min(of_kinds[splits, False], of_kinds[splits, True]),
                    0.0 if moves else on_device,
                )
                for splits, moves in KINDS
            }
        return self._to_be_first

    def as_planned(self) -> list[Estimate]:
        """Return all estimates, as planned where they were."""
        if self._as_planned is None:
            plans = [self.planned.get(one.candidate.choice) for one in self.estimates]
            self._as_planned = [
                estimate if plan is None else estimate.as_planned(plan)
                for estimate, plan in zip(self.estimates, plans, strict=True)
            ]
        return self._as_planned

    def distinct(self) -> tuple[list[Estimate], set[Choice]]:
        """Return the different ones, as planned where they were, sorted, and the other choices.

        Of what is as fast that with less memory comes first.

        An estimate is also left out where that of a plan makes it spare.
        """
        if self._distinct is not None:
            return self._distinct
        plans, kept, spare = self.held(), list[Estimate](), set[Choice]()

        def key(one: Estimate) -> tuple[float, float]:
            return order_of(one.candidate.choice, one.seconds), one.memory

        for one in sorted(self.as_planned(), key=key):
            if any(other.makes_spare(one) for other in (*kept, *plans)):
                spare.add(one.candidate.choice)
                continue
            spare.update(other.candidate.choice for other in kept if one.makes_spare(other))
            kept = [other for other in kept if not one.makes_spare(other)] + [one]
        self._distinct = kept, spare
        return kept, spare

    def held(self) -> list[Estimate]:
        """Return the estimates whose plans take no longer than they said."""
        return [
            one
            for one in self.estimates
            if (planned := self.planned.get(one.candidate.choice)) is not None
            and planned.report.step_seconds <= one.seconds * (1 + SAME)
        ]

    def fastest(self) -> Estimate | None:
        """Return the fastest of all, as planned if it was."""
        return _fastest(self.as_planned())

    def without_offloading(self) -> Estimate | None:
        """Return the fastest of `distinct` that offloads no activations, as planned if it was."""
        return _fastest(e for e in self.distinct()[0] if not e.candidate.choice.offload)

    def leaner(self, best: Found | None, limit: float) -> Estimate | None:
        """Return what needs least memory of what is as fast as the best or faster, if much less.

        Much is a part of `limit`, the bytes that a plan may use.  Times are those that count.  Of
        what needs as little the fastest counts.
        """
        if best is None:
            return None
        most = memory_of(best) - _MUCH_LEANER * limit
        near = [
            one
            for one in self.as_planned()
            if one.memory <= most and not is_faster(best.counted, one.counted)
        ]
        least = min((one.memory for one in near), default=0.0)
        return _fastest(one for one in near if one.memory <= (1 + NO_MORE) * least)

    def closest(self, scales: Scales) -> Refusal | None:
        """Return the refusal for memory that needs least, each by state and leanest activations."""
        on_hosts = [refusal for refusal in self.refused if refusal.host_needs is not None]
        if on_hosts:
            least = min(on_hosts, key=lambda refusal: refusal.host_needs or 0.0)
            if least.choice.offload:
                return least
            optim = scales.leanest_optimizer(least.choice)  # it is the one on hosts
            return replace(least, choice=replace(least.choice, optimizer=optim))
        first = None
        for refusal in sorted(
            (refusal for refusal in self.refused if refusal.needs is not None),
            key=lambda refusal: refusal.needs or 0.0,
        ):
            if first is not None and (refusal.needs or 0.0) >= first[0]:
                break
            needs = max(refusal.needs or 0.0, scales.leanest(refusal.choice))
            if first is None or needs < first[0]:
                first = needs, refusal
        if first is None:
            return None
        needs, refusal = first
        error = TooLargeError(needs, scales.limit, LEANEST)
        optim = refusal.choice.optimizer or scales.leanest_optimizer(refusal.choice)
        choice = replace(refusal.choice, optimizer=optim)
        return replace(refusal, choice=choice, needs=needs, reason=str(error))


def _fastest(found: Iterable[Estimate]) -> Estimate | None:
    return min(found, key=lambda estimate: estimate.known_key, default=None)
