"""Linear layers in float8 compute the exact products of the rounded matrices, rounded once."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.meshes import alone
from tests.pipeline.truth import Whole
from vp_train.communication import nccl
from vp_train.config import ConfigError, ModelConfig, OptimConfig, RunConfig, RunSettings
from vp_train.data.synthetic import SyntheticText
from vp_train.inference import layout
from vp_train.inference.opening import opened
from vp_train.model import float8, shape
from vp_train.model.float8 import PRECISE, WIDE, Float8Products, rounded, scaled_product
from vp_train.model.linear import (
    PLAIN,
    ColumnLinear,
    RowLinear,
    SequenceSplit,
    WeightGradStore,
)
from vp_train.model.stage import Stage
from vp_train.optim.adamw import build_adamw
from vp_train.planning.degrees import Degrees
from vp_train.tensors import compiling

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_query_groups=2,
    head_size=16,
    ffn_hidden_size=48,
    vocab_size=100,
    seq_length=11,
)


def normal(*shape, seed=0, spread=0.0):
    """Return bfloat16 normal values; rows differ in size by factors up to 2^spread."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 2 ** (spread * torch.rand(shape[0], 1, generator=generator))
    return (torch.randn(shape, generator=generator) * sizes).bfloat16()


def numbers_of(dtype):
    """Return all finite values of a float8 dtype [N] in float64, rising, each one once."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).double()
    return codes[codes.isfinite()].unique()


def nearest(values, numbers):
    """Return the nearest of `numbers` for each value [..]; a tie goes to the even mantissa."""
    above = torch.searchsorted(numbers, values).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle = (low + high) / 2
    zero = int((numbers == 0).nonzero())
    low_is_even = (above - 1 - zero) % 2 == 0
    return torch.where((values < middle) | ((values == middle) & low_is_even), low, high)


def exact(matrix):
    return matrix.values.double() * matrix.scale.double()


@pytest.mark.parametrize("dtype", [PRECISE, WIDE])
@pytest.mark.parametrize("by_row", [True, False])
def test_a_matrix_is_rounded_to_the_nearest_values_times_the_least_power_of_two(dtype, by_row):
    matrix = normal(64, 48, spread=30.0)
    matrix[3] = 0
    matrix[4] = torch.tensor([1.0, 448.0, 57344.0] * 16)  # the largest values, exactly
    found = rounded(matrix, dtype, by_row=by_row)
    assert found.scale.shape == ((64, 1) if by_row else (1, 1))
    mantissas, _ = torch.frexp(found.scale)
    assert (mantissas == 0.5).all()
    largest = matrix.double().abs().amax(1 if by_row else (0, 1), keepdim=True)
    top, seen = torch.finfo(dtype).max, largest > 0
    assert (largest / found.scale <= top).all()
    assert (largest / (found.scale / 2) > top)[seen].all()
    wanted = nearest(matrix.double() / found.scale, numbers_of(dtype))
    assert torch.equal(found.values.double(), wanted)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_outputs_and_input_gradients_are_exact_products_rounded_once(by_row, num_tokens):
    """Compare with float64 products of the rounded matrices: fp32 sums, then one bfloat16."""
    x, dy = normal(num_tokens, 32, spread=8), normal(num_tokens, 48, seed=1, spread=20)
    weight = nn.Parameter(normal(48, 32, seed=2, spread=4))
    products = Float8Products(by_row=by_row)
    pairs = (
        (products.output(x, weight), x, PRECISE, weight.detach()),
        (products.input_gradient(dy, weight), dy, products.gradient_dtype, weight.detach().T),
    )
    for found, left, dtype, right in pairs:
        a, b = rounded(left, dtype, by_row=by_row), rounded(right, PRECISE, by_row=by_row)
        wanted, terms = exact(a) @ exact(b).T, exact(a).abs() @ exact(b).abs().T
        assert found.dtype is torch.bfloat16
        assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6 * terms).all()
        assert (wanted - left.double() @ right.double().T).abs().max() > 0, "nothing was rounded"


def test_products_of_values_that_float8_has_are_exact():
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randint(-8, 9, (size, 32), generator=generator).bfloat16() for size in (5, 16)
    )
    a, b = (rounded(matrix, PRECISE, by_row=True) for matrix in (x, weight))
    found = scaled_product(a, b)
    assert torch.equal(found.double(), (x.double() @ weight.double().T).bfloat16().double())


def test_forward_and_backward_read_the_same_rounded_weights():
    """Scales are powers of two, so those of rows and of columns round the same values alike."""
    weight = normal(64, 48, spread=3)
    large = weight.abs() > 2**-3
    of_rows, of_columns = (
        exact(rounded(matrix, PRECISE, by_row=True)) for matrix in (weight, weight.T)
    )
    assert torch.equal(of_rows[large], of_columns.T[large])


def test_with_a_scale_for_each_row_the_rounding_of_a_token_does_not_depend_on_others():
    x, weight = normal(40, 32, spread=8), nn.Parameter(normal(48, 32, seed=1))
    others = torch.cat([x[:20], 1e4 * x[20:]])
    by_row, by_tensor = Float8Products(by_row=True), Float8Products(by_row=False)
    assert torch.equal(by_row.output(x, weight)[:20], by_row.output(others, weight)[:20])
    assert not torch.equal(by_tensor.output(x, weight)[:20], by_tensor.output(others, weight)[:20])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [PRECISE, WIDE])
def test_a_value_that_is_not_finite_stays_visible(wrong, dtype):
    x, weight = normal(6, 32), normal(48, 32, seed=1)
    x[2, 5] = wrong
    b = rounded(weight, PRECISE, by_row=True)
    y = scaled_product(rounded(x, dtype, by_row=True), b)
    finite = y.isfinite().all(1)
    assert not finite[2]
    assert finite.sum() == 5
    y = scaled_product(rounded(x, dtype, by_row=False), rounded(weight, PRECISE, by_row=False))
    assert not y[2].isfinite().any()


def test_weight_gradients_are_those_of_bfloat16(monkeypatch):
    """dW is no product in float8: it is the same sum in fp32 as without."""
    monkeypatch.setattr(compiling, "_finds_compiler", lambda: False)  # compiling takes seconds
    gradients = []
    for products in (PLAIN, Float8Products(by_row=True)):
        layer = linear(products)
        layer.weight.grad_dtype = torch.float32
        layer.weight.grad = torch.zeros(48, 32)
        for seed in range(2):
            y, _ = layer(normal(7, 32, seed=seed)[:, None].requires_grad_())
            y.backward(normal(7, 48, seed=9 + seed)[:, None])
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def linear(products, kind=ColumnLinear, group=None, **options):
    """Return a layer with the slice of this rank of `group` of the weight [48, 32]."""
    layer = kind(
        32,
        48,
        config=SimpleNamespace(params_dtype=torch.bfloat16),
        store=WeightGradStore(),
        products=products,
        tp_group=group or alone(),
        **options,
    )
    weight = normal(48, 32, seed=5)
    with torch.no_grad():
        layer.weight.copy_(weight if layer.split is None else layer.split.part(weight))
    return layer


def summed(y, group):
    y = y.clone()
    dist.all_reduce(y, group=group)
    return y


class Scattered(torch.autograd.Function):
    """The sum over tensor-parallel ranks, of which a rank gets the part of its tokens."""

    @staticmethod
    def forward(ctx, y, group):
        ctx.sequence = SequenceSplit(group)
        return ctx.sequence.scatter(y).wait()

    @staticmethod
    def backward(ctx, dy):
        return ctx.sequence.gather(dy).wait(), None


def results_of_two_ranks(rank, num_ranks, split_sequences):
    """Return y and dx of a column and of a row layer on this tensor-parallel rank."""
    group, products = dist.group.WORLD, Float8Products(by_row=True)
    x, dy = normal(8, 32), normal(8, 48, seed=1)

    def part(values, dim):
        return values.chunk(num_ranks, dim)[rank]

    tokens, gradients = (part(x, 0), part(dy, 0)) if split_sequences else (x, dy)
    sequence = SequenceSplit(group) if split_sequences else None
    reduce = Scattered.apply if split_sequences else summed
    column = linear(products, group=group, sequence=sequence)
    row = linear(products, RowLinear, group, reduce=reduce)
    outputs = []
    for layer, given, gradient in (
        (column, tokens, part(dy, 1)),
        (row, part(x, 1), gradients),
    ):
        given = given.clone().requires_grad_()
        y, _ = layer(given[:, None])
        y.backward(gradient[:, None])
        outputs += [y.detach()[:, 0].float(), given.grad.float()]
    return [tensor.numpy() for tensor in outputs]


@pytest.mark.parametrize("split_sequences", [False, True])
def test_tensor_parallel_ranks_round_their_slices_of_the_same_layer(ranks, split_sequences):
    """Rows of a column layer's weight are whole, so its output is the same; sums are rounded.

    With sequence parallelism the sums of a rank are those of its tokens.
    """
    products, weight = Float8Products(by_row=True), nn.Parameter(normal(48, 32, seed=5))
    y = products.output(normal(8, 32), weight).detach().float()
    dx = products.input_gradient(normal(8, 48, seed=1), weight).float()
    found = ranks(2).run(results_of_two_ranks, split_sequences)
    columns, sums, outputs, rows = (
        [torch.from_numpy(of_rank[index]) for of_rank in found] for index in range(4)
    )
    assert torch.allclose(torch.cat(columns, 1), y, rtol=2**-7, atol=1e-6)
    assert torch.allclose(torch.cat(rows, 1), dx, rtol=2**-7, atol=1e-6)
    for whole, parts in ((dx, sums), (y, outputs)):
        for part in [torch.cat(parts)] if split_sequences else parts:
            assert (part - whole).norm() < 0.08 * whole.norm()


def test_float8_learns_as_bfloat16_does():
    """Train a small model on text of known entropy: both fall, and stay within 0.05 nats."""
    text, ends = SyntheticText(40, 1), []
    samples = [torch.from_numpy(text.sample(0, index, 65)) for index in range(48)]
    for dtype in ("compute", "float8"):
        config = RunConfig(
            model=replace(MODEL, num_layers=1, vocab_size=40, seq_length=64),
            run=RunSettings(dtype="bfloat16", linear_dtype=dtype),
        )
        whole = Whole(config, torch.bfloat16)
        optimizer = build_adamw(whole.parameters(), OptimConfig(lr=2e-2, weight_decay=0.0))
        losses = []
        for step in range(40):
            batch = torch.stack([samples[(4 * step + row) % len(samples)] for row in range(4)])
            loss = whole(batch[None, :, :-1], batch[None, :, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        ends.append(mean(losses[-8:]))
        assert ends[-1] < losses[0] - 1
    assert abs(ends[1] - ends[0]) < 0.05


def test_a_weight_is_rounded_once_while_it_is_fixed_and_again_afterwards(monkeypatch):
    rounds = []
    monkeypatch.setattr(
        float8, "rounded", lambda *given, **how: rounds.append(given[0]) or rounded(*given, **how)
    )
    products, weight = Float8Products(by_row=True), nn.Parameter(normal(48, 32, seed=5))
    x, dy = normal(7, 32), normal(7, 48)
    for _ in range(2):
        with products.fixed_weights():
            for _ in range(3):
                products.output(x, weight)
                products.input_gradient(dy, weight)
        assert len(rounds) == 3 + 3 + 2
        rounds.clear()
    first = products.output(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(products.output(x, weight), 2 * first)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("by_row", [True, False])
def test_recomputation_and_a_split_backward_change_no_bit(recompute, by_row):
    results = []
    for kind, split in (("none", False), (recompute, True)):
        stage = Stage(
            MODEL,
            range(2),
            final_norm=False,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            group=alone(),
            seed=1,
            products=Float8Products(by_row=by_row),
            recompute=kind,
        )
        x = normal(22, 32).view(11, 2, 32).requires_grad_()
        with stage.fixed_weights():
            y = stage(x)
            if split:
                with stage.weight_grads.deferring(0):
                    y.backward(normal(22, 32, seed=1).view(11, 2, 32))
                stage.weight_grads.drain(0)
            else:
                y.backward(normal(22, 32, seed=1).view(11, 2, 32))
        results.append((y, x.grad, *(parameter.grad for parameter in stage.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_keeps_two_bytes_for_each_weight_of_its_layers_as_planned():
    products = Float8Products(by_row=True)
    stage = Stage(
        MODEL,
        range(2),
        final_norm=False,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        group=alone(),
        seed=1,
        products=products,
    )
    with stage.fixed_weights():
        stage(normal(11, 32)[:, None].requires_grad_()).backward(normal(11, 32)[:, None])
        kept = sum(weight.values.nbytes for weight in products._kept.values())
        assert all(weight.values.is_contiguous() for weight in products._kept.values())
    assert kept == 2 * 2 * shape.layer_matrix_parameters(MODEL)
    assert products._kept is None


def test_a_gpu_without_float8_is_refused(monkeypatch):
    settings = RunSettings(dtype="bfloat16", linear_dtype="float8", device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        nccl.require_float8(settings)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    refused = r"8\.9 or later, such as an H100, and A100 has 8\.0; drop .*--dtype bfloat16"
    with pytest.raises(ConfigError, match=refused):
        nccl.require_float8(settings)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    opening = layout.Opening(RunConfig(run=settings), Path(), Degrees(1, 1, 1))
    with pytest.raises(ConfigError, match=refused):  # one process that scores
        opened(opening)
    nccl.require_float8(replace(settings, linear_dtype="compute"))
    monkeypatch.setattr(nccl, "_multiplies_by_row", lambda: True)
    nccl.require_float8(replace(settings, device="cpu"))


def test_a_torch_without_scales_of_rows_on_a_cpu_is_refused_before_any_step(monkeypatch):
    def only_by_tensor(*_, scale_a, **__):
        if scale_a.numel() > 1:
            raise RuntimeError("Now _scaled_mm only supports per-tensor scaling for CPU backend.")

    monkeypatch.setattr(torch, "_scaled_mm", only_by_tensor)
    settings = RunSettings(dtype="bfloat16", linear_dtype="float8")
    with pytest.raises(ConfigError, match=r"on a CPU; set run\.float8_scales=tensor, or install"):
        nccl.take_gpu({}, settings)
    assert nccl.take_gpu({}, replace(settings, float8_scales="tensor")) == "gloo"


def test_a_run_in_float8_is_opened_as_it_was_or_without_it_in_a_dtype_that_is_asked_for():
    config = RunConfig(run=RunSettings(dtype="bfloat16", linear_dtype="float8"))
    seen = {
        dtype: layout._evaluating(config, Degrees(1, 1, 1), set(), "cpu", dtype).run
        for dtype in (None, "bfloat16", "float32")
    }
    assert [run.linear_dtype for run in seen.values()] == ["float8", "compute", "compute"]
    assert [run.dtype for run in seen.values()] == ["bfloat16", "bfloat16", "float32"]
