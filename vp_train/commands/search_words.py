"""What `vp-plan --search` prints of the plans it has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.table import Table

from schedules.render import duration
from vp_train.commands.plan_words import compared_words, fsdp_words, has_fsdp, rendered
from vp_train.config import RunConfig
from vp_train.planning.choice import TOO_LONG, Choice
from vp_train.planning.compare import Way, contention_words, fsdp_way, pipeline_way, rivals_of
from vp_train.planning.found import (
    MARGIN_OF_OFFLOADING,
    Estimate,
    Found,
    Limits,
    Result,
    counted,
    rounded,
)
from vp_train.planning.fsdp import Rivals
from vp_train.planning.report import PlanReport, make_report
from vp_train.planning.search import fits_on
from vp_train.units import plural

_SHOWN_REFUSALS = 3
_GIB = 2**30
# Of the table of a search: the columns with words, and that of GiB per node.
_WORDS = ("schedule x chunks", "vocab", "recompute", "optim")
_HOST_MEMORY = "host RAM"


def search_lines(
    config: RunConfig, limits: Limits, result: Result, *, is_stopped: bool = False
) -> list[str]:
    """Return the best plans in lines, and why others are not among them."""
    lines = _unfinished_lines(result, is_stopped=is_stopped)
    if result.best:
        first = result.best[0]
        lines += [*_best_lines(result), ""]
        is_first = all(rounded(e.counted) >= rounded(first.counted) for e in result.estimated)
        head = "the first" if is_first else "the first that is planned whole"
        lines += [f"{head}: {first.choice.overrides(config)}", f"binds: {first.report.binds}"]
        lines += _host_memory_lines(result.best)
        lines += _slow_link_lines(config, first)
        lines += _vocabulary_lines(config, result)
        lines += _other_lines(config, result)
        rivals = rivals_of(config, first.report, limits.margin)
        if has_fsdp(config):
            lines += [f"fsdp: {fsdp_words(config, first.report, rivals)}"]
        lines += _contention_lines(config, limits, result, rivals)
        lines += [""]
    excluded = sum(result.excluded.values())
    summary = (
        f"{_choices(result.num_choices)}, {excluded:,} ruled out, "
        f"{result.num_estimated:,} simulated, {result.num_planned} planned"
    )
    is_whole = result.best and not result.num_open
    lines.append(f"{summary}; none of the others seems faster" if is_whole else summary)
    lines += _excluded_lines(result)
    if not result.best:
        lines += _misses(config, limits, result)
    return lines


def _unfinished_lines(result: Result, *, is_stopped: bool) -> list[str]:
    """Return what ended a search before all that might be faster was looked at, and a blank line.

    They come first, so that nobody takes a plan for the best there is, nor an estimate for a plan.
    """
    if not result.num_open:
        return []
    why, way_out = {
        "effort": ("THE EFFORT IS SPENT", "; raise --effort, and --seconds"),
        "time": ("OUT OF TIME", "; raise --seconds"),
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
    return f"{count:,} {plural(count, 'choice')}"


def _vocabulary_lines(config: RunConfig, result: Result) -> list[str]:
    """Return a line with the best plan of the other kind than the first, if both were searched."""
    first, kept = result.best[0], result.kept.values
    if "vocab.algorithm" in kept or kept.get("parallel.pp") == 1:
        return []
    splits = first.choice.splits_vocabulary
    other = result.without_vocabulary if splits else result.with_vocabulary
    where = "with what is kept" if kept else "on any split"
    kind = f"{'without' if splits else 'with'} vocabulary parallelism, {where}"
    kind = f"the best {'found ' if result.num_open and other is not None else ''}{kind}"
    if other is None:
        left = result.num_unseen[not splits]
        found = f"not searched to the end, {_choices(left)} left" if left else "nothing fits"
        return [f"{kind}: {found}"]
    return [f"{kind}: {_other_words(config, first, other)}"]


def _contention_lines(
    config: RunConfig, limits: Limits, result: Result, rivals: Rivals
) -> list[str]:
    """Return a line if the contention decides which of the compared plans is the fastest."""
    first = result.best[0]
    splits = first.choice.splits_vocabulary
    other = result.without_vocabulary if splits else result.with_vocabulary
    rival = None
    if has_fsdp(config):
        rival = fsdp_way(config, first.report, rivals, limits.margin)

    def way(words: str, choice: Choice, seconds: float) -> Way:
        return pipeline_way(words, choice.applied(config), seconds, counted(choice, 1.0))

    best = None
    if other is not None:
        kind = "without" if splits else "with"
        words = f"the best {kind} vocabulary parallelism"
        best = way(words, other.choice, other.seconds)
    fastest = way("the first", first.choice, first.report.step_seconds)
    words = contention_words(config, fastest, (best, rival))
    return [f"decides: {words}"] if words else []


def _other_lines(config: RunConfig, result: Result) -> list[str]:
    """Return lines with what is worth a look beside the first plan: leaner, and simpler to run."""
    first, others = result.best[0], dict[str, Estimate | None]()
    others["about as fast with less memory"] = result.leaner
    if first.choice.offload:
        much = f"{MARGIN_OF_OFFLOADING:.1%}"
        head = f"the best found without offloaded activations, first if it is at most {much} slower"
        others[head] = result.without_offloading
    return [
        f"{head}: {_other_words(config, first, other)}"
        for head, other in others.items()
        if other is not None
    ]


def _other_words(config: RunConfig, first: Found, other: Estimate) -> str:
    """Return time and memory of another choice than the first plan, and its overrides."""
    words = compared_words(other, first.report.step_seconds)
    optimizer = other.choice.optimizer
    uses_hosts = other.choice.offload > 0 or (optimizer is not None and optimizer.offload)
    if uses_hosts and config.cluster.host_memory_gib is None:
        words += ", with host memory that is not checked"
    return f"{words}: {other.choice.overrides(config)}"


def _host_memory_lines(best: Sequence[Found]) -> list[str]:
    """Return a line with the host memory of plans, and what it was checked with."""
    first, most = best[0].report.host.total, max(found.report.host.total for found in best)
    known = best[0].report.cluster.host_memory_gib
    if not most:
        return []
    need = f"the first needs {first / _GIB:,.0f} GiB per node" if first else "the first needs none"
    if most > first:
        need += f", others up to {most / _GIB:,.0f} GiB{'' if first else ' per node'}"
    if known is None:
        line = f"host RAM is not checked: {need}; set cluster.host_memory_gib to what there is"
    else:
        line = f"host RAM: {need}, of the {known:g} GiB that cluster.host_memory_gib says there are"
    if any(found.report.host.activations for found in best):
        line += "; no training on GPUs has offloaded activations yet"
    return [line]


def _slow_link_lines(config: RunConfig, first: Found) -> list[str]:
    """Return a line with what the first plan takes if the link to the host has half of its speed.

    Nothing goes late, so a slower link does not take longer: it carries less.
    """
    link = config.cluster.host_bytes_per_second / 2
    if not first.choice.offload:
        return []
    chosen = first.choice.applied(config)
    slower = replace(chosen, cluster=replace(chosen.cluster, host_bytes_per_second=link))
    found = make_report(slower)
    fits = "" if found.fits else ", which does not fit"
    return [
        f"link: with half of cluster.host_bytes_per_second, {link / 1e9:.3g} GB/s, the first takes "
        f"{duration(found.step_seconds)} and {found.ranks[found.worst].memory.total / _GIB:.1f} GiB"
        f"{fits}"
    ]


def _best_lines(result: Result) -> list[str]:
    """Return a table of the best in lines, those that are only estimated with `~`.

    What all have in common stands above it.
    """
    first = result.best[0].report
    timed = [
        (found.counted, _choice_words(found.choice) | _report_words(found.report))
        for found in result.best
    ]
    for estimate in result.estimated:
        mfu = first.mfu * first.step_seconds / estimate.seconds
        words = {
            "step": f"~{duration(estimate.seconds)}",
            "MFU": f"~{mfu:.1%}",
            "GiB": f"~{estimate.memory / _GIB:.1f}",
        }
        timed.append((estimate.counted, _choice_words(estimate.choice) | words))
    # Plans of about the same time keep their order, of less memory first.
    rows = [row for _, row in sorted(timed, key=lambda one: rounded(one[0]))]
    common = {
        head: word
        for head, word in _choice_words(result.best[0].choice).items()
        if len(rows) > 1 and all(row[head] == word for row in rows)
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    heads = [head for head in timed[0][1] if head not in common]  # those of a plan
    if not any(found.report.host.total for found in result.best):
        heads.remove(_HOST_MEMORY)
    table.add_column("", justify="right")
    for head in heads:
        table.add_column(head, justify="left" if head in _WORDS else "right", no_wrap=True)
    for place, row in enumerate(rows, 1):
        table.add_row(str(place), *(row.get(head, "") for head in heads))
    lines = [f"in all rows: {', '.join(map(' '.join, common.items()))}", ""] if common else []
    lines += rendered(table)
    if result.estimated:
        lines += ["~ estimated from short steps, not planned whole"]
    return lines


def _choice_words(choice: Choice) -> dict[str, str]:
    """Return what a row of the table says of a choice, by column."""
    degrees, chunks = choice.degrees, choice.num_chunks
    return {
        "dp": str(degrees.dp),
        "pp": str(degrees.pp),
        "tp": str(degrees.tp),
        "microbatches": f"{choice.num_microbatches} x {choice.micro_batch_size}",
        "schedule x chunks": choice.schedule + ("" if chunks is None else f" x {chunks}"),
        "vocab": "redistribute" if choice.placement == "redistribute" else _vocab_words(choice),
        "recompute": _recompute_words(choice),
        "sp": "yes" if choice.sequence_parallel else "no",
        "optim": _optimizer_words(choice),
    }


def _report_words(report: PlanReport) -> dict[str, str]:
    """Return what a row of the table says of a plan, by column."""
    return {
        "step": duration(report.step_seconds),
        "MFU": f"{report.mfu:.1%}",
        "bubble": f"{report.bubble:.1%}",
        "GiB": f"{report.ranks[report.worst].memory.total / _GIB:.1f}",
        _HOST_MEMORY: f"{report.host.total / _GIB:,.0f}",
    }


def _vocab_words(choice: Choice) -> str:
    return choice.vocab + ", uneven rows" * (choice.balance and choice.splits_vocabulary)


def _recompute_words(choice: Choice) -> str:
    if choice.offload:
        kept = "" if choice.recompute == "none" else f"{choice.recompute}, "
        return f"{kept}offload {choice.offload:.0%}"
    if choice.recompute_per_stage is None:
        return choice.recompute
    kinds = choice.recompute_per_stage
    return f"{choice.recompute} in {len(kinds) - kinds.count('none')}/{len(kinds)}"


def _optimizer_words(choice: Choice) -> str:
    optim = choice.optimizer
    assert optim is not None, "a plan has an optimizer"
    return "offload" if optim.offload else optim.name


def _excluded_lines(result: Result) -> list[str]:
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


def _misses(config: RunConfig, limits: Limits, result: Result) -> list[str]:
    """Return how far the smallest choice is from fitting, and what would help it."""
    leanest = result.leanest
    if leanest is None:
        return ["", "nothing can be run: change what rules out the choices above"]
    what = "NOTHING TRIED SO FAR FITS" if result.num_open else "NOTHING FITS"
    lines = ["", f"{what}.  Closest: {leanest.choice.overrides(config)}"]
    known = config.cluster.host_memory_gib
    if leanest.host_needs is not None and known is not None:
        needs = leanest.host_needs / _GIB
        lines += [
            f"  may fit on the GPUs, but needs {needs:.2f} GiB of host memory per node, "
            f"{needs - known:.2f} GiB more than {known:g} GiB",
            f"would help: more than {needs:.4g} GiB of host memory per node "
            "(cluster.host_memory_gib)",
        ]
    else:
        enough = (leanest.needs or 0.0) / (1 - limits.margin) / _GIB
        lines += [
            f"  {leanest.reason}",
            f"would help: GPUs with more than {enough:.4g} GiB (cluster.memory_gib), which state "
            "and the leanest activations take",
        ]
    if result.kept.values:
        free = fits_on(config, limits.margin)
        if free is not None:
            lines.append(f"would help: to keep less with --keep; then {_may_fit(free, config)}")
    for factor in (2, 4, 8, 16, 32, 64):
        cluster = replace(config.cluster, num_nodes=factor * config.cluster.num_nodes)
        found = fits_on(replace(config, cluster=cluster), limits.margin, result.kept)
        if found is not None:
            where = _may_fit(found, config)
            return [*lines, f"would help: cluster.num_nodes={cluster.num_nodes}, where {where}"]
    return [*lines, "would help: a smaller model.seq_length; 64 times as many nodes do not suffice"]


def _may_fit(choice: Choice, config: RunConfig) -> str:
    """Return that a choice may fit in words, with its optimizer where that is not the typed one."""
    optim = choice.optimizer or config.optim
    words = [f"optim.name={optim.name}"] * (optim.name != config.optim.name)
    if optim.offload != config.optim.offload:
        words.append(f"optim.offload={str(optim.offload).lower()}")
    return f"{choice.degrees}{' with ' * bool(words)}{' '.join(words)} may fit"
