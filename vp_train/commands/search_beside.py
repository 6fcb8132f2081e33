"""What the result of a search is compared with: FSDP, other links and contentions, and ways out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vp_train.commands.plan_remedies import FACTORS
from vp_train.commands.plan_words import has_fsdp
from vp_train.config import ConfigError, RunConfig
from vp_train.planning.choice import Choice
from vp_train.planning.cluster import limit_of, with_margin
from vp_train.planning.compare import (
    Crossovers,
    Way,
    crossovers_of,
    fsdp_way,
    pipeline_way,
    rivals_of,
)
from vp_train.planning.found import Estimate, Found, Limits, SearchResult, counted, order_of
from vp_train.planning.kept import Kept
from vp_train.planning.rivals import Rivals
from vp_train.planning.search import fits_on
from vp_train.planning.slow_link import SlowLink, link_of
from vp_train.units import compared

_HALVINGS = 3  # of the numbers of nodes that are tried where nothing fits
_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class LeastLink:
    """The slowest link to the host with which the first plan of a search fits, by short steps.

    now, least: the bandwidth there is and the least, in bytes per second.
    seconds, than: the step of the first plan with the least, and with what there is.
    with_half: with half of the bandwidth, what is the fastest that fits, in words; "" if nothing
        does, None if the first plan still fits.
    overrides: those of it, if there is any.
    """

    now: float
    least: float
    seconds: float
    than: float
    with_half: str | None = None
    overrides: str | None = None

    @property
    def words(self) -> str:
        slowest = f"down to about {self.least / 1e9:.2g} of the {self.now / 1e9:.3g} GB/s per GPU"
        if self.least == self.now:
            slowest = f"with no less than the {self.now / 1e9:.3g} GB/s per GPU"
        then = compared(self.seconds, self.than)
        line = f"link: the first fits {slowest} by short steps, and is {then} then"
        if self.with_half is None:
            return line
        fastest = "nothing named here fits"
        if self.with_half:
            fastest = f"the fastest named here that fits is {self.with_half}"
        return f"{line}; with half of them, {self.now / 2e9:.3g}, {fastest}"

    def record(self) -> dict[str, Any]:
        """Return this for JSON."""
        return {
            "bytes_per_second": self.now,
            "least_bytes_per_second": self.least,
            "step_seconds_with_least": self.seconds,
            "fits_with_half": self.with_half is None,
            "fastest_with_half": self.overrides,
        }


def _least_link(
    config: RunConfig, limits: Limits, result: SearchResult, rows: Sequence[Found | Estimate]
) -> LeastLink | None:
    """Return the slowest link to the host with which the first plan fits, None if it has no need.

    Where it does not fit with half of the link, the fastest that does is named, if there is any:
    a plan, or an estimate that moves nothing.
    """
    first, now = result.best[0], link_of(config)
    if not first.choice.offload:
        return None
    limit, link = limit_of(config.cluster, limits.margin), SlowLink(config, first.choice)
    least, seconds = link.least(limit), first.report.step_seconds
    found = LeastLink(now, least, seconds + link.later(least), seconds)
    half = now / 2
    if least <= half:
        return found
    rest = ((f"row {n}", row) for n, row in enumerate(rows, 1))
    firsts = {
        "the best with vocabulary parallelism": result.with_vocabulary,
        "the best without vocabulary parallelism": result.without_vocabulary,
        "the best without offloaded activations": result.without_offloading,
    }
    named = {
        found.choice: (words, found.counted)
        for words, found in (*firsts.items(), *rest)
        if isinstance(found, Found)
        or (found is not None and (found.is_planned or not found.choice.offload))
    }
    fitting = list[tuple[float, str, str]]()
    for choice, (words, counted_seconds) in named.items():
        link = SlowLink(config, choice)
        if not choice.offload or link.needs(half) <= limit:
            then = counted_seconds + link.later(half)
            fitting.append((then, words, choice.overrides(config)))
    _, words, overrides = min(fitting, default=(0.0, "", None))
    return replace(found, with_half=words, overrides=overrides)


@dataclass(frozen=True, slots=True)
class WayOut:
    """What would let a choice fit where none does.

    setting: the setting that has to change, None if it is left open; `least` is its value then.
    overrides: what to append so that a choice may fit, if there is one.
    """

    words: str
    setting: str | None = None
    least: float | None = None
    overrides: str | None = None

    def record(self) -> dict[str, Any]:
        """Return this for JSON; nothing is planned, so whether it is enough is not known."""
        return {
            "words": self.words,
            "overrides": self.overrides,
            "enough": None,
            "setting": self.setting,
            "least": self.least,
        }


def _ways_out(config: RunConfig, limits: Limits, result: SearchResult) -> list[WayOut]:
    """Return what would let something fit: more memory, to keep less, or more nodes."""
    leanest, part = result.leanest, (1 - limits.margin) * _GIB
    if leanest is None:
        return []
    known = with_margin(config.cluster, limits.margin).host_memory_gib
    if leanest.host_needs is not None and known is not None:
        enough = leanest.host_needs / part
        words = f"more than {_gib(enough)} GiB of host memory per node (cluster.host_memory_gib)"
        found = [WayOut(words, "cluster.host_memory_gib", enough)]
    else:
        enough = (leanest.needs or 0.0) / part
        words = (
            f"GPUs with more than {_gib(enough)} GiB (cluster.memory_gib), which state and the "
            "leanest activations take"
        )
        found = [WayOut(words, "cluster.memory_gib", enough)]
    if result.kept.values:
        free = fits_on(config, limits.margin)
        if free is not None:
            words = f"to keep less with --keep; then {_may_fit(free, config)}"
            found.append(WayOut(words, overrides=free.overrides(config)))
    more = _more_nodes(config, limits, result.kept)
    if more is None:
        return [*found, WayOut("a smaller model.seq_length; more nodes do not suffice")]
    num_nodes, fitting = more
    nodes = f"cluster.num_nodes={num_nodes}"
    words, overrides = f"{nodes}, where {_may_fit(fitting, config)}", fitting.overrides(config)
    return [*found, WayOut(words, "cluster.num_nodes", num_nodes, f"{nodes} {overrides}")]


@dataclass(frozen=True, slots=True)
class Compared:
    """What the result of a search is compared with; None where there is nothing to say.

    rivals: FSDP for the same batch.
    decision: the contentions that decide which plan is the fastest.
    link: the slowest link to the host with which the first plan fits.
    ways_out: what would let something fit, where nothing does.
    """

    rivals: Rivals | None = None
    decision: Crossovers | None = None
    link: LeastLink | None = None
    ways_out: Sequence[WayOut] = ()

    def record(self) -> dict[str, Any]:
        """Return this for JSON."""
        return {
            "fsdp": None if self.rivals is None else self.rivals.record(),
            "decides": None if self.decision is None else self.decision.record(),
            "link": None if self.link is None else self.link.record(),
            "would_help": [one.record() for one in self.ways_out],
        }


def compared_with(config: RunConfig, limits: Limits, result: SearchResult) -> Compared:
    """Return what the result of a search is compared with."""
    if not result.best:
        return Compared(ways_out=_ways_out(config, limits, result))
    rivals = None
    if has_fsdp(config):
        rivals = rivals_of(config, result.best[0].report, limits.margin, result.kept)
    return Compared(
        rivals,
        _decision(config, limits, result, rivals),
        _least_link(config, limits, result, rows_of(result)),
    )


def rows_of(result: SearchResult) -> list[Found | Estimate]:
    """Return the rows of the table.  What is as fast stands by its memory, plans first.

    Where all of them offload activations, the best that does not is added.
    """
    rows: list[Found | Estimate] = [*result.best, *result.estimated]
    other = result.without_offloading
    if other is not None and all(row.choice.offload for row in rows):
        rows.append(other)
    return sorted(rows, key=lambda row: order_of(row.choice, row.seconds))


def _decision(
    config: RunConfig, limits: Limits, result: SearchResult, rivals: Rivals | None
) -> Crossovers:
    """Return with which contention another of the compared plans is the fastest."""
    first = result.best[0]
    splits = first.choice.splits_vocabulary
    other = result.without_vocabulary if splits else result.with_vocabulary
    rival = None
    if rivals is not None:
        rival = fsdp_way(config, first.report, rivals, limits.margin)
    lean = replace(config, cluster=with_margin(config.cluster, limits.margin))

    def way(words: str, choice: Choice, seconds: float) -> Way:
        base = replace(choice, cap_gib=None)  # another contention changes every order as much
        return pipeline_way(words, base.applied(lean), seconds, counted(choice, 1.0))

    best = None
    if other is not None:
        kind = "without" if splits else "with"
        words = f"the best {kind} vocabulary parallelism"
        best = way(words, other.choice, other.seconds)
    fastest = way("the first", first.choice, first.report.step_seconds)
    return crossovers_of(config, fastest, (best, rival))


def _more_nodes(config: RunConfig, limits: Limits, kept: Kept) -> tuple[int, Choice] | None:
    """Return about the fewest nodes on which a choice may fit, and this.

    They are doubled until one fits, and the interval is halved a few times.  None if 64 times as
    many do not suffice, or more than a cluster can have.
    """

    def fits(num_nodes: int) -> Choice | None:
        try:
            cluster = replace(config.cluster, num_nodes=num_nodes)
        except ConfigError:
            return None
        return fits_on(replace(config, cluster=cluster), limits.margin, kept)

    fewest = config.cluster.num_nodes
    for factor in FACTORS:
        found, num_nodes = fits(factor * fewest), factor * fewest
        if found is None:
            continue
        low = num_nodes // 2
        for _ in range(_HALVINGS):
            between = (low + num_nodes) // 2
            if between == low:
                break
            other = fits(between)
            if other is None:
                low = between
            else:
                found, num_nodes = other, between
        return num_nodes, found
    return None


def _gib(count: float) -> str:
    """Return a number of GiB in four digits or more."""
    return f"{count:,.0f}" if count >= 1000 else f"{count:.4g}"


def _may_fit(choice: Choice, config: RunConfig) -> str:
    """Return that a choice may fit in words, with its optimizer where that is not the typed one."""
    optim = choice.optimizer or config.optim
    words = [f"optim.name={optim.name}"] * (optim.name != config.optim.name)
    if optim.offload != config.optim.offload:
        words.append(f"optim.offload={str(optim.offload).lower()}")
    return f"{choice.degrees}{' with ' * bool(words)}{' '.join(words)} may fit"
