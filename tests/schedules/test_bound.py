"""The lower bounds in closed form."""

import operator
from itertools import product

import pytest

from schedules.bound import Bound, most_work, one_machine, steady_bytes, step_bound
from schedules.cost import CostModel
from schedules.generators import generate
from schedules.network import Network
from schedules.simulate import simulate
from tests.schedules.cases import cost, problem
from tests.schedules.test_auto import CLOSE, options_of


@pytest.mark.parametrize(
    ("jobs", "copies", "seconds"),
    [
        ([(2, 3, 1)], 4, 2 + 4 * 3 + 1),
        ([(0, 1, 5), (0, 1, 0)], 1, 6),  # the job with the longer tail goes first
        ([(0, 1, 5), (0, 1, 5)], 3, 6 + 5),
        ([(0, 4, 0), (1, 1, 9)], 1, 1 + 1 + 9),  # the late job interrupts the early one
        ([(0, 1, 0), (10, 1, 0)], 1, 11),  # idle in between
        ([], 5, 0),
    ],
)
def test_one_machine(jobs, copies, seconds):
    assert one_machine(jobs, copies) == seconds


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 3), (4, 8), (8, 64)])
def test_a_balanced_pipeline_takes_its_work_and_one_fill_and_drain(p, m):
    assert step_bound(problem(p, m), cost(p)).seconds == 3 * m + 3 * (p - 1)


@pytest.mark.parametrize(("p", "m"), [(2, 3), (4, 8)])
def test_memory_for_one_microbatch_means_one_after_the_other(p, m):
    """Stage 0 keeps a microbatch for F + B of all stages. The next one must wait (Little's law)."""
    costs = CostModel.uniform(p, p, F=1.0, B=2.0)
    costs = CostModel(costs.pass_seconds, stage_bytes=(1.0,) * p)
    bound = step_bound(problem(p, m), costs, (1.0,) * p)
    assert bound.seconds == m * 3 * p
    assert bound.reason == "the memory of rank 0"
    assert step_bound(problem(p, m), costs, (float(p),) * p).seconds == 3 * m + 3 * (p - 1)


def test_a_steady_state_keeps_the_life_of_a_microbatch_over_its_interval():
    costs = CostModel(CostModel.uniform(4, 4, F=1.0, B=2.0).pass_seconds, stage_bytes=(1.0,) * 4)
    case = problem(4, 8)
    assert [steady_bytes(rank, case, Network.of(case, costs)) for rank in range(4)] == [
        4.0,
        3.0,
        2.0,
        1.0,
    ]


def test_no_work_at_all_has_no_steady_state():
    case = problem(2, 2)
    nothing = CostModel.uniform(2, 2, F=0.0, B=0.0)
    assert steady_bytes(0, case, Network.of(case, nothing)) == 0.0


@pytest.mark.parametrize(("p", "m", "cap"), [(3, 4, 1.0), (3, 4, 0.5), (4, 4, 1.5)])
def test_memory_allows_what_its_cap_lasts_for_between_the_way_in_and_the_way_out(p, m, cap):
    """Rank 1 keeps 1 byte of a microbatch during its own F + B and those of all later ranks.

    The F of rank 0 comes before the first of these bytes, and the B of rank 0 after the last.
    """
    seconds = 1.0 + m * 3.0 * (p - 1) / cap + 2.0
    caps = tuple(cap if rank == 1 else 1000.0 for rank in range(p))
    assert step_bound(problem(p, m), cost(p), caps) == Bound(seconds, "the memory of rank 1")
    assert step_bound(problem(p, m), cost(p), (*caps[:1], 0.0, *caps[2:])).seconds == float("inf")
    assert step_bound(problem(p, m), cost(p), (1000.0,) * p) == step_bound(problem(p, m), cost(p))


@pytest.mark.parametrize("room", [0.0, 0.9, 4.65, 5.3])
def test_the_most_work_within_some_bytes_is_that_of_the_best_counts(room):
    items = [(0.5, 1.0), (1.0, 2.9), (0.5, 0.7), (0.15, 0.3)]
    best = max(
        sum(count * seconds for count, (_, seconds) in zip(counts, items, strict=True))
        for counts in product(*(range(int(room / size) + 1) for size, _ in items))
        if sum(count * size for count, (size, _) in zip(counts, items, strict=True)) <= room + 1e-9
    )
    assert most_work(items, room, 100) == pytest.approx(best)
    assert most_work([*items, (0.0, 2.0)], room, 3) == pytest.approx(best + 3 * 2.0)
    many = [(1.0 + place / 10, 1.0) for place in range(9)]
    assert most_work(many, room, 100) == pytest.approx(room), "fractions count"


@pytest.mark.parametrize("m", [8, 20])
def test_a_rank_runs_what_its_memory_takes_before_its_first_backward_and_after_its_last_f(m):
    """Rank 1 of 4 keeps 2 microbatches, so 2 F come before its first B and 2 B after its last F.

    Its first B starts after 4 F and 2 B of the pipeline. Behind its last F come 2 F and 4 B.
    """
    bound = step_bound(problem(4, m), cost(4), (1000.0, 2.0, 1000.0, 1000.0))
    assert bound.seconds == max(3 * m + (4 + 2 * 2 - 2) + (2 + 4 * 2 - 2 * 2), 1 + m * 9 / 2 + 2)


# Sums of bounds for three shares of the memory that a step needs, and of bytes.  Better bounds
# raise their figures here.
BOUNDS = {
    "1f1b": (728.82124, 777.88949, 1368.3838, 28.319729),
    "interleaved": (624.7002, 638.04584, 809.71935, 23.02628),
    "zb_h1": (658.23264, 661.82377, 769.46723, 15.001331),
    "v_half": (672.13706, 678.36647, 791.87986, 16.503119),
}


@pytest.mark.parametrize(("name", "known"), BOUNDS.items())
def test_bounds_are_neither_beaten_nor_lower_than_they_were(name, known):
    """Passes and bytes are unequal, and some caps bind in the steady state or at an end.

    A lower bound that is not beaten has become weaker.
    """
    found = [0.0] * 4
    for seed, (p, m) in enumerate(((1, 4), (2, 3), (3, 8), (4, 20), (4, 9))):
        (option,) = options_of(p, m, spread=0.5, names=(name,), seed=seed)
        case, costs = option.problem, option.cost
        step = simulate(generate(name, case, costs, effort=0), case, costs)
        for place, part in enumerate((1.0, 0.5, 0.25)):
            caps = tuple(part * held for held in step.peak_bytes)
            for rank in range(p):
                only = tuple(cap if r == rank else 1e9 for r, cap in enumerate(caps))
                bound = step_bound(case, costs, only).seconds
                assert part < 1.0 or bound <= step.makespan * CLOSE
                found[place] += bound
        network = Network.of(case, costs)
        found[3] += sum(steady_bytes(rank, case, network) for rank in range(p))
    assert all(map(operator.ge, found, (figure * (1 - 1e-6) for figure in known))), found
