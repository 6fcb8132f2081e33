"""What a plan is compared with: another contention, and what would help."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from schedules.render import duration
from tests.searched import shown_lines
from vp_train.commands.plan_words import help_lines
from vp_train.planning import compare, outlook
from vp_train.planning import shared as shared_module
from vp_train.planning.alternatives import without_it
from vp_train.planning.cluster import with_margin
from vp_train.planning.compare import (
    Way,
    crossovers_of,
    for_another_plan,
    helps_of,
    larger_batch_of,
    pipeline_way,
    rivals_of,
    shared_of,
)
from vp_train.planning.found import Limits
from vp_train.planning.fsdp import ON_HOSTS, Means
from vp_train.planning.kept import Kept
from vp_train.planning.report import make_report
from vp_train.planning.search import search
from vp_train.planning.short import short_step
from vp_train.planning.space import space_of
from vp_train.settings import load_config
from vp_train.units import is_as_fast

GPT = ["model=gpt_4b", "cluster=h100_80g_node", "model.num_layers=8", "num_microbatches=8"]


NO_HOSTS = "cluster.host_memory_gib=0"
LITTLE = ["cluster.memory_gib=7"]  # two proposals would fit into all of it, and one into 0.95


def way(words, *, base, slope=0.0, factor=1.0, is_slow=False):
    """Return a way that takes `base` seconds, and `slope` times the contention longer."""
    asked = []

    def at(part):
        asked.append(part)
        return base * (1 + slope * part)

    return Way(words, at(0.1), at, is_slow=is_slow, factor=factor), asked


def test_the_contention_is_named_where_none_or_twice_as_much_lets_another_win():
    config = load_config([*GPT, "cluster.contention=0.1"])
    plain, _ = way("the first", base=10.0)
    for base, slope, factor, turns in (
        (9.5, 1.0, 1.0, ["with 0 FSDP is 5.0% faster than the first (9.50 s against 10.00 s)"]),
        (8.7, 1.0, 1.0, ["with 0.2 the first is 4.2% faster than FSDP (10.00 s against 10.44 s)"]),
        (9.5, 1.0, 1.1, []),  # it counts as slower even then
        (10.1, 1.0, 1.0, []),
        (9.5, 0.0, 1.0, []),
    ):
        other, _ = way("FSDP", base=base, slope=slope, factor=factor)
        words = crossovers_of(config, plain, [None, other]).words
        assert bool(words) is bool(turns)
        assert all(turn in words for turn in turns)
        assert words.startswith("cluster.contention=0.1, ") is bool(turns)
        record = crossovers_of(config, plain, [None, other]).record()
        assert (record is None) is (not turns)
        for turn in [] if record is None else record["crossovers"]:
            assert (record["setting"], record["value"]) == ("cluster.contention", 0.1)
            figures = [turn["winner_step_seconds"], turn["loser_step_seconds"]]
            assert f"with {turn['value']:g} {turn['winner']} is " in words
            assert f" than {turn['loser']} ({' against '.join(map(duration, figures))})" in words
    slow, asked = way("slow", base=20.0, slope=1.0, is_slow=True)
    asked.clear()
    assert crossovers_of(config, plain, [slow]).words == ""
    assert asked == [], "it cannot turn even if all of it were layers"
    slow, _ = way("the first", base=9.6, slope=0.5, is_slow=True)
    other, _ = way("FSDP", base=9.5, slope=1.0)
    assert "with 0 FSDP is 1.0% faster" in crossovers_of(config, slow, [other]).words
    none = load_config([*GPT, "cluster.contention=0"])
    assert crossovers_of(none, plain, [other]).words == ""
    typed = replace(config, cost=replace(config.cost, contention=0.1))
    assert crossovers_of(typed, plain, [other]).words.startswith("cost.contention=0.1, ")


@pytest.mark.parametrize("factor", [1.0, 1.005])
def test_another_contention_turns_what_wins_by_its_seconds_and_as_they_count(factor):
    """The winner may be as fast now, but what is as fast then wins nothing."""
    config = load_config([*GPT, "cluster.contention=0.1"])
    chosen, told = random.Random(1), Counter()
    for _ in range(2000):
        (first, _), (other, _) = (
            way(
                words,
                base=chosen.uniform(9.5, 10.5),
                slope=chosen.choice((0.0, chosen.uniform(0.0, 0.8))),
                factor=chosen.choice((1.0, factor)),
            )
            for words in ("the first", "FSDP")
        )
        is_tie = is_as_fast(first.seconds, other.seconds)
        words = crossovers_of(config, first, [other]).words
        for part in (0.0, 0.2):
            pairs = [(first.at(at), other.at(at)) for at in (0.1, part)]
            won, wins = (ours < theirs for ours, theirs in pairs)
            counts = [ours * first.factor < theirs * other.factor for ours, theirs in pairs]
            is_clear = counts == [won, wins] and not is_as_fast(*pairs[1])
            turns = is_clear and won is not wins
            names = ("the first", "FSDP") if wins else ("FSDP", "the first")
            assert (f"with {part:g} " in words) is turns
            assert not turns or re.search(rf"with {part:g} {names[0]} is .*than {names[1]}", words)
            told[turns, is_tie] += 1
    assert len(told) == 4
    assert min(told.values()) > 50


@pytest.mark.parametrize("setting", ["cluster.contention", "cost.contention"])
@pytest.mark.parametrize("vocab", ["one_barrier", "none"])
def test_a_pipeline_beside_a_sharded_vocabulary_takes_what_a_plan_with_that_contention_does(
    setting, vocab
):
    words = [*GPT, f"vocab={vocab}"]
    now, then = (load_config([*words, f"{setting}={part}"]) for part in (0.1, 0.3))
    seconds = make_report(now).step_seconds
    found = pipeline_way("it", now, seconds)
    assert found.at(0.3) == pytest.approx(make_report(then).step_seconds, rel=1e-12)
    assert (found.at(0.3) > seconds) is found.is_slow is (vocab == "one_barrier")
    other = pipeline_way("another order", now, 0.9 * seconds)
    assert other.at(0.3) - 0.9 * seconds == pytest.approx(found.at(0.3) - seconds)


@pytest.mark.parametrize(("vocab", "is_known"), [("none", True), ("one_barrier", False)])
def test_nothing_says_what_schedule_auto_takes_with_another_contention(vocab, is_known):
    config = load_config([*GPT, "schedule=auto", f"vocab={vocab}"])
    assert pipeline_way("it", config, 2.0).at(0.3) == (2.0 if is_known else None)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_of_a_long_step_a_shorter_one_tells_what_another_contention_does(schedule, monkeypatch):
    typed = [*GPT, "parallel.pp=4", f"schedule={schedule}", "num_microbatches=96"]
    now, then = (load_config([*typed, f"cluster.contention={part}"]) for part in (0.1, 0.3))
    seconds = make_report(now).step_seconds
    monkeypatch.setattr(compare, "MOST_AT_ONCE", 128)
    monkeypatch.setattr(compare, "MOST_PLANNED", 512)
    assert compare._shortened(now).num_microbatches < 96
    found = pipeline_way("it", now, seconds).at(0.3)
    assert found == pytest.approx(make_report(then).step_seconds, rel=5e-4)
    assert found > 1.05 * seconds


@pytest.mark.parametrize(
    ("part", "winner"), [(0.5, "the best without"), (1.0, "the best with vocabulary")]
)
def test_a_plan_of_a_search_leaves_its_margin_free_with_another_contention_too(part, winner):
    kept = {"parallel.pp": 4, "parallel.tp": 1, "schedule.name": "1f1b", "micro_batch_size": 1}
    kept |= {"optim.name": "adamw", "parallel.recompute": "none"}
    kept |= {"parallel.offload_activations": 0.0}
    typed = ["cluster.gpus_per_node=4", "parallel.pp=4", "num_microbatches=16"]
    config = load_config([*GPT, *typed, f"cluster.contention={part}"])
    result = search(config, Limits(top=1), lambda: True, str, space_of(config, Kept(kept)))
    needs = result.with_vocabulary.memory  # the kind that another contention changes
    for gib, margin, is_told in (
        (needs / 0.95 * 1.001, 0.05, True),
        (needs / 0.95 * 0.999, 0.05, False),
        (needs / 0.95 * 0.999, 0.0, True),
        (needs * 0.999, 0.0, False),
    ):
        small = replace(config, cluster=replace(config.cluster, memory_gib=gib / 2**30))
        lines = shown_lines(small, Limits(margin=margin), result)
        found = [line for line in lines if line.startswith("decides: ")]
        assert [winner in line for line in found] == [True] * is_told
    # What schedule=auto has ordered changes as its base order does.
    best = tuple(replace(one, choice=replace(one.choice, cap_gib=1.0)) for one in result.best)
    candidate = result.with_vocabulary.candidate
    candidate = replace(candidate, choice=replace(candidate.choice, cap_gib=1.0))
    other = replace(result.with_vocabulary, candidate=candidate)
    ordered = replace(result, best=best, with_vocabulary=other)
    lines, others = (
        [line for line in shown_lines(config, Limits(), one) if line.startswith("decides: ")]
        for one in (result, ordered)
    )
    assert lines == others != []


def test_fsdp_leaves_the_margin_of_a_plan_free_and_has_its_means():
    config = load_config(GPT)
    report = make_report(config)
    whole, rest = (rivals_of(config, report, margin) for margin in (0.0, 0.25))
    assert (whole.rival.limit, rest.rival.limit) == (75 * 2**30, 0.75 * 75 * 2**30)
    assert whole.rival == whole.without_hosts
    used = set()
    for part, offload in itertools.product((0, 1), ("false", "true")):
        words = [f"parallel.offload_activations={part}", f"optim.offload={offload}"]
        typed = [*GPT, "cluster.memory_gib=5", "num_microbatches=64", "optim.name=zero1", *words]
        config = load_config(typed)
        report = make_report(config)
        found = rivals_of(config, report)
        used.add((found.rival.num_offloaded > 0, found.rival.offloads_optimizer))
        assert found.means == Means(part > 0, offload == "true")
        assert found.rival.num_offloaded == 0 or part
        assert offload == "true" or not found.rival.offloads_optimizer
        kept = Kept.of(config, [word.partition("=")[0] for word in words])
        assert rivals_of(config, report, kept=kept).means == found.means
        assert rivals_of(config, report, kept=Kept()).means == ON_HOSTS
    assert len(used) > 2


def test_what_helps_was_planned_and_two_settings_are_named_only_if_they_gain_more():
    hosts, kinds = [], set()
    least = ["cluster.memory_gib=5"]
    for words in ([], LITTLE, least, [*least, "cluster.host_memory_gib=47"]):
        config = load_config([*GPT, *words])
        report = make_report(config)
        assert report.fits is (not words)
        before = report.step_seconds if report.fits else float("inf")
        helps = helps_of(config, report)
        assert helps
        pairs = [one.is_pair for one in helps]
        assert pairs.count(False) <= (1 if report.fits else 2), "one of each look at one setting"
        assert not report.fits or pairs == sorted(pairs)
        kinds.update(pairs)
        for one in helps:
            again = make_report(load_config([*GPT, *words, *one.overrides.split()]))
            lean = replace(again, cluster=with_margin(again.cluster))
            assert lean.fits, "a proposal leaves free what a search does, also of the hosts"
            assert again.step_seconds == one.seconds < 0.99 * before
            assert again.host.total == one.host
            before = again.step_seconds
            hosts.append(one.host)
    assert any(hosts)
    assert kinds == {False, True}
    config = load_config(GPT)
    report = make_report(config)
    larger = larger_batch_of(config, report)
    again = make_report(load_config([*GPT, *larger.overrides.split()]))
    assert again.num_tokens == 2 * report.num_tokens
    assert again.num_tokens / again.step_seconds > 1.01 * report.num_tokens / report.step_seconds
    for part, fits in ((0.97, False), (0.94, True)):
        gib = larger.memory / part / 2**30
        small = replace(config, cluster=replace(config.cluster, memory_gib=gib))
        assert larger_batch_of(small, report) == (larger if fits else None), "it leaves the margin"
    assert larger.is_planned
    solved = replace(config, schedule=replace(config.schedule, name="auto"))
    assert larger_batch_of(solved, report) is None


@pytest.mark.parametrize(
    ("cap", "part"), [("schedule.cap_microbatches=2", 2.0), ("schedule.cap_gib=30", 0.98)]
)
def test_another_cap_helps_an_order_that_leaves_memory_or_needs_too_much(quick_search, cap, part):
    """It is what each rank has beside its state, and what is left free by every proposal."""
    words = [*GPT, "schedule=auto", "parallel.pp=4", "num_microbatches=32", cap]
    report = make_report(load_config(words))
    gib = part * report.ranks[report.worst].memory.total / 2**30
    words.append(f"cluster.memory_gib={gib}")
    config = load_config(words)
    (found,) = helps_of(config, make_report(config))
    better = load_config([*words, *found.overrides.split()])
    again = make_report(better)
    memory = again.ranks[again.worst].memory.total
    assert (again.step_seconds, memory) == (found.seconds, found.memory)
    assert memory <= 0.95 * gib * 2**30
    assert part < 1 or again.step_seconds < 0.99 * report.step_seconds
    assert helps_of(better, again) == []


def test_what_lets_a_plan_fit_without_host_memory_comes_before_what_needs_it():
    """It is what is proposed where hosts have no memory, and others follow if they are faster."""
    for gib, fits_without in ((5, False), (6.8, True)):
        words = [*GPT[:-1], "num_microbatches=32", f"cluster.memory_gib={gib}"]
        found, alone = (
            helps_of(config, make_report(config))
            for config in (load_config([*words, *more]) for more in ([], [NO_HOSTS]))
        )
        assert bool(alone) is fits_without
        assert found[: len(alone)] == alone
        assert all(one.host == 0 for one in alone)
        assert any(one.host > 0 for one in found)
        seconds = [one.seconds for one in found]
        assert seconds == sorted(seconds, reverse=True)
    config = load_config([*words, "parallel.offload_activations=1", "parallel.pp=4"])
    report = make_report(config)
    assert not report.fits
    assert all(one.host > 0 for one in helps_of(config, report)), "the plan asks for hosts"


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["vocab=one_barrier"], "memory_gib"),
        (["parallel.offload_activations=1", "parallel.pp=4"], "host_memory_gib"),
    ],
)
def test_another_plan_may_use_what_a_proposal_may_where_the_plan_itself_uses_no_more(
    words, setting
):
    config = load_config([*GPT, *words])
    report = make_report(config)
    needs = {"memory_gib": report.ranks[report.worst].memory.total}
    needs["host_memory_gib"] = report.host.total
    for part, is_lean in ((0.94, True), (0.96, False), (0.999, False), (1.1, False)):
        cluster = replace(config.cluster, **{setting: needs[setting] / part / 2**30})
        typed = replace(config, cluster=cluster)
        rest = for_another_plan(typed, make_report(typed))
        assert rest == replace(typed, cluster=with_margin(cluster) if is_lean else cluster)


def test_help_does_not_look_for_the_stages_that_recompute_beside_offloading(monkeypatch):
    seen = []

    def fastest(config, rounds, *rest):
        seen.extend(choice for choices, _ in rounds for choice in choices)

    monkeypatch.setattr(compare, "fastest_of", fastest)
    config = load_config([*GPT, "parallel.pp=4", "parallel.offload_activations=1"])
    helps_of(config, make_report(config))
    assert any(choice.recompute != "none" for choice in seen if choice.offload)
    assert not any(choice.recompute_where_needed for choice in seen if choice.offload)


def test_of_a_long_step_short_ones_tell_what_a_batch_twice_as_large_gains(monkeypatch):
    config = load_config([*GPT, "parallel.pp=8", "parallel.dp=1", "num_microbatches=32"])
    report = make_report(config)
    planned = larger_batch_of(config, report)
    monkeypatch.setattr(outlook, "MOST_AT_ONCE", 0)
    assert larger_batch_of(config, report) == planned, "short steps promise it"
    monkeypatch.setattr(outlook, "MOST_PLANNED", 0)
    found = larger_batch_of(config, report)
    assert (planned.is_planned, found.is_planned) == (True, False)
    assert found.overrides == planned.overrides == "num_microbatches=64"
    assert found.seconds == pytest.approx(planned.seconds, rel=0.002)
    assert found.memory == pytest.approx(planned.memory, rel=0.05)
    assert help_lines(report, [], found)[0].count("~") == 2
    assert "~" not in help_lines(report, [], planned)[0]


@pytest.mark.parametrize(
    ("part", "recompute"), [(0.5, "none"), (0.94, "[full,7*none]"), (0.97, "none")]
)
def test_searches_that_share_what_they_know_simulate_no_step_twice(part, recompute, monkeypatch):
    """Their limits of memory are equal or not: `part` is what the plan uses."""
    simulated = []

    def counted(draft, name):
        simulated.append((name, draft.problem, draft.cost))
        return short_step(draft, name)

    monkeypatch.setattr(shared_module, "short_step", counted)
    typed = ["vocab=none", "schedule=zb_v", "parallel.pp=4", "parallel.dp=2"]
    if recompute != "none":
        typed.append(f"parallel.recompute_per_stage={recompute}")
    config = load_config([*GPT, *typed])
    report = make_report(config)
    gib = report.ranks[report.worst].memory.total / part / 2**30
    config = replace(config, cluster=replace(config.cluster, memory_gib=gib))
    report, rest = make_report(config), for_another_plan(config, make_report(config))
    assert (rest == config) is (part > 0.95)
    shared = shared_of(config, report)
    without_it(config, report, space_of(config).choices, shared)
    num_before = len(simulated)
    found = helps_of(config, report, shared=shared)
    assert 0 < num_before < len(simulated)
    assert len(set(map(repr, simulated))) == len(simulated)
    assert found == helps_of(config, report), "as if it knew nothing"
