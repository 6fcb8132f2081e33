"""V-Half and V-Min (arXiv 2405.15362): rank r owns stages r and 2p-1-r, and a building block fixes the memory.

A block places the passes of one microbatch in time, with F = I = W = 1 and a new microbatch every 6: on every rank the lives
of its two activations then add up to the same, about half or a third of what 1F1B needs on its first rank.  The order of
the passes on a rank is that of the blocks repeated; weight gradients are free to fill the gaps (see `weave`).
"""

from __future__ import annotations

from collections.abc import Callable

from schedules.ir import Kind, Pass
from schedules.problem import Problem

_INTERVAL = 6


def v_half(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Peak (p + 2) // 2 microbatches, one more for each barrier.  Raises ValueError unless laid out as a V with B split."""
    return _repeat(problem, _half_offsets)


def v_min(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Peak (p + 4) // 3 microbatches, one more for each barrier.  Raises ValueError unless laid out as a V with B split."""
    return _repeat(problem, _min_offsets)


def _half_offsets(p: int, rank: int) -> tuple[int, int, int, int]:
    """Starts of F of the first and second chunk, then I of the second and first."""
    shift = 3 if p % 2 == 0 else 0
    return 2 * rank, 3 * p - rank - 2, 3 * p + shift + 2 * rank - 1, 6 * p + shift - rank - 2


def _min_offsets(p: int, rank: int) -> tuple[int, int, int, int]:
    shift = 2 if p % 3 == 0 else 0
    return rank, 2 * p - rank - 1, 2 * p + shift + rank, 4 * p + shift - rank - 1


def _repeat(problem: Problem, offsets: Callable[[int, int], tuple[int, int, int, int]]) -> tuple[tuple[Pass, ...], ...]:
    layout = problem.layout
    if layout.name != "v" or not problem.split_backward:
        raise ValueError(f"a V-shaped schedule needs layout 'v' and a split backward, not layout {layout.name!r}")
    delay = _INTERVAL * problem.algorithm.extra_in_flight  # each barrier takes an interval between the last F and the first I
    orders = []
    for rank in range(layout.num_ranks):
        first, second = layout.stages_of(rank)
        f0, f1, i1, i0 = offsets(layout.num_ranks, rank)
        block = [(f0, first, Kind.F), (f1, second, Kind.F)]
        for start, stage in ((i1 + delay, second), (i0 + delay, first)):
            block += [(start, stage, Kind.I), (start + 1, stage, Kind.W)]
        placed = [
            (start + _INTERVAL * microbatch, order, Pass(stage, kind, microbatch))
            for microbatch in range(problem.num_microbatches)
            for order, (start, stage, kind) in enumerate(block)
        ]
        orders.append(tuple(item for *_, item in sorted(placed)))
    return tuple(orders)
