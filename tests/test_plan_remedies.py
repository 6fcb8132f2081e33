"""What would let a plan fit: whether it is enough, and which figures are estimates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vp_train.commands import plan_remedies
from vp_train.commands.plan_remedies import Remedy, remedies
from vp_train.commands.plan_words import remedies_of
from vp_train.planning.cluster import with_margin
from vp_train.planning.report import make_report
from vp_train.settings import load_config
from vp_train.units import human_bytes

NANO = ["model=nano", "num_microbatches=8", "vocab=none"]
HOSTS = ["model=llama3_8b", "model.num_layers=16", "cluster=h100_80g_node", "num_microbatches=16"]
HOSTS += ["optim.name=zero1", "parallel.offload_activations=1"]


@pytest.mark.parametrize(
    "typed",
    [
        [*NANO, "parallel.pp=4", "cluster.memory_gib=0.0055"],
        [*NANO, "parallel.pp=2", "cluster.memory_gib=0.007"],
        [*NANO, "parallel.pp=2", "cluster.memory_gib=0.007", "schedule=auto"],
        [*HOSTS, "cluster.host_memory_gib=20"],
        [*HOSTS, "cluster.host_memory_gib=20", "cluster.memory_gib=25"],
    ],
    ids=" ".join,
)
def test_a_change_is_enough_in_json_if_the_plan_then_fits_and_null_if_nothing_was_planned(typed):
    config = load_config(typed)
    report = make_report(config)
    assert not report.fits
    said = set()
    for one in remedies_of(config, report):
        enough = one.record()["enough"]
        said.add(enough)
        if one.overrides is None or "may fit" in one.words:
            assert enough is None
        elif config.schedule.is_solved:
            assert enough is (False if one.lacks else None)
        else:
            again = make_report(load_config([*typed, *one.overrides.split()]))
            assert enough is replace(again, cluster=with_margin(again.cluster)).fits, one.words
    assert len(said) > 1


def test_what_may_fit_is_not_said_to_be_enough():
    assert Remedy("more GPUs: x=1: may fit", "x=1", is_planned=False).record()["enough"] is None


def test_what_another_optimizer_saves_is_exact_also_where_the_step_is_an_estimate(monkeypatch):
    typed = ["model=nano", "parallel.pp=2", "parallel.dp=2", "num_microbatches=256"]
    typed += ["cluster.memory_gib=0.004"]
    config = load_config(typed)
    report = make_report(config)
    monkeypatch.setattr(plan_remedies, "MOST_AT_ONCE", 0)
    found = {one.overrides: one for one in remedies(config, report)}
    sharded, again = found["optim.name=zero1"], found["parallel.recompute=full"]
    assert not sharded.is_planned
    assert not again.is_planned
    then = make_report(load_config([*typed, "optim.name=zero1"]))
    needs = [plan.ranks[plan.worst].memory.total for plan in (report, then)]
    assert f": {human_bytes(needs[0] - needs[1])} less, step ~" in sharded.words
    assert f": ~{human_bytes(again.saved)} less, step ~" in again.words
