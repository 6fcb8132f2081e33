"""ZB-H1, ZB-H2 and ZB-V (arXiv 2401.10241): split backward, so that W fills gaps.

ZB-H1 is 1F1B with a split backward. A rank needs fewer warm-up forwards than rank 0. It may delay
its weight gradients until it has as many microbatches in flight as rank 0. W is placed just before
the forward that would exceed this number. It may still move within this limit (see `weave`).

ZB-H2 has up to 2p - 1 microbatches in flight. Rank r runs 2r forwards fewer than rank 0 before its
first I, so that a microbatch may go to the last rank and back while others fill the time.

ZB-V lays the stages out as a V, so that rank 0 owns the first and the last stage. The first chunk
of a rank runs ahead until the microbatches come back to its second chunk. From then on the rank
runs F, I and W of the two chunks in turn. Every rank has p microbatches in flight.
"""

from __future__ import annotations

from collections import Counter, deque

from schedules.ir import Kind, Pass
from schedules.problem import Problem


def zb_h1(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Return the stage passes of every rank.

    Raises ValueError unless each rank owns one stage and the backward is split.
    """
    return _horizontal(problem, problem.layout.num_ranks, fewer=1)


def zb_h2(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Return the stage passes of every rank.  Raises ValueError like `zb_h1`."""
    return _horizontal(problem, 2 * problem.layout.num_ranks - 1, fewer=2)


def _horizontal(problem: Problem, most: int, *, fewer: int) -> tuple[tuple[Pass, ...], ...]:
    """Return the orders with at most `most` microbatches in flight, and some for the barriers.

    The warm-up of a rank has `fewer` forwards less than that of the rank before it.
    """
    if problem.layout.num_chunks != 1 or not problem.split_backward:
        raise ValueError(
            "zb_h1 and zb_h2 have one stage per rank and split B into I and W; "
            "use layout 'linear' and split_backward"
        )
    most += problem.algorithm.extra_in_flight
    return tuple(
        _rank_order(rank, problem, most, most - fewer * rank)
        for rank in range(problem.layout.num_ranks)
    )


def _rank_order(rank: int, problem: Problem, most_in_flight: int, warmup: int) -> tuple[Pass, ...]:
    m = problem.num_microbatches
    warmup = min(m, warmup)
    order = [Pass(rank, Kind.F, i) for i in range(warmup)]
    weights: deque[Pass] = deque()  # delayed weight gradients; their microbatches are in flight
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


def zb_v(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Return the stage passes of every rank.

    Raises ValueError unless the layout is a V and the backward is split.
    """
    if problem.layout.name != "v" or not problem.split_backward:
        raise ValueError(
            f"zb_v needs layout 'v' and a split backward, not layout {problem.layout.name!r}"
        )
    return tuple(_v_order(rank, problem) for rank in range(problem.layout.num_ranks))


def _v_order(rank: int, problem: Problem) -> tuple[Pass, ...]:
    """Return the stage passes of one rank.

    This is the order for infinitely many microbatches, without the microbatches from m on. A valid
    order stays valid when microbatches are left out.
    """
    p, m = problem.layout.num_ranks, problem.num_microbatches
    first, second = problem.layout.stages_of(rank)
    taken: Counter[tuple[int, Kind]] = Counter()
    order: list[Pass] = []

    def take(stage: int, *kinds: Kind) -> None:
        for kind in kinds:
            if taken[stage, kind] < m:
                order.append(Pass(stage, kind, taken[stage, kind]))
            taken[stage, kind] += 1

    for _ in range(2 * (p - rank) - 1):
        take(first, Kind.F)
    for _ in range(rank + problem.algorithm.extra_in_flight):
        take(second, Kind.F)
        take(first, Kind.F)
    for _ in range(p - rank):
        take(second, Kind.F, Kind.I, Kind.W)
    for _ in range(m):
        take(first, Kind.F, Kind.I, Kind.W)
        take(second, Kind.F, Kind.I, Kind.W)
    return tuple(order)
