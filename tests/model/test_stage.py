"""Megatron's layer equals the formulas of a decoder layer, and stages do not change any value."""

import gc
import math
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.meshes import alone, fake_world
from vp_train.config import ModelConfig
from vp_train.model import attention, shape
from vp_train.model.norm import Addend
from vp_train.model.stage import Stage, document_lengths, init_rows
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import exchanged_again
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=48,
    num_heads=6,
    num_query_groups=2,
    ffn_hidden_size=80,
    vocab_size=100,
    seq_length=20,
)
CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.bfloat16)


@pytest.fixture
def group():
    return alone()


def stage(group, layers, final_norm=False, dtype=torch.float64, model=MODEL, seed=3, **options):
    return Stage(
        model,
        layers,
        final_norm=final_norm,
        dtype=dtype,
        device=CPU,
        group=group,
        seed=seed,
        **options,
    )


def plain_norm(x, weights, name, model):
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if model.normalisation == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = (
        x
        * (x.pow(2).mean(-1, keepdim=True) + model.norm_epsilon).rsqrt()
        * (weight + model.zero_centred_norm)
    )
    return x if bias is None else x + bias


def plain_linear(x, weights, name):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def plain_frequencies(model, local, dtype):
    """Return the rotary frequency of each pair of a head, in radians per token."""
    d = shape.head_size(model)
    if local and model.rope_local_base is not None:
        return model.rope_local_base ** (-torch.arange(0, d, 2, dtype=dtype) / d)
    frequencies = model.rope_base ** (-torch.arange(0, d, 2, dtype=dtype) / d)
    scaled = []
    if model.rope_scaling == "yarn":  # the ramp begins and ends at whole indices
        turns = [math.log(model.rope_original_length * f / (2 * math.pi)) for f in frequencies]
        first, last = (
            next(i for i, turn in enumerate([*turns, -math.inf]) if turn < math.log(limit))
            for limit in (model.rope_high_frequency, model.rope_low_frequency)
        )
        ramp = [min(max((i - first + 1) / (last - first + 1), 0), 1) for i in range(len(turns))]
        return frequencies * torch.tensor(
            [1 - r + r / model.rope_factor for r in ramp], dtype=dtype
        )
    for frequency in frequencies.tolist():
        turns = model.rope_original_length * frequency / (2 * math.pi)
        low, high = model.rope_low_frequency, model.rope_high_frequency
        if model.rope_scaling == "none" or (model.rope_scaling == "llama3" and turns > high):
            scaled.append(frequency)
        elif model.rope_scaling == "linear" or turns < low:
            scaled.append(frequency / model.rope_factor)
        else:
            smooth = (turns - low) / (high - low)
            scaled.append((1 - smooth) * frequency / model.rope_factor + smooth * frequency)
    return torch.tensor(scaled, dtype=dtype)


def plain_layer(x, weights, model, local, segments):
    """Return the output of a decoder layer written from its formulas.

    x is [s, b, h].  Tokens of different `segments` [b, s] do not see each other.
    """
    s, b, _ = x.shape
    n, g, d = model.num_heads, model.num_query_groups, shape.head_size(model)

    def rope(x):
        if model.positions != "rope":
            return x
        angle = torch.outer(
            torch.arange(s, dtype=x.dtype), plain_frequencies(model, local, x.dtype)
        )[:, None, None]
        a, c = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * angle.cos() - c * angle.sin(), c * angle.cos() + a * angle.sin()], -1)

    def norm(x, name):
        return plain_norm(x, weights, name, model) if f"{name}.weight" in weights else x

    qkv = plain_linear(norm(x, "input_layernorm"), weights, "self_attention.linear_qkv")
    q, k, v = qkv.view(s, b, g, -1).split([n // g * d, d, d], -1)
    q = q.reshape(s, b, n, d)
    if model.qk_norm_whole:
        q = norm(q.flatten(2), "self_attention.q_layernorm").view(q.shape)
        k = norm(k.flatten(2), "self_attention.k_layernorm").view(k.shape)
    elif model.qk_norm:
        q = plain_norm(q, weights, "self_attention.q_layernorm", model)
        k = plain_norm(k, weights, "self_attention.k_layernorm", model)
    q, k = rope(q), rope(k)
    if model.rope_scaling == "yarn":
        q, k = (part * (0.1 * math.log(model.rope_factor) + 1) for part in (q, k))
    k, v = k.repeat_interleave(n // g, 2), v.repeat_interleave(n // g, 2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / (model.attention_divisor or d) ** 0.5
    if model.attention_softcap:
        scores = model.attention_softcap * torch.tanh(scores / model.attention_softcap)
    distance = torch.arange(s)[:, None] - torch.arange(s)
    hidden = (distance < 0) | (distance >= model.sliding_window) if local else distance < 0
    if segments is not None:
        hidden = hidden | (segments[:, None, :, None] != segments[:, None, None, :])
    context = torch.einsum(
        "bnst,tbnd->sbnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v
    ).reshape(s, b, n * d)
    y = plain_linear(context, weights, "self_attention.linear_proj")
    x = x + norm(y, "self_attn_bda.norm") * model.residual_multiplier
    y = plain_linear(norm(x, "pre_mlp_layernorm"), weights, "mlp.linear_fc1")
    if model.activation == "gelu":
        y = nn.functional.gelu(y, approximate="tanh")
    else:
        gate, up = y.chunk(2, -1)
        y = (
            nn.functional.silu(gate)
            if model.activation == "swiglu"
            else nn.functional.gelu(gate, approximate="tanh")
        ) * up
    y = plain_linear(y, weights, "mlp.linear_fc2")
    return x + norm(y, "mlp_bda.norm") * model.residual_multiplier


FAMILIES = {
    "plain": {},
    "gpt": {
        "normalisation": "layernorm",
        "activation": "gelu",
        "linear_bias": True,
        "positions": "learned",
        "num_query_groups": 6,
    },
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_size": 10},
    "one query group": {"qk_norm": True, "num_query_groups": 1, "head_size": 12},
    "every group its head": {"qk_norm": True, "num_query_groups": 6},
    "llama3": {
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_length": 16,
        "rope_base": 50.0,
    },
    "yarn": {
        "rope_scaling": "yarn",
        "rope_factor": 8.0,
        "rope_original_length": 64,
        "rope_base": 50.0,
    },
    "olmo2": {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True},
    "granite": {"residual_multiplier": 0.2, "attention_divisor": 5.0, "linear_bias": True},
    "gemma": {
        "zero_centred_norm": True,
        "activation": "geglu",
        "head_size": 4,
        "embedding_scale": True,
    },
    "gemma2": {
        "zero_centred_norm": True,
        "activation": "geglu",
        "post_norms": True,
        "attention_softcap": 0.5,
        "attention_divisor": 3.0,
        "sliding_window": 7,
        "full_attention_every": 2,
    },
    "gemma3": {
        "zero_centred_norm": True,
        "activation": "geglu",
        "post_norms": True,
        "qk_norm": True,
        "sliding_window": 7,
        "full_attention_every": 3,
        "rope_local_base": 100.0,
        "rope_scaling": "linear",
        "rope_factor": 8.0,
    },
    "all layers local": {"sliding_window": 1, "linear_bias": True},
    "a window longer than the text": {"sliding_window": 20, "normalisation": "layernorm"},
}


def with_random_vectors(part, seed=5):
    """Return `part` with random norms and biases; their initial 0 and 1 could hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.dim() == 1:
                parameter += (
                    torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 4
                )
    return part


SEGMENTS = torch.tensor([[0] * 7 + [1] * 13, [0] + [1] * 18 + [2]], dtype=torch.int32)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("block", "segments"),
    [(6, None), (256, None), (6, SEGMENTS), (256, torch.zeros_like(SEGMENTS))],
)
def test_layers_equal_their_formulas_in_float64(group, name, block, segments, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", block)
    model = replace(MODEL, init_std=0.3, **FAMILIES[name])
    ours = with_random_vectors(stage(group, range(3), model=model))
    x = torch.randn(20, 2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = {
        key: parameter.detach().clone().requires_grad_()
        for key, parameter in ours.named_parameters()
    }
    ours_x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours_y, plain_y = ours(ours_x, segments), plain_x
    for layer in range(3):
        prefix = f"layers.{layer}.layer."
        local = model.sliding_window is not None and (model.full_attention_every or 4) != layer + 1
        of_layer = {
            key.removeprefix(prefix): value
            for key, value in weights.items()
            if key.startswith(prefix)
        }
        plain_y = plain_layer(plain_y, of_layer, model, local, segments)
    assert torch.allclose(ours_y, plain_y, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(x)
    with ours.weight_grads.deferring(0):
        ours_y.backward(dy)
    ours.weight_grads.drain(0)
    plain_y.backward(dy)
    assert torch.allclose(ours_x.grad, plain_x.grad, rtol=1e-10, atol=1e-10)
    for key, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, weights[key].grad, rtol=1e-10, atol=1e-10), key


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_stays_near_float64(group, name):
    model = replace(MODEL, **FAMILIES[name])
    exact, rounded = (
        stage(group, range(3), first=True, final_norm=True, model=model, dtype=d) for d in DTYPES
    )
    x, dy = torch.randn(2, 20, 2, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    inputs = [x.to(d).requires_grad_() for d in DTYPES]
    outputs = [part(given) for part, given in zip((exact, rounded), inputs, strict=True)]
    for y in outputs:
        y.backward(dy.to(y.dtype))
    assert outputs[1].dtype is inputs[1].grad.dtype is torch.bfloat16
    for mine, other in (outputs, [given.grad for given in inputs]):
        assert (mine - other).norm() / mine.norm() < 0.02


@pytest.mark.parametrize("name", ["gemma3", "granite", "olmo2"])
def test_gradients_of_biases_and_norms_are_not_rounded_to_bfloat16(group, name):
    part = stage(group, range(2), model=replace(MODEL, **FAMILIES[name]), dtype=torch.bfloat16)
    for parameter in part.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    x, dy = torch.randn(2, 20, 2, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    part(x.requires_grad_()).backward(dy)
    for key, parameter in part.named_parameters():
        if parameter.dim() == 1:
            assert not torch.equal(parameter.grad, parameter.grad.bfloat16().float()), key


def test_a_bias_that_the_residual_adds_has_its_gradient_in_float32():
    bias = nn.Parameter(torch.zeros(48, dtype=torch.bfloat16))
    bias.grad_dtype = torch.float32
    bias.grad = torch.ones(48, dtype=torch.float32)
    x, dy = torch.randn(2, 300, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = Addend(None, 1.0)(x.requires_grad_(), bias)
    assert torch.equal(y, x + bias)
    y.backward(dy)
    assert torch.equal(x.grad, dy)
    assert torch.allclose(bias.grad, 1 + dy.float().sum(0), rtol=1e-5, atol=1e-5)


def test_the_first_stage_scales_embeddings_and_adds_positions(group):
    model = replace(MODEL, embedding_scale=True, positions="learned")
    first, other = (
        stage(group, range(0), first=True, model=model),
        stage(group, range(0), model=model),
    )
    x = torch.randn(20, 2, 48, dtype=torch.float64)
    assert torch.equal(
        first(x), x * torch.tensor(48**0.5, dtype=torch.float64) + first.positions[:, None]
    )
    assert other.positions is None
    assert torch.equal(other(x), x)


def test_embeddings_and_logits_are_scaled_as_granite_does(group):
    model = replace(MODEL, embedding_multiplier=12.0, logit_divisor=6.0, positions="learned")
    ends = {"first": True, "final_norm": True, "model": model}
    part, plain = stage(group, range(0), **ends), stage(group, range(0), final_norm=True)
    x = torch.randn(20, 2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = plain(12 * x + part.positions[:, None]) / 6
    assert torch.allclose(part(x), expected, rtol=1e-14, atol=0)


def test_the_state_of_a_stage_is_its_parameters(group):
    """Tables and scales follow from the settings."""
    model = replace(MODEL, **FAMILIES["gemma3"], embedding_scale=True)
    part = stage(group, range(2), first=True, final_norm=True, model=model)
    assert {name for name, _ in part.named_buffers()} == {"scale", "rotary", "local_rotary"}
    assert part.state_dict().keys() == {name for name, _ in part.named_parameters()}


def test_positions_start_again_with_every_document(group):
    model = replace(MODEL, positions="learned")
    part = stage(group, range(0), first=True, model=model)
    positions = part(torch.zeros(20, 2, 48, dtype=torch.float64), SEGMENTS)
    assert torch.equal(positions[:, 0], part.positions[[*range(7), *range(13)]])
    assert torch.equal(positions[:, 1], part.positions[[0, *range(18), 0]])


def test_splitting_into_stages_gives_the_same_bits(group):
    whole = stage(group, range(4), final_norm=True)
    parts = [
        stage(group, range(1)),
        stage(group, range(1, 1)),
        stage(group, range(1, 4), final_norm=True),
    ]
    x = torch.randn(20, 2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x
    for part in parts:
        y = part(y)
    assert torch.equal(y, whole(x))
    names = {name for part in parts for name, _ in part.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters()}


def test_later_tokens_do_not_change_earlier_outputs(group):
    part = stage(group, range(2))
    x = torch.randn(20, 1, 48, dtype=torch.float64)
    other = x.clone()
    other[12:] += 1
    assert torch.equal(part(x)[:12], part(other)[:12])


def test_shards_of_the_vocabulary_draw_the_values_of_the_whole():
    model = ModelConfig(hidden_size=16, num_heads=2, num_query_groups=1, vocab_size=5000)

    def rows(start, stop):
        return init_rows("embedding", start, stop, model, 7, torch.float32, CPU)

    assert torch.equal(
        torch.cat([rows(0, 1), rows(1, 1), rows(1, 2500), rows(2500, 5000)]), rows(0, 5000)
    )
    assert not torch.equal(rows(0, 1024), rows(1024, 2048))
    assert not torch.equal(rows(0, 9), init_rows("output", 0, 9, model, 7, torch.float32, CPU))


@pytest.mark.parametrize("name", FAMILIES)
def test_parameter_counts(group, name):
    model = replace(MODEL, tied_embeddings=name == "gemma", **FAMILIES[name])
    part = stage(group, range(4), first=True, final_norm=True, model=model)
    matrices = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    assert sum(p.numel() for p in part.parameters()) + matrices == shape.num_parameters(model)
    assert sum(p.numel() for p in part.layers["0"].parameters()) == shape.layer_parameters(model)


def random_input(model, batch, dtype):
    shape = model.seq_length, batch, model.hidden_size
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def kept_bytes(part, x, segments=None):
    """Return the bytes that autograd saves in a forward of x, without the weights, and the output.

    The output keeps the saved tensors alive.
    """
    weights = {p.untyped_storage().data_ptr() for p in part.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = part(x, segments)
        return sum(kept.values()), y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (MODEL, 1),
        (MODEL, 3),
        (
            ModelConfig(
                num_layers=4,
                hidden_size=64,
                num_heads=4,
                num_query_groups=4,
                ffn_hidden_size=256,
                seq_length=128,
            ),
            2,
        ),
        (
            ModelConfig(
                num_layers=4,
                hidden_size=128,
                num_heads=8,
                num_query_groups=1,
                ffn_hidden_size=64,
                seq_length=64,
            ),
            1,
        ),
    ],
)
def test_activation_bytes_are_what_autograd_keeps(group, model, batch, dtype):
    part = stage(group, range(3), final_norm=True, dtype=dtype, model=model)
    predicted = 3 * shape.layer_activation_bytes(model, batch, dtype.itemsize)
    predicted += shape.final_norm_activation_bytes(model, batch, dtype.itemsize)
    measured, y = kept_bytes(part, random_input(model, batch, dtype))
    assert measured == predicted
    assert y.dtype == dtype


def test_documents_are_runs_of_equal_segments():
    assert document_lengths(SEGMENTS) == (7, 13, 1, 18, 1)
    assert document_lengths(torch.tensor([[3, 3, 0], [0, 0, 3]])) == (2, 1, 2, 1)
    assert document_lengths(torch.tensor([[0, 0], [0, 0], [1, 1]])) is None


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_keep_no_mask(group, batch):
    """A packed stage keeps one more value per token, layer and hidden unit than an unpacked one.

    That is the concatenation of the documents' outputs.
    """
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        num_query_groups=1,
        ffn_hidden_size=64,
        seq_length=512,
    )
    part = stage(group, range(2), dtype=torch.float32, model=model)
    segments = (torch.arange(512) // 100).int().expand(batch, -1)
    kept, _y = kept_bytes(part, random_input(model, batch, torch.float32), segments)
    joined, mask = 2 * 512 * batch * 32 * 4, 512 * 512 * batch * 4
    assert kept <= 2 * shape.layer_activation_bytes(model, batch, 4) + joined
    assert joined < mask / 4, "otherwise this test would not notice a mask"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("batch", "recompute"), [(1, "none"), (3, "none"), (3, "selective"), (3, "full")]
)
def test_activation_bytes_of_every_flag_are_what_autograd_keeps(group, name, batch, recompute):
    model = replace(MODEL, seq_length=64, **FAMILIES[name])
    part = stage(group, range(3), final_norm=True, model=model, recompute=recompute)
    predicted = 3 * shape.layer_activation_bytes(model, batch, 8, recompute=recompute)
    predicted += shape.final_norm_activation_bytes(model, batch, 8)
    measured, _ = kept_bytes(part, random_input(model, batch, torch.float64))
    # On a CPU attention with a window keeps no log-sums.
    assert measured == pytest.approx(predicted, rel=0.03 if model.sliding_window else 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_held_for_w_are_those_predicted(group, name):
    model = replace(MODEL, **FAMILIES[name])
    part = stage(group, range(2), model=model)
    y = part(torch.randn(20, 3, 48, dtype=torch.float64, requires_grad=True))
    with part.weight_grads.deferring(0):
        torch.autograd.backward(y, torch.ones_like(y))
    assert part.weight_grads.held_bytes == pytest.approx(
        2 * shape.layer_weight_grad_bytes(model, 3, 8), rel=0.01
    )


def test_a_window_costs_its_own_size():
    model = replace(MODEL, seq_length=4096, sliding_window=128, full_attention_every=4)
    full, local = (
        shape.layer_flops(replace(model, sliding_window=w, full_attention_every=None), 4096)
        for w in (None, 128)
    )
    assert shape.layer_flops(model, 4096) == (full + 3 * local) // 4
    assert full - local == 4 * 4096 * 48 * (4096 - 128)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("recompute", "forwards"), [("none", (1, 1)), ("selective", (2, 1)), ("full", (2, 2))]
)
def test_a_split_backward_recomputes_what_the_setting_says_and_only_once(
    group, name, recompute, forwards
):
    model = replace(MODEL, **FAMILIES[name])
    ours, plain = (
        stage(group, range(2), model=model, recompute=recompute),
        stage(group, range(2), model=model),
    )
    x = torch.randn(20, 2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(20, 2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    calls = Counter()
    for layer in ours.layers.values():
        for part in ("self_attention.core_attention", "mlp.linear_fc1"):
            layer.layer.get_submodule(part).register_forward_pre_hook(
                lambda *_, part=part: calls.update([part])
            )
    inputs = []
    for module in (ours, plain):
        given = x.clone().requires_grad_()
        inputs.append(given)
        y = module(given)
        with module.weight_grads.deferring(0):
            torch.autograd.backward(y, dy)
        module.weight_grads.drain(0)
    assert tuple(calls.values()) == tuple(2 * count for count in forwards)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_w_frees_the_tensors_that_i_left_for_it(group):
    module = stage(group, range(2))
    for microbatch in range(2):
        x = torch.randn(20, 2, 48, dtype=torch.float64, requires_grad=True)
        y = module(x)
        with module.weight_grads.deferring(microbatch):
            torch.autograd.backward(y, torch.ones_like(y))
        kept = [
            weakref.ref(tensor)
            for product in module.weight_grads._waiting[microbatch]
            for tensor in product[1:]
        ]
        assert module.weight_grads.held_bytes > 0
        module.weight_grads.drain(microbatch)
        del x, y
        gc.collect()
        assert not any(tensor() is not None for tensor in kept)
        assert not any(parameter.grad.requires_grad for parameter in module.parameters())


class Sums(TorchDispatchMode):
    """Count the all-reduces of what runs within."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += "allreduce" in str(operation)
        return operation(*args, **(kwargs or {}))


def counted(run):
    """Return the result of `run`, the FLOPs of its products, and its all-reduces."""
    with FlopCounterMode(display=False) as flops, Sums() as sums:
        result = run()
    return result, flops.get_total_flops(), sums.count


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("preset", [["activation=gelu"], [], ["post_norms=true"]], ids=str)
def test_what_runs_again_ends_with_the_last_tensor_that_the_backward_needs(preset, recompute):
    """Products and tensor-parallel sums are those that a plan counts."""
    words = [
        "model=small",
        *(f"model.{word}" for word in preset),
        f"parallel.recompute={recompute}",
    ]
    config = load_config([*words, "parallel.tp=2", "cost.tensor_seconds=1"])
    model, work = config.model, Workload.of(config, Degrees(1, 1, 2))
    with fake_world(0, 2):
        one = stage(
            dist.group.WORLD, range(1), dtype=torch.float32, model=model, recompute=recompute
        )
        x = torch.randn(model.seq_length, 1, model.hidden_size, requires_grad=True)
        y, there, sums = counted(lambda: one(x))
        with one.weight_grads.deferring(0):
            _, back, more = counted(lambda: torch.autograd.grad(y, x, torch.randn_like(y)))
        one.weight_grads.discard(0)
    assert (sums, more - 2) == (2, exchanged_again(work, config.cost, recompute))
    # On a CPU the counter takes no account of attention.
    attended = shape.layer_flops(work.share, model.seq_length) - 2 * model.seq_length * sum(
        shape.linear_parameters(work.share)
    )
    repeated = shape.recomputed_part(work.share, recompute) * (there + attended)
    assert back - there == pytest.approx(repeated - (attended if repeated else 0))
