"""Seconds, FLOPs and what binds, in cases whose answer is known; the published runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from vp_train.cli import load_config
from vp_train.config import ConfigError
from vp_train.model import shape
from vp_train.planner.report import make_report

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FREE_LINKS = [
    "cluster.node_seconds=0",
    "cluster.node_bytes_per_second=1e18",
    "cluster.memory_bytes_per_second=1e18",
    "cost.lookup_seconds=0",
    "cost.lookup_grad_seconds=0",
]


def report(*overrides):
    return make_report(load_config(["model=nano", *FREE_LINKS, *overrides]))


def test_one_gpu_alone_reaches_the_efficiency():
    found = report("cluster.gpus_per_node=1", "vocab=none", "cluster.efficiency=0.37")
    assert found.mfu == pytest.approx(0.37)
    assert found.bubble == pytest.approx(0, abs=1e-9)
    assert found.flops == pytest.approx(3 * 8 * 64 * (shape.layer_flops(found.config.model, 64) * 4 / 64 + 2 * 4096 * 64))


@pytest.mark.parametrize("num_microbatches", [4, 16])
def test_1f1b_time_is_work_plus_one_fill_and_drain(num_microbatches):
    found = report("vocab=none", "schedule=1f1b", f"num_microbatches={num_microbatches}", "cost.output_row_seconds=0")
    one = found.ranks[0].busy / num_microbatches
    assert found.passes == pytest.approx((num_microbatches + 3) * one)
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)


def test_replicas_do_the_same_in_the_same_time_and_sum_gradients():
    one = report("cluster.gpus_per_node=2", "parallel.pp=2", "cluster.node_bytes_per_second=1e6")
    two = report("cluster.gpus_per_node=4", "parallel.pp=2", "cluster.node_bytes_per_second=1e6")
    assert two.degrees.dp == 2
    assert (two.passes, two.flops) == (one.passes, 2 * one.flops)
    parameters = max(rank.memory.parameters for rank in two.ranks)
    assert (one.gradients, two.gradients) == (0, pytest.approx(4 * parameters / 1e6))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.memory_gib=0.001"], r"memory: needs \d.* MiB on rank \d, \d.* more than 0.001 GiB"),
        (["vocab=none", "num_microbatches=64"], "its part of the vocabulary: rank 3 computes"),
        (["parallel.layers_per_stage=[1,1,4,2]", "model.num_layers=8", "num_microbatches=64"], "its layers: rank 2 computes"),
        (["num_microbatches=2"], "filling and draining the pipeline"),
        (["parallel.tp=2", "parallel.pp=2", "cluster.node_seconds=0.01"], "communication, tensor-parallel sums"),
        (["parallel.dp=2", "parallel.pp=2", "cluster.node_bytes_per_second=1e6"], "communication, gradient sum"),
        (["num_microbatches=256"], r"compute: rank \d is busy for \d+%"),
    ],
)
def test_what_binds_is_said(overrides, words):
    found = report(*overrides)
    assert re.match(words, found.binds), found.binds
    assert found.fits == (not found.binds.startswith("memory"))


def test_a_split_that_the_cluster_has_no_ranks_for():
    with pytest.raises(ConfigError, match=r"the cluster has 4 GPUs: parallel.pp=3 needs a multiple of 3 ranks"):
        report("parallel.pp=3")


def test_the_published_runs_follow_from_one_calibrated_figure(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("plan_published", "published", "provenance"):
        sys.modules.pop(name, None)
    import plan_published

    runs = {(row["method"], row["vocab"]): row for row in json.loads(plan_published.DATA.read_text())["rows"]}
    efficiency = plan_published.calibrate(runs[plan_published.CALIBRATED])
    for method in ("vocab-1", "vocab-2"):
        for vocab in (32_000, 256_000):
            row = runs[method, vocab]
            config = plan_published.config_of(row, efficiency)
            step, found = plan_published.planned(config)
            assert plan_published.peak_gib(config, step) == pytest.approx(row["max_allocated_gib"], rel=0.05)
            assert 100 * found.mfu == pytest.approx(row["paper_table5"]["mfu_pct"], rel=0.05)
