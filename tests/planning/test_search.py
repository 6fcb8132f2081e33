"""The search finds what simulating everything finds, and says why the rest is not possible."""

from __future__ import annotations

import itertools

import pytest

from schedules import generators
from vp_train.config import ConfigError
from vp_train.planning.report import make_report
from vp_train.planning.search import choices, search
from vp_train.settings import load_config

SMALL = ["model=nano", "cluster.gpus_per_node=4", "num_microbatches=4"]
GIB = 2**30


def config_of(*overrides):
    return load_config([*SMALL, *overrides])


def searched(config, top=1, in_time=lambda: True):
    return search(config, top, in_time, lambda words: None)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Generate schedules with little effort, in the search and in what it is compared with."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(generators, "_EFFORT", 5_000)
        yield


@pytest.fixture(scope="module")
def everything():
    """Return every choice of a small space, simulated: (choice, report)."""
    config = config_of()
    found = []
    for choice in choices(config):
        try:
            found.append((choice, make_report(choice.applied(config))))
        except ConfigError:
            continue
    return found


def total(report):
    return report.ranks[report.worst].memory.total


@pytest.mark.parametrize("part", [1.0, 0.5, 0.1], ids=lambda part: f"{part:.0%} fit")
@pytest.mark.parametrize("top", [1, 4])
def test_the_best_is_the_best_of_all(everything, part, top):
    sizes = sorted(total(report) for _, report in everything)
    limit = sizes[int(part * (len(sizes) - 1))] / GIB * (1 + 1e-9)
    result = searched(config_of(f"cluster.memory_gib={limit!r}"), top)
    fitting = [report for _, report in everything if total(report) <= limit * GIB]
    assert len(everything) > 100
    expected = sorted(report.step_seconds for report in fitting)[:top]
    assert [found.report.step_seconds for found in result.best] == pytest.approx(expected, rel=1e-3)
    assert result.open_choices == 0
    assert result.num_simulated < len(everything)


def test_refused_for_memory_is_what_does_not_fit(everything):
    sizes = sorted(total(report) for _, report in everything)
    limit = sizes[len(sizes) // 3] / GIB * (1 + 1e-9)
    refused = {
        refusal.choice
        for refusal in searched(config_of(f"cluster.memory_gib={limit!r}")).refused
        if refusal.excess is not None
    }
    assert refused
    assert refused <= {choice for choice, report in everything if total(report) > limit * GIB}


def test_every_choice_uses_all_gpus_for_the_whole_batch():
    config = config_of(
        "cluster.num_nodes=2", "num_microbatches=8", "micro_batch_size=2", "parallel.dp=2"
    )
    found = list(choices(config))
    assert len(set(found)) == len(found)
    for choice in found:
        assert choice.degrees.num_ranks == 8
        assert choice.degrees.tp <= 4
        assert choice.degrees.dp * choice.num_microbatches * choice.micro_batch_size == 32
    degrees = {choice.degrees for choice in found}
    assert {(split.dp, split.pp, split.tp) for split in degrees} == {
        (dp, pp, tp)
        for dp, pp, tp in itertools.product((1, 2, 4, 8), repeat=3)
        if dp * pp * tp == 8 and tp <= 4 and pp <= 4
    }


def test_nothing_fits_and_by_how_much():
    result = searched(config_of("cluster.memory_gib=0.002"))
    assert not result.best
    assert result.num_simulated == result.open_choices == 0
    reasons = [refusal.reason for refusal in result.refused if refusal.excess is not None]
    assert reasons
    assert all("more than 0.002 GiB" in reason and "needs at least" in reason for reason in reasons)
    assert any(
        "model.num_query_groups=2 does not split over parallel.tp=4" in refusal.reason
        for refusal in result.refused
    )


class Clock:
    """A clock that answers `count` times that there is time left."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        return self.left >= 0


@pytest.mark.parametrize("part", [0.0, 0.3, 0.8], ids=lambda part: f"{part:.0%} weighed")
def test_weighing_counts_into_the_time_and_one_is_simulated_all_the_same(part):
    config = config_of()
    every = list(choices(config))
    result = searched(config, 3, Clock(int(part * len(every))))
    assert result.num_choices == len(every)
    assert result.num_simulated == len(result.best) == 1
    assert result.open_choices + result.num_simulated + len(result.refused) == len(every)
    assert (len(result.refused) > 0) == (part > 0)


def test_a_search_that_was_in_time_finds_the_same_whatever_it_weighs_first(monkeypatch):
    best = [found.choice for found in searched(config_of(), 5).best]
    monkeypatch.setattr("vp_train.planning.search.random.Random.shuffle", lambda self, values: None)
    assert [found.choice for found in searched(config_of(), 5).best] == best


def test_a_batch_that_no_split_divides():
    with pytest.raises(
        ConfigError, match=r"no split of 5 GPUs has whole microbatches.*use another batch"
    ):
        searched(
            config_of(
                "cluster.num_nodes=5",
                "cluster.gpus_per_node=1",
                "model.num_layers=3",
                "num_microbatches=3",
            )
        )


def test_every_simulated_choice_is_found_displaced_or_refused(everything):
    """With room for all choices none is displaced; else the displaced are slower than the found."""
    sizes = sorted(total(report) for _, report in everything)
    limit = sizes[len(sizes) // 2] / GIB * (1 + 1e-9)
    config = config_of(f"cluster.memory_gib={limit!r}")
    every = list(choices(config))
    result = searched(config, len(every))
    found, refused = (
        {plan.choice for plan in result.best},
        {refusal.choice for refusal in result.refused},
    )
    assert len(found) == len(result.best)
    assert len(refused) == len(result.refused)
    assert not found & refused
    assert found | refused == set(every)
    assert found == {choice for choice, report in everything if total(report) <= limit * GIB}
    seconds = [float(f"{plan.report.step_seconds:.4g}") for plan in result.best]
    assert seconds == sorted(seconds)
    simulated_in_vain = sum(
        refusal.excess is not None and "needs at least" not in refusal.reason
        for refusal in result.refused
    )
    assert result.num_simulated == len(found) + simulated_in_vain
    few = searched(config, 3)
    assert [plan.choice for plan in few.best] == [plan.choice for plan in result.best[:3]]
    slower = {plan.choice for plan in result.best[3:]}
    assert few.num_simulated <= 3 + len(slower) + simulated_in_vain


def test_nothing_is_refused_for_memory_where_there_is_enough():
    result = searched(config_of("cluster.memory_gib=1e6"), 2)
    assert len(result.best) == 2
    assert not [refusal for refusal in result.refused if refusal.excess is not None]
