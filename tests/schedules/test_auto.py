"""The search of schedule=auto: it respects the caps, and its schedules are fast.

They are never slower than a named schedule that respects the caps, and close to the lower bound.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from random import Random

import pytest

from schedules import generators
from schedules.bound import step_bound
from schedules.check import check_program, check_schedule
from schedules.cost import CostModel
from schedules.generators import GENERATORS, auto, generate
from schedules.generators.auto import CapError, Option, SoFar, solve
from schedules.generators.refine import judge
from schedules.ir import Kind
from schedules.lower import lower
from schedules.network import Network
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS

CLOSE = 1 + 1e-9


@pytest.fixture
def hasty_search(quick_search, monkeypatch):
    """Search with a fifth of the effort of `quick_search` after the starts are refined."""
    monkeypatch.setattr(auto, "_ROUNDS", ((2, 3_000), (1, 6_000)))


def options_of(
    p, m, algorithms=("one_barrier",), *, spread=0.0, slowness=None, names=tuple(GENERATORS), seed=0
):
    """Return the options of base schedules, with F = I = W = 1 and 1 byte per microbatch and rank.

    Stages and shards differ by up to the fraction `spread`, differently for every base schedule.
    `slowness` multiplies the times of every rank.
    """
    slow = slowness or (1.0,) * p
    found = []
    for name in names:
        random = Random(f"{seed} {name}")
        layout = GENERATORS[name].layout_of(p)
        stages = [
            random.uniform(1 - spread, 1 + spread) / layout.num_chunks
            for _ in range(layout.num_stages)
        ]
        shards = [random.uniform(1 - spread, 1 + spread) for _ in range(p)]
        times = [slow[layout.rank_of(stage)] * seconds for stage, seconds in enumerate(stages)]
        for algorithm in map(VOCAB_ALGORITHMS.__getitem__, algorithms):
            rows = shards if algorithm.sharded else [0.0] * (p - 1) + [float(p)]
            if layout.name == "v" and not algorithm.sharded:
                rows.reverse()
            seconds = {kind: tuple(times) for kind in (Kind.F, Kind.I, Kind.W)} | {
                Kind.B: tuple(2 * value for value in times)
            }
            for kind, base in {Kind.S: 0.3, Kind.T: 0.15, Kind.E: 0.01, Kind.G: 0.01}.items():
                seconds[kind] = tuple(
                    base * factor * value for factor, value in zip(slow, rows, strict=True)
                )
            barriers = {barrier.name: 0.05 for barrier in algorithm.barriers}
            kept, held = tuple(stages), tuple(0.2 * value for value in rows)
            cost = CostModel(
                seconds,
                hop_seconds=0.02,
                barrier_seconds=barriers,
                stage_bytes=kept,
                shard_bytes=held,
                weight_bytes=tuple(value / 2 for value in stages),
            )
            found.append(
                Option(name, Problem(layout, m, algorithm, GENERATORS[name].split_backward), cost)
            )
    return found


def timeline_of(solution):
    return simulate(solution.schedule, solution.option.problem, solution.option.cost)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p", "m", "spread", "algorithms"),
    [
        (1, 3, 0.0, ("one_barrier",)),
        (2, 9, 0.3, ("one_barrier", "none")),
        (3, 6, 0.2, ("two_barrier",)),
        (3, 4, 0.0, ("none",)),
        (4, 8, 0.1, ("one_barrier",)),
    ],
)
@pytest.mark.parametrize("cap_of", ["1f1b", "v_half"])
def test_never_slower_than_a_named_schedule_within_the_caps(
    hasty_search, p, m, spread, algorithms, cap_of
):
    options = options_of(p, m, algorithms, spread=spread)
    named = [simulate(generate(o.name, o.problem, o.cost), o.problem, o.cost) for o in options]
    caps = next(
        n.peak_bytes for n, option in zip(named, options, strict=True) if option.name == cap_of
    )
    fitting = [
        n.makespan
        for n in named
        if all(kept <= cap for kept, cap in zip(n.peak_bytes, caps, strict=True))
    ]
    solution = solve(options, caps)
    problem, cost = solution.option.problem, solution.option.cost
    check_schedule(solution.schedule, problem)
    check_program(lower(solution.schedule, problem, cost), problem)
    timeline = timeline_of(solution)
    assert all(kept <= cap * CLOSE for kept, cap in zip(timeline.peak_bytes, caps, strict=True))
    assert timeline.makespan <= min(fitting) * CLOSE


@pytest.mark.parametrize(("p", "m", "spread"), [(1, 1, 0.0), (2, 3, 0.5), (3, 4, 0.2)])
def test_without_caps_a_search_never_refuses(hasty_search, p, m, spread):
    options = options_of(p, m, ("one_barrier", "none"), spread=spread)
    free = timeline_of(solve(options, [math.inf] * p)).makespan
    assert (
        free
        <= min(
            simulate(generate(o.name, o.problem, o.cost), o.problem, o.cost).makespan
            for o in options
        )
        * CLOSE
    )
    nothing = [
        replace(o, cost=CostModel(o.cost.pass_seconds, o.cost.hop_seconds, o.cost.barrier_seconds))
        for o in options
    ]
    timeline = timeline_of(solve(nothing, [0.0] * p))  # passes that keep nothing need no memory
    assert timeline.peak_bytes == (0.0,) * p


def test_a_watch_sees_the_best_fall_and_changes_nothing(quick_search):
    options, caps, seen = options_of(3, 5, spread=0.3), [3.0] * 3, []
    watched = solve(options, caps, lambda state: not seen.append(state))
    assert watched == solve(options, caps)
    qualities = [(state.excess, state.makespan) for state in seen]
    assert qualities == sorted(qualities, reverse=True)
    assert [state.tried for state in seen] == list(range(1, len(seen) + 1))
    assert timeline_of(watched).makespan <= seen[-1].makespan * CLOSE
    assert {state.name for state in seen} <= GENERATORS.keys()


@pytest.mark.parametrize("looks", [1, 2, 10, 100])
def test_a_watch_can_end_the_search_with_the_best_so_far(quick_search, looks):
    options, seen = options_of(3, 5, spread=0.3), []
    goes_on = lambda state: seen.append(state) or len(seen) < looks  # noqa: E731
    solution = solve(options, [math.inf] * 3, goes_on)
    check_schedule(solution.schedule, solution.option.problem)
    whole: list[SoFar] = []
    solve(options, [math.inf] * 3, lambda state: not whole.append(state))
    assert len(seen) == min(looks, len(whole)), "nothing is asked after the end"
    assert timeline_of(solution).makespan <= seen[-1].makespan * CLOSE
    with pytest.raises(CapError) as caught:
        solve(options, [0.1] * 3, lambda state: False)
    assert caught.value.is_stopped
    with pytest.raises(CapError) as caught:
        solve(options, [0.1] * 3)
    assert not caught.value.is_stopped


def test_every_rank_has_a_cap_of_its_own(hasty_search):
    options, low = options_of(3, 9), 2.0
    assert min(timeline_of(solve(options, (3.0,) * 3)).peak_bytes) > low
    for tight in range(3):
        caps = [low if rank == tight else 3.0 for rank in range(3)]
        kept = timeline_of(solve(options, caps)).peak_bytes
        assert kept[tight] <= low * CLOSE
        assert max(kept) > low


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p", "m", "spread", "seed"), [(2, 4, 0.0, 0), (3, 5, 0.3, 1), (4, 8, 0.3, 2)]
)
def test_the_makespan_is_above_the_bound_and_memory_only_raises_it(
    hasty_search, p, m, spread, seed
):
    options = options_of(p, m, spread=spread, seed=seed)
    for cap in (p, 0.7 * p):
        solution = solve(options, (cap,) * p)
        assert timeline_of(solution).makespan >= solution.bound.seconds / CLOSE
        assert (
            solution.bound.seconds
            >= step_bound(solution.option.problem, solution.option.cost).seconds / CLOSE
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p", "m", "caps", "spread"),
    [
        (2, 8, (1.1, 1.1), 0.0),
        (2, 3, (9.0, 0.7), 0.3),
        (3, 7, (0.2, 0.3, 0.1), 0.3),
        (4, 8, (1.0,) * 4, 0.1),
    ],
)
@pytest.mark.parametrize("algorithm", ["none", "one_barrier"])
def test_an_impossible_cap_is_refused_and_the_bytes_that_were_reached_are_a_possible_cap(
    hasty_search, p, m, caps, spread, algorithm
):
    options = options_of(p, m, (algorithm,), spread=spread)
    with pytest.raises(CapError) as caught:
        solve(options, caps)
    error = caught.value
    assert error.cap == caps[error.rank] < error.reached
    assert error.alone <= error.reached * CLOSE
    assert all(
        f"{value:.4g}" in str(error)
        for value in (error.cap, error.reached, error.alone, error.steady)
    )
    more = error.reached - error.cap
    kept = timeline_of(solve(options, [cap + more for cap in caps])).peak_bytes
    assert all(value <= (cap + more) * CLOSE for value, cap in zip(kept, caps, strict=True))


@pytest.mark.parametrize(("p", "spread"), [(2, 0.0), (2, 0.3), (3, 0.2), (4, 0.0)])
def test_what_one_microbatch_keeps_is_enough_and_nothing_below_it(quick_search, p, spread):
    (option,) = options_of(p, 5, spread=spread, names=("v_half",))
    single = replace(option.problem, num_microbatches=1)
    alone = simulate(generate("v_half", single, option.cost), single, option.cost).peak_bytes
    assert timeline_of(solve([option], alone)).peak_bytes == pytest.approx(alone)
    for rank in range(p):
        with pytest.raises(CapError) as caught:
            solve([option], [kept * (0.99 if r == rank else 1) for r, kept in enumerate(alone)])
        assert (caught.value.rank, caught.value.reached) == (rank, pytest.approx(alone[rank]))


# Seconds of steps.  A search that finds better ones lowers its figures here.
FOUND = [
    (("zb_v", "v_half", "v_min"), False, (23.302193, 77.464026, 51.0)),
    (("zb_v", "v_half", "v_min"), True, (23.302193, 79.817204, 64.69)),
    (("1f1b", "zb_h1"), False, (34.859234, 155.63869, 64.06)),
    (("1f1b", "zb_h1"), True, (34.859234, 155.63869, 68.71)),
    (("interleaved", "gpipe", "interlaced"), False, (31.818008, 243.43723, 67.84)),
    (("interleaved", "gpipe", "interlaced"), True, (31.818008, 243.43723, 135.1)),
    (("v_min",), False, (27.893357, 78.597962, 51.0)),
]
GENERATED = {
    "gpipe": (34.921519, 87.516457, 257.77342),
    "1f1b": (41.661947, 111.19145, 259.38512),
    "interleaved": (49.568171, 102.40391, 235.73935),
    "interlaced": (49.376644, 107.01125, 260.10758),
    "zb_h1": (50.443273, 88.628275, 227.25169),
    "zb_v": (40.009872, 84.970737, 215.93213),
    "v_half": (37.878383, 91.290659, 221.91945),
    "v_min": (43.23753, 85.201165, 221.88856),
}


@pytest.mark.parametrize(("names", "is_long", "known"), FOUND)
def test_a_search_finds_what_it_has_found_or_better(
    quick_search, monkeypatch, names, is_long, known
):
    """Effort is counted in passes, so this holds on every machine."""
    if is_long:
        monkeypatch.setattr(auto, "_LONG", 0)
    found = []
    for p, m, spread, cap in ((2, 7, 0.3, 1.9), (4, 19, 0.2, 2.6), (3, 14, 0.0, 2.2)):
        options = options_of(p, m, ("one_barrier", "none"), spread=spread, names=names)
        found.append(timeline_of(solve(options, (cap, *[cap + 0.3] * (p - 1)))).makespan)
    assert all(map(operator.le, found, (seconds * (1 + 1e-6) for seconds in known))), found


@pytest.mark.parametrize(("name", "known"), GENERATED.items())
def test_a_named_schedule_takes_as_long_as_ever_or_less(monkeypatch, name, known):
    """The sums over the vocabulary algorithms, for unequal stages."""
    monkeypatch.setattr(generators, "_EFFORT", 12_000)
    found = []
    for seed, (p, m) in enumerate(((1, 3), (3, 5), (4, 13))):
        options = options_of(p, m, tuple(VOCAB_ALGORITHMS), spread=0.3, names=(name,), seed=seed)
        made = ((generate(o.name, o.problem, o.cost), o.problem, o.cost) for o in options)
        found.append(sum(simulate(*step).makespan for step in made))
    assert all(map(operator.le, found, (seconds * (1 + 1e-6) for seconds in known))), found


@pytest.mark.slow
def test_a_cap_of_p_microbatches_is_enough_for_a_gap_below_one_percent(monkeypatch):
    """A fifth of the usual search is enough."""
    monkeypatch.setattr(auto, "_ROUNDS", ((2, 100_000), (1, 200_000)))
    solution = solve(options_of(4, 32, names=("1f1b", "v_half")), (4.0,) * 4)
    assert timeline_of(solution).makespan < 1.008 * solution.bound.seconds


@pytest.mark.parametrize("slow", range(4))
def test_a_slow_rank_leaves_the_gap_small(quick_search, slow):
    slowness = [1.25 if rank == slow else 1.0 for rank in range(4)]
    solution = solve(options_of(4, 32, slowness=slowness, names=("zb_h1", "v_half")), (4.0,) * 4)
    timeline = timeline_of(solution)
    assert solution.bound.reason == f"the work of rank {slow}"
    assert timeline.makespan < 1.01 * solution.bound.seconds
    assert all(kept <= 4.0 * CLOSE for kept in timeline.peak_bytes)


def test_the_named_schedules_take_part_as_they_are(monkeypatch):
    """The result is never slower than they are, even if refinement makes every start worse."""

    def ruin(network, orders, caps, budget, goes_on):
        one_by_one = [sorted(order, key=lambda number: number // network.size) for order in orders]
        return judge(network, one_by_one, caps)

    monkeypatch.setattr(auto, "refine", ruin)
    monkeypatch.setattr(auto, "_ROUNDS", ((1, 0),))
    options = options_of(4, 8, names=("1f1b", "zb_h1"))
    named = [
        simulate(generate(o.name, o.problem, o.cost), o.problem, o.cost).makespan for o in options
    ]
    solution = solve(options, [100.0] * 4)
    found = simulate(solution.schedule, solution.option.problem, solution.option.cost).makespan
    assert found <= min(named) * CLOSE


def v_shapes_with_unequal_stages(m, names):
    """Return options on 4 ranks whose search ends at the bound of the V, above that of the loop."""
    random, found = Random(579409818), []
    times = tuple(0.5 * random.uniform(1.0, 1.6) for _ in range(8))
    kept = tuple(0.5 * random.uniform(1.0, 3.0) for _ in range(8))
    for name in names:
        family = GENERATORS[name]
        layout, algorithm = family.layout_of(4, 2), VOCAB_ALGORITHMS["none"]
        head = tuple(0.8 * (rank == layout.rank_of(7)) for rank in range(4))
        seconds = dict.fromkeys((Kind.F, Kind.I, Kind.W), times)
        seconds |= {Kind.B: tuple(2 * value for value in times), Kind.S: head, Kind.T: head}
        cost = CostModel(
            seconds,
            stage_bytes=kept,
            shard_bytes=(0.0,) * 4,
            weight_bytes=tuple(0.3 * value for value in kept),
        )
        found.append(Option(name, Problem(layout, m, algorithm, family.split_backward), cost))
    return found


def test_a_start_at_its_bound_is_not_lost_where_others_have_a_lower_bound():
    """ZB-V reaches its bound. Interleaved, which has a lower one, is searched on, but fits badly.

    V-Min is not looked at, as its bound is the same, though it fits as it is.
    """
    options = v_shapes_with_unequal_stages(24, ("interleaved", "zb_v", "v_min"))
    v_min = options[-1]
    named = simulate(generate("v_min", v_min.problem, v_min.cost), v_min.problem, v_min.cost)
    caps = (1.001 * max(named.peak_bytes),) * 4
    timeline = timeline_of(solve(options, caps))
    assert all(kept <= caps[0] * CLOSE for kept in timeline.peak_bytes)
    assert timeline.makespan <= named.makespan * CLOSE
    loop, v, _ = (step_bound(o.problem, o.cost, caps).seconds for o in options)
    assert loop < v <= timeline.makespan * CLOSE


def test_a_named_schedule_that_a_start_ruled_out_takes_part_where_that_comes_out_slower(
    monkeypatch,
):
    """The start of ZB-V promises their bound, so V-Min is not looked at before."""

    def slow(start):
        network, caps = start.entry.network, start.entry.caps
        one_by_one = [sorted(order, key=lambda k: k // network.size) for order in everything]
        return replace(start, refined=judge(network, one_by_one, caps), ends=None)

    options = v_shapes_with_unequal_stages(24, ("zb_v", "v_min"))
    v_min = options[-1]
    schedule = generate("v_min", v_min.problem, v_min.cost)
    everything = Network.of(v_min.problem, v_min.cost).orders(schedule)
    named = simulate(schedule, v_min.problem, v_min.cost)
    monkeypatch.setattr(auto._Found, "whole", slow)
    found = timeline_of(solve(options, (1.001 * max(named.peak_bytes),) * 4))
    assert found.makespan == pytest.approx(named.makespan)


@pytest.mark.parametrize(
    ("names", "p", "part", "most"),
    [(("interleaved",), 6, 0.5, 1.25), (("v_min",), 4, 0.8, 1.5)],
)
def test_groups_use_memory_that_no_named_schedule_of_several_stages_is_content_with(
    quick_search, names, p, part, most
):
    """Without them one microbatch would come after the other, and take 3.5 and 2.1 times."""
    options = options_of(p, 5 * p, ("none",), names=names)
    named = [simulate(generate(o.name, o.problem, o.cost), o.problem, o.cost) for o in options]
    cap = part * min(max(timeline.peak_bytes) for timeline in named)
    solution = solve(options, [cap] * p)
    check_schedule(solution.schedule, solution.option.problem)
    timeline = timeline_of(solution)
    assert max(timeline.peak_bytes) <= cap * CLOSE
    assert timeline.makespan <= most * solution.bound.seconds
