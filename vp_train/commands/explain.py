"""The command `vp-explain`: where the time of a run's traced step went, and what would help.

It runs without torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from schedules.render import duration
from vp_train.commands.command import (
    Parser,
    collect_rarely,
    cost_output_of,
    guarded,
    path_argument,
    write_costs,
)
from vp_train.commands.plan_words import text_of
from vp_train.config import ConfigError, RunConfig, printable
from vp_train.config.typed import for_shell, typed
from vp_train.durable import checkpoints_in
from vp_train.explain.causes import ExplainedRank, Explanation, KindTimes, explain
from vp_train.explain.remedies import (
    Comparison,
    GoingOn,
    Remedy,
    as_traced,
    compare_schedules,
    cost_settings,
    larger_microbatches,
    plan_of,
    remedies,
)
from vp_train.explain.trace import read_traced
from vp_train.failures import EXIT_OK
from vp_train.profile.costs import cost_text
from vp_train.settings import load_config
from vp_train.units import count_words, human_bytes

_SECONDS = 20.0  # for the comparison of schedules; the simulation that runs then still ends
_SHOWN_RANKS = 16
_SEEN = 1e-4  # of the step: causes that add less are shown as 0


def main() -> None:
    """Run the command."""
    collect_rarely()
    guarded("vp-explain", lambda: _explain(sys.argv[1:]))


def _explain(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    run = options.run.absolute()
    try:
        explanation = explain(read_traced(run))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"{run}: the traced step does not fit its plan: {printable(str(error))[:300]}; "
            "trace another one with run.trace_step"
        ) from None
    costs = None if options.cost is None else cost_output_of("--cost", options.cost)
    words = _settings_of(run)
    note, comparison, settings, changed = None, None, None, None
    steps, larger = 0, None
    try:
        now = load_config(words)
        config = as_traced(explanation, now, run / "schedule.txt")
        plan = plan_of(explanation, config)
        settings, steps = cost_settings(explanation, plan), config.run.steps
        if now.num_microbatches == config.num_microbatches:
            larger = larger_microbatches(config, plan)
        else:
            changed = (
                f"the run has num_microbatches={now.num_microbatches} now; all that follows is "
                "about the step as it was traced"
            )
        if explanation.on_processor == 1:
            if sys.stderr.isatty():
                print("trying other schedules with the measured times", file=sys.stderr, flush=True)
            until = time.monotonic() + _SECONDS
            comparison = compare_schedules(config, plan, settings, lambda: time.monotonic() < until)
    except ConfigError as error:
        note = f"no other schedule was tried: {error}"
    if costs is not None:
        _write_costs(costs, run, config if note is None else None, settings)
    base = " ".join(map(for_shell, words))
    done = max((step for step, _ in checkpoints_in(run / "checkpoints")), default=0)
    going_on = GoingOn(base, done, steps, str(options.run), larger)
    found = remedies(explanation, going_on, comparison, None if costs is None else str(costs))
    if options.json:
        print(json.dumps(record(explanation, comparison, found), indent=1))
    else:
        _print(options.run, explanation, comparison, found, changed, note)
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(
        "vp-explain",
        description="says why the traced step of a run took longer than planned, what it would "
        "take without each cause, and which command mends it",
    )
    parser.add_argument("run", metavar="RUN", type=path_argument, help="directory of a run")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--cost",
        metavar="FILE.yaml",
        help="write the measured seconds there, for cost=FILE of the other commands",
    )
    return parser


def _settings_of(run: Path) -> list[str]:
    """Return the words with which a command takes the settings of a run."""
    words = [typed("run.name", run.name), "run.resume=true"]
    if run.parent != Path("runs").absolute():
        words.insert(0, typed("run.root", str(run.parent)))
    return words


def _write_costs(
    path: Path, run: Path, config: RunConfig | None, settings: dict[str, Any] | None
) -> None:
    if config is None or settings is None:
        raise ConfigError(
            f"--cost {path}: the settings of {run} do not fit its traced step; resume it, which "
            "traces a step anew"
        )
    model = config.model
    comments = [
        f"Measured in a step of {printable(run.name)} by vp-explain",
        f"{config.micro_batch_size} x {model.seq_length} tokens, hidden size {model.hidden_size}, "
        f"V = {model.vocab_size}",
    ]
    print(write_costs(path, cost_text(comments, settings)), file=sys.stderr, flush=True)


def record(
    explanation: Explanation, comparison: Comparison | None, found: Sequence[Remedy]
) -> dict[str, Any]:
    """Return all of it for JSON; times are in seconds."""
    step = explanation.step
    return {
        "schema": "vp_train explain 1",
        "step": step.step,
        "schedule": step.schedule.name,
        "vocabulary": step.problem.algorithm.name,
        "runtime": step.runtime.name,
        "planned_seconds": explanation.planned_seconds,
        "measured_seconds": explanation.measured_seconds,
        "causes": [asdict(cause) for cause in explanation.causes],
        "what_ifs": [asdict(what_if) for what_if in explanation.what_ifs],
        "kinds": [asdict(row) | {"ratio": row.ratio} for row in explanation.kinds],
        "ranks": [asdict(row) for row in explanation.ranks],
        "slow_ranks": [row.rank for row in explanation.slow],
        "replica_seconds": {str(key): value for key, value in explanation.replicas.items()},
        "on_processor": explanation.on_processor,
        "cpus": step.cpus,
        "even_rows": explanation.rows,
        "schedules": None if comparison is None else asdict(comparison),
        "remedies": [asdict(remedy) for remedy in found],
    }


def _print(
    run: Path,
    explanation: Explanation,
    comparison: Comparison | None,
    found: Sequence[Remedy],
    changed: str | None,
    note: str | None,
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110)

    def say(*lines: str) -> None:
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    say(text_of([*_heading(run, explanation), *([changed] if changed else [])]), "")
    console.print(_cause_table(explanation))
    say("")
    console.print(_kind_table(explanation.kinds))
    say("")
    console.print(_rank_table(explanation))
    if len(explanation.ranks) > _SHOWN_RANKS:
        say(f"({count_words(len(explanation.ranks) - _SHOWN_RANKS, 'more rank')}; --json has all)")
    if replicas := explanation.replicas:
        slowest = max(replicas, key=lambda replica: replicas[replica])
        say(
            f"by its pass times replica {slowest} needs {duration(replicas[slowest])}, replica 0 "
            f"{duration(explanation.measured_seconds)}"
        )
    say("")
    console.print(_what_if_table(explanation))
    if comparison is not None:
        say("", text_of([_comparison_words(comparison)]))
    if note is not None:
        say("", text_of([note]))
    if found:
        say("", "What would help")
    for remedy in found:
        gain = (
            ""
            if remedy.seconds is None
            else f" ({duration(remedy.seconds)}, {_percent(remedy.seconds, explanation)})"
        )
        say(
            text_of([f"- {remedy.words}{gain}"]),
            *([f"  {remedy.command}"] if remedy.command else []),
        )


def _heading(run: Path, explanation: Explanation) -> list[str]:
    step, planned, measured = (
        explanation.step,
        explanation.planned_seconds,
        explanation.measured_seconds,
    )
    ratio = f", {measured / planned:.2f} times as long" if planned > 0 else ""
    ranks = count_words(len(explanation.ranks), "rank")
    lines = [
        f"step {step.step} of {run}: {printable(step.schedule.name)}, vocabulary "
        f"{step.problem.algorithm.name}, "
        f"{count_words(step.problem.num_microbatches, 'microbatch')}, {ranks}, "
        f"{printable(step.dtype)} on {printable(step.device)}",
        f"planned {duration(planned)}, measured {duration(measured)}{ratio}",
    ]
    if step.measured_on:
        lines.append(f"planned with pass times measured on {step.measured_on}")
    if step.step == 1:
        lines.append("step 1 also warms up caches and buffers; run.trace_step chooses another one")
    if explanation.on_processor < 1:
        cpus = "" if step.cpus is None else f" on {count_words(step.cpus, 'processor')}"
        lines.append(
            f"passes had a processor for {explanation.on_processor:.0%} of their time: "
            f"{ranks}{cpus}; a plan gives every rank one of its own"
        )
    for row in explanation.slow[:4]:
        host = f" on {row.host}" if row.host else ""
        lines.append(
            f"rank {row.rank}{host} is slow: it computes {row.slowness:.2f} times as long as others"
        )
    return lines


def _table(title: str, *heads: str, left: int = 1) -> Table:
    """Return an empty table; the first `left` columns are words."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        header_style="",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < left else "right", no_wrap=True)
    return table


def _cause_table(explanation: Explanation) -> Table:
    table = _table("Where the time comes from", "", "adds", "step")
    now = explanation.planned_seconds
    table.add_row("planned", "", duration(now))
    for cause in explanation.causes:
        now += cause.seconds
        is_seen = abs(cause.seconds) >= _SEEN * explanation.measured_seconds
        adds = ("-" if cause.seconds < 0 else "+") + duration(abs(cause.seconds))
        table.add_row(cause.words, adds if is_seen else "0", duration(max(0.0, now)))
    return table


_SOURCE = {"measured": "measured before", "flops": "assumed: FLOPs", "assumed": "assumed"}


def _kind_table(kinds: Sequence[KindTimes]) -> Table:
    table = _table(
        "One pass or message of each kind, on average",
        "",
        "planned by",
        "number",
        "planned",
        "measured",
        "ratio",
        left=2,
    )
    for row in kinds:
        table.add_row(
            row.name,
            _SOURCE[row.source],
            f"{row.count:,}",
            duration(row.planned),
            "not timed" if row.measured is None else duration(row.measured),
            "" if row.ratio is None else f"{row.ratio:.2f}",
        )
    return table


def _rank_table(explanation: Explanation) -> Table:
    table = _table(
        "Seconds of each rank",
        "rank",
        "passes\nplanned",
        "passes\nmeasured",
        "against\nothers",
        "waiting\nplanned",
        "waiting\nmeasured",
        "between",
        left=0,
    )
    is_shared = explanation.on_processor < 1
    for row in _shown_ranks(explanation.ranks):
        mark = " slow" if row.is_slow else ""
        table.add_row(
            f"{row.rank}",
            duration(row.planned),
            duration(row.measured),
            "" if is_shared and row.between is None else f"{row.slowness:.2f}{mark}",
            *(
                "" if seconds is None else duration(round(seconds, 7))
                for seconds in (row.planned_waiting, row.measured_waiting, row.between)
            ),
        )
    return table


def _shown_ranks(ranks: Sequence[ExplainedRank]) -> list[ExplainedRank]:
    """Return the slowest ranks, in order, if there are too many to show all."""
    slowest = sorted(ranks, key=lambda row: -row.slowness)[:_SHOWN_RANKS]
    return sorted(slowest, key=lambda row: row.rank)


def _what_if_table(explanation: Explanation) -> Table:
    table = _table("What the step would take, by simulation", "", "step", "")
    for found in explanation.shown_what_ifs:
        table.add_row(found.words, duration(found.seconds), _percent(found.seconds, explanation))
    if not explanation.shown_what_ifs:
        table.add_row("nothing of what is known would make it shorter", "", "")
    return table


def _percent(seconds: float, explanation: Explanation) -> str:
    return f"{seconds / explanation.measured_seconds - 1:+.0%}"


def _comparison_words(comparison: Comparison) -> str:
    own = comparison.own
    words = f"with these times {own.schedule} with {own.vocab} is simulated at"
    words = f"{words} {duration(own.seconds)} and {human_bytes(own.peak_bytes)} of activations"
    if (best := comparison.fastest) is own:
        return f"{words}; no other schedule is faster"
    return (
        f"{words}, {best.schedule} with {best.vocab}, the fastest of {len(comparison.others)}, at "
        f"{duration(best.seconds)} and {human_bytes(best.peak_bytes)}"
    )
