"""The file of a traced step has every rank, both timelines, and where its costs come from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from schedules.ir import Kind
from tests.training import config_of, laid_out, train
from vp_train.config import CostConfig, RunConfig
from vp_train.explain.causes import explain
from vp_train.explain.trace import parse
from vp_train.metrics.step_times import SCHEMA, RankTimes, pass_seconds, source_of, step_times
from vp_train.planning.plan import make_plan


def timeline_of(times):
    """Return the seconds of each pass by name, of all ranks."""
    return [
        dict(zip(row["names"].split(), zip(row["starts"], row["ends"], strict=True), strict=True))
        for row in times["passes"]
    ]


def test_a_run_of_two_replicas_names_all_ranks(ranks, tmp_path):
    config = laid_out(config_of(tmp_path, steps=3, trace_step=2, checkpoint_every=0), pp=1, dp=2)
    assert ranks(2).run(train, config) == [1, 1]
    times = json.loads((config.run.directory / "trace" / "step_times.json").read_text())
    assert (times["schema"], times["step"], times["dp"], times["pp"]) == (SCHEMA, 2, 2, 1)
    assert [(each["replica"], each["pipeline_rank"]) for each in times["ranks"]] == [(0, 0), (1, 0)]
    (first,) = timeline_of(times["measured"])
    assert first.keys() == timeline_of(times["planned"])[0].keys()
    for kind, found in times["ranks"][0]["pass_seconds"].items():
        spans = [end - start for name, (start, end) in first.items() if kind in name]
        assert found["count"] == len(spans)
        assert found["seconds"] == pytest.approx(sum(spans), abs=1e-5)
    assert [len(row) for row in times["processor_seconds"]] == [len(first)]
    explained = explain(parse(times))
    assert [row.rank for row in explained.ranks] == [0, 1]
    assert 0 < explained.on_processor <= 1
    for each in times["ranks"]:
        passes = sum(found["seconds"] for found in each["pass_seconds"].values())
        parts = each["seconds"]["forward_backward"] + each["seconds"]["vocabulary"]
        assert 0.5 * passes < parts
        assert each["host"]


def test_the_planned_timeline_and_its_costs_are_those_of_the_plan():
    config = RunConfig()
    plan = make_plan(replace(config, cost=CostConfig(layer_forward_seconds=1e-3)), 4)
    spans = plan.timeline.compute[1]
    ranks = [RankTimes(0, 0, 0, 0, host="a", pass_seconds=pass_seconds(spans))]
    times = json.loads(
        json.dumps(
            step_times(
                replace(config, cost=CostConfig(layer_forward_seconds=1e-3)),
                plan,
                plan.timeline,
                step=5,
                ranks=ranks,
                words=["cost=mine.yaml", "run.name=a"],
            )
        )
    )
    assert times["planned"] == times["measured"]
    planned = timeline_of(times["planned"])[1]
    assert list(planned) == [span.name for span in spans]
    assert [end for _, end in planned.values()] == pytest.approx(
        [span.end for span in spans], abs=1e-6
    )
    cost = times["cost"]
    assert cost["overrides"] == ["cost=mine.yaml"]
    assert cost["settings"]["layer_forward_seconds"] == 1e-3
    assert (cost["sources"]["F"], cost["sources"]["B"], cost["sources"]["E"]) == (
        "measured",
        "flops",
        "assumed",
    )
    assert cost["pass_seconds"]["F"] == list(plan.cost.pass_seconds[Kind.F])
    total = times["ranks"][0]["pass_seconds"]["F"]
    assert total["seconds"] == pytest.approx(total["count"] * cost["pass_seconds"]["F"][1])
    assert source_of(Kind.G, CostConfig(lookup_grad_seconds=1.0)) == "measured"
