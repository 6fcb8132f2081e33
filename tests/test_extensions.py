"""A new vocabulary algorithm or schedule is one entry of a table, as CONTRIBUTING.md says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedules.check import check_program, check_schedule
from schedules.generators import GENERATORS, BaseSchedule, searched_schedules
from schedules.ir import Kind, Pass
from schedules.lower import lower
from schedules.simulate import simulate
from schedules.vocab import (
    VOCAB_ALGORITHMS,
    Barrier,
    End,
    Payload,
    Transfer,
    VocabAlgorithm,
    searched_algorithms,
)
from tests.pipeline.compare import assert_all_close
from tests.pipeline.equivalence import compare_locally, config_of
from vp_train.commands import plan as plan_command
from vp_train.commands import simulate as simulate_command
from vp_train.config import ConfigError, VocabConfig
from vp_train.failures import EXIT_CONFIG
from vp_train.planning.found import Limits
from vp_train.planning.plan import make_plan
from vp_train.planning.report import make_report
from vp_train.planning.search import search

_NAIVE = {barrier.name: barrier for barrier in VOCAB_ALGORITHMS["naive"].barriers}

# Sums after the maximum, as `naive`; dx in S, as `one_barrier`: three collectives in a chain.
CHAINED = VocabAlgorithm(
    "chained",
    True,
    1,
    (
        _NAIVE["CE"],
        _NAIVE["C0"],
        _NAIVE["C1"],
        _NAIVE["C1b"],
        Barrier(
            "C1c", End.OUTPUT, Transfer.REDUCE, Payload.INPUT_GRADIENT, (Kind.B,), continues="C1b"
        ),
        _NAIVE["CG"],
    ),
    Kind.S,
    searched=True,
)


def last_first(problem):
    """GPipe whose backward begins with the microbatch that came last."""
    return tuple(
        tuple(
            Pass(stage, kind, microbatch)
            for kind in problem.stage_kinds
            for stage in problem.layout.stages_of(rank)[:: 1 if kind is Kind.F else -1]
            for microbatch in range(problem.num_microbatches)[:: 1 if kind is Kind.F else -1]
        )
        for rank in range(problem.layout.num_ranks)
    )


@pytest.fixture
def registered(monkeypatch):
    """The two entries, in the tables that CONTRIBUTING.md names."""
    monkeypatch.setitem(VOCAB_ALGORITHMS, CHAINED.name, CHAINED)
    monkeypatch.setitem(GENERATORS, "last_first", BaseSchedule(last_first))


@pytest.mark.parametrize(
    ("schedule", "algorithm"),
    [
        ("last_first", "one_barrier"),
        ("last_first", "chained"),
        ("1f1b", "chained"),
        ("zb_v", "chained"),
    ],
)
def test_it_is_planned_checked_simulated_lowered_and_trains_as_one_process(
    registered, schedule, algorithm
):
    config = config_of(3, 4, 101, schedule=schedule, vocab=VocabConfig(algorithm), num_stages=6)
    plan = make_plan(config, 3)
    check_schedule(plan.schedule, plan.problem)
    program = lower(plan.schedule, plan.problem, plan.cost)
    check_program(program, plan.problem)
    assert simulate(plan.schedule, plan.problem, plan.cost).makespan == pytest.approx(
        plan.timeline.makespan
    )
    assert_all_close(compare_locally(config, plan), 1e-9, schedule, algorithm)


def without(rank, token):
    """Leave out a pass."""
    return tuple(item for item in rank if str(item) != token)


def swapped(rank, first, second):
    """Let two passes change places."""
    places = {first: second, second: first}
    return tuple(Pass.parse(places.get(str(item), str(item))) for item in rank)


MISTAKES = {
    "missing": (lambda rank: without(rank, "0B3"), "rank 0 never runs 0B3 (1 pass missing)"),
    "misplaced": (
        lambda rank: (*rank, Pass(1, Kind.F, 0)),
        "rank 0 runs 1F0, which is not among its passes; its passes are F, B of stage 0, "
        "microbatches 0 to 3",
    ),
    "repeated": (lambda rank: (*rank, rank[-1]), "rank 0 runs 0B0 2 times"),
    "blocked": (lambda rank: swapped(rank, "0F0", "0B3"), "deadlock: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("main", [simulate_command.main, plan_command.main])
def test_a_mistake_of_a_generator_ends_in_one_line(monkeypatch, capsys, mistake, main):
    edit, defect = MISTAKES[mistake]

    def wrong(problem):
        first, *others = last_first(problem)
        return (edit(first), *others)

    monkeypatch.setitem(GENERATORS, "wrong", BaseSchedule(wrong))
    arguments = ["schedule.name=wrong", "parallel.pp=2", "parallel.dp=1", "num_microbatches=4"]
    arguments += ["cluster=laptop", "cluster.gpus_per_node=2"]
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == EXIT_CONFIG
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"schedule wrong: {defect}" in said
    assert "test_extensions.wrong returns" in said
    with pytest.raises(ConfigError, match="schedule wrong: "):  # as vp-train
        make_plan(config_of(2, 4, 101, schedule="wrong", num_stages=2), 2)


def test_a_mistake_is_named_by_the_searches_too(monkeypatch):
    def wrong(problem):
        first, *others = last_first(problem)
        return (without(first, "0F0"), *others)

    monkeypatch.setitem(GENERATORS, "wrong", BaseSchedule(wrong, searched=True))
    assert "wrong" in searched_schedules()
    config = config_of(2, 2, 101, schedule="auto", num_stages=2)
    table = dict(GENERATORS)
    try:
        for name in table.keys() - {"wrong"}:  # `auto` needs no other start where one is optimal
            del GENERATORS[name]
        with pytest.raises(ConfigError, match="schedule wrong: rank 0 never runs 0F0"):
            make_plan(config, 2)
    finally:  # in the same order
        GENERATORS.clear()
        GENERATORS.update(table)
    config = replace(config, cluster=replace(config.cluster, gpus_per_node=2))
    with pytest.raises(ConfigError, match="schedule wrong: rank 0 never runs 0F0"):
        search(config, Limits(), lambda: True, lambda line: None)


def test_it_is_in_the_report_of_a_cluster_and_in_the_search(registered):
    config = config_of(2, 4, 101, schedule="last_first", vocab=VocabConfig("chained"), num_stages=2)
    config = replace(config, cluster=replace(config.cluster, gpus_per_node=2))
    report = make_report(config)
    assert report.step_seconds > 0
    assert searched_algorithms()[0] == "chained"


def test_an_algorithm_says_what_its_passes_multiply(registered):
    products = {
        name: (each.products(Kind.S), each.products(Kind.T))
        for name, each in VOCAB_ALGORITHMS.items()
    }
    known = {"none": (2, 1), "naive": (1, 2), "two_barrier": (1, 2), "one_barrier": (2, 1)}
    assert {name: products[name] for name in known} == known
    assert all(sum(pair) == 3 for pair in products.values())


def test_a_barrier_that_delivers_to_the_root_alone_lets_no_shard_wait():
    with pytest.raises(ValueError, match="delivers to the root alone, but T waits for it on every"):
        Barrier(
            "C1b",
            End.OUTPUT,
            Transfer.REDUCE,
            Payload.INPUT_GRADIENT,
            (Kind.B, Kind.T),
            continues="C1",
        )
