"""V-Half and V-Min (arXiv 2405.15362): rank r owns stages r and 2p-1-r, and a building block fixes the memory.

A block places the passes of one microbatch in time, with F = I = W = 1 and a new microbatch every 6: on every rank the lives
of its two activations then add up to the same, about half or a third of what 1F1B needs on its first rank.  The order of
the passes on a rank is that of the blocks repeated; weight gradients are free to fill the gaps (see `weave`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from schedules.ir import Kind, Pass
from schedules.problem import Problem

_INTERVAL = 6
_STEPS, _TURNS = (1, 2, 3), (1, 2, 3, 4)

BaseOrder = tuple[tuple[Pass, ...], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """When a microbatch comes by: it walks over the ranks four times, down and up with F, down and up with I.

    `steps`: the time from one rank to the next on each walk.  `turns`: from the end of a walk to the start of the next, on
    the same rank.
    """

    steps: tuple[int, int, int, int]
    turns: tuple[int, int, int]

    def starts(self, p: int) -> list[tuple[int, int, int, int]]:
        """For each of p ranks: F of its first and second chunk, then I of the second and first."""
        first, second, third, fourth = self.steps
        f1 = first * (p - 1) + self.turns[0]
        i1 = f1 + second * (p - 1) + self.turns[1]
        i0 = i1 + third * (p - 1) + self.turns[2]
        return [
            (first * r, f1 + second * (p - 1 - r), i1 + third * r, i0 + fourth * (p - 1 - r))
            for r in range(p)
        ]

    def length(self, p: int) -> int:
        """From the first F to the last I on p ranks."""
        return self.starts(p)[0][3]

    def in_flight(self, p: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """For each of p ranks: how many (first, second) chunks are in flight at F of its first and at F of its second."""
        return [
            (
                (_alive(f0, f0, i0 + 2), _alive(f0, f1, i1 + 2)),
                (_alive(f1, f0, i0 + 2), _alive(f1, f1, i1 + 2)),
            )
            for f0, f1, i1, i0 in self.starts(p)
        ]

    def order(self, problem: Problem) -> BaseOrder:
        """The blocks of all microbatches.  Raises ValueError unless laid out as a V with B split."""
        layout = problem.layout
        if layout.name != "v" or not problem.split_backward:
            raise ValueError(
                f"a V-shaped schedule needs layout 'v' and a split backward, not layout {layout.name!r}"
            )
        orders = []
        for rank, (f0, f1, i1, i0) in enumerate(self.starts(layout.num_ranks)):
            first, second = layout.stages_of(rank)
            block = [(f0, first, Kind.F), (f1, second, Kind.F)]
            for start, stage in ((i1, second), (i0, first)):
                block += [(start, stage, Kind.I), (start + 1, stage, Kind.W)]
            placed = [
                (start + _INTERVAL * microbatch, order, Pass(stage, kind, microbatch))
                for microbatch in range(problem.num_microbatches)
                for order, (start, stage, kind) in enumerate(block)
            ]
            orders.append(tuple(item for *_, item in sorted(placed)))
        return tuple(orders)


def _alive(now: int, start: int, end: int) -> int:
    """How many of the lives [start, end), repeated every interval, `now` falls into."""
    return (now - start) // _INTERVAL - (now - end) // _INTERVAL


def v_half(problem: Problem) -> BaseOrder:
    """Peak (p + 2) // 2 microbatches, one more for each barrier.  Raises ValueError unless laid out as a V with B split."""
    shift = 3 if problem.layout.num_ranks % 2 == 0 else 0
    return Block((2, 1, 2, 1), (1, 1 + shift + _delay(problem), 2)).order(problem)


def v_min(problem: Problem) -> BaseOrder:
    """Peak (p + 4) // 3 microbatches, one more for each barrier.  Raises ValueError unless laid out as a V with B split."""
    shift = 2 if problem.layout.num_ranks % 3 == 0 else 0
    return Block((1, 1, 1, 1), (1, 1 + shift + _delay(problem), 1)).order(problem)


def blocks(problem: Problem) -> Iterator[Block]:
    """Every block with short steps and turns whose passes never meet on a rank."""
    p, barriers = problem.layout.num_ranks, problem.algorithm.extra_in_flight
    middle_turns = range(1 + barriers, 2 + _INTERVAL * max(1, barriers))
    for *steps, down, middle, up in product(
        _STEPS, _STEPS, _STEPS, _STEPS, _TURNS, middle_turns, _TURNS
    ):
        first, second, third, fourth = steps
        block = Block((first, second, third, fourth), (down, middle, up))
        if all(len({start % _INTERVAL for start in starts}) == 4 for starts in block.starts(p)):
            yield block


def _delay(problem: Problem) -> int:
    """Each barrier takes an interval between the last F and the first I."""
    return _INTERVAL * problem.algorithm.extra_in_flight
