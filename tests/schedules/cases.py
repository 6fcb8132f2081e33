"""Problems and costs the schedule tests share."""

from schedules.cost import CostModel
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS


def problem(p: int, m: int, algorithm: str = "none") -> Problem:
    return Problem(Layout("linear", p), m, VOCAB_ALGORITHMS[algorithm])


def cost(p: int, **seconds: float) -> CostModel:
    """F=1, B=2 unless told; vocabulary passes cost nothing unless told."""
    return CostModel.uniform(p, p, **({"F": 1.0, "B": 2.0} | seconds))
