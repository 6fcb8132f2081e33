"""What `vp-plan --search` prints of the plans it has found."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schedules.generators import GENERATORS
from schedules.render import duration
from vp_train.commands.command import MOST_NUMBER, text_width
from vp_train.commands.plan_words import (
    PLACED,
    compared_words,
    exposed_words,
    fsdp_words,
    table_lines,
)
from vp_train.commands.search_beside import Compared, rows_of
from vp_train.config import RunConfig
from vp_train.config.parallel import recompute_words
from vp_train.planning.choice import Choice, unsearched
from vp_train.planning.cluster import with_margin
from vp_train.planning.found import (
    MARGIN_OF_OFFLOADING,
    Estimate,
    Found,
    Limits,
    SearchResult,
    memory_of,
    rounded,
)
from vp_train.planning.report import PlanReport
from vp_train.planning.slow_link import link_of
from vp_train.planning.space import TOO_LONG
from vp_train.units import compared, count_words, human_bytes, is_faster, large_bytes

_SHOWN_REFUSALS = 3
_GIB, _MIB = 2.0**30, 2.0**20
_MEMORY = {_GIB: "GiB", _MIB: "MiB"}
# Of the table of a search: the columns with words, and that of the memory per node.
_DEGREES, _SCHEDULE = "dp x pp x tp", "schedule x chunks"
_WORDS = (_SCHEDULE, "vocab", "recompute", "sp", "optim")
_HOST_MEMORY = "host RAM"


def search_lines(
    config: RunConfig,
    limits: Limits,
    result: SearchResult,
    beside: Compared,
    typed: PlanReport | None = None,
    *,
    is_stopped: bool = False,
    spent_seconds: float | None = None,
) -> list[str]:
    """Return the best plans in lines, and why others are not among them.

    beside: what the result is compared with, see `compared_with`.
    typed: the run as it was typed, if it fits and no search makes it.
    spent_seconds: the CPU time of the search; None if it is not known.
    """
    lines = _unfinished_lines(limits, result, spent_seconds, is_stopped=is_stopped)
    if result.best:
        first, rows = result.best[0], _rows(result)
        lines += [*_table_lines(config, result, rows), "", *_override_lines(config, first, rows)]
        lines += _typed_lines(config, typed, first.report)
        lines += _order_lines(config, result)
        lines += [f"exposed: {words}" for words in [exposed_words(first.report)] if words]
        lines += [f"binds: {first.report.binds}"]
        lines += _host_memory_lines(first, rows, limits)
        lines += [] if beside.link is None else [beside.link.words]
        lines += _vocabulary_lines(config, result, rows)
        lines += _other_lines(config, result, rows)
        if beside.rivals is not None:
            lines += [f"fsdp: {fsdp_words(config, beside.rivals)}"]
        if beside.decision is not None and beside.decision.crossovers:
            lines += [f"decides: {beside.decision.words}"]
        lines += [""]
    excluded = sum(result.excluded.values())
    at_first = result.num_choices - result.num_added + result.num_same
    added = f", {result.num_added:,} added on the way" * (result.num_added > 0)
    same = f", {result.num_same:,} the same as others" * (result.num_same > 0)
    ruled_out = f", {excluded:,} ruled out" * (excluded > 0)
    summary = (
        f"{_choices(at_first)}{added}{same}{ruled_out}, "
        f"{result.num_estimated:,} simulated, {result.num_planned} planned"
    )
    is_whole = result.best and not result.num_open
    summary += "; none of the others that were weighed seems faster" if is_whole else ""
    lines += [summary, *_excluded_lines(result)]
    if not result.best:
        lines += _miss_lines(config, limits, result)
        lines += [f"would help: {one.words}" for one in beside.ways_out]
        lines += _typed_lines(config, typed)
    return lines


def _typed_lines(
    config: RunConfig, typed: PlanReport | None, first: PlanReport | None = None
) -> list[str]:
    """Return what a run takes that no search makes, unless the `first` plan is as fast."""
    if typed is None:
        return []
    words = f"as typed: {duration(typed.step_seconds)}"
    if first is not None:
        seconds, others = typed.step_seconds, first.step_seconds
        if not is_faster(seconds, others):
            return []
        words += f" ({compared(seconds, others)} than the first)"
    words += f", {human_bytes(typed.ranks[typed.worst].memory.total)}"
    return [f"{words}; a search does not try {' and '.join(unsearched(config))} as given"]


def _order_lines(config: RunConfig, result: SearchResult) -> list[str]:
    """Return how to ask for a faster order of the first plan if the search has not."""
    if result.unordered is None:
        return []
    first = result.best[0]
    changes = result.unordered.changes(first.choice.applied(config))
    words = "not tried: a faster order of the first; behind its overrides, without --search"
    return [f"{words}: {changes}"]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the table: a plan, or an estimate that was not planned whole."""

    found: Found | Estimate

    @property
    def choice(self) -> Choice:
        return self.found.choice

    @property
    def host(self) -> float:
        """The bytes of a node's host memory."""
        return self.found.host if isinstance(self.found, Estimate) else self.found.report.host.total

    def words(self, first: PlanReport, unit: float) -> dict[str, str]:
        """Return what the row says of time and memory, by column; `first` is the first plan."""
        found = self.found
        if found.report is not None:
            return _report_words(found.report, unit)
        mfu = first.mfu * first.step_seconds / found.seconds
        return {
            "step": f"~{duration(found.seconds)}",
            "MFU": f"~{mfu:.1%}",
            "bubble": "-",  # no short step says it
            _MEMORY[unit]: f"~{found.memory / unit:,.1f}",
            _HOST_MEMORY: _host_words(found.host, unit, "~"),
        }


def _rows(result: SearchResult) -> list[_Row]:
    """Return the rows of the table."""
    return [*map(_Row, rows_of(result))]


def _override_lines(config: RunConfig, first: Found, rows: Sequence[_Row]) -> list[str]:
    """Return the overrides of the first plan, and what the other rows change in them."""
    place = next(n for n, row in enumerate(rows, 1) if row.found is first)
    head = "the first" if place == 1 else f"row {place}, the first that is planned whole"
    chosen = first.choice.applied(config)
    return [
        f"{head}: {first.choice.overrides(config)}",
        *(
            f"row {n}, behind those: {row.choice.changes(chosen)}"
            for n, row in enumerate(rows, 1)
            if n != place
        ),
    ]


def _unfinished_lines(
    limits: Limits, result: SearchResult, spent_seconds: float | None, *, is_stopped: bool
) -> list[str]:
    """Return what ended a search before all that might be faster was looked at, and a blank line.

    They come first, so that nobody takes a plan for the best there is, nor an estimate for a plan.
    Where the effort ended it, twice as much is advised, and more time only if that takes more.
    """
    if not result.num_open:
        return []
    now = limits.effort // 1000  # thousand passes, as --effort takes them
    seconds = 2 * limits.seconds
    if result.ended == "effort":
        why, way_out = "THE EFFORT IS SPENT", f"; {_more_words('effort', 2 * now, now)}"
        needs = 0.0 if spent_seconds is None else 2 * spent_seconds
        if needs > limits.seconds:
            seconds = max(seconds, math.ceil(needs))
            way_out += f", and {_more_words('seconds', seconds, limits.seconds, verb='')}"
    else:
        why, way_out = "OUT OF TIME", f"; {_more_words('seconds', seconds, limits.seconds)}"
    if is_stopped:
        why, way_out = "STOPPED", ""
    left = f"{_choices(result.num_open)} left that might be faster"
    if result.estimated:
        best = len(result.best) + len(result.estimated)
        left += f", and {len(result.estimated)} of the best {best} not planned whole"
    return [f"{why} with {left}{way_out}", ""]


def _more_words(option: str, value: int, now: int, *, verb: str = "raise ") -> str:
    """Return in words to raise an option: `raise --effort to 20000 (now 10000)`."""
    return f"{verb}--{option} to {min(value, MOST_NUMBER)} (now {now})"


def _choices(count: int) -> str:
    """Return a number of choices in words."""
    return count_words(count, "choice")


def _vocabulary_lines(config: RunConfig, result: SearchResult, rows: Sequence[_Row]) -> list[str]:
    """Return a line with the best plan of the other kind than the first, if both were searched."""
    first, kept = result.best[0], result.kept.values
    has_one_rank = kept.get("parallel.pp") == 1 or config.cluster.num_gpus == 1
    if "vocab.algorithm" in kept or has_one_rank:
        return []
    splits = first.choice.splits_vocabulary
    other = result.without_vocabulary if splits else result.with_vocabulary
    where = "with what is kept" if kept else "on any split"
    kind = f"{'without' if splits else 'with'} vocabulary parallelism, {where}"
    kind = f"the best {kind}" if other is None else f"the best found {kind}"
    if other is None:
        left = result.num_unseen[not splits]
        found = f"not searched to the end, {_choices(left)} left" if left else "nothing fits"
        return [f"{kind}: {found}"]
    return [f"{kind}: {_other_words(config, first, other, rows)}"]


def _other_lines(config: RunConfig, result: SearchResult, rows: Sequence[_Row]) -> list[str]:
    """Return lines with what is worth a look beside the first plan: leaner, and simpler to run."""
    first, others = result.best[0], dict[str, Estimate | None]()
    others["about as fast with less memory"] = result.leaner
    if first.choice.offload:
        others["the best found without offloaded activations"] = result.without_offloading
    lines = [
        f"{head}: {_other_words(config, first, other, rows)}"
        for head, other in others.items()
        if other is not None
    ]
    name = "parallel.offload_activations"
    if first.choice.offload and result.num_open and name not in result.kept.values:
        keep = f"--keep {name} {name}=0"
        lines.append(f"plans without had little of the effort: {keep} searches them alone")
    return lines


def _other_words(config: RunConfig, first: Found, other: Estimate, rows: Sequence[_Row]) -> str:
    """Return time and memory of another choice than the first plan, and how to get it."""
    words = compared_words(other, first.report.step_seconds)
    optimizer = other.choice.optimizer
    uses_hosts = other.choice.offload > 0 or (optimizer is not None and optimizer.offload)
    if uses_hosts and config.cluster.host_memory_gib is None:
        words += ", with host memory that is not checked"
    row = next((n for n, row in enumerate(rows, 1) if row.choice == other.choice), None)
    return f"{words}: {other.choice.overrides(config) if row is None else f'row {row}'}"


def _host_memory_lines(found: Found, rows: Sequence[_Row], limits: Limits) -> list[str]:
    """Return a line with the host memory of `found` and other rows, and how it was checked."""
    first, most = found.report.host.total, max(row.host for row in rows)
    known = found.report.cluster.host_memory_gib
    if not most:
        return []
    need = f"the first needs {large_bytes(first)} per node" if first else "the first needs none"
    if most > first:
        need += f", others up to {large_bytes(most)}{'' if first else ' per node'}"
    if known is None:
        line = f"host RAM is not checked: {need}; set cluster.host_memory_gib to what there is"
    else:
        rest = with_margin(found.report.cluster, limits.margin).host_memory_gib
        left = f"{rest:,.6g} of the " if limits.margin else ""
        line = f"host RAM: {need}; a plan may use {left}{known:,.6g} GiB of cluster.host_memory_gib"
    if any(row.choice.offload for row in rows):
        line += "; no training on GPUs has offloaded activations yet"
    return [line]


def _known_words(config: RunConfig) -> str:
    """Return the memory of a host in words."""
    known = config.cluster.host_memory_gib
    return "memory without a limit" if known is None else f"{known:,.6g} GiB per node"


def _table_lines(config: RunConfig, result: SearchResult, rows: Sequence[_Row]) -> list[str]:
    """Return a table of the best in lines, those that are only estimated with `~`.

    What all have in common stands above it.
    """
    first = result.best[0].report
    unit = _GIB if memory_of(result.best[0]) >= _GIB else _MIB
    chosen = [_choice_words(row.choice, row.found.report) for row in rows]
    common = {
        head: word
        for head, word in chosen[0].items()
        if len(rows) > 1 and all(words[head] == word for words in chosen)
    }
    uses_hosts = any(row.host for row in rows)
    cells = [words | row.words(first, unit) for words, row in zip(chosen, rows, strict=True)]
    heads = [head for head in cells[0] if head not in common]
    if not uses_hosts:
        heads.remove(_HOST_MEMORY)
    if not first.knows_peak:
        heads.remove("MFU")
    columns = {"": [str(place) for place in range(1, len(rows) + 1)]}
    columns |= {head: [words[head] for words in cells] for head in heads}
    lines = [f"in all rows: {_said(common)}", ""] if common else []
    lines += _rows_in_lines(columns)
    if uses_hosts:
        lines += [
            f"* depends on links to hosts and on their memory, which presets assume: now "
            f"{link_of(config) / 1e9:.3g} GB/s per GPU, {_known_words(config)}"
        ]
    if any(isinstance(row.found, Estimate) and not row.found.is_planned for row in rows):
        lines += ["~ estimated from short steps, not planned whole"]
    seconds = [rounded(row.found.seconds) for row in rows]
    if seconds != sorted(seconds):
        lines += [
            f"the order counts steps with offloaded activations as {MARGIN_OF_OFFLOADING:.1%} "
            "longer, since links and memory of hosts are assumed"
        ]
    return lines


def _rows_in_lines(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the table in lines; where it is too wide, the words of a row stand below its figures.

    columns: the cells by their heads.
    """
    lines, width = table_lines(columns, _WORDS), text_width()
    if max(map(len, lines)) <= width:
        return lines
    head, rule, *rows = table_lines({n: cells for n, cells in columns.items() if n not in _WORDS})
    indent, lines = " " * (len(columns[""][-1]) + 2), [head, rule]
    for place, row in enumerate(rows):
        words = _said({name: columns[name][place] for name in columns if name in _WORDS})
        lines += [
            row,
            *textwrap.wrap(words, width, initial_indent=indent, subsequent_indent=indent),
        ]
    return lines


def _said(words: Mapping[str, str]) -> str:
    """Return cells by their heads in a line: `dp=2 x pp=8 x tp=1; interleaved x 5; vocab none`."""
    said = {head: f"{head} {word}" for head, word in words.items()}
    if _DEGREES in words:
        names, degrees = _DEGREES.split(" x "), words[_DEGREES].split(" x ")
        said[_DEGREES] = " x ".join(map("=".join, zip(names, degrees, strict=True)))
    if _SCHEDULE in words:
        said[_SCHEDULE] = words[_SCHEDULE]
    return "; ".join(said.values())


def _choice_words(choice: Choice, report: PlanReport | None) -> dict[str, str]:
    """Return what a row of the table says of a choice and its plan, by column."""
    degrees = choice.degrees
    return {
        _DEGREES: f"{degrees.dp} x {degrees.pp} x {degrees.tp}",
        "microbatches": f"{choice.num_microbatches:,} x {choice.micro_batch_size}",
        _SCHEDULE: _schedule_words(choice, report),
        "vocab": _vocab_words(choice),
        "recompute": _recompute_words(choice),
        "sp": "yes" if choice.sequence_parallel else "no",
        "optim": _optimizer_words(choice),
    }


def _schedule_words(choice: Choice, report: PlanReport | None) -> str:
    """Return the schedule with its chunks: `interleaved x 5`.

    Of schedule=auto these are the base schedule and the placement of stages that it has found,
    which may be others than those of the choice: `auto from zb_v, V-shaped`.
    """
    name, chunks = choice.schedule_name, choice.num_chunks
    layout = GENERATORS[choice.schedule].layout
    if choice.cap_gib is not None and report is not None:
        name = report.schedule  # `auto from` a base schedule
        layout = GENERATORS[name.split()[-1]].layout
    if layout == "loop" and chunks is not None:
        return f"{name} x {chunks}"
    return f"{name}, V-shaped" if choice.cap_gib is not None and layout == "v" else name


def _report_words(report: PlanReport, unit: float) -> dict[str, str]:
    """Return what a row of the table says of a plan, by column; bytes are in `unit`."""
    return {
        "step": duration(report.step_seconds),
        "MFU": f"{report.mfu:.1%}",
        "bubble": f"{report.bubble:.1%}",
        _MEMORY[unit]: f"{report.ranks[report.worst].memory.total / unit:,.1f}",
        _HOST_MEMORY: _host_words(report.host.total, unit),
    }


def _host_words(num_bytes: float, unit: float, about: str = "") -> str:
    """Return the memory of a node's host that a row needs, marked as what presets assume."""
    return f"{about}{num_bytes / unit:,.0f} *" if num_bytes else "0  "


def _vocab_words(choice: Choice) -> str:
    """Return the algorithm, and how rows or layers are placed unless that is evenly."""
    rows = ", uneven rows" * (choice.balance and choice.splits_vocabulary)
    return choice.vocab + rows + PLACED[choice.placement]


def _recompute_words(choice: Choice) -> str:
    words = recompute_words(choice.recompute_of_stages)
    return f"{words}, offload {choice.offload:.0%}" if choice.offload else words


def _optimizer_words(choice: Choice) -> str:
    optim = choice.optimizer
    assert optim is not None, "a plan has an optimizer"
    return "on hosts" if optim.offload else optim.name


def _excluded_lines(result: SearchResult) -> list[str]:
    """Return lines with the constraints that rule out most choices, and what is too long."""
    reasons = [one for one in result.excluded.most_common() if one[0] != TOO_LONG]
    lines = [
        f"{'then' if place else 'ruled out most'}: {words}: {_choices(count)} "
        f"({count / result.num_choices:.0%})"
        for place, (words, count) in enumerate(reasons[: 1 + _SHOWN_REFUSALS])
    ]
    if too_long := result.excluded[TOO_LONG]:
        lines.append(
            f"cannot be planned, although some may be faster: {_choices(too_long)} with {TOO_LONG}"
        )
    return lines


def _miss_lines(config: RunConfig, limits: Limits, result: SearchResult) -> list[str]:
    """Return how far the smallest choice is from fitting."""
    leanest = result.leanest
    if leanest is None:
        return ["", "nothing can be run: change what rules out the choices above"]
    what = "NOTHING TRIED SO FAR FITS" if result.num_open else "NOTHING FITS"
    lines = ["", f"{what}.  Closest: {leanest.choice.overrides(config)}"]
    known = with_margin(config.cluster, limits.margin).host_memory_gib
    if leanest.host_needs is None or known is None:
        return [*lines, f"  {leanest.reason}"]
    needs = leanest.host_needs / _GIB
    return [
        *lines,
        f"  may fit on the GPUs, but needs {needs:,.2f} GiB of host memory per node, "
        f"{needs - known:,.2f} GiB more than the {known:,.6g} GiB that a plan may use",
    ]
