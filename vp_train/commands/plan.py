"""The command `vp-plan`: a plan or a search, on the terminal and as JSON.  Runs without torch."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from schedules.generators import GENERATORS
from schedules.render import duration
from vp_train.commands.command import (
    Command,
    collect_rarely,
    output_of,
    run,
    typed,
    whole_number,
)
from vp_train.commands.searching import Searching
from vp_train.config import RECOMPUTE, ConfigError, RunConfig
from vp_train.durable import write_output
from vp_train.failures import EXIT_CONFIG, EXIT_TIME
from vp_train.model import shape
from vp_train.planning.choice import (
    ALL,
    KEPT_WHERE_TYPED,
    TOO_LONG,
    Choice,
    Kept,
    batch_of,
    searched_words,
    settings_of,
    space_of,
    with_batch_of,
    with_replicas,
)
from vp_train.planning.compare import (
    Help,
    Way,
    contention_words,
    fsdp_way,
    helps_of,
    larger_batch_of,
    pipeline_way,
    rivals_of,
)
from vp_train.planning.degrees import split_ranks
from vp_train.planning.fsdp import Rivals
from vp_train.planning.placement import (
    nothing_offloaded_words,
    offloaded_layers,
    split_layers,
)
from vp_train.planning.plan import SEARCHING, in_its_memory_words
from vp_train.planning.report import Offloading, PlanReport, make_report
from vp_train.planning.search import (
    MARGIN_OF_OFFLOADING,
    Estimate,
    Found,
    Limits,
    Result,
    counted,
    fits_on,
    rounded,
    search,
    without_vocabulary,
)
from vp_train.planning.weigh import about_bytes
from vp_train.units import compared, human_bytes, plural

_SHOWN_RANKS = 16
_SHOWN_REFUSALS = 3
_GIB = 2**30
_LARGE_GAP = 0.1  # above the lower bound
_WIDTH = 120  # columns of the lines of a plan that are wrapped
_MOST_TOKENS = 10**9
# Of the table of a search: the columns with words, and that of GiB per node.
_WORDS = ("schedule x chunks", "vocab", "recompute", "optim")
_HOST_MEMORY = "host RAM"
_DIVIDE_THE_BATCH = ("parallel.dp", "micro_batch_size")
_NOT_ALONE = ", which is not enough alone"


_EXAMPLES = """\
  vp-plan model=gpt_4b cluster=a100_80g_node num_microbatches=128
  vp-plan model=llama3_8b cluster=h100_80g_node cluster.num_nodes=4 \\
      parallel.tp=2 parallel.pp=4 num_microbatches=32
  vp-plan --search --top 10 model=gpt_21b cluster=a100_80g_node cluster.num_nodes=2 \\
      num_microbatches=256"""


def main() -> None:
    """Run `vp-plan`: predict bytes, seconds and MFU of a run on a cluster."""
    collect_rarely()
    options = {
        "--search": ("", "rank every way to run the batch on the cluster, fastest first"),
        "--top": ("K", "with --search: number of plans to show (5)"),
        "--tokens": ("N", "with --search: tokens of a step, as 4e6, instead of num_microbatches"),
        "--keep": (
            "A,B,...",
            "with --search: settings that stay as typed, or `typed` for all of them",
        ),
        "--margin": ("PERCENT", "with --search: part of the memory that stays free (5)"),
        "--effort": ("N", "with --search: thousand passes that may be placed (8000)"),
        "--seconds": (
            "N",
            "with --search: limit of its CPU time; one simulation may still end after it (180)",
        ),
        "--json": ("FILE", "write the report there"),
    }
    run(
        Command(
            "vp-plan",
            "predicts memory, time and MFU of a run on a cluster",
            _plan,
            _EXAMPLES,
            options,
        )
    )


def _keeps_typed(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> bool:
    """Return whether `--keep typed` would be new, and allowed."""
    with suppress(ConfigError):
        return "--keep" not in options and bool(kept_of(config, overrides, "typed").values)
    return False


def _plan(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    if "--search" not in options:
        for name in ("--top", "--tokens", "--keep", "--margin", "--effort", "--seconds"):
            if name in options:
                raise ConfigError(f"{name} belongs to --search; add that, or drop {name}")
        return show_plan(config, _json_file(options))
    kept = kept_of(config, overrides, options.get("--keep"))
    counts, tokens, multiple = typed(overrides, "num_microbatches"), None, ""
    if "--tokens" in options:
        if counts:
            raise ConfigError(f"--tokens and {counts[0]}: both set the batch; drop one of the two")
        tokens = whole_number(options, "--tokens", 4_194_304, most=_MOST_TOKENS, example="4e6")
        parts = {name: kept.values[name] for name in _DIVIDE_THE_BATCH if name in kept.values}
        multiple = " x ".join(f"{name}={value}" for name, value in parts.items() if value > 1)
        config = with_batch_of(config, tokens, math.prod(parts.values()))
    config = with_replicas(config)
    limits = Limits(
        top=whole_number(options, "--top", 5),
        margin=whole_number(options, "--margin", 5, least=0, most=90) / 100,
        effort=1000 * whole_number(options, "--effort", 8000),
    )
    seconds = whole_number(options, "--seconds", 180)
    path = _json_file(options)
    if "--keep" in options or kept.values:
        print(f"kept: {kept.words or 'nothing, because no setting is typed'}", flush=True)
    searched = [word for word in searched_words(overrides) if not kept.has_word(word)]
    if searched:
        hint = "; --keep typed keeps them" if _keeps_typed(config, overrides, options) else ""
        print(f"searched although typed: {', '.join(searched)}{hint}", flush=True)
    is_default = not counts and tokens is None
    print(_batch_words(config, tokens, multiple, is_default=is_default), flush=True)
    return show_search(config, limits, seconds, path, kept)


def _batch_words(config: RunConfig, tokens: int | None, multiple: str, *, is_default: bool) -> str:
    """Return the batch of a search in words, and where it comes from.

    tokens: --tokens.
    multiple: the settings of which it is a multiple, because they are kept.
    """
    count, length = batch_of(config), config.model.seq_length
    words = f"batch: {count:,} {plural(count, 'sequence')} of {length:,} tokens"
    words += f", {count * length:,} tokens in a step"
    if is_default:
        return f"{words}, by default; --tokens N sets another"
    if tokens is None or tokens == count * length:
        return words
    of_what = f" to a multiple of {multiple}" if multiple else ""
    return f"{words}, rounded from --tokens {tokens:,}{of_what}"


def _json_file(options: Mapping[str, str]) -> Path | None:
    """Return the file for the report, if there is one.  Raises ConfigError before any work."""
    return output_of("--json", options["--json"]) if "--json" in options else None


def kept_of(config: RunConfig, overrides: Sequence[str], names: str | None) -> Kept:
    """Return what `--keep NAMES` keeps; `typed` are all that are typed and searched.

    A typed vocab.balance is kept in any case.
    """
    chosen = [] if names is None else [name.strip() for name in names.split(",")]
    if typed(overrides, KEPT_WHERE_TYPED):
        chosen.append(KEPT_WHERE_TYPED)
    if "typed" in chosen:
        chosen = [name for name in chosen if name != "typed"]
        chosen += [name for word in searched_words(overrides) for name in settings_of(word)]
    return Kept.of(config, chosen)


def show_plan(config: RunConfig, path: Path | None) -> int:
    """Plan `config`, print the report and write it to `path`.  Raises ConfigError.

    Returns the exit code: EXIT_CONFIG if the run does not fit into memory.
    """
    if config.schedule.is_solved:
        print(SEARCHING, flush=True)
    with Searching(keeps_best=config.schedule.is_solved) as searching:
        searching.work_on("planning the step")
        report = make_report(config, searching.watch)
    with Searching(keeps_best=False) as comparing:
        rivals = rivals_of(config, report)
        lines = plan_lines(config, report, comparing.work_on, rivals)
        comparing.work_on("searching the same split without vocabulary parallelism")
        without = without_of(config, report)
        lines += without_lines(report, without)
        lines += _decides_lines(config, report, rivals, without)
        helps = helps_of(config, report, comparing.work_on)
        comparing.work_on("planning a batch twice as large")
        larger = larger_batch_of(config, report) if report.fits else None
        lines += [*help_lines(report, helps, larger), *searching.words]
    print("\n".join(lines), flush=True)
    _write(path, report.record() | _compared_record(config, rivals, helps))
    return searching.exit_code if report.fits else EXIT_CONFIG


def _compared_record(config: RunConfig, rivals: Rivals, helps: Sequence[Help]) -> dict[str, Any]:
    """Return for JSON what a plan was compared with."""
    return {
        "fsdp": rivals.record() if _has_fsdp(config) else None,
        "helps": [
            {
                "overrides": one.overrides,
                "step_seconds": one.seconds,
                "bytes": one.memory,
                "planned": one.is_planned,
            }
            for one in helps
        ],
    }


def _has_fsdp(config: RunConfig) -> bool:
    """Return whether plans are compared with FSDP: on several GPUs."""
    return config.run.device == "cuda" and config.cluster.num_gpus > 1


def show_search(
    config: RunConfig, limits: Limits, seconds: float, path: Path | None, kept: Kept = ALL
) -> int:
    """Search for the fastest plans, print them and write them to `path`.  Raises ConfigError.

    Ctrl-C ends it with the best so far.  Returns the exit code.
    """
    print(f"{_model_words(config)}\n{_cluster_words(config)}\n", flush=True)
    # CPU time, not the clock on the wall: other processes on the machine must not end a search.
    started = time.process_time()
    with Searching() as searching:

        def in_time() -> bool:
            return time.process_time() - started < seconds and not searching.is_stopped

        def show(words: str) -> None:
            searching.work_on(f"{time.process_time() - started:.0f} s of CPU, {words}")

        result = search(config, limits, in_time, show, space_of(config, kept))
    lines = search_lines(config, limits, result, is_stopped=searching.is_stopped)
    print("\n".join(lines), flush=True)
    _write(path, search_record(config, limits, result))
    if searching.is_stopped or result.best:
        return searching.exit_code
    return EXIT_TIME if result.num_open else EXIT_CONFIG


def search_record(config: RunConfig, limits: Limits, result: Result) -> dict[str, Any]:
    """Return the result of a search for JSON, in bytes and seconds."""
    rivals = None
    if result.best and _has_fsdp(config):
        rivals = rivals_of(config, result.best[0].report, limits.margin).record()
    firsts = {
        "with_vocabulary_parallelism": result.with_vocabulary,
        "without_vocabulary_parallelism": result.without_vocabulary,
        "without_offloading": result.without_offloading,
        "leaner": result.leaner,
    }
    return {
        "best": [
            {"overrides": plan.choice.overrides(config)} | plan.report.record()
            for plan in result.best
        ],
        "estimated": [_estimate_record(config, estimate) for estimate in result.estimated],
        **{
            name: None if first is None else _estimate_record(config, first)
            for name, first in firsts.items()
        },
        "refused": [
            {"overrides": refusal.choice.overrides(config), "reason": refusal.reason}
            for refusal in result.refused
        ],
        "fsdp": rivals,
        "margin": limits.margin,
        "kept": dict(result.kept.values),
        "excluded": dict(result.excluded.most_common()),
        "choices": result.num_choices,
        "estimates": result.num_estimated,
        "planned": result.num_planned,
        "open": result.num_open,
        "ended": result.ended,
    }


def _estimate_record(config: RunConfig, estimate: Estimate) -> dict[str, Any]:
    return {
        "overrides": estimate.choice.overrides(config),
        "step_seconds": estimate.seconds,
        "bytes": estimate.memory,
        "planned": estimate.is_planned,
    }


def plan_lines(
    config: RunConfig,
    report: PlanReport,
    progress: Callable[[str], object] = lambda words: None,
    rivals: Rivals | None = None,
) -> list[str]:
    """Return the report of one plan in lines; it fits on a screen for up to 16 ranks.

    `progress` gets lines to show while it looks for what would help.  `rivals` are shown if given.
    """
    parts, step, worst = report.parts, report.step_seconds, report.ranks[report.worst].memory
    shares = ", ".join(
        f"{name} {seconds / step:.1%}"
        for name, seconds in parts.items()
        if seconds >= 0.0005 * step
    )
    fits = report.excess <= 0
    room = f"{human_bytes(abs(report.excess))} {'to spare' if fits else 'TOO MUCH'}"
    lines = [
        f"{report.schedule} with {report.vocab}, {report.degrees}, "
        f"recomputation {report.recompute}, optimizer {config.optim.name}",
        _model_words(config),
        _cluster_words(config),
        "",
        *_rank_table(report),
        "",
        f"memory    {human_bytes(worst.total)} of {config.cluster.memory_gib:g} GiB "
        f"on rank {report.worst}, {room}",
        f"step      {duration(step)}: {report.num_tokens / step:,.0f} tokens/s, "
        f"MFU {report.mfu:.1%} of {_amount(report.flops)}FLOP",
        f"          rank {report.busiest}: {shares}",
        f"schedule  mean bubble {report.bubble:.1%}, {report.gap:.1%} above the lower bound"
        f"{in_its_memory_words(report.gap, report.gap_in_its_memory)}, {report.bound_reason}",
        f"exposed   communication, {report.exposed_words}",
        f"binds     {report.binds}",
    ]
    lines[-2:-2] = _host_lines(report)
    if report.launch_words:
        lines.insert(-1, f"launch    {report.launch_words}")
    if rivals is not None and _has_fsdp(config):
        lines[-1:-1] = _wrapped("fsdp", _fsdp_words(config, report, rivals))
    if report.gap > _LARGE_GAP:
        held = report.gap_in_its_memory
        cause = "" if held is None or held > report.gap / 2 else " because it keeps so little"
        lines.append(
            f"          on {report.degrees.pp} ranks {report.schedule} is far above it{cause}; try "
            "other schedules, or vp-plan --search"
        )
    if report.advice:
        lines.append(f"advice    {report.advice}")
    if not report.fits:
        progress("planning what would help")
        helps = remedies(config, report) if report.excess > 0 else []
        helps += host_remedies(config, report, progress) if report.host_excess > 0 else []
        lines += ["", *(f"would help: {words}" for words in helps)]
    return lines


def _wrapped(label: str, words: str) -> list[str]:
    """Return words behind a label in lines of the report of a plan."""
    return textwrap.wrap(
        words,
        _WIDTH,
        initial_indent=f"{label:10}",
        subsequent_indent=10 * " ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def without_of(config: RunConfig, report: PlanReport) -> Result | None:
    """Return the plans of this split that do not split the vocabulary; None without a pipeline."""
    return None if report.degrees.pp == 1 else without_vocabulary(config, report.degrees)


def _decides_lines(
    config: RunConfig, report: PlanReport, rivals: Rivals, without: Result | None
) -> list[str]:
    """Return what says that the contention decides whether this plan is faster than others."""
    best = None if without is None else without.without_vocabulary
    other = None
    if best is not None and report.vocab != "none":
        words = "the best of this split without vocabulary parallelism"
        other = pipeline_way(words, best.choice.applied(config), best.seconds)
    rival = fsdp_way(config, report, rivals, 0.0) if _has_fsdp(config) else None
    first = pipeline_way("this plan", config, report.step_seconds)
    words = contention_words(config, first, (other, rival)) if report.fits else ""
    return _wrapped("decides", words)


def help_lines(report: PlanReport, helps: Sequence[Help], larger: Help | None) -> list[str]:
    """Return what makes a plan faster, or lets it fit, in lines."""
    words = [f"{one.overrides}: {_compared(one, report.step_seconds)}" for one in helps]
    if not report.fits:
        nothing = "nothing found with one or two other settings; vp-plan --search tries all"
        return [f"would fit: {one}" for one in words or [nothing]]
    if larger is not None:
        gain = 2 * report.step_seconds / larger.seconds - 1
        words.append(f"{larger.overrides}, a batch twice as large: {gain:.1%} more tokens/s")
    lines = [line for one in words for line in _wrapped("", one)]
    return [f"helps     {lines[0][10:]}", *lines[1:]] if lines else []


def without_lines(report: PlanReport, result: Result | None) -> list[str]:
    """Return a line with the best plan of this split that does not split the vocabulary."""
    if result is None:
        return []
    best, head = result.without_vocabulary, "without   vocabulary parallelism, best of this split:"
    if best is None:
        reason = "" if result.leanest is None else f": {result.leanest.reason}"
        return [f"{head} nothing fits{reason}"]
    if report.vocab == "none" and best.seconds >= 0.995 * report.step_seconds:
        return [f"{head} this plan, which has none"]
    return [f"{head} {short_words(best.choice)}: {_compared(best, report.step_seconds)}"]


def short_words(choice: Choice) -> str:
    """Return the schedule and the placement of a choice in words."""
    chunks = f" of {choice.num_chunks} chunks" if choice.num_chunks is not None else ""
    placed = ", layers redistributed" if choice.placement == "redistribute" else ""
    return f"{choice.schedule}{chunks}{placed}"


def _compared(estimate: Estimate | Help, seconds: float) -> str:
    """Return time and memory of an estimate, and its time against that of a plan, in words."""
    about, how = "" if estimate.is_planned else "about ", compared(estimate.seconds, seconds)
    return f"{about}{duration(estimate.seconds)} ({how}), {estimate.memory / _GIB:.1f} GiB"


def _host_lines(report: PlanReport) -> list[str]:
    """Return what moves to the host and back, what that saves and costs, and what hosts hold."""
    lines, host = _offload_lines(report.offloading, report.step_seconds), report.host
    if not host.total:
        return lines
    known = report.cluster.host_memory_gib
    limit = "" if known is None else f" of {known:g} GiB{' TOO MUCH' * (report.host_excess > 0)}"
    optimizer = f", {human_bytes(host.optimizer)} for the optimizer" if host.optimizer else ""
    return [
        *lines,
        f"host RAM  holds up to {human_bytes(host.total)} per node{limit}{optimizer}",
    ]


def _offload_lines(found: Offloading | None, step_seconds: float) -> list[str]:
    """Return what moves to the host and back, and what that saves and costs, in lines."""
    if found is None:
        return []
    if not found.num_moved:
        return [f"offload   {nothing_offloaded_words(has_layers=found.num_kept > 0)}"]
    down, up = found.busy
    return [
        f"offload   {human_bytes(found.moved)} of a step go to the host and back on the busiest "
        f"rank; its link is busy {down:.0%} down, {up:.0%} up",
        f"          {found.num_moved:,} of {found.num_moved + found.num_kept:,} forward passes "
        f"send activations there, which delays the passes by {found.exposed / step_seconds:.1%} "
        f"and saves {human_bytes(found.saved)} on the worst rank",
    ]


def _fsdp_words(config: RunConfig, report: PlanReport, rivals: Rivals) -> str:
    """Return what fully sharded data parallelism would take for the same batch, in words."""
    words = rivals.words(report.step_seconds)
    assumed = config.cost.is_measured and not config.cost.has_rates
    return f"{words}; its passes at assumed rates, not as measured" if assumed else words


def _model_words(config: RunConfig) -> str:
    """Return the model and the batch in words."""
    model = config.model
    return (
        f"{shape.num_parameters(model) / 1e6:,.1f} M parameters, "
        f"{model.num_layers} layers of hidden size {model.hidden_size:,}, "
        f"vocabulary {model.vocab_size:,}; {config.num_microbatches} "
        f"{plural(config.num_microbatches, 'microbatch')} of "
        f"{config.micro_batch_size} x {model.seq_length:,} tokens"
    )


def _amount(count: float) -> str:
    """Return a count in words, to be followed by a unit: 23_100_000 -> `23.1 M`."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {letter}"
    return f"{count:,.0f} "


def _cluster_words(config: RunConfig) -> str:
    """Return the cluster and the assumed speed of passes in words."""
    cluster = config.cluster
    name = plural(cluster.num_gpus, {"cuda": "GPU", "cpu": "CPU rank"}[config.run.device])
    peak = getattr(cluster, f"{config.run.dtype}_flops_per_second") / 1e12
    nodes = "one node" if cluster.num_nodes == 1 else f"{cluster.num_nodes} nodes"
    reached = f", {cluster.efficiency:.0%} of it reached"
    if cluster.multiprocessors:
        matrix, attention = cluster.efficiency, cluster.attention_efficiency
        reached = (
            f"; in a run large products reach {matrix * cluster.sustained:.0%} of it, "
            f"attention {attention * cluster.sustained:.0%}"
        )
    if (rate := config.cost.flops_per_second) is not None:
        reached = f"; cost has {rate / 1e12:,.3g} TFLOP/s for all passes"
    if config.cost.has_rates:
        reached = f", rates as measured on {config.cost.measured_on or 'a device without a name'}"
    if config.cost.is_measured:
        device = config.cost.measured_on or "a device that cost does not name"
        reached = f", pass times as measured on {device}"
    float8 = "; linear layers in float8" if config.run.linear_dtype == "float8" else ""
    return (
        f"{cluster.num_gpus} {name} on {nodes}, {cluster.memory_gib:g} GiB and "
        f"{peak:,.3g} TFLOP/s in {config.run.dtype} each{reached}{float8}"
    )


def _rank_table(report: PlanReport) -> list[str]:
    """Return a table of the ranks in lines: memory in GiB or MiB, and the time of computation."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    heads = (
        "rank",
        "layers",
        "V rows",
        "params",
        "weights",
        "grads",
        "optim",
        "activ",
        "held S-T",
        "working",
        "total",
        "busy",
    )
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    unit, word = (
        (_GIB, "GiB") if report.ranks[report.worst].memory.total >= _GIB else (2**20, "MiB")
    )
    for index, rank in enumerate(report.ranks[:_SHOWN_RANKS]):
        memory = rank.memory
        parts = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.vocabulary,
            memory.working,
        )
        table.add_row(
            str(index),
            str(rank.num_layers),
            f"{rank.num_rows:,}",
            f"{memory.parameters / 1e6:,.{0 if memory.parameters >= 1e7 else 2}f}M",
            *(f"{size / unit:.2f}" for size in (*parts, memory.total)),
            duration(rank.busy),
        )
    left = len(report.ranks) - _SHOWN_RANKS
    num_alike = report.degrees.dp * report.degrees.tp
    more = [f"... and {left} more ranks; --json FILE has all"] if left > 0 else []
    return [
        *_rendered(table),
        *more,
        f"sizes in {word}"
        + (f"; every line stands for {num_alike} ranks" if num_alike > 1 else ""),
    ]


def _rendered(table: Table) -> list[str]:
    console = Console(width=max(200, shutil.get_terminal_size().columns), color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().rstrip().splitlines()]


def search_lines(
    config: RunConfig, limits: Limits, result: Result, *, is_stopped: bool = False
) -> list[str]:
    """Return the best plans in lines, and why others are not among them."""
    lines = _unfinished_lines(result, is_stopped=is_stopped)
    if result.best:
        first = result.best[0]
        lines += [*_best_lines(result), ""]
        is_first = all(estimate.counted >= first.counted for estimate in result.estimated)
        head = "the first" if is_first else "the first that is planned whole"
        lines += [f"{head}: {first.choice.overrides(config)}", f"binds: {first.report.binds}"]
        lines += _host_memory_lines(result.best)
        lines += _slow_link_lines(config, first)
        lines += _vocabulary_lines(config, result)
        lines += _other_lines(config, result)
        rivals = rivals_of(config, first.report, limits.margin)
        if _has_fsdp(config):
            lines += [f"fsdp: {_fsdp_words(config, first.report, rivals)}"]
        lines += _contention_lines(config, limits, result, rivals)
        lines += [""]
    excluded = sum(result.excluded.values())
    counted = (
        f"{_choices(result.num_choices)}, {excluded:,} ruled out, "
        f"{result.num_estimated:,} simulated, {result.num_planned} planned"
    )
    is_whole = result.best and not result.num_open
    lines.append(f"{counted}; none of the others seems faster" if is_whole else counted)
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
    if _has_fsdp(config):
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
    compared = _compared(other, first.report.step_seconds)
    optimizer = other.choice.optimizer
    uses_hosts = other.choice.offload > 0 or (optimizer is not None and optimizer.offload)
    if uses_hosts and config.cluster.host_memory_gib is None:
        compared += ", with host memory that is not checked"
    return f"{compared}: {other.choice.overrides(config)}"


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
    lines += _rendered(table)
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
    counted = [one for one in result.excluded.most_common() if one[0] != TOO_LONG]
    lines = [
        f"{'then' if place else 'ruled out most'}: {words}: {_choices(count)} "
        f"({count / result.num_choices:.0%})"
        for place, (words, count) in enumerate(counted[: 1 + _SHOWN_REFUSALS])
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


def remedies(config: RunConfig, report: PlanReport) -> list[str]:
    """Return the changes that save memory on the worst rank of `config`, the largest saving first.

    Every change is tried on its own, and the words say where it is not enough.
    """
    replicas = split_ranks(config.parallel, config.cluster.num_gpus).dp
    # What waits in host memory, and so is not saved on the GPU, only a simulation says.
    offloads = bool(config.parallel.offload_activations) and not config.schedule.is_solved
    needs = _planned_bytes if offloads else about_bytes
    before = report.ranks[report.worst].memory.total if offloads else about_bytes(config)
    tried: list[tuple[str, RunConfig]] = []
    if config.optim.name != "zero1" and replicas > 1:
        tried.append(
            ("optim.name=zero1", replace(config, optim=replace(config.optim, name="zero1")))
        )
    if not config.optim.offload and report.host_excess <= 0:
        offloaded = replace(config, optim=replace(config.optim, name="zero1", offload=True))
        tried.append(
            ("optim.name=zero1 optim.offload=true, the optimizer in host memory", offloaded)
        )
    for value in RECOMPUTE[1:]:
        parallel = replace(config.parallel, recompute=value, recompute_per_stage=None)
        tried.append((f"parallel.recompute={value}", replace(config, parallel=parallel)))
    if config.micro_batch_size > 1:
        size = config.micro_batch_size
        halved = replace(
            config, micro_batch_size=1, num_microbatches=config.num_microbatches * size
        )
        tried.append(
            (f"micro_batch_size=1 num_microbatches={config.num_microbatches * size}", halved)
        )
    if config.vocab.algorithm == "none":
        tried.append(
            (
                "vocab=one_barrier",
                replace(config, vocab=replace(config.vocab, algorithm="one_barrier")),
            )
        )
    found = []
    for words, changed in tried:
        try:
            after = needs(changed)
        except ConfigError:
            continue
        if before - after > 0.01 * before:
            found.append((before - after, f"{words}: about {human_bytes(before - after)} less"))
    saved, words = _saved_by_offloading(config, report)
    if saved > 0.01 * before:
        found.append((saved, words))
    ordered = [
        words + _NOT_ALONE * (saved < report.excess) for saved, words in sorted(found, reverse=True)
    ]
    return [*ordered, _more_gpus_words(config, replicas)]


def _planned_bytes(config: RunConfig) -> float:
    """Return the bytes that the worst rank needs, from a simulation.  Raises ConfigError."""
    report = make_report(config)
    return report.ranks[report.worst].memory.total


def _more_gpus_words(config: RunConfig, replicas: int) -> str:
    more = " or a smaller parallel.dp" if replicas > 1 else ""
    return f"more GPUs per replica: cluster.num_nodes above {config.cluster.num_nodes}{more}"


def host_remedies(
    config: RunConfig, report: PlanReport, progress: Callable[[str], object] = lambda words: None
) -> list[str]:
    """Return the changes that save memory of the hosts, the largest saving first, in words.

    Every change is planned on its own.  Bytes are those of a node.  What does not fit on the GPUs
    then comes last.
    """
    found: list[tuple[bool, float, str]] = []
    for words, changed in _lighter_on_hosts(config, report).items():
        progress(f"planning with {words}")
        try:
            then = make_report(changed)
        except ConfigError:
            continue
        saved = report.host.total - then.host.total
        if saved < 0.01 * report.host.total:
            continue
        words += f": {human_bytes(saved)} less in host memory per node"
        if then.host_excess > 0:
            words += _NOT_ALONE
        if then.excess > 0:
            words += f"; but then a GPU {then.memory_words}"
        found.append((then.excess > 0, -saved, words))
    return [*(words for *_, words in sorted(found)), _more_gpus_words(config, report.degrees.dp)]


def _lighter_on_hosts(config: RunConfig, report: PlanReport) -> dict[str, RunConfig]:
    """Return the changes that may save memory of the hosts, as they are typed."""
    parallel, schedule, host = config.parallel, config.schedule, report.host
    changes: dict[str, RunConfig] = {}
    if host.optimizer:
        optim = replace(config.optim, offload=False)
        changes["optim.offload=false"] = replace(config, optim=optim)
    if not host.activations or schedule.is_solved or schedule.file is not None:
        return changes
    part = _largest_part(config, 1 - report.host_excess / host.activations)
    fewer = replace(parallel, offload_activations=part)
    changes[f"parallel.offload_activations={part:g}"] = replace(config, parallel=fewer)
    for value in RECOMPUTE[1:]:
        again = replace(parallel, recompute=value, recompute_per_stage=None)
        changes[f"parallel.recompute={value}"] = replace(config, parallel=again)
    if schedule.name == "interleaved":
        line = replace(schedule, name="1f1b", num_chunks=None)
        words = "schedule=1f1b" + " schedule.num_chunks=null" * (schedule.num_chunks is not None)
        changes[f"{words}, with fewer microbatches in flight"] = replace(config, schedule=line)
    return changes


def _largest_part(config: RunConfig, fitting: float) -> float:
    """Return the largest parallel.offload_activations that moves this part of what moves now."""
    now = config.parallel.offload_activations
    most = fitting * _moved_layers(config, now)
    parts = (hundredths / 100 for hundredths in range(math.floor(100 * now), 0, -1))
    part = next((part for part in parts if _moved_layers(config, part) <= most), 0.0)
    moved = _moved_layers(config, part)  # many parts round to it; the plainest is their quotient
    plain = round(moved / config.model.num_layers, 2)
    return plain if _moved_layers(config, plain) == moved else part


def _moved_layers(config: RunConfig, part: float) -> int:
    """Return how many layers offload activations with parallel.offload_activations=`part`."""
    family, chunks = GENERATORS[config.schedule.name], config.schedule.num_chunks
    degrees = split_ranks(config.parallel, config.cluster.num_gpus)
    layout = family.layout_of(degrees.pp, chunks)
    stages = split_layers(config.model, config.parallel, layout)
    return sum(offloaded_layers(len(layers), part) for layers in stages)


def _saved_by_offloading(config: RunConfig, report: PlanReport) -> tuple[float, str]:
    """Return what the worst rank saves if all activations may go to its host, also in words."""
    parallel, is_whole = config.parallel, config.parallel.offload_activations == 1
    if config.run.device != "cuda" or is_whole or config.schedule.is_solved:
        return 0.0, ""
    offloads = replace(config, parallel=replace(parallel, offload_activations=1.0))
    found, now = make_report(offloads), report.ranks[report.worst].memory.total
    if found.offloading is None or found.host_excess > 0:
        return 0.0, ""
    saved = now - found.ranks[found.worst].memory.total
    return saved, (
        f"parallel.offload_activations=1: {human_bytes(saved)} less, with "
        f"{human_bytes(found.host.activations)} in host memory per node"
    )


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        write_output(path, json.dumps(record, indent=1) + "\n")
        print(f"written to {path}", flush=True)
