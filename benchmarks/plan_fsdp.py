"""Compare a pipeline with vocabulary parallelism with FSDP: the same batch, the same H100 cluster.

    python benchmarks/plan_fsdp.py [--json FILE]

Both are planned, from the same physics; nothing is measured.  The batch is 4 M tokens.  FSDP is the
fastest of all micro-batch sizes, recomputations and tensor-parallel degrees of a node
(`planning.fsdp`).  The pipeline is the fastest found of 1F1B with one_barrier and ZeRO-1 over pp
(at least 2), tp and recomputation, with one sequence per microbatch; V-Half if that does not fit.
Splits that may fit are simulated in the order of a simple estimate until two fit or eight were
tried.  A step of more than 32 microbatches is that of 32, and for each more what one adds between
16 and 32.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from provenance import provenance

from vp_train.config import ConfigError, RunConfig
from vp_train.model import shape
from vp_train.planning.cluster import on_cluster, replica_seconds
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import layer_pass_seconds
from vp_train.planning.fsdp import FsdpReport, best_fsdp
from vp_train.planning.report import PlanReport, make_report
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

TOKENS = 1 << 22
MODELS = {"8B": "llama3_8b", "30B": "gpt_30b", "70B": "llama3_70b"}
# GPUs, and ports of a node that its eight GPUs share: all of 8 x 400 Gb/s, or one
CASES = ((8, 8), (64, 8), (512, 8), (64, 1), (512, 1))
SIMULATED = 32  # microbatches
FITTING, TRIED = 2, 8


@dataclass(frozen=True)
class Pipeline:
    """The fastest pipeline found: seconds, MFU, GiB of the worst rank, and how it is split."""

    seconds: float
    mfu: float
    gib: float
    words: str


def config_of(model: str, num_gpus: int, rails: int, *more: str) -> RunConfig:
    words = [
        f"model={model}",
        "cluster=h100_80g_node",
        f"cluster.num_nodes={num_gpus // 8}",
        f"cluster.rails={rails}",
    ]
    return load_config([*words, "optim.name=zero1", "vocab=one_barrier", *more])


def candidates(
    model: str, num_gpus: int, rails: int, sequences: int, schedules: tuple[str, ...]
) -> list[list[str]]:
    """Return the overrides of splits that are possible, the fastest by a simple estimate first."""
    found: list[tuple[float, list[str]]] = []
    base = config_of(model, num_gpus, rails)
    kinds = ("none", "full")
    for tp, pp, kind in itertools.product((1, 2, 4, 8), (2, 4, 8, 16), kinds):
        dp, rest = divmod(num_gpus, pp * tp)
        if rest or not dp or sequences % dp or sequences // dp < 1:
            continue
        count = sequences // dp
        for schedule in schedules:
            words = [
                f"parallel.tp={tp}",
                f"parallel.pp={pp}",
                f"parallel.dp={dp}",
                f"parallel.sequence_parallel={tp > 1}",
                f"parallel.recompute={kind}",
                f"schedule={schedule}",
                f"num_microbatches={count}",
            ]
            parallel = replace(base.parallel, tp=tp, sequence_parallel=tp > 1)
            work = Workload.of(replace(base, parallel=parallel), Degrees(dp, pp, tp))
            cost = on_cluster(work, base.cluster, base.cost)
            per_layer = layer_pass_seconds(work, cost, kind)
            fill = (pp - 1) * (0.5 if schedule == "v_half" else 1.0)
            one = per_layer * work.model.num_layers / pp
            # Both ends share a port, which C0 and C1b of every microbatch pass.
            moved = work.message_bytes + work.input_gradient_bytes
            one = max(one, moved / (cost.collective_bytes_per_second or 1e30))
            parameters = shape.num_parameters(work.model) / pp / tp
            kept = min(count, pp + 1) * work.layer_bytes(kind) * work.model.num_layers / pp
            if parameters * (2 + 4 + 12 / dp) + kept > base.cluster.memory_gib * 2**30:
                continue
            exchange = replica_seconds(work, base.cluster, base.optim, parameters)
            late = max(0.0, exchange.sums - one / 2) + max(0.0, exchange.gathers - one / 4)
            found.append(((count + fill) * one + late, words))
    return [words for _, words in sorted(found, key=lambda pair: pair[0])]


def planned(model: str, num_gpus: int, rails: int, words: list[str], count: int) -> PlanReport:
    return make_report(config_of(model, num_gpus, rails, *words, f"num_microbatches={count}"))


def best_pipeline(model: str, num_gpus: int, rails: int, sequences: int) -> Pipeline | None:
    """Return the fastest pipeline found, None if none fits."""
    best: Pipeline | None = None
    fitting = 0
    tried = [
        words
        for schedule in ("1f1b", "v_half")
        for words in candidates(model, num_gpus, rails, sequences, (schedule,))[:TRIED]
    ]
    for words in tried:
        count = int(words[6].partition("=")[2])
        try:
            report = planned(model, num_gpus, rails, words, min(count, SIMULATED))
            if not report.fits:
                continue
            seconds = report.step_seconds
            if count > SIMULATED:
                half = planned(model, num_gpus, rails, words, SIMULATED // 2)
                one = (report.passes - half.passes) / (SIMULATED - SIMULATED // 2)
                seconds += one * (count - SIMULATED)
        except ConfigError:
            continue
        fitting += 1
        flops = report.flops / report.work.num_microbatches * count
        found = Pipeline(
            seconds,
            flops / seconds / num_gpus / report.cluster.bfloat16_flops_per_second,
            report.ranks[report.worst].memory.total / 2**30,
            f"{report.degrees}, {report.schedule}, recompute {report.recompute}, m={count}",
        )
        if best is None or found.seconds < best.seconds:
            best = found
        if fitting == FITTING:
            break
    return best


def fsdp_of(model: str, num_gpus: int, rails: int, sequences: int) -> FsdpReport | None:
    config = config_of(model, num_gpus, rails)
    work = Workload.of(config, Degrees(num_gpus, 1, 1))
    report = best_fsdp(work, config.cluster, config.cost, config.optim, num_sequences=sequences)
    return report if report is not None and report.fits else None


def row_of(name: str, num_gpus: int, rails: int) -> dict[str, Any]:
    """Return the comparison of one model on one number of GPUs."""
    model = MODELS[name]
    sequences = TOKENS // load_config([f"model={model}"]).model.seq_length
    fsdp = fsdp_of(model, num_gpus, rails, sequences)
    pipeline = best_pipeline(model, num_gpus, rails, sequences)
    return {
        "model": name,
        "gpus": num_gpus,
        "rails": rails,
        "fsdp": None if fsdp is None else asdict(fsdp) | {"seconds": fsdp.seconds},
        "pipeline": None if pipeline is None else asdict(pipeline),
        "faster_pct": None
        if fsdp is None or pipeline is None
        else 100 * (fsdp.seconds / pipeline.seconds - 1),
    }


def show(row: dict[str, Any]) -> None:
    fsdp, pipeline, faster = row["fsdp"], row["pipeline"], row["faster_pct"]
    left, right = "does not fit | | | ", "does not fit | | | "
    if fsdp is not None:
        degrees = fsdp["degrees"]
        left = (
            f"{fsdp['seconds']:.2f} | {100 * fsdp['mfu']:.1f} | {fsdp['num_bytes'] / 2**30:.1f} "
            f"| tp={degrees['tp']}, micro-batch {fsdp['micro_batch_size']}, recompute "
            f"{fsdp['recompute']}, exposed {100 * fsdp['exposed'] / fsdp['seconds']:.0f} %"
        )
    if pipeline is not None:
        right = (
            f"{pipeline['seconds']:.2f} | {100 * pipeline['mfu']:.1f} | {pipeline['gib']:.1f} "
            f"| {pipeline['words']}"
        )
    gain = "" if faster is None else f"{faster:+.0f} %"
    print(
        f"| {row['model']} | {row['gpus']} | {row['rails']} | {left} | {right} | {gain} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    arguments = parser.parse_args()
    print(
        "| model | GPUs | ports | FSDP s | MFU % | GiB | how | pipeline s | MFU % | GiB | how "
        "| FSDP takes longer by |"
    )
    print("|---" * 12 + "|")
    rows = []
    for name, (num_gpus, rails) in itertools.product(MODELS, CASES):
        rows.append(row_of(name, num_gpus, rails))
        show(rows[-1])
    if arguments.json:
        result = provenance() | {"tokens": TOKENS, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
