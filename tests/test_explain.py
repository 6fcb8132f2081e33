"""vp-explain: causes add up, a slow rank is named, and a what-if is the step without its cause.

The measured steps are simulated, so what made them slow is known.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import time
from dataclasses import replace
from functools import cache, partial
from statistics import median, median_low

import pytest

from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate, searched_schedules
from schedules.ir import Kind, Pass
from schedules.lower import Action, lower
from schedules.offload import place_transfers
from schedules.problem import Collective, Problem
from schedules.replay import CUDA, GLOO, Times, replay, times_of
from schedules.simulate import simulate
from schedules.timeline import Span
from schedules.vocab import VOCAB_ALGORITHMS, searched_algorithms
from vp_train.commands import explain as command
from vp_train.commands import plan_words
from vp_train.config import ConfigError, RunConfig
from vp_train.durable import checkpoint_name
from vp_train.explain import remedies as remedies_module
from vp_train.explain import trace as trace_module
from vp_train.explain.causes import KindTimes, WhatIf, _Explaining, explain
from vp_train.explain.remedies import (
    Alternative,
    Comparison,
    GoingOn,
    as_traced,
    compare_schedules,
    cost_settings,
    larger_microbatches,
    plan_of,
    remedies,
)
from vp_train.explain.trace import TracedRank, TracedStep, parse, read_traced
from vp_train.failures import EXIT_CONFIG
from vp_train.metrics.step_times import RankTimes, pass_seconds, step_times
from vp_train.pipeline.recorder import Recorder
from vp_train.pipeline.timers import HostTimer
from vp_train.planning.plan import make_plan, plan_step
from vp_train.settings import load_config
from vp_train.settings.files import config_text

CASES = [
    ("1f1b", "none", GLOO),
    ("1f1b", "one_barrier", CUDA),
    ("interleaved", "two_barrier", GLOO),
    ("zb_v", "one_barrier", CUDA),
    ("zb_h1", "two_barrier", GLOO),
]
P, M = 4, 6


def cost_of(problem, rows=(1, 1, 1, 1)):
    """Return costs in which S and T of a rank take as long as its rows say."""
    layout = problem.layout
    stage = 1.0 / layout.num_chunks
    kinds = {Kind.F: stage, Kind.B: 2 * stage, Kind.I: stage, Kind.W: stage}
    seconds = {kind: (value,) * layout.num_stages for kind, value in kinds.items()}
    seconds |= {
        Kind.S: tuple(0.4 * row for row in rows),
        Kind.T: tuple(0.2 * row for row in rows),
        Kind.E: (0.02,) * layout.num_ranks,
        Kind.G: (0.02,) * layout.num_ranks,
    }
    barriers = {barrier.name: 0.05 for barrier in problem.algorithm.barriers}
    return CostModel(seconds, 0.03, barriers if problem.algorithm.sharded else {})


@cache
def step_of(name, algorithm, runtime=GLOO, rows=(1, 1, 1, 1)):
    """Return a step that was not measured yet, and its program; each rank has its `rows`."""
    family, layout = GENERATORS[name], GENERATORS[name].layout_of(len(rows))
    problem = Problem(layout, M, VOCAB_ALGORITHMS[algorithm], split_backward=family.split_backward)
    cost = cost_of(problem, rows)
    schedule = generate(name, problem, cost)
    planned = simulate(schedule, problem, cost)
    step = TracedStep(
        step=5,
        device="cuda",
        dtype="float32",
        problem=problem,
        schedule=schedule,
        cost=cost,
        sources={},
        slowness=(1.0,) * len(rows),
        runtime=runtime,
        planned_seconds=planned.makespan,
        measured=planned,
        ranks=(),
        tp=1,
        rows=tuple(1000 * row for row in rows),
    )
    return step, lower(schedule, problem, cost)


def run(step, program, times=None):
    """Return the step as measured with `times`."""
    return replace(step, measured=replay(program, step.cost, step.runtime, times).timeline)


def passes_of(step, factor):
    """Return the seconds of every pass, `factor(item)` times as long as planned."""
    return {item: step.cost.seconds(item) * factor(item) for _, item in step.schedule.passes()}


def noisy(step):
    """Return times in which every pass and barrier takes its own time and the host takes some."""
    chance = random.Random(0)
    items = list(step.problem.collectives())
    return Times(
        passes=passes_of(step, lambda _: chance.uniform(0.8, 2.0)),
        communications={item: chance.uniform(0.0, 0.2) for item in items},
        pass_leads={item: chance.uniform(0.0, 0.05) for _, item in step.schedule.passes()},
    )


@cache
def noisy_run(name, algorithm, runtime):
    """Return a measured step, its program, the times that it has, and what explains it."""
    step, program = step_of(name, algorithm, runtime)
    times = noisy(step)
    step = replace(run(step, program, times), sources={Kind.F: "measured"})
    return step, program, times, explain(step)


@pytest.mark.parametrize(("name", "algorithm", "runtime"), CASES)
def test_a_replay_of_the_measured_times_gives_the_measured_step(name, algorithm, runtime):
    step, program, _, _ = noisy_run(name, algorithm, runtime)
    measured = step.measured
    times = times_of(program, step.cost, runtime, measured)
    again = replay(program, step.cost, runtime, times).timeline
    for spans, expected in zip(again.compute, measured.compute, strict=True):
        for span, original in zip(spans, expected, strict=True):
            assert (span.start, span.end) == pytest.approx((original.start, original.end))


@pytest.mark.parametrize(("name", "algorithm", "runtime"), CASES)
def test_the_causes_add_up_and_leave_nothing(name, algorithm, runtime):
    *_, found = noisy_run(name, algorithm, runtime)
    difference = found.measured_seconds - found.planned_seconds
    assert sum(cause.seconds for cause in found.causes) == pytest.approx(difference)
    rest = {cause.name: cause.seconds for cause in found.causes}["rest"]
    assert abs(rest) < 1e-6 * found.measured_seconds


@pytest.mark.parametrize("name", ["passes", "ranks", "communication"])
def test_a_single_cause_is_the_whole_difference(name):
    step, program = step_of("1f1b", "one_barrier")
    if name == "communication":
        times = Times(communications=dict.fromkeys(step.problem.collectives(), 0.5))
    else:
        slow = {0, 1, 2, 3} if name == "passes" else {2}
        times = Times(passes=passes_of(step, lambda item: 1.5 if item.stage in slow else 1.0))
    found = explain(run(step, program, times))
    causes = {cause.name: cause.seconds for cause in found.causes}
    if name == "ranks":  # the mean of all ranks is longer, too
        causes["ranks"] += causes.pop("passes")
    causes[name] += causes.pop("runtime")
    difference = found.measured_seconds - found.planned_seconds
    assert difference > 0.05 * found.planned_seconds
    assert causes[name] == pytest.approx(difference, rel=1e-3)


def truths(step, program, times):
    """Return the seconds of the step without each cause, by replays of `times`."""
    passes, messages = times.passes, times.communications
    means = {}
    for item, seconds in passes.items():
        means.setdefault((item.kind, item.stage), []).append(seconds)
    means = {key: sum(values) / len(values) for key, values in means.items()}

    def planned(item):
        is_barrier = isinstance(item, Collective)
        return step.cost.barrier(item.barrier) if is_barrier else step.cost.hop_seconds

    def sent(seconds):
        return replace(times, communications={item: seconds(item) for item in messages})

    changed = {
        "planned_passes": replace(times, passes={i: step.cost.seconds(i) for i in passes}),
        "even_microbatches": replace(times, passes={i: means[i.kind, i.stage] for i in passes}),
        "planned_network": sent(planned),
        "free_hops": sent(lambda i: messages[i] if isinstance(i, Collective) else 0.0),
        "free_barriers": sent(lambda i: 0.0 if isinstance(i, Collective) else messages[i]),
        "free_network": sent(lambda i: 0.0),
        "between": replace(times, pass_leads={}, communication_leads={}),
    }
    return {
        name: replay(program, step.cost, step.runtime, each).timeline.makespan
        for name, each in changed.items()
    }


@pytest.mark.parametrize(("name", "algorithm", "runtime"), CASES)
def test_a_what_if_is_the_step_replayed_without_its_cause(name, algorithm, runtime):
    step, program, _, found = noisy_run(name, algorithm, runtime)
    times = times_of(program, step.cost, runtime, step.measured)
    for cause, seconds in truths(step, program, times).items():
        assert found.what_if(cause).seconds == pytest.approx(seconds), cause
    least = 0.995 * found.measured_seconds
    shown = sorted(each.seconds for each in found.what_ifs if each.seconds < least)
    assert [each.seconds for each in found.shown_what_ifs] == shown
    assert found.what_if("no such cause") is None


def of_ranks(step, *seconds):
    """Return the sums by rank of seconds by pass."""
    found = [0.0] * P
    for item, value in [pair for each in seconds for pair in each]:
        found[step.problem.rank_of(item)] += value
    return found


@pytest.mark.parametrize(("name", "algorithm", "runtime"), CASES)
def test_a_rank_computes_waits_or_is_between_passes(name, algorithm, runtime):
    step, _, times, found = noisy_run(name, algorithm, runtime)
    assert [row.rank for row in found.ranks] == list(range(P))
    assert median_low(row.slowness for row in found.ranks) == pytest.approx(1), "the usual rank"
    between = of_ranks(step, times.pass_leads.items())
    assert [row.between for row in found.ranks] == pytest.approx(between)
    assert [row.measured for row in found.ranks] == pytest.approx(
        of_ranks(step, times.passes.items())
    )
    for row in found.ranks:
        assert row.planned + row.planned_waiting == pytest.approx(found.planned_seconds)
        whole = row.measured + row.measured_waiting + row.between
        assert whole == pytest.approx(found.measured_seconds)


@pytest.mark.parametrize(("name", "algorithm", "runtime"), CASES)
def test_every_kind_of_pass_and_message_has_its_mean_beside_the_plan(name, algorithm, runtime):
    step, *_, found = noisy_run(name, algorithm, runtime)
    spans = [span for row in step.measured.compute for span in row]
    of_passes = {row.name: row for row in found.kinds if row.name in tuple(Kind)}
    assert of_passes.keys() == {span.kind for span in spans}
    for kind, row in of_passes.items():
        own = [span for span in spans if span.kind == kind]
        planned = [step.cost.seconds(Pass.parse(span.name)) for span in own]
        assert row.count == len(own)
        assert row.planned == pytest.approx(sum(planned) / len(own))
        assert row.measured == pytest.approx(sum(span.seconds for span in own) / len(own))
        assert row.ratio == pytest.approx(row.measured / row.planned)
        assert row.source == ("measured" if kind == Kind.F else "flops")
    barriers = {barrier.name for barrier in step.problem.algorithm.barriers}
    others = {row.name: row for row in found.kinds if row.name not in of_passes}
    assert others.keys() <= {"hop", *barriers}
    spent = {}
    for span in step.measured.comm:
        spent.setdefault(span.name.partition(".")[0], []).append(span.seconds)
    assert others["hop"].planned == pytest.approx(step.cost.hop_seconds)
    assert others["hop"].measured is None, "a replay shows none"
    for barrier in others.keys() - {"hop"}:
        assert others[barrier].planned == pytest.approx(step.cost.barrier(barrier))
        assert others[barrier].count == len(spent[barrier])
        assert others[barrier].measured == pytest.approx(sum(spent[barrier]) / M)
    assert others.keys() - {"hop"} == spent.keys() & barriers
    assert all(row.source == "assumed" for row in others.values())
    unknown = replace(others["hop"], measured=None), replace(others["hop"], planned=0.0)
    assert [row.ratio for row in unknown] == [None, None]


@pytest.mark.parametrize(("name", "algorithm", "runtime"), CASES)
@pytest.mark.parametrize("slow", [0, 2])
def test_a_slow_rank_is_named_and_its_what_if_is_the_step_without(name, algorithm, runtime, slow):
    step, program = step_of(name, algorithm, runtime)
    rank_of = step.problem.rank_of
    times = Times(passes=passes_of(step, lambda item: 2.0 if rank_of(item) == slow else 1.0))
    found = explain(run(step, program, times))
    assert [(row.rank, row.slowness) for row in found.slow] == [(slow, pytest.approx(2.0))]
    names = [what_if.name for what_if in found.what_ifs]
    assert len(names) == len(set(names))
    without = replay(program, step.cost, runtime).timeline.makespan
    assert found.what_if("equal_ranks").seconds == pytest.approx(without)
    assert found.measured_seconds > 1.2 * without


@pytest.mark.parametrize("slow", [0, 1])
def test_of_two_ranks_the_slower_one_is_slow(slow):
    step, program = step_of("1f1b", "one_barrier", rows=(1, 1))
    times = Times(passes=passes_of(step, lambda i: 1.5 if step.problem.rank_of(i) == slow else 1))
    found = explain(run(step, program, times))
    assert [(row.rank, row.slowness) for row in found.slow] == [(slow, pytest.approx(1.5))]


def test_slowness_that_was_planned_is_named_too():
    step, program = step_of("1f1b", "one_barrier")
    cost = replace(
        step.cost,
        pass_seconds={
            kind: tuple(2 * value if stage == 1 else value for stage, value in enumerate(values))
            for kind, values in step.cost.pass_seconds.items()
        },
    )
    step = replace(step, cost=cost, slowness=(1.0, 2.0, 1.0, 1.0))
    found = explain(run(step, program))
    assert [row.rank for row in found.slow] == [1]


def offloading(*, beside):
    """Return a step of 1f1b that offloads activations, and its program.

    beside: whether copies run beside the passes, as on a GPU.
    """
    step, _ = step_of("1f1b", "one_barrier", replace(GLOO, copies_beside_passes=beside))
    cost = replace(
        step.cost, stage_bytes=(1.0,) * P, offload_bytes=(1.0,) * P, offload_seconds=(0.5,) * P
    )
    schedule = place_transfers(step.schedule, step.problem, cost)
    assert len(schedule.offloads) > M
    program = lower(schedule, step.problem, cost)
    planned = replay(program, cost, step.runtime).timeline.makespan
    return replace(step, schedule=schedule, cost=cost, planned_seconds=planned), program


def run_with_copies(step, program, times):
    """Return the step as measured with `times`; a run records copies among its messages."""
    step = run(step, program, times)
    copies = (transfer.span for transfer in step.measured.transfers)
    return replace(step, measured=replace(step.measured, comm=(*step.measured.comm, *copies)))


def copies_of(step, seconds):
    """Return `seconds()` for every copy."""
    ways = (Action.OFFLOAD, Action.RELOAD)
    return {(way, one.item): seconds() for one in step.schedule.offloads for way in ways}


@pytest.mark.parametrize("beside", [True, False])
def test_a_replay_of_measured_copies_gives_the_measured_step(beside):
    step, program = offloading(beside=beside)
    chance = random.Random(1)
    copies = copies_of(step, lambda: chance.uniform(0.1, 3.0))
    leads = copies_of(step, lambda: chance.uniform(0.0, 0.05))
    given = replace(noisy(step), copies=copies, copy_leads=leads)
    step = run_with_copies(step, program, given)
    times = times_of(program, step.cost, step.runtime, step.measured)
    again = replay(program, step.cost, step.runtime, times).timeline
    for spans, expected in zip(again.compute, step.measured.compute, strict=True):
        assert [span.start for span in spans] == pytest.approx([span.start for span in expected])
    found = explain(step)
    difference = found.measured_seconds - found.planned_seconds
    assert sum(cause.seconds for cause in found.causes) == pytest.approx(difference)
    rest = {cause.name: cause.seconds for cause in found.causes}["rest"]
    assert abs(rest) < 1e-6 * found.measured_seconds
    stopped = [(item, s) for each in (copies, leads) for (_, item), s in each.items()]
    between = of_ranks(step, given.pass_leads.items(), [] if beside else stopped)
    assert [row.between for row in found.ranks] == pytest.approx(between)


@pytest.mark.parametrize("beside", [True, False])
def test_slow_copies_to_the_host_are_named(beside):
    step, program = offloading(beside=beside)
    times = Times(copies=copies_of(step, lambda: 3.0))
    found = explain(run_with_copies(step, program, times))
    causes = {cause.name: cause.seconds for cause in found.causes}
    difference = found.measured_seconds - found.planned_seconds
    assert difference > 0.1 * found.planned_seconds
    assert causes["copies"] == pytest.approx(difference)
    free = Times(copies=copies_of(step, lambda: 0.0))
    truth = replay(program, step.cost, step.runtime, free).timeline.makespan
    assert found.what_if("free_copies").seconds == pytest.approx(truth)
    measured = {row.name: row.measured for row in found.kinds}
    assert (measured["offload"], measured["reload"]) == (pytest.approx(3.0), pytest.approx(3.0))
    assert not found.slow


@pytest.mark.parametrize("offloads", [True, False])
def test_a_plan_from_measured_times_has_them_as_costs(offloads):
    """Each kind takes longer by its own factor, rank 2 by another, and each message by its own."""
    step, program = offloading(beside=True) if offloads else step_of("zb_v", "one_barrier")
    factors = {kind: 1.2 + 0.1 * index for index, kind in enumerate(Kind)}
    rank_of, chance = step.problem.rank_of, random.Random(3)

    def factor(item):
        return factors[item.kind] * (1.5 if rank_of(item) == 2 else 1.0)

    explaining = _Explaining.of(run(step, program, Times(passes=passes_of(step, factor))))
    messages = {item: chance.random() for item in explaining.times.communications}
    copies = {copy: chance.random() for copy in explaining.times.copies}
    times = replace(explaining.times, communications=messages, copies=copies)
    found = replace(explaining, times=times)._measured_cost()
    for _, item in step.schedule.passes():
        assert found.seconds(item) == pytest.approx(step.cost.seconds(item) * factor(item))
    for kind, values in found.pass_seconds.items():
        assert len(values) == len(step.cost.pass_seconds[kind])
    hops = [value for item, value in messages.items() if not isinstance(item, Collective)]
    assert found.hop_seconds == median(hops)
    for barrier in step.problem.algorithm.barriers:
        values = [v for i, v in messages.items() if getattr(i, "barrier", None) == barrier.name]
        assert found.barrier(barrier.name) == median(values)
    for stage in range(len(step.cost.offload_seconds)):
        values = [value for (_, item), value in copies.items() if item.stage == stage]
        expected = median(values) if values else step.cost.offload_seconds[stage]
        assert found.offload_seconds[stage] == expected
    assert all(item.stage < P - 1 for _, item in copies), "the last stage copies nothing"
    assert found.offload_bytes == step.cost.offload_bytes


def test_one_rank_sends_nothing_and_is_as_fast_as_itself():
    step, program = step_of("1f1b", "none", rows=(1,))
    found = explain(run(step, program, Times(passes=passes_of(step, lambda _: 1.3))))
    assert [row.slowness for row in found.ranks] == [1.0]
    assert "hop" not in {row.name for row in found.kinds}
    assert found.what_if("order").seconds == pytest.approx(found.measured_seconds, rel=0.01)


@pytest.mark.parametrize(("name", "other"), [("zb_h1", "1f1b"), ("1f1b", "zb_h1")])
def test_a_schedule_that_only_has_the_name_of_a_generator_is_not_ordered_by_it(name, other):
    """The schedule of a file splits its backward and is named 1f1b, or the other way round."""
    step, program = step_of(name, "one_barrier")
    assert explain(run(step, program)).what_if("order") is not None
    named = replace(step, schedule=replace(step.schedule, name=other))
    assert explain(run(named, program)).what_if("order") is None


@pytest.mark.parametrize("slow", [1.0, 2.0])
@pytest.mark.parametrize("more", [0.0, 0.5])
def test_uneven_work_is_evened_where_it_is_not_that_of_rows(more, slow):
    """Stage 1 has more layers than others, as planned; a rank that is slow has no more work."""
    step, _ = step_of("1f1b", "one_barrier")
    seconds = {
        kind: tuple(value * (1.0 + more * (stage == 1)) for stage, value in enumerate(values))
        for kind, values in step.cost.pass_seconds.items()
    }
    step = replace(step, cost=replace(step.cost, pass_seconds=seconds), rows=())
    program, rank_of = lower(step.schedule, step.problem, step.cost), step.problem.rank_of
    busy = of_ranks(step, passes_of(step, lambda _: 1.0).items())
    factors = [1.0, 1.0, 1.0, slow]
    even = [factor * sum(busy) / P / each for factor, each in zip(factors, busy, strict=True)]
    times = Times(passes=passes_of(step, lambda item: even[rank_of(item)]))
    truth = replay(program, step.cost, step.runtime, times).timeline.makespan
    times = Times(passes=passes_of(step, lambda item: factors[rank_of(item)]))
    found = explain(run(step, program, times))
    assert found.what_if("even_work").seconds == pytest.approx(truth)
    assert len(found.slow) == (slow > 1)


@pytest.mark.parametrize("slow", ["hops", "barriers"])
def test_a_slow_network_is_told_from_slow_passes(slow):
    step, program = step_of("1f1b", "one_barrier")
    if slow == "hops":  # which a replayed timeline does not show, so the plan has them
        step = replace(step, cost=replace(step.cost, hop_seconds=0.8))
        program = lower(step.schedule, step.problem, step.cost)
        times, kind = Times(), lambda item: not isinstance(item, Collective)
    else:
        times = Times(communications=dict.fromkeys(step.problem.collectives(), 0.8))
        kind = lambda item: isinstance(item, Collective)  # noqa: E731
    found = explain(run(step, program, times))
    items = list(
        times_of(program, step.cost, GLOO, run(step, program, times).measured).communications
    )
    free = replace(
        times,
        communications={**times.communications, **{item: 0.0 for item in items if kind(item)}},
    )
    truth = replay(program, step.cost, GLOO, free).timeline.makespan
    name = "free_hops" if slow == "hops" else "free_barriers"
    assert found.what_if(name).seconds == pytest.approx(truth)
    assert truth < 0.95 * found.measured_seconds
    assert not found.slow


@pytest.mark.parametrize(("name", "rows"), [("1f1b", (1, 1, 1, 5)), ("zb_v", (2, 2, 4, 0))])
def test_unequal_rows_are_evened_as_a_plan_with_equal_rows(name, rows):
    step, program = step_of(name, "one_barrier", rows=rows)
    found = explain(run(step, program))
    assert found.rows == (2000,) * 4
    equal, equal_program = step_of(name, "one_barrier", rows=(2, 2, 2, 2))
    truth = replay(equal_program, equal.cost, GLOO).timeline.makespan
    assert found.what_if("even_rows").seconds == pytest.approx(truth)
    assert truth < 0.95 * found.measured_seconds
    assert not found.slow


@pytest.mark.parametrize(
    ("changes", "algorithm"),
    [({"rows": ()}, "one_barrier"), ({"rows": (0, 0, 0, 0)}, "one_barrier"), ({}, "none")],
)
def test_rows_that_are_not_known_or_not_shared_are_not_evened(changes, algorithm):
    step, program = step_of("1f1b", algorithm, rows=(1, 1, 1, 5))
    assert explain(replace(run(step, program), **changes)).rows is None
    step, program = step_of("1f1b", algorithm, rows=(1, 1, 1, 5))
    free = passes_of(step, lambda item: float(item.kind not in (Kind.S, Kind.T)))
    assert explain(run(step, program, Times(passes=free))).rows is None


def test_rows_are_not_evened_where_the_busiest_rank_stays_as_busy():
    """All are even, or the layers of rank 1 alone take longer than all that another rank does."""
    for rows, factor in (((1, 1, 1, 1), 1.0), ((2, 0, 1, 1), 3.0)):
        step, program = step_of("1f1b", "one_barrier", rows=rows)
        times = Times(passes=passes_of(step, lambda i, f=factor: f if i.stage == 1 else 1.0))
        assert explain(run(step, program, times)).rows is None


def test_a_rank_with_long_layers_gives_its_rows_to_others():
    step, program = step_of("1f1b", "one_barrier")
    long = Times(passes=passes_of(step, lambda i: 1.5 if i.stage == 1 and i.kind in "FB" else 1.0))
    found = explain(run(step, program, long)).rows
    assert found[1] == 0
    assert sum(found) == sum(step.rows)
    assert max(found) <= min(found[:1] + found[2:]) + 1


def in_units(step, unit):
    """Return the same step with all seconds times `unit`."""

    def spans(found):
        return tuple(replace(each, start=unit * each.start, end=unit * each.end) for each in found)

    cost = replace(
        step.cost,
        pass_seconds={
            kind: tuple(unit * value for value in values)
            for kind, values in step.cost.pass_seconds.items()
        },
        hop_seconds=unit * step.cost.hop_seconds,
        barrier_seconds={name: unit * value for name, value in step.cost.barrier_seconds.items()},
    )
    measured = replace(
        step.measured,
        compute=tuple(map(spans, step.measured.compute)),
        comm=spans(step.measured.comm),
    )
    return replace(
        step,
        cost=cost,
        measured=measured,
        planned_seconds=unit * step.planned_seconds,
        processor={item: unit * value for item, value in step.processor.items()},
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_explanation_does_not_depend_on_the_unit_of_time(device):
    step, program = step_of("1f1b", "one_barrier", rows=(1, 1, 3, 3))
    slow = {item: value * (1 + (item.stage == 1)) for item, value in noisy(step).passes.items()}
    step = run(step, program, replace(noisy(step), passes=slow))
    step = replace(step, device=device, processor=passes_of(step, lambda _: 0.7))
    unit = 2.0**-20  # by which floats are multiplied exactly
    found, small = explain(step), explain(in_units(step, unit))
    assert (small.rows, small.on_processor) == (found.rows, found.on_processor)
    assert [row.slowness for row in small.ranks] == [row.slowness for row in found.ranks]
    for name in ("causes", "what_ifs", "shown_what_ifs"):
        each, other = ([(e.name, e.seconds) for e in getattr(f, name)] for f in (found, small))
        assert other == [(cause, pytest.approx(unit * seconds)) for cause, seconds in each]
    going_on = GoingOn("x", 0, 9, "runs/x")
    causes = [[each.cause for each in remedies(each, going_on)] for each in (found, small)]
    assert causes[0] == causes[1]


def test_a_kind_takes_on_average_what_it_was_measured_to_take():
    """A kind that the plan took for free counts too."""
    step, _ = step_of("1f1b", "one_barrier")
    free = {kind: seconds for kind, seconds in step.cost.pass_seconds.items() if kind != Kind.E}
    step, chance = replace(step, cost=replace(step.cost, pass_seconds=free)), random.Random(0)
    program = lower(step.schedule, step.problem, step.cost)
    times = Times(passes={item: chance.random() for _, item in step.schedule.passes()})
    average = _Explaining.of(run(step, program, times))._as_planned_but_average()
    for kind in Kind:
        sums = [
            sum(seconds for item, seconds in passes.items() if item.kind is kind)
            for passes in (times.passes, average)
        ]
        assert sums[1] == pytest.approx(sums[0])


def test_several_slow_ranks_have_a_what_if_each_and_one_together():
    step, program = step_of("1f1b", "one_barrier")
    rank_of, factors = step.problem.rank_of, {1: 1.5, 3: 2.0}

    def truth(slow):
        times = Times(passes=passes_of(step, lambda item: slow.get(rank_of(item), 1.0)))
        return replay(program, step.cost, GLOO, times).timeline.makespan

    times = Times(passes=passes_of(step, lambda item: factors.get(rank_of(item), 1.0)))
    found = explain(run(step, program, times))
    assert [row.rank for row in found.slow] == [3, 1]
    assert found.what_if("equal_rank_1").seconds == pytest.approx(truth({3: 2.0}))
    assert found.what_if("equal_rank_3").seconds == pytest.approx(truth({1: 1.5}))
    assert found.what_if("equal_ranks").seconds == pytest.approx(truth({}))


@pytest.mark.parametrize(
    "changes", [{"device": "cuda"}, {"tp": 2}, {"processor": {}}, {"share": 0.95}, {"share": 0.0}]
)
def test_time_without_a_processor_is_a_cause_only_where_it_is_known_and_much(changes):
    step, program = step_of("1f1b", "one_barrier")
    share = changes.get("share", 0.5)
    step = replace(run(step, program), device="cpu", processor=passes_of(step, lambda _: share))
    known = {name: value for name, value in changes.items() if name != "share"}
    found = explain(replace(step, **known))
    assert found.on_processor == 1.0
    assert found.what_if("processors") is None
    if not known:
        half = explain(replace(step, processor=passes_of(step, lambda _: 0.85)))
        assert half.on_processor == pytest.approx(0.85)


def test_passes_that_wait_for_a_processor_are_told_from_long_ones():
    step, program = step_of("1f1b", "one_barrier")
    times = Times(passes=passes_of(step, lambda _: 2.0))
    alone = replay(program, step.cost, GLOO).timeline.makespan
    shared = replace(
        run(step, program, times), device="cpu", cpus=2, processor=passes_of(step, lambda _: 1.0)
    )
    found = explain(shared)
    assert found.on_processor == pytest.approx(0.5)
    assert found.what_if("processors").seconds == pytest.approx(alone)
    causes = {cause.name: cause.seconds for cause in found.causes}
    assert causes["processors"] > 0.9 * (found.measured_seconds - found.planned_seconds)
    assert abs(causes["passes"]) < 1e-6
    sums = [{Kind.F: 2.0 * M * (1 + replica * at)} for replica in range(2) for at in range(P)]
    ranks = [TracedRank(n, n // P, n % P, 0, "", passes) for n, passes in enumerate(sums)]
    found = explain(replace(shared, ranks=tuple(ranks)))
    assert [row.slowness for row in found.ranks[P:]] == [1.0] * P, "of them nothing is known"
    found = explain(replace(shared, ranks=tuple(ranks), processor={}))
    assert [row.rank for row in found.slow if row.replica] == [7, 6, 5]


def test_a_recorder_tells_time_on_a_processor_from_time_without():
    recorder = Recorder(0, HostTimer(), [])
    with recorder.observe(Pass(0, Kind.B, 0), lambda: 0):
        time.sleep(0.05)
    (span,) = recorder.spans
    assert recorder.processor_seconds[0] < 0.02 < span.seconds


# Files and the command


@cache
def record_of(slow, dp):
    """Return step_times.json and config.yaml of a run of 1f1b, as texts.

    Its rank `slow` computes twice as long as planned, and rank 5, in the second replica, 1.5 times.
    """
    config = RunConfig()
    config = replace(config, parallel=replace(config.parallel, dp=dp, pp=4))
    plan = make_plan(config, 4 * dp)
    times = Times(
        passes={
            item: plan.cost.seconds(item) * (2.0 if rank == slow else 1.0)
            for rank, item in plan.schedule.passes()
        }
    )
    measured = replay(plan.program, plan.cost, GLOO, times).timeline
    ranks = [
        RankTimes(
            rank,
            *plan.degrees.place(rank),
            host=f"node{rank // 4}",
            pass_seconds={
                kind: (count, seconds * (1.5 if rank == 5 else 1.0))
                for kind, (count, seconds) in pass_seconds(measured.compute[rank % 4]).items()
            },
        )
        for rank in range(4 * dp)
    ]
    record = step_times(config, plan, measured, step=5, ranks=ranks)
    return json.dumps(record), config_text(config)


def traced_run(directory, slow=None, dp=1):
    """Write a run with the files of `record_of`; return its directory."""
    record, config = record_of(slow, dp)
    run = directory / "mine"
    (run / "trace").mkdir(parents=True)
    (run / "trace" / "step_times.json").write_text(record)
    (run / "config.yaml").write_text(config)
    (run / "env.json").write_text('{"cpus": 8}')
    return run


@pytest.fixture
def vp_explain(run_here):
    return partial(run_here, command.main, "vp-explain")


@pytest.mark.slow
def test_the_command_names_the_slow_rank_and_what_mends_it(tmp_path, monkeypatch, vp_explain):
    monkeypatch.setattr(command, "_SECONDS", 0.0)  # for the comparison of schedules
    run = traced_run(tmp_path, slow=2)
    costs = tmp_path / "measured.yaml"
    code, out, err = vp_explain(run, "--cost", costs)
    assert (code, err) == (0, f"costs written to {costs}\n")
    assert "rank 2 on node0 is slow: it computes 2.00 times as long as others" in out
    assert "cost.rank_slowness=[1,1,2,1]" in out
    code, out, _ = vp_explain(run, "--json")
    found = json.loads(out)
    assert found["slow_ranks"] == [2]
    monkeypatch.setattr(plan_words, "text_width", lambda: 60)
    head = vp_explain(run)[1].partition("\n\n")[0].splitlines()
    assert len(head) > 3
    assert all(len(line) <= 60 for line in head if str(run) not in line)
    causes = sum(cause["seconds"] for cause in found["causes"])
    assert causes == pytest.approx(found["measured_seconds"] - found["planned_seconds"])
    assert found["schedules"]["own"]["schedule"] == "1f1b"
    code, _, err = vp_explain(run, "--cost", costs)
    assert code == 0, "costs may be written anew"
    assert err == f"costs written to {costs}, in place of those that were there\n"
    other = costs.with_name("other.yaml")
    other.write_text("F0 B0")
    code, out, err = vp_explain(run, "--cost", other)
    assert (code, out) == (EXIT_CONFIG, "")
    assert "other.yaml is there and holds no costs; give another --cost FILE.yaml" in err
    assert other.read_text() == "F0 B0"
    unread = costs.with_name("h100.v2")
    code, out, err = vp_explain(run, "--cost", unread)
    assert (code, out) == (EXIT_CONFIG, "")
    assert f"can be read as cost=FILE; write --cost {unread}.yaml" in err
    assert not unread.exists()
    cost = load_config([f"cost={costs}"]).cost
    assert cost.rank_slowness == (1.0, 1.0, 2.0, 1.0)
    assert cost.is_measured


def test_a_plan_with_the_written_costs_takes_the_measured_time(tmp_path):
    step = read_traced(traced_run(tmp_path))
    found = explain(step)
    config = RunConfig()
    plan = plan_of(found, config)
    asked = iter(range(4))  # more schedules would take seconds
    comparison = compare_schedules(
        config, plan, cost_settings(found, plan), lambda: next(asked, None) is not None
    )
    assert comparison.own.seconds == pytest.approx(found.measured_seconds, rel=0.02)
    assert comparison.own.peak_bytes == max(plan.timeline.peak_bytes)
    best = comparison.others[0]
    assert best.seconds <= comparison.own.seconds
    told = remedies(found, GoingOn("run.name=mine", 0, 90, "runs/mine"), comparison)
    saved = 1 - best.seconds / comparison.own.seconds
    advised = f"schedule={best.schedule}" in " ".join(remedy.command for remedy in told)
    assert advised == (saved > 0.02)


def test_every_searched_schedule_is_compared_with_every_searched_algorithm(monkeypatch):
    """A stand-in for the simulation notes what it is asked; zb_h1 cannot be planned."""
    asked = []

    def simulated(config, num_ranks):
        name, algorithm = config.schedule.name, config.vocab.algorithm
        asked.append((name, algorithm, num_ranks, config.cost.rank_slowness))
        seconds = 9.0 - len(asked) % 5
        return None if name == "zb_h1" else Alternative(name, algorithm, seconds, 0.0)

    monkeypatch.setattr(remedies_module, "_simulated", simulated)
    config, settings = RunConfig(), {"rank_slowness": [1.0, 2.0]}
    plan = make_plan(config, 4)
    found = compare_schedules(config, plan, settings)
    assert found.own == Alternative(config.schedule.name, config.vocab.algorithm, 8.0, 0.0)
    pairs = [(n, a) for n in searched_schedules() for a in searched_algorithms()]
    assert [each[:2] for each in asked[1:]] == pairs
    assert {each[2:] for each in asked} == {(4, (1.0, 2.0))}
    others = [(each.schedule, each.vocab) for each in found.others]
    assert sorted(others) == sorted(pair for pair in pairs if pair[0] != "zb_h1")
    assert [each.seconds for each in found.others] == sorted(each.seconds for each in found.others)
    assert compare_schedules(config, plan, settings, lambda: False).others == ()
    largest = replace(plan.problem, num_microbatches=(1 << 13) // 4)
    for more, is_none in ((0, False), (1, True)):
        problem = replace(largest, num_microbatches=largest.num_microbatches + more)
        found = compare_schedules(config, replace(plan, problem=problem), settings, lambda: False)
        assert (found is None) == is_none
    monkeypatch.setattr(remedies_module, "_simulated", lambda *_: None)
    assert compare_schedules(config, plan, settings) is None


def test_costs_are_the_measured_passes_without_the_slowness_of_their_rank(monkeypatch):
    """All passes took as long as planned, those of rank 2 twice as long."""
    found = explain(parse(json.loads(record_of(2, 1)[0])))
    plan, seen = plan_of(found, RunConfig()), []
    monkeypatch.setattr(
        remedies_module, "measured_cost", lambda _, passes: seen.append(passes) or {}
    )
    assert cost_settings(found, plan)["rank_slowness"] == [1.0, 1.0, 2.0, 1.0]
    expected = {
        (item.kind, item.stage): plan.cost.seconds(item) for _, item in plan.schedule.passes()
    }
    assert seen == [pytest.approx(expected, rel=1e-3)]


def test_measured_messages_are_costs_on_a_cpu_and_measured_copies_on_a_gpu():
    found = explain(parse(json.loads(record_of(None, 1)[0])))
    plan = plan_of(found, RunConfig())
    measured = {"hop": 0.5, "C1": 0.2, "C2": 0.4, "C3": None, "F": 9.0, "offload": 9.0}
    kinds = tuple(KindTimes(name, 1, "", 1.0, value) for name, value in measured.items())
    others = {"rank_slowness", "hop_seconds", "collective_seconds", "host_bytes_per_second"}
    spans = [("offload", "offload:0F0", 1.0), ("reload", "reload:2F0", 2.0), ("C1", "C1.0", 9.0)]
    comm = tuple(Span(0, name, kind, -1, -1, 0.0, end) for kind, name, end in spans)
    step = replace(found.step, measured=replace(found.step.measured, comm=comm))
    copied = replace(step, cost=replace(step.cost, offload_bytes=(1.0, 2.0, 8.0, 0.0)))
    for device, each, rows, expected in (
        ("cpu", copied, kinds, {"hop_seconds": 0.5, "collective_seconds": pytest.approx(0.3)}),
        ("cpu", copied, (), {}),
        ("cuda", copied, kinds, {"host_bytes_per_second": 3.0}),
        ("cuda", step, kinds, {}),
        ("cuda", replace(copied, measured=found.step.measured), kinds, {}),
    ):
        changed = replace(found, step=replace(each, device=device), kinds=rows)
        settings = cost_settings(changed, plan)
        assert {name: settings[name] for name in settings.keys() & others} == expected


def test_a_file_of_costs_with_a_blank_in_its_name_is_one_word_of_a_command(tmp_path):
    found = explain(read_traced(traced_run(tmp_path)))
    own, other = (Alternative(name, "none", time, 0.0) for name, time in (("a", 1.0), ("b", 0.5)))
    told = remedies(
        found,
        GoingOn("run.name=mine", 0, 90, "runs/mine"),
        Comparison(own, (other,)),
        "my costs.yaml",
    )
    (command,) = (remedy.command for remedy in told if remedy.cause == "schedule")
    assert shlex.split(command)[-1] == "cost=my costs.yaml"


def test_a_command_trains_steps_that_are_still_to_come(tmp_path, monkeypatch, vp_explain):
    monkeypatch.setattr(command, "compare_schedules", lambda *_: None)
    monkeypatch.setattr(remedies_module, "WORTH", -9.0)  # everything is worth a line
    run, commands = traced_run(tmp_path), {}
    for done in (0, 89, 90):
        (run / "checkpoints" / checkpoint_name(done)).mkdir(parents=True)
        found = json.loads(vp_explain(run, "--json")[1])["remedies"]
        between = [each["command"] for each in found if each["cause"] == "between"]
        commands[done] = [shlex.split(words) for words in between]
    for done, (larger, profiled) in commands.items():
        config = load_config(["run.name=other", *profiled[4:]])  # the run has 90 steps
        assert config.run.profile_steps == (done + 2,)
        assert config.run.steps == (90 if done == 0 else done + 2)
        make_plan(config, 4)
        number = RunConfig().num_microbatches // 2
        assert larger[-2:] == [f"num_microbatches={number}", "micro_batch_size=2"]
        assert larger[4:-2] == profiled[4:-1]


def test_a_run_that_has_other_microbatches_than_its_traced_step_says_so(
    tmp_path, monkeypatch, vp_explain
):
    monkeypatch.setattr(command, "compare_schedules", lambda *_: None)
    run = traced_run(tmp_path)
    assert "the run has" not in vp_explain(run)[1]
    text = (run / "config.yaml").read_text()
    (number,) = re.findall(r"^num_microbatches: (\d+)$", text, re.MULTILINE)
    more = int(number) + 4
    (run / "config.yaml").write_text(text.replace(f"ches: {number}", f"ches: {more}"))
    code, out, _ = vp_explain(run)
    assert code == 0
    assert f"the run has num_microbatches={more} now; all that follows" in out


def test_microbatches_grow_where_the_step_can_be_planned():
    config = replace(RunConfig(), num_microbatches=8, micro_batch_size=3)
    plan = make_plan(config, 4)
    assert larger_microbatches(config, plan) == "num_microbatches=4 micro_batch_size=6"
    assert larger_microbatches(replace(config, num_microbatches=5), plan) is None
    assert larger_microbatches(replace(config, batch_ramp=([1, 2],)), plan) is None


def test_a_schedule_that_was_searched_for_is_not_searched_for_again(tmp_path):
    run = traced_run(tmp_path)
    found = explain(read_traced(run))
    (run / "schedule.txt").write_text(found.step.schedule.text())
    config = load_config(["schedule=auto", "vocab=auto", "parallel.pp=4", "num_microbatches=2"])
    traced = as_traced(found, config, run / "schedule.txt")
    assert not traced.schedule.is_solved
    plan = plan_of(found, traced)
    assert plan.schedule == found.step.schedule
    assert larger_microbatches(traced, plan) is None, "it is of so many microbatches"


def test_a_replica_takes_the_step_with_its_own_passes(tmp_path):
    """Ten replicas compute at their own pace; of a kind without seconds nothing is known."""
    found = explain(read_traced(traced_run(tmp_path, dp=2)))
    assert [row.rank for row in found.slow] == [5]
    config = load_config(["parallel.pp=4", "parallel.dp=2"])
    assert plan_of(found, config).degrees.num_ranks == 8
    with pytest.raises(ConfigError, match="another layout"):
        plan_of(found, replace(config, num_microbatches=config.num_microbatches + 1))
    step, program = step_of("1f1b", "one_barrier")
    step = run(step, program, noisy(step))
    times = times_of(program, step.cost, step.runtime, step.measured)

    def known(replica, item):
        return replica > 0 if item.kind is Kind.T else item.kind is not Kind.B or replica % 2 == 0

    def factor(replica, item):
        slow = replica * (known(replica, item) and known(0, item))
        return 1.0 + 0.1 * slow * (1 + step.problem.rank_of(item))

    ranks = []
    for replica in range(10):
        for at in range(P):
            passes = {}
            for item, value in times.passes.items():
                if step.problem.rank_of(item) == at and known(replica, item):
                    passes.setdefault(item.kind, 0.0)
                    passes[item.kind] += value * factor(replica, item)
            for tensor_rank in range(2):
                rank, slow = len(ranks), 1 + 98 * tensor_rank
                own = {kind: slow * value for kind, value in passes.items()}
                ranks.append(TracedRank(rank, replica, at, tensor_rank, "", own))
    found = explain(replace(step, ranks=tuple(ranks), tp=2))
    assert list(found.replicas) == list(range(2, 10)), "the eight longest"
    for replica, seconds in found.replicas.items():
        own = {item: value * factor(replica, item) for item, value in times.passes.items()}
        truth = replay(program, step.cost, step.runtime, replace(times, passes=own)).timeline
        assert seconds == pytest.approx(truth.makespan), replica


def test_a_file_keeps_what_was_offloaded_and_what_that_costs(tmp_path):
    words = ["model=llama3_8b", "cluster=h100_80g_node", "schedule=interleaved", "parallel.pp=8"]
    config = load_config([*words, "parallel.offload_activations=0.5"])
    plan = plan_step(config, 8)
    assert plan.schedule.offloads
    ranks = [RankTimes(r, 0, r, 0, host="", pass_seconds={}) for r in range(8)]
    record = step_times(config, plan, plan.timeline, step=5, ranks=ranks)
    assert record["planned"]["transfers"]["names"].count("reload:") == len(plan.schedule.offloads)
    found = parse(json.loads(json.dumps(record)))
    assert found.schedule == plan.schedule
    assert found.cost.offload(0) == plan.cost.offload(0)
    assert found.cost.stage_bytes == plan.cost.stage_bytes
    assert found.runtime.copies_beside_passes


def put(*path, value):
    """Return what puts `value` at `path` into a record."""

    def change(record):
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


MESSAGES = {"starts": [0.0, 0.1], "ends": [0.1, 0.2], "ranks": [0, 3]}


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        (put("schema", value="x"), "schema"),
        (put("offloads", value=["0F0 0B0 0F0"]), "offloaded from"),
        (put("offloads", value=["0F0 0F1"]), "not the three passes"),
        (lambda r: r["cost"]["bytes"]["stage"].pop(), "3 values of bytes or copies, not 4"),
        (put("cost", "offload_seconds", value=[1.0]), "1 values of bytes or copies, not 4"),
        (put("cost", "bytes", "shard", value=[1.1e18] * 4), "is not a number of bytes"),
        (put("cost", "sources", value={"F": "guessed"}), "is not one of measured, flops, assumed"),
        (put("runtime", value="mpi"), "is not one of cuda, gloo"),
        (lambda r: r["cost"]["pass_seconds"]["F"].pop(), "3 values of F, not 4"),
        (lambda r: r["cost"]["pass_seconds"]["S"].append(1.0), "5 values of S, not 4"),
        (put("cost", "settings", "rank_slowness", value=[0, 1, 1, 1]), "4 values above 0"),
        (put("cost", "settings", "rank_slowness", value=[1, 1, 1]), "3 values above 0, not 4"),
        (put("rows", value=[-1, 1, 1, 1]), "rows is -1"),
        (put("measured", "passes", 0, "names", value="0F0"), "names have"),
        (lambda r: r["measured"]["passes"][0]["starts"].pop(), "starts and"),
        (put("measured", "passes", 0, "ends", 0, value=-1.0), "time in seconds"),
        (put("measured", "communications", value=MESSAGES | {"names": "C1.0"}), "1 names"),
        (put("measured", "communications", value=MESSAGES | {"names": "a b c"}), "3 names"),
        (
            put("measured", "communications", value=MESSAGES | {"names": "a b", "ranks": [0]}),
            "2 communications have 1 ranks",
        ),
        (
            put("measured", "communications", value=MESSAGES | {"names": "a b", "ranks": [0, 4]}),
            '"b" ends on rank 4 of 4',
        ),
        (put("measured", "communications", value=MESSAGES | {"names": "a x:0F0"}), "not known"),
        (
            put("measured", "communications", value=MESSAGES | {"names": "a reload:0B0"}),
            "not known",
        ),
        (lambda r: r["measured"]["passes"].pop(), "ranks"),
        (put("pp", value=3), "pp is 3, but 4 ranks have passes"),
        (put("processor_seconds", value=[[0.1]]), "not one value for each pass"),
        (put("processor_seconds", value=[[], [0.1], [], []]), "not one value for each pass"),
        (put("step", value=0), "step is 0"),
        (put("num_microbatches", value=10**9), "not those of 1,000,000,000 microbatches"),
        (put("num_microbatches", value=True), "num_microbatches"),
        (lambda r: r["ranks"].pop(), "it has 7 ranks, not dp x pp x tp = 8"),
        (put("dp", value=1), "it has 8 ranks, not dp x pp x tp = 4"),
        (put("tp", value=2), "it has 8 ranks, not dp x pp x tp = 16"),
        *(
            (put("ranks", 7, name, value=value), "each rank of the run once")
            for name, value in (
                *(("replica", 2), ("pipeline_rank", 4), ("tensor_rank", 1), ("rank", 8)),
                *(("replica", 0), ("pipeline_rank", 2), ("rank", 0)),
            )
        ),
        (put("vocabulary", value="\x1b[31m"), "not known"),
        (put("measured", value=[]), "not an object"),
        (put("rows", value={}), "not a list"),
        (put("schedule", value=3), "3 is not text"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(defect, words):
    record = json.loads(record_of(None, 2)[0])
    defect(record)
    with pytest.raises((TypeError, ValueError), match=words):
        parse(record)


def test_a_file_has_at_most_so_many_ranks_and_passes(monkeypatch):
    record = json.loads(record_of(None, 2)[0])
    num_passes = sum(len(row["starts"]) for row in record["measured"]["passes"])
    for name, number in (("_MOST_RANKS", 8), ("_MOST_PASSES", num_passes)):
        with monkeypatch.context() as patched:
            patched.setattr(trace_module, name, number)
            parse(record)
            patched.setattr(trace_module, name, number - 1)
            with pytest.raises(ValueError, match=r"it has 8 ranks|passes are not those of"):
                parse(record)


def test_a_step_has_what_its_file_says():
    record = json.loads(record_of(None, 2)[0])
    record["ranks"][1]["host"] = "x" * 99
    found = parse(record, 7)
    assert (found.step, found.device, found.dtype, found.cpus) == (5, "cpu", "float32", 7)
    assert (found.tp, found.slowness, found.processor) == (1, (1.0,) * 4, {})
    assert not found.runtime.copies_beside_passes
    assert found.rows == tuple(record["rows"])
    assert found.planned_seconds == record["planned"]["makespan_seconds"]
    places = [(r.rank, r.replica, r.pipeline_rank, r.tensor_rank) for r in found.ranks]
    assert places == [(rank, rank // 4, rank % 4, 0) for rank in range(8)]
    for rank, entry in zip(found.ranks, record["ranks"], strict=True):
        assert rank.host == entry["host"][:64]
        assert rank.passes == {
            Kind(kind): of["seconds"] for kind, of in entry["pass_seconds"].items()
        }
    last = record["measured"]["passes"][3]
    messages = {"names": "C1.0 reload:1F0 1F0", "ranks": [0, 3, 2]}
    messages |= {"starts": [0.0, 0.1, 0.2], "ends": [0.1, 0.2, 0.2]}
    for change in (
        put("measured", "passes", 3, "ends", -1, value=last["starts"][-1]),
        put("device", value="cuda"),
        put("ranks", value=[]),
        put("rows", value=[1, 0]),
        put("cost", "offload_seconds", value=[0.0, 1.0, 2.0, 3.0]),
        put("cost", "settings", "rank_slowness", value=[1, 2, 1, 1]),
        put("cost", "measured_on", value="x" * 99),
        put("measured", "communications", value=messages),
    ):
        change(record)
    seconds = [[0.5] * len(row["starts"]) for row in record["measured"]["passes"]]
    record["processor_seconds"] = seconds
    found = parse(record)
    assert (found.ranks, found.rows, found.slowness) == ((), (), (1.0, 2.0, 1.0, 1.0))
    assert (found.measured_on, found.cpus) == ("x" * 80, None)
    assert found.cost.offload_seconds == (0.0, 1.0, 2.0, 3.0)
    assert found.runtime.copies_beside_passes
    spans = [(each.kind, each.rank, each.start, each.end) for each in found.measured.comm]
    assert spans == [("C1", 0, 0.0, 0.1), ("reload", 3, 0.1, 0.2), ("hop", 2, 0.2, 0.2)]
    assert found.processor == {item: 0.5 for _, item in found.schedule.passes()}


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        (put("measured", "passes", 0, "ends", 0, value=float("nan")), "NaN"),
        (put("measured", "passes", 0, "ends", 0, value=10**400), "time in seconds"),
        (put("vocabulary", value="\x1b[31m"), "not known"),
        (lambda r: r.pop("cost"), "it has no 'cost'"),
    ],
)
def test_a_crafted_file_is_refused_in_one_line(tmp_path, defect, words, vp_explain):
    run = traced_run(tmp_path)
    path = run / "trace" / "step_times.json"
    record = json.loads(path.read_text())
    defect(record)
    path.write_text(json.dumps(record))
    code, out, err = vp_explain(run)
    assert (code, out, err.count("\n")) == (78, "", 1)
    assert words in err
    assert ("it has no" in err) == words.startswith("it has no")
    assert "\x1b" not in err


def test_what_is_no_run_or_has_no_trace_is_told_with_the_way_out(tmp_path, vp_explain):
    run = traced_run(tmp_path)
    trace = run / "trace" / "step_times.json"
    for spoil, words in (
        (trace.unlink, "the run has traced no step yet"),
        (lambda: trace.symlink_to(run / "config.yaml"), "symbolic link"),
        ((run / "config.yaml").unlink, "config.yaml"),
    ):
        spoil()
        code, _, err = vp_explain(run)
        assert (code, err.count("\n")) == (78, 1)
        assert words in err
    code, _, err = vp_explain(tmp_path / "nothing")
    assert (code, err.count("\n")) == (78, 1)


def test_a_step_without_a_measured_pass_is_refused(tmp_path):
    record = json.loads((traced_run(tmp_path) / "trace" / "step_times.json").read_text())
    for row in record["measured"]["passes"]:
        row["starts"] = row["ends"] = [0.0] * len(row["starts"])
    with pytest.raises(ValueError, match="no pass took any time"):
        parse(record)
    with pytest.raises(ConfigError, match="not a directory"):
        read_traced(tmp_path / "other")
    assert Pass.parse("0F0") in [item for _, item in step_of("1f1b", "none")[0].schedule.passes()]


@pytest.mark.parametrize(
    ("seconds", "fastest"), [((2.0, 1.5, 1.8), 1), ((2.0, 2.5), 0), ((2.0, 2.0), 0), ((2.0,), 0)]
)
def test_the_fastest_schedule_is_the_own_one_unless_another_takes_less(seconds, fastest):
    found = [Alternative("a", "none", each, 0.0) for each in seconds]
    assert Comparison(found[0], tuple(found[1:])).fastest is found[fastest]


@pytest.mark.parametrize(
    ("done", "steps", "more"),
    [(0, 2, ""), (0, 1, " run.steps=2"), (88, 90, ""), (89, 90, " run.steps=91")],
)
def test_a_command_asks_for_more_steps_only_where_too_few_are_left(done, steps, more):
    assert GoingOn("run.name=mine", done, steps, "runs/mine").words == f"run.name=mine{more}"
    assert GoingOn("run.name=mine", done, steps, "runs/mine").profiled == done + 2


ADVISED = ("processors", "equal_ranks", "planned_network", "between", "even_rows", "order")


@pytest.fixture(scope="module")
def explained():
    """A step of four ranks on two nodes, that took a second."""
    step, program = step_of("1f1b", "one_barrier")
    found = explain(run(step, program))
    ranks = tuple(replace(row, host=f"node{row.rank // 2}") for row in found.ranks)
    return replace(found, measured_seconds=1.0, ranks=ranks, rows=(1, 2, 3, 4), kinds=())


@pytest.mark.parametrize("name", ADVISED)
def test_what_saves_little_is_not_advised_and_what_saves_most_comes_first(explained, name):
    def advised(**seconds):
        ifs = tuple(WhatIf(each, "", value) for each, value in seconds.items())
        return remedies(
            replace(explained, what_ifs=ifs), GoingOn("x", 0, 9, "runs/x", larger="y=1")
        )

    assert advised() == []
    assert advised(**{name: 0.98}) == []
    count = 2 if name == "between" else 1
    found = advised(**{name: 0.9799})
    assert [(each.cause, each.seconds) for each in found] == [(name, 0.9799)] * count
    other = next(each for each in ADVISED if each not in (name, "between"))
    for mine, theirs in ((0.5, 0.6), (0.6, 0.5)):
        causes = [each.cause for each in advised(**{name: mine, other: theirs})]
        assert causes == ([name] * count + [other] if mine < theirs else [other] + [name] * count)


def advised(explanation, **options):
    """Return all remedies by cause, where each saves half of the step."""
    ifs = tuple(WhatIf(each, "", 0.5) for each in ADVISED)
    told = remedies(replace(explanation, what_ifs=ifs), GoingOn("B", 0, 9, "a b"), **options)
    return {each.cause: each for each in told}


def commands_of(explanation, **options):
    """Return the commands of `advised`."""
    return {cause: each.command for cause, each in advised(explanation, **options).items()}


def test_a_remedy_names_its_command(explained):
    found = commands_of(explained)
    assert found == {
        "processors": "",
        "equal_ranks": "vp-simulate B cost.rank_slowness=[1,1,1,1] vocab.balance=true",
        "planned_network": "vp-train B --preflight",
        "between": "vp-train B run.profile_steps=[2]",
        "even_rows": "vp-train B vocab.shards=[1,2,3,4]",
        "order": "vp-explain 'a b' --cost explained.yaml && vp-train B cost=explained.yaml",
    }
    own, other = (Alternative(name, "none", time, 0.0) for name, time in (("a", 1.0), ("b", 0.979)))
    found = advised(explained, comparison=Comparison(own, (other,)), cost_file="c.yaml")
    assert found["schedule"].command == "vp-train B schedule=b vocab=none cost=c.yaml"
    assert found["schedule"].seconds == pytest.approx(0.979 * explained.measured_seconds)
    assert found["order"].command == "vp-train B cost=c.yaml"
    near = Comparison(own, (replace(other, seconds=0.9801),))
    assert "schedule" not in commands_of(explained, comparison=near)


@pytest.mark.parametrize(
    ("cpus", "command"), [(None, ""), (4, ""), (3, "parallel.pp=3 parallel.dp=1")]
)
def test_fewer_ranks_are_advised_where_there_are_fewer_processors(explained, cpus, command):
    step = replace(explained.step, cpus=cpus)
    found = advised(replace(explained, step=step))["processors"]
    assert found.command == (f"vp-train B {command}" if command else "")
    assert ("idle machine" in found.words) == (cpus == 4)


def test_the_network_is_timed_between_nodes_or_where_ranks_had_their_processors(explained):
    alone = tuple(replace(row, host="node0") for row in explained.ranks)
    for ranks, share, advised in (
        (explained.ranks, 0.5, True),
        (alone, 1, True),
        (alone, 0.5, False),
    ):
        found = commands_of(replace(explained, ranks=ranks, on_processor=share))
        assert ("planned_network" in found) == advised


def test_slow_ranks_are_planned_with_their_factors(explained):
    slow = [replace(row, slowness=(1.1, 1.234, 1.09, 2.0)[row.rank]) for row in explained.ranks]
    found = advised(replace(explained, ranks=tuple(slow)))["equal_ranks"]
    assert found.command == "vp-simulate B cost.rank_slowness=[1.1,1.23,1,2] vocab.balance=true"
    assert found.words.startswith("rank 3 on node1, rank 1 on node0, rank 0 on node0: ")
    others = [replace(row, slowness=2.0, replica=1) for row in explained.ranks]
    found = advised(replace(explained, ranks=(*others, *others)))["equal_ranks"]
    assert "rank_slowness=[1,1,1,1]" in found.command
    assert found.words.count(" on node") == 4, "no more are named"
    alone = [replace(row, slowness=2.0, host="") for row in explained.ranks]
    step, _ = step_of("1f1b", "none")
    found = advised(replace(explained, step=step, ranks=tuple(alone)))["equal_ranks"]
    assert found.words.startswith("slow ranks: ")
    assert "balance" not in found.command


@pytest.mark.parametrize(
    ("measured", "source", "told"),
    [
        *((1.0, "flops", False), (1.11, "flops", True), (1.09, "flops", False)),
        *((0.9, "flops", True), (0.92, "flops", False)),
        *((5.0, "measured", False), (5.0, "assumed", True)),
    ],
)
def test_pass_times_that_were_assumed_and_are_wrong_are_to_be_measured(
    explained, measured, source, told
):
    kinds = tuple(KindTimes(kind, 3, source, 2.0, 2 * measured) for kind in ("F", "B"))
    kinds += (KindTimes("hop", 99, "assumed", 1.0, 50.0),)
    found = replace(explained, kinds=kinds, what_ifs=())
    assert [each.cause for each in remedies(found, GoingOn("B", 0, 9, "a b"))] == ["passes"] * told
    if told:
        (without,), (written,) = (
            remedies(found, GoingOn("B", 0, 9, "a b"), None, f) for f in (None, "c.yaml")
        )
        assert without.command == (
            "vp-profile B cluster.num_nodes=1 cluster.gpus_per_node=4 --cost measured.yaml"
        )
        assert written.command == "vp-simulate B cost=c.yaml"


@pytest.mark.parametrize(
    ("value", "cpus"),
    [
        *((1, 1), (65535, 65535), (65536, None), (0, None), (-1, None)),
        *(("8", None), (8.0, None), (True, None)),
    ],
)
def test_the_processors_are_a_whole_number_in_the_environment(tmp_path, value, cpus):
    path = tmp_path / "env.json"
    assert trace_module._cpus(path) is None
    path.write_text(json.dumps({"cpus": value}))
    assert trace_module._cpus(path) == cpus
    (tmp_path / "link").symlink_to(path)
    assert trace_module._cpus(tmp_path / "link") is None
    path.write_text(json.dumps([value]))
    assert trace_module._cpus(path) is None


@pytest.mark.parametrize("least", [0, 1])
def test_numbers_of_a_traced_step_have_bounds(least):
    for value in (least, least + 1, 2**31 - 1):
        assert trace_module._count(value, "n", least=least) == value
    for value in (least - 1, 2**31, True, 1.0, "1", None):
        with pytest.raises(ValueError, match=f"^n is .*, not a whole number of at least {least}"):
            trace_module._count(value, "n", least=least)
    for value in (0, 0.0, 1, 1e6):
        assert trace_module._seconds(value) == value
    for value in (-1e-9, 1.1e6, True, "1", None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="is not a time in seconds"):
            trace_module._seconds(value)


def test_a_pass_may_take_no_time_but_not_less():
    record = {"names": "a b", "starts": [0.0, 1.0], "ends": [0.0, 2.0]}
    assert trace_module.intervals(record) == [("a", 0.0, 0.0), ("b", 1.0, 2.0)]
    for change, words in (
        ({"ends": [0.0, 0.9]}, '"b" ends before it starts'),
        ({"names": "a"}, "1 names have 2 starts and 2 ends"),
        ({"starts": [0.0]}, "2 names have 1 starts and 2 ends"),
        ({"ends": [0.0]}, "2 names have 2 starts and 1 ends"),
    ):
        with pytest.raises(ValueError, match=words):
            trace_module.intervals(record | change)


def test_passes_of_a_rank_run_one_after_the_other():
    record = {"names": "a b c", "starts": [0.0, 1.0, 2.0], "ends": [1.0, 2.0, 2.0]}
    assert trace_module.intervals_of_rank(record) == trace_module.intervals(record)
    early = record | {"starts": [0.0, 1.0, 1.9]}
    with pytest.raises(ValueError, match='"c" starts before "b" has ended'):
        trace_module.intervals_of_rank(early)
