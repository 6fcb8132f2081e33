"""V-Half and V-Min (arXiv 2405.15362): rank r owns stages r and 2p-1-r.

A building block places the passes of one microbatch in time, with F = I = W = 1. Repeated for every
microbatch, at an interval of 6, the blocks give the order of the passes on every rank. The block
also fixes the memory. The lifetimes of the two activations of a rank have the same sum on every
rank: about a half (V-Half) or a third (V-Min) of what 1F1B needs on its first rank. Weight
gradients may move to fill gaps (see `weave`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from schedules.ir import Kind, Pass
from schedules.problem import Problem

INTERVAL = 6
_STEPS, _TURNS = (1, 2, 3), (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Block:
    """A building block: the times at which the passes of one microbatch start.

    The microbatch walks over the ranks four times: F of the first chunks from rank 0 to p-1, F of
    the second chunks back to rank 0, I of the second chunks to rank p-1, I of the first chunks
    back. `steps` are the times from one rank to the next on the four walks. `turns` are the times
    from the last start of a walk to the first start of the next, on the same rank.
    """

    steps: tuple[int, int, int, int]
    turns: tuple[int, int, int]

    def starts(self, p: int) -> list[tuple[int, int, int, int]]:
        """Return for each of p ranks the start of F of its first and second chunk, then of I.

        I of the second chunk comes before I of the first.
        """
        first, second, third, fourth = self.steps
        f1 = first * (p - 1) + self.turns[0]
        i1 = f1 + second * (p - 1) + self.turns[1]
        i0 = i1 + third * (p - 1) + self.turns[2]
        return [
            (first * r, f1 + second * (p - 1 - r), i1 + third * r, i0 + fourth * (p - 1 - r))
            for r in range(p)
        ]

    def length(self, p: int) -> int:
        """Return the time from the first F to the last I on p ranks."""
        return self.starts(p)[0][3]

    def in_flight(self, p: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return how many microbatches are in flight in the steady state on each of p ranks.

        A rank has two pairs, at the start of F of its first chunk and of its second. A pair counts
        the microbatches in flight in its (first, second) chunk.
        """
        return [
            (
                (_alive(f0, f0, i0 + 2), _alive(f0, f1, i1 + 2)),
                (_alive(f1, f0, i0 + 2), _alive(f1, f1, i1 + 2)),
            )
            for f0, f1, i1, i0 in self.starts(p)
        ]

    def order(self, problem: Problem) -> tuple[tuple[Pass, ...], ...]:
        """Return the order of the blocks of all microbatches on every rank.

        Raises ValueError unless the layout is a V and the backward is split.
        """
        layout = problem.layout
        if layout.name != "v" or not problem.split_backward:
            raise ValueError(
                "a V-shaped schedule needs layout 'v' and a split backward, "
                f"not layout {layout.name!r}"
            )
        orders = []
        for rank, (f0, f1, i1, i0) in enumerate(self.starts(layout.num_ranks)):
            first, second = layout.stages_of(rank)
            block = [(f0, first, Kind.F), (f1, second, Kind.F)]
            for start, stage in ((i1, second), (i0, first)):
                block += [(start, stage, Kind.I), (start + 1, stage, Kind.W)]
            placed = [
                (start + INTERVAL * microbatch, order, Pass(stage, kind, microbatch))
                for microbatch in range(problem.num_microbatches)
                for order, (start, stage, kind) in enumerate(block)
            ]
            orders.append(tuple(item for *_, item in sorted(placed)))
        return tuple(orders)


def _alive(now: int, start: int, end: int) -> int:
    """Return how many of the intervals [start, end), repeated every INTERVAL, contain `now`."""
    return (now - start) // INTERVAL - (now - end) // INTERVAL


def v_half(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Return the order of V-Half: (p + 2) // 2 microbatches in flight, one more per barrier.

    Raises ValueError unless the layout is a V and the backward is split.
    """
    shift = 3 if problem.layout.num_ranks % 2 == 0 else 0
    return Block((2, 1, 2, 1), (1, 1 + shift + _delay(problem), 2)).order(problem)


def v_min(problem: Problem) -> tuple[tuple[Pass, ...], ...]:
    """Return the order of V-Min: (p + 4) // 3 microbatches in flight, one more per barrier.

    Raises ValueError unless the layout is a V and the backward is split.
    """
    shift = 2 if problem.layout.num_ranks % 3 == 0 else 0
    return Block((1, 1, 1, 1), (1, 1 + shift + _delay(problem), 1)).order(problem)


def blocks(problem: Problem) -> Iterator[Block]:
    """Yield every block with short steps and turns whose passes never overlap on a rank."""
    p, barriers = problem.layout.num_ranks, problem.algorithm.extra_in_flight
    middle_turns = range(1 + barriers, 2 + INTERVAL * max(1, barriers))
    for *steps, down, middle, up in product(
        _STEPS, _STEPS, _STEPS, _STEPS, _TURNS, middle_turns, _TURNS
    ):
        first, second, third, fourth = steps
        block = Block((first, second, third, fourth), (down, middle, up))
        if all(len({start % INTERVAL for start in starts}) == 4 for starts in block.starts(p)):
            yield block


def _delay(problem: Problem) -> int:
    """Return the time that the barriers take between the last F and the first I."""
    return INTERVAL * problem.algorithm.extra_in_flight
