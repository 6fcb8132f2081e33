"""Elementwise work: compiled it computes the same, and it is compiled once for all lengths."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from tests.model.test_stage import CPU, FAMILIES, MODEL, group, stage  # noqa: F401 - a fixture
from vp_train.config import ConfigError
from vp_train.model import elementwise
from vp_train.model.elementwise import choose_fuse, plain
from vp_train.model.shape import compiles_layers
from vp_train.model.stage import Stage
from vp_train.pipeline.offload import HostLink, storages_of
from vp_train.tensors import compiling
from vp_train.tensors.compiling import compiled_for_tokens
from vp_train.tensors.streams import HostOrder


def results(module, s, b, segments=None):
    """Return the output of `module` for s tokens of b sequences, and all its gradients."""
    x = torch.randn(s, b, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
    weight = next(module.parameters())
    x = x.to(weight.device, weight.dtype).requires_grad_()
    y = module(x, segments)
    module.zero_grad()
    y.backward(torch.sin(torch.arange(y.numel()).view(y.shape)).to(y))
    return [y, x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("name", ["plain", "gemma3"])
def test_compiled_code_computes_the_same_and_is_made_once_for_all_lengths_and_stages(
    group,  # noqa: F811
    traced,
    name,
):
    model = replace(MODEL, **FAMILIES[name])
    fused, other, alone = (
        stage(group, layers, final_norm=True, model=model, fuse=fuse, num_offloaded=2)
        for layers, fuse in (
            (range(1, 3), compiled_for_tokens),
            (range(2, 4), compiled_for_tokens),
            (range(1, 3), plain),
        )
    )
    fused.warm_up(1)
    assert not any(parameter.grad is not None for parameter in fused.parameters())
    made = len(traced)
    assert made > 0
    for s in (20, 7):
        for mine, expected in zip(results(fused, s, 1), results(alone, s, 1), strict=True):
            assert torch.allclose(mine, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        fused(torch.randn(9, 1, 48, dtype=torch.float64))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        results(fused, 11, 1, torch.tensor([[0] * 4 + [1] * 7]))
    results(other, 12, 1)
    for mine, expected in zip(offloaded(fused, 20), results(fused, 20, 1), strict=True):
        assert torch.equal(mine, expected)
    assert len(traced) == made


def offloaded(module, s):
    """Return `results` for s tokens, with what the layers keep in host memory before the backward.

    The layers of `module` must be offloaded, all of them.
    """
    kept = HostLink(HostOrder(), CPU).keep("0F0", storages_of(module))
    moves = [kept.offload, kept.offloaded, kept.reload, kept.restored]

    def forward(x, segments):
        with module.offloading(kept.hooks):
            y = module(x, segments)
        for move in moves:
            move()
        return y

    forward.parameters, forward.zero_grad = module.parameters, module.zero_grad
    found = results(forward, s, 1)
    assert kept.num_bytes > 0
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kernels_on_a_gpu_compute_what_torch_operations_compute(group, dtype):  # noqa: F811
    fused, alone = (
        Stage(
            replace(MODEL, **FAMILIES["gemma3"]),
            range(1, 3),
            final_norm=True,
            dtype=dtype,
            device=torch.device("cuda"),
            group=group,
            seed=3,
            fuse=fuse,
        )
        for fuse in (compiled_for_tokens, plain)
    )
    for mine, expected in zip(results(fused, 20, 2), results(alone, 20, 2), strict=True):
        error = (mine - expected).double().norm() / expected.double().norm()
        assert error < (1e-12 if dtype is torch.float64 else 0.03)


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_an_activation_gives_its_output_again_in_the_backward(activation):
    h = torch.randn(5, 2, 24, dtype=torch.float64, requires_grad=True)
    x = elementwise.activate(h, activation)
    dx = torch.randn_like(x)
    dh, again = elementwise.activate_backward(dx, h.detach(), activation)
    assert torch.equal(again, x)
    assert torch.allclose(dh, *torch.autograd.grad(x, h, dx), rtol=1e-13, atol=1e-13)


def test_small_runs_and_layers_of_torchs_kernels_compile_nothing(monkeypatch, group):  # noqa: F811
    def compiles(setting, dtype, elements, device=CPU, model=MODEL):
        on_cuda = device.type == "cuda"
        return compiles_layers(setting, model, elements, dtype.itemsize, on_cuda=on_cuda)

    def found(setting, dtype, elements, device=CPU, model=MODEL):
        worth = compiles(setting, dtype, elements, device, model)
        return choose_fuse(setting, device, compiles=worth)

    monkeypatch.setattr(compiling, "_finds_compiler", lambda: True)
    assert found("auto", torch.float32, 1 << 30) is plain
    assert found("auto", torch.bfloat16, 1 << 10) is plain
    assert found("auto", torch.bfloat16, 1 << 30) is compiled_for_tokens
    assert found("on", torch.float32, 1) is compiled_for_tokens
    assert found("off", torch.bfloat16, 1 << 30) is plain
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    cuda = torch.device("cuda")
    assert found("auto", torch.bfloat16, 8_192 * 14_336, cuda) is compiled_for_tokens
    assert found("auto", torch.bfloat16, 2_048 * 12_288, cuda) is plain  # gpt_4b waits for the host
    assert found("on", torch.bfloat16, 1, cuda) is compiled_for_tokens
    monkeypatch.setattr(compiling, "_finds_compiler", lambda: False)
    assert found("auto", torch.bfloat16, 1 << 30, cuda) is plain
    with pytest.raises(ConfigError, match=r"install a C\+\+ compiler, or set run\.c"):
        found("on", torch.bfloat16, 1)
    for norm, activation, positions in product(
        ("rmsnorm", "layernorm"), ("swiglu", "gelu"), ("rope", "learned")
    ):
        run = []
        model = replace(MODEL, normalisation=norm, activation=activation, positions=positions)
        stage(group, range(1), model=model, fuse=lambda f, run=run: run.append(f) or f).warm_up(1)
        for device, setting in product((CPU, cuda), ("on", "auto")):
            assert compiles(setting, torch.bfloat16, 1 << 30, device, model) == bool(run)
    assert found("on", torch.bfloat16, 1, model=model) is plain  # nobody asks for a compiler


def test_a_gated_mlp_keeps_no_output_of_its_activation(group):  # noqa: F811
    module, widths = stage(group, range(1)), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: widths.append(None if isinstance(x, nn.Parameter) else x.shape[-1]) or x,
        lambda x: x,
    ):
        module(torch.randn(20, 1, 48, dtype=torch.float64, requires_grad=True))
    f = MODEL.ffn_hidden_size
    assert widths.count(2 * f) == 1
    assert f not in widths


def test_a_sum_whose_norm_nobody_uses_has_its_gradient():
    x, residual = (torch.ones(2, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    rule = elementwise.NormRule(1e-6)
    total, _ = elementwise.residual_norm(x, residual, weight, rule, plain)
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))
    assert weight.grad is None


ZERO_CENTRED = elementwise.NormRule(1e-6, centre=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_zero_centred_norm_in_16_bits_is_that_of_transformers(dtype):
    """Its weights are small: 1 + 0.002 is 1 in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    x, dy, small = (torch.randn(64, 1, 256, generator=generator) for _ in range(3))
    x, dy, small = x.to(dtype), dy.to(dtype), (small[0, 0] * 0.002).to(dtype)
    theirs = GemmaRMSNorm(256, ZERO_CENTRED.epsilon).to(dtype)
    theirs.weight.data.copy_(small)
    y, rate = elementwise.normalise(x, small, ZERO_CENTRED)
    assert torch.equal(y, theirs(x))
    dx, _ = elementwise.normalise_backward(dy, None, x, small, ZERO_CENTRED, rate)
    exact = [tensor.double().requires_grad_() for tensor in (x, small)]
    precise = exact[0] * (exact[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + exact[1])
    precise.backward(dy.double())
    rounded = exact[0].grad.to(dtype).double()
    error, best = ((found.double() - exact[0].grad).norm() for found in (dx, rounded))
    assert error < 1.01 * best


class Kernels(TorchFunctionMode):
    """Note the dtypes of the tensors that torch's kernels of norms get."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, operation, types, args=(), kwargs=None):
        if "fused_rms_norm" in operation.__name__:
            self.dtypes.append([each.dtype for each in args if isinstance(each, torch.Tensor)])
        return operation(*args, **(kwargs or {}))


def test_torchs_kernels_of_zero_centred_norms_compute_in_the_statistics_dtype():
    with FakeTensorMode(), Kernels() as kernels:
        x, weight = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((4, 8), (8,))
        )
        y, rate = elementwise.normalise(x, weight, ZERO_CENTRED)
        dx, _ = elementwise.normalise_backward(y, x, x, weight, ZERO_CENTRED, rate)
        assert y.dtype is dx.dtype is torch.bfloat16
        elementwise.normalise(x, weight, elementwise.NormRule(1e-6))
    wide = torch.float32
    assert kernels.dtypes == [[wide] * 2, [wide] * 4, [torch.bfloat16] * 2]


class Copies(TorchDispatchMode):
    """Count the copies of what runs within."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten.clone.default
        return operation(*args, **(kwargs or {}))


def test_heads_that_are_normalised_are_not_copied_too():
    norm, weight = elementwise.NormRule(1e-6), nn.Parameter(torch.ones(6))
    heads = elementwise.Heads(num_heads=4, num_groups=2, size=6, norm=norm)
    split = elementwise.SplitHeads(heads, 3, None, (weight, weight), plain)
    with torch.no_grad(), Copies() as copies:
        split.forward(torch.ones(15, 8 * 6))
    assert copies.count == 0
