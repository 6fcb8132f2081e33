"""A plan is refused, advised and stopped at its limits, in words that have all numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedules.generators.auto import CapError
from schedules.ir import Kind
from tests.pipeline.equivalence import config_of
from vp_train.config import ConfigError, CostConfig, ParallelConfig, ScheduleConfig, VocabConfig
from vp_train.planning import plan as plan_module
from vp_train.planning.plan import (
    _check_microbatches,
    _check_size,
    busiest_seconds,
    make_plan,
    plan_step,
    replan,
    row_advice,
    searched_drafts,
)

FREE = CostConfig(collective_seconds=0)


def uneven(**vocab):
    config = config_of(4, 4, 4_000, layers=(3, 1, 1, 2), vocab=VocabConfig(**vocab))
    return replace(config, cost=FREE)


def test_the_busiest_rank_has_the_most_seconds_of_one_microbatch():
    step = plan_step(uneven(), 4)
    cost, layout = step.cost, step.problem.layout
    of_ranks = [
        sum(cost.pass_seconds[kind][rank] for kind in (Kind.S, Kind.T, Kind.E, Kind.G))
        + sum(
            cost.pass_seconds[kind][stage]
            for kind in (Kind.F, Kind.B)
            for stage in layout.stages_of(rank)
        )
        for rank in range(4)
    ]
    assert busiest_seconds(step.problem, cost) == pytest.approx(max(of_ranks))
    assert max(of_ranks) > 1.1 * min(of_ranks)


def test_uneven_rows_are_advised_where_they_take_a_hundredth_off_the_busiest_rank(monkeypatch):
    config = uneven()
    step = plan_step(config, 4)
    then = plan_step(uneven(balance=True), 4)
    seconds = [busiest_seconds(one.problem, one.cost) for one in (step, then)]
    rows = sorted(shard.num_rows for shard in next(iter(then.shards.values())))
    assert row_advice(config, step) == (
        f"vocab.balance=true would take {1 - seconds[1] / seconds[0]:.1%} off the work of the "
        f"busiest rank, with {rows[0]:,} to {rows[-1]:,} rows"
    )
    for given in (uneven(algorithm="none"), uneven(balance=True), uneven(shards=(1_000,) * 4)):
        assert row_advice(given, plan_step(given, 4)) is None
    for before, after, is_advised in ((1.0, 0.99, False), (1.0, 0.98999, True), (1.0, 2.0, False)):
        times = iter((before, after))
        monkeypatch.setattr(plan_module, "busiest_seconds", lambda *_, times=times: next(times))
        words = row_advice(config, step)
        assert (words is not None) is is_advised
        assert words is None or "would take 1.0% off" in words


@pytest.mark.parametrize(
    ("ranks", "steps", "words"),
    [
        ((0, 1), (1, 9), None),
        ((0, 2), (1, 9), "run.profile_ranks has rank 2, but the ranks are 0 to 1"),
        ((3, 2), (9,), "run.profile_ranks has rank 3, but the ranks are 0 to 1"),
        ((0, 2), (), None),
        ((0,), (3, 10, 11), "run.profile_steps has step 10, but the last one is run.steps=9; give"),
    ],
)
def test_only_ranks_and_steps_of_a_run_are_profiled(ranks, steps, words):
    config = config_of(2, 2, 100)
    run = replace(config.run, steps=9, profile_ranks=ranks, profile_steps=steps)
    if words is None:
        make_plan(replace(config, run=run), 2)
        return
    with pytest.raises(ConfigError) as raised:
        make_plan(replace(config, run=run), 2)
    assert str(raised.value).startswith(words)


def test_a_step_has_so_many_forward_passes_and_no_more():
    _check_size(2, 1 << 16, "num_microbatches")
    _check_size(1 << 17, 1, "num_microbatches")
    with pytest.raises(ConfigError) as raised:
        _check_size(2, (1 << 16) + 1, "a setting")
    assert str(raised.value) == (
        "a setting: 65,537 microbatches on 2 stages are more than 131,072 forward passes; lower "
        "a setting, or set a smaller parallel.pp or a larger parallel.dp"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# x\n0F0 0F4 0B4", None),
        ("# x", None),
        ("0F5", "it is for 6 microbatches, not 5; use num_microbatches=6"),
        ("1S2 3T3", "it is for 4 microbatches, not 5; use num_microbatches=4"),
        ("0F65535", "it is for 65,536 microbatches, not 5; use num_microbatches=65536"),
        ("0F65536", "it is for 65,537 microbatches, not 5; that is more than can be planned"),
        ("F7 0F 1234567890F1 A0F9 0F0", "it is for 1 microbatch, not 5; use num_microbatches=1"),
    ],
)
def test_a_large_file_is_looked_at_before_it_is_parsed(text, words):
    if words is None:
        _check_microbatches(text, 5)
        return
    with pytest.raises(ValueError, match="it is for") as raised:
        _check_microbatches(text, 5)
    assert str(raised.value) == words


def test_files_are_large_from_their_limits_on(tmp_path, monkeypatch):
    config = config_of(2, 3, 100)
    path = tmp_path / "schedule.txt"
    text = plan_step(config, 2).schedule.text()
    path.write_text(text.replace("0F0", "0Q0"))
    more = replace(config, num_microbatches=4, schedule=ScheduleConfig(file=str(path)))
    for limit, words in (
        (len(text), "line 2: '0Q0' is not a pass"),
        (len(text) - 1, "it is for 3 microbatches, not 4; use num_microbatches=3"),
    ):
        monkeypatch.setattr(plan_module, "_LARGE_SCHEDULE", limit)
        with pytest.raises(ConfigError, match=words):
            plan_step(more, 2)
    path.write_text(text)
    monkeypatch.setattr(plan_module, "_MOST_LINES", text.count("\n"))
    same = replace(more, num_microbatches=3)
    plan_step(same, 2)
    monkeypatch.setattr(plan_module, "_MOST_LINES", text.count("\n") - 1)
    with pytest.raises(ConfigError, match=r"it has more than 2 lines; every rank has one"):
        plan_step(same, 2)


def test_a_step_of_the_same_size_is_the_plan_itself():
    config = config_of(2, 4, 100)
    plan = make_plan(config, 2)
    assert replan(config, plan, 4) is plan
    less = replan(config, plan, 2)
    assert (less.work.num_microbatches, less.ramp) == (2, plan.ramp)
    assert less.timeline.makespan < plan.timeline.makespan
    assert less.program.num_microbatches == 2


def searching(**schedule):
    config = config_of(2, 3, 100, num_stages=4, vocab=VocabConfig("auto"))
    return replace(config, schedule=ScheduleConfig("auto", **schedule))


def test_a_search_has_every_schedule_with_every_algorithm_and_what_only_some_refuse_is_left_out():
    names = plan_module.GENERATORS
    found = searched_drafts(searching(), 2, ("none", "one_barrier"))
    assert [(option.name, option.problem.algorithm.name) for option, _ in found] == [
        (name, algorithm) for name in names for algorithm in ("none", "one_barrier")
    ]
    for option, draft in found:
        family = names[option.name]
        assert (option.problem, option.cost) == (draft.problem, draft.cost)
        assert option.problem.split_backward is family.split_backward
        assert option.problem.layout == family.layout_of(2)
    odd = replace(searching(), model=replace(searching().model, num_layers=6))
    found = searched_drafts(odd, 2, ("none",))
    assert {option.problem.layout.num_stages for option, _ in found} == {2}
    chunked = searched_drafts(searching(num_chunks=1), 2, ("none",))
    assert {option.problem.layout.num_stages for option, _ in chunked} == {2, 4}
    too_many = replace(odd, parallel=ParallelConfig(layers_per_stage=(1, 2, 3)))
    with pytest.raises(ConfigError, match=r"parallel\.layers_per_stage="):
        searched_drafts(too_many, 2, ("none",))


@pytest.mark.parametrize(
    ("schedule", "caps"),
    [
        ({"cap_gib": 2.0}, 2.0**31),
        ({"cap_microbatches": 1.5}, 1.5),
        ({}, None),
    ],
)
def test_a_search_has_the_cap_that_is_set_or_what_1f1b_keeps_on_its_fullest_rank(
    monkeypatch, schedule, caps
):
    seen = []

    def solve(options, caps, watch):
        seen.append((options[0].cost, caps))
        error = CapError(1, 1024.0, 2048.0, 10.0, 20.0)
        error.is_stopped = True
        raise error

    monkeypatch.setattr(plan_module, "solve", solve)
    with pytest.raises(KeyboardInterrupt) as raised:
        plan_step(searching(**schedule), 2)
    assert str(raised.value) == (
        "schedule=auto was stopped before it found a schedule that fits: the best so far keeps "
        "2.0 KiB on rank 1, the cap is 1.0 KiB"
    )
    ((cost, found),) = seen
    one = cost.microbatch_bytes(2)
    fullest = max(3 * cost.stage_bytes[0], 2 * cost.stage_bytes[1])
    expected = fullest + 2 * max(cost.shard_bytes) if caps is None else caps
    if "cap_microbatches" in schedule:
        expected = 1.5 * one
    assert found == (pytest.approx(expected),) * 2
