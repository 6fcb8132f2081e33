"""`rows.exponentiate` for CUDA.  The only importer of triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # elements of a row that a program works on at a time
_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exponentiate(logits, least, out, maxima, totals, num_columns, softcap, capped: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row: a loop for the maximum, one for the rest, which finds the row in the cache."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * num_columns
    columns = tl.arange(0, block)
    running = tl.full([block], float("-inf"), tl.float32)
    for first in range(0, num_columns, block):
        inside = first + columns < num_columns
        running = tl.maximum(running, tl.load(logits + start + first + columns, mask=inside, other=float("-inf")))
    maximum = tl.max(running, 0)
    if capped:
        maximum = softcap * _tanh(maximum / softcap)  # tanh grows with its argument
    maximum = tl.maximum(maximum, tl.load(least + row))
    total = tl.zeros([block], tl.float32)
    for first in range(0, num_columns, block):
        inside = first + columns < num_columns
        z = tl.load(logits + start + first + columns, mask=inside, other=float("-inf"))
        if capped:
            ratio = _tanh(z / softcap)
            exponential = tl.where(inside, tl.exp(softcap * ratio - maximum), 0.0)
            total += exponential
            exponential *= 1 - ratio * ratio
        else:
            exponential = tl.exp(z - maximum)
            total += exponential
        tl.store(out + start + first + columns, exponential.to(out.dtype.element_ty), mask=inside)
    tl.store(maxima + row, maximum)
    tl.store(totals + row, tl.sum(total, 0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tanh(value):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * value) - 1


def exponentiate_rows(logits: Tensor, least: Tensor, out: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """For fp32 `logits` and `least`, contiguous rows."""
    assert logits.dtype is torch.float32
    assert logits.is_contiguous()
    assert out.is_contiguous()
    num_rows, num_columns = logits.shape
    maxima, totals = torch.empty_like(least), torch.empty_like(least)
    if num_rows:
        block = min(_BLOCK, triton.next_power_of_2(num_columns))
        _exponentiate[(num_rows,)](
            logits, least, out, maxima, totals, num_columns, softcap or 1.0, softcap is not None, block, num_warps=_WARPS
        )
    return maxima, totals
