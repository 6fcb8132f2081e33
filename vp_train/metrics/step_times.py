"""The file trace/step_times.json: the traced step for programs, beside the Chrome trace.

It has the planned and the measured timeline of the first replica, the seconds of every rank of the
run by kind of pass and by part, and the costs that the plan assumed.  docs/monitoring.md describes
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from schedules.ir import Kind
from schedules.timeline import Span, Timeline
from schedules.vocab import End
from vp_train.config import CostConfig, RunConfig
from vp_train.explain.trace import SCHEMA, RankPlace
from vp_train.metrics.figures import RankFigures
from vp_train.planning.cluster import assumed_costs
from vp_train.planning.plan import StepPlan

_DIGITS = 7  # after the point, of seconds

# The setting of `cost` that says how long a kind of pass takes, where it was measured.
_MEASURED = {
    Kind.F: "layer_forward_seconds",
    Kind.B: "layer_backward_seconds",
    Kind.I: "layer_input_grad_seconds",
    Kind.W: "layer_weight_grad_seconds",
    Kind.S: "output_row_seconds",
    Kind.T: "output_row_seconds",
    Kind.E: "lookup_seconds",
    Kind.G: "lookup_grad_seconds",
}


@dataclass(frozen=True, slots=True)
class RankTimes(RankPlace):
    """What one rank of the run did in the traced step.

    pass_seconds: by kind, the number of passes and their seconds.
    """

    pass_seconds: Mapping[str, tuple[int, float]]

    def record(self, figures: RankFigures | None) -> dict[str, Any]:
        """Return the entry of this rank, with its `figures` of the step."""
        entry = asdict(self)
        entry["pass_seconds"] = {
            kind: {"count": count, "seconds": round(seconds, _DIGITS)}
            for kind, (count, seconds) in self.pass_seconds.items()
        }
        if figures is not None:
            entry["seconds"] = {
                part: round(seconds, _DIGITS) for part, seconds in figures.seconds.items()
            }
        return entry


def pass_seconds(spans: Sequence[Span]) -> dict[str, tuple[int, float]]:
    """Return the number and the seconds of the passes of each kind."""
    found: dict[str, tuple[int, float]] = {}
    for span in spans:
        count, seconds = found.get(span.kind, (0, 0.0))
        found[span.kind] = count + 1, seconds + span.seconds
    return found


def step_times(
    config: RunConfig,
    plan: StepPlan,
    measured: Timeline,
    *,
    step: int,
    ranks: Sequence[RankTimes],
    figures: Sequence[RankFigures] = (),
    processors: Sequence[Sequence[float]] = (),
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of the file.

    `ranks` and `figures` are by rank of the run.  `processors` has the seconds of each measured
    pass on a processor, by rank of the pipeline.  `words` are those of the command line.
    """
    degrees = plan.degrees
    return {
        "schema": SCHEMA,
        "step": step,
        "device": config.run.device,
        "dtype": config.run.dtype,
        "schedule": plan.schedule.name,
        "vocabulary": plan.problem.algorithm.name,
        "num_microbatches": plan.problem.num_microbatches,
        "dp": degrees.dp,
        "pp": degrees.pp,
        "tp": degrees.tp,
        "runtime": "cuda" if config.run.comm_backend == "nccl" and plan.work.on_cuda else "gloo",
        "rows": [shard.num_rows for shard in plan.shards[End.OUTPUT]],
        "offloads": [
            f"{one.item} {one.free_before} {one.reload_after}" for one in plan.schedule.offloads
        ],
        "planned": _timeline(plan.timeline),
        "measured": _timeline(measured),
        "processor_seconds": [[round(value, _DIGITS) for value in row] for row in processors],
        "ranks": [
            rank.record(figures[rank.rank] if rank.rank < len(figures) else None) for rank in ranks
        ],
        "cost": _cost(config, plan, words),
    }


def _timeline(timeline: Timeline) -> dict[str, Any]:
    return {
        "makespan_seconds": round(timeline.makespan, _DIGITS),
        "bound_seconds": round(timeline.bound, _DIGITS),
        "mean_bubble": timeline.mean_bubble,
        "peak_bytes": list(timeline.peak_bytes),
        "passes": [_spans(spans) for spans in timeline.compute],
        "communications": _of_ranks(timeline.comm),
        "transfers": _of_ranks([transfer.span for transfer in timeline.transfers]),
    }


def _spans(spans: Sequence[Span]) -> dict[str, Any]:
    return {
        "names": " ".join(span.name for span in spans),
        "starts": [round(span.start, _DIGITS) for span in spans],
        "ends": [round(span.end, _DIGITS) for span in spans],
    }


def _of_ranks(spans: Sequence[Span]) -> dict[str, Any]:
    return _spans(spans) | {"ranks": [span.rank for span in spans]}


def _cost(config: RunConfig, plan: StepPlan, words: Sequence[str]) -> dict[str, Any]:
    cost = plan.cost
    assumed = assumed_costs(plan.work, config.cluster, config.cost)
    return {
        "sources": {kind.value: source_of(kind, config.cost) for kind in cost.pass_seconds},
        "measured_on": config.cost.measured_on,
        "overrides": [word for word in words if word.startswith(("cost", "cluster"))],
        "settings": {name: value for name, value in asdict(assumed).items() if value is not None},
        "pass_seconds": {kind.value: list(values) for kind, values in cost.pass_seconds.items()},
        "hop_seconds": cost.hop_seconds,
        "barrier_seconds": dict(cost.barrier_seconds),
        "bytes": {
            "stage": list(cost.stage_bytes),
            "shard": list(cost.shard_bytes),
            "weight": list(cost.weight_bytes),
            "offload": list(cost.offload_bytes),
        },
        "offload_seconds": list(cost.offload_seconds),
    }


def source_of(kind: Kind, cost: CostConfig) -> str:
    """Return where the planned seconds of a kind of pass come from.

    measured: vp-profile or another measurement.  flops: FLOPs over an assumed rate.  assumed: a
    look-up whose bytes or latency were assumed.
    """
    if getattr(cost, _MEASURED[kind]) is not None:
        return "measured"
    return "assumed" if kind in (Kind.E, Kind.G) else "flops"
