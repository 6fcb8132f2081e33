"""The command `vp-profile`: measure single ranks of a job and predict the whole job.

It prints the measurements and the prediction, and writes the measured costs as settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from schedules.ir import Kind
from schedules.render import duration
from schedules.vocab import End
from vp_train.commands.command import (
    OF_A_STEP,
    Command,
    cost_output_of,
    output_of,
    run,
    whole_number,
    write_costs,
)
from vp_train.config import ConfigError, RunConfig
from vp_train.config.typed import shell_word
from vp_train.durable import write_output
from vp_train.failures import EXIT_OK
from vp_train.planning.memory import host_bytes, machine_bytes, rank_memory
from vp_train.planning.plan import StepPlan, plan_step
from vp_train.planning.report import PlanReport, make_report
from vp_train.profile.costs import (
    ALONE,
    RankProfile,
    cost_text,
    device_rates,
    measured_cost,
    with_cost,
)
from vp_train.units import count_words, human_bytes

_SHOWN = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.S, Kind.T, Kind.E, Kind.G)


_EXAMPLES = """\
  vp-profile cluster=laptop parallel.pp=4 num_microbatches=8
  vp-profile model=gpt_4b cluster=h100_80g_node num_microbatches=32 --ranks 0,3,7 --cost h100.yaml
  vp-plan model=gpt_4b cluster=h100_80g_node num_microbatches=128 cost=h100.yaml"""


def main() -> None:
    """Run `vp-profile`: measure passes and bytes of single ranks and predict the whole job."""
    options = {
        "--ranks": ("0,3,...", "pipeline ranks to measure; default: all"),
        "--steps": ("N", "steps of each rank (3)"),
        "--cost": ("FILE.yaml", "write the costs there, for cost=FILE"),
        "--device": ("FILE.yaml", "write its rates there: cost=FILE plans other models"),
        "--json": ("FILE", "write everything there"),
    }
    purpose = "measures ranks of a job one by one on this machine"
    run(Command("vp-profile", purpose, _profile, _EXAMPLES, options, OF_A_STEP))


def _profile(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    steps = whole_number(options, "--steps", 3)
    cost, device = (
        cost_output_of(name, options[name]) if name in options else None
        for name in ("--cost", "--device")
    )
    record = output_of("--json", options["--json"]) if "--json" in options else None
    files = [path.resolve() for path in (cost, device, record) if path is not None]
    if len(set(files)) < len(files):
        raise ConfigError("--cost, --device and --json name one file twice; give each its own")
    show_profile(config, options.get("--ranks"), steps, cost, record, device_file=device)
    return EXIT_OK


def show_profile(
    config: RunConfig,
    ranks: str | None,
    num_steps: int,
    cost_file: Path | None,
    json_file: Path | None,
    *,
    device_file: Path | None = None,
) -> None:
    """Measure `ranks`, print the results and write them.

    `ranks` is a list with commas as typed, or None for all.  `cost_file` gets the measured costs as
    settings, `device_file` the rates of the device, `json_file` everything.  Raises ConfigError,
    which names the value and the way out.
    """
    make_report(config)  # raises ConfigError if the run is not possible
    if device_file is not None and config.run.linear_dtype == "float8":
        raise ConfigError(
            "--device measures products in run.dtype, from which those in float8 do not follow; "
            "drop run.linear_dtype=float8: plans with these rates take float8 into account"
        )
    num_ranks = config.cluster.num_gpus
    step = plan_step(config, num_ranks)
    chosen = _chosen(ranks, step.num_ranks)
    if config.run.device == "cpu":
        _check_memory(config, step, chosen)
    from vp_train.profile.measure import device_words, measure_ranks

    words = device_words(config)
    print(
        f"{words['device']}, {words['dtype']}: ranks {', '.join(map(str, chosen))} "
        f"of {step.degrees}, one after the other{_same_job(config, step)}",
        flush=True,
    )
    profiles: list[RankProfile] = []
    passes: dict[tuple[Kind, int], float] = {}
    for profile in measure_ranks(config, num_ranks, chosen, num_steps):
        profiles.append(profile)
        passes |= profile.passes
        seconds = ", ".join(
            f"{kind} {duration(profile.of(kind))}" for kind in _SHOWN if profile.of(kind)
        )
        print(f"rank {profile.rank}: {seconds}", flush=True)
        if config.run.device == "cuda" and not profile.is_real:
            values = ", ".join(f"{name} {value:.2g}" for name, value in profile.deviations.items())
            print(
                f"warning: rank {profile.rank} computed with values that no run has (standard "
                f"deviations {values}), and a GPU does so faster: do not trust its times",
                flush=True,
            )
    shared = min(profile.on_processor for profile in profiles)
    note = f"passes had a processor for {shared:.0%} of their time" if shared < ALONE else ""
    cost = measured_cost(step, passes) | {"measured_on": words["device"]}
    report = make_report(with_cost(config, cost))
    _print(config, step, profiles, report)
    if note:
        print(
            f"warning: {note}, and other programs for the rest: only that part counts in the "
            "costs, which may still be too high; repeat on an idle machine",
            flush=True,
        )
    if cost_file is not None:
        _write_cost(cost_file, config, words, cost, note)
    if device_file is not None:
        _write_rates(device_file, config, step, words, cost)
    if json_file is not None:
        record = words | {
            "ranks": [_record(config, step, profile) for profile in profiles],
            "cost": cost,
        }
        write_output(
            json_file, json.dumps(record | {"predicted": report.record()}, indent=1) + "\n"
        )


def _same_job(config: RunConfig, step: StepPlan) -> str:
    """Say what profiles one replica, if the number of replicas comes from the cluster alone."""
    if config.parallel.dp is not None or step.degrees.dp == 1:
        return ""
    num_ranks = step.degrees.num_ranks // step.degrees.dp
    return (
        f"; {step.degrees.dp} replicas, since the cluster has {step.degrees.num_ranks} GPUs: "
        f"cluster.num_nodes=1 cluster.gpus_per_node={num_ranks} is the job that vp-train starts "
        "without torchrun"
    )


def _check_memory(config: RunConfig, step: StepPlan, chosen: Sequence[int]) -> None:
    """Raise ConfigError if one of the ranks needs more memory than this machine has."""
    there = machine_bytes()
    needs, rank = max((rank_memory(step, config.optim, rank).total, rank) for rank in chosen)
    if needs > there:
        raise ConfigError(
            f"rank {rank} takes {human_bytes(needs)}, and this machine has {human_bytes(there)}; "
            "choose a smaller model, more stages or other --ranks"
        )


def _chosen(ranks: str | None, num_ranks: int) -> list[int]:
    """Return the ranks in a list with commas, sorted; all for None.  Raises ConfigError."""
    if ranks is None:
        return list(range(num_ranks))
    try:
        chosen = sorted({int(word) for word in ranks.split(",")})
    except ValueError:
        raise ConfigError(
            f"--ranks={ranks} is not a list of ranks; write for example --ranks 0,{num_ranks - 1}"
        ) from None
    if not set(chosen) <= set(range(num_ranks)):
        raise ConfigError(f"--ranks={ranks}: name some of ranks 0 to {num_ranks - 1}")
    return chosen


def _print(
    config: RunConfig, step: StepPlan, profiles: list[RankProfile], report: PlanReport
) -> None:
    """Print a table of the measured ranks, and the prediction for the whole job."""
    table = Table(box=None, pad_edge=False, header_style="")
    for head in (
        "rank",
        "layers",
        "V rows",
        "passes",
        "their sum",
        "optimizer",
        "state",
        "peak",
        "predicted",
        "error",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for profile in profiles:
        predicted = _peak_bytes(config, step, profile.rank)
        table.add_row(
            str(profile.rank),
            str(sum(map(len, step.layers_of_ranks[profile.rank]))),
            f"{step.shards[End.OUTPUT][profile.rank].num_rows:,}",
            duration(profile.program_seconds),
            duration(_summed(config, profile)),
            duration(profile.optimizer_seconds),
            human_bytes(profile.state_bytes),
            human_bytes(profile.peak_bytes),
            human_bytes(predicted),
            f"{predicted / profile.peak_bytes - 1:+.1%}",
        )
    Console(width=110).print(table, highlight=False)
    print("passes: a step timed as a whole; their sum: the median of each pass, added up")
    print(
        f"predicted for {count_words(report.degrees.num_ranks, 'rank')}: "
        f"a step of {duration(report.step_seconds)}, "
        f"{report.num_tokens / report.step_seconds:,.0f} tokens/s, {report.rate_words}; "
        f"mean bubble {report.bubble:.1%}"
    )


def _peak_bytes(config: RunConfig, step: StepPlan, rank: int) -> float:
    """Return the predicted peak of a rank; on a CPU what goes to the host is in the same memory."""
    own = rank_memory(step, config.optim, rank).total
    return own + host_bytes(step, config.optim, rank).total * (config.run.device == "cpu")


def _summed(config: RunConfig, profile: RankProfile) -> float:
    """Return the seconds of all passes of a step, from their medians."""
    return config.num_microbatches * sum(profile.passes.values())


def _record(config: RunConfig, step: StepPlan, profile: RankProfile) -> dict[str, Any]:
    passes = {f"{kind}{stage}": seconds for (kind, stage), seconds in profile.passes.items()}
    return asdict(profile) | {
        "passes": passes,
        "predicted_peak_bytes": _peak_bytes(config, step, profile.rank),
    }


def _write_cost(
    path: Path,
    config: RunConfig,
    words: Mapping[str, Any],
    cost: Mapping[str, float | str],
    note: str,
) -> None:
    model = config.model
    comments = [
        f"Measured by vp-profile on {words['device']}, torch {words['torch']}",
        f"{config.micro_batch_size} x {model.seq_length} tokens, "
        f"hidden size {model.hidden_size}, V = {model.vocab_size}",
        *([note] if note else []),
    ]
    written = write_costs(path, cost_text(comments, cost))
    print(f"{written}; vp-plan and vp-simulate take them as {shell_word('cost', str(path))}")


def _write_rates(
    path: Path,
    config: RunConfig,
    step: StepPlan,
    words: Mapping[str, Any],
    cost: Mapping[str, float | str],
) -> None:
    """Measure the rates of the device and write them.  Raises ConfigError without a layer."""
    from vp_train.profile.device import forward_seconds, num_multiprocessors

    if "layer_forward_seconds" not in cost:
        raise ConfigError("--device needs a rank with layers; add one to --ranks")
    products, attention = forward_seconds(step.work)
    rates = device_rates(
        step.work,
        cost,
        products=products,
        attention=attention,
        kernel_seconds=config.cluster.kernel_seconds,
        multiprocessors=num_multiprocessors(step.work),
    )
    comment = f"Rates measured by vp-profile on {words['device']}, torch {words['torch']}"
    write_output(path, cost_text([comment], rates | {"measured_on": words["device"]}))
    print(f"rates written to {path}; vp-plan plans any model with {shell_word('cost', str(path))}")
