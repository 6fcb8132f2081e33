"""A program says what its passes and collectives are for; test_replay.py has how long it takes."""

import pytest

from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.lower import Action, gradient_of, lower
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS, End


def case_of(p, m, name, algorithm):
    """Return a schedule with unequal passes, its problem and its costs."""
    family = GENERATORS[name]
    layout = family.layout_of(p)
    problem = Problem(layout, m, VOCAB_ALGORITHMS[algorithm], family.split_backward)
    seconds = {"F": 1.0, "B": 2.0, "I": 1.1, "W": 0.9, "S": 0.57, "T": 0.31, "E": 0.05, "G": 0.03}
    cost = CostModel.uniform(layout.num_stages, p, hop=0.07, barrier=0.13, **seconds)
    return generate(name, problem, cost), problem, cost


@pytest.mark.parametrize("algorithm", sorted(VOCAB_ALGORITHMS))
@pytest.mark.parametrize("name", ["1f1b", "v_min"])
def test_a_gradient_is_complete_after_the_last_pass_that_adds_to_it(name, algorithm):
    case = case_of(2, 4, name, algorithm)
    for tied, program in ((False, lower(*case)), (True, lower(*case, tied=True))):
        assert program.tied == tied
        for ops in program.ranks:
            passes = [op for op in ops if op.action is Action.RUN]
            added_to = [gradient_of(op.item, case[1], tied=tied) for op in passes]
            last = {owner: op.item for owner, op in zip(added_to, passes, strict=True) if owner}
            assert {op.item for op in ops if op.completes} == set(last.values())


@pytest.mark.parametrize("algorithm", sorted(VOCAB_ALGORITHMS))
@pytest.mark.parametrize("name", ["1f1b", "v_min"])
def test_the_root_of_a_collective_has_the_stage_at_its_end(name, algorithm):
    schedule, problem, cost = case_of(3, 2, name, algorithm)
    ends = {End.INPUT: 0, End.OUTPUT: problem.last_stage}
    for ops in lower(schedule, problem, cost).ranks:
        for exchange in (op.exchange for op in ops if op.action is Action.START):
            assert exchange.stage == ends[exchange.end]
            assert exchange.root == problem.layout.rank_of(exchange.stage)
