"""What is said of FSDP beside a plan: one outcome, at best and at what published runs reached."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from vp_train.planning.compare import rivals_of
from vp_train.planning.degrees import Degrees
from vp_train.planning.fsdp import (
    ON_GPUS,
    ON_HOSTS,
    Batch,
    FsdpReport,
    Means,
    best_fsdp,
    undivided_batch,
)
from vp_train.planning.report import make_report
from vp_train.planning.rivals import PUBLISHED, PublishedRuns, Rivals, outcome_of, runs_like
from vp_train.planning.workload import Workload
from vp_train.settings import load_config
from vp_train.units import AS_FAST

ROOT = Path(__file__).parents[2]
GIB = 2.0**30
RUNS = PublishedRuns("card", 1e14, 1.1, 1.3)
# 10 s at best, and 11 to 13 s at what these runs reached
STEP = FsdpReport(
    degrees=Degrees(4, 1, 2),
    micro_batch_size=3,
    num_microbatches=5,
    recompute="selective",
    num_layers=9,
    num_recomputed=9,
    num_offloaded=0,
    offloads_optimizer=False,
    compute=6.0,
    tensor=0.5,
    exposed=1.5,
    exchange=4.0,
    optimizer=2.0,
    mfu=0.4,
    num_bytes=3.5 * GIB,
    host_bytes=0.0,
    limit=75 * GIB,
)
HOW = "(dp=4 x tp=2, micro-batch 3, recomputation selective"
SIZE = ", 3.50 of 75 GiB)"


def rivals(with_hosts=STEP, without_hosts=STEP, seconds=8.0, means=ON_HOSTS, **more):
    rival = without_hosts if means == ON_GPUS else with_hosts
    return Rivals(rival, with_hosts, without_hosts, means, seconds, RUNS, **more)


@pytest.mark.parametrize(
    ("seconds", "outcome", "verdict"),
    [
        (
            8.0,
            "loses",
            "would lose: 10.00 s at best, 25.0% slower than this plan, 11.00 s to 13.00 s at what "
            "card runs of it reached",
        ),
        (
            9.92,
            "ties",
            "would tie: 10.00 s at best, as fast as this plan, 11.00 s to 13.00 s at what card "
            "runs of it reached",
        ),
        (
            10.05,
            "ties",
            "would tie: 10.00 s at best, as fast as this plan, 11.00 s to 13.00 s at what card "
            "runs of it reached",
        ),
        (
            10.95,
            "open",
            "open: 10.00 s at best, 8.7% faster than this plan, but 11.00 s to 13.00 s, as fast to "
            "18.7% slower, at what card runs of it reached: this plan wins unless FSDP is within "
            "9.5% of its best",
        ),
        (
            10.4,
            "open",
            "open: 10.00 s at best, 3.8% faster than this plan, but 11.00 s to 13.00 s, 5.8% to "
            "25.0% slower, at what card runs of it reached: this plan wins unless FSDP is within "
            "4.0% of its best",
        ),
        (
            12.5,
            "open",
            "open: 10.00 s at best, 20.0% faster than this plan, but 11.00 s to 13.00 s, 12.0% "
            "faster to 4.0% slower, at what card runs of it reached: this plan wins unless FSDP is "
            "within 25.0% of its best",
        ),
        (
            20.0,
            "wins",
            "would win: 10.00 s at best, 50.0% faster than this plan, 11.00 s to 13.00 s, 45.0% to "
            "35.0% faster, at what card runs of it reached",
        ),
        (
            None,
            None,
            "would fit: 10.00 s at best, 11.00 s to 13.00 s at what card runs of it reached",
        ),
    ],
)
def test_one_outcome_has_the_seconds_at_best_and_at_what_runs_reached(seconds, outcome, verdict):
    rest = f"; planned with or without host memory {HOW}{SIZE}; vp-train has no FSDP"
    for means in (ON_HOSTS, ON_GPUS):
        found = rivals(seconds=seconds, means=means)
        assert (found.outcome, found.words) == (outcome, verdict + rest)
        record = found.record()
        assert record["outcome"] == outcome
        assert record["rival"]["seconds"] == 10.0
        assert record["rival"]["reached_seconds"] == (pytest.approx(11.0), pytest.approx(13.0))
        assert record["published_runs"] == {"card": "card", "peak": 1e14, "least": 1.1, "most": 1.3}
    searched = rivals(seconds=seconds, is_searched=True).words
    assert searched == (verdict + rest).replace("this plan", "the first plan")


def test_fsdp_wins_what_its_slowest_runs_win_and_loses_or_ties_what_it_does_at_best():
    """Times that are as fast are a tie at best, and decide nothing against FSDP at worst."""
    chosen, found = random.Random(3), Counter()
    for _ in range(1000):
        planned, seconds = chosen.uniform(9, 11), chosen.uniform(8, 15)
        outcome = outcome_of(planned, seconds, RUNS)
        wins, loses = seconds / planned / 1.3 - 1 > -AS_FAST, seconds / planned < 1 - AS_FAST
        ties = not loses and planned / seconds > 1 - AS_FAST
        assert outcome == ("loses" if loses else "ties" if ties else "wins" if wins else "open")
        verdict = rivals(replace(STEP, compute=planned - 4), seconds=seconds).words
        said = {"loses": "would lose: ", "ties": "would tie: ", "wins": "would win: "}
        assert verdict.startswith(said.get(outcome, "open: "))
        assert (" at best, as fast as this plan, " in verdict) is ties
        found[outcome] += 1
    assert min(found.values()) > 30
    assert len(found) == 4


def test_what_may_be_in_host_memory_is_said_and_what_the_other_way_takes():
    some = replace(STEP, num_recomputed=8, num_offloaded=2, offloads_optimizer=True, host_bytes=1.0)
    more = " in 8 of 9 layers, activations of 2 layers offloaded, optimizer offloaded"
    alone = replace(STEP, compute=8.0, num_bytes=STEP.limit)
    large = replace(alone, num_bytes=STEP.limit + GIB)
    for means, names in (
        (ON_HOSTS, "activations and the optimizer"),
        (Means(False, True), "the optimizer"),
        (Means(True, False), "activations"),
    ):
        whole = f"; planned where {names} may be in host memory, as in this plan {HOW}{more}{SIZE}"
        for other, ends in (
            (alone, "12.00 s at best, 50.0% slower"),
            (large, "it does not fit"),
        ):
            words = rivals(some, other, means=means).words
            assert words.startswith("would lose: ")
            rest = f"{whole}; without host memory {ends}; vp-train has no FSDP"
            assert words.endswith(rest)
    assert ", as in this search (" in rivals(some, alone, is_searched=True).words
    small = "would not fit, where nothing may be in host memory, as in this plan: at least 76.00 "
    small += "GiB, more than 75 GiB; with host memory 10.00 s at best"
    for seconds, compared in ((8.0, ", 25.0% slower"), (None, "")):
        found = rivals(some, large, seconds, ON_GPUS)
        assert (found.outcome, found.words) == (None, f"{small}{compared}")
    few = replace(some, num_recomputed=9, num_offloaded=1)
    assert ", activations of 1 layer offloaded, optimizer offloaded" in rivals(few, alone).words
    assert "75.00 of 75 GiB" in rivals(replace(STEP, num_bytes=STEP.limit)).words
    record = rivals(few, None, means=Means(True, False)).record()
    assert record["without_hosts"] is None
    assert record["may_be_on_hosts"] == {"activations": True, "optimizer": False}
    assert record["with_hosts"]["num_offloaded"] == 1


def test_what_runs_reached_is_the_median_of_each_source_and_the_card_is_the_nearest():
    rows = json.loads((ROOT / "benchmarks/results/plan_published.json").read_text())["held_out"]
    for runs in PUBLISHED:
        medians = [
            median(row["plan_pct"] / row["measured_pct"] for row in rows if row["source"] == source)
            for source in (
                f"{name} FSDP, {runs.card.lower()}" for name in ("MPT with", "torchtitan")
            )
        ]
        assert (round(min(medians), 2), round(max(medians), 2)) == (runs.least, runs.most)
    for cluster, card in (
        ("a100_40g_node", "A100"),
        ("a100_80g_node", "A100"),
        ("h100_80g_node", "H100"),
        ("h200_141g_node", "H100"),
    ):
        config = load_config(["model=nano", f"cluster={cluster}"])
        assert runs_like(config.cluster).card == card


def test_the_nearest_batch_divides_over_a_split_and_none_is_nearer():
    seen = set()
    for words in (["model=llama3_8b"], ["model=llama3_8b", "model.num_query_groups=2"]):
        config = load_config([*words, "cluster=h100_80g_node", "cluster.num_nodes=3"])
        work = Workload.of(config, Degrees(24, 1, 1))
        divided = {
            count: best_fsdp(work, config.cluster, config.cost, config.optim, num_sequences=count)
            for count in range(1, 40)
        }
        for count in range(1, 34):
            found = undivided_batch(work, config.cluster, count)
            assert (found is None) is (divided[count] is not None)
            if found is None:
                continue
            assert found.num_sequences == count
            assert found.nearest % found.degrees.dp == 0
            assert found.degrees.dp * found.degrees.tp == 24
            distances = [abs(other - count) for other in divided if divided[other] is not None]
            assert abs(found.nearest - count) == min(distances)
            seen.add(found.nearest > count)
    assert seen == {True, False}


def test_a_batch_that_does_not_divide_comes_with_one_that_does():
    batch = Batch(26, 24, Degrees(8, 1, 4))
    found = rivals(None, None, batch=batch)
    words = "the batch of 26 sequences does not divide over the GPUs; 24 would, over dp=8 x tp=4"
    assert (found.outcome, found.words) == (None, words)
    record = found.record()
    assert (record["rival"], record["outcome"]) == (None, None)
    assert record["undivided_batch"]["nearest"] == 24
    typed = ["model=gpt_4b", "cluster=h100_80g_node", "cluster.num_nodes=4", "parallel.pp=16"]
    config = load_config([*typed, "num_microbatches=13"])
    assert rivals_of(config, make_report(config)).words == words
    config = load_config([*typed, "num_microbatches=12"])
    found = rivals_of(config, make_report(config))
    assert found.batch is None
    assert found.rival.degrees == batch.degrees


@pytest.mark.parametrize("fits", [True, False])
def test_a_plan_that_does_not_fit_is_not_compared(fits):
    words = ["model=gpt_4b", "cluster=h100_80g_node", "model.num_layers=8", "num_microbatches=8"]
    config = load_config([*words, *([] if fits else ["cluster.memory_gib=6"])])
    report = make_report(config)
    assert report.fits is fits
    assert rivals_of(config, report).seconds == (report.step_seconds if fits else None)
