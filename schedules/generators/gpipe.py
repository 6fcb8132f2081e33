"""GPipe (arXiv 1811.06965): all forwards, then all backwards."""

from __future__ import annotations

from schedules.ir import Kind, Pass
from schedules.problem import Problem


def gpipe(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Return the stage passes of every rank: all passes of a kind, then all of the next.

    This is also the order of a forward-only problem.
    """
    return tuple(
        tuple(
            Pass(stage, kind, microbatch)
            for kind in problem.stage_kinds
            for stage in problem.layout.stages_of(rank)[:: 1 if kind is Kind.F else -1]
            for microbatch in range(problem.num_microbatches)
        )
        for rank in range(problem.layout.num_ranks)
    )
