"""The row-wise work between matrix products: softmax statistics, exponentials, terms of targets.

There are three implementations with the same arguments.  On CUDA these are Triton kernels, if
Triton is installed.  On a CPU in low precision torch.compile fuses the exponentials, if there is a
C++ compiler.  Otherwise they are torch operations, which make several passes over the logits.
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
    """Running statistics of the logits of T tokens; all [T], in the statistics dtype.

    maximum: the largest logit seen so far.
    total: sum exp(z - maximum).
    target: x W^T at the token's target, before a softcap; 0 if it has not been seen.
    """

    maximum: Tensor
    total: Tensor
    target: Tensor

    @classmethod
    def none(cls, like: Tensor, dtype: torch.dtype) -> Statistics:
        """Return the statistics of no logits, for T tokens on the device of `like` [T, ...]."""
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
    """Write P = exp(z - maximum) of a chunk of logits into `out`, and update the statistics.

    Returns the new statistics, to whose `maximum` P is relative, and the factor
    exp(before.maximum - maximum) [T] for all sums so far.  With `softcap` c, z = c tanh(logits /
    c).  P is then multiplied by dz / dlogits = 1 - (z / c)^2, and the total is not.

    logits: [T, C]; overwritten.
    target_column: [T], int64; may lie outside the chunk.
    out: [T, C]; may be the memory of `logits`.
    usual: whether the shape occurs often, so that compiling code for it pays.
    """
    if _suits_triton(logits, out):
        from vp_train.vocab import triton_rows  # imported only where there is a GPU

        return triton_rows.fold(logits, before, target_column, out, softcap)
    target = _picked(before.target, logits, target_column)
    maximum, part = exponentiate(logits, before.maximum, out, softcap, usual=usual)
    rescale = torch.exp(before.maximum - maximum)
    return Statistics(maximum, torch.addcmul(part, before.total, rescale), target), rescale


def exponentiate(
    logits: Tensor, least: Tensor, out: Tensor, softcap: float | None, *, usual: bool = False
) -> tuple[Tensor, Tensor]:
    """Write P as `fold` does; return the maximum [T] and the sum of P [T], without softcap's slope.

    The maximum is at least `least` [T].  Everything is computed in the dtype of `least`.
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
    """Do what `exponentiate` does with torch operations."""
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
    """Do what `unfused` does without in-place writes.

    torch.compile turns it into two loops over a row, which stays in cache.
    """
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
    """Return `target` [T], replaced by logits[t, column[t]] where `column` [T] is in the chunk.

    It never waits for the device.
    """
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
    """Return (product * factor - target_scale * W[target] - shared) * gain [T, H], in `product`.

    W[target] is the row of `weight` [R, H] of the token's target, 0 where this shard does not own
    it.  `factor`, `target_scale` and `gain` are [T], `shared` [H].  Without `shared` nothing is
    subtracted; without `gain` the factor is 1.  Everything except `weight` is in the statistics
    dtype.
    """
    if _suits_triton(product, weight):
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
    """Write x * factor [T, H] into `out` of any dtype, and return it.

    `factor` [T] is in the statistics dtype.
    """
    if _suits_triton(factor, x, out):
        from vp_train.vocab import triton_rows

        return triton_rows.scale(x, factor, out)
    return scaled(x, factor, out)


def subtract_targets(grad: Tensor, x: Tensor, owned: Owned, factor: Tensor) -> None:
    """Subtract factor * x of each token owned here from its target's row of `grad` [R, H].

    `x` is [T, H], `factor` [T] in the dtype of `grad`.  On CUDA the order of sums varies, unless
    `torch.use_deterministic_algorithms` is set.
    """
    if _suits_triton(grad, x) and not torch.are_deterministic_algorithms_enabled():
        from vp_train.vocab import triton_rows

        triton_rows.subtract_targets(grad, x, owned.positions, owned.rows, factor)
        return
    at_targets = x[owned.positions] * factor[owned.positions, None]
    grad.index_add_(0, owned.rows, at_targets.to(grad.dtype), alpha=-1)


def _suits_triton(precise: Tensor, *others: Tensor) -> bool:
    """Return whether a kernel takes these: fp32 statistics on CUDA, contiguous, with Triton."""
    if not precise.is_cuda or precise.dtype is not torch.float32 or not _has_triton():
        return False
    return all(tensor.is_contiguous() for tensor in (precise, *others))


@cache
def _has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
