"""Laws of the search for long steps of many ranks, where it looks at short steps first."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from schedules.check import check_program, check_schedule
from schedules.generators import auto, generate
from schedules.generators.auto import CapError, solve
from schedules.generators.refine import Refined
from schedules.generators.steady import Ring
from schedules.generators.v_shape import Block, blocks
from schedules.lower import lower
from schedules.network import Network
from schedules.simulate import simulate
from tests.schedules.test_auto import CLOSE, options_of

NAMES = ("1f1b", "zb_v", "v_half", "v_min")


@pytest.fixture
def long(monkeypatch, quick_search):
    """Treat every step with more microbatches than a short one as a long one of many ranks."""
    monkeypatch.setattr(auto, "_LONG", 0)
    monkeypatch.setattr(auto, "_LARGE", 0)


def timeline_of(schedule, option):
    return simulate(schedule, option.problem, option.cost)


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("cap_of", ["1f1b", "v_half", "v_min"])
def test_a_long_step_respects_its_cap_and_is_no_slower_than_the_best_named_schedule(
    long, cap_of, spread
):
    options = options_of(4, 30, spread=spread, names=NAMES)
    named = {o.name: timeline_of(generate(o.name, o.problem, o.cost), o) for o in options}
    cap = max(named[cap_of].peak_bytes)
    solution = solve(options, [cap] * 4)
    problem, cost = solution.option.problem, solution.option.cost
    check_schedule(solution.schedule, problem)
    check_program(lower(solution.schedule, problem, cost), problem)
    timeline = timeline_of(solution.schedule, solution.option)
    assert max(timeline.peak_bytes) <= cap * CLOSE
    fitting = [line.makespan for line in named.values() if max(line.peak_bytes) <= cap]
    assert timeline.makespan <= min(fitting) * (1 + 1e-3)


@pytest.mark.parametrize("cap", [2.0, 3.0, 5.0])
def test_a_long_step_runs_in_groups_where_no_named_schedule_fits(long, cap):
    """One microbatch after the other would take p times the work of a rank."""
    options = options_of(6, 30, names=("gpipe", "1f1b"))
    assert all(
        max(timeline_of(generate(o.name, o.problem, o.cost), o).peak_bytes) > cap for o in options
    )
    solution = solve(options, [cap] * 6)
    check_schedule(solution.schedule, solution.option.problem)
    timeline = timeline_of(solution.schedule, solution.option)
    assert max(timeline.peak_bytes) <= cap * CLOSE
    work = max(rank_seconds(timeline, rank) for rank in range(6))
    in_flight = max(timeline.peak_in_flight)
    assert in_flight >= int(cap) - 1, "a shard is held beside them"
    assert timeline.makespan <= work * (in_flight + 7) / in_flight


def rank_seconds(timeline, rank):
    return sum(span.seconds for span in timeline.compute[rank])


def test_a_long_step_is_refused_with_what_was_reached(long):
    options = options_of(3, 30, names=NAMES)
    with pytest.raises(CapError) as caught:
        solve(options, [0.5] * 3)
    reached = caught.value.reached
    solution = solve(options, [reached] * 3)
    kept = timeline_of(solution.schedule, solution.option).peak_bytes
    assert max(kept) <= reached * CLOSE


def test_neither_kicks_nor_steady_states_are_tried_in_a_large_step(long, monkeypatch):
    for owner, name in ((auto._Found, "search"), (auto._Entry, "steady")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("they take too long there"))
    solution = solve(options_of(3, 30, names=NAMES), [3.0] * 3)
    assert max(timeline_of(solution.schedule, solution.option).peak_bytes) <= 3.0 * CLOSE


def test_a_ring_in_which_a_pass_waits_for_one_many_periods_before_has_a_rate():
    (option,) = options_of(26, 1, names=("v_min",))
    network = Network.of(option.problem, option.cost)
    ring = Ring.of_block(network, option.problem, Block((3, 3, 3, 1), (2, 2, 1)))
    found = ring.rate()
    assert found is not None
    work = max(sum(network.seconds[k] for k in word) for word in ring.words)
    assert found[0] >= work / CLOSE
    assert all(network.lanes[earlier] == network.lanes[k] for earlier, k in found[1])


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize("algorithm", ["none", "one_barrier"])
def test_a_short_step_promises_the_time_of_the_whole_one(name, algorithm):
    (option,) = options_of(4, 40, (algorithm,), names=(name,))
    draft = auto._Entry.of(option, [40.0] * 4, short=True).draft(auto._Watched(None))
    assert draft.hope == pytest.approx(draft.named().refined.makespan, rel=0.02)
    narrow = auto._Entry.of(option, [0.9] * 4, short=True)
    assert narrow.draft(auto._Watched(None)).hope == math.inf, "it promises nothing above a cap"


def test_a_whole_step_is_searched_where_it_is_no_long_one_and_its_short_one_fits_and_is_close():
    (option,), (longer,) = (options_of(2, m, names=("v_min",)) for m in (20, 800))

    def is_worth(makespan, excess=0.0, option=option, *, short=True):
        entry = auto._Entry.of(option, [9.0] * 2, short=short)
        refined = Refined([], makespan * entry.bound.seconds, excess)
        return auto._Found(refined, entry).is_worth_its_length

    assert is_worth(1.0)
    assert not is_worth(1.0, excess=1.0)
    assert not is_worth(1.01)
    assert not is_worth(1.0, option=longer)
    assert not is_worth(1.0, short=False)


@pytest.mark.parametrize("p", [1, 3, 17])
def test_a_short_step_fills_the_pipeline_and_lacks_a_multiple_of_four_microbatches(p):
    """Parts of 1, 2 and 4 microbatches can then be repeated."""
    (option,) = options_of(p, 1, names=("1f1b",))
    least = 3 * p if p <= 16 else 2 * p + 16
    for m in (1, least, *range(least + 4, least + 9)):
        longer = replace(option, problem=replace(option.problem, num_microbatches=m))
        entry = auto._Entry.of(longer, [9.0] * p, short=True)
        few = entry.short.num_microbatches
        assert entry.refiner.network.num_microbatches == few == m - entry.refiner.extra
        assert few == m if m <= least + 4 else least <= few < least + 4
        assert (m - few) % 4 == 0
        assert auto._Entry.of(longer, [9.0] * p, short=False).short == longer.problem


@pytest.mark.parametrize(
    ("p", "algorithm", "cap"), [(2, "one_barrier", 2.0), (3, "none", 3.0), (3, "two_barrier", 3.0)]
)
def test_blocks_to_start_from_fit_with_a_shard_held_and_are_the_shortest_of_their_level(
    p, algorithm, cap
):
    """A cap may be exceeded by a stage: there may be a way to fill below it."""
    (option,) = options_of(p, 9, (algorithm,), spread=0.2, names=("v_min",))
    problem, cost = option.problem, option.cost
    chosen = auto._blocks(problem, Network.of(problem, cost), [cap] * p)
    shards = cost.shard_bytes
    largest = max(*cost.stage_bytes, *shards)

    def level_if_it_fits(block):
        level = 0
        for rank, pairs in enumerate(block.in_flight(p)):
            first, second = (cost.stage_bytes[stage] for stage in problem.layout.stages_of(rank))
            most = max(ones * first + others * second for ones, others in pairs)
            if most > (cap - shards[rank] + largest) * CLOSE:
                return 0
            level = max(level, *map(sum, pairs))
        return level

    lengths: dict[int, list[int]] = {}
    for block in blocks(problem):
        lengths.setdefault(level_if_it_fits(block), []).append(block.length(p))
    lengths.pop(0)
    best = [
        (level, length) for level in sorted(lengths)[::-1] for length in sorted(lengths[level])[:4]
    ]
    assert len(best) > 4
    assert [(level_if_it_fits(block), block.length(p)) for block in chosen] == best[:12]


class Draft(NamedTuple):
    """All that `_named` asks of a short step: its promise, and the whole schedule if it is made."""

    hope: float
    refined: Refined
    whole: Refined

    def named(self) -> Draft:
        return self._replace(refined=self.whole)


def test_a_named_schedule_is_left_out_only_if_it_does_not_promise_to_win():
    """Hopes and makespans of the whole schedules are drawn apart, as if no hope could be trusted.

    A short step that exceeds a cap promises nothing once a whole schedule fits.
    """
    random = Random(11)
    watched = SimpleNamespace(is_stopped=False)
    for _ in range(300):
        drafts = [
            Draft(
                random.choice((math.inf, random.uniform(1, 2))),
                Refined([], 0.0, random.choice((0.0, 1.0))),
                Refined([], random.uniform(1, 2), random.choice((0.0, 1.0))),
            )
            for _ in range(random.randint(1, 5))
        ]
        known = random.choice((math.inf, random.uniform(1, 2)))
        made = [draft.whole for draft in auto._named(drafts, known, watched)]
        fitting = [whole.makespan for whole in made if whole.excess == 0]
        best = min([known, *fitting])
        for draft in drafts:
            if draft.whole not in made:
                exceeds = draft.refined.excess > 0 and fitting
                assert draft.hope >= best or exceeds
        # Nor is one made in vain: when its turn came, it promised to beat all before it.
        turns = {id(draft.whole): draft for draft in drafts}
        for place, whole in enumerate(made):
            before = [earlier.makespan for earlier in made[:place] if earlier.excess == 0]
            slack = 0.0 if before else auto._UNREFINED
            assert turns[id(whole)].hope < min([known, *before]) * (1 + slack)
