"""What measured passes say about every rank of a job.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from schedules.ir import Kind
from schedules.vocab import End
from vp_train.config import CostConfig, RunConfig
from vp_train.model import shape
from vp_train.planning.plan import StepPlan


@dataclass(frozen=True, slots=True)
class RankProfile:
    """One pipeline rank, measured alone.

    `passes`: median seconds of a pass, by kind and stage (by kind and rank for those of the vocabulary); `program_seconds`: a
    whole step of passes without the waiting, not timed one by one; bytes that torch has allocated between steps and at most.
    """

    rank: int
    passes: dict[tuple[Kind, int], float]
    program_seconds: float
    optimizer_seconds: float
    state_bytes: int
    peak_bytes: int

    def of(self, kind: Kind) -> float:
        """One pass of each of the stages of this rank."""
        return sum(seconds for (measured, _), seconds in self.passes.items() if measured is kind)


def measured_cost(
    config: RunConfig, step: StepPlan, profiles: Sequence[RankProfile]
) -> dict[str, float | str]:
    """The settings of `cost` that `profiles` give: seconds of a layer, of the output layer by rows, and of lookups.

    What a stage computes again is not among the seconds of its backward, and without a split backward I and W count as halves
    of B.  Shards of equal rows cannot tell a fixed part, which then counts as none.
    """
    tp = step.degrees.tp
    model, size = config.model, config.micro_batch_size
    cost: dict[str, float] = {}
    forward = _per_layer(step, profiles, Kind.F)
    if forward:
        cost["layer_forward_seconds"] = tp * median(forward.values())
        for kind, name in ((Kind.B, "backward"), (Kind.I, "input_grad"), (Kind.W, "weight_grad")):
            found = _per_layer(step, profiles, kind)
            again = {
                stage: shape.recomputed_part(model, config.parallel.recompute_of(stage))
                * forward[stage]
                if kind is not Kind.W
                else 0.0
                for stage in found
            }
            if found:
                cost[f"layer_{name}_seconds"] = tp * median(
                    found[stage] - again[stage] for stage in found
                )
        if "layer_backward_seconds" in cost:
            cost["layer_input_grad_seconds"] = cost["layer_weight_grad_seconds"] = (
                cost["layer_backward_seconds"] / 2
            )
        else:
            cost["layer_backward_seconds"] = (
                cost["layer_input_grad_seconds"] + cost["layer_weight_grad_seconds"]
            )
    rows = {
        profile.rank: -(-step.shards[End.OUTPUT][profile.rank].num_rows // tp)
        for profile in profiles
    }
    points = [
        (rows[profile.rank], profile.of(Kind.S) + profile.of(Kind.T))
        for profile in profiles
        if rows[profile.rank]
    ]
    if points:
        cost["output_fixed_seconds"], cost["output_row_seconds"] = _line(points)
    for kind, name in ((Kind.E, "lookup_seconds"), (Kind.G, "lookup_grad_seconds")):
        seconds = [profile.of(kind) for profile in profiles if profile.of(kind)]
        if seconds:
            cost[name] = median(seconds)
    flops = float(shape.layer_flops(model, size * model.seq_length))
    of = {"measured_dtype": config.run.dtype, "measured_device": config.run.device}
    return {"measured_layer_flops": flops, **of, **cost}


def with_cost(config: RunConfig, cost: Mapping[str, float | str]) -> RunConfig:
    """`config` whose passes cost what was measured."""
    return replace(config, cost=CostConfig(**cost))  # type: ignore[arg-type]  # rank_slowness is none of them


def _per_layer(step: StepPlan, profiles: Sequence[RankProfile], wanted: Kind) -> dict[int, float]:
    """Seconds of one layer, for every measured stage that has any."""
    return {
        stage: seconds / len(step.layers[stage])
        for profile in profiles
        for (kind, stage), seconds in profile.passes.items()
        if kind is wanted and step.layers[stage]
    }


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope of seconds over rows, by least squares; neither below 0."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    fixed = mean_y - slope * mean_x
    return (fixed, slope) if spread and slope > 0 and fixed >= 0 else (0.0, mean_y / mean_x)
