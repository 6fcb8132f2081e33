"""What `vp-plan` prints of a plan."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from schedules.render import duration
from vp_train.commands.command import text_width
from vp_train.commands.plan_remedies import (
    Remedy,
    about_mark,
    host_remedies,
    host_words,
    remedies,
)
from vp_train.config import RunConfig
from vp_train.model import shape
from vp_train.planning.alternatives import Alternative
from vp_train.planning.choice import Choice
from vp_train.planning.cluster import assumed_costs
from vp_train.planning.compare import Crossovers, Help, Way, crossovers_of, fsdp_way, pipeline_way
from vp_train.planning.found import Estimate
from vp_train.planning.memory import RankMemory
from vp_train.planning.placement import nothing_offloaded_words
from vp_train.planning.plan import in_its_memory_words
from vp_train.planning.report import VISIBLE, Offloading, PlanReport, gpus_words, with_costs
from vp_train.planning.rivals import Rivals
from vp_train.units import amount, compared, count_words, human_bytes, is_faster

_SHOWN_RANKS = 16
_LEFT_OUT = ("params", "layers", "V rows")  # of the ranks, if need be, where a terminal is narrow
_GIB, _MIB = 2.0**30, 2.0**20
_LARGE_GAP = 0.1  # above the lower bound
# What follows a schedule or an algorithm, by parallel.placement.
PLACED = {"even": "", "balanced": ", layers balanced", "redistribute": ", layers redistributed"}
_WIDEST = 1000  # columns of a table
_LABEL = 10  # columns of a label in front of the lines of a plan
_INDENT = 4  # columns in front of what continues another line
# Rows of tables, and overrides that are to be copied: no commas are between them.
_ROW = re.compile(r"─|\S {2,}\S.* {2,}\S.* {2,}\S")
_OVERRIDES = r"(?<!\S)[a-z][\w.]*=\S*[^\s,](?: [a-z][\w.]*=\S*[^\s,])+(?!\S)"
# What stays in one line: these, degrees, and a figure with its unit.
_DEGREES = r"\b[dpt]p=\d+(?: x [dpt]p=\d+)+"
_FIGURE = r"(?<![\w.=])~?[\d,.]+(?: (?:[KMG]iB|[mµ]?s|GB/s|[MGTPEZY]?FLOP)|% (?:faster|slower))\b"
_TOGETHER = re.compile(f"{_OVERRIDES}|{_DEGREES}|{_FIGURE}")


def has_fsdp(config: RunConfig) -> bool:
    """Return whether plans are compared with FSDP: on several GPUs."""
    return config.run.device == "cuda" and config.cluster.num_gpus > 1


def plan_lines(config: RunConfig, report: PlanReport, rivals: Rivals | None = None) -> list[str]:
    """Return the report of one plan in lines; it fits on a screen for up to 16 ranks.

    `rivals` are shown if given.
    """
    parts, step, worst = report.parts, report.step_seconds, report.ranks[report.worst].memory
    shares = ", ".join(
        f"{name} {seconds / step:.1%}"
        for name, seconds in parts.items()
        if seconds >= 0.0005 * step
    )
    fits = report.excess <= 0
    unit = _GIB if worst.total >= _GIB else _MIB
    num_alike = report.degrees.dp * report.degrees.tp
    alike = f", {num_alike:,} ranks per row" if num_alike > 1 else ""
    room = f"{human_bytes(abs(report.excess))} {'to spare' if fits else 'TOO MUCH'}"
    lines = [
        f"{report.schedule} with {report.vocab}, {report.degrees}, "
        f"recomputation {report.recompute}, optimizer {config.optim.name}",
        model_words(config),
        cluster_words(config),
        "",
        *_rank_table(report, unit),
        "",
        f"memory    {human_bytes(worst.total)} of {config.cluster.memory_gib:,g} GiB "
        f"on rank {report.worst}, {room}; table in {'GiB' if unit == _GIB else 'MiB'}{alike}",
        f"step      {report.num_tokens:,} tokens in {duration(step)}: "
        f"{report.num_tokens / step:,.0f} tokens/s, {report.rate_words}; "
        f"the model's work is {amount(report.flops)}FLOP",
        f"          rank {report.busiest}: {shares}",
        f"schedule  bubble {report.bubble:.1%}; step {report.gap:.1%} over its bound "
        f"({report.bound_reason}){in_its_memory_words(report.gap, report.gap_in_its_memory)}",
        *_host_lines(report),
        *_links_lines(config, report),
    ]
    if exposed := exposed_words(report):
        lines.append(f"exposed   {exposed}")
    lines.append(f"binds     {report.binds}")
    if report.launch_words:
        lines.insert(-1, f"launch    {report.launch_words}")
    if rivals is not None and has_fsdp(config):
        lines.insert(-1, f"fsdp      {fsdp_words(config, rivals)}")
    if report.gap > _LARGE_GAP and not report.is_capped:
        held = report.gap_in_its_memory
        cause = "" if held is None or held > report.gap / 2 else " because it keeps so little"
        lines.append(
            f"          on {report.degrees.pp} ranks {report.schedule} is far above it{cause}; try "
            "other schedules, or vp-plan --search"
        )
    num_shards = report.degrees.pp * report.degrees.tp
    if report.splits_vocabulary and config.model.vocab_size < num_shards:
        lines.append(
            f"advice    vocab.algorithm=none: a vocabulary of {config.model.vocab_size} is too "
            f"small to split over {num_shards} ranks"
        )
    if report.advice:
        lines.append(f"advice    {report.advice}")
    return lines


def _links_lines(config: RunConfig, report: PlanReport) -> list[str]:
    """Return what messages take here, in a line, where a run's own plan assumes something else.

    On a CPU a run and a simulation do not take the links of a cluster.
    """
    costs = with_costs(config).cost, assumed_costs(report.work, config.cluster, config.cost)
    here, there = (
        f"{duration(cost.hop_seconds or 0.0)} a hop and "
        f"{duration(cost.collective_seconds or 0.0)} a barrier"
        for cost in costs
    )
    if here == there or report.degrees.pp == 1:
        return []
    return [
        f"links     {here}, as the cluster has; on a CPU vp-train and vp-simulate assume {there}"
    ]


def remedies_of(
    config: RunConfig, report: PlanReport, progress: Callable[[str], object] = lambda words: None
) -> list[Remedy]:
    """Return what would save memory where a plan needs too much, of GPUs first.

    `progress` gets lines to show meanwhile.
    """
    found = remedies(config, report, progress) if report.excess > 0 else []
    return found + (host_remedies(config, report, progress) if report.host_excess > 0 else [])


def remedy_lines(found: Sequence[Remedy]) -> list[str]:
    """Return what would save memory in lines."""
    return ["", *(f"would help: {remedy.words}" for remedy in found)] if found else []


def text_of(lines: Iterable[str]) -> str:
    """Return lines as text of `text_width` columns, which breaks no table and no overrides."""
    width = text_width()
    return "\n".join(part for line in lines for part in _broken(line, width))


def _broken(line: str, width: int) -> list[str]:
    """Return a line in parts; further ones stand below what is behind its label, if it has one."""
    if len(line) <= width or _ROW.search(line):
        return [line]
    has_label = line[_LABEL - 2 : _LABEL].isspace() and not line[_LABEL].isspace()
    start = _LABEL if has_label else 0
    parts = textwrap.wrap(
        _TOGETHER.sub(lambda found: found[0].replace(" ", "\0"), line[start:]),
        width - start,
        subsequent_indent="" if has_label else " " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    # Overrides that have a line for themselves can be copied as a whole.
    parts = [part.replace("\0", " ") for part in parts]
    parts = [part.rstrip(":") if re.fullmatch(rf" *{_OVERRIDES}", part) else part for part in parts]
    return [(" " * start if n else line[:start]) + part for n, part in enumerate(parts)]


def exposed_words(report: PlanReport) -> str:
    """Return the communication that nothing hides in words, "" if it takes next to no time."""
    is_visible = sum(report.exposed.values()) >= VISIBLE * report.step_seconds
    return f"communication, {report.exposed_words}" if is_visible else ""


def decision_of(
    config: RunConfig, report: PlanReport, rivals: Rivals, others: Sequence[Alternative]
) -> Crossovers:
    """Return with which contention this plan, or another that it is compared with, is faster."""
    ways = [] if not report.fits else [_way_of(config, one) for one in others]
    if report.fits and has_fsdp(config):
        ways.append(fsdp_way(config, report, rivals, 0.0))
    return crossovers_of(config, pipeline_way("this plan", config, report.step_seconds), ways)


def _way_of(config: RunConfig, other: Alternative) -> Way | None:
    best = other.best
    if best is None or best.choice is None or not best.overrides:
        return None
    where = " of this split" if other.is_here else ""
    words = f"the best{where} {kind_words(other)}"
    return pipeline_way(words, best.choice.applied(config), best.seconds)


def decides_lines(decision: Crossovers) -> list[str]:
    """Return what says that the contention decides whether this plan is faster than others."""
    return [f"decides   {decision.words}"] if decision.crossovers else []


def help_lines(report: PlanReport, helps: Sequence[Help], larger: Help | None) -> list[str]:
    """Return what makes a plan faster, or lets it fit, in lines."""
    before = report.step_seconds if report.fits else None
    words = [f"{one.overrides}: {compared_words(one, before)}" for one in helps]
    if before is None:
        nothing = "nothing found with one or two other settings; vp-plan --search tries all"
        return [f"would fit: {one}" for one in words or [nothing]]
    if larger is not None:
        mark, gain = about_mark(larger), 2 * before / larger.seconds - 1
        more = f"{mark}{duration(larger.seconds)}, {mark}{gain:.1%} more tokens/s"
        words.append(f"{larger.overrides}: {more}, with twice the batch")
    return [f"{'' if place else 'helps':{_LABEL}}{one}" for place, one in enumerate(words)]


def kind_words(other: Alternative) -> str:
    """Return `with vocabulary parallelism`, or without."""
    return f"{'with' if other.splits_vocabulary else 'without'} vocabulary parallelism"


def alternative_lines(report: PlanReport, other: Alternative) -> list[str]:
    """Return the best plan found with, or without, vocabulary parallelism in lines.

    Where that has another split or other settings, it also says what the split of the plan takes,
    and in a second line with what if that is no slower than the plan.
    """
    best, here = other.best, other.here
    label, _, rest = kind_words(other).partition(" ")
    head, before = f"{label:{_LABEL}}{rest}", report.step_seconds if report.fits else None
    if best is None:
        return [f"{head}: nothing fits{f': {other.reason}' * bool(other.reason)}"]
    if not best.overrides:
        return [f"{head}, best found: this plan"]
    words, more = f"{head} {compared_words(best, before)}", list[str]()
    if other.is_here:
        words += " on this split"
    elif here is None:
        words += "; this split does not fit" * bool(other.reason)
    elif before is None or report.splits_vocabulary or is_faster(here.seconds, before):
        words += f"; this split {step_words(here, before)}"
        if here.overrides and not (before and is_faster(before, here.seconds)):
            more.append(f"{'':{_LABEL}}this split: {here.overrides}")
    return [f"{words}: {best.overrides}", *more]


def short_words(choice: Choice) -> str:
    """Return the schedule and the placement of a choice in words."""
    chunks = f" of {choice.num_chunks} chunks" if choice.num_chunks is not None else ""
    return f"{choice.schedule_name}{chunks}{PLACED[choice.placement]}"


def compared_words(estimate: Estimate | Help, seconds: float | None) -> str:
    """Return time and memory of an estimate, and its time against that of a plan, in words.

    seconds: those of the plan; None if it does not fit.
    """
    mark = about_mark(estimate)
    memory = f"{mark}{human_bytes(estimate.memory)}{host_words(estimate.host, mark)}"
    return f"{step_words(estimate, seconds)}, {memory}"


def step_words(estimate: Estimate | Help, seconds: float | None) -> str:
    """Return the time of an estimate in words, see `compared_words`."""
    how = "" if seconds is None else f" ({compared(estimate.seconds, seconds)})"
    return f"{about_mark(estimate)}{duration(estimate.seconds)}{how}"


def _host_lines(report: PlanReport) -> list[str]:
    """Return what moves to the host and back, what that saves and costs, and what hosts hold."""
    lines, host = _offload_lines(report.offloading, report.step_seconds), report.host
    if not host.total:
        return lines
    known = report.cluster.host_memory_gib
    limit = "" if known is None else f" of {known:,g} GiB{' TOO MUCH' * (report.host_excess > 0)}"
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


def fsdp_words(config: RunConfig, rivals: Rivals) -> str:
    """Return what fully sharded data parallelism would take for the same batch, in words."""
    assumed = config.cost.is_measured and not config.cost.has_rates
    rates = "; passes of FSDP at assumed rates, not as measured" if assumed else ""
    return f"{rivals.words}{rates}"


def model_words(config: RunConfig) -> str:
    """Return the model and the batch in words."""
    model = config.model
    count = shape.num_parameters(model)
    size = f"{count / 1e9:,.1f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"
    return (
        f"{size} parameters, {count_words(model.num_layers, 'layer')}, "
        f"hidden size {model.hidden_size:,}, vocab {model.vocab_size:,}; "
        f"{count_words(config.num_microbatches, 'microbatch')} of "
        f"{config.micro_batch_size} x {model.seq_length:,} tokens"
    )


def cluster_words(config: RunConfig) -> str:
    """Return the cluster and the assumed speed of passes in words."""
    cluster = config.cluster
    peak = getattr(cluster, f"{config.run.dtype}_flops_per_second") / 1e12
    nodes = "one node" if cluster.num_nodes == 1 else f"{cluster.num_nodes:,} nodes"
    reached = f", {cluster.efficiency:.0%} of it reached"
    if cluster.multiprocessors:
        matrix, attention = cluster.efficiency, cluster.attention_efficiency
        reached = (
            f"; large products reach {matrix * cluster.sustained:.0%}, "
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
        f"{gpus_words(config)} on {nodes}, {cluster.memory_gib:,g} GiB, "
        f"{peak:,.3g} TFLOP/s in {config.run.dtype} each{reached}{float8}"
    )


def _rank_table(report: PlanReport, unit: float) -> list[str]:
    """Return a table of the ranks in lines: memory in `unit`, and the time of computation."""
    shown = report.ranks[:_SHOWN_RANKS]
    memories = [rank.memory for rank in shown]

    def sizes(of_rank: Callable[[RankMemory], float]) -> list[str]:
        return [f"{of_rank(memory) / unit:,.2f}" for memory in memories]

    columns = {
        "rank": [str(index) for index in range(len(shown))],
        "layers": [str(rank.num_layers) for rank in shown],
        "V rows": [f"{rank.num_rows:,}" for rank in shown],
        "params": [_parameters_words(memory.parameters) for memory in memories],
        "weights": sizes(lambda memory: memory.weights),
        "grads": sizes(lambda memory: memory.gradients),
        "optim": sizes(lambda memory: memory.optimizer),
        "activ": sizes(lambda memory: memory.activations),
        "S to T": sizes(lambda memory: memory.vocabulary),
        "working": sizes(lambda memory: memory.working),
        "total": sizes(lambda memory: memory.total),
        "busy": [duration(rank.busy) for rank in shown],
    }
    lines = table_lines(columns)
    for head in _LEFT_OUT:
        if max(map(len, lines)) > text_width():
            del columns[head]
            lines = table_lines(columns)
    left = len(report.ranks) - len(shown)
    more = [f"... and {count_words(left, 'more rank')}; --json FILE has all"] if left > 0 else []
    return [lines[0], *lines[2:], *more]  # without its rule


def _parameters_words(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e7 else 2}f}M"


def table_lines(columns: Mapping[str, Sequence[str]], left: Container[str] = ()) -> list[str]:
    """Return a table in lines: its heads, a rule and a line for every row.

    columns: the cells by their heads, of which those in `left` are aligned on that side.  They
        stand closer together where the table would be wider than `text_width`.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for head in columns:
        table.add_column(head, justify="left" if head in left else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    lines = _rendered(table)
    if max(map(len, lines)) > text_width():
        table.padding = 0
        lines = _rendered(table)
    return lines


def _rendered(table: Table) -> list[str]:
    """Return a table in lines, without colours, however wide it is."""
    console = Console(width=_WIDEST, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().rstrip().splitlines()]
