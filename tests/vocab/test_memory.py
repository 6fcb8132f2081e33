"""The passes allocate chunks and what they hold, and never another [T, R] or [R, H]."""

from itertools import product

import pytest
import torch

from schedules.vocab import Payload
from tests.vocab.ranks import PLAIN, make_layer
from vp_train.profile.live import LiveStorages
from vp_train.tensors.precision import column_sums
from vp_train.vocab import chunks
from vp_train.vocab.input import InputLayer
from vp_train.vocab.loss import LossOptions
from vp_train.vocab.products import VocabProducts
from vp_train.vocab.shard import Shard

T, H, R = 16, 8, 4096
CHUNK = T * 64 * 4  # bytes of the logits of 64 rows
SMALL = 4 * CHUNK  # a sixteenth of the held [T, R], and an eighth of dW


@pytest.fixture(autouse=True)
def chunks_of_64_rows(monkeypatch):
    monkeypatch.setitem(chunks.CHUNKS, "cpu", chunks.ChunkSize(CHUNK, 1, R))


@pytest.mark.parametrize("item_bytes", [2, 8])
@pytest.mark.parametrize("num_tokens", [1, 7, 999])
def test_a_chunk_is_the_largest_whose_logits_fit_if_its_bounds_allow(num_tokens, item_bytes):
    size = chunks.ChunkSize(3_000, 3, 700)
    fitting = [rows for rows in range(3, 701) if rows * num_tokens * item_bytes <= 3_000]
    assert size.num_rows(num_tokens, item_bytes) == max(fitting, default=3)


def test_scratch_of_a_name_and_dtype_is_one_memory_as_large_as_the_largest_use():
    products, seen = VocabProducts(), {}
    for shape in ((4, 5), (2, 3), (20,), (3, 7), (4, 5)):
        for name, dtype in product("ab", (torch.float32, torch.bfloat16)):
            scratch = products.scratch(name, shape, dtype, torch.device("cpu"))
            assert (scratch.shape, scratch.dtype) == (shape, dtype)
            seen.setdefault((name, dtype), []).append(scratch.untyped_storage())
    for first, second, third, larger, last in seen.values():
        assert first.data_ptr() == second.data_ptr() == third.data_ptr()
        assert larger.data_ptr() == last.data_ptr() != first.data_ptr()
    assert len({memory.data_ptr() for uses in seen.values() for memory in uses}) == 8


def growth(work):
    """Return by how many bytes the live storages grow at their peak while `work` runs."""
    live = LiveStorages()
    live.add_existing()
    before = live.peak
    with live:
        work()
    return live.peak - before


def layer_of(algorithm, backend, options=PLAIN):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(R, H, generator=generator), torch.randn(T, H, generator=generator)
    layer = make_layer(weight, torch.zeros_like(weight), Shard(0, R), algorithm, backend, options)
    targets = torch.randint(0, R, (1, T), generator=generator)
    return layer, layer.begin(targets, torch.ones(1, T)), x


def to_lse(step):
    step.absorb(Payload.STATISTICS, 0, step.message(Payload.STATISTICS, 0)[None])


def test_s_grows_by_what_it_holds_and_t_by_a_chunk():
    for options in (PLAIN, LossOptions(label_smoothing=0.1, z_loss=0.1)):
        _, step, x = layer_of("one_barrier", "chunked", options)
        assert T * R * 4 <= growth(lambda step=step, x=x: step.s(0, x)) <= T * R * 4 + SMALL
        to_lse(step)
        assert growth(lambda step=step: step.t(0)) <= SMALL


def test_the_next_s_reuses_the_memory_that_t_gives_back():
    layer, step, x = layer_of("one_barrier", "chunked")
    for _ in range(2):
        first = growth(lambda step=step: step.s(0, x))
        to_lse(step)
        step.t(0)
        step.finish()
        step = layer.begin(torch.zeros(1, T, dtype=torch.int64), torch.ones(1, T))
    assert first <= SMALL


def test_memory_of_another_size_is_not_kept():
    layer, step, x = layer_of("one_barrier", "chunked")
    for size in (T, T // 2, T // 4):
        step.s(0, x[:size])
        to_lse(step)
        step.t(0)
        step.finish()
        step = layer.begin(torch.zeros(1, size // 2, dtype=torch.int64), torch.ones(1, size // 2))
    assert [memory.numel() for memory in layer.backend._free] == [T // 4 * R]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_recompute_never_has_all_logits(softcap):
    _, step, x = layer_of("two_barrier", "recompute", LossOptions(softcap=softcap))
    assert growth(lambda: step.s(0, x)) <= SMALL
    to_lse(step)
    assert growth(lambda: step.t(0)) <= SMALL


@pytest.mark.parametrize("backend", ["chunked", "recompute"])
def test_evaluation_never_has_all_logits(backend):
    _, step, x = layer_of("evaluate", backend)
    assert growth(lambda: step.s(0, x, keep=False)) <= SMALL


def test_g_costs_the_tokens():
    weight = torch.zeros(R, H)
    layer = InputLayer(weight, torch.zeros_like(weight), (Shard(0, R),), 0)
    step = layer.begin(torch.arange(T)[None])
    assert growth(lambda: step.g(0, torch.ones(T, H))) <= 2 * T * H * 4


def test_sums_of_rows_are_exact():
    matrix = torch.randn(R + 1, H, generator=torch.Generator().manual_seed(0)).add_(1).bfloat16()
    assert torch.allclose(
        column_sums(matrix, torch.float32), matrix.double().sum(0).float(), rtol=1e-6
    )
    assert torch.equal(column_sums(matrix[:0], torch.float32), torch.zeros(H))
