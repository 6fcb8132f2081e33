"""Problems and costs that the schedule tests share."""

from schedules.cost import CostModel
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS


def problem(p: int, m: int, algorithm: str = "none") -> Problem:
    """Return the problem of m microbatches and p stages, one per rank."""
    return Problem(Layout("linear", p), m, VOCAB_ALGORITHMS[algorithm])


def cost(p: int, **seconds: float) -> CostModel:
    """Return costs with F=1, B=2 and free vocabulary passes, where `seconds` has no other value."""
    return CostModel.uniform(p, p, **({"F": 1.0, "B": 2.0} | seconds))
