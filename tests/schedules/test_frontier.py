"""Laws of the frontier and of what it is made of: steady states, extensions, fillings."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from schedules.bound import step_bound
from schedules.check import check_program, check_schedule
from schedules.cost import CostModel
from schedules.generators import auto, generate
from schedules.generators.auto import Shared, Solution, solve
from schedules.generators.ends import Ends
from schedules.generators.frontier import FrontierPoint, caps_of, frontier
from schedules.generators.refine import Refiner, judge
from schedules.generators.tight import tight_rings
from schedules.ir import Kind
from schedules.lower import lower
from schedules.network import Network
from schedules.simulate import simulate
from tests.schedules.test_auto import CLOSE, options_of

SPLIT = ("zb_h1", "v_half", "v_min")


@pytest.mark.parametrize("p", [1, 2, 5])
@pytest.mark.parametrize("most", [2, 3, 6, 11, 40])
def test_caps_go_in_equal_steps_from_one_microbatch_to_p_and_one_more(p, most):
    *caps, last = caps_of(options_of(p, 1, names=("zb_v",)), most)
    held = 0.2
    halves = [2 * (cap - held) for cap in caps]
    assert halves == pytest.approx([round(half) for half in halves])
    assert (halves[0], halves[-1]) == pytest.approx((2, 2 * (p + 1)))
    assert len(halves) == min(most, 2 * p + 1)
    gaps = np.diff(halves)
    assert gaps.max() - gaps.min() < 1 + 1e-9
    assert last == pytest.approx(caps[-1] + held)


@pytest.mark.parametrize(("p", "m", "spread"), [(2, 6, 0.3), (3, 14, 0.1)])
def test_points_respect_their_caps_and_more_memory_is_never_slower(
    quick_search, monkeypatch, p, m, spread
):
    """The highest cap is searched first, and none after the first point that is as fast."""
    options, searched = options_of(p, m, spread=spread, names=SPLIT), []

    def noted(options, caps, *others):
        searched.append(caps[0])
        return solve(options, caps, *others)

    monkeypatch.setattr(sys.modules[frontier.__module__], "solve", noted)
    caps = caps_of(options, 4)
    caps += [cap + 9.0 for cap in caps]
    points = list(frontier(options, caps))
    first = next(q for q in points if q.timeline.makespan == points[-1].timeline.makespan)
    assert searched == [max(caps), *(cap for cap in caps if cap <= first.cap)]
    assert first.cap < caps[-2]
    assert points, "the cap of 1F1B leaves room"
    assert [point.cap for point in points] == sorted({point.cap for point in points} & set(caps))
    for point in points:
        option = point.solution.option
        check_schedule(point.solution.schedule, option.problem)
        check_program(lower(point.solution.schedule, option.problem, option.cost), option.problem)
        assert max(point.timeline.peak_bytes) <= point.cap * CLOSE
        assert point.timeline.makespan >= point.solution.bound.seconds / CLOSE
    makespans = [point.timeline.makespan for point in points]
    assert makespans == sorted(makespans, reverse=True)


def named_points(options):
    """Return the named schedule of every option, with what it keeps as its cap."""
    points = []
    for option in options:
        schedule = generate(option.name, option.problem, option.cost)
        timeline = simulate(schedule, option.problem, option.cost)
        solution = Solution(option, schedule, step_bound(option.problem, option.cost))
        points.append(FrontierPoint(max(timeline.peak_bytes), solution, timeline))
    return points


@pytest.mark.parametrize("algorithm", ["none", "one_barrier"])
@pytest.mark.parametrize(
    ("searched", "goes_on"),
    [((0.1,), True), ((2.3, 4.0), True), ((4.0,), True), ((3.2, 9.0), True), ((3.2, 9.0), False)],
    ids=["too low", "between", "high", "all", "stopped"],
)
def test_no_named_schedule_lies_below_the_frontier(quick_search, algorithm, searched, goes_on):
    names = ("1f1b", "interleaved", "zb_h1", "zb_v", "v_half", "v_min")
    options = options_of(3, 9, (algorithm,), spread=0.05, names=names)
    named = named_points(options)
    points = list(frontier(options[-2:], searched, lambda _: goes_on, named))
    for known in named:
        below = [point for point in points if point.cap <= known.cap * CLOSE]
        assert below, "the curve begins with the named schedule that keeps least, or before"
        assert below[-1].timeline.makespan <= known.timeline.makespan * CLOSE
    makespans = [point.timeline.makespan for point in points]
    assert makespans == sorted(makespans, reverse=True)
    assert [point.cap for point in points] == sorted({point.cap for point in points})
    assert all(max(point.timeline.peak_bytes) <= point.cap * CLOSE for point in points)
    added = {point.cap for point in points} - set(searched)
    assert added <= {known.cap for known in named}


@pytest.mark.slow
def test_a_frontier_ends_where_no_memory_helps_or_with_the_last_whole_search(quick_search):
    options = options_of(2, 6, names=SPLIT)
    caps = [1.7, 3.2, math.inf]
    asked: list[int] = []
    whole = [(p, len(asked)) for p in frontier(options, caps, lambda _: not asked.append(1))]
    assert len(whole) > 1
    assert not any(point.is_optimal for point, _ in whole[:-1])
    assert whole[-1][0].is_optimal or whole[-1][0].cap == math.inf
    for most in (0, whole[0][1] + 1, len(asked) - 1):
        left = iter(range(most))
        stopped = frontier(options, caps, lambda _, left=left: next(left, None) is not None)
        ended = [point.solution for point, tried in whole if tried <= most]
        assert [point.solution for point in stopped] == ended, most


def test_a_known_solution_is_never_lost(quick_search):
    options = options_of(3, 9, names=SPLIT)
    tight = solve(options, [2.4] * 3)
    worst = solve(options, [2.5] * 3, lambda state: False, known=[tight])
    assert worst.schedule.ranks == tight.schedule.ranks
    shared, gone_on = Shared(), []
    solve(options, [2.5] * 3, lambda state: False, shared=shared)
    assert solve(options, [2.4] * 3, shared=shared) == tight
    shared.enough = simulate(tight.schedule, tight.option.problem, tight.option.cost).makespan
    done = solve(options, [2.5] * 3, lambda state: not gone_on.append(1), [tight], shared)
    assert (done.schedule.ranks, gone_on) == (tight.schedule.ranks, [])


# Every I takes `backward` times as long as its F.  `few`: two thirds of the rings that were found.
@pytest.mark.parametrize(
    ("p", "algorithm", "slowness", "cap", "backward", "few"),
    [
        (1, "one_barrier", None, 3.0, 1.3, 7),
        (2, "one_barrier", None, 2.4, 1.2, 1),
        (3, "one_barrier", None, 2.9, 0.7, 2),
        (3, "one_barrier", (1.0, 0.8, 1.2), 2.6, 1.4, 1),
        (3, "one_barrier", (1.0, 0.0, 1.0), 2.9, 1.2, 2),
        (3, "two_barrier", None, 3.2, 1.3, 2),
        (3, "none", None, 4.0, 1.4, 4),
    ],
)
def test_a_tight_ring_keeps_its_period_and_caps_and_its_ends_only_improve(
    p, algorithm, slowness, cap, backward, few
):
    (option,) = options_of(p, 4 * p, (algorithm,), slowness=slowness, names=("v_min",))
    seconds = option.cost.pass_seconds
    slower = {Kind.I: tuple(backward * value for value in seconds[Kind.I])}
    cost = replace(option.cost, pass_seconds=seconds | slower)
    network = Network.of(option.problem, cost)
    caps = [cap] * p
    period = max(
        sum(network.seconds[k] for k, lane in enumerate(network.lanes) if lane == busy)
        for busy in range(p)
    )
    rings = list(tight_rings(network, option.problem, caps, period))
    assert len(rings) >= few, "the cap leaves room"
    assert not list(tight_rings(network, option.problem, [0.1] * p, period))
    for ring in rings:
        rated = ring.rate()
        assert rated is not None
        assert rated[0] == pytest.approx(period)
        assert not any(ring.excess(rank, cap) for rank in range(p))
    refiner = Refiner(network, caps)
    ends = Ends(refiner, rings[0], period)
    found = [ends.search(budget, 0.0, lambda best: True) for budget in (0, 1, 1)]
    makespans = [refiner.judge(rings[0].orders()).makespan, *(best.makespan for best in found)]
    assert makespans == pytest.approx(sorted(makespans, reverse=True))
    assert makespans[-1] < 1.03 * step_bound(option.problem, cost, tuple(caps)).seconds
    assert found[-1].excess == 0
    check_schedule(network.schedule("found", found[-1].orders), option.problem)
    # With more microbatches in its middle the step takes so many periods longer, and keeps no more.
    ends = Ends(Refiner(network, caps, 3), rings[0], period)
    best, longer = (
        ends.search(1, 0.0, lambda best: True),
        replace(network, num_microbatches=4 * p + 3),
    )
    extended = ends.extended()
    check_schedule(
        longer.schedule("extended", extended), replace(option.problem, num_microbatches=4 * p + 3)
    )
    assert best.makespan == pytest.approx(found[1].makespan + 3 * period)
    assert judge(longer, extended, caps).quality == pytest.approx((0, best.makespan))


def test_no_time_of_a_tight_ring_is_infinite_where_a_vocabulary_takes_no_time():
    (option,) = options_of(2, 8, names=("v_min",))
    seconds = {
        kind: tuple(0.0 for _ in values) if kind in (Kind.S, Kind.T) else values
        for kind, values in option.cost.pass_seconds.items()
    }
    cost = CostModel(seconds, 0.0, {}, option.cost.stage_bytes, option.cost.shard_bytes)
    network = Network.of(option.problem, cost)
    period = sum(network.seconds[k] for k, lane in enumerate(network.lanes) if lane == 0)
    with np.errstate(all="raise"):
        for ring in tight_rings(network, option.problem, [2.5] * 2, period):
            assert ring.rate()[0] == pytest.approx(period)


@pytest.mark.parametrize(("most", "tight"), [(1, 1), (2, 1), (5, 2), (5, 0), (40, 1)])
def test_a_few_steady_states_are_started_from_those_without_a_bubble_first(
    monkeypatch, most, tight
):
    for name, value in (("_STEADY", most), ("_TIGHT", tight), ("_TIGHTENED", 300)):
        monkeypatch.setattr(auto, name, value)
    monkeypatch.setattr(auto, "_SLOWER", 1.5)
    (option,) = options_of(2, 9, names=("v_min",))
    network = Network.of(option.problem, option.cost)
    found = auto._steady(option.problem, network, [3.0] * 2)
    period = auto._period(network)
    assert len(found) == most or most == 40
    assert [rate for rate, _ in found[:tight]] == [period] * min(tight, len(found))
    assert all(rate == pytest.approx(ring.rate()[0]) for rate, ring in found)
    assert all(period / CLOSE <= rate for rate, _ in found)
    fastest = found[0][0] if tight else min(rate for rate, _ in found)
    assert all(rate <= 1.5 * fastest for rate, _ in found)
    assert not any(ring.excess(rank, 3.0) for _, ring in found for rank in range(2))
