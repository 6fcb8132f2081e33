"""Predict peak memory and MFU of the published 8 x A100 runs of arXiv 2411.05288 from the shape of the model alone.

    python benchmarks/plan_published.py [--json FILE]

One figure is calibrated, on one run: the share of 320 TFLOP/s (the peak that the published MFU counts with) that passes reach
is set so that the MFU of vocab-2 with V = 128,000 comes out.  The other 19 runs then follow from layers, vocabulary, schedule
and links; no pass time of any run is used.  `shipped` is the same with nothing fitted to an iteration: the efficiency of
cluster=a100_80g_node, which comes from the time of a published layer.

Memory is counted as the published implementation holds it, not ours: 16 bytes per parameter (fp16 weights and gradients, fp32
master copy and moments), 34 s b h bytes of activations per layer, and from S to T the fp32 softmax of a shard.  How many of
them are held is our simulation.  An undivided output layer is a part of F and B there, so that of one microbatch is held:
fp16 logits, their fp32 copy and an fp32 softmax.  Nothing is calibrated.
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
from vp_train.cli import load_config
from vp_train.config import RunConfig
from vp_train.degrees import Degrees
from vp_train.plan import StepPlan, plan_step
from vp_train.planner.cluster import on_cluster
from vp_train.planner.memory import StateBytes, rank_memory
from vp_train.planner.report import PlanReport, report_of

PEAK = 3.2e14  # FLOPs per second that the published MFU counts with
CALIBRATED = ("vocab-2", 128_000)
STATE = StateBytes(weights=2, gradients=2, optimizer=12)
LOGIT_BYTES, UNDIVIDED_LOGIT_BYTES = 4, 2 + 4 + 4  # per token and row


@dataclass(frozen=True)
class Row:
    """One published run and what is predicted of it; errors relative to what was measured."""

    method: str
    vocab: int
    measured_gib: float
    predicted_gib: float
    measured_mfu_pct: float
    predicted_mfu_pct: float
    shipped_mfu_pct: float

    @property
    def memory_error(self) -> float:
        return self.predicted_gib / self.measured_gib - 1

    @property
    def mfu_error(self) -> float:
        return self.predicted_mfu_pct / self.measured_mfu_pct - 1

    @property
    def shipped_error(self) -> float:
        return self.shipped_mfu_pct / self.measured_mfu_pct - 1


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
    assert (shape.num_layers, shape.hidden_size, shape.seq_length) == (row["layers"], row["hidden"], row["seq"])
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
    sharded, rows = step.problem.algorithm.sharded, [shard.num_rows for shard in step.shards[End.OUTPUT]]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    arguments = parser.parse_args()
    runs = json.loads(DATA.read_text())["rows"]
    efficiency = calibrate(next(row for row in runs if (row["method"], row["vocab"]) == CALIBRATED))
    node = load_config(["cluster=a100_80g_node"]).cluster
    shipped = node.efficiency * node.float16_flops_per_second / PEAK
    print(f"calibrated: {efficiency * PEAK / 1e12:.1f} TFLOP/s; shipped: {shipped * PEAK / 1e12:.1f}\n")
    print("| method | vocab | GiB measured | predicted | error | MFU % measured | predicted | error | shipped | error |")
    print("|---" * 10 + "|")
    rows = []
    for run in runs:
        config, paper = config_of(run, efficiency), run["paper_table5"]
        step, report = planned(config)
        _, unfitted = planned(config_of(run, shipped))
        row = Row(
            run["method"],
            run["vocab"],
            paper["peak_mem_gib"],
            peak_gib(config, step),
            paper["mfu_pct"],
            100 * report.mfu,
            100 * unfitted.mfu,
        )
        rows.append(row)
        print(
            f"| {row.method} | {row.vocab:,} | {row.measured_gib:.2f} | {row.predicted_gib:.2f} | {row.memory_error:+.1%} | "
            f"{row.measured_mfu_pct:.2f} | {row.predicted_mfu_pct:.2f} | {row.mfu_error:+.1%} | {row.shipped_mfu_pct:.2f} | "
            f"{row.shipped_error:+.1%} |",
            flush=True,
        )
    for name, some in (("vocab-1 and vocab-2", [r for r in rows if r.method.startswith("vocab")]), ("all", rows)):
        print(
            f"{name}: largest error of memory {max(abs(r.memory_error) for r in some):.1%}, of MFU "
            f"{max(abs(r.mfu_error) for r in some):.1%}, shipped {max(abs(r.shipped_error) for r in some):.1%}"
        )
    if arguments.json:
        table = [
            asdict(r) | {"memory_error": r.memory_error, "mfu_error": r.mfu_error, "shipped_error": r.shipped_error}
            for r in rows
        ]
        result = provenance() | {
            "calibrated_on": f"{CALIBRATED[0]}, V = {CALIBRATED[1]:,}",
            "calibrated_flops_per_second": efficiency * PEAK,
            "shipped_flops_per_second": shipped * PEAK,
            "rows": table,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
