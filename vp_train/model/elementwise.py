"""The elementwise work between the matrix products of a layer: norms, rotations, activations.

Every operation is a pair of pure functions, forward and backward, and an autograd function that
says what is kept in between.  That is as little as possible: a norm keeps its input and its
statistics, a rotation nothing, the activation of a gated MLP its input.  Its output, which the next
matrix product needs for its weight gradient, is formed again.

The pure functions run as torch operations, or compiled: then each is one kernel, or a few, that
reads its inputs once.  Which of the two is an argument of type `Fuse`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vp_train.config import ConfigError
from vp_train.model.linear import LateInput
from vp_train.model.shape import compiling_pays
from vp_train.tensors.compiling import compiled_for_tokens, remedy_for
from vp_train.tensors.precision import statistics_dtype

Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]  # a pure function -> how it runs


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` itself: it runs as torch operations."""
    return function


def choose_fuse(setting: str, device: torch.device, dtype: torch.dtype, num_elements: int) -> Fuse:
    """Return how elementwise work runs for `setting`, a value of run.compile.

    `auto` compiles where it `pays` and torch can.  Raises ConfigError if `on` is asked for where
    nothing can be compiled.
    """
    if setting == "off" or (setting == "auto" and not pays(device, dtype, num_elements)):
        return plain
    remedy = remedy_for(device)
    if remedy and setting == "on":
        raise ConfigError(
            f"run.compile=on, but torch cannot compile here; {remedy}, or set run.compile=auto"
        )
    return plain if remedy else compiled_for_tokens


def pays(device: torch.device, dtype: torch.dtype, num_elements: int) -> bool:
    """Return whether compiled elementwise work takes less time.

    num_elements: of the feed-forward width in a microbatch.
    """
    return compiling_pays(num_elements, dtype.itemsize, on_cuda=device.type == "cuda")


@dataclass(frozen=True, slots=True)
class NormRule:
    """The rule of a norm over the dimensions of its weight.

    epsilon: is added to the mean square, or to the variance.
    centre: is added to the weight: 1 if weights are centred at zero, as in Gemma.
    subtracts_mean: whether it is a LayerNorm, else an RMSNorm.
    """

    epsilon: float
    centre: float = 0.0
    subtracts_mean: bool = False


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, rule: NormRule) -> tuple[Tensor, ...]:
    """Return the norm of x over the dimensions of `weight`, and the statistics of the backward.

    The statistics are 1 / rms(x), or mean and 1 / deviation, in the statistics dtype.
    """
    if rule.subtracts_mean:
        return torch.native_layer_norm(x, weight.shape, weight, bias, rule.epsilon)
    scale = weight + rule.centre if rule.centre else weight
    if x.is_cuda and not torch.compiler.is_compiling():  # torch has a kernel
        return torch.ops.aten._fused_rms_norm(x, weight.shape, scale, rule.epsilon)  # type: ignore[no-any-return]
    wide = x.to(statistics_dtype(x.dtype))
    dims = tuple(range(-weight.dim(), 0))
    rate = torch.rsqrt(wide.square().mean(dims, keepdim=True) + rule.epsilon)
    return (wide * rate * scale).to(x.dtype), rate


def add_and_normalise(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, rule: NormRule
) -> tuple[Tensor, ...]:
    """Return residual + x, and what `normalise` returns for it."""
    total = residual + x
    return total, *normalise(total, weight, bias, rule)


def normalise_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: NormRule,
    *statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of a norm with respect to its input `total`, its weight and its bias.

    `dtotal` is a gradient of `total` from elsewhere, which is added.
    """
    if rule.subtracts_mean:
        wanted = [True, True, bias is not None]
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy, total, weight.shape, *statistics, weight, bias, wanted
        )
        return dx if dtotal is None else dx + dtotal, dweight, dbias
    (rate,) = statistics
    scale = weight + rule.centre if rule.centre else weight
    if total.is_cuda and not torch.compiler.is_compiling():
        dx, dweight = torch.ops.aten._fused_rms_norm_backward(
            dy, total, weight.shape, rate, scale, [True, True]
        )
        return dx if dtotal is None else dx + dtotal, dweight, None
    precise, dims = rate.dtype, tuple(range(-weight.dim(), 0))
    normal, wide = total.to(precise) * rate, dy.to(precise)
    product = wide * normal
    dweight = product.sum(tuple(range(total.dim() - weight.dim())))
    along = (product * scale).mean(dims, keepdim=True)
    dx = (wide * scale - normal * along) * rate
    if dtotal is not None:
        dx = dx + dtotal
    return dx.to(total.dtype), dweight.to(weight.dtype), None


class _ResidualNorm(torch.autograd.Function):
    """The residual addition and the norm of the sum; one function, so that one kernel does both.

    It keeps the sum and the statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        rule: NormRule,
        fuse: Fuse,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            total, (y, *statistics) = x, fuse(normalise)(x, weight, bias, rule)
        else:
            total, y, *statistics = fuse(add_and_normalise)(x, residual, weight, bias, rule)
        ctx.save_for_backward(total, weight, bias, *statistics)
        ctx.adds, ctx.rule, ctx.fuse = residual is not None, rule, fuse
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dtotal, dy = grads
        if dy is None:  # nobody has used the norm
            return dtotal, dtotal if ctx.adds else None, None, None, None, None
        total, weight, bias, *statistics = ctx.saved_tensors
        dx, dweight, dbias = ctx.fuse(normalise_backward)(
            dy, dtotal, total, weight, bias, ctx.rule, *statistics
        )
        return dx, dx if ctx.adds else None, dweight, dbias, None, None


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    rule: NormRule,
    fuse: Fuse,
) -> tuple[Tensor, Tensor]:
    """Return residual + x, or x without a residual, and its norm; all have the shape of x."""
    total, y = _ResidualNorm.apply(x, residual, weight, bias, rule, fuse)  # type: ignore[no-untyped-call]
    return total, y


@dataclass(frozen=True, slots=True)
class Heads:
    """How the output of the qkv projection is split: n heads of queries, g groups, d values each.

    norm: the rule of the norm of queries and keys, None if they have none.
    """

    num_heads: int
    num_groups: int
    size: int
    norm: NormRule | None


def split_heads(
    qkv: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    heads: Heads,
) -> tuple[Tensor, ...]:
    """Return the queries [s, b, n, d] and keys [s, b, g, d] of `qkv`, normalised and rotated.

    Without norms the values [s, b, g, d] follow, a copy; with norms the statistics of both.
    `cosines` and `sines` are [s, 1, 1, 1, d / 2], or None without rotary embeddings.
    """
    q, k, v = _grouped(qkv, heads)
    rest: tuple[Tensor, ...]
    if heads.norm is None or q_weight is None or k_weight is None:
        rest = (v.clone(memory_format=torch.contiguous_format).flatten(2, 3),)
    else:
        q, q_rate = normalise(q, _of_groups(q_weight, heads), None, heads.norm)
        k, k_rate = normalise(k, _of_groups(k_weight, heads), None, heads.norm)
        rest = (q_rate, k_rate)
    if cosines is not None and sines is not None:
        q, k = _rotated(q, cosines, sines), _rotated(k, cosines, sines)
    return q.flatten(2, 3), k.flatten(2, 3), *rest


def split_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    heads: Heads,
    qkv: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rates: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients with respect to qkv and to the weights of both norms."""
    s, b, g = *dq.shape[:2], heads.num_groups
    dq, dk, dv = (part.reshape(s, b, g, -1, heads.size) for part in (dq, dk, dv))
    if cosines is not None and sines is not None:
        dq, dk = _rotated_back(dq, cosines, sines), _rotated_back(dk, cosines, sines)
    of_weights: tuple[Tensor | None, Tensor | None] = (None, None)
    if heads.norm is not None and qkv is not None and q_weight is not None and k_weight is not None:
        q, k, _ = _grouped(qkv, heads)
        weights = (_of_groups(q_weight, heads), _of_groups(k_weight, heads))
        dq, of_q, _ = normalise_backward(dq, None, q, weights[0], None, heads.norm, rates[0])
        dk, of_k, _ = normalise_backward(dk, None, k, weights[1], None, heads.norm, rates[1])
        of_weights = (of_q.view(q_weight.shape), of_k.view(k_weight.shape))
    return torch.cat([dq, dk, dv], 3).flatten(2), *of_weights


def _grouped(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of qkv: queries [s, b, g, n / g, d], keys and values [s, b, g, 1, d]."""
    of_queries = heads.num_heads // heads.num_groups
    grouped = qkv.view(*qkv.shape[:2], heads.num_groups, of_queries + 2, heads.size)
    q, k, v = torch.split(grouped, [of_queries, 1, 1], 3)
    return q, k, v


def _of_groups(weight: Tensor, heads: Heads) -> Tensor:
    """Return the weight of a norm as it lies over `_grouped`: [d], or [g, heads of a group, d]."""
    return weight if len(weight) == heads.size else weight.view(heads.num_groups, -1, heads.size)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate pairs of values of x [.., d] (arXiv 2104.09864); a pair is i and i + d / 2."""
    first, second = x.chunk(2, -1)
    return torch.cat(
        [
            torch.addcmul(first * cosines, second, sines, value=-1),
            torch.addcmul(second * cosines, first, sines),
        ],
        -1,
    )


def _rotated_back(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate by the negative angles, which is the gradient of `_rotated`."""
    first, second = x.chunk(2, -1)
    return torch.cat(
        [
            torch.addcmul(first * cosines, second, sines),
            torch.addcmul(second * cosines, first, sines, value=-1),
        ],
        -1,
    )


class _SplitHeads(torch.autograd.Function):
    """The split of qkv into rotated heads.

    Without norms it keeps nothing: a rotation is linear.  The values are a copy, so that qkv, which
    is larger, need not be kept.  With norms qkv is kept, and the values are a view of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        rotary: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        heads: Heads,
        fuse: Fuse,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The tables belong to the stage, so they are not saved tensors.
        ctx.tables = (None, None) if rotary is None else tuple(rotary[:, :, None, None, None])
        ctx.heads, ctx.fuse = heads, fuse
        q, k, *rest = fuse(split_heads)(qkv, *ctx.tables, q_weight, k_weight, heads)
        if heads.norm is None:
            return q, k, rest[0]
        ctx.save_for_backward(qkv, q_weight, k_weight, *rest)
        return q, k, _grouped(qkv, heads)[2].flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors or (None, None, None)
        dqkv, of_q, of_k = ctx.fuse(split_heads_backward)(*grads, *ctx.tables, ctx.heads, *saved)
        return dqkv, None, of_q, of_k, None, None


def queries_keys_values(
    qkv: Tensor,
    rotary: Tensor | None,
    q_weight: nn.Parameter | None,
    k_weight: nn.Parameter | None,
    heads: Heads,
    fuse: Fuse,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv [s, b, (n + 2 g) d]; return q [s, b, n, d], k and v [s, b, g, d].

    The heads of a group lie together: its queries, its key, its value.
    rotary: cosines and sines, [2, s, d / 2]; None without rotary embeddings.
    q_weight, k_weight: the weights of the norms, of one head [d] or of all; None without norms.
    """
    if rotary is None and heads.norm is None:
        q, k, v = (part.flatten(2, 3) for part in _grouped(qkv, heads))
    else:
        q, k, v = _SplitHeads.apply(qkv, rotary, q_weight, k_weight, heads, fuse)  # type: ignore[no-untyped-call]
    return q, k, v


def activate(h: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up [.., f] for h [.., 2 f], which is gate and up.

    `activation` is `swiglu` or `geglu`.
    """
    gate, up = h.chunk(2, -1)
    return _gate(gate, activation) * up


def activate_backward(dx: Tensor, h: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return dL/dh for dL/dx, and x = activate(h) again."""
    gate, up = h.chunk(2, -1)
    opened = _gate(gate, activation)
    if torch.compiler.is_compiling():
        dgate = _gate_backward(dx * up, gate, activation)
        return torch.cat([dgate, dx * opened], -1), opened * up
    dh = torch.empty_like(h)  # written in place, which saves a copy and memory
    dgate, dup = dh.chunk(2, -1)
    torch.mul(dx, opened, out=dup)
    _gate_backward(dx * up, gate, activation, out=dgate)
    return dh, opened.mul_(up)


def _gate(gate: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        return nn.functional.silu(gate)
    return nn.functional.gelu(gate, approximate="tanh")


def _gate_backward(dy: Tensor, gate: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Return the gradient of `_gate` with respect to its input, in `out` if that is given."""
    given: dict[str, Any] = {} if out is None else {"grad_input": out}
    aten = torch.ops.aten
    dgate: Tensor
    if activation == "swiglu":
        dgate = aten.silu_backward(dy, gate, **given)
    else:
        dgate = aten.gelu_backward(dy, gate, approximate="tanh", **given)
    return dgate


class _Activation(torch.autograd.Function):
    """The activation of a gated MLP.  It keeps its input and forms its output again for `late`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: str, late: LateInput, fuse: Fuse) -> Tensor:
        ctx.save_for_backward(h)
        ctx.activation, ctx.late, ctx.fuse = activation, late, fuse
        x: Tensor = fuse(activate)(h, activation)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (dx,), (h,) = grads, ctx.saved_tensors
        dh, x = ctx.fuse(activate_backward)(dx, h, ctx.activation)
        ctx.late.form(x)
        return dh, None, None, None


def activated(h: Tensor, activation: str, late: LateInput, fuse: Fuse) -> Tensor:
    """Return `activate(h, activation)` for the linear layer that is called with `late`."""
    x: Tensor = _Activation.apply(h, activation, late, fuse)  # type: ignore[no-untyped-call]
    return x
