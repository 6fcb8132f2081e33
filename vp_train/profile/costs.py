"""Costs of all passes of a job, derived from the measured passes of some ranks.  Pure."""

from __future__ import annotations

import json
import math
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from schedules.ir import Kind
from schedules.vocab import End
from vp_train.config import CostConfig, RunConfig
from vp_train.model import shape
from vp_train.planning.physics import (
    Device,
    attention_seconds,
    elementwise_bytes,
    layer_seconds,
    linear_shapes,
    output_seconds,
)
from vp_train.planning.plan import StepPlan
from vp_train.planning.workload import Workload

ALONE = 0.9  # of the time of passes: with less they shared their processors
_LEAST_REST = 0.02  # of a layer, that elementwise kernels take in any case


@dataclass(frozen=True, slots=True)
class RankProfile:
    """The measurements of one pipeline rank that ran alone.

    `passes` are median seconds of a pass by kind and stage, or by kind and rank for vocabulary
    passes, and `on_processor` is the part of their time in which they had a processor
    (`pass_seconds`).  `program_seconds` is the time of all passes of a step without waiting and
    without timing every pass.  `state_bytes` are allocated by torch between steps, `peak_bytes` at
    most.  `deviations` are standard deviations of what every stage reads (x0), computes (y0) and
    gets for its backward (dy0).
    """

    rank: int
    passes: dict[tuple[Kind, int], float]
    program_seconds: float
    optimizer_seconds: float
    state_bytes: int
    peak_bytes: int
    deviations: dict[str, float]
    on_processor: float = 1.0

    @property
    def is_real(self) -> bool:
        """Return whether the passes computed with values as a run has them.

        Products of zeros, infinities or NaN take less power, so a GPU runs faster.
        """
        return all(0 < deviation < math.inf for deviation in self.deviations.values())

    def of(self, kind: Kind) -> float:
        """Return the seconds of one pass of this kind on every stage of the rank, summed."""
        return sum(seconds for (measured, _), seconds in self.passes.items() if measured is kind)


def pass_seconds(
    timed: Mapping[tuple[Kind, int], Sequence[tuple[float, float]]],
) -> tuple[dict[tuple[Kind, int], float], float]:
    """Return the median seconds of every pass, and the part in which passes had a processor.

    timed: the seconds of every repetition, and how many of them it was on a processor.

    Where other programs took the processors, only the seconds on one count: others would be there
    or not in the next minute.
    """
    spent = [pair for pairs in timed.values() for pair in pairs]
    total = sum(seconds for seconds, _ in spent)
    part = sum(map(min, spent)) / total if total else 1.0
    count = min if part < ALONE else operator.itemgetter(0)
    return {key: median(map(count, pairs)) for key, pairs in timed.items()}, part


def measured_cost(
    step: StepPlan, passes: Mapping[tuple[Kind, int], float]
) -> dict[str, float | str]:
    """Return the settings of `cost` that follow from measured passes.

    passes: seconds of a pass by kind and stage, or by kind and rank for vocabulary passes.

    They are the seconds of a layer, of the output layer by rows, and of lookups.  Recomputation is
    subtracted from the backward of a stage.  Without a split backward, I and W count as halves of
    B.  If all shards have equally many rows, the fixed part of the output layer is unknown and
    counts as 0.
    """
    work, tp = step.work, step.degrees.tp
    cost: dict[str, float] = {}
    forward = _per_layer(step, passes, Kind.F)
    if forward:
        cost["layer_forward_seconds"] = tp * median(forward.values())
        for kind, name in ((Kind.B, "backward"), (Kind.I, "input_grad"), (Kind.W, "weight_grad")):
            found = _per_layer(step, passes, kind)
            recomputed = {
                stage: shape.recomputed_part(work.model, step.recompute[stage]) * forward[stage]
                if kind is not Kind.W
                else 0.0
                for stage in found
            }
            if found:
                cost[f"layer_{name}_seconds"] = tp * median(
                    found[stage] - recomputed[stage] for stage in found
                )
        if "layer_backward_seconds" in cost:
            cost["layer_input_grad_seconds"] = cost["layer_weight_grad_seconds"] = (
                cost["layer_backward_seconds"] / 2
            )
        else:
            cost["layer_backward_seconds"] = (
                cost["layer_input_grad_seconds"] + cost["layer_weight_grad_seconds"]
            )
    of_rows: dict[int, float] = defaultdict(float)
    for (kind, rank), seconds in passes.items():
        if kind in (Kind.S, Kind.T) and step.shards[End.OUTPUT][rank].num_rows:
            of_rows[rank] += seconds
    points = [
        (-(-step.shards[End.OUTPUT][rank].num_rows // tp), seconds)
        for rank, seconds in of_rows.items()
    ]
    if points:
        cost["output_fixed_seconds"], cost["output_row_seconds"] = _line(points)
    for kind, name in ((Kind.E, "lookup_seconds"), (Kind.G, "lookup_grad_seconds")):
        taken = [seconds for (each, _), seconds in passes.items() if each is kind and seconds]
        if taken:
            cost[name] = median(taken)
    where: dict[str, float | str] = {
        "measured_dtype": work.dtype,
        "measured_linear_dtype": work.linear_dtype,
        "measured_device": work.device,
        "measured_cuda_graphs": work.cuda_graphs,
    }
    return {"measured_layer_flops": float(work.layer_flops), **where, **cost}


def device_rates(
    work: Workload,
    cost: Mapping[str, float | str],
    *,
    products: float,
    attention: float,
    kernel_seconds: float,
    multiprocessors: int,
) -> dict[str, float | str]:
    """Return the settings of `cost` with the rates of a device, which predict other layers too.

    cost: of `measured_cost`, with the seconds of a layer.
    products, attention: measured seconds of the four products of a forward, and of attention.

    What products and attention leave of the layer is the time of elementwise kernels, so a plan
    with these rates takes as long as the measured layer.  What they leave of S and T is the time of
    what is done to each logit.
    """
    share, tp = work.share, work.degrees.tp
    unit = Device(1.0, 1.0, 1e300, 0.0, multiprocessors)
    tokens = work.num_tokens
    ideal = sum(unit.product(tokens, out, into) for out, into in linear_shapes(share))
    matrix, attended = ideal / products, attention_seconds(unit, share, tokens) / attention
    free = Device(matrix, attended, 1e300, kernel_seconds, multiprocessors)
    layer = layer_seconds(
        free,
        share,
        tokens,
        item_bytes=work.item_bytes,
        sum_bytes=work.precise_bytes,
        compiled=work.compiles_layers,
        sequence_ranks=work.sequence_ranks,
    )
    whole = sum(float(cost[f"layer_{name}_seconds"]) / tp for name in ("forward", "backward"))
    rest = max(whole - sum(layer[:3]), _LEAST_REST * whole)
    compiled, ranks = work.compiles_layers, work.sequence_ranks
    moved = sum(elementwise_bytes(share, tokens, work.item_bytes, compiled, ranks))
    moved += work.precise_bytes * shape.layer_matrix_parameters(share)
    found: dict[str, float | str] = {
        "matrix_flops_per_second": matrix,
        "attention_flops_per_second": attended,
        "memory_bytes_per_second": moved / rest,
        "kernel_seconds": kernel_seconds,
        "multiprocessors": multiprocessors,
    }
    if "output_row_seconds" in cost:
        rows = 1 << 14
        taken = float(cost["output_fixed_seconds"]) + rows * float(cost["output_row_seconds"])
        device = Device(matrix, attended, moved / rest, kernel_seconds, multiprocessors)
        plain = output_seconds(
            device, tokens, share.hidden_size, rows, work.precise_bytes, logit_bytes=0.0
        )
        found["logit_bytes"] = max(0.0, (taken - plain) * moved / rest / tokens / rows)
    return found | {"measured_dtype": work.dtype, "measured_device": work.device}


def with_cost(config: RunConfig, cost: Mapping[str, float | str]) -> RunConfig:
    """Return `config` with the measured costs."""
    # rank_slowness, the only setting that is not a number or text, is never measured.
    return replace(config, cost=CostConfig(**cost))  # type: ignore[arg-type]


def cost_text(comments: Sequence[str], cost: Mapping[str, Any]) -> str:
    """Return the file of settings of `cost` that cost=FILE reads, with `comments` before them."""
    values = (
        f"{name}: {format(value, '.6g') if isinstance(value, float) else json.dumps(value)}"
        for name, value in cost.items()
    )
    return "\n".join([*(f"# {comment}" for comment in comments), *values]) + "\n"


def _per_layer(
    step: StepPlan, passes: Mapping[tuple[Kind, int], float], wanted: Kind
) -> dict[int, float]:
    """Return the seconds of one layer in a pass of this kind, by measured stage with layers."""
    return {
        stage: seconds / len(step.layers[stage])
        for (kind, stage), seconds in passes.items()
        if kind is wanted and step.layers[stage]
    }


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return intercept and slope of seconds over rows by least squares; neither is below 0."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    fixed = mean_y - slope * mean_x
    return (fixed, slope) if spread and slope > 0 and fixed >= 0 else (0.0, mean_y / mean_x)
