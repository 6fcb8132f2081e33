"""Seconds, FLOPs and limits of runs whose answer is known, and of the published runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from vp_train.config import ConfigError
from vp_train.model import shape
from vp_train.planning.report import make_report
from vp_train.settings import load_config

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
    assert found.flops == pytest.approx(
        3 * 8 * 64 * (shape.layer_flops(found.work.model, 64) * 4 / 64 + 2 * 4096 * 64)
    )


@pytest.mark.parametrize("num_microbatches", [4, 16])
def test_1f1b_time_is_work_plus_one_fill_and_drain(num_microbatches):
    found = report(
        "vocab=none",
        "schedule=1f1b",
        f"num_microbatches={num_microbatches}",
        "cost.output_row_seconds=0",
    )
    one = found.ranks[0].busy / num_microbatches
    assert found.passes == pytest.approx((num_microbatches + 3) * one)
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)


def test_replicas_do_the_same_in_the_same_time_and_sum_gradients():
    one = report("cluster.gpus_per_node=2", "parallel.pp=2", "cluster.node_bytes_per_second=1e6")
    two = report("cluster.gpus_per_node=4", "parallel.pp=2", "cluster.node_bytes_per_second=1e6")
    assert two.degrees.dp == 2
    assert (two.passes, two.flops) == (one.passes, 2 * one.flops)
    parameters = max(rank.memory.parameters for rank in two.ranks)
    assert (one.gradients, two.exchange.sums) == (0, pytest.approx(4 * parameters / 1e6))


@pytest.mark.parametrize("optimizer", ["adamw", "zero1"])
def test_only_what_no_pass_hides_of_the_exchange_adds_to_a_step(optimizer):
    """A slow link exposes it.  A fast one leaves the last bucket, which nothing follows."""
    common = ["parallel.dp=2", "parallel.pp=2", "run.dtype=bfloat16", f"optim.name={optimizer}"]
    apart = ["optim.overlap_sums=false", "optim.overlap_gathers=false"]
    for bandwidth in ("1e6", "1e9"):
        link = f"cluster.node_bytes_per_second={bandwidth}"
        beside, alone = report(*common, link), report(*common, link, *apart)
        whole = alone.exchange.sums + alone.exchange.gathers
        assert alone.gradients == pytest.approx(whole)
        assert beside.exchange.sums + beside.exchange.gathers == pytest.approx(whole)
        assert 0 < beside.gradients < 0.99 * whole
        assert beside.passes == alone.passes
    assert sum(beside.exposed.values()) >= beside.gradients
    assert "of the step" in beside.exposed_words


def test_the_optimizer_reads_gradients_writes_weights_and_does_both_to_its_state():
    """The time is that of the rank with the most parameters."""
    common = [
        "cluster.memory_bytes_per_second=1e6",
        "vocab=none",
        "model.vocab_size=8192",
        "parallel.layers_per_stage=[1,1,1,1]",
    ]
    found = report(*common, "run.dtype=bfloat16")
    counts = [rank.memory.parameters for rank in found.ranks]
    assert min(counts) < max(counts)
    assert found.optimizer == pytest.approx(max(counts) * (4 + 2 * 12 + 2) / 1e6)


def test_an_optimizer_in_host_memory_takes_its_link_and_the_memory_there():
    """Gradients go down and weights come up.

    The host reads and writes 3 values in fp32, reads the gradients and writes the weights.
    """
    links = ["cluster.host_bytes_per_second=1e7", "cluster.host_memory_bytes_per_second=1e8"]
    common = ["run.dtype=bfloat16", "optim.name=zero1", "parallel.pp=2", "parallel.dp=2", *links]
    there, here = report(*common, "optim.offload=true"), report(*common)
    part = max(rank.memory.parameters for rank in there.ranks) / 2
    assert there.optimizer == pytest.approx(part * ((4 + 2) / 1e7 + (4 + 2 * 12 + 2) / 1e8))
    assert there.step_seconds > here.step_seconds
    assert there.ranks[0].memory.total < here.ranks[0].memory.total


@pytest.mark.parametrize("split", ["", "parallel.sequence_parallel=true"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_without_their_sums_are_half_of_those_of_one_rank(split, recompute):
    common = [
        "cluster.gpus_per_node=4",
        "parallel.dp=1",
        "run.device=cuda",
        f"parallel.recompute={recompute}",
    ]
    link = ["cluster.node_seconds=0.01", "cluster.node_bytes_per_second=1e6"]
    two = report(*common, *link, "parallel.pp=2", "parallel.tp=2", *filter(None, [split]))
    one = report(*common, *link, "cluster.gpus_per_node=2", "parallel.pp=2")
    for alone, shared in zip(one.ranks, two.ranks, strict=True):
        assert alone.tensor == 0 < shared.tensor
        assert shared.layers - shared.tensor == pytest.approx(alone.layers / 2)


def test_layers_take_no_less_than_the_cpu_needs_to_issue_them():
    """Also what they recompute is issued meanwhile.  Measured passes stay as they are."""
    alone = report()
    layer = alone.layer_seconds
    assert layer > 0
    free = report(f"cluster.layer_launch_seconds={layer * 0.99}")
    assert not free.launch_words
    assert free.ranks == alone.ranks
    for words in ([], ["parallel.recompute=full"], ["schedule=zb_h1"]):
        slow = report(f"cluster.layer_launch_seconds={layer * 3}", *words)
        assert (
            f"; the step counts at least {3e3 * layer:.1f}; a larger micro-batch"
            in slow.launch_words
        )
        count = alone.work.num_microbatches
        for rank in slow.ranks:
            assert rank.layers == pytest.approx(3 * layer * rank.num_layers * count)
    measured = [f"cost.layer_{name}_seconds=1e-9" for name in ("forward", "backward")]
    assert not report("cluster.layer_launch_seconds=10", *measured).launch_words
    assert not report("cluster.layer_launch_seconds=10", "run.cuda_graphs=true").launch_words
    split = report("parallel.tp=2", "parallel.pp=2", "cluster.layer_launch_seconds=10")
    assert split.launch_words.endswith("a larger micro-batch or a smaller tp helps")


def test_on_h100s_a_microbatch_of_gpt_4b_waits_for_the_host_and_one_of_llama3_8b_does_not():
    """Measured so: benchmarks/results/gpu_check_nvidia_h100_80gb_hbm3*.json, step 7."""
    words = ["cluster=h100_80g_node", "parallel.pp=8", "num_microbatches=16"]
    found, alone = (
        make_report(load_config(["model=gpt_4b", *words, *more]))
        for more in ([], ["cluster.sustained=1", "cluster.contention=0"])
    )
    assert alone.launch_words
    kept = found.layer_seconds * found.cluster.sustained
    assert kept == pytest.approx(alone.layer_seconds, rel=0.02), "all but kernel_seconds"
    assert alone.layer_seconds == pytest.approx(2.77e-3, rel=0.05)
    for compiles, seconds in (("on", 18.9e-3), ("off", 22.0e-3)):
        typed = ["model=llama3_8b", *words, "cluster.sustained=1", f"run.compile={compiles}"]
        wide = make_report(load_config(typed))
        assert wide.layer_seconds == pytest.approx(seconds, rel=0.05)
        assert not wide.launch_words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["cluster.memory_gib=0.001"],
            r"memory: needs \d.* MiB on rank \d, \d.* more than 0.001 GiB",
        ),
        (["vocab=none", "num_microbatches=64"], "its part of the vocabulary: rank 3 computes"),
        (
            ["parallel.layers_per_stage=[1,1,4,2]", "model.num_layers=8", "num_microbatches=64"],
            "its layers: rank 2 computes",
        ),
        (["num_microbatches=2"], "filling and draining the pipeline"),
        (
            ["parallel.tp=2", "parallel.pp=2", "cluster.node_seconds=0.01"],
            "communication, tensor-parallel sums",
        ),
        (
            ["parallel.dp=2", "parallel.pp=2", "cluster.node_bytes_per_second=1e6"],
            "communication, gradient sum",
        ),
        (["num_microbatches=256"], r"compute: rank \d computes for \d+% of the step$"),
        (
            ["num_microbatches=256", "parallel.recompute=full"],
            r"compute: rank \d computes for \d+% of the step, recomputation included$",
        ),
    ],
)
def test_what_binds_is_said(overrides, words):
    found = report(*overrides)
    assert re.match(words, found.binds), found.binds
    assert found.fits == (not found.binds.startswith("memory"))


def test_a_split_that_the_cluster_has_no_ranks_for():
    with pytest.raises(
        ConfigError, match=r"the cluster has 4 CPU ranks: parallel.pp=3 needs a multiple of 3 ranks"
    ):
        report("parallel.pp=3")


@pytest.fixture
def plan_published(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("plan_published", "published", "provenance"):
        sys.modules.pop(name, None)
    import plan_published

    return plan_published


def test_the_published_runs_are_what_the_shipped_cluster_predicts(plan_published):
    """Check the memory as this trainer holds its state, and as that of the paper does."""
    published = json.loads(plan_published.DATA.read_text())["rows"]
    fitted = plan_published.fit(published)
    chosen = (("vocab-1", 32_000), ("vocab-2", 256_000))
    for run in published:
        if (run["method"], run["vocab"]) not in chosen:
            continue
        without = plan_published.left_out(published, run["method"])
        row = plan_published.predicted(run, fitted, without)
        for error in (row.plan_error, row.memory_error, row.mfu_error, row.without_error):
            assert abs(error) < 0.05, row
        assert sum(row.plan_parts.values()) == pytest.approx(row.plan_gib)


def test_the_shipped_constants_are_the_fitted_ones(plan_published):
    fitted = plan_published.fit(json.loads(plan_published.DATA.read_text())["rows"])
    cluster = load_config(["cluster=a100_80g_node"]).cluster
    assert cluster.efficiency == pytest.approx(fitted.efficiency, rel=2e-3)
    assert cluster.contention == pytest.approx(fitted.contention, rel=1e-2)


def test_gpt_4b_is_the_published_layer(plan_published):
    model = load_config(["model=gpt_4b"]).model
    for run in json.loads(plan_published.DATA.read_text())["rows"]:
        published = (
            run["layers"],
            run["hidden"],
            run["heads"],
            run["heads"],
            run["ffn_hidden"],
            run["seq"],
        )
        assert published == (
            model.num_layers,
            model.hidden_size,
            model.num_heads,
            model.num_query_groups,
            model.ffn_hidden_size,
            model.seq_length,
        )
    assert (model.activation, model.normalisation, model.positions) == (
        "gelu",
        "layernorm",
        "learned",
    )
    assert model.linear_bias
