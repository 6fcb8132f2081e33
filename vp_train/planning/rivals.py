"""FSDP beside a plan: who wins if FSDP runs as planned, and if it runs as published runs did.

The plan of FSDP is its best, because published runs of it took longer than such plans of
them.  So there are two times: at best, and at what runs reached.  The plan of a pipeline counts as
it is: published pipelines ran about as planned (docs/results_plans.md).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from schedules.render import duration
from vp_train.config import ClusterConfig
from vp_train.planning.degrees import Degrees
from vp_train.planning.fsdp import ON_GPUS, Batch, FsdpReport, Means
from vp_train.units import compared, count_words, is_as_fast, is_faster

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class PublishedRuns:
    """How much longer published runs of FSDP on a card took than plans of them.

    card: its name.
    peak: its FLOP/s in bfloat16.
    least, most: measured over planned seconds, the medians of the sources with the least and with
        the most.  benchmarks/plan_published.py plans these runs.
    """

    card: str
    peak: float
    least: float
    most: float

    def seconds(self, planned: float) -> tuple[float, float]:
        """Return the least and the most seconds of a step at what the runs reached."""
        return self.least * planned, self.most * planned


PUBLISHED = (PublishedRuns("A100", 3.12e14, 1.07, 1.16), PublishedRuns("H100", 9.89e14, 1.16, 1.32))


def runs_like(cluster: ClusterConfig) -> PublishedRuns:
    """Return the published runs on the card whose peak is nearest to that of a cluster."""
    peak = cluster.bfloat16_flops_per_second
    return min(PUBLISHED, key=lambda runs: abs(math.log(runs.peak / peak)))


def outcome_of(planned: float, seconds: float, runs: PublishedRuns) -> str:
    """Return whether FSDP that takes `planned` seconds at best wins against `seconds`.

    `loses`: it is slower even at best, and `ties`: it is as fast then.  `wins`: it does not lose
    even at what the slowest source of published runs reached.  Else `open`.
    """
    if is_as_fast(planned, seconds):
        return "ties"
    if planned > seconds:
        return "loses"
    _, most = runs.seconds(planned)
    return "open" if is_faster(seconds, most) else "wins"


@dataclass(frozen=True, slots=True)
class Rivals:
    """The best steps with FSDP for the batch of a plan.

    rival: the one with the `means` of the plan, or of the search that found it.
    with_hosts, without_hosts: those that may use host memory for everything, and for nothing.
    seconds: those of the plan; None if it does not fit.
    runs: the published runs of FSDP that say what it reaches.
    batch: the batch if it does not divide over the GPUs; then each step is None.
    is_searched: whether the means are those of a search.
    """

    rival: FsdpReport | None
    with_hosts: FsdpReport | None
    without_hosts: FsdpReport | None
    means: Means
    seconds: float | None
    runs: PublishedRuns
    batch: Batch | None = None
    is_searched: bool = False

    @property
    def outcome(self) -> str | None:
        """The outcome of `outcome_of`; None if FSDP or the plan does not fit."""
        if self.rival is None or not self.rival.fits or self.seconds is None:
            return None
        return outcome_of(self.rival.seconds, self.seconds, self.runs)

    @property
    def words(self) -> str:
        """Return in words whether FSDP wins against the plan, and how it runs.

        The words end with what a reader needs: FSDP is no run of this trainer.
        """
        found = self.rival
        other = self.with_hosts if self.means == ON_GPUS else self.without_hosts
        if found is None or other is None:
            return self._batch_words
        plan = "this search" if self.is_searched else "this plan"
        where, ends = f"where {self.means.words}, as in {plan}", "it does not fit"
        if other.fits:
            ends = f"{duration(other.seconds)} at best"
            ends += "" if self.seconds is None else f", {compared(other.seconds, self.seconds)}"
        ends = f"; {'with' if self.means == ON_GPUS else 'without'} host memory {ends}"
        if self.with_hosts is not None and not self.with_hosts.host_bytes:
            where, ends = "with or without host memory", ""
        size, limit = f"{found.num_bytes / _GIB:,.2f}", f"{found.limit / _GIB:.4g} GiB"
        if not found.fits:
            return f"would not fit, {where}: at least {size} GiB, more than {limit}{ends}"
        how = f"{_words(found.degrees)}, micro-batch {found.micro_batch_size}"
        how += f", {found.memory_words}, {size} of {limit}"
        return f"{self._verdict(found)}; planned {where} ({how}){ends}; vp-train has no FSDP"

    @property
    def _batch_words(self) -> str:
        found = self.batch
        assert found is not None, "else there is a step, if none that fits"
        return (
            f"the batch of {count_words(found.num_sequences, 'sequence')} does not divide over the "
            f"GPUs; {found.nearest:,} would, over {_words(found.degrees)}"
        )

    def _verdict(self, found: FsdpReport) -> str:
        """Return the outcome in words, with the seconds at best and at what runs reached."""
        best, reached = found.seconds, self.runs.seconds(found.seconds)
        least, most = map(duration, reached)
        at_best = f"{duration(best)} at best"
        runs = f"at what {self.runs.card} runs of it reached"
        if self.seconds is None:
            return f"would fit: {at_best}, {least} to {most} {runs}"
        plan = "the first plan" if self.is_searched else "this plan"
        if self.outcome == "ties":
            return f"would tie: {at_best}, as fast as {plan}, {least} to {most} {runs}"
        at_best += f", {compared(best, self.seconds)} than {plan}"
        if self.outcome == "loses":
            return f"would lose: {at_best}, {least} to {most} {runs}"
        low, high = (compared(seconds, self.seconds) for seconds in reached)
        if low.split()[-1] == high.split()[-1]:
            low = low.split()[0]
        at_runs = f"{least} to {most}, {low} to {high}, {runs}"
        if self.outcome == "wins":
            return f"would win: {at_best}, {at_runs}"
        near = f"{self.seconds / best - 1:.1%}"
        unless = f"{plan} wins unless FSDP is within {near} of its best"
        return f"open: {at_best}, but {at_runs}: {unless}"

    def record(self) -> dict[str, Any]:
        """Return the outcome and the steps for JSON, in bytes and seconds."""
        steps = {
            "rival": self.rival,
            "with_hosts": self.with_hosts,
            "without_hosts": self.without_hosts,
        }
        return {
            "outcome": self.outcome,
            "may_be_on_hosts": asdict(self.means),
            "published_runs": asdict(self.runs),
            "undivided_batch": None if self.batch is None else asdict(self.batch),
        } | {name: None if one is None else self._step_record(one) for name, one in steps.items()}

    def _step_record(self, step: FsdpReport) -> dict[str, Any]:
        return step.record() | {"reached_seconds": self.runs.seconds(step.seconds)}


def _words(degrees: Degrees) -> str:
    return f"dp={degrees.dp} x tp={degrees.tp}"
