"""GPipe (arXiv 1811.06965): all forwards, then all backwards."""

from __future__ import annotations

from schedules.ir import Kind, Pass
from schedules.problem import Problem


def gpipe(problem: Problem, at_once: int | None = None) -> tuple[tuple[Pass, ...], ...]:
    """Return the stage passes of every rank: all passes of a kind, then all of the next.

    That is so for every group of `at_once` microbatches, one after the other; None: for all. This
    is also the order of a forward-only problem.
    """
    m = problem.num_microbatches
    size = m if at_once is None else at_once
    return tuple(
        tuple(
            Pass(stage, kind, microbatch)
            for first in range(0, m, size)
            for kind in problem.stage_kinds
            for stage in problem.layout.stages_of(rank)[:: 1 if kind is Kind.F else -1]
            for microbatch in range(first, min(first + size, m))
        )
        for rank in range(problem.layout.num_ranks)
    )
