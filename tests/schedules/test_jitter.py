"""Laws of disturbed steps: nothing drawn is the simulated step, and what is drawn is seeded."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.jitter import Disturbance, disturbed_steps
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS

KINDS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "S": 0.4, "T": 0.2, "E": 0.01, "G": 0.02}


def case(name="v_half", algorithm="one_barrier", p=3, m=6, **costs):
    """Return the schedule `name` with its problem and costs."""
    family = GENERATORS[name]
    layout = family.layout_of(p)
    problem = Problem(layout, m, VOCAB_ALGORITHMS[algorithm], family.split_backward)
    cost = CostModel.uniform(
        layout.num_stages, p, **({"hop": 0.03, "barrier": 0.07} | KINDS | costs)
    )
    return generate(name, problem, cost), problem, cost


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(list(GENERATORS)),
    algorithm=st.sampled_from(list(VOCAB_ALGORITHMS)),
    p=st.integers(1, 4),
    m=st.integers(1, 6),
    forward=st.floats(0.1, 3),
    barrier=st.floats(0, 2),
)
def test_undisturbed_steps_are_exactly_the_simulated_one(name, algorithm, p, m, forward, barrier):
    schedule, problem, cost = case(name, algorithm, p, m, F=forward, barrier=barrier)
    steps = disturbed_steps(schedule, problem, cost, Disturbance(), 3)
    assert steps.seconds == (simulate(schedule, problem, cost).makespan,) * 3
    assert (steps.longer, steps.planned) == (0, steps.seconds[0])


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_on_one_rank_only_the_sum_of_the_passes_counts(name):
    schedule, problem, cost = case(name, p=1, m=40, hop=0, barrier=0)
    steps = disturbed_steps(schedule, problem, cost, Disturbance(jitter=0.3), 400, seed=1)
    assert steps.mean == pytest.approx(steps.planned, rel=0.01), "factors have mean 1"
    durations = [cost.seconds(item) for _, item in schedule.passes()]
    deviation = 0.3 * math.sqrt(sum(seconds**2 for seconds in durations))
    assert statistics.stdev(steps.seconds) == pytest.approx(deviation, rel=0.15)


def test_a_straggler_is_each_rank_in_turn_and_costs_its_own_work():
    schedule, problem, cost = case("1f1b", "none", p=4, m=32, S=0, T=0, hop=0, barrier=0)
    steps = disturbed_steps(schedule, problem, cost, Disturbance(straggler=0.5), 8)
    assert steps.seconds[:4] == steps.seconds[4:]
    for slow in range(4):
        slowed = {
            kind: tuple(s * (1.5 if r == slow else 1) for r, s in enumerate(values))
            for kind, values in cost.pass_seconds.items()
        }
        expected = simulate(schedule, problem, CostModel(slowed)).makespan
        assert steps.seconds[slow] == pytest.approx(expected)


def test_the_seed_decides_and_more_samples_only_add():
    schedule, problem, cost = case()
    drawn = Disturbance(jitter=0.1, straggler=0.2)
    first = disturbed_steps(schedule, problem, cost, drawn, 5, seed=3)
    assert disturbed_steps(schedule, problem, cost, drawn, 9, seed=3).seconds[:5] == first.seconds
    assert disturbed_steps(schedule, problem, cost, drawn, 5, seed=4).seconds != first.seconds
    assert min(first.seconds) <= first.quantile(0.05) <= first.quantile(0.5) <= max(first.seconds)


def test_more_jitter_makes_steps_longer_since_ranks_wait_for_the_last():
    schedule, problem, cost = case(p=4, m=16)
    longer = [
        disturbed_steps(schedule, problem, cost, Disturbance(jitter=jitter), 30).longer
        for jitter in (0.0, 0.1, 0.3)
    ]
    assert 0 == longer[0] < longer[1] < longer[2]


@pytest.mark.parametrize(
    ("disturbance", "samples"), [({"jitter": -1}, 1), ({"straggler": math.nan}, 1), ({}, 0)]
)
def test_what_cannot_be_drawn_is_refused(disturbance, samples):
    with pytest.raises(ValueError, match="at least"):
        disturbed_steps(*case(), Disturbance(**disturbance), samples)
