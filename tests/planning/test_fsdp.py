"""A step of FSDP is what a calculation by hand says: every second and every byte."""

from __future__ import annotations

import itertools
import math
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
from vp_train.planning.fsdp import ON_GPUS, Means, best_fsdp, fsdp_step
from vp_train.planning.physics import Device, output_seconds
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

H100 = load_config(["model=nano", "cluster=h100_80g_node"])
MIB = 1 << 20


def cases(count):
    """Yield `count` workloads of odd sizes on slow and fast links, and what they do for memory."""
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
            host_bytes_per_second=3e10,
            host_memory_bytes_per_second=7e10,
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
        number, recompute = draw.randint(0, model.num_layers), draw.choice(fsdp.RECOMPUTE)
        yield (
            work,
            cluster,
            optim,
            {
                "recompute": recompute,
                "num_recomputed": draw.choice((None, number)),
                "num_offloaded": draw.choice((0, 0, draw.randint(0, model.num_layers))),
            },
        )


def recomputes(work, how):
    """Return how many layers recompute."""
    layers, number = work.model.num_layers, how["num_recomputed"]
    return 0 if how["recompute"] == "none" else layers if number is None else number


def test_a_step_has_the_seconds_of_its_passes_and_of_what_they_do_not_hide():
    """A layer's pass lasts as long as its computation or the exchange beside it."""
    hidden = set()
    for work, cluster, optim, how in cases(80):
        found = fsdp_step(work, cluster, CostConfig(), optim, **how)
        recomputed, recompute = recomputes(work, how), how["recompute"]
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
        kinds = [recompute] * recomputed + ["none"] * (layers - recomputed)
        tensor, seconds = 0.0, []
        for kind in kinds:
            again = exchanged_again(work, cost, kind)
            tensor += sums[Kind.F] + sums[Kind.B] + again
            forward = layer.forward + sums[Kind.F]
            backward = layer.input_grad + layer.weight_grad + sums[Kind.B] + again
            backward += recomputed_seconds(work, cost, kind)
            slower = max(1.0, cluster.layer_launch_seconds / (forward + backward))
            seconds.append((slower * forward, slower * backward))
        head = output_seconds(
            Device.of(cost),
            work.num_tokens,
            work.model.hidden_size,
            rows,
            precise,
            logit_bytes=cost.logit_bytes,
        )
        passes = sum(max(f, gather) + max(b, gather + scatter) for f, b in seconds) + head
        computed = sum(map(sum, seconds)) + head
        exchanged = layers * (2 * gather + scatter) + matrices * sum(ends)
        at_once = min(computed, exchanged)
        slack = max(0.0, computed - layers * (2 * gather + scatter))
        behind = max(0.0, count * (matrices * sum(ends) - slack) - sum(ends))
        whole = count * (passes + cluster.contention * at_once) + sum(ends) + behind
        forward, backward = seconds[0]
        whole += min(gather, forward) + min(scatter, backward)
        parameters = layers * of_layer + matrices * matrix
        state = item + precise + (12 if item < precise else 8)
        moved_bytes = state + state - item - precise
        update = parameters / dp * moved_bytes / 1e12
        if optim.offload:
            of_host = (item + precise) / 3e10 + (item + 7 * precise) / 7e10
            update = parameters / dp * of_host
        assert found.tensor == pytest.approx(count * tensor)
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
        assert (found.num_microbatches, found.num_recomputed) == (count, recomputed)
        assert found.recompute == (recompute if recomputed else "none")
        assert found.limit == 75 * 2**30
    assert len(hidden) >= 5, "what is hidden differs"


def _sizes(work):
    return work.degrees.dp, work.degrees.tp, work.num_microbatches, work.model.num_layers


def test_a_rank_has_the_bytes_of_its_part_and_of_what_is_whole_for_a_while():
    """Two layers, or a layer and a matrix.  A gated MLP forms one tensor of its width again."""
    where = set()
    for work, cluster, optim, how in cases(80):
        found = fsdp_step(work, cluster, CostConfig(), optim, **how)
        dp, tp, _, layers = _sizes(work)
        rows, tokens, model = -(-work.model.vocab_size // tp), work.num_tokens, work.share
        item, precise = (2, 4) if work.dtype == "bfloat16" else (4, 4)
        of_layer, matrix = shape.layer_parameters(model), rows * model.hidden_size
        parameters = layers * of_layer + matrix * (1 if model.tied_embeddings else 2)
        optimizer = 0 if optim.offload else 12 if item < precise else 8
        held = parameters / dp * (item + precise + optimizer)
        gathered = (of_layer + max(of_layer, matrix)) * (item + (precise if dp > 1 else 0))
        recompute, recomputed = how["recompute"], recomputes(work, how)
        kinds = [recompute] * recomputed + ["none"] * (layers - recomputed)
        kept = [kept_bytes(work, kind) for kind in kinds]
        chunk = min(rows, 32_768, max(2_048, 128 * MIB // (precise * tokens)))
        head = tokens * (item * rows + precise * (chunk + 2 * model.hidden_size))
        away = how["num_offloaded"]
        everything, peaks = sum(kept[away:]), [head + sum(kept[away:])]
        for number, kind in enumerate(kinds, 1):  # backwards of later layers have freed theirs
            wide = 4 if model.activation == "swiglu" else 1
            layer = item * tokens * (wide * model.ffn_hidden_size + 2 * model.hidden_size)
            none = kept_bytes(work, "none")
            layer += none if kind == "full" else none - kept[number - 1]
            peaks.append(min(everything, sum(kept[:number])) + layer)
        assert found.num_bytes == pytest.approx(held + gathered + max(peaks))
        blocks = sum(-(-size // (8 * MIB)) * 8 * MIB for size in kept[:away])
        if optim.offload:
            blocks += parameters / dp * (4 * precise + item)
        assert found.host_bytes == pytest.approx(blocks)
        where.add((peaks.index(max(peaks)) > 0, of_layer > matrix))
    assert len(where) >= 3


def kept_bytes(work, kind):
    return shape.layer_activation_bytes(
        work.share,
        work.micro_batch_size,
        work.item_bytes,
        on_cuda=True,
        recompute=kind,
        sequence_ranks=work.sequence_ranks,
    )


def test_no_pass_waits_for_what_the_best_step_offloads_and_little_more_would_be_late():
    """Copies go out in the order of the layers and come back in reverse, into freed room."""
    late_with_more, waited = 0, []
    for number, (work, _, optim, how) in enumerate(cases(200)):
        layers, recompute = work.model.num_layers, how["recompute"]
        memory = fsdp._Memory.of(work, optim, recompute)
        recomputed, pass_seconds = recomputes(work, how), 1e-3
        rate = memory.large / pass_seconds / (0.2 + 0.1 * (number % 30))
        sizes = [memory.small] * recomputed + [memory.large] * (layers - recomputed)
        most = memory.most_offloaded(recomputed, pass_seconds, rate, math.inf)
        assert most <= max(0, layers - 2)
        assert not delay(sizes[:most], layers, pass_seconds, rate)
        late_with_more += bool(delay(sizes[: most + 2], layers, pass_seconds, rate))
        waited.append(most)
        room = memory.host(recomputed, most) - memory.host_optimizer
        assert memory.most_offloaded(recomputed, pass_seconds, rate, room) == most
        less = memory.most_offloaded(recomputed, pass_seconds, rate, room - 1)
        assert less < most or not room
    assert late_with_more > 100
    assert len(set(waited)) > 5


def delay(sizes, layers, seconds, rate):
    """Return by how much copies of the first layers are late: the output layer, or backwards."""
    sizes, free = sizes[:layers], 0.0
    for layer, size in enumerate(sizes, 1):
        free = max(free, layer * seconds) + size / rate
    late = [free - layers * seconds]
    free = 0.0  # since the first backward, that of the last layer
    for layer in range(len(sizes), 0, -1):
        freed = (len(sizes) - layer + 1) * seconds
        free = max(free, freed) + sizes[layer - 1] / rate
        late.append(free - (layers - layer) * seconds)
    return max(0.0, *late) if max(late) > 1e-9 * seconds else 0.0


@pytest.mark.parametrize("gpus_per_node", [8, 6])
def test_every_way_to_save_memory_is_tried_and_the_fastest_that_fits_wins(
    monkeypatch, gpus_per_node
):
    """The bytes of the best step are the limit itself; with a byte less another one wins."""
    config = load_config(
        [
            *("model=llama3_8b", "cluster=h100_80g_node", "model.num_layers=4"),
            *(f"cluster.gpus_per_node={gpus_per_node}", "model.num_query_groups=4"),
            *("cluster.host_bytes_per_second=1e12", "cost.contention=0"),
        ]
    )
    work = Workload.of(config, Degrees(config.cluster.num_gpus, 1, 1))
    tried, real = [], fsdp._step

    def step(*given):
        tried.append(real(*given))
        return tried[-1]

    monkeypatch.setattr(fsdp, "_step", step)

    def best(cluster, work=work, cost=config.cost, **how):
        tried.clear()
        return best_fsdp(work, cluster, cost, config.optim, num_sequences=24, **how)

    every = []
    for tp in (1, 2, 4):  # not 8: there are 4 groups of queries
        share, rest = divmod(24 * tp, gpus_per_node)
        if gpus_per_node % tp or rest:
            continue
        sizes = {size for size in (1, 2, 4, 8, 16, share) if share % size == 0}
        for size, offload, kind in itertools.product(sizes, (False, True), fsdp.RECOMPUTE):
            split = replace(
                work,
                degrees=Degrees(gpus_per_node // tp, 1, tp),
                sequence_parallel=tp > 1,
                micro_batch_size=size,
                num_microbatches=share // size,
            )
            optim = replace(config.optim, name="zero1", offload=offload)
            costs = on_cluster(split, config.cluster, config.cost)
            for recomputed, offloaded in itertools.product(
                range(5 if kind != "none" else 1), range(3)
            ):
                given = split, config.cluster, costs, optim, kind
                every.append(real(*given, recomputed, offloaded))
    found = best(config.cluster)
    assert found.seconds == min(one.seconds for one in every if one.fits)
    by_bytes = sorted(every, key=lambda one: one.num_bytes)
    used = set()
    for one in by_bytes[:: len(by_bytes) // 5]:
        for num_bytes in (one.num_bytes, one.num_bytes - 1):
            cluster = replace(config.cluster, memory_gib=num_bytes / 2**30)
            fitting = [other for other in every if other.num_bytes <= num_bytes]
            found = best(cluster)
            assert found.fits == bool(fitting)
            if not fitting:
                assert found.num_bytes == by_bytes[0].num_bytes
                continue
            assert found.seconds == min(other.seconds for other in fitting)
            same = [other for other in fitting if other.seconds == found.seconds]
            assert found.num_offloaded == min(other.num_offloaded for other in same)
            alone = best(cluster, means=ON_GPUS)
            assert alone == best(replace(cluster, host_memory_gib=0))
            assert alone == best(replace(cluster, host_memory_gib=None), means=ON_GPUS)
            assert (alone.num_offloaded, alone.offloads_optimizer) == (0, False)
            for means in (Means(True, False), Means(False, True)):  # each alone
                allowed = [
                    other
                    for other in fitting
                    if (other.num_offloaded == 0 or means.activations)
                    and (means.optimizer or not other.offloads_optimizer)
                ]
                if allowed:
                    seconds = min(other.seconds for other in allowed)
                    assert best(cluster, means=means).seconds == seconds
                    if not alone.fits or alone.seconds > seconds:  # so it helps
                        used.add(means)
            used.add((found.num_offloaded > 0, found.offloads_optimizer))
            used.add(0 < alone.num_recomputed < 4)
    assert {True, False, (True, False), (True, True), (False, False)} <= used
    assert Means(True, False) in used
    assert (Means(False, True) in used) is (gpus_per_node == 8)
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
