"""Predict memory and MFU of published runs, and fit the constants of one device on some of them.

    python benchmarks/plan_published.py [--json FILE]

Constants are fitted only on the pass times of benchmarks/data/a100_8gpu_s2048.json (8 x A100, arXiv
2411.05288).  Two are those of cluster=a100_80g_node: the part of the peak that large matrix
products reach, and the part by which layers take longer beside the collectives of a sharded
vocabulary.  The others are of the published implementation: the bytes that it moves per logit, the
fixed time of its S and T, and its lookups.  A prediction without a method takes constants that were
fitted without the runs of that method.  cluster=h100_80g_node has constants of our own measurements
of one H100 (benchmarks/results/gpu_check_nvidia_h100_80gb_hbm3_third.json).

One more constant of each cluster, `sustained`, says by what whole runs of many GPUs are slower than
kernels alone.  On A100 it is what published.py misses when it simulates the pass times.  On H100 it
is fitted on Megatron-Core's runs; `fitted on others` has the one of the other sources.

MFU of the 20 runs is predicted in two ways.  `vp-plan` is this trainer.  `as theirs` has the
published implementation's bytes per logit and fp16 gradients.  MFU is relative to 320 TFLOP/s as in
the paper, while vp-plan uses 312.

Memory is predicted in two ways, with nothing fitted.  `vp-plan` is what this trainer would keep, in
float16.  `as theirs` is what the published implementation keeps: 16 bytes per parameter (fp16
weights and gradients, fp32 master copy and moments), 34 s b h bytes of activations per layer, and
the fp32 softmax of a shard from S to T.  Our simulation gives the number of microbatches held.
If a method does not divide the output layer, it is part of F and B there, and one microbatch of it
is held: fp16 logits, their fp32 copy and an fp32 softmax.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from provenance import provenance
from published import DATA, METHODS

from schedules.simulate import simulate
from schedules.vocab import End
from vp_train.config import CostConfig, RunConfig
from vp_train.planning.cluster import on_cluster, with_rates
from vp_train.planning.degrees import Degrees
from vp_train.planning.fsdp import fsdp_step
from vp_train.planning.memory import StateBytes, rank_memory
from vp_train.planning.physics import Device, layer_seconds, output_seconds, terms_seconds
from vp_train.planning.plan import StepPlan, draft_step, plan_step
from vp_train.planning.report import PlanReport, make_report, report_of
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

PEAK = 3.2e14  # FLOPs per second, on which the published MFU is based
STATE = StateBytes(weights=2, gradients=2, optimizer=12)
LOGIT_BYTES, UNDIVIDED_LOGIT_BYTES = 4, 2 + 4 + 4  # held per token and row
FP16 = 2
UNDIVIDED, SHARDED = ("baseline", "redis"), ("vocab-1", "vocab-2")
FAMILY = {  # of the paper, by hidden size: schedule and GPUs
    "gpt_4b": ("1f1b", 8),
    "gpt_7b": ("v_half", 16),
    "gpt_10b": ("1f1b", 16),
    "gpt_16b": ("v_half", 24),
    "gpt_21b": ("1f1b", 32),
    "gpt_30b": ("v_half", 32),
}


@dataclass(frozen=True)
class Constants:
    """The fitted constants; see the head of this file."""

    efficiency: float
    contention: float
    logit_bytes: float
    output_seconds: float
    lookup_seconds: float
    lookup_grad_seconds: float
    lookup_grad_row_seconds: float


@dataclass(frozen=True)
class Row:
    """One published run and the predictions for it.  Errors are relative to the measurement.

    `plan_mfu_pct` is predicted by vp-plan, and `plan_gib` too, but with passes as long as theirs,
    because the order of the passes depends on that.  `plan_parts` are its parts in GiB.  The others
    count as the published implementation does.  `without_mfu_pct` has constants that were fitted
    without the runs of this method.
    """

    method: str
    vocab: int
    measured_gib: float
    plan_gib: float
    plan_parts: dict[str, float]
    predicted_gib: float
    measured_mfu_pct: float
    plan_mfu_pct: float
    predicted_mfu_pct: float
    without_mfu_pct: float

    @property
    def plan_error(self) -> float:
        return self.plan_gib / self.measured_gib - 1

    @property
    def fp16_gradients_error(self) -> float:
        """The error of vp-plan if it counted gradients in fp16, as the published program has."""
        gib = self.plan_gib - self.plan_parts["gradients"] / 2
        return gib / self.measured_gib - 1

    @property
    def memory_error(self) -> float:
        return self.predicted_gib / self.measured_gib - 1

    @property
    def mfu_error(self) -> float:
        return self.predicted_mfu_pct / self.measured_mfu_pct - 1

    @property
    def without_error(self) -> float:
        return self.without_mfu_pct / self.measured_mfu_pct - 1


# The fit


@functools.cache
def node() -> RunConfig:
    """Return a run of gpt_4b in float16 on the A100 node."""
    return load_config(["cluster=a100_80g_node", "model=gpt_4b", "run.dtype=float16"])


def device_with(efficiency: float) -> Device:
    """Return an A100 whose large products reach this part of the peak."""
    cluster = replace(node().cluster, efficiency=efficiency)
    return Device.of(with_rates(CostConfig(), cluster, "float16", alone=True))


def published_layer(config: RunConfig, efficiency: float) -> tuple[float, float]:
    """Return the seconds of F and B of one layer whose gradients are fp16."""
    model = config.model
    found = layer_seconds(
        device_with(efficiency),
        model,
        config.micro_batch_size * model.seq_length,
        item_bytes=FP16,
        sum_bytes=FP16,
        compiled=True,
    )
    return found.forward, found.input_grad + found.weight_grad


def layer_times(runs: Sequence[dict[str, Any]], kind: str, methods: Sequence[str]) -> list[float]:
    """Return the seconds per layer of the passes of a kind, of stages without other layers."""
    inner = slice(1, -1)
    return [
        seconds * 1e-6 / count
        for run in runs
        if run["method"] in methods
        for seconds, count in zip(
            run["pass_times_us"][kind][inner], run["layers_per_stage"][inner], strict=True
        )
    ]


def solved(wanted: float, value: Callable[[float], float], low: float, high: float) -> float:
    """Return where the falling function `value` is `wanted`, by halving."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) > wanted else (low, middle)
    return (low + high) / 2


def fit(runs: Sequence[dict[str, Any]]) -> Constants:
    """Fit the constants on pass times.

    efficiency: from F + B of a layer where no vocabulary is near.
    contention: from F + B of a layer beside a sharded vocabulary.
    logit_bytes, output_seconds: from the line of S + T over the rows of a shard.
    lookups: the median of E, and the line of G over the rows of the vocabulary.
    """
    config = node()
    alone = sum(median(layer_times(runs, kind, UNDIVIDED)) for kind in "FB")
    beside = sum(median(layer_times(runs, kind, SHARDED)) for kind in "FB")
    efficiency = solved(alone, lambda value: sum(published_layer(config, value)), 0.3, 1.0)
    device, hidden, tokens = device_with(efficiency), config.model.hidden_size, runs[0]["seq"]
    sharded = [run for run in runs if run["method"] in SHARDED]
    rest, grads = [], []
    for run in sharded:
        rows = run["vocab"] // run["pp"]
        taken = median(run["pass_times_us"]["TS"]) * 1e-6
        rest.append(
            (rows, taken - output_seconds(device, tokens, hidden, rows, FP16, logit_bytes=0.0))
        )
        grads.append((run["vocab"], median(run["pass_times_us"]["IB"]) * 1e-6))
    fixed, per_row = line(rest)
    grad_fixed, grad_row = line(grads)
    fixed += terms_seconds(device, tokens, hidden, FP16)  # is in `output_seconds`
    return Constants(
        efficiency,
        beside / alone - 1,
        per_row * device.bytes_per_second / tokens,
        fixed,
        median(median(run["pass_times_us"]["IF"]) for run in sharded) * 1e-6,
        grad_fixed,
        grad_row,
    )


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return intercept and slope of the least-squares line."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return mean_y - slope * mean_x, slope


# Predictions


def config_of(row: dict[str, Any]) -> RunConfig:
    """Return the configuration of a published run of the paper for this trainer."""
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
        ]
    )
    shape = config.model
    assert (shape.num_layers, shape.hidden_size, shape.seq_length) == (
        row["layers"],
        row["hidden"],
        row["seq"],
    )
    return config


def theirs(config: RunConfig, constants: Constants) -> RunConfig:
    """Return `config` with the pass times that the constants give the published implementation.

    A schedule whose passes wait for the collectives has nothing beside them.
    """
    model, tokens = config.model, config.micro_batch_size * config.model.seq_length
    sharded = config.vocab.algorithm != "none" and config.schedule.name != "interlaced"
    slower = (1 + constants.contention if sharded else 1.0) / config.cluster.sustained
    forward, backward = published_layer(config, constants.efficiency)
    device = device_with(constants.efficiency)
    # The line of products over rows; the fixed part is the published implementation's.
    whole, half = (
        output_seconds(
            device, tokens, model.hidden_size, rows, FP16, logit_bytes=constants.logit_bytes
        )
        for rows in (model.vocab_size, model.vocab_size // 2)
    )
    per_row = (whole - half) / (model.vocab_size / 2) / config.cluster.sustained
    cost = replace(
        config.cost,
        layer_forward_seconds=slower * forward,
        layer_backward_seconds=slower * backward,
        layer_input_grad_seconds=slower * backward / 2,
        layer_weight_grad_seconds=slower * backward / 2,
        output_row_seconds=per_row,
        output_fixed_seconds=constants.output_seconds,
        lookup_seconds=constants.lookup_seconds,
        lookup_grad_seconds=constants.lookup_grad_seconds
        + model.vocab_size * constants.lookup_grad_row_seconds,
    )
    return replace(config, cost=cost)


def planned(config: RunConfig, like: StepPlan | None = None) -> tuple[StepPlan, PlanReport]:
    """Return the simulated step and its report.

    The order of `like` is taken if it is given, which saves the time of finding one.
    """
    degrees = Degrees(1, config.parallel.pp or 1, 1)
    cost = on_cluster(Workload.of(config, degrees), config.cluster, config.cost)
    config = replace(config, cost=cost)
    if like is None:
        step = plan_step(config, degrees.num_ranks)
    else:
        step = draft_step(config, degrees.num_ranks).with_schedule(like.schedule)
    return step, report_of(step, config.cluster, config.optim, cost=cost)


def mfu_pct(report: PlanReport) -> float:
    """Return the MFU relative to PEAK in percent."""
    return 100 * report.flops / (report.step_seconds * report.degrees.num_ranks * PEAK)


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


def predicted(run: dict[str, Any], constants: Constants, without: Constants) -> Row:
    """Return the predictions for one run of the paper."""
    config, paper = config_of(run), run["paper_table5"]
    _, report = planned(config)
    step, found = planned(theirs(config, constants))
    memory = found.ranks[found.worst].memory
    parts = {name: value / 2**30 for name, value in asdict(memory).items() if name != "parameters"}
    return Row(
        method=run["method"],
        vocab=run["vocab"],
        measured_gib=paper["peak_mem_gib"],
        plan_gib=memory.total / 2**30,
        plan_parts=parts,
        predicted_gib=peak_gib(config, step),
        measured_mfu_pct=paper["mfu_pct"],
        plan_mfu_pct=mfu_pct(report),
        predicted_mfu_pct=mfu_pct(found),
        without_mfu_pct=mfu_pct(planned(theirs(config, without), step)[1]),
    )


def left_out(runs: Sequence[dict[str, Any]], method: str) -> Constants:
    """Return the constants of a fit without the runs of `method`."""
    return fit([run for run in runs if run["method"] != method])


def trend(constants: Constants) -> list[dict[str, Any]]:
    """Return predictions for the models of the paper with one_barrier, by hidden size.

    Its runs of V-Half may have had more microbatches, and longer sequences.
    """
    found = []
    cases = [
        (name, schedule, ranks, num_microbatches, seq_length)
        for name, (schedule, ranks) in FAMILY.items()
        for num_microbatches, seq_length in ((128, 2048), (256, 2048), (256, 4096))
        if schedule == "v_half" or num_microbatches == 128
    ]
    for name, schedule, ranks, num_microbatches, seq_length in cases:
        config = load_config(
            [
                f"model={name}",
                "cluster=a100_80g_node",
                f"cluster.num_nodes={ranks // 8}",
                "run.dtype=float16",
                f"schedule={schedule}",
                "vocab=one_barrier",
                f"parallel.pp={ranks}",
                f"num_microbatches={num_microbatches}",
                f"model.seq_length={seq_length}",
            ]
        )
        forward, _ = published_layer(config, constants.efficiency)
        per_layer = Workload.of(config, Degrees(1, ranks, 1)).layer_flops
        step, report = planned(theirs(config, constants))
        gap_in_its_memory = step.gap_in_its_memory()
        assert gap_in_its_memory is not None
        found.append(
            {
                "model": name,
                "hidden": config.model.hidden_size,
                "gpus": ranks,
                "schedule": schedule,
                "num_microbatches": num_microbatches,
                "seq_length": seq_length,
                "layer_pct": 100 * per_layer / forward / PEAK,
                "mfu_pct": mfu_pct(report),
                "at_bound_pct": mfu_pct(report) * report.passes / report.bound,
                "at_bound_of_its_memory_pct": mfu_pct(report) * (1 + gap_in_its_memory),
            }
        )
    return found


# Runs on which no constant of a layer was fitted

# What the published programs do otherwise than this trainer: attention of FlashAttention 2 or older
# reaches a third of an H100's peak (arXiv 2407.08608; of an A100's, a third over both directions is
# assumed, 0.38 in a forward), and their loss is not fused: the bytes per logit are those that were
# fitted on the paper's runs.
THEIRS = {"h100": "cluster.attention_efficiency=0.33", "a100": "cluster.attention_efficiency=0.38"}
# Their programs issue kernels with other software.
LAUNCH = "cluster.layer_launch_seconds=0"
HIDDEN_TENSOR = ["cluster.node_bytes_per_second=1e30", "cluster.node_seconds=0"]


@dataclass(frozen=True)
class Held:
    """A published run on which no constant of a layer was fitted.  MFU in percent.

    `plan_pct` is predicted by vp-plan, `predicted_pct` with what the published program does
    otherwise, and `other_pct` the same with cluster.sustained fitted on the other source of runs
    with this card.  `wanted` is the `sustained` with which the run is predicted as measured.
    `assumed` says what was not published.
    """

    source: str
    name: str
    hidden: int
    gpus: int
    measured_pct: float
    plan_pct: float
    predicted_pct: float
    other_pct: float
    wanted: float
    assumed: str

    @property
    def points(self) -> float:
        return self.predicted_pct - self.measured_pct

    @property
    def other_points(self) -> float:
        return self.other_pct - self.measured_pct


Predict = Callable[[list[str]], float | None]
"""Returns the MFU in percent with further overrides, None if the run does not fit."""


@dataclass(frozen=True)
class Published:
    """A published run: `predict` plans it, `theirs` is what its program does otherwise."""

    source: str
    name: str
    hidden: int
    gpus: int
    measured_pct: float
    predict: Predict
    theirs: list[str]
    assumed: str

    def slope(self, shipped: float) -> tuple[float, float]:
        """Return a and b of 1 / MFU = a + b / sustained, from two predictions."""
        one, two = (
            self.predict([*self.theirs, f"cluster.sustained={value}"]) for value in (shipped, 1.0)
        )
        if not one or not two:
            raise ValueError(f"{self.name} has no prediction")
        b = (1 / one - 1 / two) / (1 / shipped - 1)
        return 1 / two - b, b


def held_out(runs: Sequence[Published]) -> list[Held]:
    """Return the predictions for published runs of one card."""
    shipped = load_config([f"cluster={runs[0].source.split(', ')[1]}_80g_node"]).cluster.sustained
    lines = [run.slope(shipped) for run in runs]
    wanted = [b / (1 / run.measured_pct - a) for run, (a, b) in zip(runs, lines, strict=True)]
    found = []
    for run, (a, b), own in zip(runs, lines, wanted, strict=True):
        others = [
            value for one, value in zip(runs, wanted, strict=True) if one.source != run.source
        ]
        other = min(1.0, median(others))
        found.append(
            Held(
                run.source,
                run.name,
                run.hidden,
                run.gpus,
                run.measured_pct,
                run.predict([]) or 0.0,
                1 / (a + b / shipped),
                1 / (a + b / other),
                own,
                run.assumed,
            )
        )
    return found


def megatron_runs(logit_bytes: float) -> list[Published]:
    """Return the published weak scaling of Megatron-Core on H100.

    Neither micro-batch size nor chunks were published: four sequences without a pipeline, else one,
    and the most chunks up to eight that divide the layers of a rank.  Its tensor-parallel
    communication overlaps with products, which ours does in the backward only.
    """
    path = DATA.parent / "h100_megatron_s4096.json"
    data = json.loads(path.read_text())
    found = []
    for row in data["rows"]:
        size = 4 if row["pp"] == 1 else 1
        of_rank = row["layers"] // row["pp"]
        chunks = max((count for count in range(2, 9) if of_rank % count == 0), default=1)
        looped = row["pp"] > 1 and chunks > 1
        words = [
            *gpt_words(row["hidden"], row["layers"], row["heads"], data["seq"]),
            "cluster=h100_80g_node",
            LAUNCH,
            f"cluster.num_nodes={row['gpus'] // 8}",
            f"model.vocab_size={data['vocab']}",
            f"micro_batch_size={size}",
            f"num_microbatches={row['batch'] // data['dp'] // size}",
            f"parallel.tp={row['tp']}",
            f"parallel.pp={row['pp']}",
            f"parallel.dp={data['dp']}",
            f"parallel.sequence_parallel={row['tp'] > 1}",
            "optim.name=zero1",
            "vocab=none",
            *(["schedule=interleaved", f"schedule.num_chunks={chunks}"] if looped else []),
        ]
        found.append(
            Published(
                "Megatron-Core, h100",
                row["name"],
                row["hidden"],
                row["gpus"],
                100 * row["tflops"] / 989,
                functools.partial(pipeline_pct, words),
                [THEIRS["h100"], *HIDDEN_TENSOR, f"cost.logit_bytes={logit_bytes}"],
                f"micro-batch {size}" + (f", {chunks} chunks" if looped else ""),
            )
        )
    return found


def pipeline_pct(words: list[str], more: list[str]) -> float:
    return 100 * make_report(load_config([*words, *more])).mfu


def gpt_words(hidden: int, layers: int, heads: int, seq: int) -> list[str]:
    """Return the overrides of a GPT with layers like those of gpt_4b."""
    return [
        "model=gpt_4b",
        f"model.hidden_size={hidden}",
        f"model.num_layers={layers}",
        f"model.num_heads={heads}",
        f"model.num_query_groups={heads}",
        f"model.ffn_hidden_size={4 * hidden}",
        f"model.seq_length={seq}",
    ]


LLAMA = {
    "llama3_8b": ["model=llama3_8b"],
    "llama3_70b": ["model=llama3_70b"],
    "llama2_13b": [
        *("model=llama3_8b", "model.num_layers=40", "model.hidden_size=5120"),
        *("model.num_heads=40", "model.num_query_groups=40", "model.ffn_hidden_size=13824"),
        "model.vocab_size=32000",
    ],
    "llama2_70b": ["model=llama3_70b", "model.vocab_size=32000"],
}


def fsdp_runs(logit_bytes: float) -> list[Published]:
    """Return published runs of FSDP."""
    found = []
    for stem, source in (("fsdp_mpt", "MPT with FSDP"), ("fsdp_llama", "torchtitan FSDP")):
        data = json.loads((DATA.parent / f"{stem}.json").read_text())
        for row in data["rows"]:
            if stem == "fsdp_mpt":
                size = data["models"][row["model"]]
                words = gpt_words(size["hidden"], size["layers"], size["heads"], row["seq"])
                words += [f"model.vocab_size={data['vocab']}", "model.tied_embeddings=true"]
            else:
                words = [*LLAMA[row["model"]], f"model.seq_length={row['seq']}"]
            words += [
                f"cluster={row['gpu']}_80g_node",
                LAUNCH,
                f"cluster.num_nodes={row['gpus'] // 8}",
                f"micro_batch_size={row['micro_batch_size']}",
                f"num_microbatches={row.get('accumulation', 1)}",
            ]
            config = load_config(words)
            work = Workload.of(config, Degrees(row["gpus"], 1, 1))
            tokens = work.num_tokens * work.num_microbatches
            per_token = work.step_flops / tokens / config.cluster.bfloat16_flops_per_second
            found.append(
                Published(
                    f"{source}, {row['gpu']}",
                    f"{row['model']}, {row['seq']:,}",
                    config.model.hidden_size,
                    row["gpus"],
                    100 * row["tokens_per_second_per_gpu"] * per_token,
                    functools.partial(fsdp_pct, words, row["recompute"]),
                    [THEIRS[row["gpu"]], f"cost.logit_bytes={logit_bytes}"],
                    f"recomputation {row['recompute']}",
                )
            )
    return found


def fsdp_pct(words: list[str], recompute: str, more: list[str]) -> float:
    config = load_config([*words, *more])
    work = Workload.of(config, Degrees(config.cluster.num_gpus, 1, 1))
    report = fsdp_step(work, config.cluster, config.cost, config.optim, recompute=recompute)
    return 100 * report.mfu


# Output


def show_paper(rows: Sequence[Row]) -> None:
    print(
        "| method | vocab | GiB measured | vp-plan | error | as theirs | error "
        "| MFU % measured | vp-plan | as theirs | error | fitted without |"
    )
    print("|---" * 12 + "|")
    for row in rows:
        print(
            f"| {row.method} | {row.vocab:,} | {row.measured_gib:.2f} | {row.plan_gib:.2f} "
            f"| {row.plan_error:+.1%} | {row.predicted_gib:.2f} | {row.memory_error:+.1%} "
            f"| {row.measured_mfu_pct:.2f} | {row.plan_mfu_pct:.2f} "
            f"| {row.predicted_mfu_pct:.2f} | {row.mfu_error:+.1%} | {row.without_error:+.1%} |"
        )
    for name, some in (
        ("vocab-1 and vocab-2", [r for r in rows if r.method.startswith("vocab")]),
        ("all", rows),
    ):
        print(
            f"{name}: largest error of memory {max(abs(r.plan_error) for r in some):.1%}, "
            f"with gradients in fp16 {max(abs(r.fp16_gradients_error) for r in some):.1%}, "
            f"as theirs {max(abs(r.memory_error) for r in some):.1%}; "
            f"of MFU median {median(abs(r.mfu_error) for r in some):.1%}, "
            f"largest {max(abs(r.mfu_error) for r in some):.1%}; "
            f"fitted without the method {median(abs(r.without_error) for r in some):.1%}, "
            f"{max(abs(r.without_error) for r in some):.1%}"
        )


def show_held(rows: Sequence[Held]) -> None:
    print(
        "\n| source | run | hidden | GPUs | MFU % measured | vp-plan | as theirs | points "
        "| fitted on others | points | assumed |"
    )
    print("|---" * 11 + "|")
    for row in rows:
        print(
            f"| {row.source} | {row.name} | {row.hidden:,} | {row.gpus:,} "
            f"| {row.measured_pct:.1f} | {row.plan_pct:.1f} | {row.predicted_pct:.1f} "
            f"| {row.points:+.1f} | {row.other_pct:.1f} | {row.other_points:+.1f} "
            f"| {row.assumed} |"
        )
    for source in dict.fromkeys(row.source for row in rows):
        some = [row for row in rows if row.source == source]
        words = [
            f"{name} median of sizes {median(map(abs, points)):.1f}, "
            f"worst {max(points, key=abs):+.1f}"
            for name, points in (
                ("vp-plan", [row.plan_pct - row.measured_pct for row in some]),
                ("as theirs", [row.points for row in some]),
                ("fitted on others", [row.other_points for row in some]),
            )
        ]
        wanted = median(row.wanted for row in some)
        print(f"{source}: {len(some)} runs, sustained {wanted:.2f}; points: {'; '.join(words)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the tables as JSON")
    arguments = parser.parse_args()
    runs = json.loads(DATA.read_text())["rows"]
    fitted, cluster = fit(runs), node().cluster
    print(
        f"fitted: products reach {fitted.efficiency:.3f} of the peak, contention "
        f"{fitted.contention:.3f} (cluster=a100_80g_node has {cluster.efficiency} and "
        f"{cluster.contention}); published implementation {fitted.logit_bytes:.1f} bytes per "
        f"logit and {fitted.output_seconds * 1e6:.0f} us beside the products of S and T\n"
    )
    without = {method: left_out(runs, method) for method in METHODS}
    rows = [predicted(run, fitted, without[run["method"]]) for run in runs]
    show_paper(rows)
    wide = trend(fitted)
    print(
        "\n| model | hidden | GPUs | schedule | microbatches x tokens "
        "| forward of a layer, % of the peak | MFU % | at the lower bound "
        "| at that of schedules that keep no more |"
    )
    print("|---" * 9 + "|")
    for one in wide:
        print(
            f"| {one['model']} | {one['hidden']:,} | {one['gpus']} | {one['schedule']} "
            f"| {one['num_microbatches']} x {one['seq_length']:,} | {one['layer_pct']:.1f} "
            f"| {one['mfu_pct']:.1f} | {one['at_bound_pct']:.1f} "
            f"| {one['at_bound_of_its_memory_pct']:.1f} |"
        )
    published = [*megatron_runs(fitted.logit_bytes), *fsdp_runs(fitted.logit_bytes)]
    held = [
        row
        for card in ("h100", "a100")
        for row in held_out([run for run in published if run.source.endswith(card)])
    ]
    show_held(held)
    if arguments.json:
        result = provenance() | {
            "fitted_on": f"pass times of benchmarks/data/{DATA.name}",
            "fitted": asdict(fitted),
            "fitted_without": {method: asdict(one) for method, one in without.items()},
            "rows": [
                asdict(r)
                | {
                    "plan_error": r.plan_error,
                    "fp16_gradients_error": r.fp16_gradients_error,
                    "memory_error": r.memory_error,
                    "mfu_error": r.mfu_error,
                    "without_error": r.without_error,
                }
                for r in rows
            ],
            "trend": wide,
            "held_out": [
                asdict(row) | {"points": row.points, "other_points": row.other_points}
                for row in held
            ],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
