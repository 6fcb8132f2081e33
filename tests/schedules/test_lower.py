"""A program takes as long as its schedule: lowering adds no waits."""

import pytest

from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.lower import lower
from schedules.problem import Problem
from schedules.replay import GLOO, replay
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS


@pytest.mark.parametrize("algorithm", sorted(VOCAB_ALGORITHMS))
@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 12)])
def test_a_program_takes_as_long_as_its_schedule(p, m, name, algorithm):
    family = GENERATORS[name]
    layout = family.layout_of(p)
    problem = Problem(layout, m, VOCAB_ALGORITHMS[algorithm], family.split_backward)
    seconds = {"F": 1.0, "B": 2.0, "I": 1.1, "W": 0.9, "S": 0.57, "T": 0.31, "E": 0.05, "G": 0.03}
    cost = CostModel.uniform(layout.num_stages, p, hop=0.07, barrier=0.13, **seconds)
    schedule = generate(name, problem, cost)
    taken = replay(lower(schedule, problem, cost), cost, GLOO).timeline
    assert taken.makespan == pytest.approx(simulate(schedule, problem, cost).makespan)
