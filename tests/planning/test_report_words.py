"""A report's figures and words follow from a few numbers, to the last digit and at every limit."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace

import pytest

from vp_train.planning.degrees import Degrees
from vp_train.planning.memory import HostUsage, RankMemory
from vp_train.planning.overlap import ReplicaExchange
from vp_train.planning.report import Offloading, RankReport, make_report, optimizer_seconds
from vp_train.settings import load_config

GIB = 2.0**30
CONFIG = load_config(["model=nano", "parallel.pp=2", "parallel.dp=2", "num_microbatches=8"])


@pytest.fixture(scope="module")
def planned():
    return make_report(CONFIG)


def rank_of(layers=10.0, vocabulary=2.0, tensor=0.0, total=GIB):
    memory = RankMemory(5, total / 2, total / 8, total / 8, total / 8, total / 16, total / 16)
    return RankReport(4, 100, memory, layers, tensor, vocabulary)


@pytest.fixture
def report(planned):
    """Return a report of two ranks whose step takes 20 s and nothing of which is large."""
    return replace(
        planned,
        ranks=(rank_of(), rank_of()),
        flops=1e12,
        passes=15.0,
        gradients=3.0,
        optimizer=2.0,
        bound=12.0,
        exchange=ReplicaExchange(4.0, 3.0, 1.5, 1.5),
        messages=1.0,
        offloading=None,
        host=HostUsage(),
        cluster=replace(planned.cluster, memory_gib=2.0),
    )


def test_a_step_is_its_passes_the_exchange_that_is_exposed_and_the_update(report):
    assert report.step_seconds == 20
    assert report.num_tokens == 8 * 64 * 2
    assert report.gap == 15 / 12 - 1
    assert replace(report, bound=0.0).gap == 0
    assert str(replace(report, bound=report.passes * (1 + 1e-15)).gap) == "0.0", "not -0.0"
    peak = report.cluster.float32_flops_per_second
    assert report.mfu == pytest.approx(1e12 / (20 * 4 * peak))
    assert report.limit == 2 * GIB
    assert (report.excess, report.host_excess, report.fits) == (-GIB, -math.inf, True)


def test_the_worst_rank_needs_most_memory_and_the_busiest_computes_longest(report):
    ranks = rank_of(), rank_of(layers=11.0), rank_of(total=1.5 * GIB), rank_of(vocabulary=3.5)
    found = replace(report, ranks=ranks)
    assert (found.worst, found.busiest) == (2, 3)
    assert [rank.busy for rank in ranks] == [12, 13, 12, 13.5]
    assert found.excess == -GIB / 2


def test_a_part_of_the_peak_is_said_only_where_the_cluster_has_that_of_its_device(report):
    """The default is that of no machine, so a machine may compute faster than it."""
    for flops, words in ((2.4e11, "3 GFLOP/s per rank"), (1.6e14, "2 TFLOP/s per rank")):
        found = replace(report, flops=flops)
        assert not found.knows_peak
        assert (found.rate_words, found.record()["mfu"]) == (words, None)
        known = replace(found, cluster=replace(report.cluster, float32_flops_per_second=4e11))
        assert known.knows_peak
        assert known.rate_words == f"MFU {flops / (20 * 4 * 4e11):.1%}"
        assert known.record()["mfu"] == known.mfu


@pytest.mark.parametrize(
    ("total", "host", "known", "fits"),
    [
        (2 * GIB, 0.0, None, True),
        (2 * GIB + 64, 0.0, None, False),
        (GIB, 3 * GIB, 3.0, True),
        (GIB, 3 * GIB + 1, 3.0, False),
        (GIB, 9 * GIB, None, True),
    ],
)
def test_a_plan_fits_to_the_byte_on_devices_and_hosts(report, total, host, known, fits):
    cluster = replace(report.cluster, host_memory_gib=known)
    found = replace(
        report, ranks=(rank_of(), rank_of(total=total)), host=HostUsage(host), cluster=cluster
    )
    assert found.fits is fits
    assert found.binds.startswith(("memory", "host memory")) is not fits


def test_what_is_exposed_is_that_of_the_busiest_rank_and_says_the_whole(report):
    ranks = rank_of(), rank_of(layers=11.0, tensor=0.5)
    moved = Offloading(1.0, 2, 3, (0.5, 0.25), exposed=0.25, saved=4.0)
    found = replace(report, ranks=ranks, offloading=moved)
    assert found.exposed == {
        "tensor-parallel": 0.5,
        "hops and barriers": 1.0,
        "transfers to the host": 0.25,
        "gradients": 1.5,
        "parameters": 1.5,
    }
    assert found.exposed_words == (
        "23.8% of the step: tensor-parallel 2.5%, hops and barriers 5.0%, transfers to the host "
        "1.2%, gradients 7.5% of 20.0%, parameters 7.5% of 15.0%"
    )
    assert found.parts == {
        "layers": 10.5,
        "tensor-parallel sums": 0.5,
        "vocabulary": 2.0,
        "waiting": 2.0,
        "gradient sum": 3.0,
        "optimizer": 2.0,
    }
    assert sum(found.parts.values()) == found.step_seconds
    hidden = replace(
        report, gradients=0.0, messages=None, exchange=ReplicaExchange(4.0, 0.0, 0.0, 0.0)
    )
    assert hidden.exposed_words == "0.0% of the step: gradients 0.0% of 23.5%"
    nothing = replace(hidden, exchange=ReplicaExchange(0.0, 0.0, 0.0, 0.0))
    assert nothing.exposed_words == "0.0% of the step"
    all_of_it = replace(report, exchange=ReplicaExchange(1.5, 1.5, 1.5, 1.5), messages=0.0)
    assert all_of_it.exposed_words == "15.0% of the step: gradients 7.5%, parameters 7.5%"


def test_the_record_has_all_figures(report):
    moved = Offloading(1.0, 2, 3, (0.5, 0.25), exposed=0.25, saved=4.0)
    found = replace(report, ranks=(rank_of(), rank_of(layers=11.0)), offloading=moved)
    record = found.record()
    for name in ("schedule", "vocab", "recompute", "step_seconds", "flops", "bubble"):
        assert record[name] == getattr(found, name)
    for name in ("gap", "binds", "fits"):
        assert record[name] == getattr(found, name)
    assert (record["dp"], record["pp"], record["tp"]) == (2, 2, 1)
    assert (record["micro_batch_size"], record["num_microbatches"]) == (1, 8)
    assert record["tokens_per_second"] == found.num_tokens / 20
    assert (record["bound_seconds"], record["limit_bytes"]) == (12.0, 2 * GIB)
    assert record["parts_seconds"] == found.parts
    assert record["exposed_seconds"] == found.exposed
    assert record["exchange_seconds"] == asdict(found.exchange)
    assert record["offloading"] == asdict(moved)
    assert record["host_bytes"] == {"activations": 0.0, "optimizer": 0.0}
    assert record["ranks"][1] == asdict(found.ranks[1]) | {
        "total_bytes": GIB,
        "busy_seconds": 13.0,
    }
    assert len(record["ranks"]) == 2
    assert report.record()["offloading"] is None


def test_memory_is_said_with_its_distance_from_the_limit(report):
    assert report.memory_words == "needs 1.00 GiB on rank 0, 1.00 GiB less than 2 GiB"
    large = replace(report, ranks=(rank_of(), rank_of(total=3.5 * GIB)))
    words = "needs 3.50 GiB on rank 1, 1.50 GiB more than 2 GiB"
    assert (large.memory_words, large.binds) == (words, f"memory: {words}")
    exact = replace(report, ranks=(rank_of(total=2 * GIB),))
    assert exact.memory_words == "needs 2.00 GiB on rank 0, 0 B less than 2 GiB"
    known = replace(report.cluster, host_memory_gib=1.0)
    host = replace(report, cluster=known, host=HostUsage(optimizer=2 * GIB))
    assert host.binds == f"host memory: {host.host.excess_words(GIB)}"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([(11.0, 1.0), (9.0, 0.819)], "compute: rank 0 computes for 60% of the step"),
        ([(11.0, 1.0), (9.0, 0.817)], "its layers: rank 0 computes 1.10 times as long as the"),
        ([(8.0, 4.0), (8.0, 1.0)], "its part of the vocabulary: rank 0 computes 1.14 times"),
        ([(9.0, 3.5), (8.0, 1.5)], "its part of the vocabulary: rank 0 computes 1.14 times"),
        ([(10.0, 2.5), (8.0, 1.5)], "its layers: rank 0 computes 1.14 times as long"),
        ([(9.5, 3.0), (8.0, 1.5)], "its layers: rank 0 computes 1.14 times as long"),
    ],
)
def test_a_rank_that_computes_a_tenth_longer_than_the_average_binds(report, ranks, words):
    """Its vocabulary binds if more than half of what the rank is above the average is that."""
    found = replace(report, ranks=tuple(rank_of(*one) for one in ranks))
    assert found.binds.startswith(words), found.binds


@pytest.mark.parametrize(
    ("layers", "tensor", "gradients", "passes", "words"),
    [
        (
            11.0,
            4.0,
            3.0,
            15.0,
            "compute: rank 0 computes for 45% of the step; it waits for .* sums for 20.0%$",
        ),
        (11.0, 4.01, 3.0, 15.0, "communication, tensor-parallel sums: 20% of the step; inside"),
        (11.0, 4.01, 8.0, 10.0, "communication, tensor-parallel sums: 20% of the step; inside"),
        (11.0, 0.0, 4.0, 14.0, "compute: rank 0"),
        (8.0, 0.0, 4.01, 13.99, "communication, gradient sum: 20% of the step; inside a node; "),
        (8.0, 0.0, 4.0, 14.0, "compute: rank 0 computes for 50% of the step$"),
        (9.1, 0.1, 4.0, 14.0, "compute: .* for 55% of the step; .* sums for 0.5%$"),
        (9.0, 0.09, 4.0, 14.0, "compute: rank 0 computes for 55% of the step$"),
        (7.9, 0.0, 4.0, 14.0, "filling and draining the pipeline: 20% of the step; more than 8 "),
    ],
)
def test_a_fifth_of_the_step_binds_and_no_less(report, layers, tensor, gradients, passes, words):
    ranks = (rank_of(layers=layers, tensor=tensor),) * 2
    found = replace(report, ranks=ranks, gradients=gradients, passes=passes, messages=0.0)
    assert found.step_seconds == pytest.approx(20)
    assert re.match(words, found.binds), found.binds


def test_what_binds_comes_with_its_way_out(report):
    slow = replace(report, ranks=(rank_of(tensor=9.0),) * 2)
    assert slow.binds.endswith("; inside a node; a smaller tp")
    summed = replace(report, gradients=9.0)
    assert summed.binds.endswith("; inside a node; more microbatches")
    summed = replace(summed, exchange=replace(summed.exchange, gathers=0.0))
    assert summed.binds.endswith("; inside a node; more microbatches, or optim.name=zero1")
    waiting = replace(report, passes=30.0)
    assert waiting.binds.endswith("; more than 8 microbatches, or a smaller pp")
    capped = replace(waiting, bound_reason="the memory of rank 1 in warm-up and cool-down")
    assert capped.binds.startswith("the cap of schedule=auto: rank ")
    assert "set a higher schedule.cap_gib" in capped.binds
    sent = replace(waiting, messages=10.0)
    assert sent.binds.endswith("; inside a node; fewer stages")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (3.6, "communication, hops and barriers: 17% of the step; inside a node; fewer stages"),
        (3.4, "filling and draining the pipeline: 33% of the step; more than 8 microbatches"),
    ],
)
def test_waiting_is_named_by_its_larger_half(report, messages, words):
    found = replace(report, passes=19.0, gradients=0.0, messages=messages)
    assert found.step_seconds == pytest.approx(21)
    assert found.binds.startswith(words), found.binds


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (4.01, "communication, hops and barriers: 20% of the step; inside a node; fewer stages"),
        (3.99, "its layers: rank 0 computes 1.67 times as long as the average rank"),
        (0.0, "its layers: rank 0 computes 1.67 times"),
    ],
)
def test_links_between_stages_bind_where_ranks_wait_for_them_longer_than_for_a_slow_one(
    report, messages, words
):
    ranks = (rank_of(layers=8.0), rank_of(layers=0.0))
    found = replace(report, ranks=ranks, passes=18.0, gradients=0.0, messages=messages)
    assert found.step_seconds == pytest.approx(20)
    assert found.binds.startswith(words), found.binds


@pytest.mark.parametrize(
    ("layers", "passes", "optimizer", "words"),
    [
        ((8.0, 8.0), 10.0, 10.0, "the optimizer on the host: 50% of the step; a larger batch, or "),
        ((8.0, 1.0), 10.0, 10.0, "the optimizer on the host: 50% of the step"),
        ((9.0, 1.0), 17.0, 3.0, "its layers: rank 0 computes"),
        ((11.0, 11.0), 15.0, 5.0, "the optimizer on the host: 25% of the step"),
        ((11.0, 11.0), 16.0, 4.0, "compute: rank 0"),
        ((4.0, 4.0), 15.0, 5.0, "filling and draining the pipeline: 45% of the step"),
    ],
)
def test_the_optimizer_binds_where_it_takes_more_than_all_else_but_computation(
    report, layers, passes, optimizer, words
):
    found = replace(
        report,
        ranks=tuple(rank_of(layers=seconds) for seconds in layers),
        passes=passes,
        messages=0.0,
        gradients=0.0,
        optimizer=optimizer,
        host=HostUsage(optimizer=1.0),
    )
    assert found.step_seconds == pytest.approx(20)
    assert found.binds.startswith(words), found.binds
    if "optimizer" in words:
        on_device = replace(found, host=HostUsage()).binds
        assert re.fullmatch(r"the optimizer: \d+% of the step; a larger batch", on_device)


@pytest.mark.parametrize("dp", [1, 4])
def test_an_update_moves_its_state_twice_gradients_and_weights_once(dp):
    """Three values in fp32 are read and written for each gradient in host memory."""
    cluster = replace(
        CONFIG.cluster,
        memory_bytes_per_second=10.0,
        host_bytes_per_second=5.0,
        host_memory_bytes_per_second=4.0,
    )
    memory = RankMemory(
        1,
        weights=200.0,
        gradients=400.0,
        optimizer=1000.0,
        **dict.fromkeys(("activations", "vocabulary", "working"), 1e9),
    )
    degrees, optim = Degrees(dp, 2, 2), CONFIG.optim
    assert optimizer_seconds(degrees, cluster, optim, memory) == (600 + 2000) / 10
    zero1 = replace(optim, name="zero1")
    assert optimizer_seconds(degrees, cluster, zero1, memory) == (600 / dp + 2000) / 10
    there = replace(zero1, offload=True)
    link, host = 600 / dp / 5, (400 + 6 * 400 + 200) / dp / 4
    assert optimizer_seconds(degrees, cluster, there, memory) == pytest.approx(link + host)
