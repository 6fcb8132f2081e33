"""The schedules, by name.  `generate` is the only entry: it places the vocabulary passes of the problem into the base order."""

from __future__ import annotations

from collections.abc import Callable

from schedules.cost import CostModel
from schedules.generators.gpipe import gpipe
from schedules.generators.one_f_one_b import one_f_one_b
from schedules.generators.weave import weave
from schedules.ir import Pass, Schedule
from schedules.problem import Problem

BaseOrder = tuple[tuple[Pass, ...], ...]

GENERATORS: dict[str, Callable[[Problem], BaseOrder]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
}


def generate(name: str, problem: Problem, cost: CostModel) -> Schedule:
    """The schedule `name` for `problem`.  Raises ValueError for a name that is not in the table."""
    if name not in GENERATORS:
        raise ValueError(f"schedule {name!r} is not known; choose one of {', '.join(GENERATORS)}")
    return weave(name, GENERATORS[name](problem), problem, cost)
