"""The plan is pure, puts layers and rows where they belong, and predicts what it promises."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from schedules.generators import GENERATORS
from schedules.ir import Kind
from schedules.layout import Layout
from schedules.torch_csv import to_csv
from schedules.vocab import VOCAB_ALGORITHMS, End
from tests.pipeline.equivalence import config_of
from vp_train.config import (
    ClusterConfig,
    ConfigError,
    CostConfig,
    ParallelConfig,
    RunConfig,
    RunSettings,
    ScheduleConfig,
    VocabConfig,
)
from vp_train.model import shape
from vp_train.planning.cluster import assumed_costs, tied_on_two_ranks, tied_seconds
from vp_train.planning.estimate import _FLOAT8_SPEED
from vp_train.planning.memory import step_peak
from vp_train.planning.placement import redistribute, split_layers
from vp_train.planning.plan import make_plan, plan_step


@pytest.mark.parametrize(
    ("num_layers", "layout", "head", "expected"),
    [
        (32, Layout("linear", 8), 0.0, (4,) * 8),  # nothing to make room for
        (32, Layout("linear", 8), 6.25, (4, 5, 5, 5, 5, 4, 4, 0)),
        (32, Layout("v", 4, 2), 6.25, (4, 5, 5, 5, 5, 4, 4, 0)),
        (32, Layout("loop", 4, 2), 6.25, (4, 4, 4, 5, 5, 5, 5, 0)),
        (32, Layout("loop", 2, 4), 1.5625, (4, 4, 4, 4, 4, 4, 5, 3)),
        (8, Layout("linear", 4), 2.0, (2, 3, 2, 1)),
        (6, Layout("linear", 3), 100.0, (3, 3, 0)),
        (5, Layout("linear", 1), 2.0, (5,)),
    ],
)
def test_redistribution_makes_the_slowest_stage_as_fast_as_possible(
    num_layers, layout, head, expected
):
    counts, num_stages = redistribute(num_layers, layout, head), layout.num_stages
    assert sum(counts) == num_layers
    slowest = max(*counts[:-1], counts[-1] + head) if num_stages > 1 else counts[0]
    best = min(
        max(-(-(num_layers - k) // max(1, num_stages - 1)), k + head) for k in range(num_layers + 1)
    )
    assert slowest == (best if num_stages > 1 else num_layers)
    assert counts == expected


def test_layers_are_split_evenly_or_as_given():
    model = config_of(4, 1, 100, layers=(3, 2, 0, 1)).model
    given = split_layers(model, ParallelConfig(layers_per_stage=(3, 2, 0, 1)), Layout("linear", 4))
    assert given == (range(3), range(3, 5), range(5, 5), range(5, 6))


def test_without_sharding_the_end_ranks_own_the_whole_vocabulary():
    plan = make_plan(config_of(3, 4, 101, vocab=VocabConfig("none")), 3)
    assert [shard.num_rows for shard in plan.shards[End.INPUT]] == [101, 0, 0]
    assert [shard.num_rows for shard in plan.shards[End.OUTPUT]] == [0, 0, 101]


def test_every_rank_computes_the_same_plan():
    config = config_of(4, 8, 1000)
    first, second = make_plan(config, 4), make_plan(config, 4)
    assert first.program == second.program
    assert first.schedule == second.schedule


def test_vocabulary_passes_balance_the_predicted_work():
    plan = make_plan(config_of(4, 8, 1000), 4)
    busy = [plan.timeline.busy(rank) for rank in range(4)]
    assert max(busy) == pytest.approx(min(busy))


def test_recomputing_logits_holds_fewer_bytes_and_takes_a_fourth_product():
    shards = {
        "chunked": VocabConfig(),
        "half": VocabConfig(backend="recompute", recompute_fraction=0.5),
    }
    kept, half = (
        plan_step(config_of(2, 4, 100, vocab=vocab, backend=vocab.backend), 2).cost
        for vocab in shards.values()
    )
    x_bytes = 2 * 6 * 16 * 8  # b s H float64
    assert [2 * (value - x_bytes) for value in half.shard_bytes] == [
        value - x_bytes for value in kept.shard_bytes
    ]
    both = [sum(cost.pass_seconds[kind][0] for kind in (Kind.S, Kind.T)) for cost in (kept, half)]
    assert both[1] == pytest.approx(both[0] * 3.5 / 3)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_seven_layers_run_on_four_ranks_with_every_schedule(name):
    config = config_of(4, 6, 400, schedule=name, num_stages=7)
    with pytest.raises(
        ConfigError, match=r"does not split over \d stages; use .*parallel.placement=balanced"
    ):
        make_plan(config, 4)
    plan = make_plan(replace(config, parallel=ParallelConfig(placement="balanced")), 4)
    assert sorted(sum(map(len, layers)) for layers in plan.layers_of_ranks) == [1, 2, 2, 2]
    assert [layer for stage in plan.layers for layer in stage] == list(range(7))


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 6])
@pytest.mark.parametrize("m", [4, 12])
def test_interleaving_divides_fill_and_drain_by_the_chunks(num_chunks, m):
    free = CostConfig(
        hop_seconds=0,
        collective_seconds=0,
        layer_forward_seconds=1,
        layer_backward_seconds=2,
        output_row_seconds=0,
    )
    config = config_of(4, m, 100, vocab=VocabConfig("none"), num_stages=24)
    plan = make_plan(
        replace(config, schedule=ScheduleConfig("interleaved", num_chunks), cost=free), 4
    )
    assert [len(layers) for layers in plan.layers_of_ranks] == [num_chunks] * 4
    assert plan.timeline.makespan == pytest.approx(6 * 3 * (m + 3 / num_chunks))


@pytest.mark.parametrize(("name", "num_chunks"), [("1f1b", 2), ("v_half", 3), ("zb_v", 1)])
def test_chunks_that_a_schedule_cannot_have_are_named(name, num_chunks):
    config = replace(config_of(4, 4, 100, num_stages=24), schedule=ScheduleConfig(name, num_chunks))
    with pytest.raises(
        ConfigError,
        match=rf"schedule.num_chunks={num_chunks} with schedule.name={name}: .*chunk\(s\) per rank",
    ):
        make_plan(config, 4)


def solved(p=3, m=6, *, vocab="one_barrier", micro_batch_size=2, **cap):
    """Return the configuration of a searched step, whose layers split over V layouts too."""
    config = config_of(p, m, 400, vocab=VocabConfig(vocab), num_stages=2 * p)
    return replace(
        config, schedule=ScheduleConfig("auto", **cap), micro_batch_size=micro_batch_size
    )


def microbatch_bytes(plan):
    return sum(plan.cost.stage_bytes) / plan.num_ranks


@pytest.mark.parametrize("cap", [None, 2.25, 4.0])
def test_a_searched_plan_keeps_its_cap_and_is_never_slower_than_a_named_one_that_does(
    quick_search, cap
):
    plan = make_plan(solved(cap_microbatches=cap), 3)
    named = plan_step(replace(solved(), schedule=ScheduleConfig("1f1b")), 3).cost
    fullest = max((4 - rank) * named.stage_bytes[rank] for rank in range(3))
    most = fullest + 2 * max(plan.cost.shard_bytes) if cap is None else cap * microbatch_bytes(plan)
    assert plan.caps == (pytest.approx(most),) * 3
    assert max(plan.timeline.peak_bytes) <= most * (1 + 1e-9)
    assert plan == make_plan(solved(cap_microbatches=cap), 3)
    for name in GENERATORS:
        named = plan_step(replace(solved(), schedule=ScheduleConfig(name)), 3).timeline
        assert max(named.peak_bytes) > most or plan.timeline.makespan <= named.makespan * (1 + 1e-9)


@pytest.mark.parametrize("vocab", ["none", "one_barrier", "two_barrier"])
def test_without_a_cap_1f1b_takes_part_whatever_stage_keeps_most(quick_search, vocab):
    """The first stage also keeps what is embedded, so it keeps more than the mean of all."""
    config = solved(4, 12, vocab=vocab)
    named = plan_step(replace(config, schedule=ScheduleConfig("1f1b")), 4)
    plan = plan_step(config, 4)
    assert len(set(named.cost.stage_bytes)) > 1
    assert max(named.timeline.peak_bytes) <= plan.caps[0] * (1 + 1e-9)
    assert plan.timeline.makespan <= named.timeline.makespan * (1 + 1e-9)


@pytest.mark.parametrize("vocab", ["none", "auto"])
def test_a_searched_step_counts_what_two_ranks_take_to_sum_a_tied_matrix(quick_search, vocab):
    """The passes are faster with two copies, as rank 0 is slow, and over a slow link one is."""
    config = solved(2, 6, vocab=vocab)
    config = replace(
        config,
        model=replace(config.model, tied_embeddings=True),
        run=replace(config.run, device="cuda"),
        cost=CostConfig(hop_seconds=0.0, hop_bytes_per_second=1e15, rank_slowness=(3.0, 1.0)),
    )

    def step_on(bytes_per_second):
        cluster = ClusterConfig(gpus_per_node=2, node_bytes_per_second=bytes_per_second)
        return plan_step(replace(config, cluster=cluster), 2), cluster

    (fast, _), (slow, link) = step_on(1e15), step_on(1e3)
    assert tied_on_two_ranks(fast.problem, fast.work.model)
    assert not tied_on_two_ranks(slow.problem, slow.work.model)
    summed = tied_seconds(slow.work, link, config.optim, fast.problem)
    assert 0 < slow.timeline.makespan - fast.timeline.makespan < summed


def test_without_a_cap_it_is_what_1f1b_keeps_on_the_rank_with_most(quick_search):
    """The last rank has most layers, and fewer microbatches in flight than the first."""
    config = config_of(4, 12, 400, vocab=VocabConfig("one_barrier"), num_stages=8)
    uneven = replace(config.parallel, layers_per_stage=(1, 1, 1, 5))
    config = replace(config, parallel=uneven, micro_batch_size=2)
    named = plan_step(replace(config, schedule=ScheduleConfig("1f1b")), 4)
    plan = plan_step(replace(config, schedule=ScheduleConfig("auto")), 4)
    most = max(named.timeline.peak_bytes)
    assert most <= plan.caps[0] <= most + 2 * max(named.cost.shard_bytes)


def test_without_a_cap_a_search_never_refuses(quick_search, monkeypatch):
    """The plan then uses the peak of the best order as its cap, however low the default cap is."""
    monkeypatch.setattr("vp_train.planning.plan._cap_bytes", lambda *_: 1.0)
    plan = plan_step(solved(), 3)
    assert max(plan.timeline.peak_bytes) == pytest.approx(plan.caps[0])
    assert len(set(plan.caps)) == 1
    with pytest.raises(ConfigError, match="is too low"):
        plan_step(solved(cap_microbatches=2.0), 3)


def test_a_cap_in_gib_is_the_same_cap(quick_search):
    plan = plan_step(solved(cap_microbatches=2.25), 3)
    gib = 2.25 * microbatch_bytes(plan) / 2**30
    assert plan_step(solved(cap_gib=gib), 3).schedule == plan.schedule


NUMBER = r"(\d[\d.e+-]*\d|\d)"


@pytest.mark.parametrize(
    ("setting", "low", "micro_batch_size"),
    [
        ("cap_microbatches", 0.5, 2),
        ("cap_gib", 0.01, 10_000),
        ("cap_gib", 1.0, 4_100_000),
        ("cap_gib", 1e-6, 2),
        ("cap_gib", 1e-6, 1),
    ],
)
def test_a_cap_that_is_too_low_is_refused_and_the_advice_holds(
    quick_search, setting, low, micro_batch_size
):
    def planned(cap):
        return plan_step(solved(micro_batch_size=micro_batch_size, **{setting: cap}), 3)

    with pytest.raises(ConfigError) as caught:
        planned(low)
    found = re.match(
        rf"schedule.{setting}={NUMBER} is too low: a single microbatch keeps {NUMBER} "
        r"(GiB|times the layers of a microbatch) on rank (\d), and no schedule less.  "
        rf"Set schedule.{setting} to {NUMBER} or more(, or use a smaller micro_batch_size)?$",
        str(caught.value),
    )
    assert found, caught.value
    cap, reached, advised = (float(found[group]) for group in (1, 2, 5))
    assert cap == low < reached
    assert reached * 0.999 <= advised <= reached * 1.001, "the least that works"
    assert bool(found[6]) is (setting == "cap_gib" and micro_batch_size > 1)
    plan = planned(advised)
    unit = microbatch_bytes(plan) if setting == "cap_microbatches" else 2**30
    assert max(plan.timeline.peak_bytes) <= advised * unit
    with pytest.raises(ConfigError, match="is too low"):
        planned(0.99 * reached)


def test_the_algorithm_that_suits_the_costs_is_found(quick_search):
    slow = replace(solved(vocab="auto"), cost=CostConfig(collective_seconds=1.0))
    assert plan_step(slow, 3).problem.algorithm.name == "none"  # which has none
    quick = replace(
        solved(vocab="auto"),
        cost=CostConfig(collective_seconds=0.0, hop_seconds=0.0, output_row_seconds=1e-6),
    )
    best = plan_step(quick, 3)
    assert best.problem.algorithm.sharded
    for name in ("none", "one_barrier", "two_barrier"):
        single = plan_step(replace(quick, vocab=VocabConfig(name)), 3)
        assert best.timeline.makespan <= single.timeline.makespan * 1.01


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            config_of(3, 2, 400, vocab=VocabConfig("auto")),
            "vocab.algorithm=auto needs schedule=auto; with another schedule choose one of none, ",
        ),
        (
            replace(solved(), parallel=ParallelConfig(pp=4)),
            "parallel.pp=4 needs a multiple of 4 ranks, but 3 were started",
        ),
        (
            replace(solved(), cost=CostConfig(rank_slowness=(1, 1))),
            "has 2 values; give one for each of the 3 ranks",
        ),
        (
            replace(solved(), model=replace(solved().model, num_layers=7)),
            "model.num_layers=7 does not split over 3 stages",
        ),
    ],
)
def test_what_cannot_be_searched_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        plan_step(config, 3)


def from_file(config, path):
    return replace(config, schedule=ScheduleConfig(file=str(path)))


@pytest.mark.parametrize("name", [*sorted(GENERATORS), "auto"])
@pytest.mark.parametrize("p", [1, 3])
def test_a_plan_can_be_read_back(quick_search, tmp_path, name, p):
    config = replace(
        solved(p), schedule=ScheduleConfig(name, cap_microbatches=3.0 if name == "auto" else None)
    )
    plan = make_plan(config, p)
    path = tmp_path / "schedule.txt"
    path.write_text(plan.schedule.text())
    again = make_plan(from_file(config, path), p)
    assert again.schedule == plan.schedule
    assert again.timeline.compute == plan.timeline.compute
    assert again.timeline.peak_bytes == plan.timeline.peak_bytes
    assert again.program == plan.program


@pytest.mark.parametrize("name", ["order.csv", "order.CSV", "order.txt"])
def test_marks_and_blank_lines_of_editors_do_no_harm(tmp_path, name):
    plan = plan_step(config_of(2, 3, 100), 2)
    text = plan.schedule.text() if name == "order.txt" else to_csv(plan.schedule)
    (tmp_path / name).write_text(
        f"{text}\n\n" if name == "order.txt" else text, encoding="utf-8-sig"
    )
    found = plan_step(from_file(config_of(2, 3, 100), tmp_path / name), 2)
    assert found.problem == plan.problem


def test_an_order_by_hand_is_run_as_written(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n0E0 0E1 0F0 0F1 0B1 0B0 0G0 0G1\n1F0 1F1 1S1 1T1 1B1 1S0 1T0 1B0\n")
    plan = make_plan(from_file(config_of(2, 2, 100, vocab=VocabConfig("none")), path), 2)
    assert plan.schedule.text() == path.read_text()


def stage_order(schedule, *without):
    return [
        [item for item in order if not item.kind.is_vocabulary and item.kind not in without]
        for order in schedule.ranks
    ]


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize("algorithm", ["none", "one_barrier"])
def test_a_csv_keeps_its_order_and_gets_the_vocabulary(tmp_path, name, algorithm):
    config = replace(solved(vocab=algorithm), schedule=ScheduleConfig(name))
    named = plan_step(replace(config, vocab=VocabConfig("none")), 3).schedule
    path = tmp_path / "order.csv"
    path.write_text(to_csv(named))
    plan = make_plan(from_file(config, path), 3)
    assert plan.schedule.name == "order"
    assert stage_order(plan.schedule, Kind.W) == stage_order(named, Kind.W)
    if not GENERATORS[name].split_backward:
        assert to_csv(plan.schedule) == path.read_text()
    shards = 3 if VOCAB_ALGORITHMS[algorithm].sharded else 1
    for kind in (Kind.S, Kind.T, Kind.E, Kind.G):
        assert sum(item.kind is kind for _, item in plan.schedule.passes()) == shards * 6


ORDER = "# mine\n0E0 0F0 0B0 0G0\n1F0 1S0 1T0 1B0\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "", "a schedule starts with a line '# name'"),
        ("x.txt", "# mine\n", "it has no passes"),
        ("x.txt", ORDER.replace("1S0", "1Q0"), "line 3: '1Q0' is not a pass"),
        ("x.txt", ORDER.replace("1S0 ", ""), r"rank 1 never runs 1S0 \(1 pass missing\)"),
        ("x.txt", ORDER.replace("0F0 ", ""), r"rank 0 never runs 0F0 \(1 pass missing\)"),
        ("x.txt", ORDER.replace("1S0", "1S0 1S0"), "rank 1 runs 1S0 2 times"),
        (
            "x.txt",
            ORDER.replace("1F0", "1F0 1F1"),
            "rank 1 runs 1F1, which is not among its passes",
        ),
        (
            "x.txt",
            ORDER.replace("1T0 1B0", "1B0 1T0 1W0"),
            "rank 1 runs 1W0, which is not among its passes",
        ),
        ("x.txt", ORDER.replace("1F0 1S0", "1S0 1F0"), "deadlock: .*1F0 waits for 1S0"),
        (
            "x.txt",
            ORDER.replace("0F0 0B0", "0F0").replace("1F0", "0B0 1F0"),
            "rank 1 runs 0B0, but rank 0 has other passes of stage 0; every stage has one rank",
        ),
        ("x.txt", ORDER + "2F0 2B0\n", "it is for 3 pipeline ranks, not 2; use parallel.pp=3"),
        ("x.txt", ORDER.replace("0E0 ", "").replace("0F0", "0F9999"), "is not among its passes"),
        ("x.csv", "0F0,0B0\n", "it is for 1 pipeline rank, not 2; use parallel.pp=1"),
        ("x.csv", "0F0,0B0\n1F0,1Q0\n", "line 2, column 2: '1Q0' is not a pass"),
        ("x.csv", "0F0,0B0\n1F0\n", "rank 1 never runs 1B0"),
        ("x.csv", "0F0,0B0\n1F0,1F1,1B0,1B1\n", "rank 1 runs 1F1"),
        (
            "x.csv",
            "0B0,0F0\n1F0,1B0\n",
            "deadlock: 0B0 waits for 0F0 waits for 0B0; 0B0, 0F0 on rank 0",
        ),
        ("x.csv", "0F0,0B0\n1F0,1S0,1B0\n", "'1S0' is a vocabulary pass"),
        ("x.csv", "", "has no rows"),
        ("x.csv", ORDER, "is not a pass"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        plan_step(from_file(config_of(2, 1, 100, vocab=VocabConfig("none")), path), 2)
    assert str(caught.value).startswith(f"schedule.file={path} does not fit this run: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_microbatches": 5}, "it is for 6 microbatches, not 5; use num_microbatches=6"),
        ({"num_microbatches": 7}, "it is for 6 microbatches, not 7; use num_microbatches=6"),
        (
            {"parallel": ParallelConfig(layers_per_stage=(3, 3))},
            "parallel.layers_per_stage=.* it needs 3 counts",
        ),
    ],
)
@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_a_plan_of_another_run_is_refused(tmp_path, name, change, message):
    path = tmp_path / "schedule.txt"
    path.write_text(plan_step(replace(solved(), schedule=ScheduleConfig(name)), 3).schedule.text())
    with pytest.raises(ConfigError, match=message):
        plan_step(replace(from_file(solved(), path), **change), 3)


@pytest.mark.parametrize("suffix", ["txt", "csv"])
@pytest.mark.parametrize("used", VOCAB_ALGORITHMS.values(), ids=lambda one: one.name)
@pytest.mark.parametrize("stored", VOCAB_ALGORITHMS.values(), ids=lambda one: one.name)
def test_a_plan_of_another_vocabulary_names_those_that_fit(tmp_path, stored, used, suffix):
    config = replace(solved(vocab=stored.name), schedule=ScheduleConfig("1f1b"))
    schedule, path = plan_step(config, 3).schedule, tmp_path / f"schedule.{suffix}"
    path.write_text(schedule.text() if suffix == "txt" else to_csv(schedule))
    again = replace(from_file(config, path), vocab=VocabConfig(used.name))
    if used.sharded == stored.sharded or suffix == "csv":  # which has no vocabulary passes
        plan_step(again, 3)
        return
    with pytest.raises(ConfigError, match=f"but vocab={used.name} ") as raised:
        plan_step(again, 3)
    names = str(raised.value).rpartition("; use vocab=")[2].split(" or ")
    assert stored.name in names
    for name in names:
        plan_step(replace(again, vocab=VocabConfig(name)), 3)


def test_a_file_that_holds_no_text_is_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for path, reason in (
        (tmp_path / "nowhere.txt", "is not there"),
        (tmp_path, "is a directory, not a file"),
        (tmp_path / "binary.txt", r"is not text in UTF-8 \(byte 0\)"),
        (Path("/dev/zero"), "is a device, a pipe or a socket, not a file"),
    ):
        with pytest.raises(
            ConfigError, match=rf"^schedule.file={path} {reason}; vp-simulate --out DIR writes"
        ):
            plan_step(from_file(config_of(2, 1, 100), path), 2)


def test_the_name_of_a_stored_schedule_is_printable_and_short(tmp_path):
    path, step = tmp_path / "x.txt", plan_step(config_of(2, 1, 100), 2)
    path.write_text(replace(step.schedule, name="\x1b[31m" + "a" * 1_000_000).text())
    name = plan_step(from_file(config_of(2, 1, 100), path), 2).schedule.name
    assert name == "\\x1b[31m" + "a" * 192


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"num_microbatches": 65_536, "parallel": ParallelConfig(pp=8)},
            "num_microbatches: 65,536",
        ),
        (
            {"run": RunSettings(eval_microbatches=65_536), "parallel": ParallelConfig(pp=8)},
            "run.eval_microbatches: 65,536",
        ),
    ],
)
def test_a_step_of_too_many_passes_is_refused_before_it_is_ordered(overrides, message):
    config = replace(RunConfig(), **overrides)
    with pytest.raises(ConfigError, match=f"{message} microbatches on 8 stages are more than 131"):
        make_plan(config, 8)


@pytest.mark.parametrize(
    ("tp", "seq_length", "device", "message"),
    [
        (
            1,
            6,
            "cuda",
            "parallel.sequence_parallel=true has nothing to split over with parallel.tp=1",
        ),
        (
            2,
            7,
            "cuda",
            "model.seq_length=7 does not split over parallel.tp=2; drop parallel.sequence_parallel",
        ),
        (2, 6, "cpu", "parallel.sequence_parallel=true needs run.device=cuda, not cpu"),
    ],
)
def test_sequences_that_cannot_be_split_are_refused(tp, seq_length, device, message):
    config = config_of(2, 4, 100, tp=tp)
    config = replace(
        config,
        model=replace(config.model, seq_length=seq_length),
        parallel=replace(config.parallel, sequence_parallel=True),
        run=replace(config.run, device=device),
    )
    with pytest.raises(ConfigError, match=message):
        plan_step(config, 2 * tp)


def test_a_norm_over_all_heads_is_refused_with_tensor_parallelism():
    config = config_of(2, 4, 100, tp=2)
    model = replace(config.model, qk_norm=True, qk_norm_whole=True)
    with pytest.raises(ConfigError, match="qk_norm_whole=true does not go with parallel"):
        plan_step(replace(config, model=model), 4)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("split_backward", [False, True])
def test_products_of_float8_are_faster_in_f_and_i_alone_and_weights_are_kept_twice(
    split_backward, recompute
):
    """dW, attention and the vocabulary stay as they are, and so does what a layer keeps."""
    config = config_of(2, 4, 100, schedule="zb_h1" if split_backward else "1f1b")
    config = replace(
        config,
        model=replace(config.model, ffn_hidden_size=32, head_size=16),
        parallel=replace(config.parallel, recompute=recompute),
        run=replace(config.run, dtype="bfloat16", device="cuda"),
    )
    before = plan_step(config, 2)
    after = plan_step(replace(config, run=replace(config.run, linear_dtype="float8")), 2)
    rate = assumed_costs(before.work, config.cluster, config.cost).flops_per_second
    saved = before.work.linear_flops / rate * (1 - 1 / _FLOAT8_SPEED)
    kinds = {Kind.F: saved, Kind.S: 0.0, Kind.T: 0.0}
    *others, down = shape.linear_parameters(config.model)
    repeated = sum(others) / (sum(others) + down)
    again = saved * repeated if recompute == "full" else 0.0
    kinds |= {Kind.I: saved + again, Kind.W: 0.0} if split_backward else {Kind.B: saved + again}
    for kind, seconds in kinds.items():
        for index, (was, now) in enumerate(
            zip(before.cost.pass_seconds[kind], after.cost.pass_seconds[kind], strict=True)
        ):
            layers = 1 if kind.is_vocabulary else len(before.layers[index])
            assert was - now == pytest.approx(layers * seconds), kind
    assert before.cost.stage_bytes == after.cost.stage_bytes
    (*_, was), (*_, now) = (step_peak(step, config.optim, 0) for step in (before, after))
    matrices = shape.layer_matrix_parameters(before.work.share)
    assert now - was == 2 * matrices * len(before.layers[0])


def test_splitting_sequences_takes_norms_and_inputs_of_layers_off_every_rank():
    config = config_of(2, 4, 100, tp=2)
    config = replace(config, run=replace(config.run, device="cuda"))
    whole, split = (
        replace(config, parallel=replace(config.parallel, sequence_parallel=value))
        for value in (False, True)
    )
    before, after = (plan_step(config, 4).work.layer_bytes("none") for config in (whole, split))
    tokens, hidden = 2 * 6, 16
    assert before - after == tokens * (8 * 2 * hidden + 2 * (8 * hidden + 8)) // 2


def test_recomputation_may_be_given_for_every_stage():
    config = config_of(3, 4, 100)
    one = replace(
        config, parallel=replace(config.parallel, recompute_per_stage=("full", "none", "selective"))
    )
    kept, plain = plan_step(one, 3).cost, plan_step(config, 3).cost
    assert kept.stage_bytes[0] < kept.stage_bytes[2] < plain.stage_bytes[2]
    assert kept.stage_bytes[1] == plain.stage_bytes[1]
    repeated = shape.recomputed_part(config.model, "full") * plain.pass_seconds[Kind.F][0]
    assert kept.pass_seconds[Kind.B][0] == pytest.approx(plain.pass_seconds[Kind.B][0] + repeated)
    assert (
        plain.pass_seconds[Kind.B][2] < kept.pass_seconds[Kind.B][2] < kept.pass_seconds[Kind.B][0]
    )
    short = replace(config, parallel=replace(config.parallel, recompute_per_stage=("full", "none")))
    with pytest.raises(
        ConfigError, match="recompute_per_stage has 2 values, but the model has 3 stages"
    ):
        plan_step(short, 3)
