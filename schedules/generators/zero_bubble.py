"""ZB-H1 (arXiv 2401.10241): 1F1B whose backward is split, so that weight gradients fill the gaps of the cool-down.

A rank that needs fewer warm-up forwards than rank 0 may hold back its weight gradients until as many microbatches are in
flight as on rank 0; W is placed just before the forward that would exceed this, and may move within it (see `weave`).
"""

from __future__ import annotations

from collections import deque

from schedules.ir import Kind, Pass
from schedules.problem import Problem


def zb_h1(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """The stage passes of every rank.  Raises ValueError unless each rank owns one stage and B is split."""
    if problem.layout.num_chunks != 1 or not problem.split_backward:
        raise ValueError("zb_h1 has one stage per rank and splits B into I and W; use layout 'linear' and split_backward")
    return tuple(_rank_order(rank, problem) for rank in range(problem.layout.num_ranks))


def _rank_order(rank: int, problem: Problem) -> tuple[Pass, ...]:
    m = problem.num_microbatches
    most_in_flight = problem.layout.num_ranks + problem.algorithm.extra_in_flight
    warmup = min(m, most_in_flight - rank)
    order = [Pass(rank, Kind.F, i) for i in range(warmup)]
    weights: deque[Pass] = deque()
    in_flight = warmup
    for i in range(m):
        order.append(Pass(rank, Kind.I, i))
        weights.append(Pass(rank, Kind.W, i))
        if warmup + i < m:
            if in_flight == most_in_flight:
                order.append(weights.popleft())
                in_flight -= 1
            order.append(Pass(rank, Kind.F, warmup + i))
            in_flight += 1
    return (*order, *weights)
