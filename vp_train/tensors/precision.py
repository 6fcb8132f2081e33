"""The dtypes of a run, and operations on tensors of different dtypes.

On a CPU kernels fuse these operations, if there is a C++ compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vp_train.tensors import kernels

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}

_SUMMED_ROWS = 256  # rows that `column_sums` casts at a time


def statistics_dtype(compute: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, gradients and optimizer state: fp64 for fp64, else fp32."""
    return torch.float64 if compute is torch.float64 else torch.float32


def accumulate(
    accumulator: Tensor,
    addend: Tensor,
    keep: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Set accumulator [N, H] = accumulator * keep + addend * scale, in place.

    `addend` [N, H] may have another dtype.  `keep` is [N], `scale` is [N] or []; None stands for 1.
    On a CPU one kernel does it in 16 bits, where torch would first cast all of `addend`.
    """
    factors = [each for each in (keep, scale) if each is not None]
    if kernels.suits(addend, accumulator, *factors):
        by_row = int(scale is not None and scale.dim() > 0)
        kernels.run(
            "accumulate", addend.dtype, accumulator, addend, keep, scale, by_row, 0, *addend.shape
        )
        return
    if keep is not None:
        accumulator.mul_(keep[:, None])
    if scale is not None and scale.dim():
        scale = scale[:, None]
    accumulator.add_(addend if scale is None else addend * scale)


def widened(matrix: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Return a copy of `matrix` [N, H] in the statistics dtype, times `scale` [N] if given."""
    wide = torch.empty_like(matrix, dtype=dtype)
    if scale is None:
        return wide.copy_(matrix)
    if kernels.suits(matrix, wide, scale):
        kernels.run("accumulate", matrix.dtype, wide, matrix, None, scale, 1, 1, *matrix.shape)
        return wide
    return torch.mul(matrix, scale[:, None], out=wide)


def column_sums(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum [H] over the rows of `matrix` [R, H] in `dtype`.

    On a CPU it works in blocks of rows, because torch would first cast the whole matrix.
    """
    if matrix.is_cuda or len(matrix) <= _SUMMED_ROWS:
        return matrix.sum(0, dtype=dtype)
    return torch.stack(
        [block.sum(0, dtype=dtype) for block in torch.split(matrix, _SUMMED_ROWS)]
    ).sum(0)


def accumulate_transposed(accumulator: Tensor, addend: Tensor, scale: Tensor | None = None) -> None:
    """Add addend^T * scale to accumulator [N, H] in fp32, for `scale` [].

    `addend` [H, N] is in 16 bits, with any stride between its rows.  See `kernels.suits`.
    """
    kernels.run(
        *("accumulate_transposed", addend.dtype, accumulator, addend, scale),
        *(addend.stride(0), *accumulator.shape),
    )
