"""Predict peak memory and MFU of the published 8 x A100 runs of arXiv 2411.05288.

    python benchmarks/plan_published.py [--json FILE]

Only the shapes of the models are used, and no pass time of any run.

MFU: passes run at the `efficiency` of cluster=a100_80g_node, so the predictions are those of
vp-plan.  The efficiency was fitted to one of these runs, vocab-2 with V = 128,000.  The result of a
new fit is printed for comparison.  The other 19 runs follow from layers, vocabulary, schedule and
links.  MFU is relative to 320 TFLOP/s as in the paper, while vp-plan uses 312.

Memory is predicted in two ways, with nothing fitted.  `vp-plan` is what this trainer would keep, in
float16.  `as theirs` is what the published implementation keeps: 16 bytes per parameter (fp16
weights and gradients, fp32 master copy and moments), 34 s b h bytes of activations per layer, and
the fp32 softmax of a shard from S to T.  Our simulation gives the number of microbatches held.
If a method does not divide the output layer, it is part of F and B there, and one microbatch of it
is held: fp16 logits, their fp32 copy and an fp32 softmax.
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
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

PEAK = 3.2e14  # FLOPs per second, on which the published MFU is based
CALIBRATED = ("vocab-2", 128_000)
STATE = StateBytes(weights=2, gradients=2, optimizer=12)
LOGIT_BYTES, UNDIVIDED_LOGIT_BYTES = 4, 2 + 4 + 4  # per token and row


@dataclass(frozen=True)
class Row:
    """One published run and the predictions for it.  Errors are relative to the measurement.

    `plan_gib` is predicted by vp-plan, and `plan_parts` are its parts in GiB.  `predicted_gib`
    counts memory as the published implementation does.
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
    """Return the configuration of a published run for this trainer."""
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
    """Return the simulated step and its report."""
    degrees = Degrees(1, config.parallel.pp or 1, 1)
    cost = on_cluster(Workload.of(config, degrees), config.cluster, config.cost)
    step = plan_step(replace(config, cost=cost), degrees.num_ranks)
    return step, report_of(step, config.cluster, config.optim)


def peak_gib(config: RunConfig, step: StepPlan) -> float:
    """Return the peak of the worst rank in GiB, counted as the published implementation does."""
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
        peaks.append(rank_memory(step, config.optim, rank, STATE).state + kept + undivided)
    return max(peaks) / 2**30


def calibrate(row: dict[str, Any]) -> float:
    """Return the efficiency with which the predicted MFU of `row` equals the published one.

    Nearly all of the time is inversely proportional to it, so four proportional steps suffice.
    """
    efficiency = 0.5
    for _ in range(4):
        _, report = planned(config_of(row, efficiency))
        efficiency *= row["paper_table5"]["mfu_pct"] / (100 * report.mfu)
    return efficiency


def shipped_efficiency() -> float:
    """Return the efficiency of cluster=a100_80g_node, relative to PEAK."""
    node = load_config(["cluster=a100_80g_node"]).cluster
    return node.efficiency * node.float16_flops_per_second / PEAK


def predicted(run: dict[str, Any], efficiency: float) -> Row:
    """Return the predictions for one run."""
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
        f"of cluster=a100_80g_node: {shipped * PEAK / 1e12:.1f} TFLOP/s; "
        f"a fit gives {fitted * PEAK / 1e12:.1f}\n"
    )
    print(
        "| method | vocab | GiB measured | vp-plan | error | as theirs | error "
        "| MFU % measured | vp-plan | error |"
    )
    print("|---" * 10 + "|")
    rows = []
    for run in runs:
        row = predicted(run, shipped)
        rows.append(row)
        print(
            f"| {row.method} | {row.vocab:,} | {row.measured_gib:.2f} | {row.plan_gib:.2f} "
            f"| {row.plan_error:+.1%} | {row.predicted_gib:.2f} | {row.memory_error:+.1%} "
            f"| {row.measured_mfu_pct:.2f} | {row.predicted_mfu_pct:.2f} "
            f"| {row.mfu_error:+.1%} |",
            flush=True,
        )
    for name, some in (
        ("vocab-1 and vocab-2", [r for r in rows if r.method.startswith("vocab")]),
        ("all", rows),
    ):
        print(
            f"{name}: largest error of memory {max(abs(r.plan_error) for r in some):.1%}, "
            f"as theirs {max(abs(r.memory_error) for r in some):.1%}, "
            f"of MFU {max(abs(r.mfu_error) for r in some):.1%}"
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
