"""What a plan is compared with: FSDP, another contention, and other settings.  Nothing starts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from schedules.generators import GENERATORS
from schedules.generators.auto import Watch
from schedules.render import duration
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.config import ClusterConfig, ConfigError, OptimConfig, RunConfig
from vp_train.planning.choice import Choice, as_typed, choice_of, optimizers_of, unsearched
from vp_train.planning.cluster import limit_of, with_margin
from vp_train.planning.degrees import Degrees, split_ranks
from vp_train.planning.found import MARGIN_OF_OFFLOADING, Estimate, rounded_down
from vp_train.planning.fsdp import (
    ON_GPUS,
    ON_HOSTS,
    FsdpReport,
    Means,
    best_fsdp,
    undivided_batch,
)
from vp_train.planning.kept import Kept
from vp_train.planning.moves import neighbours, offloading, with_larger_microbatches
from vp_train.planning.outlook import (
    MOST_AT_ONCE,
    MOST_PLANNED,
    Outlook,
    num_passes,
    outlook_of,
    promising,
)
from vp_train.planning.peaks import keeps_all
from vp_train.planning.plan import draft_step
from vp_train.planning.report import PlanReport, brief_report, make_report
from vp_train.planning.rivals import Rivals, runs_like
from vp_train.planning.search import simulated
from vp_train.planning.shared import Shared
from vp_train.planning.short import placed_by_short
from vp_train.planning.space import Space, space_of
from vp_train.planning.weigh import Scales
from vp_train.units import AS_FAST, compared, is_as_fast

# Passes that one look for what would help may place, and at least so many short steps of the run:
# of fewer each is dear to a search, which then looks at what is cheap instead of what is fast.  But
# it takes at most half of a minute.
_EFFORT, _LEAST_STEPS, _MOST_EFFORT = 60_000, 60, 3_000_000
# Choices with two other settings; of more only those beside the best with one, if there is a best.
_MANY = 1_000
_LEAST_WAITING = 0.05  # part of a step that no pass fills: from then on a larger batch may help


Look = tuple[Sequence[Choice], tuple[OptimConfig, ...] | None]  # choices and their optimizers


def rivals_of(
    config: RunConfig, report: PlanReport, margin: float = 0.0, kept: Kept | None = None
) -> Rivals:
    """Return the best FSDP for the batch of a plan, which leaves the part `margin` free too.

    Its means are those of the plan, and of the search that found it where that `kept` something.
    """
    parallel, optim = config.parallel, config.optim
    if kept is None:
        means = Means(parallel.offload_activations > 0, optim.offload)
    else:
        optimizers = kept.optimizers(config)
        means = Means(
            kept.values.get("parallel.offload_activations", 1.0) > 0,
            optimizers is None or any(one.offload for one in optimizers),
        )

    def best(means: Means) -> FsdpReport | None:
        return _best_rival(config, report, margin, means)

    with_hosts, without_hosts = best(ON_HOSTS), best(ON_GPUS)
    known = {ON_HOSTS: with_hosts, ON_GPUS: without_hosts}
    rival = known[means] if means in known else best(means)
    return Rivals(
        rival,
        with_hosts,
        without_hosts,
        means,
        seconds=report.step_seconds if report.fits else None,
        runs=runs_like(config.cluster),
        batch=undivided_batch(report.work, config.cluster, _num_sequences(report)),
        is_searched=kept is not None,
    )


def _best_rival(
    config: RunConfig, report: PlanReport, margin: float, means: Means
) -> FsdpReport | None:
    work, cluster = report.work, with_margin(config.cluster, margin)
    settings = work, cluster, config.cost, config.optim
    return best_fsdp(*settings, num_sequences=_num_sequences(report), means=means)


def _num_sequences(report: PlanReport) -> int:
    work = report.work
    return work.num_microbatches * work.micro_batch_size * report.degrees.dp


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run the batch, whose step may depend on the contention.

    words: how it is called.
    seconds: those of its step, which are printed.
    at: returns these with another contention, None if that is not possible, or does not fit.
    is_slow: whether `at` plans a step; then they change by no larger part than layers do.
    factor: by which the seconds count more, see `found.counted`.
    """

    words: str
    seconds: float
    at: Callable[[float], float | None]
    is_slow: bool = False
    factor: float = 1.0


def pipeline_way(words: str, config: RunConfig, seconds: float, factor: float = 1.0) -> Way:
    """Return a plan as a way: beside a sharded vocabulary it depends on the contention.

    With another one it fits where it needs no more than the memory of `config`.  `seconds` may be
    those of another order of the same passes, which change by as much.  What schedule=auto takes
    then, only another search would say.
    """
    algorithm = VOCAB_ALGORITHMS.get(config.vocab.algorithm)
    if algorithm is not None and not algorithm.sharded:
        return Way(words, seconds, lambda part: seconds, factor=factor)
    if config.schedule.is_solved:
        return Way(words, seconds, lambda part: None, factor=factor)

    # Of a long step a shorter one says by how much it changes.
    short = _shortened(config)

    @cache
    def planned(part: float) -> PlanReport | None:
        try:
            report = brief_report(_with_contention(short, part))
        except ConfigError:
            return None
        return report if report.fits else None

    def at(part: float) -> float | None:
        now, then = planned(_contention_of(config)[1]), planned(part)
        if now is None or then is None:
            return None
        # What comes on top are microbatches of the steady state, in which the busiest rank binds.
        more = config.num_microbatches / short.num_microbatches - 1
        slower = [one.step_seconds + more * one.ranks[one.busiest].busy for one in (now, then)]
        return seconds + slower[1] - slower[0]

    return Way(words, seconds, at, is_slow=True, factor=factor)


def _shortened(config: RunConfig) -> RunConfig:
    """Return `config` with fewer microbatches if a shorter step tells what another contention does.

    Where the backward is split, the steady state needs many of them.
    """
    if config.schedule.file is not None:
        return config
    is_uneven = GENERATORS[config.schedule.name].split_backward
    most = MOST_PLANNED if is_uneven else MOST_AT_ONCE
    if num_passes(config) <= most:
        return config
    stages = num_passes(config) // config.num_microbatches
    pp = split_ranks(config.parallel, config.cluster.num_gpus).pp
    count = max(2 * pp, most // 2 // stages)
    return replace(config, num_microbatches=min(config.num_microbatches, count))


def fsdp_way(config: RunConfig, report: PlanReport, rivals: Rivals, margin: float) -> Way | None:
    """Return the rival of a plan as a way, None if it does not fit."""
    rival = rivals.rival
    if rival is None or not rival.fits:
        return None

    @cache
    def at(part: float) -> float | None:
        found = _best_rival(_with_contention(config, part), report, margin, rivals.means)
        return found.seconds if found is not None and found.fits else None

    return Way("FSDP at best", rival.seconds, at)


@dataclass(frozen=True, slots=True)
class Crossover:
    """A contention with which another way wins than with that of the run.

    part: the contention.
    winner, loser: the faster and the slower of two ways then, as `Way.words` calls them.
    seconds, than: those of the step of the winner, and of the loser.
    """

    part: float
    winner: str
    loser: str
    seconds: float
    than: float

    @property
    def words(self) -> str:
        return (
            f"with {self.part:g} {self.winner} is {compared(self.seconds, self.than)} than "
            f"{self.loser} ({duration(self.seconds)} against {duration(self.than)})"
        )


@dataclass(frozen=True, slots=True)
class Crossovers:
    """The contentions that decide which way is the fastest; `crossovers` is empty if none does.

    setting, now: the setting that has the contention of the run, and its value.
    """

    setting: str
    now: float
    crossovers: tuple[Crossover, ...]

    @property
    def words(self) -> str:
        if not self.crossovers:
            return ""
        found = "; ".join(one.words for one in self.crossovers)
        return (
            f"{self.setting}={self.now:g}, by which layers take longer beside collectives: {found}"
            "; the presets have what A100s lost: measure yours (docs/planning.md) and set it"
        )

    def record(self) -> dict[str, Any] | None:
        """Return the crossovers for JSON, None if there is none."""
        if not self.crossovers:
            return None
        crossovers = [
            {
                "value": one.part,
                "winner": one.winner,
                "loser": one.loser,
                "winner_step_seconds": one.seconds,
                "loser_step_seconds": one.than,
            }
            for one in self.crossovers
        ]
        return {"setting": self.setting, "value": self.now, "crossovers": crossovers}


def crossovers_of(config: RunConfig, first: Way, others: Sequence[Way | None]) -> Crossovers:
    """Return with which contention another way wins: none, or twice as much.

    There is no crossover if neither changes whether `first` is faster than each of the `others`.
    """
    setting, now = _contention_of(config)
    found = [
        crossover
        for part in (0.0, 2 * now)
        for other in others
        if now and other is not None
        if (crossover := _crossover(first, other, now, part)) is not None
    ]
    return Crossovers(setting, now, tuple(found))


def _crossover(first: Way, other: Way, now: float, part: float) -> Crossover | None:
    """Return which of two wins with another contention, None if none or who leads now.

    A way leads if it is faster both by its seconds and as they count.  It wins if it is also not as
    fast.
    """

    def leads(seconds: float, others: float) -> bool | None:
        """Return whether the first leads, None if neither does."""
        by_seconds = seconds < others
        counts = seconds * first.factor < others * other.factor
        return by_seconds if by_seconds is counts else None

    def wins(seconds: float | None, others: float | None) -> bool | None:
        """Return whether the first wins, None if neither does."""
        if seconds is None or others is None or is_as_fast(seconds, others):
            return None
        return leads(seconds, others)

    won, most = leads(first.seconds, other.seconds), (1 + part) / (1 + now)
    if won is None:
        return None
    # A slow way changes by some factor from 1 to `most`, so only what turns at one of them may.
    if not any(
        wins(a, b) is (not won)
        for factor in (1.0, most)
        for a, b in [[w.seconds * factor if w.is_slow else w.at(part) for w in (first, other)]]
    ):
        return None
    ours, theirs = first.at(part), other.at(part)
    if ours is None or theirs is None or wins(ours, theirs) is not (not won):
        return None
    (fast, winner), (slow, loser) = sorted(((ours, first.words), (theirs, other.words)))
    return Crossover(part, winner, loser, fast, slow)


def _contention_of(config: RunConfig) -> tuple[str, float]:
    """Return the setting that has the contention of a run, and its value."""
    own = config.cost.contention
    if own is not None or config.run.device != "cuda":
        return "cost.contention", own or 0.0
    return "cluster.contention", config.cluster.contention


def _with_contention(config: RunConfig, part: float) -> RunConfig:
    if _contention_of(config)[0] == "cost.contention":
        return replace(config, cost=replace(config.cost, contention=part))
    return replace(config, cluster=replace(config.cluster, contention=part))


@dataclass(frozen=True, slots=True)
class Help:
    """Settings that help a plan: the overrides to append, and the step with them.

    memory: the bytes of the rank that needs most.
    host: the bytes of a node's host memory.
    is_planned: whether the whole step was planned, not a short one.
    is_pair: whether they change two settings, not one.
    choice: what the settings choose, None where they only change the batch.
    """

    overrides: str
    seconds: float
    memory: float
    host: float = 0.0
    is_planned: bool = True
    is_pair: bool = False
    choice: Choice | None = None

    def record(self, num_tokens: int) -> dict[str, Any]:
        """Return the proposal for JSON, whose step has so many tokens."""
        return {
            "overrides": self.overrides,
            "step_seconds": self.seconds,
            "tokens": num_tokens,
            "tokens_per_second": num_tokens / self.seconds,
            "bytes": self.memory,
            "host_total_bytes": self.host,
            "planned": self.is_planned,
        }


def helps_of(
    config: RunConfig,
    report: PlanReport,
    progress: Callable[[str], object] = lambda words: None,
    choices: Sequence[Choice] | None = None,
    shared: Shared | None = None,
) -> list[Help]:
    """Return what makes a plan faster, or lets it fit: one setting, and two if they do more.

    Schedules, chunks, vocabulary algorithms, degrees, micro-batch sizes, recomputation, offloading
    and optimizers are tried by short steps, and the best are planned unless their step is long.
    What gains less than 1 % does not count, nor what leaves less memory free than a search.  What
    lets a plan fit that has nothing in host memory comes first without that, and with it only if it
    is faster then.  Of schedule=auto only the cap changes, see `_other_cap`, and nothing of a
    schedule from a file.

    choices: those of `space_of`.
    shared: that of `shared_of`, with what other searches know of `config`.
    """
    if config.schedule.is_solved:
        return _other_cap(config, report, progress)
    if config.schedule.file is not None:
        return []
    config = proposing(with_degrees(config, report.degrees))
    now = choice_of(config, report.degrees)
    choices = space_of(config).choices if choices is None else choices

    def near(choice: Choice, number: int = 1) -> list[Choice]:
        found = neighbours(choice, choices, number)
        found += with_larger_microbatches(choice) if number == 1 else []
        if config.run.device == "cuda":
            num_layers = config.model.num_layers
            moving = [choice] if number == 1 else neighbours(choice, choices)
            found += [other for one in moving for other in offloading(one, num_layers)]
        # Which stages recompute is dear to find out, the more if they offload.
        return [
            one
            for one in dict.fromkeys(found)
            if one != now and not (one.offload and one.recompute_where_needed)
        ]

    def near_two(first: Estimate | None) -> list[Choice]:
        """Return what has two other settings; of many, what is near the `first` with one."""
        found = near(now, 2)
        if first is not None and len(found) > _MANY:
            found = near(first.candidate.choice)
        # Which stages recompute is dear to find out, so it is combined with the optimizer only.
        return [choice for choice in found if not choice.recompute_where_needed]

    typed = (config.optim,)
    problem = draft_step(config, config.cluster.num_gpus).problem
    effort = min(max(_EFFORT, _LEAST_STEPS * placed_by_short(problem)), _MOST_EFFORT)
    others = tuple(one for one in optimizers_of(config, report.degrees.dp) if one != config.optim)
    found = list[Help]()
    shared = shared_of(config, report) if shared is None else shared
    if as_typed(config) == now:  # else its layers or rows are others
        shared.passes[replace(now, offload=0.0)] = report.passes
    before = report.step_seconds if report.fits else math.inf

    def look(rounds: Sequence[Look], *, is_pair: bool = False) -> Estimate | None:
        """Return the fastest, which is added to `found` if its plan gains enough."""
        nonlocal before
        best = fastest_of(config, rounds, effort, (1 - AS_FAST) * before, shared)
        planned = None
        if best is not None and best.seconds < before:
            planned = planned_help(config, best)
        if planned is not None and planned.seconds < (1 - AS_FAST) * before:
            found.append(replace(planned, is_pair=is_pair))
            before = planned.seconds
        return best

    def look_around(*, hosts: bool) -> None:
        """Look at one other setting, and at two; only with `hosts` at what needs their memory."""
        of_one = [choice for choice in near(now) if hosts or not choice.offload]
        optimizers = tuple(one for one in others if hosts or not one.offload)
        where = "" if hosts else " without host memory"
        progress(f"trying what one other setting would gain{where}")
        first = look([(of_one, typed), *([([now], optimizers)] if optimizers else [])])
        progress(f"trying what two other settings would gain{where}")
        of_two = [choice for choice in near_two(first) if hosts or not choice.offload]
        of_both = (of_one, None if hosts else (*typed, *optimizers))
        look([(of_two, typed), of_both], is_pair=True)

    if not report.fits and not (now.offload or config.optim.offload):
        look_around(hosts=False)
    look_around(hosts=True)
    return found


def _other_cap(
    config: RunConfig, report: PlanReport, progress: Callable[[str], object]
) -> list[Help]:
    """Return the cap with which schedule=auto uses the memory that its plan leaves, if that helps.

    It is lower where the plan does not fit.  Where ranks hardly wait no order is faster, so none is
    searched for.
    """
    lean = proposing(config)
    room, kept = report.room(limit_of(lean.cluster)), report.most_kept
    waiting = 1 - report.ranks[report.busiest].busy / report.step_seconds
    if room <= 0 or (report.fits and (room <= kept or waiting < AS_FAST)):
        return []
    cap, typed = rounded_down(room / 2**30), config.schedule.cap_gib
    if report.fits and typed is not None and typed >= cap:
        return []
    progress(f"searching for an order with schedule.cap_gib={cap:g}")
    with suppress(ConfigError):
        capped = replace(config.schedule, cap_gib=cap, cap_microbatches=None)
        found = Outlook.of(make_report(replace(lean, schedule=capped)))
        is_better = found.seconds < (1 - AS_FAST) * report.step_seconds or not report.fits
        if found.fits and is_better:
            words = f"schedule.cap_gib={cap:g}"
            if config.schedule.cap_microbatches is not None:
                words += " schedule.cap_microbatches=null"
            return [_help_of(words, found)]
    return []


def report_as_typed(
    config: RunConfig, margin: float, watch: Watch | None = None
) -> PlanReport | None:
    """Return the report of a run that no search makes, if it fits with the margin of the search.

    None if a search makes it, or if it cannot be run.  `watch`: see `make_report`.
    """
    if not unsearched(config):
        return None
    try:
        report = make_report(config, watch)
    except ConfigError:
        return None
    return report if _fits_with(report, with_margin(config.cluster, margin)) else None


def proposing(config: RunConfig) -> RunConfig:
    """Return `config` with the memory that a proposal may use, see `MARGIN`."""
    return replace(config, cluster=with_margin(config.cluster))


def shared_of(config: RunConfig, report: PlanReport) -> Shared:
    """Return what searches beside a plan share, which have the memory of a proposal."""
    lean = proposing(with_degrees(config, report.degrees))
    return Shared(Scales(lean, limit_of(lean.cluster)))


def for_another_plan(config: RunConfig, report: PlanReport) -> RunConfig:
    """Return `config` with the memory that another plan may use in the place of its own.

    That is what a proposal may use if its own plan leaves as much free, else all.
    """
    lean = proposing(config)
    return lean if _fits_with(report, lean.cluster) else config


def _fits_with(report: PlanReport, cluster: ClusterConfig) -> bool:
    """Return whether a plan fits into the memory of another cluster, which is else its own."""
    return replace(report, cluster=cluster).fits


def with_degrees(config: RunConfig, degrees: Degrees) -> RunConfig:
    """Return `config` with all degrees set."""
    dp, pp, tp = degrees.dp, degrees.pp, degrees.tp
    return replace(config, parallel=replace(config.parallel, dp=dp, pp=pp, tp=tp))


def fastest_of(
    config: RunConfig, rounds: Sequence[Look], effort: int, below: float, shared: Shared
) -> Estimate | None:
    """Return the fastest of choices with their optimizers (None: all) that fits.

    What cannot take fewer than `below` seconds, or than what was found before, is not looked at.
    """
    best: Estimate | None = None
    for choices, optimizers in rounds:
        space = Space(tuple(choices), Counter(), optimizers)
        least = below * (1 + MARGIN_OF_OFFLOADING)  # so that what offloads is not left out
        found = simulated(config, space, effort, below=least, shared=shared).estimated
        best = min(found if best is None else [best, *found], key=lambda one: one.key, default=None)
        below = below if best is None else min(below, best.counted)
    return best


def planned_help(
    config: RunConfig, estimate: Estimate, *, whole: int = MOST_PLANNED
) -> Help | None:
    """Return the plan of an estimate, the estimate of a long step, None if it does not fit.

    A step is long from `whole` forward passes on.  None also for a long step of which no short ones
    tell what it keeps.
    """
    choice = replace(estimate.choice, balance=config.vocab.balance)
    if not choice.redistributes and config.parallel.placement == "balanced":
        choice = replace(choice, placement="balanced")
    chosen, words = choice.applied(config), choice.changes(config)
    if num_passes(chosen) > whole and not keeps_all(chosen.schedule.name):
        return estimated_help(words, estimate, choice)
    with suppress(ConfigError):
        found = outlook_of(chosen)
        return _help_of(words, found, choice) if found.fits else None
    return None


def estimated_help(words: str, estimate: Estimate, choice: Choice) -> Help:
    """Return what short steps say of a choice with the overrides `words`."""
    return Help(
        words, estimate.seconds, estimate.memory, estimate.host, is_planned=False, choice=choice
    )


def _help_of(words: str, found: Outlook, choice: Choice | None = None) -> Help:
    return Help(words, found.seconds, found.memory, found.host, found.is_planned, choice=choice)


def larger_batch_of(config: RunConfig, report: PlanReport) -> Help | None:
    """Return a batch twice as large if that gains 1 % of tokens per second.

    It is planned whole unless it is long: then short steps tell.  None also where ranks hardly
    wait, and for a schedule from a file or from schedule=auto.
    """
    waiting = 1 - report.ranks[report.busiest].busy / report.step_seconds
    if waiting < _LEAST_WAITING or config.schedule.is_solved or config.schedule.file is not None:
        return None
    count, enough = 2 * config.num_microbatches, 2 * (1 - AS_FAST) * report.step_seconds

    def gains(found: Outlook) -> bool:
        return found.seconds < enough

    with suppress(ConfigError):
        found = promising(replace(proposing(config), num_microbatches=count), gains)
        if found.fits and gains(found):
            return _help_of(f"num_microbatches={count}", found)
    return None
