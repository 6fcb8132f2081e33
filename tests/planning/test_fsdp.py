"""A step of FSDP is what a calculation by hand says: every second, every byte, every word."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from schedules.ir import Kind
from vp_train.config import ConfigError, CostConfig, ModelConfig
from vp_train.model import shape
from vp_train.planning import fsdp
from vp_train.planning.cluster import on_cluster
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import (
    computed_layer,
    exchanged_again,
    recomputed_seconds,
    tensor_seconds,
)
from vp_train.planning.fsdp import best_fsdp, fsdp_step, fsdp_words
from vp_train.planning.physics import Device, output_seconds
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

H100 = load_config(["model=nano", "cluster=h100_80g_node"])
MIB = 1 << 20


def cases(count):
    """Yield `count` workloads of odd sizes on slow and fast links."""
    draw = random.Random(7)
    for _ in range(count):
        tp, dp = draw.choice((1, 1, 2, 4)), draw.choice((1, 2, 3, 16, 48))
        heads = 8 * draw.randint(1, 3)
        model = ModelConfig(
            num_layers=draw.randint(1, 9),
            hidden_size=heads * draw.choice((16, 48)),
            num_heads=heads,
            num_query_groups=draw.choice((4, 8)),
            ffn_hidden_size=8 * draw.randint(9, 99),
            vocab_size=draw.choice((301, 7_001, 129_999)),
            seq_length=8 * draw.randint(3, 50),
            tied_embeddings=draw.random() < 0.4,
            activation=draw.choice(("gelu", "swiglu")),
        )
        cluster = replace(
            H100.cluster,
            num_nodes=-(-dp * tp // 8),
            node_bytes_per_second=10 ** draw.uniform(8, 13),
            network_bytes_per_second=10 ** draw.uniform(7, 12),
            contention=draw.choice((0.0, 0.37)),
            memory_bytes_per_second=1e12,
        )
        dtype, offload = draw.choice(("bfloat16", "float32")), draw.random() < 0.5
        optim = replace(H100.optim, name="zero1" if offload else "adamw", offload=offload)
        work = Workload(
            model,
            H100.vocab,
            Degrees(dp, 1, tp),
            tp > 1 and draw.random() < 0.8,
            num_microbatches=draw.randint(1, 5),
            micro_batch_size=draw.randint(1, 3),
            dtype=dtype,
            device="cuda",
        )
        yield work, cluster, optim, draw.choice(fsdp.RECOMPUTE)


def test_a_step_has_the_seconds_of_its_passes_and_of_what_they_do_not_hide():
    """A layer's pass lasts as long as its computation or the exchange beside it."""
    hidden = set()
    for work, cluster, optim, recompute in cases(60):
        found = fsdp_step(work, cluster, CostConfig(), optim, recompute=recompute)
        cost = on_cluster(work, cluster, CostConfig())
        dp, tp, count, layers = _sizes(work)
        rows = -(-work.model.vocab_size // tp)
        item, precise = (2, 4) if work.dtype == "bfloat16" else (4, 4)
        leaves = dp * tp > 8
        members = min(dp, 8 // tp) if leaves else 1
        rate = cluster.node_bytes_per_second
        if leaves:
            rate = members * cluster.network_bytes_per_second
            rate = min(rate, cluster.node_bytes_per_second) if members > 1 else rate
        fixed = (
            cluster.network_seconds + (-(-dp // members) - 1) * cluster.network_step_seconds
            if leaves
            else cluster.node_seconds
        )

        def moved(num_bytes, dp=dp, fixed=fixed, rate=rate):
            return 0.0 if dp == 1 else fixed + num_bytes * (dp - 1) / dp / rate

        of_layer, matrix = shape.layer_parameters(work.share), rows * work.model.hidden_size
        gather, scatter = moved(item * of_layer), moved(precise * of_layer)
        ends = moved(item * matrix), moved(precise * matrix)
        matrices = 1 if work.model.tied_embeddings else 2
        layer = computed_layer(work, cost)
        sums = tensor_seconds(work, cost, layer.weight_grad)
        tensor = sums[Kind.F], sums[Kind.B] + exchanged_again(work, cost, recompute)
        forward = layer.forward + tensor[0]
        backward = layer.input_grad + layer.weight_grad + tensor[1]
        backward += recomputed_seconds(work, cost, recompute)
        slower = max(1.0, cluster.layer_launch_seconds / (forward + backward))
        forward, backward = slower * forward, slower * backward
        head = output_seconds(
            Device.of(cost),
            work.num_tokens,
            work.model.hidden_size,
            rows,
            precise,
            logit_bytes=cost.logit_bytes,
        )
        passes = layers * (max(forward, gather) + max(backward, gather + scatter)) + head
        computed = layers * (forward + backward) + head
        exchanged = layers * (2 * gather + scatter) + matrices * sum(ends)
        at_once = min(computed, exchanged)
        slack = max(0.0, computed - layers * (2 * gather + scatter))
        behind = max(0.0, count * (matrices * sum(ends) - slack) - sum(ends))
        whole = count * (passes + cluster.contention * at_once) + sum(ends) + behind
        whole += min(gather, forward) + min(scatter, backward)
        parameters = layers * of_layer + matrices * matrix
        state = item + precise + (12 if item < precise else 8)
        moved_bytes = state + state - item - precise
        update = parameters / dp * moved_bytes / 1e12
        assert found.tensor == pytest.approx(count * layers * sum(tensor))
        assert found.exchange == pytest.approx(count * exchanged)
        assert found.compute == pytest.approx(
            count * (computed + cluster.contention * at_once) - found.tensor
        )
        assert found.optimizer == pytest.approx(update)
        assert found.seconds == pytest.approx(whole + update)
        assert found.mfu == pytest.approx(work.step_flops / (whole + update) / tp / 9.89e14) or (
            work.dtype == "float32"
            and found.mfu == pytest.approx(work.step_flops / (whole + update) / tp / 6.7e13)
        )
        hidden.add((gather < forward, gather + scatter < backward, slack > 0, behind > 0))
        assert (found.degrees, found.micro_batch_size) == (work.degrees, work.micro_batch_size)
        assert (found.num_microbatches, found.recompute) == (count, recompute)
        assert found.limit == 75 * 2**30
    assert len(hidden) >= 5, "what is hidden differs"


def _sizes(work):
    return work.degrees.dp, work.degrees.tp, work.num_microbatches, work.model.num_layers


def test_a_rank_has_the_bytes_of_its_part_and_of_what_is_whole_for_a_while():
    """Two layers, or a layer and a matrix.  A gated MLP forms one tensor of its width again."""
    where = set()
    for work, cluster, optim, recompute in cases(60):
        found = fsdp_step(work, cluster, CostConfig(), optim, recompute=recompute)
        dp, tp, _, layers = _sizes(work)
        rows, tokens, model = -(-work.model.vocab_size // tp), work.num_tokens, work.share
        item, precise = (2, 4) if work.dtype == "bfloat16" else (4, 4)
        of_layer, matrix = shape.layer_parameters(model), rows * model.hidden_size
        parameters = layers * of_layer + matrix * (1 if model.tied_embeddings else 2)
        held = parameters / dp * (item + precise + (12 if item < precise else 8))
        gathered = (of_layer + max(of_layer, matrix)) * (item + (precise if dp > 1 else 0))
        none, kept = (
            shape.layer_activation_bytes(
                model,
                work.micro_batch_size,
                item,
                on_cuda=True,
                recompute=kind,
                sequence_ranks=tp if work.sequence_parallel else 1,
            )
            for kind in ("none", recompute)
        )
        chunk = min(rows, 32_768, max(2_048, 128 * MIB // (precise * tokens)))
        head = tokens * (item * rows + precise * (chunk + 2 * model.hidden_size))
        wide = 4 if model.activation == "swiglu" else 1
        layer = item * tokens * (wide * model.ffn_hidden_size + 2 * model.hidden_size)
        layer += none if recompute == "full" else none - kept
        assert found.num_bytes == pytest.approx(held + gathered + layers * kept + max(head, layer))
        where.add((head > layer, of_layer > matrix))
    assert len(where) >= 3


@pytest.mark.parametrize("gpus_per_node", [8, 6])
def test_every_split_size_and_recomputation_is_tried_and_the_fastest_that_fits_wins(
    monkeypatch, gpus_per_node
):
    """The bytes of the best step are the limit itself; with a byte less another one wins."""
    config = load_config(
        [
            *("model=llama3_8b", "cluster=h100_80g_node", "model.num_layers=4"),
            *(f"cluster.gpus_per_node={gpus_per_node}", "model.num_query_groups=4"),
        ]
    )
    work = Workload.of(config, Degrees(config.cluster.num_gpus, 1, 1))
    tried, real = [], fsdp.fsdp_step

    def step(work, cluster, cost, optim, *, recompute):
        tried.append(real(work, cluster, cost, optim, recompute=recompute))
        return tried[-1]

    monkeypatch.setattr(fsdp, "fsdp_step", step)

    def best(cluster, work=work, cost=config.cost):
        tried.clear()
        return best_fsdp(work, cluster, cost, config.optim, num_sequences=72)

    found = best(config.cluster)
    expected = []
    for tp in (1, 2, 4):  # not 8: there are 4 groups of queries
        share, rest = divmod(72 * tp, gpus_per_node)
        if gpus_per_node % tp == 0 and rest == 0:
            expected += [
                (tp, size, kind)
                for size in range(1, share + 1)
                if share % size == 0 and size in (1, 2, 4, 8, 16, 32, share)
                for kind in ("none", "selective", "full")
            ]
    got = [(one.degrees.tp, one.micro_batch_size, one.recompute) for one in tried]
    assert sorted(got) == sorted(expected)
    every = list(tried)
    assert found == min((one for one in every if one.fits), key=lambda one: one.seconds)
    by_seconds = sorted(every, key=lambda one: one.seconds)
    for one in by_seconds[:: len(by_seconds) // 4]:
        exactly = replace(config.cluster, memory_gib=one.num_bytes / 2**30)
        assert best(exactly).seconds <= one.seconds
        less = replace(config.cluster, memory_gib=(one.num_bytes - 1) / 2**30)
        assert best(less).num_bytes < one.num_bytes or not best(less).fits
    small = best(replace(config.cluster, memory_gib=0.5))
    assert small.num_bytes == min(one.num_bytes for one in every)
    assert not small.fits
    assert best_fsdp(work, config.cluster, config.cost, config.optim, num_sequences=1) is None
    on_cpu = replace(work, device="cpu")
    assert best(config.cluster, on_cpu).degrees.tp == 1
    assert {one.degrees.tp for one in tried} == {1}
    whole = replace(work, model=replace(work.model, qk_norm=True, qk_norm_whole=True))
    best(config.cluster, whole)
    assert {one.degrees.tp for one in tried} == {1}
    seconds = {"layer_forward_seconds": 9.0, "measured_layer_flops": float(work.layer_flops)}
    rates = {"matrix_flops_per_second": 8e14, "attention_flops_per_second": 5e14}
    measured = CostConfig(**seconds, **rates, memory_bytes_per_second=3e12)
    rated = CostConfig(**rates, memory_bytes_per_second=3e12)
    assert best(config.cluster, cost=measured) == best(config.cluster, cost=rated)
    with pytest.raises(ConfigError):  # each of the rates counts, so all are needed
        best(config.cluster, cost=replace(rated, memory_bytes_per_second=None))


def test_a_tensor_parallel_degree_divides_all_widths_and_the_node():
    config = load_config(["model=llama3_8b", "cluster=h100_80g_node"])
    work = Workload.of(config, Degrees(8, 1, 1))
    widths = {"num_query_groups": 8, "ffn_hidden_size": 64, "seq_length": 64}
    model = replace(work.model, hidden_size=256, num_heads=8, **widths)
    for tp in (1, 2, 4, 8):
        for name in widths:
            value = tp if name == "num_query_groups" else 3 * tp
            odd = replace(work, model=replace(model, **{name: value}))
            wanted = [one for one in (1, 2, 4, 8) if tp % one == 0]
            assert fsdp._tensor_degrees(odd, config.cluster) == wanted, name
        node = replace(config.cluster, gpus_per_node=3 * tp)
        found = fsdp._tensor_degrees(replace(work, model=model), node)
        assert found == [one for one in (1, 2, 4, 8) if tp % one == 0]


def test_what_fsdp_takes_is_said_to_three_digits():
    work, cluster, optim, _ = next(cases(1))
    step = fsdp_step(work, cluster, CostConfig(), optim, recompute="selective")
    one = replace(
        step, compute=6.0, tensor=0.5, exposed=1.5, optimizer=2.0, num_bytes=3 * 2**30 + 2**29
    )
    rest = (
        f"3.50 GiB: dp={work.degrees.dp} x tp={work.degrees.tp}, micro-batch "
        f"{work.micro_batch_size}, recomputation selective, exposed communication 20.0%"
    )
    assert fsdp_words(one, 8.0) == f"10 s, 25.0% slower, {rest}"
    assert fsdp_words(one, 12.5) == f"10 s, 20.0% FASTER, {rest}"
    assert fsdp_words(replace(one, num_bytes=one.limit), 10.0).startswith("10 s, 0.0% FASTER, 75")
    large = replace(one, num_bytes=one.limit + 2**30)
    assert not large.fits
    assert fsdp_words(large, 8.0) == "does not fit: at least 76.00 GiB, more than 75 GiB"
    assert fsdp_words(None, 8.0) == "the batch does not divide over the GPUs"


def work_of(*words):
    config = load_config(["model=llama3_8b", "cluster=h100_80g_node", *words])
    return config, Workload.of(config, Degrees(config.cluster.num_gpus, 1, 1))


def test_one_gpu_of_fsdp_exchanges_nothing():
    config, work = work_of("cluster.gpus_per_node=1", "num_microbatches=4")
    found = fsdp_step(work, config.cluster, config.cost, config.optim, recompute="none")
    assert (found.exposed, found.exchange) == (0, 0)
    assert found.seconds == pytest.approx(found.compute + found.optimizer)


def test_fsdp_gathers_twice_and_scatters_once_per_microbatch():
    """A step takes as long as its exchange where links take all of the time."""
    slow = "cluster.node_bytes_per_second=1e9"
    config, work = work_of(slow, "cluster.node_seconds=0", "num_microbatches=3")
    found = fsdp_step(work, config.cluster, config.cost, config.optim, recompute="none")
    layers = 32 * shape.layer_parameters(work.model) * (2 + 2 + 4)
    ends = 2 * 128_256 * 4096 * (2 + 4)
    assert found.exchange == pytest.approx(3 * 7 / 8 * (layers + ends) / 1e9)
    rest = found.seconds - found.exchange
    assert 0 < rest < found.compute / 3, "the output layer, and layers at both ends of the step"


def test_a_step_of_fsdp_has_one_gather_and_one_scatter_that_nothing_hides():
    """Links are fast enough to hide all others; the number of microbatches does not matter."""
    found = []
    for count in (1, 8):
        config, work = work_of(f"num_microbatches={count}", "micro_batch_size=4")
        found.append(fsdp_step(work, config.cluster, config.cost, config.optim, recompute="none"))
    assert found[0].exposed == pytest.approx(found[1].exposed)
    assert 0 < found[0].exposed < 0.1 * found[0].exchange


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_tensor_parallel_ranks_of_fsdp_wait_longer_on_slow_links_and_compute_as_fast(recompute):
    config, work = work_of("cluster.contention=0", "num_microbatches=2")
    work = replace(work, degrees=Degrees(4, 1, 2), sequence_parallel=True)
    found = []
    for part in (1, 2):
        slower = config.cluster.node_bytes_per_second / part
        cluster = replace(config.cluster, node_bytes_per_second=slower)
        found.append(fsdp_step(work, cluster, config.cost, config.optim, recompute=recompute))
    fast, slow = found
    assert slow.compute == pytest.approx(fast.compute)
    assert 1.9 * fast.tensor < slow.tensor
    assert fast.seconds == fast.compute + fast.tensor + fast.exposed + fast.optimizer


@pytest.mark.parametrize(
    ("tp", "num_sequences", "sizes"),
    [
        *((1, 8 * 12, (1, 2, 4, 12)), (2, 4 * 12, (1, 2, 4, 12)), (1, 8, (1,)), (4, 2 * 7, (1, 7))),
        *((1, 9, ()), (1, 4, ())),  # a replica has no whole part of these
    ],
)
def test_a_replica_of_fsdp_takes_its_part_at_once_or_in_powers_of_two(tp, num_sequences, sizes):
    config, work = work_of()
    found = fsdp._microbatches(work, config.cluster, tp, num_sequences)
    assert tuple(one.micro_batch_size for one in found) == sizes
    for one in found:
        replicas = one.degrees.dp
        assert replicas * one.num_microbatches * one.micro_batch_size == num_sequences
        assert (one.degrees, one.sequence_parallel) == (Degrees(8 // tp, 1, tp), tp > 1)
