"""The best alternative of a plan with, and without, vocabulary parallelism."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from vp_train.planning import alternatives, outlook
from vp_train.planning.alternatives import Alternative, unbeaten, with_it, without_it
from vp_train.planning.choice import Choice
from vp_train.planning.cluster import with_margin
from vp_train.planning.compare import Help, fastest_of, helps_of, proposing, shared_of
from vp_train.planning.degrees import Degrees
from vp_train.planning.report import make_report
from vp_train.planning.search import without_vocabulary
from vp_train.planning.space import space_of
from vp_train.settings import load_config
from vp_train.units import is_faster

GPT = ["model=gpt_4b", "cluster=h100_80g_node", "model.num_layers=8", "num_microbatches=16"]
BARE = "vocab=none"
ALGORITHMS = ("none", "one_barrier")


def found_by(look, config, report):
    return look(config, report, space_of(config).choices, shared_of(config, report))


@pytest.mark.parametrize(
    "words",
    [
        [],
        [BARE],
        ["parallel.pp=4", "parallel.offload_activations=1"],
        ["parallel.pp=1", "vocab=none", "num_microbatches=2"],
        ["parallel.pp=1", "num_microbatches=2"],
        ["cluster.memory_gib=7"],
        ["schedule=auto", "parallel.pp=2", "num_microbatches=4"],
    ],
    ids=" ".join,
)
def test_the_best_alternative_is_as_fast_as_its_plan_and_leaves_what_a_proposal_does(words):
    """It is of its kind, no slower than the ways of the own split, and uses hosts as the plan."""
    config = load_config([*GPT, *words])
    report = make_report(config)
    looks = [(without_it, False)] + [(with_it, True)] * (not report.splits_vocabulary)
    for look, splits in looks:
        found = found_by(look, config, report)
        assert found.splits_vocabulary == splits
        best = found.best
        assert best.choice.splits_vocabulary == splits
        assert found.here is None or best.seconds <= found.here.seconds
        if found.is_here:
            continue
        again = make_report(load_config([*GPT, *words, *best.overrides.split()]))
        assert again.splits_vocabulary == splits
        assert best.seconds == again.step_seconds
        assert best.memory == again.ranks[again.worst].memory.total
        assert not best.overrides or replace(again, cluster=with_margin(again.cluster)).fits
        assert (best.host > 0) <= (config.parallel.offload_activations > 0)


def test_another_split_is_named_only_where_it_is_faster_than_the_own_one():
    config = load_config([*GPT, "parallel.pp=8"])
    report = make_report(config)
    own = without_vocabulary(config, report.degrees).without_vocabulary
    by_split, seen = dict[Degrees, list[Choice]](), Counter()
    for one in space_of(config).choices:
        is_like = one.micro_batch_size == 1 and not (one.offload or one.recompute_where_needed)
        if is_like and not one.splits_vocabulary and one.degrees.tp in (1, 8):
            by_split.setdefault(one.degrees, []).append(one)
    del by_split[report.degrees]
    lean = proposing(config)
    optimizers = tuple(replace(config.optim, name=name) for name in ("adamw", "zero1"))
    for degrees, choices in by_split.items():
        looks = [(choices, optimizers)]
        other = fastest_of(lean, looks, 10**6, math.inf, shared_of(config, report))
        found = without_it(config, report, choices, shared_of(config, report))
        assert found.here.seconds == own.seconds
        is_faster = other.seconds < own.seconds
        assert found.is_here is not is_faster
        assert found.best.choice.degrees == (degrees if is_faster else report.degrees)
        fastest = min(other.seconds, own.seconds)
        assert found.best.seconds == pytest.approx(fastest, rel=1e-3)
        seen[is_faster] += 1
    assert len(seen) == 2, seen


def test_a_plan_is_its_own_best_unless_another_way_is_faster_by_a_percent(monkeypatch):
    config = load_config([*GPT, BARE, "parallel.pp=1", "num_microbatches=2"])
    report = make_report(config)
    choice = found_by(without_it, config, report).best.choice
    for part, is_itself in ((0.992, True), (0.988, False), (1.1, True)):
        other = Help("a=1", part * report.step_seconds, 1.0, choice=choice)
        monkeypatch.setattr(alternatives, "_best", lambda *_, other=other: other)
        best = found_by(without_it, config, report).best
        assert (best.overrides == "") is is_itself
        assert best.seconds == (report.step_seconds if is_itself else other.seconds)


def test_what_needs_more_host_memory_is_the_best_only_if_it_is_faster_by_a_percent():
    config = load_config(GPT)
    choice = found_by(without_it, config, make_report(config)).best.choice
    lean = Help("a=1", 1.0, 1.0, choice=choice)
    for seconds, wins in ((0.995, False), (0.992, False), (0.988, True), (1.1, False)):
        for host, least in ((100.0, 0.0), (100.0, 90.0), (100.0, 99.9)):
            known = replace(lean, host=least)
            other = replace(lean, overrides="b=2", seconds=seconds, host=host)
            is_best = wins or (seconds < 1 and least == 99.9)
            for one, more in ((known, other), (other, known)):
                best = Alternative(False, one).beside([more]).best
                assert (best == other) is is_best
    itself = replace(lean, overrides="", host=100.0)
    for seconds in (0.995, 1.005):
        other = replace(lean, seconds=seconds)
        assert Alternative(False, itself).beside([other]).best == itself, "no proposal"


def test_a_pair_that_the_best_beats_in_time_and_memory_is_not_proposed():
    config = load_config(GPT)
    report = make_report(config)
    assert report.fits
    best = Help("a=1", 1.0, 10.0, 5.0)
    other = Alternative(False, best)
    for seconds, memory, host, is_pair, stays in (
        (1.02, 10.0, 5.0, True, False),
        (1.02, 10.0, 5.0, False, True),
        (1.005, 11.0, 6.0, True, True),
        (0.9, 11.0, 6.0, True, True),
        (1.02, 9.9, 6.0, True, True),
        (1.02, 11.0, 4.9, True, True),
    ):
        pair = Help("b=1 c=2", seconds, memory, host, is_pair=is_pair)
        assert unbeaten([best, pair], [Alternative(True, None), other], report) == (
            [best, pair] if stays else [best]
        )
        tight = load_config([*GPT, "cluster.memory_gib=4"])
        assert unbeaten([pair], [other], make_report(tight)) == [pair], "it lets a plan fit"


@pytest.mark.parametrize("gib", [80, 1])
def test_a_reason_is_given_only_where_nothing_fits_on_the_split(monkeypatch, gib):
    """Also where some of it was refused before something that fits was found."""
    monkeypatch.setattr(alternatives, "fastest_of", lambda *_: None)
    config = load_config([*GPT, "parallel.pp=8", f"cluster.memory_gib={gib}", "num_microbatches=8"])
    real, refused = (
        alternatives.without_vocabulary,
        alternatives.without_vocabulary(
            replace(config, cluster=replace(config.cluster, memory_gib=1)),
            Degrees(1, 8, 1),
        ),
    )
    leanest = refused.leanest
    assert leanest is not None

    def some_refused(*arguments):
        return replace(real(*arguments), leanest=leanest)

    monkeypatch.setattr(alternatives, "without_vocabulary", some_refused)
    found = found_by(without_it, config, make_report(config))
    assert found.reason == ("" if found.here is not None else leanest.reason)
    assert (found.here is None) is (gib == 1)


def test_no_proposal_of_the_same_kind_is_faster_than_the_best_alternative():
    """One of the other kind is not the best, however fast, nor is another batch."""
    config = load_config([*GPT, BARE])
    report = make_report(config)
    helps = helps_of(config, report)
    for look, splits in ((without_it, False), (with_it, True)):
        found = found_by(look, config, report)
        best = found.beside(helps).best
        same = [one for one in helps if one.choice.splits_vocabulary is splits]
        for one in same:
            assert one.seconds >= best.seconds or one.host > best.host
            assert not is_faster(one.seconds, best.seconds)
        assert best.choice.splits_vocabulary is splits
        own = found.best.choice
        kinds = [replace(own, vocab=vocab, degrees=Degrees(1, 8, 1)) for vocab in ALGORITHMS]
        for choice in (*kinds, None):
            fast = Help("a=1", 0.5 * found.best.seconds, 1.0, choice=choice)
            is_same = choice is not None and choice.splits_vocabulary is splits
            assert found.beside([fast]).best == (fast if is_same else found.best)
            assert Alternative(splits, None).beside([fast]).best == (fast if is_same else None)


def test_what_does_not_fit_as_it_is_planned_gives_way_to_the_next(monkeypatch):
    config = load_config(GPT)
    report = make_report(config)
    first = found_by(without_it, config, report).best
    real, refused = alternatives.planned_help, []

    def planned(config, estimate, **options):
        if not refused:
            refused.append(estimate)
            return None
        return real(config, estimate, **options)

    monkeypatch.setattr(alternatives, "planned_help", planned)
    second = found_by(without_it, config, report).best
    assert refused[0].choice.degrees == first.choice.degrees
    assert second.choice != first.choice
    assert second.seconds >= 0.99 * first.seconds


def test_the_best_of_a_long_step_is_an_estimate(monkeypatch):
    monkeypatch.setattr(alternatives, "MOST_AT_ONCE", 0)
    monkeypatch.setattr(outlook, "MOST_AT_ONCE", 0)
    config = load_config(GPT)
    report = make_report(config)
    best = found_by(without_it, config, report).best
    assert not best.is_planned
    again = make_report(load_config([*GPT, *best.overrides.split()]))
    assert best.seconds == pytest.approx(again.step_seconds, rel=0.02)


def test_json_has_both_ways_with_their_splits():
    config = load_config([*GPT, "parallel.pp=8"])
    report = make_report(config)
    found = found_by(without_it, config, report)
    record = found.record(report.num_tokens)
    for name, one in (("best", found.best), ("of_this_split", found.here)):
        assert record[name]["overrides"] == one.overrides
        assert record[name]["step_seconds"] == one.seconds
        assert record[name]["tokens_per_second"] == report.num_tokens / one.seconds
        degrees = one.choice.degrees
        split = [record[name][axis] for axis in ("dp", "pp", "tp")]
        assert split == [degrees.dp, degrees.pp, degrees.tp]
        assert record[name]["planned"] is one.is_planned
    nothing = Alternative(False, None, reason="too large").record(1)
    assert (nothing["best"], nothing["of_this_split"], nothing["reason"]) == (
        None,
        None,
        "too large",
    )
