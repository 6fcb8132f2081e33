"""The batch-size ramp counts microbatches step by step, and changes nothing that a rank owns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules.generators import GENERATORS
from vp_train.config import ConfigError
from vp_train.planning.plan import check_ramp, make_plan, replan
from vp_train.planning.ramp import BatchRamp
from vp_train.settings import load_config

pairs = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), max_size=4).map(
    lambda found: sorted(dict(found).items())
)


@given(pairs=pairs, dp=st.integers(1, 3), size=st.integers(1, 3))
def test_microbatches_until_a_step_are_the_sum_of_those_of_its_steps(pairs, dp, size):
    ramp = BatchRamp.of([(step, n * dp * size) for step, n in pairs], 12, size, dp)
    counts = [ramp.at(step) for step in range(1, 40)]
    assert [ramp.until(step) for step in range(40)] == [sum(counts[:step]) for step in range(40)]
    assert set(counts) == set(ramp.sizes)
    assert counts[30:] == [12] * 9
    for (before, _), (step, count) in zip([(0, 0), *pairs], pairs, strict=False):
        assert counts[before:step] == [count] * (step - before)


SMALL = ("model.num_layers=8", "parallel.pp=2", "num_microbatches=8")


@pytest.mark.parametrize("name", GENERATORS)
def test_a_rank_owns_the_same_in_steps_of_every_size(name):
    config = load_config([*SMALL, f"schedule={name}", "batch_ramp=[[3,2],[5,4]]"])
    plan = make_plan(config, 2)
    check_ramp(config, plan)
    for count in (2, 4, 8):
        step = replan(config, plan, count)
        assert step.program.num_microbatches == step.work.num_microbatches == count
        assert step.layers_of_ranks == plan.layers_of_ranks
        assert step.evaluation_program is plan.evaluation_program


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "batch_ramp=[[5,3]] micro_batch_size=2",
            "3 sequences cannot be split into microbatches of ",
        ),
        ("batch_ramp=[[5,3],[5,4]]", "step 5 comes after step 5; give the steps in order"),
        ("batch_ramp=[[5,3,2]]", r"\[5, 3, 2\] is not a pair of a step and a number of"),
        ("batch_ramp=[[5,0]]", "batch_ramp=0 is too small"),
        ("batch_ramp=[[5,2]] schedule=auto", "schedule=auto has one; choose a schedule by name"),
        (
            "batch_ramp=[[5,16]]",
            "16 sequences until step 5 are more than the 8 of a full step, and",
        ),
        (
            "batch_ramp=[[5,4],[9,2]]",
            r"2 sequences until step 9 are fewer than the 4 before, .*; give",
        ),
        (
            "batch_ramp=[[5,12]] micro_batch_size=2 num_microbatches=4",
            r"12 sequences until step 5 are more than the 8 of a full step, .* or drop it",
        ),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused(words, message):
    def planned():
        config = load_config([*SMALL, *words.split()])
        check_ramp(config, make_plan(config, 2))

    with pytest.raises(ConfigError, match=message):
        planned()


def test_a_step_that_cannot_be_planned_is_named():
    config = load_config([*SMALL, "batch_ramp=[[3,2]]"])
    message = r"^batch_ramp has steps of 131,072 microbatches in each replica: num_micro"
    with pytest.raises(ConfigError, match=message):
        replan(config, make_plan(config, 2), 131072)
