"""The schedules, by name.  `generate` is the only entry: it places the vocabulary passes of the problem into the base order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from schedules.cost import CostModel
from schedules.generators.gpipe import gpipe
from schedules.generators.one_f_one_b import one_f_one_b
from schedules.generators.v_shape import v_half, v_min
from schedules.generators.weave import weave
from schedules.generators.zero_bubble import zb_h1
from schedules.ir import Pass, Schedule
from schedules.layout import Layout
from schedules.problem import Problem

BaseOrder = tuple[tuple[Pass, ...], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """A base schedule: its order of stage passes, where its stages live, and whether it splits B into I and W."""

    base_order: Callable[[Problem], BaseOrder]
    layout: str = "linear"
    num_chunks: int = 1
    split_backward: bool = False

    def layout_of(self, num_ranks: int) -> Layout:
        return Layout(self.layout, num_ranks, self.num_chunks)


GENERATORS: dict[str, Family] = {
    "gpipe": Family(gpipe),
    "1f1b": Family(one_f_one_b),
    "zb_h1": Family(zb_h1, split_backward=True),
    "v_half": Family(v_half, "v", 2, split_backward=True),
    "v_min": Family(v_min, "v", 2, split_backward=True),
}


def generate(name: str, problem: Problem, cost: CostModel) -> Schedule:
    """The schedule `name` for `problem`.  Raises ValueError for a name that is not in the table."""
    if name not in GENERATORS:
        raise ValueError(f"schedule {name!r} is not known; choose one of {', '.join(GENERATORS)}")
    return weave(name, GENERATORS[name].base_order(problem), problem, cost)
