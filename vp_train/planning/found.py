"""What a search finds, and how it compares it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

from vp_train.config import OptimConfig
from vp_train.planning.choice import Choice
from vp_train.planning.cluster import MARGIN
from vp_train.planning.kept import Kept
from vp_train.planning.plan import digits_behind
from vp_train.planning.report import PlanReport
from vp_train.planning.weigh import Candidate

# The part by which a step with offloaded activations must be faster than another to be preferred.
MARGIN_OF_OFFLOADING = 0.005
SAME = 0.001  # the part by which times of plans may differ of which one row is shown
NO_MORE = 0.02  # the part by which the memory of plans that need as much may differ


def counted(choice: Choice, seconds: float) -> float:
    """Return the seconds with which a choice whose step takes `seconds` is compared with others."""
    return seconds * (1 + MARGIN_OF_OFFLOADING) if choice.offload else seconds


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a search: what it looks for, and how long.

    top: the number of plans to find.
    margin: the part of the memory of GPUs and of hosts that a plan must leave free.
    effort: the passes and collectives that may be placed.
    seconds: the CPU time after which `in_time` of `search` is to end it.
    """

    top: int = 5
    margin: float = MARGIN
    effort: int = 10_000_000
    seconds: int = 180


@dataclass(frozen=True, slots=True)
class Refusal:
    """A choice that needs too much memory, or cannot be run for another `reason`.

    `bound` is the lower bound of its step in seconds.  `needs` are its bytes on a GPU if these are
    too many, `host_needs` those of a node if only its host memory does not suffice.
    """

    choice: Choice
    reason: str
    bound: float = 0.0
    needs: float | None = None
    host_needs: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A choice that fits, and its report."""

    choice: Choice
    report: PlanReport

    @property
    def seconds(self) -> float:
        return self.report.step_seconds

    @property
    def counted(self) -> float:
        return counted(self.choice, self.seconds)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A candidate that fits, the optimizer with which it is fastest, and its seconds and bytes.

    host: the bytes of a node's host memory.
    report: that of the whole step, whose seconds and bytes these are then; None: of a short one.
    unbalanced: the estimate that this one with vocab.balance takes the place of, if it does.
    """

    candidate: Candidate
    optim: OptimConfig
    seconds: float
    memory: float
    host: float = 0.0
    report: PlanReport | None = field(default=None, compare=False, repr=False)
    unbalanced: Estimate | None = None

    @property
    def is_planned(self) -> bool:
        """Whether the whole step was planned."""
        return self.report is not None

    @property
    def choice(self) -> Choice:
        return replace(self.candidate.choice, optimizer=self.optim)

    @property
    def splits_vocabulary(self) -> bool:
        return self.candidate.choice.splits_vocabulary

    @property
    def counted(self) -> float:
        return counted(self.candidate.choice, self.seconds)

    @property
    def key(self) -> tuple[float, bool, float]:
        """The sort key: faster first.  If times agree in three digits, less memory comes first.

        What keeps nothing in host memory, of which little is known, comes before that.
        """
        seconds = counted(self.candidate.choice, float(f"{self.seconds:.3g}"))
        return seconds, self.host > 0, self.memory

    @property
    def known_key(self) -> tuple[float, bool, float, float]:
        """The sort key of `key`, but of equally fast ones planned ones first, by four digits."""
        choice, (about, _, memory) = self.candidate.choice, self.key
        seconds = counted(choice, float(f"{self.seconds:.4g}"))
        return about, not self.is_planned, seconds, memory

    def as_planned(self, found: Found) -> Estimate:
        """Return what the whole step takes and needs, with the optimizer that fits it."""
        report = found.report
        return replace(
            self,
            optim=found.choice.optimizer or self.optim,
            seconds=report.step_seconds,
            memory=memory_of(found),
            host=report.host.total,
            report=report,
        )

    def makes_spare(self, other: Estimate) -> bool:
        """Return whether this is the same split, as fast as the other, and nowhere needs more.

        No estimate makes a plan spare, and nothing that offloads activations what does not.
        """
        ours, theirs = self.candidate.choice, other.candidate.choice
        return (
            (self.is_planned or not other.is_planned)
            and ours.degrees == theirs.degrees
            and ours.micro_batch_size == theirs.micro_batch_size
            and ours.splits_vocabulary == theirs.splits_vocabulary
            and abs(self.seconds - other.seconds) <= SAME * other.seconds
            and self.memory <= (1 + NO_MORE) * other.memory
            and self.host <= (1 + NO_MORE) * other.host
            and (ours.recompute == "none" or theirs.recompute != "none")
            and (not ours.offload or theirs.offload > 0)
        )


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search.

    best: the fastest choices that were planned, sorted.  One that is as fast as another of the same
        split and needs no less memory is left out.
    with_vocabulary, without_vocabulary: the fastest with and without vocabulary parallelism.
    without_offloading: the fastest that offloads no activations.
    leaner: what needs least memory of all that are as fast as the first of `best`, if it needs less
        by at least a tenth of what a plan may use.
    unordered: the first of `best` with schedule=auto and its cap, where that may be faster but was
        not tried to its end, for want of effort or time.
    estimated: those that were not planned and belong among the best by their estimates.
    leanest: the choice that needs least memory of those that need too much.  Those that only lack
        host memory come first.
    refused: the refused choices with the lowest bounds.
    excluded: how many choices each constraint rules out.
    num_choices: all choices, those that are ruled out included.
    num_added, num_same: how many of them were added during the search, and how many others were not
        counted because they are the same as one that was.
    num_estimated, num_planned: the choices that a short step was simulated for, or the whole one.
    num_open: those that might be faster than the last of `best` but were not looked at.
    num_unseen: those with (True) and without vocabulary parallelism that were not simulated and
        may fit.
    ended: what ended the search before that: `effort`, `time`, or nothing.
    kept: the settings that were not searched.
    """

    best: tuple[Found, ...]
    with_vocabulary: Estimate | None
    without_vocabulary: Estimate | None
    without_offloading: Estimate | None
    leaner: Estimate | None
    unordered: Choice | None
    estimated: tuple[Estimate, ...]
    leanest: Refusal | None
    refused: tuple[Refusal, ...]
    excluded: Counter[str]
    num_choices: int
    num_added: int
    num_same: int
    num_estimated: int
    num_planned: int
    num_open: int
    num_unseen: Counter[bool]
    ended: str
    kept: Kept


def order_of(choice: Choice, seconds: float) -> float:
    """Return the sort key of what is shown: counted seconds, equal where rounded ones are."""
    return counted(choice, rounded(seconds))


def rounded(seconds: float) -> float:
    """Return seconds to four digits, from 100 on to hundredths: no coarser than printed ones."""
    return round(seconds, 2) if seconds >= 100 else float(f"{seconds:.4g}")


def rounded_down(value: float) -> float:
    """Return the largest number of four digits that is not above `value`, which is positive."""
    digits = digits_behind(value)
    return math.floor(value * 10.0**digits) / 10.0**digits


def memory_of(found: Found) -> float:
    """Return the bytes of the rank that needs most."""
    return found.report.ranks[found.report.worst].memory.total
