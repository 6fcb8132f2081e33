"""Interleaved 1F1B (arXiv 2104.04473): several stages per rank, in a loop, shorten fill and drain.

A rank processes microbatches in groups of p. The forwards of a group run through the first chunk,
then through the second, and so on. The backwards start with the last chunk. After a warm-up,
forwards and backwards alternate. If p does not divide m, the last group is ordered like a full one
and the passes of microbatches that do not exist are left out. This cannot cause a deadlock.
"""

from __future__ import annotations

from schedules.ir import Kind, Pass
from schedules.problem import Problem


def interleaved(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Return the stage passes of every rank. Raises ValueError for layout 'v'."""
    layout = problem.layout
    if layout.name == "v":
        raise ValueError("interleaved 1F1B needs its stages in a loop; use layout 'loop'")
    return tuple(_rank_order(rank, problem) for rank in range(layout.num_ranks))


def _rank_order(rank: int, problem: Problem) -> tuple[Pass, ...]:
    layout, m = problem.layout, problem.num_microbatches
    stages = layout.stages_of(rank)
    groups = [range(start, start + layout.num_ranks) for start in range(0, m, layout.num_ranks)]
    forwards = [Pass(stage, Kind.F, i) for group in groups for stage in stages for i in group]
    backwards = [
        [Pass(stage, kind, i) for kind in problem.stage_kinds if kind is not Kind.F]
        for group in groups
        for stage in reversed(stages)
        for i in group
    ]
    behind = layout.num_ranks - rank - 1
    chunks = layout.num_chunks
    fill = 2 * behind + (chunks - 1) * layout.num_ranks if chunks > 1 else behind
    warmup = min(len(forwards), fill + 1 + chunks * problem.algorithm.extra_in_flight)
    order = forwards[:warmup]
    for done, backward in enumerate(backwards, start=warmup):
        order += backward
        order += forwards[done : done + 1]
    return tuple(item for item in order if item.microbatch < m)
