"""Interleaved 1F1B (arXiv 2104.04473): several stages per rank, in a loop, make fill and drain shorter.

Microbatches go through a rank in groups of p: a group's forwards of the first chunk, then of the second, and so on; backwards
the same with the last chunk first.  After a warm-up, forwards and backwards alternate.  Where p does not divide m the order
is that of full groups without the passes of the microbatches that do not exist: leaving passes out cannot make an order block.
"""

from __future__ import annotations

from schedules.ir import Kind, Pass
from schedules.problem import Problem


def interleaved(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """The stage passes of every rank.  Raises ValueError unless the stages lie in a loop."""
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
