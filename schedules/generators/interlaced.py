"""The interlaced pipeline (nnScaler, OSDI 2024): the output layer is computed synchronously.

arXiv 2411.05288 compares with it. All ranks compute the output layer of microbatch i together, in
meeting i: first S, then the barrier, then T. Between two meetings every rank runs one F and one B.
Neighbouring ranks run these in opposite order. Then the rank d places before the last runs F(i)
floor(d/2) + 1 meetings ahead of meeting i, and B(i) d meetings behind it. So 1.5 p microbatches are
in flight on rank 0.
"""

from __future__ import annotations

from schedules.ir import Kind, Pass
from schedules.problem import Problem
from schedules.vocab import End


def interlaced(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Return the passes of the stages and of the output layer on every rank.

    Raises ValueError unless each rank owns one stage.
    """
    if problem.layout.num_chunks != 1:
        raise ValueError(
            f"interlaced has one stage per rank, not {problem.layout.num_chunks}; "
            "use layout 'linear'"
        )
    return tuple(_rank_order(rank, problem) for rank in range(problem.layout.num_ranks))


def _rank_order(rank: int, problem: Problem) -> tuple[Pass, ...]:
    before_last = problem.layout.num_ranks - 1 - rank
    forward_place, backward_place = (1, 2) if before_last % 2 else (2, 1)
    # Passes are sorted by meeting, then by place: 0 is in the meeting, 1 and 2 are the places of F
    # and the backward after it. The third key orders passes of the same place.
    placed: list[tuple[int, int, int, Pass]] = []
    for i in range(problem.num_microbatches):
        placed.append((i - 1 - before_last // 2, forward_place, 0, Pass(rank, Kind.F, i)))
        backward = [kind for kind in problem.stage_kinds if kind is not Kind.F]
        placed += [
            (i + before_last, backward_place, n, Pass(rank, kind, i))
            for n, kind in enumerate(backward)
        ]
        if rank in problem.shard_ranks(End.OUTPUT):
            placed += [
                (i, 0, n, Pass(rank, kind, i))
                for n, kind in enumerate(problem.shard_kinds[End.OUTPUT])
            ]
    return tuple(item for *_, item in sorted(placed))
