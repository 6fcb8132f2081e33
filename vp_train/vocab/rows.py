"""The row-wise work between matrix products: softmax statistics, exponentials, terms of targets.

There are three implementations with the same arguments.  On CUDA these are Triton kernels, if
Triton is installed.  On a CPU in 16 bits they are kernels in C++, if there is a compiler.
Otherwise they are torch operations, which make several passes over the logits.  Every function
chooses for itself, call by call: the kernels of each take other dtypes and strides.
"""

from __future__ import annotations

import math
import os
from functools import cache

import torch
from torch import Tensor

from vp_train.tensors import kernels
from vp_train.tensors.compiling import has_triton
from vp_train.vocab.shard import Owned

# By how much a logit may exceed the reference of its exponential.  P of one chunk then is at most
# 256, and the reference rarely has to move.
SLACK = 8 * math.log(2)


def extend(
    logits: Tensor,
    out: Tensor | None,
    running: Tensor,
    references: Tensor,
    row_of_token: Tensor | None,
    start: int,
    softcap: float | None,
    *,
    slack: float = SLACK,
    num_warps: int | None = None,
) -> None:
    """Add the chunk of rows from `start` on to the `running` statistics, and write P into `out`.

    P = exp(z - reference).  With `softcap` c, z = c tanh(logits / c); P is then multiplied by
    dz / dlogits = 1 - (z / c)^2, and the total is not.  Nothing is written if `out` is None.  The
    reference is the largest logit of the first chunk.  It moves only to a logit that exceeds it by
    `slack`.

    logits: [T, C]; overwritten.
    out: [T, C], with any stride between rows; may be the memory of `logits`.
    running: reference, total and target logit (before a softcap) [3, T], in the statistics dtype,
        of the chunks before; what it contains does not matter if `start` is 0.
    references: [T]; gets the reference of this chunk.
    row_of_token: see `Owned`; None finds no target.
    slack: SLACK wherever Triton does it.
    num_warps: of a program, where a kernel does it; see `triton_rows.warps_of`.
    """
    if _suits_triton(running):
        from vp_train.vocab import triton_rows  # imported only where there is a GPU

        assert row_of_token is not None
        triton_rows.extend(
            logits, out, running, references, row_of_token, start, softcap, slack, num_warps
        )
        return
    if (out is None or out.dtype is logits.dtype) and kernels.suits(logits, running, references):
        kernels.run(
            *("extend", logits.dtype, logits, out, 0 if out is None else out.stride(0)),
            *(running, references, row_of_token, start, *logits.shape, softcap or 0.0, slack),
        )
        return
    if start == 0:
        running[2] = 0
    if row_of_token is not None:
        running[2] = _picked(running[2], logits, row_of_token - start)
    z, slope = _capped(logits.to(running.dtype), softcap)
    reference = largest = z.amax(-1)
    if start:
        before = running[0].clone()
        reference = torch.where(largest > before + slack, largest, before)
    total = _exponentials(z, slope, reference, out)
    if start:
        total.addcmul_(running[1], torch.exp(before - reference))
    running[0], running[1] = reference, total
    references.copy_(reference)


def _picked(target: Tensor, logits: Tensor, column: Tensor) -> Tensor:
    """Return `target` [T], replaced by logits[t, column[t]] where `column` [T] is in the chunk.

    It never waits for the device.
    """
    num_columns = logits.shape[1]
    found = logits.gather(1, column.clamp(0, num_columns - 1)[:, None])[:, 0].to(target.dtype)
    return torch.where((column >= 0) & (column < num_columns), found, target)


def fastest_warps(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int | None:
    """Measure how `extend` runs fastest for chunks [T, C] of `dtype`: `num_warps` for it.

    None is the usual one, and also the choice on a CPU, and where sums must be the same bits every
    time.
    """
    if dtype is torch.float64 or device.type != "cuda" or not has_triton():
        return None
    if torch.are_deterministic_algorithms_enabled():
        return None
    from vp_train.vocab import triton_rows

    return triton_rows.fastest_warps(shape, dtype, device)


def exponentials(logits: Tensor, out: Tensor, reference: Tensor, softcap: float | None) -> None:
    """Write P of a chunk as `extend` does, relative to `reference` [T]."""
    if _suits_triton(reference):
        from vp_train.vocab import triton_rows

        triton_rows.extend(logits, out, reference, None, reference, 0, softcap, SLACK, None)
        return
    _exponentials(*_capped(logits.to(reference.dtype), softcap), reference, out)


def _capped(z: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return logits after the softcap, and its slope; overwrite `z`."""
    if softcap is None:
        return z, None
    ratio = z.div_(softcap).tanh_()
    slope = 1 - ratio * ratio
    return ratio.mul_(softcap), slope


def _exponentials(z: Tensor, slope: Tensor | None, reference: Tensor, out: Tensor | None) -> Tensor:
    """Write exp(z - reference) * slope into `out`; return the sum [T] without the slope."""
    exponential = z.sub_(reference[:, None]).exp_()
    total = exponential.sum(-1)
    if slope is not None:
        exponential.mul_(slope)
    if out is not None and exponential.data_ptr() != out.data_ptr():
        out.copy_(exponential)
    return total


def relate(values: Tensor, references: Tensor, size: int) -> None:
    """Make `values` [T, n size], or fewer columns, relative to the last of `references` [n, T].

    Chunk i of `size` columns is relative to `references[i]`.  The last one is right as it is.
    """
    if _suits_triton(references):
        from vp_train.vocab import triton_rows

        triton_rows.relate(values, references, size)
        return
    for index, own in enumerate(references[:-1]):
        chunk = values[:, index * size : (index + 1) * size]
        chunk.mul_(torch.exp(own - references[-1])[:, None])


def combine(
    gathered: Tensor, ignored: Tensor, z_loss: float, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return lse [T] and loss [T] from the statistics of all shards.

    gathered: reference, total and target logit of each shard [n, 3, T].
    ignored: [T], where the loss is 0.
    compute: the dtype of the weights.

    The sums are in the order of the shards, so that all ranks get the same bits.
    """
    if _suits_triton(gathered):
        from vp_train.vocab import triton_rows

        return triton_rows.combine(gathered, ignored, z_loss)
    if kernels.suits_sums(compute, gathered):
        lse, loss = gathered.new_empty(2, gathered.shape[2])
        kernels.run(
            *("combine", compute, gathered, ignored.view(torch.uint8), z_loss, lse, loss),
            *(len(gathered), gathered.shape[2]),
        )
        return lse, loss
    references, totals, logits = gathered.unbind(1)
    reference = references.amax(0)
    total = (totals * torch.exp(references - reference)).sum(0)
    return loss_of(reference, total, logits.sum(0), ignored, z_loss)


def loss_of(
    reference: Tensor, total: Tensor, target_logit: Tensor, ignored: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Return lse and loss, all [T], from sums over the shards relative to one reference."""
    lse = reference + total.log()
    loss = lse - target_logit
    if z_loss:
        loss += z_loss * lse**2
    return lse, loss.masked_fill_(ignored, 0.0)


def softmax_factor(reference: Tensor | None, lse: Tensor, z_loss: float) -> Tensor | float:
    """Return exp(reference - lse) dloss / dlse [T]; `reference` None is lse itself."""
    factor: Tensor | float = 1.0 if reference is None else torch.exp(reference - lse)
    return factor * (1 + 2 * z_loss * lse) if z_loss else factor


def input_term(
    product: Tensor,
    reference: Tensor | None,
    lse: Tensor,
    weight: Tensor,
    owned: Owned,
    target_scale: Tensor | float,
    *,
    z_loss: float = 0.0,
    shared: Tensor | None = None,
    gain: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return (product * factor - target_scale * W[target] - shared) * gain [T, H] in `dtype`.

    product: P W [T, H], for P relative to `reference` [T]; None is lse itself.  Overwritten.
    factor: exp(reference - lse) (1 + 2 z_loss lse).

    W[target] is the row of `weight` [R, H] of the token's target, 0 where this shard does not own
    it.  `lse`, `target_scale` and `gain` are [T], `shared` [H].  Without `shared` nothing is
    subtracted; without `gain` the factor is 1.  Everything except `weight` is in the statistics
    dtype, and so is the result by default.
    """
    if _suits_triton(lse, product, weight):
        from vp_train.vocab import triton_rows

        out = torch.empty_like(product, dtype=dtype) if dtype not in (None, product.dtype) else None
        term = product if out is None else out
        triton_rows.input_term(
            product,
            term,
            lse if reference is None else reference,
            lse,
            weight,
            owned.row_of_token,
            target_scale,
            z_loss,
            shared,
            gain,
        )
        return term
    if kernels.suits(weight, lse, product) and dtype in (None, product.dtype, weight.dtype):
        rounds = dtype is weight.dtype
        term = torch.empty_like(product, dtype=dtype) if rounds else product
        kernels.run(
            *("input_term_rounded" if rounds else "input_term", weight.dtype, product, term),
            *(reference, lse, weight, owned.row_of_token),
            *_by_token_or_all(target_scale),
            *(z_loss, shared, gain, *product.shape),
        )
        return term
    factor = softmax_factor(reference, lse, z_loss)
    if isinstance(factor, Tensor):
        product.mul_(factor[:, None])
    of_targets, alpha = weight.index_select(0, owned.rows).to(product.dtype), -1.0
    if isinstance(target_scale, float):
        alpha = -target_scale
    else:
        of_targets.mul_(target_scale.index_select(0, owned.positions)[:, None])
    product.index_add_(0, owned.positions, of_targets, alpha=alpha)
    if shared is not None:
        product.sub_(shared)
    if gain is not None:
        product.mul_(gain[:, None])
    return product if dtype is None else product.to(dtype)


def scale(
    x: Tensor,
    factor: Tensor,
    out: Tensor,
    *,
    reference: Tensor | None = None,
    lse: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Write x * factor [T, H] into `out` of any dtype, and return it.

    With `lse` [T] also times exp(reference - lse) (1 + 2 z_loss lse), for `reference` [T].
    `factor` [T] is in the statistics dtype.
    """
    if _suits_triton(factor, x, out):
        from vp_train.vocab import triton_rows

        triton_rows.scale(x, factor, out, reference, lse, z_loss)
        return out
    if out.is_contiguous() and kernels.suits_sums(out.dtype, factor):
        rounds = x.dtype is torch.float32
        if x.is_contiguous() and (rounds or x.dtype is out.dtype):
            kernels.run(
                *("scale_rounded" if rounds else "scale", out.dtype, x, factor, reference, lse),
                *(z_loss, out, *x.shape),
            )
            return out
    if lse is not None:
        factor = factor * softmax_factor(reference, lse, z_loss)
    return out.copy_(x * factor[:, None])


def subtract_targets(
    grad: Tensor, x: Tensor, owned: Owned, factor: Tensor, target_scale: Tensor | float = 1.0
) -> None:
    """Subtract factor * target_scale * x of each token owned here from its target's row of `grad`.

    `grad` is [R, H], `x` [T, H], `factor` and `target_scale` [T] in the dtype of `grad`.  On CUDA
    the order of sums varies, unless `torch.use_deterministic_algorithms` is set.
    """
    atomic = grad.dtype is torch.float32 and not torch.are_deterministic_algorithms_enabled()
    if atomic and _suits_triton(factor, grad, x):
        from vp_train.vocab import triton_rows

        triton_rows.subtract_targets(grad, x, owned.positions, owned.rows, factor, target_scale)
        return
    if kernels.suits(x, grad, factor):
        kernels.run(
            *("subtract_targets", x.dtype, grad, x, owned.row_of_token, factor),
            *_by_token_or_all(target_scale),
            *x.shape,
        )
        return
    here = (
        factor if isinstance(target_scale, float) and target_scale == 1 else factor * target_scale
    )
    here = here.index_select(0, owned.positions)
    # Cast first: torch multiplies tensors of different dtypes slowly.
    at_targets = x.index_select(0, owned.positions).to(here.dtype).mul_(here[:, None])
    grad.index_add_(0, owned.rows, at_targets.to(grad.dtype), alpha=-1)


def _by_token_or_all(scale: Tensor | float) -> tuple[Tensor | None, float]:
    """Return the two arguments in which a kernel takes a factor of each token or of all."""
    return (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)


def runs_triton(device: torch.device) -> bool:
    """Return whether there are Triton kernels for `device`."""
    return (device.type == "cuda" or _interprets()) and has_triton()


def _suits_triton(statistics: Tensor, *others: Tensor) -> bool:
    """Return whether a kernel takes these: fp32 statistics on CUDA, contiguous, with Triton."""
    if statistics.dtype is not torch.float32 or not runs_triton(statistics.device):
        return False
    return all(tensor.is_contiguous() for tensor in (statistics, *others))


@cache
def _interprets() -> bool:
    """Return whether Triton runs kernels on tensors of the CPU, as in the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
