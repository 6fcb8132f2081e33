"""The part of the exchange between replicas that no pass hides.

The runtime sums a bucket of gradients as soon as the last microbatch has completed them, half a
layer at a time, while later passes run (`optim.overlap_sums`).  With ZeRO-1 it gathers the new
parameters bucket by bucket, and a pass waits for those that it reads (`optim.overlap_gathers`).
This module repeats that on the simulated timeline.  Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from schedules.ir import Kind
from schedules.vocab import End
from vp_train.config import ClusterConfig, OptimConfig
from vp_train.config.bounds import BUCKETS_PER_STAGE
from vp_train.model import shape
from vp_train.planning.cluster import replica_seconds
from vp_train.planning.plan import StepPlan

_MIB = 1 << 20
_COMPLETES = {End.INPUT: Kind.G, End.OUTPUT: Kind.T}
_READS = {End.INPUT: Kind.E, End.OUTPUT: Kind.S}


@dataclass(frozen=True, slots=True)
class ReplicaExchange:
    """The seconds of a step in which replicas exchange gradients and parameters, on one rank.

    `sums` and `gathers` are whole.  `exposed_sums` and `exposed_gathers` are what they add to the
    step, because no pass runs beside them.
    """

    sums: float
    gathers: float
    exposed_sums: float
    exposed_gathers: float

    @property
    def exposed(self) -> float:
        return self.exposed_sums + self.exposed_gathers


@dataclass(frozen=True, slots=True, order=True)
class _Run:
    """Parameters that passes complete, and read, one bucket after the other.

    Their gradients complete from `begins` to `ends` of the last pass.  The next step reads them
    from `reads` to `reads_end`.  Times are seconds from the beginning of a step.
    """

    parameters: int
    buckets: int
    begins: float
    ends: float
    reads: float
    reads_end: float


def exchange(
    step: StepPlan,
    cluster: ClusterConfig,
    optim: OptimConfig,
    parameters: Sequence[int],
    update_seconds: Sequence[float],
) -> ReplicaExchange:
    """Return what the exchange of the replicas adds to a step of the slowest rank.

    parameters, update_seconds: of every pipeline rank.  All ranks wait for each other before the
    update, for the norm of the gradients.  A rank whose first pass is late makes the others late by
    as much at most.
    """
    whole = [replica_seconds(step.work, cluster, optim, count) for count in parameters]
    sums, gathers = max(one.sums for one in whole), max(one.gathers for one in whole)
    if step.degrees.dp == 1 or optim.offload:
        return ReplicaExchange(sums, gathers, sums, gathers)
    runs = [_runs(step, optim, rank) for rank in range(step.num_ranks)]
    end = step.timeline.makespan
    late_sums = max(_sums_end(step, cluster, optim, rank) for rank in runs) - end
    late_gathers = max(
        _lateness(step, cluster, optim, rank, update)
        for rank, update in zip(runs, update_seconds, strict=True)
    )
    return ReplicaExchange(
        sums,
        gathers,
        max(0.0, late_sums) if optim.overlap_sums else sums,
        max(0.0, late_gathers) if optim.overlap_gathers else gathers,
    )


def _runs(step: StepPlan, optim: OptimConfig, rank: int) -> list[_Run]:
    """Return the runs of a rank in the order in which passes read them."""
    spans = step.timeline.compute[rank]
    model, tp = step.work.share, step.degrees.tp
    last: dict[tuple[Kind, int], tuple[float, float]] = {}
    first: dict[tuple[Kind, int], tuple[float, float]] = {}
    for span in spans:
        key = Kind(span.kind), span.stage
        first.setdefault(key, (span.start, span.end))
        last[key] = span.start, span.end
    found = []
    ends = (End.INPUT, End.OUTPUT) if not model.tied_embeddings else (End.OUTPUT,)
    for end in ends:
        # A tied matrix has one gradient, to which the last G adds after the last T.
        both = (End.INPUT, End.OUTPUT) if model.tied_embeddings else (end,)
        rows = math.ceil(max(step.shards[one][rank].num_rows for one in both) / tp)
        ended = [last[_COMPLETES[one], rank][1] for one in both if (_COMPLETES[one], rank) in last]
        if not rows or not ended:
            continue
        complete = max(ended)
        needed = min(
            (first[_READS[one], rank][0] for one in both if (_READS[one], rank) in first),
            default=0.0,
        )
        # A matrix is one bucket.  It is complete at the end of the pass, and needed at once.
        found.append(_Run(rows * model.hidden_size, 1, complete, complete, needed, needed))
    for stage in step.problem.layout.stages_of(rank):
        count = len(step.layers[stage])
        done = last.get((Kind.W, stage)) or last.get((Kind.B, stage))
        if not count or done is None:
            continue
        read = first[Kind.F, stage]
        held = count * shape.layer_parameters(model)
        buckets = math.ceil(held * step.work.precise_bytes / (optim.bucket_mib * _MIB))
        buckets = min(max(buckets, BUCKETS_PER_STAGE), 2 * count)
        found.append(_Run(held, buckets, *done, *read))
    return found


def _sums_end(
    step: StepPlan, cluster: ClusterConfig, optim: OptimConfig, runs: Sequence[_Run]
) -> float:
    """Return when the last sum of a rank ends.  Sums run one after the other, as they begin."""
    ready = sorted(
        (run.begins + (run.ends - run.begins) * (index + 1) / run.buckets, run)
        for run in runs
        for index in range(run.buckets)
    )
    free = 0.0
    for when, run in ready:
        one = replica_seconds(step.work, cluster, optim, run.parameters / run.buckets)
        free = max(free, when) + one.sums
    return free


def _lateness(
    step: StepPlan,
    cluster: ClusterConfig,
    optim: OptimConfig,
    runs: Sequence[_Run],
    update_seconds: float,
) -> float:
    """Return how much the gathers of a rank delay the first passes of the next step at most.

    A bucket is gathered as soon as it is updated.
    """
    total = sum(run.parameters for run in runs) or 1
    updated, free, late = -update_seconds, -update_seconds, 0.0
    for run in sorted(runs, key=lambda run: run.reads):
        one = replica_seconds(step.work, cluster, optim, run.parameters / run.buckets)
        for index in range(run.buckets):
            updated += update_seconds * run.parameters / run.buckets / total
            free = max(free, updated) + one.gathers
            needed = run.reads + (run.reads_end - run.reads) * index / run.buckets
            late = max(late, free - needed)
    return late
