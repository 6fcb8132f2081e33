"""Laws of products, attention and bytes on a device."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from vp_train.config import ConfigError, CostConfig
from vp_train.model import shape
from vp_train.planning import physics
from vp_train.planning.cluster import with_rates
from vp_train.planning.physics import (
    Device,
    attention_seconds,
    elementwise_bytes,
    layer_seconds,
    linear_shapes,
    output_seconds,
)
from vp_train.planning.plan import plan_step
from vp_train.settings import load_config

H100 = load_config(["cluster=h100_80g_node"]).cluster


def device():
    return Device.of(with_rates(CostConfig(), H100, "bfloat16", alone=True))


def layer(device, hidden=4096, num_tokens=4096):
    heads = hidden // 128
    words = (f"model.hidden_size={hidden}", f"model.num_heads={heads}")
    model = load_config(["model=gpt_4b", *words, f"model.num_query_groups={heads}"]).model
    wide = replace(model, ffn_hidden_size=4 * hidden)
    return wide, layer_seconds(device, wide, num_tokens, item_bytes=2, sum_bytes=4, compiled=True)


def test_a_device_with_one_rate_takes_its_flops_and_nothing_else():
    one = Device.of(CostConfig(flops_per_second=1e12))
    model, found = layer(one)
    flops = shape.layer_flops(model, 4096)
    assert found.forward == pytest.approx(flops / 1e12)
    assert found.input_grad + found.weight_grad == pytest.approx(2 * flops / 1e12)


def test_no_product_is_faster_than_its_flops_and_more_work_takes_longer():
    one, sizes = device(), (1, 64, 200, 1024, 3072, 5000, 16384)
    for rows in sizes:
        for columns in sizes:
            for depth in (64, 1024, 8192):
                seconds = one.product(rows, columns, depth)
                assert seconds >= 2 * rows * columns * depth / one.flops_per_second
                assert seconds <= one.product(2 * rows, columns, depth) * (1 + 1e-9)
                assert seconds <= one.product(rows, columns, 2 * depth) * (1 + 1e-9)
    assert one.product(8192, 8192, 8192) < 1.05 * 2 * 8192**3 / one.flops_per_second


def test_wider_layers_reach_a_larger_part_of_the_peak():
    reached = []
    for hidden in (1024, 2048, 4096, 8192, 16384):
        model, found = layer(device(), hidden)
        reached.append(shape.layer_flops(model, 4096) / found.forward)
    assert reached == sorted(reached)
    assert reached[-1] > 1.3 * reached[0]


@pytest.mark.parametrize("name", ["gpt_4b", "llama3_8b", "qwen3_8b"])
def test_the_products_of_a_layer_have_the_weights_of_its_matrices(name):
    """A layer takes the FLOPs of these products and of attention on a device with one rate."""
    model, one = load_config([f"model={name}"]).model, Device.of(CostConfig(flops_per_second=1e12))
    sizes = tuple(outputs * inputs for outputs, inputs in linear_shapes(model))
    assert sizes == shape.linear_parameters(model)
    found = layer_seconds(one, model, 1024, item_bytes=2, sum_bytes=4, compiled=True)
    attention = attention_seconds(one, model, 1024)
    assert found.forward == pytest.approx(2 * 1024 * sum(sizes) / 1e12 + attention)
    assert found.selective == pytest.approx(2 * 1024 * sum(sizes[:2]) / 1e12 + attention)
    assert found.again("none") == 0
    assert found.again("selective") == found.selective
    assert (
        found.again("full")
        == found.full
        == found.forward - 2 * 1024 * sizes[3] / 1e12 * (not shape.repeats_down_projection(model))
    )


def test_elementwise_work_moves_what_its_kernels_read_and_write():
    """Values per token, from those of each kernel: x read once, y written once."""
    model = load_config(["model=llama3_8b"]).model
    h, f, q, kv, slow = 4096, 14336, 4096, 1024, 2
    qkv, turned = q + 2 * kv, q + kv

    def values(model, compiled, ranks=1):
        there, back = elementwise_bytes(model, 10, 2, compiled, ranks)
        return there / 20, back / 20

    fused = 9 * h + 2 * qkv + 3 * f, 8 * h + 2 * qkv + 6 * f
    plain = 10 * h + slow * (7 * turned + 2 * kv + 5 * f), 12 * h + 2 * qkv
    plain = plain[0], plain[1] + slow * (7 * turned + 14 * f)
    rotation = 7 * slow * turned
    more = {  # what it adds to a forward and a backward, compiled and not
        "post_norms": (True, (4 * h, 6 * h), (4 * h, 6 * h)),
        "qk_norm": (True, (-2 * kv, turned), (2 * slow * q, 3 * slow * turned)),
        "qkv_bias": (True, (0, slow * qkv), (0, slow * qkv)),
        "activation": ("gelu", (-f, -3 * f), (2 * f - 10 * f, 3 * f - 28 * f)),
        "normalisation": ("layernorm", (h, 4 * h), (0, 0)),
        "positions": ("learned", (-2 * qkv, 0), (-rotation - 2 * slow * kv, -rotation)),
    }
    only_after = replace(model, pre_norms=False, post_norms=True)
    assert values(only_after, True) == (fused[0] + h, fused[1] + 4 * h)
    assert values(only_after, False) == plain
    of_biases = 0, slow * (qkv + 2 * f + 2 * h)
    more["linear_bias"] = (True, of_biases, of_biases)
    for compiled, whole in ((True, fused), (False, plain)):
        assert values(model, compiled) == whole
        of_norms = (9, 8) if compiled else (10, 12)
        halves = tuple(value - part * h / 2 for value, part in zip(whole, of_norms, strict=True))
        assert values(model, compiled, 2) == halves
        for name, (value, *added) in more.items():
            found = values(replace(model, **{name: value}), compiled)
            there, back = added[0 if compiled else 1]
            assert found == (whole[0] + there, whole[1] + back), (name, compiled)


def test_zero_centred_norms_that_are_not_compiled_are_cast_to_fp32_and_back():
    """A cast reads 2 bytes of each value and writes 4, or the reverse."""
    model = replace(load_config(["model=llama3_8b"]).model, qk_norm=True)
    centred, of_layer, of_heads, slow = replace(model, zero_centred_norm=True), 2 * 4096, 5120, 2
    for item, compiled, casts in ((2, False, 1), (2, True, 0), (4, False, 0)):
        found, expected = (elementwise_bytes(each, 10, item, compiled) for each in (centred, model))
        for part, base, tensors, own in zip(found, expected, (2, 3), (2, 3), strict=True):
            # fp32 doubles what the kernel moves
            added = (6 * tensors + 4 * own - 2 * own) * (of_layer + slow * of_heads)
            assert part - base == casts * 10 * added


def test_casts_of_zero_centred_norms_are_kernels_too():
    """Four in a forward and five in a backward, of six norms: the last counts both of heads."""
    model = replace(load_config(["model=llama3_8b"]).model, qk_norm=True, post_norms=True)
    device = Device(1e15, 1e15, 1e30, 1.0, 132)  # so fast that kernels alone take time

    def seconds(model, compiled):
        found = layer_seconds(device, model, 10, item_bytes=2, sum_bytes=4, compiled=compiled)
        return found.forward, found.input_grad

    for compiled, added in ((False, (6 * 4, 6 * 5)), (True, (0, 0))):
        plain, centred = (
            seconds(replace(model, zero_centred_norm=value), compiled) for value in (False, True)
        )
        assert tuple(b - a for a, b in zip(plain, centred, strict=True)) == pytest.approx(added)


@pytest.mark.parametrize("name", ["llama3_8b", "gpt_4b"])
def test_elementwise_work_moves_what_was_counted(name, monkeypatch):
    """Counted in `benchmarks/layers.py` for reduced layers, whose weights are a larger part.

    Of llama3_8b only compiled, because torch has more operations on a CPU.
    """
    monkeypatch.setattr(physics, "_SLOW", 1.0)
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "layers_cpu.json"
    counted = json.loads(path.read_text())["counts"][name]
    model = load_config([f"model={name}"]).model
    unit = 2 * 10 * model.hidden_size
    for system in ("fused", "plain")[: 1 if shape.is_gated(model) else 2]:
        found = elementwise_bytes(model, 10, 2, system == "fused")
        for part, num_bytes in zip(("forward", "backward"), found, strict=True):
            units = counted[system][part]["elementwise_units"]
            assert num_bytes / unit == pytest.approx(units, rel=0.02)


def test_a_shard_of_the_output_layer_takes_three_products_and_moves_its_logits():
    one, bare = device(), Device.of(CostConfig(flops_per_second=1e12))
    assert output_seconds(one, 512, 256, 0, 4, logit_bytes=8.0) == 0
    assert output_seconds(bare, 512, 256, 1000, 4, logit_bytes=8.0) == pytest.approx(
        3 * 2 * 512 * 256 * 1000 / 1e12
    )
    products = one.product(512, 1000, 256) + one.product(512, 256, 1000)
    products += one.product(1000, 256, 512)
    moved = 1000 * 512 * 8.0 + 1000 * 256 * 4 + 7 * 4 * 512 * 256
    assert output_seconds(one, 512, 256, 1000, 4, logit_bytes=8.0) == pytest.approx(
        products + moved / one.bytes_per_second
    )


def test_attention_counts_what_the_mask_leaves():
    one = device()
    model = load_config(["model=llama3_8b"]).model
    whole = attention_seconds(one, model, 8192)
    flops = 4 * 8192 * 8192 * 4096 / 2
    assert whole == pytest.approx(flops * (1 + 1 / 8) / one.attention_flops_per_second)
    local = replace(model, sliding_window=1024)
    if all(local.is_local(index) for index in range(local.num_layers)):
        assert attention_seconds(one, local, 8192) < whole / 3


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_repeats_a_part_of_the_forward(recompute):
    model, found = layer(device())
    again, part = found.again(recompute), shape.recomputed_part(model, recompute)
    assert again == pytest.approx(part * found.forward, rel=0.2), "by FLOPs"
    assert again <= found.forward


def test_a_device_with_some_rates_only_is_refused():
    with pytest.raises(
        ConfigError, match=r"attention_flops_per_second=null, .*; give all three, or none"
    ):
        Device.of(CostConfig(matrix_flops_per_second=1e14, memory_bytes_per_second=1e12))


def test_measured_rates_predict_layers_that_were_not_measured():
    """Measured seconds count for the layer that they are of, rates for all others."""
    words = ["model=gpt_4b", "cluster=h100_80g_node", "parallel.pp=8", "num_microbatches=8"]
    config = load_config(words)
    measured = CostConfig(
        matrix_flops_per_second=8e14,
        attention_flops_per_second=5e14,
        memory_bytes_per_second=3e12,
        measured_layer_flops=float(shape.layer_flops(config.model, 2048)),
        layer_forward_seconds=1.0,
        layer_backward_seconds=2.0,
    )
    assert plan_step(replace(config, cost=measured), 8).timeline.makespan > 8
    other = load_config([*words, "model.num_layers=8", "micro_batch_size=2"])
    assert plan_step(replace(other, cost=measured), 8).timeline.makespan < 0.2
    bare = replace(measured, matrix_flops_per_second=None)
    with pytest.raises(ConfigError, match=r"cost\.measured_layer_flops="):
        plan_step(replace(other, cost=bare), 8)


def waves_of(multiprocessors, rows, columns, depth):
    """Return the least multiply-adds of full waves over all tiles and parts, by counting tiles."""
    found = []
    for height, width, rate in ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (128, 64, 0.8)):
        for parts in (1, 2, 4):
            tiles = len(range(0, rows, height)) * len(range(0, columns, width)) * parts
            waves = len(range(0, tiles, multiprocessors))
            deep = len(range(0, depth, parts)) + 128
            found.append(waves * multiprocessors * height * width * deep / rate)
    return min(found)


def test_a_product_runs_in_waves_of_the_tiles_that_suit_it_best():
    one = device()
    sizes = (1, 64, 127, 128, 129, 256, 257, 1_000, 4_096, 33_793)
    for rows, columns in itertools.product(sizes, sizes):
        for depth in (1, 3, 127, 4_097):
            expected = 2 * waves_of(132, rows, columns, depth) / one.flops_per_second
            assert one.product(rows, columns, depth) == pytest.approx(expected)
    assert one.product(0, 5, 5) == one.product(5, 0, 5) == one.product(5, 5, 0) == 0
    bare = Device(1e12, 1e12, math.inf, 0.0, 0)
    assert bare.product(3, 5, 7) == 2 * 3 * 5 * 7 / 1e12


@pytest.mark.parametrize("name", ["llama3_8b", "gpt_4b"])
@pytest.mark.parametrize("linear_speed", [1.0, 1.4])
def test_a_layer_is_its_products_attention_bytes_and_kernels(name, linear_speed):
    """Float8 forms y and dx faster.  A backward has 36 kernels, and four products dW."""
    one = Device(3e14, 2e14, 1e12, 1e-3, 132)
    model = load_config([f"model={name}"]).model
    tokens, item, summed = 4_096, 2, 4
    options = {"item_bytes": item, "sum_bytes": summed, "compiled": True}
    found = layer_seconds(one, model, tokens, linear_speed=linear_speed, **options)
    shapes, attention = linear_shapes(model), attention_seconds(one, model, tokens)
    there, back = elementwise_bytes(model, tokens, item, True)
    y = [one.product(tokens, out, into) / linear_speed for out, into in shapes]
    dx = [one.product(tokens, into, out) / linear_speed for out, into in shapes]
    dw = [one.product(out, into, tokens) for out, into in shapes]
    forward = sum(y) + attention + there / 1e12 + 14e-3
    assert found.forward == pytest.approx(forward)
    assert found.input_grad == pytest.approx(sum(dx) + 3 * attention + back / 1e12 + 36e-3)
    weights = sum(out * into for out, into in shapes)
    assert found.weight_grad == pytest.approx(sum(dw) + summed * weights / 1e12 + 4e-3)
    assert found.selective == pytest.approx(sum(y[:2]) + attention)
    down = 0.0 if shape.repeats_down_projection(model) else y[3]
    assert found.full == pytest.approx(forward - down)
    plain = Device(1e14, 1e14, math.inf, 0.0, 0)
    simple = layer_seconds(plain, model, tokens, linear_speed=linear_speed, **options)
    whole = shape.layer_flops(model, tokens) / 1e14
    saved = 2 * weights * tokens / 1e14 * (1 - 1 / linear_speed)
    assert simple.weight_grad == pytest.approx(whole)
    assert simple.forward == simple.input_grad == pytest.approx(whole - saved)


def test_a_window_of_attention_sees_no_further_than_it_is_wide():
    """The mean over layers of which some see all; at most as many tokens as there are."""
    one = Device(1e14, 1e12, 1e12, 0.0, 132)
    model = load_config(["model=llama3_8b", "model.num_layers=4"]).model
    length, width = model.seq_length, 4_096

    def seconds(model, tokens):
        return attention_seconds(one, model, tokens)

    whole = 4 * length * width * (length / 2) * (1 + 1_024 / length) / 1e12
    assert seconds(model, length) == pytest.approx(whole)
    assert seconds(model, 3 * length) == pytest.approx(3 * whole)
    for window, every in ((100, None), (100, 2), (length, 2), (9 * length, None)):
        local = replace(model, sliding_window=window, full_attention_every=every)
        seen = [
            sum(min(place + 1, window) for place in range(length)) - min(window, length) / 2
            if local.is_local(layer)
            else length**2 / 2
            for layer in range(4)
        ]
        expected = whole * sum(seen) / 4 / (length**2 / 2)
        assert seconds(local, length) == pytest.approx(expected)
        bare = Device(1e12, 1e12, math.inf, 0.0, 0)
        squares = [min(window, length) if local.is_local(n) else length for n in range(4)]
        assert attention_seconds(bare, local, length) == pytest.approx(
            4 * length * width * sum(squares) / 4 / 1e12
        )


@pytest.mark.parametrize(
    "missing",
    ["matrix_flops_per_second", "attention_flops_per_second", "memory_bytes_per_second"],
)
def test_a_device_has_all_rates_or_one(missing):
    rates = {
        "matrix_flops_per_second": 4e14,
        "attention_flops_per_second": 3e14,
        "memory_bytes_per_second": 2e12,
    }
    full = Device.of(CostConfig(**rates, kernel_seconds=1e-6, multiprocessors=8))
    assert full == Device(4e14, 3e14, 2e12, 1e-6, 8)
    assert full.is_split
    assert Device.of(CostConfig(**rates)) == Device(4e14, 3e14, 2e12, 0.0, 0)
    bare = Device.of(CostConfig(flops_per_second=5e13))
    assert bare == Device(5e13, 5e13, math.inf, 0.0, 0)
    assert not bare.is_split
    for some in (rates | {missing: None}, {missing: rates[missing]}):
        with pytest.raises(ConfigError, match="give all three, or none"):
            Device.of(CostConfig(**some))
