"""The work between matrix products, row by row: softmax statistics, exponentials, terms of targets.

On CUDA Triton kernels where Triton is installed; on a CPU in low precision the exponentials are fused
by torch.compile where there is a C++ compiler; otherwise torch operations, which make several passes.
All take the same arguments.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vp_train.tensors.precision import compiled, compiled_exactly, has_compiler, scaled
from vp_train.vocab.shard import Owned


@dataclass(frozen=True, slots=True)
class Statistics:
    """What is known of the logits seen so far, of each of T rows; all [T], in the statistics dtype.

    `maximum`; `total` = sum exp(z - maximum); `target`: x W^T at the row's target if that has been
    seen, else 0, before a softcap.
    """

    maximum: Tensor
    total: Tensor
    target: Tensor

    @classmethod
    def none(cls, like: Tensor, dtype: torch.dtype) -> Statistics:
        """Return the statistics of no logits, for the rows of `like` [T, ...]."""
        return cls(
            like.new_full((len(like),), -torch.inf, dtype=dtype),
            like.new_zeros(len(like), dtype=dtype),
            like.new_zeros(len(like), dtype=dtype),
        )


def fold(
    logits: Tensor,
    before: Statistics,
    target_column: Tensor,
    out: Tensor,
    softcap: float | None,
    *,
    usual: bool = False,
) -> tuple[Statistics, Tensor]:
    """Write E = exp(z - maximum) of a chunk of logits into `out`, and take the chunk into the statistics.

    Returns the statistics with the chunk, whose `maximum` is that of E, and exp(before.maximum - maximum)
    [T], by which sums so far are to be multiplied.  `logits` [T, C] are spoilt; `out` [T, C] may be the
    same memory.  `target_column` [T], int64, may lie outside the chunk.  With `softcap` c,
    z = c tanh(logits / c), and E is written multiplied by dz / dlogits = 1 - (z / c)^2, which the total
    leaves out.  `usual`: of a size that comes again and again, for which code may be compiled.
    """
    if logits.is_cuda and logits.dtype is torch.float32 and has_triton():
        from vp_train.vocab import triton_rows  # Triton needs a GPU to be of use

        return triton_rows.fold(logits, before, target_column, out, softcap)
    target = _picked(before.target, logits, target_column)
    maximum, part = exponentiate(logits, before.maximum, out, softcap, usual=usual)
    rescale = torch.exp(before.maximum - maximum)
    return Statistics(maximum, torch.addcmul(part, before.total, rescale), target), rescale


def exponentiate(
    logits: Tensor, least: Tensor, out: Tensor, softcap: float | None, *, usual: bool = False
) -> tuple[Tensor, Tensor]:
    """Write E as `fold` does, and return (maximum, sum of E before the slope of a softcap), both [T].

    The maximum is at least `least` [T], in whose dtype everything is computed.
    """
    if (
        logits.device.type == "cpu"
        and out.dtype in (torch.bfloat16, torch.float16)
        and has_compiler()
    ):
        fused = compiled_exactly(_functional) if usual else compiled(_functional)
        maximum, total = fused(logits, least, out, softcap)
        return maximum, total
    return unfused(logits, least, out, softcap)


def unfused(
    logits: Tensor, least: Tensor, out: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`exponentiate` in torch operations."""
    z = logits.to(least.dtype)  # may be `logits` itself
    slope = None
    if softcap is not None:
        ratio = z.div_(softcap).tanh_()
        slope = 1 - ratio * ratio
        z = ratio.mul_(softcap)
    maximum = torch.maximum(least, z.amax(-1))
    exponential = z.sub_(maximum[:, None]).exp_()
    total = exponential.sum(-1)
    if slope is not None:
        exponential.mul_(slope)
    if exponential.data_ptr() != out.data_ptr():
        out.copy_(exponential)
    return maximum, total


def _functional(
    logits: Tensor, least: Tensor, out: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`unfused` without an intermediate written in place: what the compiler makes two loops over a row in cache of."""
    z = logits.to(least.dtype)
    maximum, ratio = z.amax(-1), None
    if softcap is not None:
        maximum = softcap * torch.tanh(maximum / softcap)  # tanh grows with its argument
        ratio = torch.tanh(z / softcap)
        z = ratio * softcap
    maximum = torch.maximum(least, maximum)
    exponential = torch.exp(z - maximum[:, None])
    total = exponential.sum(-1)
    if ratio is not None:
        exponential = exponential * (1 - ratio * ratio)
    out.copy_(exponential)
    return maximum, total


def _picked(target: Tensor, logits: Tensor, column: Tensor) -> Tensor:
    """Return `target` [T] with the logits [T, C] of those in `column` [T], without asking the device which these are."""
    num_columns = logits.shape[1]
    found = logits.gather(1, column.clamp(0, num_columns - 1)[:, None])[:, 0].to(target.dtype)
    return torch.where((column >= 0) & (column < num_columns), found, target)


def input_term(
    product: Tensor,
    factor: Tensor,
    weight: Tensor,
    owned: Owned,
    target_scale: Tensor | float,
    *,
    shared: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Return (product factor - target_scale W[target] - shared) gain, [T, H], in the memory of `product` [T, H].

    `factor`, `target_scale` and `gain` [T] are of the tokens, `shared` [H] is subtracted from all of
    them; None: nothing, and 1.  W[target] is the row of `weight` [R, H] that is the token's target,
    0 where this shard does not own it.  Everything but `weight` is in the statistics dtype.
    """
    if product.is_cuda and product.dtype is torch.float32 and has_triton():
        from vp_train.vocab import triton_rows

        return triton_rows.input_term(
            product, factor, weight, owned.row_of_token, target_scale, shared, gain
        )
    product.mul_(factor[:, None])
    of_targets = (
        target_scale if isinstance(target_scale, float) else target_scale[owned.positions, None]
    )
    product.index_add_(
        0, owned.positions, weight[owned.rows].to(product.dtype) * of_targets, alpha=-1
    )
    if shared is not None:
        product.sub_(shared)
    return product if gain is None else product.mul_(gain[:, None])


def scale(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Write x factor [T, H] into `out`, whatever its dtype, and return it; `factor` [T] in the statistics dtype."""
    if x.is_cuda and factor.dtype is torch.float32 and has_triton():
        from vp_train.vocab import triton_rows

        return triton_rows.scale(x, factor, out)
    return scaled(x, factor, out)


def subtract_targets(grad: Tensor, x: Tensor, owned: Owned, factor: Tensor) -> None:
    """grad [R, H] -= factor x at the row of each token's target, for the tokens of x [T, H] owned here.

    `factor` [T] in the dtype of `grad`.  On CUDA the order of sums varies, unless torch is told to be
    deterministic.
    """
    if (
        grad.is_cuda
        and grad.dtype is torch.float32
        and has_triton()
        and not torch.are_deterministic_algorithms_enabled()
    ):
        from vp_train.vocab import triton_rows

        triton_rows.subtract_targets(grad, x, owned.positions, owned.rows, factor)
        return
    at_targets = x[owned.positions] * factor[owned.positions, None]
    grad.index_add_(0, owned.rows, at_targets.to(grad.dtype), alpha=-1)


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
