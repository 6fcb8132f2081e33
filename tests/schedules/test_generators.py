"""The laws of the schedules: first closed forms for some, then properties of all schedules."""

from dataclasses import replace
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules import generators
from schedules.bound import step_bound
from schedules.check import check_program, check_schedule
from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.generators.v_shape import blocks
from schedules.ir import Kind
from schedules.layout import Layout
from schedules.lower import Action, lower
from schedules.problem import Problem
from schedules.simulate import peak, peak_in_flight, simulate
from schedules.vocab import VOCAB_ALGORITHMS, evaluation
from tests.schedules.cases import cost, problem

SIZES = [(1, 1), (1, 5), (2, 1), (3, 2), (4, 8), (5, 3), (8, 16)]


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_time_is_the_work_plus_one_fill_and_drain(name, p, m):
    timeline = simulate(generate(name, problem(p, m), cost(p)), problem(p, m), cost(p))
    assert timeline.makespan == pytest.approx((m + p - 1) * 3)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_gpipe_keeps_every_microbatch_in_flight(p, m):
    timeline = simulate(generate("gpipe", problem(p, m), cost(p)), problem(p, m), cost(p))
    assert timeline.peak_in_flight == (m,) * p


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize(
    ("algorithm", "extra"), [("none", 0), ("one_barrier", 1), ("two_barrier", 2)]
)
def test_1f1b_keeps_p_microbatches_in_flight_and_one_more_for_each_barrier(algorithm, extra, p, m):
    costs = cost(p, S=0.6, T=0.4, E=0.05, G=0.05, hop=0.01, barrier=0.02)
    case = problem(p, m, algorithm)
    timeline = simulate(generate("1f1b", case, costs), case, costs)
    assert timeline.peak_in_flight == tuple(min(m, p - rank + extra) for rank in range(p))


@pytest.mark.parametrize(
    ("algorithm", "extra"), [("none", 0), ("one_barrier", 1), ("two_barrier", 2)]
)
@pytest.mark.parametrize("p", [2, 3, 5])
def test_zb_h2_keeps_2p_minus_1_microbatches_in_flight_which_hides_hops(algorithm, extra, p):
    m = 6 * p
    case = Problem(Layout("linear", p), m, VOCAB_ALGORITHMS[algorithm], split_backward=True)
    seconds = {}
    for hop in (0.0, 2.0):
        times = {"F": 1.0, "I": 1.0, "W": 1.0, "S": 0.2, "T": 0.1, "E": 0.01, "G": 0.01}
        costs = CostModel.uniform(p, p, hop=hop, barrier=0.01, **times)
        for name, most in (("zb_h1", p), ("zb_h2", 2 * p - 1)):
            timeline = simulate(generate(name, case, costs), case, costs)
            assert max(timeline.peak_in_flight) <= most + extra
            seconds[name, hop] = timeline.makespan
    assert seconds["zb_h2", 2.0] < 0.98 * seconds["zb_h1", 2.0]
    assert seconds["zb_h2", 0.0] <= 1.01 * seconds["zb_h1", 0.0]


@pytest.mark.parametrize("algorithm", ["none", "one_barrier", "two_barrier"])
@pytest.mark.parametrize("name", ["zb_h1", "zb_h2", "zb_v", "v_half", "v_min"])
def test_where_stages_recompute_at_most_one_waits_for_its_weight_gradient(name, algorithm):
    """I computes their activations again, so what waits for W keeps four times what F does."""
    for p, m in ((2, 7), (3, 9), (4, 4), (4, 16)):
        layout = GENERATORS[name].layout_of(p)
        case = Problem(layout, m, VOCAB_ALGORITHMS[algorithm], split_backward=True)
        times = {"F": 1.0, "I": 2.0, "W": 1.0, "S": 0.4, "T": 0.2, "E": 0.1, "G": 0.1}
        plain = CostModel.uniform(layout.num_stages, p, hop=0.05, barrier=0.1, **times)
        costs = replace(plain, weight_bytes=(4.0,) * layout.num_stages)
        orders = generate(name, case, costs).ranks
        for base, order in zip(GENERATORS[name].base_order(case), orders, strict=True):
            flying = peak((i.kind is Kind.F) - (i.kind is Kind.I) for i in base)
            kept = [peak(map(costs.byte_change, one)) for one in (base, order)]
            assert kept[1] <= min(kept[0], flying - 1 + 2 * 4.0) + 0.1 * 4.0


@pytest.mark.parametrize("algorithm", ["one_barrier", "two_barrier"])
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_the_steady_state_of_1f1b_has_no_bubble(algorithm, p):
    costs = cost(p, S=0.8, T=0.4, E=0.05, G=0.05, hop=0.01, barrier=0.02)
    work_of_one = 3 + 0.8 + 0.4 + 0.1

    def makespan(m: int) -> float:
        case = problem(p, m, algorithm)
        return simulate(generate("1f1b", case, costs), case, costs).makespan

    assert (makespan(16 * p) - makespan(8 * p)) / (8 * p) == pytest.approx(work_of_one, rel=0.01)


@pytest.mark.parametrize("algorithm", ["one_barrier", "two_barrier"])
def test_sharding_an_expensive_vocabulary_beats_the_end_stages(algorithm):
    p, m = 4, 16
    whole, split = cost(p, S=4.8, T=2.4), cost(p, S=1.2, T=0.6, barrier=0.1)
    plain = simulate(generate("1f1b", problem(p, m), whole), problem(p, m), whole)
    case = problem(p, m, algorithm)
    assert simulate(generate("1f1b", case, split), case, split).makespan < 0.6 * plain.makespan


@st.composite
def any_case(draw):
    p, m = draw(st.integers(1, 8)), draw(st.integers(1, 24))
    seconds = st.floats(0.01, 3.0)
    name = draw(st.sampled_from(sorted(GENERATORS)))
    family = GENERATORS[name]
    layout = family.layout_of(p, draw(st.integers(1, 3)) if family.layout == "loop" else None)
    sizes = {kind: p if kind.is_vocabulary else layout.num_stages for kind in Kind}
    values = {
        kind: tuple(draw(st.lists(seconds, min_size=size, max_size=size)))
        for kind, size in sizes.items()
    }
    barriers = dict.fromkeys(("CE", "C0", "C1", "C1b", "C2", "CG"), draw(st.floats(0.0, 0.5)))
    costs = CostModel(
        values, draw(st.floats(0.0, 0.3)), barriers, (1.0,) * layout.num_stages, (0.5,) * p
    )
    algorithm = VOCAB_ALGORITHMS[draw(st.sampled_from(sorted(VOCAB_ALGORITHMS)))]
    if draw(st.booleans()):
        return "gpipe", Problem(layout, m, evaluation(algorithm), forward_only=True), costs
    return name, Problem(layout, m, algorithm, family.split_backward), costs


@given(any_case())
@settings(max_examples=80, deadline=None)
def test_every_schedule_is_valid_and_free_of_deadlock(case):
    name, any_problem, costs = case
    with pytest.MonkeyPatch.context() as patched:  # the law holds at any effort
        patched.setattr(generators, "_EFFORT", 20_000)
        schedule = generate(name, any_problem, costs)
    check_schedule(schedule, any_problem)
    check_program(lower(schedule, any_problem, costs), any_problem)
    timeline = simulate(schedule, any_problem, costs)
    base = GENERATORS[name].base_order(any_problem)
    assert all(
        got <= peak_in_flight(list(order), any_problem)
        for got, order in zip(timeline.peak_in_flight, base, strict=True)
    )
    assert timeline.makespan >= step_bound(any_problem, costs, timeline.peak_bytes).seconds * (
        1 - 1e-9
    )
    for spans in timeline.compute:
        for earlier, later in pairwise(spans):
            assert later.start >= earlier.end


@st.composite
def case_with_a_large_vocabulary(draw):
    """Draw stages that differ by up to 20 %, and an output layer that costs more than any stage.

    Communication is fast.
    """
    p, m = draw(st.integers(2, 8)), draw(st.integers(1, 24))
    name = draw(st.sampled_from(sorted(GENERATORS)))
    layout = GENERATORS[name].layout_of(p)
    spread = st.floats(0.8, 1.2)
    stages = {
        kind: tuple(draw(spread) for _ in range(layout.num_stages))
        for kind in (Kind.F, Kind.I, Kind.W)
    }
    stages[Kind.B] = tuple(i + w for i, w in zip(stages[Kind.I], stages[Kind.W], strict=True))
    vocabulary = draw(st.floats(1.0, 4.0)) * max(
        f + b for f, b in zip(stages[Kind.F], stages[Kind.B], strict=True)
    )
    hop, barrier = draw(st.floats(0.0, 0.05)), draw(st.floats(0.0, 0.02))
    return name, layout, m, stages, vocabulary, hop, barrier


@given(case_with_a_large_vocabulary())
@settings(max_examples=25, deadline=None)
def test_a_vocabulary_that_costs_more_than_a_stage_is_never_slower_when_sharded(case):
    name, layout, m, stages, vocabulary, hop, barrier = case

    def makespan(algorithm: str, shards: int, barrier: float) -> float:
        passes = {
            kind: (part * vocabulary / shards,) * layout.num_ranks
            for kind, part in ((Kind.S, 2 / 3), (Kind.T, 1 / 3))
        }
        barriers = dict.fromkeys(("CE", "C0", "C1", "C1b", "C2", "CG"), barrier)
        costs = CostModel(
            stages | passes, hop, barriers, (1.0,) * layout.num_stages, (0.1,) * layout.num_ranks
        )
        problem = Problem(layout, m, VOCAB_ALGORITHMS[algorithm], GENERATORS[name].split_backward)
        return simulate(generate(name, problem, costs), problem, costs).makespan

    assert makespan("one_barrier", layout.num_ranks, barrier) <= makespan("none", 1, 0.0)


def test_zero_costs_are_free_of_deadlock_too():
    case = problem(4, 6, "one_barrier")
    free = CostModel({})
    check_program(lower(generate("1f1b", case, free), case, free), case)


def test_an_unknown_schedule_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'2f2b' is not known; choose one of gpipe, 1f1b"):
        generate("2f2b", problem(2, 2), cost(2))


@pytest.mark.parametrize("layout", [Layout("loop", 3, 2), Layout("v", 3, 2), Layout("linear", 3)])
@pytest.mark.parametrize("split_backward", [False, True])
def test_other_layouts_and_split_backward_passes_fit_the_same_rules(layout, split_backward):
    costs = CostModel.uniform(
        layout.num_stages, 3, F=1, B=2, I=1, W=1, S=0.5, T=0.5, E=0.1, G=0.1, hop=0.1, barrier=0.1
    )
    for name in ("gpipe", "1f1b") if layout.num_chunks == 1 else ("gpipe",):
        for algorithm in VOCAB_ALGORITHMS.values():
            case = Problem(layout, 5, algorithm, split_backward=split_backward)
            schedule = generate(name, case, costs)
            check_schedule(schedule, case)
            check_program(lower(schedule, case, costs), case)
            assert simulate(schedule, case, costs).makespan >= 5 * 3 * layout.num_chunks


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_h1", "zb_v", "v_half"])
def test_a_rank_alone_holds_one_shard_and_one_embedding(name):
    """Nobody waits for what it computes, so nothing is computed before it is needed."""
    family = GENERATORS[name]
    layout, algorithm = family.layout_of(1), VOCAB_ALGORITHMS["none"]
    case = Problem(layout, 6, algorithm, split_backward=family.split_backward)
    times = {"F": 1, "B": 2, "I": 1, "W": 1, "S": 0.5, "T": 0.3, "E": 0.1, "G": 0.1}
    (order,) = generate(name, case, CostModel.uniform(layout.num_stages, 1, **times)).ranks
    for first, last in ((Kind.S, Kind.T), (Kind.E, Kind.F)):
        changes = {(first, 0): 1, (last, 0): -1}
        assert peak(changes.get((item.kind, item.stage), 0) for item in order) == 1, (first, order)


@pytest.mark.parametrize("algorithm", sorted(VOCAB_ALGORITHMS))
def test_receives_are_issued_for_no_more_microbatches_than_are_in_flight(algorithm):
    case, costs = (
        problem(4, 32, algorithm),
        cost(4, S=0.6, T=0.3, E=0.05, G=0.05, hop=0.1, barrier=0.1),
    )
    schedule = generate("1f1b", case, costs)
    timeline = simulate(schedule, case, costs)
    for rank, ops in enumerate(lower(schedule, case, costs).ranks):
        buffers = peak = 0
        for op in ops:
            buffers += op.action is Action.RECV
            peak = max(peak, buffers)
            buffers -= op.action is Action.ARRIVE
        assert peak <= timeline.peak_in_flight[rank] + 1


def split_case(name, p, m, algorithm, seconds=None):
    """Return the timeline of a schedule with split backward, with F = I = W = 1 per rank."""
    family = GENERATORS[name]
    layout = family.layout_of(p)
    chunk = 1 / layout.num_chunks
    costs = CostModel.uniform(layout.num_stages, p, F=chunk, I=chunk, W=chunk, **(seconds or {}))
    case = Problem(layout, m, VOCAB_ALGORITHMS[algorithm], split_backward=True)
    schedule = generate(name, case, costs)
    return simulate(schedule, case, costs)


@pytest.mark.usefixtures("unrefined")  # refining never keeps more in flight than the base order
@pytest.mark.parametrize(
    ("algorithm", "extra"), [("none", 0), ("one_barrier", 1), ("two_barrier", 2)]
)
@pytest.mark.parametrize("p", [2, 3, 4, 5, 6, 9])
def test_v_shapes_need_a_half_and_a_third_of_the_memory_and_the_same_on_all_ranks(
    p, algorithm, extra
):
    passes = {"S": 0.3, "T": 0.15, "barrier": 0.05}
    half = split_case("v_half", p, 2 * p, algorithm, passes).peak_in_flight
    third = split_case("v_min", p, 2 * p, algorithm, passes).peak_in_flight
    assert max(half) == 2 * ((p + 2) // 2 + extra)
    assert min(half) >= max(half) - 1
    assert max(third) <= 2 * ((p + 4) // 3 + extra)


@pytest.mark.usefixtures("unrefined")
@pytest.mark.parametrize(
    ("algorithm", "extra"), [("none", 0), ("one_barrier", 1), ("two_barrier", 2)]
)
@pytest.mark.parametrize(("p", "m"), [(1, 3), (3, 2), (4, 16), (8, 32)])
def test_zb_h1_needs_the_memory_of_1f1b_on_its_first_rank(algorithm, extra, p, m):
    assert max(split_case("zb_h1", p, m, algorithm, {"S": 0.3, "T": 0.15}).peak_in_flight) <= min(
        m, p + extra
    )


@pytest.mark.parametrize("p", [2, 4, 8])
def test_the_bubble_of_zb_h1_is_a_third_of_1f1b_when_all_passes_are_equal(p):
    """The bubbles are (p - 1) (F + I - W) and (p - 1) (F + B)."""
    assert split_case("zb_h1", p, 4 * p, "none").makespan == pytest.approx(
        3 * 4 * p + (p - 1) * (1 + 1 - 1)
    )


def test_v_half_with_a_vocabulary_beats_the_published_bubble_at_the_same_memory():
    """The published bubble is 6.0 % at a peak of 6.15 microbatches.

    p=8, m=64, an output layer that costs as much as 2.4 layers, collectives of 0.3, hops of 0.05.
    """
    passes = {"S": 2.4 / 8, "T": 1.2 / 8, "barrier": 0.15, "hop": 0.025, "E": 0.01, "G": 0.01}
    timeline = split_case("v_half", 8, 64, "one_barrier", passes)
    assert max(timeline.peak_in_flight) == 12
    assert timeline.mean_bubble < 0.06


@pytest.mark.parametrize("algorithm", ["none", "one_barrier", "two_barrier"])
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_a_v_shaped_block_keeps_as_many_microbatches_in_flight_as_computed(p, algorithm):
    case = Problem(Layout("v", p, 2), 8 * p, VOCAB_ALGORITHMS[algorithm], split_backward=True)
    some = list(islice(blocks(case), 0, None, 5))
    assert len(some) > 3
    for block in some:
        computed = [max(map(sum, peaks)) for peaks in block.in_flight(p)]
        assert computed == [peak_in_flight(order, case) for order in block.order(case)]


@pytest.mark.parametrize("algorithm", ["none", "one_barrier", "two_barrier"])
@pytest.mark.parametrize(("name", "chunks"), [("1f1b", None), ("interleaved", 2)])
def test_a_long_step_with_effort_for_one_order_has_about_the_best_one(name, chunks, algorithm):
    """Shorter steps tell which; interleaved with two_barrier took 7 % longer with the first one."""
    p = 6
    layout = GENERATORS[name].layout_of(p, chunks)
    costs = CostModel.uniform(
        layout.num_stages, p, F=1 / layout.num_chunks, B=2 / layout.num_chunks, S=0.5, T=0.5
    )
    case = Problem(layout, 6 * p, VOCAB_ALGORITHMS[algorithm])
    one, all_of_them = (
        simulate(generate(name, case, costs, effort=effort), case, costs).makespan
        for effort in (1, None)
    )
    assert one <= 1.002 * all_of_them
