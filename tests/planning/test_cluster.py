"""Laws of the links that a split of the ranks uses, and of what messages then cost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from schedules.ir import Kind
from vp_train.config import ClusterConfig, ConfigError, CostConfig
from vp_train.config.cost import CPU_COSTS
from vp_train.model import shape
from vp_train.planning.cluster import (
    Link,
    assumed_costs,
    chosen_costs,
    gradient_seconds,
    known_peak_flops,
    links_of,
    on_cluster,
    on_cpu,
    peak_flops,
    replica_seconds,
    tied_seconds,
    with_rates,
)
from vp_train.planning.degrees import Degrees
from vp_train.planning.plan import plan_step
from vp_train.planning.report import make_report
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

TWO_NODES = ClusterConfig(num_nodes=2, gpus_per_node=8)
INSIDE, BETWEEN = "inside a node", "between nodes"


@pytest.mark.parametrize(
    ("degrees", "tensor", "pipeline", "data"),
    [
        (Degrees(dp=1, pp=16, tp=1), INSIDE, BETWEEN, INSIDE),
        (Degrees(dp=2, pp=8, tp=1), INSIDE, INSIDE, BETWEEN),
        (Degrees(dp=2, pp=1, tp=8), INSIDE, INSIDE, BETWEEN),
        (Degrees(dp=16, pp=1, tp=1), INSIDE, INSIDE, BETWEEN),
        (Degrees(dp=1, pp=1, tp=16), BETWEEN, BETWEEN, INSIDE),
        (Degrees(dp=4, pp=2, tp=2), INSIDE, INSIDE, BETWEEN),
        (Degrees(dp=1, pp=2, tp=8), INSIDE, BETWEEN, INSIDE),
    ],
)
def test_neighbours_share_a_node(degrees, tensor, pipeline, data):
    links = links_of(TWO_NODES, degrees)
    assert (links.tensor.where, links.pipeline.where, links.data.where) == (tensor, pipeline, data)


def test_a_group_leaves_its_node_exactly_if_two_of_its_ranks_are_on_two_nodes():
    for gpus, dp, pp, tp in itertools.product((1, 4, 6, 8), (1, 2, 3), (1, 2, 3, 8), (1, 2, 4, 16)):
        degrees = Degrees(dp=dp, pp=pp, tp=tp)
        if degrees.num_ranks % gpus:
            continue
        places = [degrees.place(rank) for rank in range(degrees.num_ranks)]
        links = links_of(ClusterConfig(degrees.num_ranks // gpus, gpus), degrees)
        for link, fixed in (
            (links.tensor, lambda d, p, t: (d, p)),
            (links.pipeline, lambda d, p, t: d),
            (links.data, lambda d, p, t: (p, t)),
        ):
            nodes = {}
            for rank, place in enumerate(places):
                nodes.setdefault(fixed(*place), set()).add(rank // gpus)
            leaves = any(len(found) > 1 for found in nodes.values())
            assert link.where == (BETWEEN if leaves else INSIDE), (gpus, degrees)


def test_a_collective_passes_its_fixed_time_along_a_tree():
    link = Link(INSIDE, 0.5, 1e9)
    assert [link.of_group(count) for count in (1, 2, 3, 4, 5, 8, 9)] == [0, 0.5, 1, 1, 1.5, 1.5, 2]
    config, _ = costed("cluster.node_seconds=0.5", "cluster.gpus_per_node=8", pp=4, tp=2)
    assert (
        config.cost.collective_seconds,
        config.cost.tensor_seconds,
        config.cost.hop_seconds,
    ) == (
        1.5,
        0.5,
        0.5,
    )


def costed(*overrides, **degrees):
    config = load_config(["model=nano", "num_microbatches=4", *overrides])
    split = Degrees(**{"dp": 1, "pp": 2, "tp": 1} | degrees)
    parallel = replace(config.parallel, pp=split.pp, tp=split.tp)
    placed = replace(config, cost=cluster_cost(config, split), parallel=parallel)
    return placed, plan_step(placed, split.num_ranks)


def cluster_cost(config, degrees):
    return on_cluster(Workload.of(config, degrees), config.cluster, config.cost)


def test_messages_take_their_bytes_through_the_link():
    cluster = ["cluster.node_seconds=0.001", "cluster.node_bytes_per_second=1000000"]
    _, step = costed(*cluster)
    message = 4 * 64 * 64  # fp32, 64 tokens of 64 values
    assert step.cost.hop_seconds == pytest.approx(0.001 + message / 1e6)
    assert step.cost.barrier_seconds == pytest.approx(
        {
            "CE": 0.001 + message / 2 / 1e6,
            "C0": 0.001 + message / 1e6,
            "C1": 0.001 + 3 * 4 * 64 / 1e6,
            "C1b": 0.001 + message / 1e6,
            "CG": 0.001 + message / 2 / 1e6,
        }
    )


def hiding_seconds(step):
    """Return the seconds of the products dW of a stage that run beside a collective."""
    qkv, _, up, _ = shape.linear_parameters(step.work.share)
    whole = sum(shape.linear_parameters(step.work.share))
    return step.cost.pass_seconds[Kind.W][0] * (qkv + up) / whole


def test_tensor_parallel_ranks_share_the_work_and_add_two_sums_each_way():
    """The product dW of the same layer hides a part of a sum, unless W is a pass of its own."""
    cluster = ["cluster.node_seconds=0.001", "cluster.node_bytes_per_second=1000000"]
    _, one = costed(*cluster)
    _, two = costed(*cluster, tp=2)
    one_sum = 0.001 + 4 * 64 * 64 / 1e6
    hidden = hiding_seconds(two)
    for kind, sums, less in ((Kind.F, 2, 0.0), (Kind.B, 2, hidden), (Kind.I, 2, 0), (Kind.W, 0, 0)):
        for before, after in zip(
            one.cost.pass_seconds[kind], two.cost.pass_seconds[kind], strict=True
        ):
            assert after == pytest.approx(
                before / 2 + 2 * sums * one_sum - less
            )  # two layers in each stage
    for kind in (Kind.S, Kind.T):
        assert two.cost.pass_seconds[kind] == pytest.approx(
            [seconds / 2 for seconds in one.cost.pass_seconds[kind]]
        )
    assert all(
        after < before
        for before, after in zip(one.cost.stage_bytes, two.cost.stage_bytes, strict=True)
    )
    assert two.cost.barrier_seconds["C1"] > one.cost.barrier_seconds["C1"]


def test_tensor_parallel_ranks_of_one_stage_divide_an_unsharded_vocabulary_inside_their_node():
    """The network, which their pipeline crosses, is nothing to them; else all ranks meet there."""
    words = ["cluster.num_nodes=2", "cluster.gpus_per_node=2", "cluster.network_seconds=0.5"]
    words += ["cluster.node_seconds=0.001", "cluster.node_bytes_per_second=1000000"]
    _, alone = costed(*words, "vocab.algorithm=none", tp=2)
    _, sharded = costed(*words, tp=2)
    assert set(alone.cost.barrier_seconds) == {"CE", "C0", "C1", "C1b", "CG"}
    assert alone.cost.barrier_seconds["C1"] == pytest.approx(0.001 + 3 * 4 * 64 / 1e6)
    assert min(sharded.cost.barrier_seconds.values()) > 0.5


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_split_sequences_are_gathered_once_more_in_the_backward(schedule):
    """Two inputs per layer are all-gathered, each for half an all-reduce.  W has them already.

    The products dx hide a part of that.
    """
    common = [
        "run.device=cuda",
        "cluster.node_seconds=0.001",
        "cluster.node_bytes_per_second=1000000",
        f"schedule={schedule}",
    ]
    _, whole = costed(*common, tp=2)
    _, split = costed(*common, "parallel.sequence_parallel=true", tp=2)
    one_sum, hidden = 0.001 + 4 * 64 * 64 / 1e6, hiding_seconds(split)
    for kind, sums in ((Kind.F, 0), (Kind.B, 1), (Kind.I, 1), (Kind.W, 0)):
        for before, after in zip(
            whole.cost.pass_seconds[kind], split.cost.pass_seconds[kind], strict=True
        ):
            expected = sums * (2 * one_sum - hidden)  # two layers in each stage
            assert after - before == pytest.approx(expected)


@pytest.mark.parametrize("degrees", [Degrees(1, 1, 1), Degrees(2, 4, 1), Degrees(1, 4, 2)])
def test_a_lookup_reads_and_writes_the_part_of_a_rank_and_its_gradient_twice_as_much(degrees):
    config = load_config(["cluster.memory_bytes_per_second=1e9", "micro_batch_size=3"])
    cost = cluster_cost(config, degrees)
    part = 4 * 3 * config.model.seq_length * config.model.hidden_size / degrees.pp / degrees.tp
    assert cost.lookup_seconds == pytest.approx(2 * part / 1e9)
    assert cost.lookup_grad_seconds == pytest.approx(4 * part / 1e9)


@pytest.mark.parametrize(
    ("vocab", "degrees", "beside"),
    [
        ("one_barrier", {"pp": 2}, True),
        ("one_barrier", {"pp": 2, "tp": 2}, True),
        ("none", {"pp": 2}, False),  # nothing runs beside the passes
        ("one_barrier", {"pp": 1}, False),
    ],
)
def test_contention_slows_what_stages_compute_beside_the_barriers_and_nothing_else(
    vocab, degrees, beside
):
    words = [f"vocab.algorithm={vocab}", "parallel.recompute=selective", "cluster.contention=0"]
    (_, free), (_, slowed) = (
        costed(*words, f"cost.contention={part}", **degrees) for part in ("0.001", "0.251")
    )
    alone = costed(*words, "cost.contention=0.001", "vocab.algorithm=none", **degrees)[1].cost
    for kind in Kind:
        pairs = zip(free.cost.pass_seconds[kind], slowed.cost.pass_seconds[kind], strict=True)
        for place, (before, after) in enumerate(pairs):
            added = 0.0
            if beside and not kind.is_vocabulary:
                computed = (before - alone.pass_seconds[kind][place]) / 0.001
                added = 0.25 * computed
                assert computed > 0
            assert after == pytest.approx(before + added), kind
    assert slowed.cost.barrier_seconds == free.cost.barrier_seconds
    assert slowed.cost.hop_seconds == free.cost.hop_seconds


def test_measured_pass_times_stay():
    config = load_config(["cost=a100_4b", "cluster=a100_80g_node", "run.dtype=float16"])
    cost = cluster_cost(config, Degrees(1, 8, 1))
    assert cost.layer_forward_seconds == config.cost.layer_forward_seconds
    step = plan_step(replace(config, cost=cost), 8)
    assert step.cost.hop_seconds == pytest.approx(348.5e-6)  # as published, bytes included


@pytest.mark.parametrize(
    ("optimizer", "offload", "bytes_per_value"),
    [("adamw", "false", 2 * 4), ("zero1", "false", 4 + 2), ("zero1", "true", 2 * 4 + 2)],
)
def test_the_gradient_sum_moves_each_value_as_often_as_a_ring_does(
    optimizer, offload, bytes_per_value
):
    common = [
        "run.dtype=bfloat16",
        f"optim.name={optimizer}",
        f"optim.offload={offload}",
        "cluster.node_seconds=0",
    ]
    config = load_config(common)

    def seconds(cluster, degrees):
        found = replica_seconds(Workload.of(config, degrees), cluster, config.optim, 10**9)
        return found.sums + found.gathers

    found = seconds(config.cluster, Degrees(4, 1, 1))
    assert found == pytest.approx(
        3 / 4 * bytes_per_value * 1e9 / config.cluster.node_bytes_per_second
    )
    assert seconds(config.cluster, Degrees(1, 4, 1)) == 0
    work = Workload.of(config, Degrees(4, 1, 1))
    apart = replace(config.optim, overlap_sums=False, overlap_gathers=False)
    for optim, least in ((apart, found), (config.optim, found if offload == "true" else 0)):
        assert gradient_seconds(work, config.cluster, optim, 10**9) == pytest.approx(least)


@pytest.mark.parametrize(
    ("overrides", "summed"),
    [
        (["vocab=none"], True),
        (["vocab=none", "schedule=v_half"], False),  # both ends are on rank 0
        (["vocab=one_barrier"], False),
        (["vocab=none", "model.tied_embeddings=false"], False),
    ],
    ids=["two ranks", "one rank", "sharded", "untied"],
)
def test_a_tied_matrix_at_both_ends_has_its_gradient_summed_over_them(overrides, summed):
    common = [
        "model.tied_embeddings=true",
        "model.num_layers=4",
        "run.dtype=bfloat16",
        "cluster.node_seconds=0.5",
        *overrides,
    ]
    config, step = costed("cluster.node_bytes_per_second=1e6", *common, tp=2)
    expected = 0.5 + 4 * 4096 * 64 / 2 / 1e6 if summed else 0
    given = step.work, config.cluster, config.optim, step.problem
    assert tied_seconds(*given) == pytest.approx(expected)
    replicated = replace(step.work, degrees=replace(step.work.degrees, dp=3))
    for name, parts in (("adamw", 1), ("zero1", 3)):  # a replica sums what it owns
        found = tied_seconds(
            replicated, config.cluster, replace(config.optim, name=name), step.problem
        )
        assert found == pytest.approx(0.5 + (expected - 0.5) / parts if summed else 0)
    found = make_report(replace(config, cluster=replace(config.cluster, gpus_per_node=4)))
    assert found.gradients == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus_per_node": 0}, "cluster.gpus_per_node=0 is too small"),
        ({"efficiency": 1.5}, "cluster.efficiency=1.5 is out of range"),
        ({"memory_gib": 0.0}, "cluster.memory_gib=0.0 is too small"),
        ({"sustained": 0.0}, "cluster.sustained=0.0 is too small"),
        ({"oversubscription": 0.5}, "cluster.oversubscription=0.5 is too small"),
        (
            {"node_bytes_per_second": float("nan")},
            "cluster.node_bytes_per_second=nan is not a finite number",
        ),
    ],
)
def test_a_cluster_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig(**values)


@pytest.mark.parametrize(
    ("dtype", "sum_dtype", "times"),
    [("bfloat16", "float32", 2), ("bfloat16", "compute", 1), ("float32", "float32", 1)],
)
def test_the_sum_of_dx_moves_the_bytes_of_its_dtype(dtype, sum_dtype, times):
    words = [
        "cluster.node_seconds=0.0",
        "cluster.node_bytes_per_second=1000000",
        f"run.dtype={dtype}",
        f"vocab.sum_dtype={sum_dtype}",
    ]
    _, step = costed(*words)
    assert step.cost.barrier_seconds["C1b"] == pytest.approx(
        times * step.cost.barrier_seconds["C0"]
    )


def test_tensor_parallel_ranks_share_the_bytes_of_a_hop_and_gather_them():
    cluster = ["cluster.node_seconds=0.001", "cluster.node_bytes_per_second=1000000"]
    message = 4 * 64 * 64
    _, step = costed(*cluster, tp=2)
    gathered = (0.001 + 2 * message / 2 / 1e6) / 2
    assert step.cost.hop_seconds == pytest.approx(0.001 + message / 2 / 1e6 + gathered)
    _, split = costed(*cluster, "parallel.sequence_parallel=true", "run.device=cuda", tp=2)
    assert split.cost.hop_seconds == pytest.approx(0.001 + message / 2 / 1e6)


def test_a_run_on_gpus_is_planned_with_the_costs_of_its_cluster_unless_others_are_chosen():
    words = ["model=gpt_4b", "cluster=h100_80g_node", "parallel.pp=8", "num_microbatches=16"]
    config = load_config(words)
    step, cost = plan_step(config, 8), cluster_cost(config, Degrees(1, 8, 1))
    assert step.cost == plan_step(replace(config, cost=cost), 8).cost
    assert 0.1 < step.timeline.makespan < 1  # seconds, of eight H100
    assert plan_step(load_config([*words, "run.device=cpu"]), 8).timeline.makespan > 100
    chosen = load_config([*words, "cost.flops_per_second=1e12"])
    assert plan_step(chosen, 8).timeline.makespan > 10
    assert plan_step(chosen, 8).cost.hop_seconds == step.cost.hop_seconds
    slow = load_config([*words, "cost.rank_slowness=[1,1,1,1,1,1,1,2]"])
    assert step.timeline.makespan < plan_step(slow, 8).timeline.makespan < 1


def test_a_ring_of_replicas_uses_the_ports_of_all_its_ranks_in_a_node():
    """Bandwidth of a gather in multiples of that of a port, by replicas of one pipeline rank."""
    nodes = ClusterConfig(
        num_nodes=4, gpus_per_node=8, node_bytes_per_second=6e9, network_bytes_per_second=1e9
    )
    for degrees, ports, passed in (
        (Degrees(32, 1, 1), 6, 4),  # the links inside a node are slower than its eight ports
        (Degrees(8, 2, 2), 2, 4),
        (Degrees(4, 1, 8), 1, 4),
        (Degrees(2, 2, 8), 1, 2),
    ):
        link = links_of(nodes, degrees).data
        assert (link.bytes_per_second, link.num_nodes) == (ports * 1e9, passed)
    shared = replace(nodes, rails=2)
    assert links_of(shared, Degrees(4, 1, 8)).data.bytes_per_second == pytest.approx(0.25e9)
    pods = replace(nodes, pod_nodes=2, oversubscription=4.0)
    # Beyond a pod of two nodes only one of them sends, so a ring has twice its part of the uplink.
    assert links_of(pods, Degrees(4, 1, 8)).data.bytes_per_second == pytest.approx(0.5e9)
    assert links_of(pods, Degrees(2, 2, 8)).data.bytes_per_second == pytest.approx(0.25e9)
    wide = replace(pods, num_nodes=64, pod_nodes=16)
    for degrees, part in (
        (Degrees(64, 1, 8), 1),
        (Degrees(8, 8, 8), 0.5),
        (Degrees(4, 16, 8), 0.25),
    ):
        assert links_of(wide, degrees).data.bytes_per_second == pytest.approx(part * 1e9), degrees
    assert links_of(pods, Degrees(2, 1, 16)).tensor.bytes_per_second == pytest.approx(6e9)


def test_a_gather_passes_one_node_after_the_other():
    link = Link(BETWEEN, 0.5, 1e9, num_nodes=5, step_seconds=0.25)
    assert link.gather(1e9, 10) == pytest.approx(0.5 + 4 * 0.25 + 0.9)
    assert link.gather(1e9, 1) == 0


def test_all_that_is_left_open_follows_from_the_cluster_and_what_is_chosen_stays():
    cluster = replace(
        load_config(["cluster=h100_80g_node"]).cluster,
        num_nodes=4,
        host_node_bytes_per_second=2e11,
        sustained=0.5,
        efficiency=0.75,
        attention_efficiency=0.25,
    )
    config = load_config(["model=nano", "run.dtype=bfloat16", "micro_batch_size=3"])
    work = Workload.of(config, Degrees(4, 4, 2))
    found = on_cluster(work, cluster, CostConfig())
    message = 2 * 3 * 64 * 64
    rates = {
        "matrix_flops_per_second": 9.89e14 * 0.5 * 0.75,
        "attention_flops_per_second": 9.89e14 * 0.5 * 0.25,
        "memory_bytes_per_second": 2.8e12 * 0.5,
        "kernel_seconds": 3e-6,
        "multiprocessors": 132,
    }
    expected = {
        "flops_per_second": 9.89e14 * 0.75,
        "hop_seconds": 1e-5,
        "hop_bytes_per_second": 3.5e11,
        "collective_seconds": 3 * 1e-5,
        "collective_bytes_per_second": 3.5e11,
        "host_bytes_per_second": 2e11 / 8,
        "tensor_seconds": 1e-5,
        "tensor_bytes_per_second": 3.5e11,
        "lookup_seconds": 2 * message / 8 / 2.8e12,
        "lookup_grad_seconds": 4 * message / 8 / 2.8e12,
        "layer_launch_seconds": 3.2e-3,
        "contention": 0.061,
    }
    assert chosen_costs(found).keys() - CPU_COSTS.keys() <= expected.keys() | rates.keys()
    for name, value in (expected | rates).items():
        assert getattr(found, name) == pytest.approx(value), name
    alone = with_rates(CostConfig(), cluster, "bfloat16", alone=True)
    assert alone.matrix_flops_per_second == pytest.approx(9.89e14 * 0.75)
    assert alone.memory_bytes_per_second == 2.8e12
    for name in expected | rates:
        changed = on_cluster(work, cluster, CostConfig(**{name: 7}))
        assert getattr(changed, name) == 7, name
        for other, before in expected.items():
            assert other == name or getattr(changed, other) == pytest.approx(before), (name, other)
    # One rate for all FLOPs, measured seconds, and rates that were measured replace those of parts.
    typed = ("flops_per_second", "measured_layer_flops", "matrix_flops_per_second")
    for name in typed:
        changed = on_cluster(work, cluster, CostConfig(**{name: 7.0}))
        assert changed.attention_flops_per_second is None, name
    plain = on_cluster(work, replace(cluster, multiprocessors=0), CostConfig())
    assert plain.matrix_flops_per_second is None
    assert on_cpu(CostConfig(hop_seconds=3.0)) == replace(CostConfig(**CPU_COSTS), hop_seconds=3.0)
    assert assumed_costs(work, cluster, CostConfig()) == on_cpu(CostConfig())
    assert assumed_costs(replace(work, device="cuda"), cluster, CostConfig()) == found


def test_a_peak_is_known_if_it_is_not_the_default():
    cluster = ClusterConfig(bfloat16_flops_per_second=5e14)
    assert peak_flops(cluster, "bfloat16") == known_peak_flops(cluster, "bfloat16") == 5e14
    assert known_peak_flops(cluster, "float32") is None
    assert peak_flops(cluster, "float64") == 5e10
