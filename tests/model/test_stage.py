"""Megatron's layer is the decoder layer it should be, and how the layers are split changes nothing."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vp_train.config import ModelConfig
from vp_train.model import shape
from vp_train.model.stage import Stage, document_lengths, init_rows

MODEL = ModelConfig(
    num_layers=4, hidden_size=48, num_heads=6, num_query_groups=2, ffn_hidden_size=80, vocab_size=100, seq_length=20
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def stage(group, layers, final_norm=False, dtype=torch.float64, model=MODEL, seed=3, **options):
    return Stage(model, layers, final_norm=final_norm, dtype=dtype, device=CPU, group=group, seed=seed, **options)


def plain_layer(x, weights, model, segments=None):
    """A decoder layer written from its formulas; x [s, b, h], segments [b, s] that do not see each other."""
    s, b, h = x.shape
    n, g, d = model.num_heads, model.num_query_groups, h // model.num_heads

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + model.norm_epsilon).rsqrt() * weight

    def rope(x):
        frequency = model.rope_base ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
        angle = torch.outer(torch.arange(s, dtype=x.dtype), frequency)[:, None, None]
        a, c = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * angle.cos() - c * angle.sin(), c * angle.cos() + a * angle.sin()], -1)

    qkv = (norm(x, weights["input_layernorm.weight"]) @ weights["self_attention.linear_qkv.weight"].T).view(s, b, g, -1)
    q, k, v = qkv.split([n // g * d, d, d], -1)
    q, k = rope(q.reshape(s, b, n, d)), rope(k)
    k, v = k.repeat_interleave(n // g, 2), v.repeat_interleave(n // g, 2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / d**0.5
    hidden = torch.ones(s, s).triu(1).bool()
    if segments is not None:
        hidden = hidden | (segments[:, None, :, None] != segments[:, None, None, :])
    scores = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    x = x + torch.einsum("bnst,tbnd->sbnd", scores, v).reshape(s, b, h) @ weights["self_attention.linear_proj.weight"].T
    gate, up = (norm(x, weights["pre_mlp_layernorm.weight"]) @ weights["mlp.linear_fc1.weight"].T).chunk(2, -1)
    return x + (nn.functional.silu(gate) * up) @ weights["mlp.linear_fc2.weight"].T


SEGMENTS = torch.tensor([[0] * 7 + [1] * 13, [0] + [1] * 18 + [2]], dtype=torch.int32)


@pytest.mark.parametrize("segments", [None, SEGMENTS, torch.zeros_like(SEGMENTS)], ids=["none", "packed", "one each"])
def test_a_layer_equals_its_formulas_in_float64(group, segments):
    ours = stage(group, range(1))
    x = torch.randn(20, 2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = {
        name.removeprefix("layers.0.layer."): parameter.detach().clone().requires_grad_()
        for name, parameter in ours.named_parameters()
    }
    ours_x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours_y, plain_y = ours(ours_x, segments), plain_layer(plain_x, weights, MODEL, segments)
    assert torch.allclose(ours_y, plain_y, rtol=0, atol=1e-12)
    dy = torch.randn_like(x)
    ours_y.backward(dy)
    plain_y.backward(dy)
    assert torch.allclose(ours_x.grad, plain_x.grad, rtol=0, atol=1e-12)
    for name, parameter in ours.named_parameters():
        expected = weights[name.removeprefix("layers.0.layer.")].grad
        assert torch.allclose(parameter.grad, expected, rtol=0, atol=1e-11), name


def test_splitting_into_stages_gives_the_same_bits(group):
    whole = stage(group, range(4), final_norm=True)
    parts = [stage(group, range(1)), stage(group, range(1, 1)), stage(group, range(1, 4), final_norm=True)]
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

    assert torch.equal(torch.cat([rows(0, 1), rows(1, 1), rows(1, 2500), rows(2500, 5000)]), rows(0, 5000))
    assert not torch.equal(rows(0, 1024), rows(1024, 2048))
    assert not torch.equal(rows(0, 9), init_rows("output", 0, 9, model, 7, torch.float32, CPU))


def test_parameter_counts(group):
    part = stage(group, range(2), final_norm=True)
    assert sum(p.numel() for p in part.parameters()) == 2 * shape.layer_parameters(MODEL) + MODEL.hidden_size


def kept_bytes(part, x, segments=None):
    """Storage that autograd keeps for the backward of `part`, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in part.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = part(x, segments)  # keeps the graph, and so the storages, alive while they are counted
    assert y.dtype == x.dtype
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (MODEL, 1),
        (MODEL, 3),
        (ModelConfig(num_layers=4, hidden_size=64, num_heads=4, num_query_groups=4, ffn_hidden_size=256, seq_length=128), 2),
        (ModelConfig(num_layers=4, hidden_size=128, num_heads=8, num_query_groups=1, ffn_hidden_size=64, seq_length=64), 1),
    ],
)
def test_activation_bytes_are_what_autograd_keeps(group, model, batch, dtype):
    part = stage(group, range(3), final_norm=True, dtype=dtype, model=model)
    x = torch.randn(model.seq_length, batch, model.hidden_size, dtype=dtype, requires_grad=True)
    predicted = 3 * shape.layer_activation_bytes(model, batch, dtype.itemsize)
    predicted += shape.final_norm_activation_bytes(model, batch, dtype.itemsize)
    assert kept_bytes(part, x) == pytest.approx(predicted, rel=0.05)


def test_documents_are_runs_of_equal_segments():
    assert document_lengths(SEGMENTS) == (7, 13, 1, 18, 1)
    assert document_lengths(torch.tensor([[3, 3, 0], [0, 0, 3]])) == (2, 1, 2, 1)
    assert document_lengths(torch.tensor([[0, 0], [0, 0], [1, 1]])) is None


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_keep_no_mask(group, batch):
    """What is kept beside an unpacked stage's is one value per token, layer and hidden unit: the documents joined again."""
    model = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, num_query_groups=1, ffn_hidden_size=64, seq_length=512)
    part = stage(group, range(2), dtype=torch.float32, model=model)
    segments = (torch.arange(512) // 100).int().expand(batch, -1)
    kept = kept_bytes(part, torch.randn(512, batch, 32, requires_grad=True), segments)
    joined, mask = 2 * 512 * batch * 32 * 4, 512 * 512 * batch * 4
    assert kept <= 2 * shape.layer_activation_bytes(model, batch, 4) + joined
    assert joined < mask / 4, "or this test would not notice a mask"


@pytest.mark.parametrize(("recompute", "forwards"), [(False, 1), (True, 2)])
def test_a_split_backward_runs_each_forward_again_once_and_only_when_told(group, recompute, forwards):
    ours, plain = stage(group, range(2), recompute=recompute), stage(group, range(2))
    x = torch.randn(20, 2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(20, 2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    calls = dict.fromkeys(ours.layers, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name, layer in ours.layers.items():
        layer.layer.register_forward_pre_hook(count(name))
    inputs = []
    for module in (ours, plain):
        given = x.clone().requires_grad_()
        inputs.append(given)
        y = module(given)
        with module.weight_grads.deferring(0):
            torch.autograd.backward(y, dy)
        module.weight_grads.drain(0)
    assert calls == dict.fromkeys(ours.layers, forwards)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_w_lets_go_of_what_i_left_for_it(group):
    module = stage(group, range(2))
    for microbatch in range(2):
        x = torch.randn(20, 2, 48, dtype=torch.float64, requires_grad=True)
        y = module(x)
        with module.weight_grads.deferring(microbatch):
            torch.autograd.backward(y, torch.ones_like(y))
        kept = [weakref.ref(tensor) for product in module.weight_grads._waiting[microbatch] for tensor in product[1:]]
        assert module.weight_grads.held_bytes > 0
        module.weight_grads.drain(microbatch)
        del x, y
        gc.collect()
        assert not any(tensor() is not None for tensor in kept)
        assert not any(parameter.grad.requires_grad for parameter in module.parameters())
