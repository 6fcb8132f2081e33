"""Attention by blocks is precise in bfloat16; on a GPU one kernel computes packed documents."""

import sys
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from vp_train.model import attention
from vp_train.model.attention import (
    Documents,
    Rule,
    attend_documents,
    attend_flexibly,
    block_attention,
    block_mask,
    first_keys,
)
from vp_train.model.megatron import CoreAttention

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_scores_of_bfloat16_are_scaled_capped_and_normalised_in_float32(softcap):
    """The products are integers that bfloat16 represents, and v is the identity.

    So the outputs are the attention weights, rounded once.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (16, 1, 1, 16), generator=generator).bfloat16() for _ in range(2))
    weights = block_attention(
        q, k, torch.eye(16).bfloat16().view(16, 1, 1, 16), Rule(0.3, softcap, None)
    )[:, 0]
    scores = 0.3 * (q[:, 0, 0].double() @ k[:, 0, 0].double().T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    exact = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1)
    assert scores.abs().max() > 10  # where bfloat16 is no more precise than 1/16
    assert torch.allclose(weights.double(), exact, rtol=2**-8, atol=1e-30)


@on_gpu
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_packed_documents_on_a_gpu_are_attended_to_one_by_one(groups, window):
    """Compare values and gradients with `block_attention` in float64."""
    lengths, heads, size = (1, 300, 7, 64, 2), 4, 64
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, size) for count in (heads, groups, groups)]
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    dy = torch.randn(sum(lengths), heads * size, generator=generator).bfloat16()
    ours = [tensor.cuda().requires_grad_() for tensor in given]
    context = attend_documents(*ours, Documents.on(torch.device("cuda"), lengths), 0.2, window)
    assert context is not None
    context.backward(dy.cuda())
    exact = [tensor.double().requires_grad_() for tensor in given]
    pieces = zip(*(tensor[:, None].split(lengths) for tensor in exact), strict=True)
    rule = Rule(0.2, None, window)
    expected = torch.cat([block_attention(*piece, rule)[:, 0] for piece in pieces])
    expected.backward(dy.double())
    pairs = [
        (context, expected),
        *((mine.grad, true.grad) for mine, true in zip(ours, exact, strict=True)),
    ]
    for mine, true in pairs:
        # At least 1: with a window of one token the gradients of q and k are 0.
        largest = max(true.abs().max().item(), 1.0)
        assert torch.allclose(mine.cpu().double(), true, rtol=2e-2, atol=2e-2 * largest)


@on_gpu
@pytest.mark.parametrize("window", [None, 7, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_softcaps_windows_and_documents_on_a_gpu_are_those_by_blocks(softcap, window):
    """Compare values and gradients of FlexAttention with `block_attention` in float64."""
    lengths, heads, groups, size = (1, 300, 7, 64, 2), 4, 2, 64
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, size) for count in (heads, groups, groups)]
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    dy = torch.randn(sum(lengths), heads * size, generator=generator).bfloat16()
    rule = Rule(0.2, softcap, window)
    ours = [tensor.cuda().requires_grad_() for tensor in given]
    context = attend_flexibly(*ours, Documents.on(torch.device("cuda"), lengths), rule)
    assert context is not None
    context.backward(dy.cuda())
    exact = [tensor.double().requires_grad_() for tensor in given]
    pieces = zip(*(tensor[:, None].split(lengths) for tensor in exact), strict=True)
    expected = torch.cat([block_attention(*piece, rule)[:, 0] for piece in pieces])
    expected.backward(dy.double())
    for mine, true in [
        (context, expected),
        *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True)),
    ]:
        largest = max(true.abs().max().item(), 1.0)
        assert torch.allclose(mine.cpu().double(), true, rtol=2e-2, atol=2e-2 * largest)


def test_on_a_cpu_no_kernel_takes_packed_documents():
    q = torch.zeros(3, 1, 16, dtype=torch.bfloat16)
    documents = Documents.on(torch.device("cpu"), (1, 2))
    assert attend_documents(q, q, q, documents, 1.0, None) is None
    assert attend_flexibly(q, q, q, documents, Rule(1.0, 20.0, None)) is None


def on_cuda_of(capability, monkeypatch, *, compiles=True):
    """Let this process have a GPU of this capability, and return a function that makes its q."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "compiles_on", lambda device: compiles)

    def q(size, dtype, is_cuda=True):
        return SimpleNamespace(shape=(3, 1, size), dtype=dtype, device="cuda", is_cuda=is_cuda)

    return q


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_kernels_take_the_sizes_dtypes_and_gpus_that_they_support(monkeypatch, capability, dtype):
    q, newer = on_cuda_of(capability, monkeypatch), capability >= (8, 0)
    for size in (1, 8, 15, 16, 20, 24, 255, 256, 257, 264):
        flash = newer and dtype.itemsize == 2 and size <= 256 and size % 8 == 0
        flexible = newer and dtype is not torch.float64 and 16 <= size <= 256
        assert attention._suits_flash(q(size, dtype)) == flash
        assert attention._suits_flexible(q(size, dtype)) == flexible
    assert not attention._suits_flexible(q(64, torch.bfloat16, is_cuda=False))
    q = on_cuda_of(capability, monkeypatch, compiles=False)
    assert not attention._suits_flexible(q(64, torch.bfloat16))


@pytest.mark.parametrize("window", [None, 1, 7])
def test_packed_documents_are_one_call_with_their_bounds_and_window(monkeypatch, window):
    called = []

    def attend(*tensors, **options):
        called.append((tensors, options))
        return torch.zeros(10, 2, 8)

    monkeypatch.setattr(attention, "_variable_length_attention", lambda: attend)
    monkeypatch.setattr(attention, "_suits_flash", lambda q: True)
    documents, q = documents_with_bounds((3, 5, 2)), torch.zeros(10, 2, 8)
    assert attend_documents(q, q, q, documents, 0.5, window).shape == (10, 16)
    ((*_, first, second, longest, same), options) = called[0]
    assert first.tolist() == second.tolist() == [0, 3, 8, 10]
    assert (longest, same) == (5, 5)
    left = -1 if window is None else window - 1  # tokens before its own
    assert options == {"scale": 0.5, "window_size": (left, 0)}
    for name, value in (
        ("_variable_length_attention", lambda: None),
        ("_suits_flash", lambda q: False),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(attention, name, value)
            assert attend_documents(q, q, q, documents, 0.5, window) is None
    assert len(called) == 1


def test_a_torch_whose_attention_knows_no_scale_or_no_window_is_not_used(monkeypatch):
    def old(q, k, v):
        """Have neither option, as before."""

    def scaled(q, k, v, scale=None):
        """Have no window, as before."""

    def whole(q, k, v, scale=None, window_size=(-1, -1)):
        return "whole"

    def grouped(q, k, v, scale=None, window_size=(-1, -1), enable_gqa=False):
        return enable_gqa

    found = {}
    for function in (None, old, scaled, whole, grouped):
        attention._variable_length_attention.cache_clear()
        module = None if function is None else SimpleNamespace(varlen_attn=function)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        found[function] = attention._variable_length_attention()
    attention._variable_length_attention.cache_clear()
    assert [found[each] for each in (None, old, scaled)] == [None] * 3
    assert found[whole](1, 2, 3) == "whole"
    assert found[grouped](1, 2, 3) is True


@pytest.mark.parametrize("num_tokens", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("window", [None, 1, 2, 256, 300, 1000])
def test_a_block_of_queries_gets_the_keys_that_any_of_them_sees_and_no_others(num_tokens, window):
    rule, seen = Rule(1.0, None, window), visible((num_tokens,), window)
    starts = []
    for here, keys in rule.blocks(num_tokens):
        starts += range(here.start, here.stop)
        assert here.stop - here.start <= 256
        of_block = seen[here].any(0).nonzero().flatten()
        assert (keys.start, keys.stop) == (of_block[0], of_block[-1] + 1)
        hidden = rule._hidden(
            here.stop - here.start, keys.stop - keys.start, here.start - keys.start, CPU
        )
        assert torch.equal(~hidden, seen[here, keys])
    assert starts == list(range(num_tokens))


CPU = torch.device("cpu")
LENGTHS = [(1, 300, 7, 64, 2), (128, 256), (500,), (1,) * 130, (90,)]


def documents_with_bounds(lengths):
    """Return documents as on a GPU, with their bounds on the CPU."""
    return Documents(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))


def visible(lengths, window):
    """Return which keys a query sees: bool [queries, keys]."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    query, key = torch.arange(sum(lengths))[:, None], torch.arange(sum(lengths))
    seen = (document[:, None] == document) & (key <= query)
    return seen if window is None else seen & (key > query - window)


@pytest.mark.parametrize("window", [None, 1, 7, 129, 1000])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_mask_is_that_of_documents_and_windows_and_skips_all_blocks_that_it_can(
    lengths, window
):
    size, num_tokens = attention._MASK_BLOCK, sum(lengths)
    expected = visible(lengths, window)
    mask = block_mask(first_keys(documents_with_bounds(lengths).bounds, num_tokens, window))
    query, key = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
    assert torch.equal(mask.mask_mod(0, 0, query, key), expected)
    count = -(-num_tokens // size)
    padded = torch.zeros(count * size, count * size, dtype=torch.bool)
    padded[:num_tokens, :num_tokens] = expected
    padded[num_tokens:] = padded[num_tokens - 1]  # queries that nobody reads
    blocks = padded.view(count, size, count, size).transpose(1, 2).flatten(2)
    for of_queries, kinds in (
        (
            True,
            (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices),
        ),
        (False, (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)),
    ):
        in_part, whole = (
            {(i, j) for i in range(count) for j in indices[0, 0, i, : numbers[0, 0, i]].tolist()}
            for numbers, indices in (kinds[:2], kinds[2:])
        )
        if not of_queries:
            in_part, whole = ({(i, j) for j, i in pairs} for pairs in (in_part, whole))
        assert not in_part & whole
        assert in_part | whole == set(map(tuple, blocks.any(-1).nonzero().tolist()))
        assert all(blocks[i, j].all() for i, j in whole)
        assert whole >= {(i, j) for i, j in blocks.all(-1).nonzero().tolist() if i != j}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 7, 1000])
@pytest.mark.parametrize("lengths", LENGTHS[:2])
def test_flexible_attention_is_that_by_blocks(monkeypatch, lengths, window, softcap):
    """Run FlexAttention on the CPU, where it forms all scores, in place of its kernel."""
    monkeypatch.setattr(attention, "_suits_flexible", lambda q: True)
    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    module = sys.modules[flex_attention.__module__]
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), count, 16, generator=generator, dtype=torch.float64)
        for count in (4, 2, 2)
    )
    rule = Rule(0.7, softcap, window)
    found = attend_flexibly(q, k, v, documents_with_bounds(lengths), rule)
    pieces = zip(*(tensor[:, None].split(lengths) for tensor in (q, k, v)), strict=True)
    expected = torch.cat([block_attention(*piece, rule)[:, 0] for piece in pieces])
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 7])
def test_a_layer_attends_flexibly_as_it_does_by_blocks(monkeypatch, window):
    """Give the documents of two packed sequences their bounds, as on a GPU, and take them away."""
    lengths, s, b = (20, 12, 32), 32, 2
    monkeypatch.setattr(attention, "_suits_flexible", lambda q: True)
    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    module = sys.modules[flex_attention.__module__]
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    layer = CoreAttention(SimpleNamespace(kv_channels=16), 1, None, "", softcap=3.0, window=window)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(s, b, count, 16, generator=generator, dtype=torch.float64)
        for count in (4, 2, 2)
    )
    flexible, by_blocks = (
        layer(q, k, v, documents)
        for documents in (documents_with_bounds(lengths), Documents(lengths, None))
    )
    assert torch.allclose(flexible, by_blocks, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_neither_windows_nor_documents_of_other_lengths_are_compiled_anew(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, backend=backend)
    monkeypatch.setattr(attention, "_suits_flexible", lambda q: True)
    monkeypatch.setattr(attention, "_flex_attention", lambda: compiled)
    q, k, v = (torch.randn(300, count, 16) for count in (4, 2, 2))
    for lengths in ((300,), (100, 200), (1, 2, 297), (7,) * 42 + (6,)):
        documents = documents_with_bounds(lengths)
        for window in (None, 5, 77):
            attend_flexibly(q, k, v, documents, Rule(0.7, 3.0, window))
    assert len(graphs) == 1
    torch._dynamo.reset()
