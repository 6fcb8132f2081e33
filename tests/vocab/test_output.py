"""The sharded output layer equals the unsharded one: loss, input gradient and weight gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.vocab import VOCAB_ALGORITHMS, Payload
from tests.vocab.ranks import largest_kept, make_layer, run_output
from vp_train.vocab import backends, chunks, products
from vp_train.vocab.loss import IGNORE_INDEX, LossOptions
from vp_train.vocab.reference import cross_entropy
from vp_train.vocab.shard import Shard, split_rows

ALGORITHMS = [name for name, algorithm in VOCAB_ALGORITHMS.items() if algorithm.sharded]
BACKENDS = ["reference", "chunked", "recompute", "recompute:0.4"]
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


OPTIONS = [
    LossOptions(),
    LossOptions(label_smoothing=0.1),
    LossOptions(z_loss=0.01),
    LossOptions(label_smoothing=0.2, z_loss=0.05),
    LossOptions(softcap=3.0),
    LossOptions(softcap=3.0, z_loss=0.01),
]


def assert_equal(sharded, truth, tolerance):
    for name, ours, theirs in zip(("loss", "dx", "dW"), sharded[:3], truth, strict=True):
        assert ours.shape == theirs.shape, name
        scale = theirs.abs().max().clamp_min(1e-3)  # with one row, dW is 0 up to rounding
        assert ((ours - theirs).abs().max() / scale).item() <= tolerance, name


@pytest.fixture
def small_chunks(monkeypatch):
    """Make chunks so small that small vocabularies have several.

    Chunks have 3 rows in float64 and 12 in bfloat16; transposed blocks have 5 rows.
    """
    monkeypatch.setitem(chunks.CHUNKS, "cpu", chunks.ChunkSize(3 * T * 8, 1, 1000))
    monkeypatch.setattr(products, "_BLOCK_BYTES", 5 * H * 2)


@pytest.fixture(params=["kernels", "torch"])
def with_and_without_a_compiler(request, monkeypatch):
    """Work on the rows with kernels in C++, and as on a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


SHARDS = [
    *(
        (v, [shard.num_rows for shard in split_rows(v, n)])
        for v in (64, 100, 101)
        for n in (1, 2, 3, 4)
    ),
    (1000, [334, 333, 333]),
    (101, [0, 60, 1, 40]),
    (3, [1, 1, 1, 0]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["none", *ALGORITHMS])
@pytest.mark.usefixtures("small_chunks")
def test_shards_equal_the_whole_in_float64(algorithm, backend):
    for vocab_size, sizes in SHARDS:
        case = inputs(vocab_size)
        found = run_output(*case, sizes=sizes, algorithm=algorithm, backend=backend)
        assert_equal(found, cross_entropy(*case), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["none", *ALGORITHMS])
@pytest.mark.usefixtures("small_chunks")
def test_every_loss_option_is_exact(algorithm, backend):
    case = inputs(101)
    given = {"algorithm": algorithm, "backend": backend}
    for options in OPTIONS[1:]:
        truth = cross_entropy(*case, options)
        for sizes in ([101], [0, 60, 1, 40]):
            assert_equal(run_output(*case, sizes=sizes, options=options, **given), truth, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "chunked", "recompute:0.4"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.usefixtures("small_chunks", "with_and_without_a_compiler")
def test_low_precision_stays_near_float64(algorithm, backend, dtype, tolerance):
    case = inputs(101, dtype)
    exact = [case[0].double(), case[1].double(), case[2], case[3].double()]
    given = {"algorithm": algorithm, "backend": backend, "grad_dtype": torch.float32}
    for options in OPTIONS:
        sharded = run_output(*case, sizes=[50, 51], options=options, **given)
        truth = cross_entropy(*exact, options)
        assert_equal([tensor.double() for tensor in sharded[:3]], truth, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_microbatch_of_ignored_tokens_has_no_loss_and_no_gradient(algorithm, backend):
    x, weight, targets, grad_loss = inputs(64)
    targets.fill_(IGNORE_INDEX)
    case = (x, weight, targets, torch.zeros_like(grad_loss))
    given = {"algorithm": algorithm, "backend": backend}
    for options in OPTIONS:
        for tensor in run_output(*case, sizes=[40, 24], options=options, **given)[:3]:
            assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.usefixtures("small_chunks")
def test_huge_logits_do_not_overflow(algorithm, backend):
    case = inputs(100, scale=300.0)
    given = {"algorithm": algorithm, "backend": backend}
    for options in OPTIONS:
        sharded = run_output(*case, sizes=[34, 34, 32], options=options, **given)
        assert all(tensor.isfinite().all() for tensor in sharded[:3])
        assert_equal(sharded, cross_entropy(*case, options), 1e-12)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    st.sampled_from(ALGORITHMS),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_shard_sizes_are_right(sizes, algorithm, seed):
    case = inputs(sum(sizes), seed=seed)
    assert_equal(
        run_output(*case, sizes=sizes, algorithm=algorithm, backend="chunked"),
        cross_entropy(*case),
        1e-11,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_t_may_run_before_or_after_dx_is_exchanged(backend):
    case = inputs(100)
    early = run_output(
        *case, sizes=[50, 50], algorithm="one_barrier", backend=backend, t_early=True
    )
    late = run_output(*case, sizes=[50, 50], algorithm="one_barrier", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(early[:3], late[:3], strict=True))


@pytest.mark.parametrize(
    ("backend", "kept"), [("chunked", 1.0), ("recompute", 0.0), ("recompute:0.75", 0.25)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_held_is_the_exponentials_kept_in_the_compute_dtype_x_and_a_few_values_per_token(
    backend, kept, dtype
):
    held = run_output(
        *inputs(64, dtype),
        sizes=[40, 24],
        algorithm="one_barrier",
        backend=backend,
        grad_dtype=torch.float32,
    )[3]
    size = dtype.itemsize
    for rows_here, value in zip((40, 24), held, strict=True):
        # In fp32: maximum, total, target logit and lse, and the maximum of the only chunk if kept.
        per_token = 20 if kept else 16
        assert value == T * rows_here * kept * size + T * H * size + per_token * T


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_chunks")
def test_evaluation_measures_the_likelihood_and_holds_nothing(backend, options):
    x, weight, targets, grad_loss = inputs(100)
    layers = [
        make_layer(weight, torch.zeros(100, H), s, "evaluate", backend, options.measured)
        for s in split_rows(100, 3)
    ]
    steps = [layer.begin(targets[None], grad_loss[None]) for layer in layers]
    for step in steps:
        step.s(0, x, keep=False)
        assert step.held_bytes == 0
        assert largest_kept(step._microbatches[0]) <= T
    gathered = torch.stack([step.message(Payload.STATISTICS, 0) for step in steps])
    truth = cross_entropy(x, weight, targets, grad_loss, LossOptions(softcap=options.softcap))[0]
    for step in steps:
        step.absorb(Payload.STATISTICS, 0, gathered)
        assert torch.allclose(step.finish()[0], truth, rtol=1e-12)


@pytest.mark.usefixtures("small_chunks")
def test_evaluation_keeps_no_chunk_while_it_walks_the_rows():
    x, weight, targets, _ = inputs(100)
    (owned,) = Shard(0, 100).owned(targets[None], x.device)
    held = backends.Chunked(weight, weight, None, 0.0).s(x, owned, input_term=False, keep=False)[1]
    assert held.exponentials.numel() == 0
    assert held.maxima == []


@pytest.mark.parametrize("backend", ["chunked", "recompute", "recompute:0.4"])
def test_small_probabilities_keep_their_gradient_in_float16(backend):
    """Factors of x are far below float16's smallest for 200,000 rows and loss weights of 1e-3."""
    x, weight, targets, _ = inputs(200_000, torch.float16)
    weight, small = weight * 0.02, torch.full((T,), 1e-3)
    truth = cross_entropy(x.double(), weight.double(), targets, small.double())[2]
    found = run_output(
        x,
        weight,
        targets,
        small,
        sizes=[200_000],
        algorithm="one_barrier",
        backend=backend,
        grad_dtype=torch.float32,
    )
    others = torch.ones(len(weight), dtype=torch.bool).index_fill_(
        0, targets.clamp_min(0), value=False
    )
    assert ((found[2].double() - truth)[others].norm() / truth[others].norm()).item() < 1e-3


@pytest.mark.parametrize("backend", ["chunked", "recompute"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_with_a_mean_of_one_do_not_overflow_float16(algorithm, backend):
    """E W of all rows would be a sum of 100,000 ones, but float16 ends at 65,504."""
    x, weight, targets, grad_loss = inputs(100_000, torch.float16)
    weight = 0.02 * weight
    weight[:, 0] += 1
    truth = cross_entropy(x.double(), weight.double(), targets, grad_loss.double())
    found = run_output(
        x,
        weight,
        targets,
        grad_loss,
        sizes=[100_000],
        algorithm=algorithm,
        backend=backend,
        grad_dtype=torch.float32,
    )
    assert_equal([tensor.double() for tensor in found[:3]], truth, 1e-2)


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_chunks")
def test_the_terms_of_the_targets_and_of_smoothing_are_not_rounded(dtype, options):
    """Weights of 0 make all probabilities equal, so that no other term of dW is rounded."""
    x, weight, targets, grad_loss = inputs(101, dtype)
    weight, grad_loss = torch.zeros_like(weight), grad_loss.float()
    truth = cross_entropy(x.double(), weight.double(), targets, grad_loss.double(), options)[2]
    case = (x, weight, targets, grad_loss)
    found = run_output(
        *case,
        sizes=[60, 41],
        algorithm="one_barrier",
        backend="chunked",
        grad_dtype=torch.float32,
        options=options,
    )[2]
    rows = targets[targets != IGNORE_INDEX].unique()
    assert_equal([found[rows].double()] * 3, [truth[rows]] * 3, 1e-4)


def test_a_label_outside_the_vocabulary_is_refused():
    x, weight, targets, grad_loss = inputs(64)
    for label in (64, -1, 99):
        targets[5] = label
        with pytest.raises(
            IndexError, match=rf"label {label} is not in the vocabulary, whose ids are 0 to 63"
        ):
            run_output(
                x,
                weight,
                targets,
                grad_loss,
                sizes=[40, 24],
                algorithm="one_barrier",
                backend="chunked",
            )


def test_an_ignored_token_has_no_gradient_whatever_its_weight():
    x, weight, targets, grad_loss = inputs(64)
    heavy = grad_loss.clone()
    heavy[3] = 7.0
    options = {"sizes": [40, 24], "algorithm": "one_barrier", "backend": "chunked"}
    pairs = zip(
        run_output(x, weight, targets, heavy, **options),
        run_output(x, weight, targets, grad_loss, **options),
        strict=True,
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in list(pairs)[:3])


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_accumulate_over_microbatches_and_steps(options):
    x, weight, targets, grad_loss = inputs(64)
    grad = torch.zeros_like(weight)
    layer = make_layer(weight, grad, Shard(0, 64), "one_barrier", "chunked", options)
    for count in (2, 3):
        step = layer.begin(targets.expand(count, T), grad_loss.expand(count, T))
        for microbatch in range(count):
            step.s(microbatch, x)
            gathered = step.message(Payload.STATISTICS, microbatch)[None]
            step.absorb(Payload.STATISTICS, microbatch, gathered)
            step.t(microbatch)
        assert step.finish().shape == (count, T)
    assert torch.allclose(
        grad, 5 * cross_entropy(x, weight, targets, grad_loss, options)[2], rtol=1e-11, atol=1e-14
    )


def test_a_uniform_layer_has_loss_ln_v():
    x, weight, targets, grad_loss = inputs(1000)
    loss = run_output(
        x,
        torch.zeros_like(weight),
        targets,
        grad_loss,
        sizes=[500, 500],
        algorithm="one_barrier",
        backend="chunked",
    )[0]
    assert loss[0].item() == pytest.approx(math.log(1000))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_smoothing": 1.0}, r"label smoothing of 1\.0 is out of range"),
        ({"z_loss": -1.0}, r"z-loss of -1\.0 is out of range"),
        ({"z_loss": math.inf}, r"z-loss of inf is out of range"),
        ({"softcap": 0.0}, r"softcap of 0\.0 is out of range"),
        ({"softcap": math.inf}, r"softcap of inf is out of range"),
        (
            {"softcap": 30.0, "label_smoothing": 0.1},
            r"label smoothing of 0\.1 with a logit softcap of 30\.0 .*turn one of the two off",
        ),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**values)


@pytest.mark.parametrize("algorithm", ["one_barrier", "two_barrier"])
def test_the_error_of_dx_in_bfloat16_does_not_grow_with_the_shards(algorithm):
    """The error is that of torch's cross entropy for any number of shards.

    It would be larger if the terms of the shards were rounded before their sum.
    """
    x, weight, targets, grad_loss = inputs(4096, torch.bfloat16)
    weight, targets, grad_loss = 0.1 * weight, targets.clamp_min(0), torch.full((T,), 1 / T)
    truth = cross_entropy(x.double(), weight.double(), targets, grad_loss.double())[1]

    def error(dx):
        return ((dx.double() - truth).norm() / truth.norm()).item()

    leaf = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf @ weight.T, targets).backward()
    wide = {"algorithm": algorithm, "backend": "chunked", "grad_dtype": torch.float32}
    for num_shards in (1, 2, 8, 64):
        sizes = [4096 // num_shards] * num_shards
        precise, rounded = (
            error(
                run_output(x, weight, targets, grad_loss, sizes=sizes, sum_dtype=dtype, **wide)[1]
            )
            for dtype in (None, torch.bfloat16)
        )
        assert precise <= 1.02 * error(leaf.grad)
        assert num_shards == 1 or rounded > 1.1 * precise
