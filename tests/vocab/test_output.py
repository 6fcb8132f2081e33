"""The sharded output layer equals the unsharded one: loss, input gradient and weight gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vocab.ranks import largest_kept, run_output
from vp_train.vocab import output
from vp_train.vocab.output import IGNORE_INDEX, OutputLayer
from vp_train.vocab.reference import cross_entropy
from vp_train.vocab.shard import Shard, split_rows

ALGORITHMS = ["naive", "two_barrier", "one_barrier"]
BACKENDS = ["reference", "chunked"]
T, H = 11, 8


def inputs(vocab_size, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab_size, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (T,), generator=generator)
    targets[3] = IGNORE_INDEX
    grad_loss = torch.rand(T, generator=generator, dtype=torch.float64)
    grad_loss[3] = 0
    return x.to(dtype), weight.to(dtype), targets, grad_loss.to(dtype)


def assert_equal(sharded, truth, tolerance):
    for name, ours, theirs in zip(("loss", "dx", "dW"), sharded, truth, strict=False):
        scale = theirs.abs().max().clamp_min(1e-3)  # with one row, dW is zero but for rounding
        assert ((ours - theirs).abs().max() / scale).item() <= tolerance, name


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 3 rows, so that small vocabularies have several."""
    monkeypatch.setitem(output._CHUNK_ELEMENTS, "cpu", 3 * T)


SHARDS = [
    *((v, [shard.num_rows for shard in split_rows(v, n)]) for v in (64, 100, 101, 1000) for n in (1, 2, 3, 4)),
    (101, [0, 60, 1, 40]),
    (3, [1, 1, 1, 0]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["none", *ALGORITHMS])
@pytest.mark.parametrize(("vocab_size", "sizes"), SHARDS)
@pytest.mark.usefixtures("small_chunks")
def test_shards_equal_the_whole_in_float64(vocab_size, sizes, algorithm, backend):
    case = inputs(vocab_size)
    assert_equal(run_output(*case, sizes=sizes, algorithm=algorithm, backend=backend), cross_entropy(*case), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.usefixtures("small_chunks")
def test_low_precision_stays_near_float64(algorithm, backend, dtype, tolerance):
    case = inputs(101, dtype)
    truth = cross_entropy(case[0].double(), case[1].double(), case[2], case[3].double())
    sharded = run_output(*case, sizes=[50, 51], algorithm=algorithm, backend=backend, grad_dtype=torch.float32)
    assert_equal([tensor.double() for tensor in sharded[:3]], truth, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_microbatch_of_ignored_tokens_has_no_loss_and_no_gradient(algorithm, backend):
    x, weight, targets, grad_loss = inputs(64)
    targets.fill_(IGNORE_INDEX)
    case = (x, weight, targets, torch.zeros_like(grad_loss))
    for tensor in run_output(*case, sizes=[40, 24], algorithm=algorithm, backend=backend)[:3]:
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.usefixtures("small_chunks")
def test_huge_logits_do_not_overflow(algorithm, backend):
    case = inputs(100, scale=300.0)
    sharded = run_output(*case, sizes=[34, 34, 32], algorithm=algorithm, backend=backend)
    assert all(tensor.isfinite().all() for tensor in sharded[:3])
    assert_equal(sharded, cross_entropy(*case), 1e-12)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any), st.sampled_from(ALGORITHMS), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_shard_sizes_are_right(sizes, algorithm, seed):
    case = inputs(sum(sizes), seed=seed)
    assert_equal(run_output(*case, sizes=sizes, algorithm=algorithm, backend="chunked"), cross_entropy(*case), 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_t_may_run_before_or_after_dx_is_exchanged(backend):
    case = inputs(100)
    early = run_output(*case, sizes=[50, 50], algorithm="one_barrier", backend=backend, t_early=True)
    late = run_output(*case, sizes=[50, 50], algorithm="one_barrier", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(early[:3], late[:3], strict=True))


def test_chunked_holds_the_exponentials_in_the_compute_dtype_and_x():
    x, weight, targets, grad_loss = inputs(64, torch.bfloat16)
    held = run_output(
        x, weight, targets, grad_loss, sizes=[40, 24], algorithm="one_barrier", backend="chunked", grad_dtype=torch.float32
    )[3]
    assert held == [T * rows * 2 + T * 4 + T * H * 2 for rows in (40, 24)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_chunks")
def test_evaluation_gives_the_same_loss_and_holds_nothing(backend):
    x, weight, targets, grad_loss = inputs(100)
    shards = split_rows(100, 3)
    layers = [OutputLayer(weight[s.start : s.stop], torch.zeros(s.num_rows, H), s, "evaluate", backend) for s in shards]
    for layer in layers:
        layer.s(0, x, targets, keep=False)
        assert layer.held_bytes == 0
        assert largest_kept(layer._microbatches[0]) <= T
    gathered = torch.stack([layer.message("C1", 0) for layer in layers])
    for layer in layers:
        layer.absorb("C1", 0, gathered)
        assert torch.allclose(layer.token_loss(0), cross_entropy(x, weight, targets, grad_loss)[0], rtol=1e-12)


@pytest.mark.usefixtures("small_chunks")
def test_evaluation_keeps_no_chunk_while_it_walks_the_rows():
    x, weight, _, _ = inputs(100)
    none = torch.empty(0, dtype=torch.long)
    held = output.Chunked().softmax(weight, x, none, none, input_term=False, keep=False)[1]
    assert largest_kept(held) <= T


def test_gradients_accumulate_over_microbatches():
    x, weight, targets, grad_loss = inputs(64)
    grad = torch.zeros_like(weight)
    layer = OutputLayer(weight, grad, Shard(0, 64), "one_barrier", "chunked")
    for microbatch in range(2):
        layer.s(microbatch, x, targets)
        layer.absorb("C1", microbatch, layer.message("C1", microbatch)[None])
        layer.t(microbatch, grad_loss)
    assert torch.allclose(grad, 2 * cross_entropy(x, weight, targets, grad_loss)[2], rtol=1e-12)


def test_a_uniform_layer_has_loss_ln_v():
    x, weight, targets, grad_loss = inputs(1000)
    loss = run_output(
        x, torch.zeros_like(weight), targets, grad_loss, sizes=[500, 500], algorithm="one_barrier", backend="chunked"
    )[0]
    assert loss[0].item() == pytest.approx(math.log(1000))
