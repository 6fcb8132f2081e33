"""The exchange between replicas that passes do not hide, against queues of messages."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate

import pytest

from schedules.ir import Kind
from schedules.vocab import End
from vp_train.model import shape
from vp_train.planning.cluster import replica_seconds
from vp_train.planning.overlap import ReplicaExchange, _lateness, _Run, _runs, _sums_end, exchange
from vp_train.planning.plan import plan_step
from vp_train.settings import load_config

WORDS = ["model=nano", "parallel.pp=2", "parallel.dp=2", "num_microbatches=3", "model.num_layers=8"]


def planned(*words):
    config = load_config([*WORDS, *words])
    return config, plan_step(config, 4)


def drawn_runs(draw):
    """Return parameters that passes complete and read at any times, some of them at the same."""
    found = []
    for _ in range(draw.randint(1, 5)):
        begins, reads = draw.uniform(0, 9), draw.choice((0.0, draw.uniform(0, 9)))
        ends, reads_end = begins + draw.choice((0.0, 2.0)), reads + draw.uniform(0, 3)
        count = draw.randint(1, 4)
        found.append(_Run(1_000 * draw.randint(1, 99), count, begins, ends, reads, reads_end))
    return found


def queue(ready, seconds):
    """Return when each of some messages ends, if they are sent one after the other.

    It is when one before it was ready, and the seconds of all from that one on.
    """
    return [
        max(ready[first] + sum(seconds[first : last + 1]) for first in range(last + 1))
        for last in range(len(ready))
    ]


@pytest.mark.parametrize("name", ["adamw", "zero1"])
def test_buckets_are_summed_and_gathered_one_after_the_other(name):
    draw = random.Random(3)
    config, step = planned(f"optim.name={name}", "cluster.node_bytes_per_second=1e5")
    late = set()
    for _ in range(60):
        runs = drawn_runs(draw)
        config_of = config.cluster, config.optim
        one = {
            run: replica_seconds(step.work, *config_of, run.parameters / run.buckets)
            for run in runs
        }
        parts = [
            (run.begins + (run.ends - run.begins) * part / run.buckets, one[run].sums)
            for run in runs
            for part in range(1, run.buckets + 1)
        ]
        ready, seconds = zip(*sorted(parts), strict=True)
        assert _sums_end(step, *config_of, runs) == pytest.approx(queue(ready, seconds)[-1])
        update = draw.uniform(0.1, 2.0)
        buckets = [
            (run, part)
            for run in sorted(runs, key=lambda run: run.reads)
            for part in range(run.buckets)
        ]
        total = sum(run.parameters for run in runs)
        updated = accumulate(update * run.parameters / run.buckets / total for run, _ in buckets)
        ends = queue([when - update for when in updated], [one[run].gathers for run, _ in buckets])
        needed = [
            run.reads + (run.reads_end - run.reads) * part / run.buckets for run, part in buckets
        ]
        waits = [end - when for end, when in zip(ends, needed, strict=True)]
        found = _lateness(step, *config_of, runs, update)
        assert found == pytest.approx(max(0.0, *waits))
        late.add(found > 1e-9)
    assert late == ({True, False} if name == "zero1" else {False})
    assert _lateness(step, *config_of, [], 1.0) == 0


@pytest.mark.parametrize(
    ("schedule", "tied", "vocab"),
    [
        ("1f1b parallel.layers_per_stage=[8,0]", False, "one_barrier"),
        *(("1f1b", True, "none"), ("1f1b", False, "none"), ("zb_h1", True, "one_barrier")),
        *(("v_half", True, "none"), ("v_half", False, "one_barrier")),
    ],
)
def test_a_run_of_parameters_lasts_from_its_last_backward_to_its_first_reader(
    schedule, tied, vocab
):
    """A stage without layers has none."""
    words = [*f"schedule={schedule}".split(), f"vocab={vocab}", f"model.tied_embeddings={tied}"]
    config, step = planned(*words, "model.hidden_size=80", "optim.bucket_mib=1")
    model, last_kind = config.model, Kind.W if step.problem.split_backward else Kind.B
    for rank in range(2):
        spans, expected = step.timeline.compute[rank], []

        def when(kind, index, spans=spans):
            return [s for s in spans if (Kind(s.kind), s.stage) == (kind, index)]

        groups = [(End.INPUT,), (End.OUTPUT,)] if not tied else [(End.INPUT, End.OUTPUT)]
        for ends in groups:
            rows = max(step.shards[end][rank].num_rows for end in ends)
            kinds = {End.INPUT: (Kind.G, Kind.E), End.OUTPUT: (Kind.T, Kind.S)}
            done = [s.end for end in ends for s in when(kinds[end][0], rank)]
            read = [s.start for end in ends for s in when(kinds[end][1], rank)]
            if rows:
                complete, first = max(done), min(read)
                expected.append(_Run(80 * rows, 1, complete, complete, first, first))
        for stage in step.problem.layout.stages_of(rank):
            held = len(step.layers[stage]) * shape.layer_parameters(model)
            if not held:
                continue
            wanted = -(-4 * held // 2**20)
            count = min(2 * len(step.layers[stage]), max(8, wanted))
            done, read = when(last_kind, stage)[-1], when(Kind.F, stage)[0]
            expected.append(_Run(held, count, done.start, done.end, read.start, read.end))
        assert _runs(step, config.optim, rank) == expected


def test_a_bucket_is_a_part_of_a_stage_unless_that_is_too_large():
    """Eight buckets, as many as the size needs if that is more, two for each layer at most."""
    found = {}
    for layers, bucket in ((2, 64), (16, 64), (16, 1), (16, 2)):
        words = [f"model.num_layers={2 * layers}", f"optim.bucket_mib={bucket}"]
        config, step = planned(*words, "model.hidden_size=256", "model.ffn_hidden_size=320")
        *_, run = _runs(step, config.optim, 0)
        found[layers, bucket] = run.buckets
        held = layers * shape.layer_parameters(config.model) * 4 / 2**20
    assert held > 16
    assert found == {
        (2, 64): 4,
        (16, 64): 8,
        (16, 1): min(32, int(-(-held // 1))),
        (16, 2): int(-(-held // 2)),
    }


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("gathers", [True, False])
def test_what_is_exposed_is_the_latest_rank_or_all_where_nothing_overlaps(sums, gathers):
    config, step = planned("optim.name=zero1", "cluster.node_bytes_per_second=3e6")
    optim = replace(config.optim, overlap_sums=sums, overlap_gathers=gathers)
    parameters, updates = [400_000, 300_000], [0.5, 0.25]
    whole = [replica_seconds(step.work, config.cluster, optim, count) for count in parameters]
    found = exchange(step, config.cluster, optim, parameters, updates)
    runs = [_runs(step, optim, rank) for rank in range(2)]
    ends = [_sums_end(step, config.cluster, optim, one) for one in runs]
    late = [
        _lateness(step, config.cluster, optim, one, update)
        for one, update in zip(runs, updates, strict=True)
    ]
    assert found.sums == whole[0].sums > whole[1].sums
    assert found.gathers == whole[0].gathers
    assert found.exposed_sums == (max(ends) - step.timeline.makespan if sums else found.sums)
    assert found.exposed_gathers == (max(late) if gathers else found.gathers)
    assert found.exposed == found.exposed_sums + found.exposed_gathers
    assert found.exposed_sums > 0
    assert found.exposed_gathers > 0
    fast = replace(config.cluster, node_bytes_per_second=1e18, node_seconds=0.0)
    nothing = exchange(step, fast, replace(optim, overlap_sums=True), parameters, updates)
    assert nothing.exposed_sums == pytest.approx(0, abs=1e-9)
    there = replace(optim, offload=True)
    sums_there = replica_seconds(step.work, config.cluster, there, 400_000)
    assert exchange(step, config.cluster, there, parameters, updates) == ReplicaExchange(
        *(sums_there.sums, sums_there.gathers) * 2
    )
