"""The elementwise work between the matrix products of a layer: norms, rotations, activations.

Every operation is a pair of pure functions, forward and backward, and an autograd function or an
epilogue of a linear layer that says what is kept in between.  That is as little as possible: a norm
keeps its input and its statistics, a rotation nothing, the activation of a gated MLP its input.
Its output, which the next matrix product needs for its weight gradient, is formed again.  LayerNorm
and GELU are torch's.

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
from vp_train.model.linear import LateInput, add_gradient
from vp_train.tensors.compiling import compiled_for_tokens, remedy_for
from vp_train.tensors.precision import statistics_dtype

Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]  # a pure function -> how it runs


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` itself: it runs as torch operations."""
    return function


def choose_fuse(setting: str, device: torch.device, *, compiles: bool) -> Fuse:
    """Return how elementwise work of layers runs.

    setting: a value of run.compile.
    compiles: whether it is compiled if torch can (`shape.compiles_layers`).

    Raises ConfigError if run.compile is `on`, and there is something that torch cannot compile.
    """
    if not compiles:
        return plain
    remedy = remedy_for(device)
    if remedy and setting == "on":
        raise ConfigError(
            f"run.compile=on, but torch cannot compile here; {remedy}, or set run.compile=auto"
        )
    return plain if remedy else compiled_for_tokens


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


def _scale(weight: Tensor, rule: NormRule) -> Tensor:
    """Return what a norm multiplies by.

    A sum of centre and weight is in the statistics dtype: in 16 bits 1 + 0.002 is 1.
    """
    return weight.to(statistics_dtype(weight.dtype)) + rule.centre if rule.centre else weight


def normalise(x: Tensor, weight: Tensor, rule: NormRule) -> tuple[Tensor, Tensor]:
    """Return the RMSNorm of x over the dimensions of `weight`, and 1 / rms(x) for the backward.

    The latter is in the statistics dtype.
    """
    scale = _scale(weight, rule)
    if x.is_cuda and not torch.compiler.is_compiling():  # torch has a kernel, for one dtype
        y, rate = torch.ops.aten._fused_rms_norm(
            x.to(scale.dtype), weight.shape, scale, rule.epsilon
        )
        return y.to(x.dtype), rate
    wide = x.to(statistics_dtype(x.dtype))
    dims = tuple(range(-weight.dim(), 0))
    rate = torch.rsqrt(wide.square().mean(dims, keepdim=True) + rule.epsilon)
    return (wide * rate * scale).to(x.dtype), rate


def add_and_normalise(
    x: Tensor, residual: Tensor, weight: Tensor, rule: NormRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return residual + x, and what `normalise` returns for it."""
    total = residual + x
    return total, *normalise(total, weight, rule)


def normalise_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rule: NormRule, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of an RMSNorm with respect to its input `total` and its weight.

    The latter is in the statistics dtype, but in the dtype of the weight where torch's kernel is.
    `dtotal` is a gradient of `total` from elsewhere, which is added.
    """
    scale = _scale(weight, rule)
    if total.is_cuda and not torch.compiler.is_compiling():
        dx, dweight = torch.ops.aten._fused_rms_norm_backward(
            dy.to(scale.dtype), total.to(scale.dtype), weight.shape, rate, scale, [True, True]
        )
        dx = dx if dtotal is None else dx + dtotal
        return dx.to(total.dtype), dweight
    precise, dims = rate.dtype, tuple(range(-weight.dim(), 0))
    normal, wide = total.to(precise) * rate, dy.to(precise)
    product = wide * normal
    dweight = product.sum(tuple(range(total.dim() - weight.dim())))
    along = (product * scale).mean(dims, keepdim=True)
    dx = (wide * scale - normal * along) * rate
    if dtotal is not None:
        dx = dx + dtotal
    return dx.to(total.dtype), dweight


class _ResidualNorm(torch.autograd.Function):
    """The residual addition and the RMSNorm of the sum; one function, so one kernel does both.

    It keeps the sum and 1 / rms.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, rule: NormRule, fuse: Fuse
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            total, (y, rate) = x, fuse(normalise)(x, weight, rule)
        else:
            total, y, rate = fuse(add_and_normalise)(x, residual, weight, rule)
        ctx.save_for_backward(total, rate)
        ctx.adds, ctx.weight, ctx.rule, ctx.fuse = residual is not None, weight, rule, fuse
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dy = grads  # the first is that of the sum, from elsewhere
        if dy is not None:  # else nobody has used the norm
            total, rate = ctx.saved_tensors
            dx, dweight = ctx.fuse(normalise_backward)(dy, dx, total, ctx.weight, ctx.rule, rate)
            add_gradient(ctx.weight, dweight)
        return dx, dx if ctx.adds else None, None, None, None


def residual_norm(
    x: Tensor, residual: Tensor | None, weight: nn.Parameter, rule: NormRule, fuse: Fuse
) -> tuple[Tensor, Tensor]:
    """Return residual + x, or x without a residual, and its RMSNorm; all have the shape of x."""
    total, y = _ResidualNorm.apply(x, residual, weight, rule, fuse)  # type: ignore[no-untyped-call]
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
        q, q_rate = normalise(q, _of_groups(q_weight, heads), heads.norm)
        k, k_rate = normalise(k, _of_groups(k_weight, heads), heads.norm)
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
        dq, of_q = normalise_backward(dq, None, q, weights[0], heads.norm, rates[0])
        dk, of_k = normalise_backward(dk, None, k, weights[1], heads.norm, rates[1])
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


@dataclass(slots=True)
class SplitHeads:
    """The split of qkv [s * b, (n + 2 g) d] into rotated q [b, n, s, d], k and v [b, g, s, d].

    The heads of a group lie together: its queries, its key, its value.

    Without norms it keeps nothing: a rotation is linear.  The values are a copy, so that qkv, which
    is larger, need not be kept.  With norms qkv is kept, and the values are a view of it.  Without
    norms and rotation all three are views.

    num_sequences: b.
    rotary: cosines and sines, [s, 1, 1, 1, d / 2]; None without rotary embeddings.
    weights: those of the norms of queries and keys, of one head [d] or of all; None without norms.
    """

    heads: Heads
    num_sequences: int
    rotary: tuple[Tensor, Tensor] | None
    weights: tuple[nn.Parameter | None, nn.Parameter | None]
    fuse: Fuse

    def forward(self, y: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        heads, kept = self.heads, ()
        y = y.view(-1, self.num_sequences, y.shape[-1])
        if self._only_views():
            q, k, v = _separate(y, heads)
        else:
            q, k, *rest = self.fuse(split_heads)(y, *self._tables(), *self.weights, heads)
            if heads.norm is None:
                (v,) = rest
            else:
                v, kept = _grouped(y, heads)[2].flatten(2, 3), (y, *rest)
        return (q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)), kept

    def backward(self, grads: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> Tensor:
        dq, dk, dv = (gradient.permute(2, 0, 1, 3) for gradient in grads)
        if self._only_views() and dq.shape == dk.shape:
            return torch.stack([dq, dk, dv], 3).view(-1, 3 * dq.shape[2] * dq.shape[3])
        qkv, *rates = kept or (None,)
        run = split_heads_backward if self._only_views() else self.fuse(split_heads_backward)
        dqkv: Tensor
        dqkv, *of_weights = run(dq, dk, dv, *self._tables(), self.heads, qkv, *self.weights, *rates)
        for weight, gradient in zip(self.weights, of_weights, strict=True):
            if weight is not None:
                add_gradient(weight, gradient)
        return dqkv.flatten(0, 1)

    def _only_views(self) -> bool:
        return self.rotary is None and self.heads.norm is None

    def _tables(self) -> tuple[Tensor | None, Tensor | None]:
        return self.rotary or (None, None)


def _separate(qkv: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    """Return queries [s, b, n, d], keys and values [s, b, g, d]; keys and values are views."""
    if heads.num_heads == heads.num_groups:
        return qkv.view(*qkv.shape[:2], heads.num_groups, 3, heads.size).unbind(3)
    return tuple(part.flatten(2, 3) for part in _grouped(qkv, heads))


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


@dataclass(slots=True)
class Gate:
    """The activation of a gated MLP.  It keeps its input and forms its output again for `late`."""

    activation: str
    late: LateInput
    fuse: Fuse

    def forward(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.fuse(activate)(y, self.activation), (y,)

    def backward(self, grads: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> Tensor:
        dh, x = self.fuse(activate_backward)(*grads, *kept, self.activation)
        self.late.form(x)
        return dh  # type: ignore[no-any-return]


class Gelu:
    """The activation of a plain MLP.  Its output is kept: to form it again takes long on a CPU."""

    def forward(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return nn.functional.gelu(y, approximate="tanh"), (y,)

    def backward(self, grads: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> Tensor:
        dh: Tensor = torch.ops.aten.gelu_backward.default(*grads, *kept, approximate="tanh")
        return dh
