"""Trials of choices: drafts, simulated short steps and planned whole steps, and their effort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from vp_train.config import ClusterConfig, ConfigError, OptimConfig
from vp_train.planning.book import Book
from vp_train.planning.choice import Choice
from vp_train.planning.found import Estimate, Found, rounded_down
from vp_train.planning.kept import Kept
from vp_train.planning.learned import Learned
from vp_train.planning.memory import most_host_bytes
from vp_train.planning.plan import StepPlan
from vp_train.planning.report import report_of, with_messages
from vp_train.planning.shared import Shared
from vp_train.planning.short import draft_nodes, effort_of, order_nodes, plan_nodes
from vp_train.planning.weigh import (
    NEARLY,
    SIMULATED,
    Candidate,
    HostMemoryError,
    Scales,
    TooLargeError,
    check_hosts,
)

# Parts of a step that is to be ordered anew: what its cap is lowered by where the order needs too
# much, and what it has to gain, for it is searched for whenever the run starts.
_LOWER_CAP, WORTH_ORDER = 0.03, 0.005
_ROUNDS = 4  # of more stages that recompute, see `Trials.estimate`
_MUCH_BALANCED = 0.02  # the part that balanced rows must save to come at once, see `Trials.draft`


@dataclass(slots=True)
class Effort:
    """The effort of a search, in passes and collectives that it places, and its time.

    total: what may be spent.
    in_time: whether there is time left.
    """

    total: float
    in_time: Callable[[], bool]
    spent: float = 0.0

    def is_over(self, until: float) -> bool:
        """Return whether the effort `until` some point, or the time, is spent."""
        return self.spent >= until or not self.in_time()


@dataclass(frozen=True, slots=True)
class Almost:
    """A candidate that almost fits with its fastest optimizer that does not.

    With that its step takes so many `seconds`, and needs so many bytes on `rank`, which needs most.
    """

    candidate: Candidate
    optim: OptimConfig
    seconds: float
    needs: float
    rank: int

    def is_relieved_by(self, other: Almost) -> bool:
        """Return whether another needs less, or as much on fewer ranks: `rank` is their last."""
        return self.optim == other.optim and (other.needs, other.rank) < (self.needs, self.rank)


@dataclass(frozen=True, slots=True)
class _Simulated:
    """A short step, the estimate with the fastest optimizer that fits, else the refusal.

    almost: what almost fits, with an optimizer that may be faster.
    """

    step: StepPlan
    best: Estimate | None
    refusal: ConfigError | None
    almost: Almost | None


class Trials:
    """Tries choices one by one, and keeps what that tells about others.

    effort: what trials have cost, and may.
    learned: what simulations tell about similar choices.
    almost: what almost fits.
    num_estimated: the number of estimates.
    """

    def __init__(
        self,
        scales: Scales,
        shared: Shared,
        book: Book,
        effort: Effort,
        *,
        num_layers: int,
        cluster: ClusterConfig,
        kept: Kept,
    ) -> None:
        self._num_layers, self._cluster = num_layers, cluster
        self._scales, self._shared, self._kept, self._book = scales, shared, kept, book
        self.effort = effort
        self.learned = Learned()
        self.almost: dict[Choice, Almost] = {}
        self.num_estimated = 0

    def draft(self, choice: Choice) -> Candidate:
        """Return the draft of a choice, with balanced rows where these save much.

        They may where ranks have different numbers of layers.  Raises ConfigError if it needs too
        much memory or cannot be run.
        """
        is_even = self._num_layers % choice.degrees.pp == 0
        if is_even or not choice.splits_vocabulary or "vocab.balance" in self._kept.values:
            return self.draft_as_it_is(choice)
        drafts, refusal = list[Candidate](), None
        for one in (choice, replace(choice, balance=True)):
            try:
                drafts.append(self.draft_as_it_is(one))
            except ConfigError as error:
                refusal = refusal or error
            else:
                if drafts[0].vocabulary_part <= _MUCH_BALANCED:
                    return drafts[0]
        if not drafts:
            assert refusal is not None
            raise refusal
        best = min(drafts, key=lambda item: item.passes)
        return drafts[0] if drafts[0].passes <= (1 + _MUCH_BALANCED) * best.passes else best

    def draft_as_it_is(self, choice: Choice) -> Candidate:
        """Return the draft of a choice.  Raises ConfigError like `draft`."""
        candidate = self._scales.draft(choice)
        self.effort.spent += draft_nodes(candidate)
        return candidate

    def estimate(self, candidate: Candidate) -> Estimate:
        """Return the estimate for the fastest optimizer that fits.

        Where some stages may recompute, more of them do until one fits, beside offloading up to
        `_ROUNDS` times, else once; then fewer of them do, up to `_ROUNDS` times, as long as that is
        faster.  That goes on only while it may be the fastest of its kind.  Raises TooLargeError if
        none fits, and HostMemoryError if only the hosts lack memory.
        """
        self.num_estimated += 1
        tried = self._simulated(candidate)
        step, best, refusal = tried.step, tried.best, tried.refusal
        for _ in range(_ROUNDS if candidate.choice.offload else 1):
            if best is not None:
                break
            more = self._other(self._scales.with_more_recompute, candidate, step)
            if more is None:
                break
            candidate = more
            tried = self._simulated(candidate)
            step, best = tried.step, tried.best
        if best is None:
            assert refusal is not None
            raise refusal
        for _ in range(_ROUNDS):
            which = best.candidate, step, best.optim
            fewer = self._other(self._scales.with_fewer_recompute, *which)
            if fewer is None:
                break
            tried = self._simulated(fewer)
            if tried.best is None or tried.best.seconds >= best.seconds:
                break
            step, best = tried.step, tried.best
        return best

    def draft_stages(self, candidate: Candidate, choice: Choice) -> Candidate | None:
        """Return the draft of `candidate` with other stages that recompute, None if it cannot be.

        Most of these cannot, so its effort counts in any case.
        """
        self.effort.spent += draft_nodes(replace(candidate, choice=choice))
        try:
            return self._scales.draft(choice)
        except ConfigError:
            return None

    def estimate_as_it_is(self, candidate: Candidate) -> tuple[Estimate | None, Almost | None]:
        """Return the estimate for the fastest optimizer that fits, and what almost fits."""
        self.num_estimated += 1
        tried = self._simulated(candidate)
        return tried.best, tried.almost

    def _other(
        self, drafted: Callable[..., Candidate | None], *arguments: object
    ) -> Candidate | None:
        """Return a candidate in which other stages recompute if it may be the first of its kind."""
        try:
            other = drafted(*arguments)
        except ConfigError:
            return None
        if other is None or self._kept.against(other.choice) is not None:
            return None
        self.effort.spent += draft_nodes(other)
        return other if self._book.may_be_first(other.choice, other.seconds) else None

    def _simulated(self, candidate: Candidate) -> _Simulated:
        """Simulate a short step, and note what it tells."""
        step, passes, placed = self._shared.short_step(candidate)
        self.effort.spent += effort_of(candidate.choice, placed)
        passes = max(passes, candidate.passes)
        refusal: ConfigError | None = None
        found: list[Estimate] = []
        almost: Almost | None = None
        totals = self._scales.needs(step, candidate.optimizers)
        self.learned.note(candidate, passes, totals[0][0])
        for optim, (needs, rank) in zip(candidate.optimizers, totals, strict=True):
            if needs > self._scales.limit:
                refusal = TooLargeError(needs, self._scales.limit, SIMULATED, rank)
                seconds = passes + self._scales.after(step, optim)
                is_faster = almost is None or seconds < almost.seconds
                if needs <= NEARLY * self._scales.limit and is_faster:
                    almost = Almost(candidate, optim, seconds, needs, rank)
                continue
            try:
                host = self._host_bytes(step, optim)
            except HostMemoryError as error:
                refusal = refusal or error
                continue
            seconds = passes + self._scales.after(step, optim)
            found.append(Estimate(candidate, optim, seconds, needs, host))
        best = min(found, key=lambda estimate: estimate.seconds, default=None)
        if almost is not None and (best is None or almost.seconds < best.seconds):
            self.almost[candidate.choice] = almost
        return _Simulated(step, best, refusal, almost)

    def _host_bytes(self, step: StepPlan, optim: OptimConfig) -> float:
        """Return what a step keeps in host memory.  Raises HostMemoryError for too much."""
        if not optim.offload and not step.cost.offload_bytes:
            return 0.0
        needs = most_host_bytes(step, optim, self._cluster.gpus_per_node).total
        check_hosts(needs, self._scales.host_limit)
        return needs

    def plan(self, estimate: Estimate) -> None:
        """Plan the whole step of an estimate, and drop the estimate if no optimizer fits.

        The step may need more than it seemed to, and another optimizer less.
        """
        choice, candidate = estimate.candidate.choice, estimate.candidate
        self.effort.spent += plan_nodes(candidate)
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
            needs, rank = refusal.needs, refusal.rank
            assert rank is not None, "it was planned"
            self.almost[choice] = Almost(candidate, estimate.optim, estimate.seconds, needs, rank)
        self._book.refuse(choice, refusal, estimate.seconds)
        self._book.replace(estimate, estimate.unbalanced)
        if estimate.unbalanced is not None:
            self.plan(estimate.unbalanced)

    def order_anew(self, planned: Estimate) -> bool:
        """Search for a faster order of a planned step in the memory that it leaves, and book it.

        Returns False if the time is over before its end.  What it has found then is dropped,
        because a run would find something else.
        """
        candidate = planned.candidate
        self.effort.spent += order_nodes(candidate)
        for cap in self.caps_of(planned):
            choice = replace(candidate.choice, cap_gib=cap)
            try:
                step = self._scales.ordered(
                    replace(choice, optimizer=planned.optim), lambda _: self.effort.in_time()
                )
                if not self.effort.in_time():
                    return False
                found = self._found(step, choice, planned.optim)
            except KeyboardInterrupt:  # it was stopped before anything fitted
                if self.effort.in_time():
                    raise
                return False
            except TooLargeError:
                continue
            except ConfigError:
                break
            if found.seconds <= (1 - WORTH_ORDER) * planned.seconds:
                ordered = replace(planned, candidate=replace(candidate, choice=choice))
                self._book.add(replace(ordered.as_planned(found), report=None))
                self._book.plan(choice, found)
            break
        return True

    def caps_of(self, planned: Estimate) -> tuple[float, ...]:
        """Return the caps in GiB to try for an order of a planned step, the highest first.

        Empty if there is no room.
        """
        report = planned.report
        assert report is not None, "it was planned"
        room = report.room(self._scales.limit)
        parts = (1.0, 1.0 - _LOWER_CAP) if room > 0 else ()
        return tuple(rounded_down(part * room / 2**30) for part in parts)

    def _found(self, step: StepPlan, choice: Choice, optim: OptimConfig) -> Found:
        """Return the report of a whole step.  Raises ConfigError if it does not fit."""
        report = report_of(step, self._cluster, optim, cost=self._scales.cost_of(choice))
        check_hosts(report.host.total, self._scales.host_limit)
        needs = report.ranks[report.worst].memory.total
        if needs > self._scales.limit:
            raise TooLargeError(needs, self._scales.limit, SIMULATED, report.worst)
        return Found(replace(choice, optimizer=optim), with_messages(step, report))
