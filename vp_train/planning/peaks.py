"""Steps that end when ranks keep the most: what their memory is at least, and about.

They are not simulated.  The microbatches in flight follow from the base order of a schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from schedules.generators import GENERATORS
from schedules.ir import Kind, Pass, Schedule
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.timeline import Timeline
from schedules.vocab import End
from vp_train.planning.plan import Draft, StepPlan, named_base_order

Waits = Literal["none", "one", "all"]
_NOT_SIMULATED = Timeline((), (), (), ())


@dataclass(frozen=True, slots=True)
class Peak:
    """The microbatches in flight on a rank when they are most, by chunk.

    counts: from F to B or I, which is the least: W may follow I at once.
    kept: from F to B or W in the base order, which is about what a whole step has.
    backward: the stage whose backward comes next.
    """

    counts: tuple[int, ...]
    kept: tuple[int, ...]
    backward: int


def peaks_of(name: str, problem: Problem, *, check: bool = True) -> tuple[Peak, ...]:
    """Return the peak of every rank in the base order of the schedule `name`.

    Adding the vocabulary passes keeps the order of the other passes, or with a split backward the
    number of microbatches in flight.  It can only increase the peak.  Raises ConfigError for a
    wrong base order, unless `check` is false because it was checked for another step.
    """
    layout = problem.layout
    count = enough_microbatches(name, problem.num_microbatches, layout)
    problem = replace(problem, num_microbatches=count)
    base = named_base_order(name, problem) if check else GENERATORS[name].base_order(problem)
    return tuple(
        Peak(
            _most(order, layout.stages_of(rank), problem.backward)[0],
            *_most(order, layout.stages_of(rank), problem.stage_kinds[-1]),
        )
        for rank, order in enumerate(base)
    )


def enough_microbatches(name: str, num_microbatches: int, layout: Layout) -> int:
    """Return with how many of the microbatches every rank has its peak."""
    return num_microbatches if keeps_all(name) else min(num_microbatches, 2 * layout.num_ranks + 4)


def keeps_all(name: str) -> bool:
    """Return whether a rank keeps all microbatches of a step: those of gpipe run forward first."""
    return name == "gpipe"


def _most(
    order: Iterable[Pass], stages: tuple[int, ...], last: Kind
) -> tuple[tuple[int, ...], int]:
    """Return the most microbatches between F and `last`, by chunk, and the stage of that `last`."""
    chunk_of = {stage: chunk for chunk, stage in enumerate(stages)}
    counts, highest, next_stage = [0] * len(stages), (0,) * len(stages), stages[0]
    now = most = 0
    is_new = False
    for item in order:
        if item.kind is Kind.F:
            counts[chunk_of[item.stage]] += 1
            now += 1
            if now > most:
                most, is_new = now, True
        elif item.kind is last:
            if is_new:
                highest, next_stage, is_new = tuple(counts), item.stage, False
            counts[chunk_of[item.stage]] -= 1
            now -= 1
    return highest, next_stage


def at_peak(
    draft: Draft,
    name: str,
    peaks: Sequence[Peak],
    *,
    waits: Waits = "none",
    holds: bool = False,
    ranks: Iterable[int] | None = None,
) -> StepPlan:
    """Return a step that ends when ranks keep the most.

    Where the backward is split, none, one or all of what is in flight may wait for its W.  With
    `holds` ranks have S of a microbatch, too.  Its T comes before the backward if one rank has the
    whole vocabulary, else it is left out, because the shard is held meanwhile.  Only `ranks` have
    passes, None for all.
    """
    problem = draft.problem
    shard = (Kind.S,) if problem.algorithm.sharded else (Kind.S, Kind.T)
    holding = problem.shard_ranks(End.OUTPUT) if holds else ()
    cost = draft.cost
    orders: list[tuple[Pass, ...]] = [()] * len(peaks)
    for rank in range(len(peaks)) if ranks is None else ranks:
        peak = peaks[rank]
        held = peak.kept if waits == "all" else peak.counts
        order = [
            Pass(stage, Kind.F, microbatch)
            for stage, count in zip(problem.layout.stages_of(rank), held, strict=True)
            for microbatch in range(count)
        ]
        order += [Pass(rank, kind, 0) for kind in shard if rank in holding]
        if waits == "one":
            order.append(Pass(peak.backward, Kind.I, 1))
        orders[rank] = (*order, Pass(peak.backward, problem.backward, 0))
    if problem.split_backward and waits != "one":
        kept = cost.stage_bytes
        if waits == "all":
            kept = tuple(map(max, kept, cost.weight_bytes))
        cost = replace(cost, stage_bytes=kept, weight_bytes=(0.0,) * problem.layout.num_stages)
    schedule = Schedule(name, tuple(orders))
    return replace(draft, cost=cost).with_timeline(schedule, _NOT_SIMULATED)
