"""What `vp-plan --search` prints of the plans it has found."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from schedules.render import duration
from vp_train.commands.command import MOST_NUMBER, text_width
from vp_train.commands.plan_remedies import FACTORS
from vp_train.commands.plan_words import (
    PLACED,
    compared_words,
    exposed_words,
    fsdp_words,
    has_fsdp,
    table_lines,
)
from vp_train.config import ConfigError, RunConfig
from vp_train.config.parallel import recompute_words
from vp_train.planning.choice import Choice, unsearched
from vp_train.planning.cluster import limit_of, with_margin
from vp_train.planning.compare import Way, contention_words, fsdp_way, pipeline_way, rivals_of
from vp_train.planning.found import (
    MARGIN_OF_OFFLOADING,
    Estimate,
    Found,
    Limits,
    SearchResult,
    counted,
    memory_of,
    order_of,
    rounded,
)
from vp_train.planning.kept import Kept
from vp_train.planning.report import PlanReport
from vp_train.planning.rivals import Rivals
from vp_train.planning.search import fits_on
from vp_train.planning.slow_link import SlowLink, link_of
from vp_train.planning.space import TOO_LONG
from vp_train.units import compared, count_words, human_bytes, is_faster, large_bytes

_SHOWN_REFUSALS = 3
_HALVINGS = 3  # of the numbers of nodes that are tried where nothing fits
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
    typed: PlanReport | None = None,
    *,
    is_stopped: bool = False,
) -> list[str]:
    """Return the best plans in lines, and why others are not among them.

    typed: the run as it was typed, if it fits and no search makes it.
    """
    lines = _unfinished_lines(limits, result, is_stopped=is_stopped)
    if result.best:
        first, rows = result.best[0], _rows(result)
        lines += [*_table_lines(config, result, rows), "", *_override_lines(config, first, rows)]
        lines += _typed_lines(config, typed, first.report)
        lines += _order_lines(config, result)
        lines += [f"exposed: {words}" for words in [exposed_words(first.report)] if words]
        lines += [f"binds: {first.report.binds}"]
        lines += _host_memory_lines(first, rows, limits)
        lines += _slow_link_lines(config, limits, result, rows)
        lines += _vocabulary_lines(config, result, rows)
        lines += _other_lines(config, result, rows)
        rivals = rivals_of(config, first.report, limits.margin, result.kept)
        if has_fsdp(config):
            lines += [f"fsdp: {fsdp_words(config, rivals)}"]
        lines += _contention_lines(config, limits, result, rivals)
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
        lines += _misses(config, limits, result) + _typed_lines(config, typed)
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
    """Return the rows of the table.  What is as fast stands by its memory, plans first.

    Where all of them offload activations, the best that does not is added.
    """
    rows = [*map(_Row, result.best), *map(_Row, result.estimated)]
    other = result.without_offloading
    if other is not None and all(row.choice.offload for row in rows):
        rows.append(_Row(other))
    return sorted(rows, key=lambda row: order_of(row.choice, row.found.seconds))


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


def _unfinished_lines(limits: Limits, result: SearchResult, *, is_stopped: bool) -> list[str]:
    """Return what ended a search before all that might be faster was looked at, and a blank line.

    They come first, so that nobody takes a plan for the best there is, nor an estimate for a plan.
    """
    if not result.num_open:
        return []
    now = limits.effort // 1000  # thousand passes, as --effort takes them
    more = f"--effort to {min(2 * now, MOST_NUMBER)} (now {now})"
    more_time = f"--seconds to {min(2 * limits.seconds, MOST_NUMBER)} (now {limits.seconds})"
    why, way_out = {
        "effort": (
            "THE EFFORT IS SPENT",
            f"; raise {more}, and {more_time}",
        ),
        "time": ("OUT OF TIME", f"; raise {more_time}"),
    }[result.ended]
    if is_stopped:
        why, way_out = "STOPPED", ""
    left = f"{_choices(result.num_open)} left that might be faster"
    if result.estimated:
        best = len(result.best) + len(result.estimated)
        left += f", and {len(result.estimated)} of the best {best} not planned whole"
    return [f"{why} with {left}{way_out}", ""]


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


def _contention_lines(
    config: RunConfig, limits: Limits, result: SearchResult, rivals: Rivals
) -> list[str]:
    """Return a line if the contention decides which of the compared plans is the fastest."""
    first = result.best[0]
    splits = first.choice.splits_vocabulary
    other = result.without_vocabulary if splits else result.with_vocabulary
    rival = None
    if has_fsdp(config):
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
    words = contention_words(config, fastest, (best, rival))
    return [f"decides: {words}"] if words else []


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


def _slow_link_lines(
    config: RunConfig, limits: Limits, result: SearchResult, rows: Sequence[_Row]
) -> list[str]:
    """Return a line with the slowest link to the host with which the first plan fits.

    Where it does not fit with half of the link, the fastest that does is named, if there is any:
    a plan, or an estimate that moves nothing.
    """
    first, now = result.best[0], link_of(config)
    if not first.choice.offload:
        return []
    limit, link = limit_of(config.cluster, limits.margin), SlowLink(config, first.choice)
    least = link.least(limit)
    slowest = f"down to about {least / 1e9:.2g} of the {now / 1e9:.3g} GB/s per GPU"
    if least == now:
        slowest = f"with no less than the {now / 1e9:.3g} GB/s per GPU"
    then = compared(first.report.step_seconds + link.later(least), first.report.step_seconds)
    line = f"link: the first fits {slowest} by short steps, and is {then} then"
    half = now / 2
    if least <= half:
        return [line]
    rest = ((f"row {n}", row.found) for n, row in enumerate(rows, 1))
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
    fitting = list[tuple[float, str]]()
    for choice, (words, seconds) in named.items():
        link = SlowLink(config, choice)
        if not choice.offload or link.needs(half) <= limit:
            fitting.append((seconds + link.later(half), words))
    of_half = f"with half of them, {half / 1e9:.3g},"
    if not fitting:
        return [f"{line}; {of_half} nothing named here fits"]
    return [f"{line}; {of_half} the fastest named here that fits is {min(fitting)[1]}"]


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
    chosen = [_choice_words(row.choice) for row in rows]
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


def _choice_words(choice: Choice) -> dict[str, str]:
    """Return what a row of the table says of a choice, by column."""
    degrees, chunks = choice.degrees, choice.num_chunks
    return {
        _DEGREES: f"{degrees.dp} x {degrees.pp} x {degrees.tp}",
        "microbatches": f"{choice.num_microbatches:,} x {choice.micro_batch_size}",
        _SCHEDULE: choice.schedule_name + ("" if chunks is None else f" x {chunks}"),
        "vocab": _vocab_words(choice),
        "recompute": _recompute_words(choice),
        "sp": "yes" if choice.sequence_parallel else "no",
        "optim": _optimizer_words(choice),
    }


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


def _misses(config: RunConfig, limits: Limits, result: SearchResult) -> list[str]:
    """Return how far the smallest choice is from fitting, and what would help it."""
    leanest = result.leanest
    if leanest is None:
        return ["", "nothing can be run: change what rules out the choices above"]
    what = "NOTHING TRIED SO FAR FITS" if result.num_open else "NOTHING FITS"
    lines = ["", f"{what}.  Closest: {leanest.choice.overrides(config)}"]
    known = with_margin(config.cluster, limits.margin).host_memory_gib
    if leanest.host_needs is not None and known is not None:
        needs = leanest.host_needs / _GIB
        lines += [
            f"  may fit on the GPUs, but needs {needs:,.2f} GiB of host memory per node, "
            f"{needs - known:,.2f} GiB more than the {known:,.6g} GiB that a plan may use",
            f"would help: more than {_gib(needs / (1 - limits.margin))} GiB of host memory per "
            "node (cluster.host_memory_gib)",
        ]
    else:
        enough = (leanest.needs or 0.0) / (1 - limits.margin) / _GIB
        lines += [
            f"  {leanest.reason}",
            f"would help: GPUs with more than {_gib(enough)} GiB (cluster.memory_gib), which state "
            "and the leanest activations take",
        ]
    if result.kept.values:
        free = fits_on(config, limits.margin)
        if free is not None:
            lines.append(f"would help: to keep less with --keep; then {_may_fit(free, config)}")
    more = _more_nodes(config, limits, result.kept)
    if more is None:
        words = "a smaller model.seq_length; more nodes do not suffice"
    else:
        words = f"cluster.num_nodes={more[0]}, where {_may_fit(more[1], config)}"
    return [*lines, f"would help: {words}"]


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
