"""The command `vp-plan`: a plan or a search, on the terminal and as JSON.  Runs without torch."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from schedules.render import duration
from vp_train.commands.command import Command, run, whole_number
from vp_train.commands.searching import Searching
from vp_train.config import RECOMPUTE, ConfigError, RunConfig
from vp_train.failures import EXIT_CONFIG, EXIT_TIME
from vp_train.model import shape
from vp_train.planning.degrees import split_ranks
from vp_train.planning.plan import SEARCHING
from vp_train.planning.report import PlanReport, make_report
from vp_train.planning.search import Found, Refusal, Result, about_bytes, search
from vp_train.units import human_bytes

_SHOWN_RANKS = 16
_SHOWN_REFUSALS = 3
_GIB = 2**30


_EXAMPLES = """\
  vp-plan model=gpt_4b cluster=a100_80g_node num_microbatches=128
  vp-plan model=llama3_8b cluster=h100_80g_node cluster.num_nodes=4 \\
      parallel.tp=2 parallel.pp=4 num_microbatches=32
  vp-plan --search --top 10 model=gpt_21b cluster=a100_80g_node cluster.num_nodes=2 \\
      num_microbatches=256"""


def main() -> None:
    """Run `vp-plan`: predict bytes, seconds and MFU of a run on a cluster."""
    options = {
        "--search": ("", "rank every way to run the batch on the cluster, fastest first"),
        "--top": ("K", "with --search: number of plans to show (5)"),
        "--seconds": ("N", "with --search: time limit; one simulation may still end after it (60)"),
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


def _plan(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    path = Path(options["--json"]).expanduser() if "--json" in options else None
    if path is not None and path.is_dir():
        raise ConfigError(f"--json {path} is a directory; name a file")
    if "--search" not in options:
        for name in ("--top", "--seconds"):
            if name in options:
                raise ConfigError(f"{name} belongs to --search")
        return show_plan(config, path)
    top, seconds = (
        whole_number(options, name, default) for name, default in (("--top", 5), ("--seconds", 60))
    )
    return show_search(config, top, seconds, path)


def show_plan(config: RunConfig, path: Path | None) -> int:
    """Plan `config`, print the report and write it to `path`.  Raises ConfigError.

    Returns the exit code: EXIT_CONFIG if the run does not fit into memory.
    """
    if config.schedule.is_solved:
        print(SEARCHING, flush=True)
    with Searching() as searching:
        report = make_report(config, searching.watch)
    print("\n".join([*plan_lines(config, report), *searching.words]), flush=True)
    _write(path, report.record())
    return searching.exit_code if report.fits else EXIT_CONFIG


def show_search(config: RunConfig, top: int, seconds: float, path: Path | None) -> int:
    """Search for the fastest plans, print them and write them to `path`.  Raises ConfigError.

    Ctrl-C ends it with the best so far.  Returns the exit code.
    """
    print(f"{_model_words(config)}\n{_cluster_words(config)}\n", flush=True)
    until = time.monotonic() + seconds
    with Searching() as searching:

        def in_time() -> bool:
            return time.monotonic() < until and not searching.is_stopped

        result = search(config, top, in_time, searching.show)
    print("\n".join(search_lines(config, result, is_stopped=searching.is_stopped)), flush=True)
    found = [
        {"overrides": plan.choice.overrides(config)} | plan.report.record() for plan in result.best
    ]
    refused = [
        {"overrides": refusal.choice.overrides(config), "reason": refusal.reason}
        for refusal in result.refused
    ]
    _write(
        path,
        {
            "best": found,
            "refused": refused,
            "simulated": result.num_simulated,
            "open": result.open_choices,
        },
    )
    if searching.is_stopped or result.best:
        return searching.exit_code
    return EXIT_TIME if result.open_choices else EXIT_CONFIG


def plan_lines(config: RunConfig, report: PlanReport) -> list[str]:
    """Return the report of one plan in lines; it fits on a screen for up to 16 ranks."""
    parts, step, worst = report.parts, report.step_seconds, report.ranks[report.worst].memory
    shares = ", ".join(
        f"{name} {seconds / step:.1%}"
        for name, seconds in parts.items()
        if seconds >= 0.0005 * step
    )
    room = f"{human_bytes(abs(report.excess))} {'to spare' if report.fits else 'TOO MUCH'}"
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
        f"schedule  mean bubble {report.bubble:.1%}, {report.gap:.1%} above the lower bound, "
        f"{report.bound_reason}",
        f"binds     {report.binds}",
    ]
    if not report.fits:
        lines += ["", *(f"would help: {words}" for words in remedies(config))]
    return lines


def _model_words(config: RunConfig) -> str:
    """Return the model and the batch in words."""
    model = config.model
    return (
        f"{shape.num_parameters(model) / 1e6:,.1f} M parameters, "
        f"{model.num_layers} layers of hidden size {model.hidden_size:,}, "
        f"vocabulary {model.vocab_size:,}; {config.num_microbatches} microbatches of "
        f"{config.micro_batch_size} x {model.seq_length:,} tokens"
    )


def _amount(count: float) -> str:
    """Return a count in words, to be followed by a unit: 23_100_000 -> `23.1 M`."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {letter}"
    return f"{count:,.0f} "


def _cluster_words(config: RunConfig) -> str:
    """Return the cluster and the assumed speed of passes in words."""
    cluster = config.cluster
    name = {"cuda": "GPUs", "cpu": "CPU ranks"}[config.run.device]
    peak = getattr(cluster, f"{config.run.dtype}_flops_per_second") / 1e12
    nodes = "one node" if cluster.num_nodes == 1 else f"{cluster.num_nodes} nodes"
    reached = f"{cluster.efficiency:.0%} of it reached"
    if config.cost.is_measured:
        device = config.cost.measured_on or "a device that cost does not name"
        reached = f"pass times as measured on {device}"
    float8 = "; linear layers in float8" if config.run.linear_dtype == "float8" else ""
    return (
        f"{cluster.num_gpus} {name} on {nodes}, {cluster.memory_gib:g} GiB and "
        f"{peak:,.3g} TFLOP/s in {config.run.dtype} each, {reached}{float8}"
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


def search_lines(config: RunConfig, result: Result, *, is_stopped: bool = False) -> list[str]:
    """Return the best plans in lines, and why others are not among them."""
    counted = (
        f"{result.num_choices:,} choices, {result.num_simulated} simulated, "
        f"{len(result.refused):,} refused"
    )
    lines = []
    if result.best:
        lines += [
            *_best_table(result.best),
            "",
            f"the first: {result.best[0].choice.overrides(config)}",
        ]
        lines += [f"binds: {result.best[0].report.binds}", ""]
    if result.open_choices:
        why, way_out = ("stopped", "") if is_stopped else ("out of time", "; raise --seconds")
        left = f"{result.open_choices:,} that might be faster are left"
        lines.append(f"{counted}; {why}: {left}{way_out}")
    else:
        lines.append(f"{counted}; none of the others can be faster" if result.best else counted)
    lines += _refusal_lines(config, result.refused)
    if not result.best:
        lines += _misses(config, result)
    return lines


def _best_table(best: Sequence[Found]) -> list[str]:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for head in (
        *("", "dp", "pp", "tp", "microbatches", "schedule", "vocab", "recompute"),
        *("step", "tokens/s", "MFU", "bubble", "gap", "GiB"),
    ):
        table.add_column(
            head,
            justify="left" if head in ("schedule", "vocab", "recompute") else "right",
            no_wrap=True,
        )
    for place, (choice, report) in enumerate(((found.choice, found.report) for found in best), 1):
        degrees = choice.degrees
        table.add_row(
            str(place),
            *(str(degree) for degree in (degrees.dp, degrees.pp, degrees.tp)),
            f"{choice.num_microbatches} x {choice.micro_batch_size}",
            choice.schedule,
            choice.vocab,
            choice.recompute,
            duration(report.step_seconds),
            f"{report.num_tokens / report.step_seconds:,.0f}",
            f"{report.mfu:.1%}",
            f"{report.bubble:.1%}",
            f"{report.gap:.1%}",
            f"{report.ranks[report.worst].memory.total / _GIB:.1f}",
        )
    return _rendered(table)


def _refusal_lines(config: RunConfig, refused: Sequence[Refusal]) -> list[str]:
    """Return the fastest choices that need too much memory, and how often other reasons occur."""
    too_large = [refusal for refusal in refused if refusal.excess is not None]
    lines = []
    if too_large:
        lines.append(f"{len(too_large):,} need too much memory; the fastest of them:")
        lines += [
            f"  {refusal.choice.overrides(config)}: {refusal.reason}"
            for refusal in too_large[:_SHOWN_REFUSALS]
        ]
    others = Counter(refusal.reason for refusal in refused if refusal.excess is None)
    lines += [
        f"{count:,} refused: {reason}" for reason, count in others.most_common(_SHOWN_REFUSALS)
    ]
    return lines


def _misses(config: RunConfig, result: Result) -> list[str]:
    """Return how far the smallest choice is from fitting, and what would help it."""
    too_large = [refusal for refusal in result.refused if refusal.excess is not None]
    if not too_large:
        return [] if result.open_choices else ["", _numbers_words(config)]
    leanest = min(too_large, key=lambda refusal: refusal.excess or 0.0)
    what = "NOTHING TRIED SO FAR FITS" if result.open_choices else "NOTHING FITS"
    lines = ["", f"{what}.  Closest: {leanest.choice.overrides(config)}", f"  {leanest.reason}"]
    return lines + [f"would help: {words}" for words in remedies(leanest.choice.applied(config))]


def _numbers_words(config: RunConfig) -> str:
    """Return the conditions on dp, pp and tp in words, for a search without any possible choice."""
    model, replicas = config.model, config.parallel.dp or 1
    batch = config.num_microbatches * config.micro_batch_size * replicas
    return (
        f"nothing can be run: dp x pp x tp must be {config.cluster.num_gpus}, where dp divides the "
        f"{batch:,} sequences of the batch, pp is at most model.num_layers={model.num_layers}, "
        f"and tp divides model.num_heads={model.num_heads}, "
        f"model.num_query_groups={model.num_query_groups}, "
        f"model.ffn_hidden_size={model.ffn_hidden_size} and "
        f"cluster.gpus_per_node={config.cluster.gpus_per_node}; "
        "change one of these, or the reason above"
    )


def remedies(config: RunConfig) -> list[str]:
    """Return the changes that save memory on the worst rank of `config`, the largest saving first.

    Every change is tried on its own.
    """
    before, replicas = about_bytes(config), split_ranks(config.parallel, config.cluster.num_gpus).dp
    tried: list[tuple[str, RunConfig]] = []
    if config.optim.name != "zero1" and replicas > 1:
        tried.append(
            ("optim.name=zero1", replace(config, optim=replace(config.optim, name="zero1")))
        )
    if not config.optim.offload:
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
            after = about_bytes(changed)
        except ConfigError:
            continue
        if before - after > 0.01 * before:
            found.append((before - after, f"{words}: about {human_bytes(before - after)} less"))
    ordered = [words for _, words in sorted(found, reverse=True)]
    more = " or a smaller parallel.dp" if replicas > 1 else ""
    return [
        *ordered,
        f"more GPUs per replica: cluster.num_nodes above {config.cluster.num_nodes}{more}",
    ]


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {path}", flush=True)
