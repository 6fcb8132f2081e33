"""Predict peak memory and MFU of the published 8 x A100 runs of arXiv 2411.05288 from the shape of the model alone.

    python benchmarks/plan_published.py [--json FILE]

MFU: what passes reach is `efficiency` of cluster=a100_80g_node, so these are the figures of vp-plan.  It was fitted to one of
these runs, vocab-2 with V = 128,000, and what a fit gives now is printed beside it; the other 19 then follow from layers,
vocabulary, schedule and links.  No pass time of any run is used.  MFU is of 320 TFLOP/s, as published; vp-plan counts 312.

Memory is predicted twice, with nothing fitted:
`vp-plan`: what this trainer would keep, in float16.
`as theirs`: as the published implementation holds it: 16 bytes per parameter (fp16 weights and gradients, fp32 master copy and
moments), 34 s b h bytes of activations per layer, and from S to T the fp32 softmax of a shard.  How many of them are held is
our simulation.  An undivided output layer is a part of F and B there, so that of one microbatch is held: fp16 logits, their
fp32 copy and an fp32 softmax.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from provenance import provenance
from published import DATA, METHODS

from schedules.simulate import simulate
from schedules.vocab import End
from vp_train.config import RunConfig
from vp_train.planning.cluster import on_cluster
from vp_train.planning.degrees import Degrees
from vp_train.planning.memory import StateBytes, rank_memory
from vp_train.planning.plan import StepPlan, plan_step
from vp_train.planning.report import PlanReport, report_of
from vp_train.settings import load_config

PEAK = 3.2e14  # FLOPs per second that the published MFU counts with
CALIBRATED = ("vocab-2", 128_000)
STATE = StateBytes(weights=2, gradients=2, optimizer=12)
LOGIT_BYTES, UNDIVIDED_LOGIT_BYTES = 4, 2 + 4 + 4  # per token and row


@dataclass(frozen=True)
class Row:
    """One published run and what is predicted of it; errors relative to what was measured.

    `plan_gib` is that of vp-plan, and `plan_parts` what it consists of; `predicted_gib` counts as that implementation does.
    """

    method: str
    vocab: int
    measured_gib: float
    plan_gib: float
    plan_parts: dict[str, float]
    predicted_gib: float
    measured_mfu_pct: float
    predicted_mfu_pct: float

    @property
    def plan_error(self) -> float:
        return self.plan_gib / self.measured_gib - 1

    @property
    def memory_error(self) -> float:
        return self.predicted_gib / self.measured_gib - 1

    @property
    def mfu_error(self) -> float:
        return self.predicted_mfu_pct / self.measured_mfu_pct - 1


def config_of(row: dict[str, Any], efficiency: float) -> RunConfig:
    """The run as this trainer would be told."""
    schedule, vocab = METHODS[row["method"]]
    counts = ",".join(map(str, row["layers_per_stage"]))
    config = load_config(
        [
            "model=gpt_4b",
            "cluster=a100_80g_node",
            "run.dtype=float16",
            f"schedule={schedule}",
            f"vocab={vocab}",
            f"model.vocab_size={row['vocab']}",
            f"parallel.pp={row['pp']}",
            f"parallel.layers_per_stage=[{counts}]",
            f"num_microbatches={row['microbatches']}",
            f"micro_batch_size={row['micro_batch_size']}",
            f"cluster.float16_flops_per_second={PEAK}",
            f"cluster.efficiency={efficiency}",
        ]
    )
    shape = config.model
    assert (shape.num_layers, shape.hidden_size, shape.seq_length) == (
        row["layers"],
        row["hidden"],
        row["seq"],
    )
    return config


def planned(config: RunConfig) -> tuple[StepPlan, PlanReport]:
    """The simulated step and its report."""
    degrees = Degrees(1, config.parallel.pp or 1, 1)
    costed = on_cluster(config, degrees)
    step = plan_step(costed, degrees.num_ranks)
    return step, report_of(costed, step)


def peak_gib(config: RunConfig, step: StepPlan) -> float:
    """The peak of the worst rank as the published implementation holds things."""
    model = config.model
    tokens = config.micro_batch_size * model.seq_length
    activations = tuple(34.0 * tokens * model.hidden_size * len(stage) for stage in step.layers)
    sharded, rows = (
        step.problem.algorithm.sharded,
        [shard.num_rows for shard in step.shards[End.OUTPUT]],
    )
    held = tuple(float(LOGIT_BYTES * tokens * count) if sharded else 0.0 for count in rows)
    cost = replace(step.cost, stage_bytes=activations, shard_bytes=held)
    peaks = []
    for rank, kept in enumerate(simulate(step.schedule, step.problem, cost).peak_bytes):
        undivided = 0.0 if sharded else UNDIVIDED_LOGIT_BYTES * tokens * rows[rank]
        peaks.append(rank_memory(config, step, rank, STATE).state + kept + undivided)
    return max(peaks) / 2**30


def calibrate(row: dict[str, Any]) -> float:
    """The efficiency with which the MFU of `row` comes out: fixed seconds are few, so a few proportional steps suffice."""
    efficiency = 0.5
    for _ in range(4):
        _, report = planned(config_of(row, efficiency))
        efficiency *= row["paper_table5"]["mfu_pct"] / (100 * report.mfu)
    return efficiency


def shipped_efficiency() -> float:
    """That of cluster=a100_80g_node, of the peak that the published MFU counts with."""
    node = load_config(["cluster=a100_80g_node"]).cluster
    return node.efficiency * node.float16_flops_per_second / PEAK


def predicted(run: dict[str, Any], efficiency: float) -> Row:
    """What is predicted of one run."""
    config, paper = config_of(run, efficiency), run["paper_table5"]
    step, report = planned(config)
    memory = report.ranks[report.worst].memory
    parts = {name: value / 2**30 for name, value in asdict(memory).items() if name != "parameters"}
    return Row(
        run["method"],
        run["vocab"],
        paper["peak_mem_gib"],
        memory.total / 2**30,
        parts,
        peak_gib(config, step),
        paper["mfu_pct"],
        100 * report.mfu,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    arguments = parser.parse_args()
    runs = json.loads(DATA.read_text())["rows"]
    shipped, fitted = (
        shipped_efficiency(),
        calibrate(next(run for run in runs if (run["method"], run["vocab"]) == CALIBRATED)),
    )
    print(
        f"of cluster=a100_80g_node: {shipped * PEAK / 1e12:.1f} TFLOP/s; a fit gives {fitted * PEAK / 1e12:.1f}\n"
    )
    print(
        "| method | vocab | GiB measured | vp-plan | error | as theirs | error | MFU % measured | vp-plan | error |"
    )
    print("|---" * 10 + "|")
    rows = []
    for run in runs:
        row = predicted(run, shipped)
        rows.append(row)
        print(
            f"| {row.method} | {row.vocab:,} | {row.measured_gib:.2f} | {row.plan_gib:.2f} | {row.plan_error:+.1%} | "
            f"{row.predicted_gib:.2f} | {row.memory_error:+.1%} | {row.measured_mfu_pct:.2f} | {row.predicted_mfu_pct:.2f} | "
            f"{row.mfu_error:+.1%} |",
            flush=True,
        )
    for name, some in (
        ("vocab-1 and vocab-2", [r for r in rows if r.method.startswith("vocab")]),
        ("all", rows),
    ):
        print(
            f"{name}: largest error of memory {max(abs(r.plan_error) for r in some):.1%}, as theirs "
            f"{max(abs(r.memory_error) for r in some):.1%}, of MFU {max(abs(r.mfu_error) for r in some):.1%}"
        )
    if arguments.json:
        table = [
            asdict(r)
            | {"plan_error": r.plan_error, "memory_error": r.memory_error, "mfu_error": r.mfu_error}
            for r in rows
        ]
        result = provenance() | {
            "calibrated_on": f"{CALIBRATED[0]}, V = {CALIBRATED[1]:,}",
            "calibrated_flops_per_second": fitted * PEAK,
            "shipped_flops_per_second": shipped * PEAK,
            "rows": table,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
