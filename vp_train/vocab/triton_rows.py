"""The operations of `rows` as Triton kernels for CUDA.  The only importer of triton."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from vp_train.vocab.rows import Statistics

_WHOLE = 32_768  # a row of this many columns fits into the registers of one program
_BLOCK = 4_096  # columns at a time of a longer row
_PER_THREAD = 32  # columns per thread
_HIDDEN_BLOCK = 1_024  # hidden values of a row per program


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fold(  # type: ignore[no-untyped-def]
    logits,
    out,
    target_columns,
    maxima_before,
    totals_before,
    targets_before,
    maxima,
    totals,
    targets,
    rescales,
    num_columns,
    softcap,
    capped: tl.constexpr,
    whole: tl.constexpr,
    block: tl.constexpr,
):
    """Run `rows.fold` with one program per row.

    With `whole` the row is one block, which stays in registers.  Otherwise one loop finds the
    maximum and a second one does the rest, with the row in the cache.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * num_columns
    column = tl.load(target_columns + row)
    known = tl.load(targets_before + row)
    among = (column >= 0) & (column < num_columns)
    target = tl.load(logits + start + column, mask=among, other=0.0)
    tl.store(targets + row, tl.where(among, target, known))
    before = tl.load(maxima_before + row)
    columns = tl.arange(0, block)
    if whole:
        inside = columns < num_columns
        z = tl.load(logits + start + columns, mask=inside, other=float("-inf"))
        maximum = _maximum(tl.max(z, 0), before, softcap, capped)
        exponential, written = _exponentials(z, maximum, softcap, inside, capped)
        tl.store(out + start + columns, written.to(out.dtype.element_ty), mask=inside)
        total = tl.sum(exponential, 0)
    else:
        running = tl.full([block], float("-inf"), tl.float32)
        first = 0
        # Not `range`: Triton 3.6's interpreter does not accept one that ends at an argument.
        while first < num_columns:
            inside = first + columns < num_columns
            z = tl.load(logits + start + first + columns, mask=inside, other=float("-inf"))
            running = tl.maximum(running, z)
            first += block
        maximum = _maximum(tl.max(running, 0), before, softcap, capped)
        sums = tl.zeros([block], tl.float32)
        first = 0
        while first < num_columns:
            inside = first + columns < num_columns
            z = tl.load(logits + start + first + columns, mask=inside, other=float("-inf"))
            exponential, written = _exponentials(z, maximum, softcap, inside, capped)
            sums += exponential
            tl.store(out + start + first + columns, written.to(out.dtype.element_ty), mask=inside)
            first += block
        total = tl.sum(sums, 0)
    rescale = tl.exp(before - maximum)
    tl.store(maxima + row, maximum)
    tl.store(totals + row, total + tl.load(totals_before + row) * rescale)
    tl.store(rescales + row, rescale)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _maximum(largest, before, softcap, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    if capped:
        largest = softcap * _tanh(largest / softcap)  # tanh grows with its argument
    return tl.maximum(largest, before)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exponentials(z, maximum, softcap, inside, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the exponentials that the total sums, and those that are written."""
    if capped:
        ratio = _tanh(z / softcap)
        exponential = tl.where(inside, tl.exp(softcap * ratio - maximum), 0.0)
        written = exponential * (1 - ratio * ratio)
    else:
        exponential = tl.exp(z - maximum)
        written = exponential
    return exponential, written


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tanh(value):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * value) - 1


def fold(
    logits: Tensor, before: Statistics, target_column: Tensor, out: Tensor, softcap: float | None
) -> tuple[Statistics, Tensor]:
    """Do what `rows.fold` does for fp32 logits and statistics with contiguous rows."""
    assert logits.dtype is torch.float32
    assert logits.is_contiguous()
    assert out.is_contiguous()
    num_rows, num_columns = logits.shape
    after = Statistics(*(torch.empty_like(before.maximum) for _ in range(3)))
    rescale = torch.empty_like(before.maximum)
    if num_rows:
        whole = num_columns <= _WHOLE
        block = max(16, triton.next_power_of_2(num_columns)) if whole else _BLOCK
        warps = min(32, max(4, block // (32 * _PER_THREAD))) if whole else 8
        with _gpu_of(logits):
            _fold[(num_rows,)](
                logits,
                out,
                target_column,
                before.maximum,
                before.total,
                before.target,
                after.maximum,
                after.total,
                after.target,
                rescale,
                num_columns,
                softcap or 1.0,
                softcap is not None,
                whole,
                block,
                num_warps=warps,
            )
    return after, rescale


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _input_term(  # type: ignore[no-untyped-def]
    product,
    factors,
    weight,
    row_of_token,
    target_scales,
    shared,
    gains,
    hidden,
    target_scale,
    has_scales: tl.constexpr,
    has_shared: tl.constexpr,
    has_gain: tl.constexpr,
    block: tl.constexpr,
):
    """Run `rows.input_term` with one program per token and block of hidden values."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden
    place = product + token.to(tl.int64) * hidden + columns
    value = tl.load(place, mask=inside) * tl.load(factors + token)
    row = tl.load(row_of_token + token)
    if row >= 0:
        scale = tl.load(target_scales + token) if has_scales else target_scale
        value -= scale * tl.load(weight + row * hidden + columns, mask=inside).to(tl.float32)
    if has_shared:
        value -= tl.load(shared + columns, mask=inside)
    if has_gain:
        value *= tl.load(gains + token)
    tl.store(place, value, mask=inside)


def input_term(
    product: Tensor,
    factor: Tensor,
    weight: Tensor,
    row_of_token: Tensor,
    target_scale: Tensor | float,
    shared: Tensor | None,
    gain: Tensor | None,
) -> Tensor:
    """Do what `rows.input_term` does for a contiguous fp32 product."""
    assert product.dtype is torch.float32
    assert product.is_contiguous()
    assert weight.is_contiguous()
    num_tokens, hidden = product.shape
    scales = target_scale if isinstance(target_scale, Tensor) else None
    if num_tokens:
        grid, block = _grid(num_tokens, hidden)
        with _gpu_of(product):
            _input_term[grid](
                product,
                factor,
                weight,
                row_of_token,
                factor if scales is None else scales,
                factor if shared is None else shared,
                factor if gain is None else gain,
                hidden,
                1.0 if isinstance(target_scale, Tensor) else target_scale,
                scales is not None,
                shared is not None,
                gain is not None,
                block,
            )
    return product


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scale(x, factors, out, hidden, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Run `rows.scale` with one program per token and block of hidden values."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden
    place = token.to(tl.int64) * hidden + columns
    value = tl.load(x + place, mask=inside).to(tl.float32) * tl.load(factors + token)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def scale(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Do what `rows.scale` does for an fp32 factor and contiguous tensors."""
    assert factor.dtype is torch.float32
    assert x.is_contiguous()
    assert out.is_contiguous()
    if len(x):
        grid, block = _grid(*x.shape)
        with _gpu_of(x):
            _scale[grid](x, factor, out, x.shape[1], block)
    return out


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _subtract_targets(grad, x, positions, rows, factors, hidden, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Run `rows.subtract_targets` with one program per owned token and block of hidden values."""
    index = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden
    token = tl.load(positions + index)
    value = tl.load(x + token * hidden + columns, mask=inside, other=0.0).to(tl.float32) * tl.load(
        factors + token
    )
    tl.atomic_add(
        grad + tl.load(rows + index) * hidden + columns, -value, mask=inside, sem="relaxed"
    )


def subtract_targets(
    grad: Tensor, x: Tensor, positions: Tensor, rows: Tensor, factor: Tensor
) -> None:
    """Do what `rows.subtract_targets` does for a contiguous fp32 gradient."""
    assert grad.dtype is torch.float32
    assert grad.is_contiguous()
    assert x.is_contiguous()
    if len(positions):
        grid, block = _grid(len(positions), x.shape[1])
        with _gpu_of(grad):
            _subtract_targets[grid](grad, x, positions, rows, factor, x.shape[1], block)


def _gpu_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which the GPU of `tensor` is current: Triton launches on that one.

    A thread beside the passes has GPU 0, whatever the rank.
    """
    guard: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return guard


def _grid(num_rows: int, hidden: int) -> tuple[tuple[int, int], int]:
    """Return the grid, a program per row and block of hidden values, and the size of a block."""
    block = min(_HIDDEN_BLOCK, triton.next_power_of_2(hidden))
    return (num_rows, triton.cdiv(hidden, block)), block
