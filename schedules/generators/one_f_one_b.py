"""1F1B (PipeDream-flush, arXiv 2104.04473): after a warm-up, forwards and backwards alternate.

The barriers between the last forward and the first backward take time, in which the pipeline would
run empty. So the warm-up has one more microbatch for each of them (arXiv 2411.05288, section 5).
"""

from __future__ import annotations

from schedules.ir import Kind, Pass
from schedules.problem import Problem


def one_f_one_b(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Return the stage passes of every rank. Raises ValueError unless each rank owns one stage."""
    if problem.layout.num_chunks != 1:
        raise ValueError(
            f"1f1b has one stage per rank, not {problem.layout.num_chunks}; use layout 'linear'"
        )
    return tuple(_rank_order(rank, problem) for rank in range(problem.layout.num_ranks))


def _rank_order(rank: int, problem: Problem) -> tuple[Pass, ...]:
    m = problem.num_microbatches
    warmup = min(m, problem.layout.num_ranks - rank + problem.algorithm.extra_in_flight)
    order = [Pass(rank, Kind.F, i) for i in range(warmup)]
    for i in range(m):
        order += [Pass(rank, kind, i) for kind in problem.stage_kinds if kind is not Kind.F]
        if warmup + i < m:
            order.append(Pass(rank, Kind.F, warmup + i))
    return tuple(order)
