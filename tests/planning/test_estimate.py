"""The seconds and bytes of passes are sums of those of layers, products and messages, by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from schedules.ir import Kind
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS, End
from vp_train.config import ConfigError, CostConfig, ModelConfig, VocabConfig
from vp_train.model import shape
from vp_train.planning import estimate
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import (
    computed_layer,
    estimate_cost,
    exchanged_again,
    exposed_tensor_seconds,
    layer_pass_seconds,
    link_seconds,
    measured_layers,
    rank_slowness,
    row_seconds,
    sum_seconds,
    tensor_seconds,
)
from vp_train.planning.physics import Device, output_seconds
from vp_train.planning.workload import Workload
from vp_train.vocab.shard import split_rows

LINK = {
    "hop_seconds": 0.5,
    "hop_bytes_per_second": 1e6,
    "collective_seconds": 0.25,
    "collective_bytes_per_second": 2e6,
    "tensor_seconds": 0.125,
    "tensor_bytes_per_second": 4e6,
    "host_bytes_per_second": 8e6,
}
RATES = {
    "matrix_flops_per_second": 3e11,
    "attention_flops_per_second": 1e11,
    "memory_bytes_per_second": 1e9,
    "kernel_seconds": 1e-3,
    "multiprocessors": 4,
}
MEASURED = {
    "layer_forward_seconds": 1.5,
    "layer_backward_seconds": 3.5,
    "layer_input_grad_seconds": 2.25,
    "layer_weight_grad_seconds": 1.75,
    "lookup_seconds": 0.5,
    "lookup_grad_seconds": 0.75,
    "output_row_seconds": 1e-3,
    "output_fixed_seconds": 2.0,
}
ITEM = {"bfloat16": 2, "float32": 4, "float64": 8}


def work_of(draw=None, **changes):
    """Return a workload of odd sizes, drawn where it is not given."""
    draw = draw or random.Random(0)
    tp = draw.choice((1, 2, 4))
    model = ModelConfig(
        num_layers=8,
        hidden_size=64,
        num_heads=8,
        num_query_groups=4,
        ffn_hidden_size=4 * draw.randint(9, 50),
        vocab_size=draw.randint(50, 900),
        seq_length=8 * draw.randint(1, 4),
        activation=draw.choice(("gelu", "swiglu")),
        post_norms=draw.random() < 0.5,
        positions=draw.choice(("rope", "learned")),
    )
    backend = draw.choice(("chunked", "recompute", "reference"))
    fraction = 0.25 if backend == "recompute" else 1.0
    vocab = VocabConfig(
        backend=backend,
        recompute_fraction=fraction,
        sum_dtype=draw.choice(("float32", "compute")),
    )
    settings = {
        "model": model,
        "vocab": vocab,
        "degrees": Degrees(draw.choice((1, 3)), 3, tp),
        "sequence_parallel": tp > 1 and draw.random() < 0.5,
        "num_microbatches": 2,
        "micro_batch_size": draw.randint(1, 3),
        "dtype": draw.choice(tuple(ITEM)),
        "device": "cuda",
    }
    return Workload(**settings | changes)


def cases(count):
    """Yield workloads, costs, problems, and the layers, rows and recomputation of each."""
    draw = random.Random(11)
    for index in range(count):
        work = work_of(draw)
        cost = CostConfig(**LINK, **(RATES if index % 2 else {"flops_per_second": 2e11}))
        if index % 3 == 0:
            cost = replace(cost, **MEASURED)
        if index % 4 == 0:
            cost = replace(cost, rank_slowness=(1.0, 2.0, 1.25))
        cost = replace(cost, contention=draw.choice((None, 0.5)))
        split = draw.random() < 0.5
        layout = draw.choice((Layout("linear", 3), Layout("v", 3, 2)))
        problem = Problem(layout, 2, VOCAB_ALGORITHMS[draw.choice(sorted(VOCAB_ALGORITHMS))], split)
        counts = [draw.randint(0, 3) for _ in range(layout.num_stages)]
        starts = [sum(counts[:stage]) for stage in range(layout.num_stages)]
        sharded = problem.algorithm.sharded
        rows = [draw.randint(0, 99) if sharded else 0 for _ in range(3)]
        rows[layout.rank_of(layout.num_stages - 1)] = 100
        shards = split_rows(sum(rows), 3, rows)
        yield (
            work,
            cost,
            problem,
            {
                "layers": [range(s, s + c) for s, c in zip(starts, counts, strict=True)],
                "recompute": [draw.choice(("none", "selective", "full")) for _ in counts],
                "shards": dict.fromkeys(End, shards),
                "offloaded": [draw.randint(0, c) for c in counts] if draw.random() < 0.5 else (),
            },
        )


def test_a_stage_takes_the_seconds_of_its_layers_and_a_shard_those_of_its_products():
    for work, cost, problem, parts in cases(40):
        found = estimate_cost(work, cost, problem, **parts)
        tp, layer = work.degrees.tp, computed_layer(work, cost)
        is_measured = cost.layer_forward_seconds is not None
        forward, input_grad, weight_grad = layer[:3]
        backward, again = input_grad + weight_grad, {k: layer.again(k) for k in _AGAIN}
        if is_measured:
            forward, backward, input_grad, weight_grad = (
                value / tp for value in (1.5, 3.5, 2.25, 1.75)
            )
            again = {k: shape.recomputed_part(work.model, k) * 1.5 / tp for k in _AGAIN}
        sums = tensor_seconds(work, cost, weight_grad)
        sharded = problem.algorithm.sharded
        slower = 1.5 if cost.contention and sharded and not is_measured else 1.0
        slow = cost.rank_slowness or (1.0, 1.0, 1.0)
        for stage, (layers, recompute) in enumerate(
            zip(parts["layers"], parts["recompute"], strict=True)
        ):
            rank = slow[problem.layout.rank_of(stage)]
            repeated = slower * again[recompute] + exchanged_again(work, cost, recompute)
            for kind, seconds in {
                Kind.F: slower * forward + sums[Kind.F],
                Kind.B: slower * backward + sums[Kind.B] + repeated,
                Kind.I: slower * input_grad + sums[Kind.I] + repeated,
                Kind.W: slower * weight_grad,
            }.items():
                expected = rank * len(layers) * seconds
                assert found.pass_seconds[kind][stage] == pytest.approx(expected)
        again = 0.25 / 3 if work.vocab.backend == "recompute" else 0.0
        for rank, shard in enumerate(parts["shards"][End.OUTPUT]):
            rows = -(-shard.num_rows // tp)
            both = output_seconds(
                Device.of(cost),
                work.num_tokens,
                64,
                rows,
                max(4, ITEM[work.dtype]),
                logit_bytes=cost.logit_bytes,
            )
            if is_measured:
                both = (2.0 + rows * 1e-3) if rows else 0.0
            of_s = problem.algorithm.products(Kind.S) / 3
            assert found.pass_seconds[Kind.S][rank] == pytest.approx(slow[rank] * of_s * both)
            assert found.pass_seconds[Kind.T][rank] == pytest.approx(
                slow[rank] * (1 - of_s + again) * both
            )
            there, back = (0.5, 0.75) if is_measured else (0.025, 0.025)
            assert found.pass_seconds[Kind.E][rank] == pytest.approx(slow[rank] * there)
            assert found.pass_seconds[Kind.G][rank] == pytest.approx(slow[rank] * back)


_AGAIN = ("none", "selective", "full")


def test_a_message_takes_its_fixed_time_and_its_bytes():
    """A collective of n shards; its root and its payload say what a rank sends and takes."""
    seen = set()
    for work, cost, problem, parts in cases(40):
        found = estimate_cost(work, cost, problem, **parts)
        tp, item = work.degrees.tp, ITEM[work.dtype]
        precise, tokens = max(4, item), work.micro_batch_size * work.model.seq_length
        message = item * tokens * 64
        hop = 0.5 + message / tp / 1e6
        if tp > 1 and not work.sequence_parallel:
            hop += (0.125 + 2 * (tp - 1) / tp * message / 4e6) / 2
        assert found.hop_seconds == pytest.approx(hop)
        n = tp * 3 if problem.algorithm.sharded else tp
        gradient = tokens * 64 * (item if work.vocab.sum_dtype == "compute" else precise)
        sizes = {
            "activations": message,
            "input_gradient": gradient,
            "embeddings": message * (n - 1) / n,
            "embedding_gradient": message * (n - 1) / n,
            "statistics": 3 * precise * tokens * (n - 1),
            "maximum": 4 * precise * tokens,
            "sums": 4 * precise * tokens,
        }
        barriers = {one.name: one.payload.value for one in problem.algorithm.barriers}
        assert found.barrier_seconds.keys() == barriers.keys()
        for name, payload in barriers.items():
            pipeline, tensor = 0.25 + sizes[payload] / 2e6, 0.125 + sizes[payload] / 4e6
            expected = pipeline if problem.algorithm.sharded else tensor
            expected = 0.0 if n == 1 else expected
            assert found.barrier_seconds[name] == pytest.approx(expected), payload
            seen.add((payload, n == 1))
    assert {payload for payload, _ in seen} == set(sizes)
    assert (False in {alone for _, alone in seen}, True in {alone for _, alone in seen}) == (1, 1)


def test_a_stage_keeps_what_its_layers_keep_and_the_ends_a_little_more():
    for work, cost, problem, parts in cases(40):
        found = estimate_cost(work, cost, problem, **parts)
        item, tokens = ITEM[work.dtype], work.micro_batch_size * work.model.seq_length
        n, model = work.degrees.tp if work.sequence_parallel else 1, work.model
        kept = [
            len(layers) * work.layer_bytes(recompute)
            for layers, recompute in zip(parts["layers"], parts["recompute"], strict=True)
        ]
        kept[0] += item * tokens * 64 * ((n > 1) + (model.positions == "learned"))
        kept[-1] += tokens * (item * 64 + max(4, item)) / n
        assert found.stage_bytes == pytest.approx(kept)
        ffn, heads = work.share.ffn_hidden_size, 64 // work.degrees.tp
        values = 64 + heads + 64 + ffn + (heads + 2 * heads // 2) + 64 + 64
        values += ffn * (2 if model.activation == "swiglu" else 1)
        weights = [item * tokens * values * len(layers) for layers in parts["layers"]]
        assert found.weight_bytes == pytest.approx(weights)
        held = {"chunked": 1, "recompute": 0.75, "reference": 2}[work.vocab.backend]
        rows = [-(-shard.num_rows // work.degrees.tp) for shard in parts["shards"][End.OUTPUT]]
        assert found.shard_bytes == pytest.approx(
            [item * tokens * (held * count + 64) for count in rows]
        )
        moved = [
            count * work.layer_bytes(kind)
            for count, kind in zip(parts["offloaded"], parts["recompute"], strict=False)
        ]
        assert found.offload_bytes == pytest.approx(moved)
        assert found.offload_seconds == pytest.approx([size / 8e6 for size in moved])


def test_a_ring_moves_nothing_alone_and_nearly_twice_the_bytes_among_many():
    assert link_seconds(None, None, 1e9) == 0
    assert link_seconds(0.5, None, 1e9) == 0.5
    assert link_seconds(0.5, 1e9, 2e9) == 2.5
    assert sum_seconds(0.5, 1e9, 2e9, 1) == 0
    assert sum_seconds(0.5, 1e9, 2e9, 2) == 2.5
    assert sum_seconds(0.5, 1e9, 2e9, 4) == 3.5


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_sums_are_hidden_by_products_and_no_further(sequence_parallel):
    """One of two sums is as long as its product dW or longer; `half` is one half of a sum."""
    work = work_of(degrees=Degrees(1, 1, 2), sequence_parallel=sequence_parallel)
    qkv, _, up, _ = shape.linear_parameters(work.share)
    whole = sum(shape.linear_parameters(work.share))
    for weight_grad in (0.0, 0.1, 0.3, 10.0):
        cost = CostConfig(tensor_seconds=0.2, flops_per_second=1e9)
        found = tensor_seconds(work, cost, weight_grad)
        products = [weight_grad * part / whole for part in (qkv, up)]
        assert (found[Kind.F], found[Kind.W]) == (0.4, 0)
        if sequence_parallel:
            left = [max(0.0, 0.1 - product) for product in products]
            assert found[Kind.B] == pytest.approx(0.2 + 2 * sum(left))
            assert found[Kind.I] == pytest.approx(0.4 + sum(left))
        else:
            left = [max(0.0, 0.2 - product) for product in products]
            assert found[Kind.B] == pytest.approx(sum(left))
            assert found[Kind.I] == 0.4
        alone = tensor_seconds(replace(work, degrees=Degrees(1, 1, 1)), cost, weight_grad)
        assert set(alone.values()) == {0.0}


@pytest.mark.parametrize("post_norms", [False, True])
def test_recomputation_repeats_the_sums_and_gathers_that_it_comes_to(post_norms):
    model = replace(work_of().model, post_norms=post_norms)
    for sequence_parallel in (False, True):
        work = work_of(model=model, degrees=Degrees(1, 1, 2), sequence_parallel=sequence_parallel)
        cost = CostConfig(tensor_seconds=0.2, flops_per_second=1e9)
        found = [exchanged_again(work, cost, kind) for kind in _AGAIN]
        sums = 2 if post_norms else 1
        assert found == pytest.approx(
            [0, 0.1, 0.1 * (sums + 2)] if sequence_parallel else [0, 0, 0.2 * sums]
        )
        for split in (False, True):
            for kind, again in zip(_AGAIN, found, strict=True):
                weight_grad = computed_layer(work, cost).weight_grad
                sums_of = tensor_seconds(work, cost, weight_grad)
                shown = exposed_tensor_seconds(work, cost, kind, split_backward=split)
                back = sums_of[Kind.I if split else Kind.B]
                assert shown == pytest.approx(sums_of[Kind.F] + back + again)
        timed = replace(cost, layer_forward_seconds=1.0, layer_weight_grad_seconds=0.05)
        measured = tensor_seconds(work, timed, 0.05 / 2)
        assert exposed_tensor_seconds(work, timed, "none", split_backward=False) == pytest.approx(
            measured[Kind.F] + measured[Kind.B]
        )


def test_a_row_adds_its_part_of_the_products_to_its_tensor_parallel_ranks():
    for backend, factor in (("chunked", 3), ("recompute", 3.5)):
        vocab = VocabConfig(backend=backend, recompute_fraction=0.5 if factor > 3 else 1.0)
        for tp in (1, 4):
            work = work_of(vocab=vocab, degrees=Degrees(1, 3, tp))
            cost = CostConfig(flops_per_second=1e9)
            expected = factor * 2 * work.num_tokens * 64 / 1e9 / tp
            assert row_seconds(work, cost) == pytest.approx(expected)
            measured = replace(cost, output_row_seconds=0.5)
            assert row_seconds(work, measured) == pytest.approx(0.5 * factor / 3 / tp)


def test_a_layer_takes_its_forward_and_its_backward():
    for work, cost, problem, parts in cases(12):
        parts |= {"layers": [range(1)] * len(parts["layers"])}
        parts |= {"recompute": ["selective"] * len(parts["layers"])}
        plain = replace(cost, contention=None, rank_slowness=None)
        found = estimate_cost(work, plain, problem, **parts).pass_seconds
        assert layer_pass_seconds(work, cost, "selective") == pytest.approx(
            found[Kind.F][1] + found[Kind.B][1]
        )


@pytest.mark.parametrize("part", [0.985, 0.995, 1.0, 1.005, 1.015])
def test_measured_seconds_count_for_layers_of_the_same_flops_within_a_hundredth(part):
    work = work_of()
    cost = CostConfig(**LINK, flops_per_second=1e9, **MEASURED)
    cost = replace(cost, measured_layer_flops=part * work.layer_flops)
    is_close = abs(part - 1) < 0.01
    assert measured_layers(work, cost) is is_close
    assert measured_layers(work, replace(cost, measured_layer_flops=None))
    assert not measured_layers(work, replace(cost, layer_forward_seconds=None))
    problem = Problem(Layout("linear", 1), 1, VOCAB_ALGORITHMS["none"])
    parts = {
        "layers": [range(2)],
        "recompute": ["none"],
        "shards": dict.fromkeys(End, split_rows(100, 1, [100])),
    }
    if is_close:
        found = estimate_cost(work, cost, problem, **parts)
        assert found.pass_seconds[Kind.S][0] > 0.6
        return
    with pytest.raises(
        ConfigError, match=r"cost\.measured_layer_flops=.* these pass times are not"
    ):
        estimate_cost(work, cost, problem, **parts)
    rated = replace(cost, **RATES)
    found = estimate_cost(work, rated, problem, **parts)
    plain = estimate_cost(work, CostConfig(**LINK, **RATES), problem, **parts)
    for kind in (Kind.F, Kind.B, Kind.I, Kind.W, Kind.S, Kind.T):
        assert found.pass_seconds[kind] == plain.pass_seconds[kind]


@pytest.mark.parametrize(
    ("name", "run", "other"),
    [
        ("dtype", "float32", "bfloat16"),
        ("device", "cuda", "cpu"),
        ("linear_dtype", "compute", "float8"),
        ("cuda_graphs", False, True),
    ],
)
def test_times_that_were_measured_otherwise_are_refused_by_name(name, run, other):
    work = work_of(dtype="float32")
    problem = Problem(Layout("linear", 1), 1, VOCAB_ALGORITHMS["none"])
    parts = {
        "layers": [range(2)],
        "recompute": ["none"],
        "shards": dict.fromkeys(End, split_rows(100, 1, [100])),
    }
    same = CostConfig(flops_per_second=1e9, **{f"measured_{name}": run})
    estimate_cost(work, same, problem, **parts)
    differs = replace(same, **{f"measured_{name}": other})
    words = f"cost.measured_{name}={other}, but run.{name}={run}".lower()
    with pytest.raises(ConfigError) as raised:
        estimate_cost(work, differs, problem, **parts)
    way_out = f"or set run.{name}={other}".lower()
    assert str(raised.value) == f"{words}: {estimate._OTHER_RUN}; {way_out}"


def test_every_rank_is_as_slow_as_it_is_said_to_be():
    assert rank_slowness(CostConfig(), 3) == (1.0, 1.0, 1.0)
    assert rank_slowness(CostConfig(rank_slowness=(1.0, 2.0)), 2) == (1.0, 2.0)
    words = r"cost\.rank_slowness=\[1.0, 2.0\] has 2 values; give one for each of the 3 ranks"
    with pytest.raises(ConfigError, match=words):
        rank_slowness(CostConfig(rank_slowness=(1.0, 2.0)), 3)
