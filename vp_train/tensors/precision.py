"""The dtypes of a run, and operations on tensors of different dtypes.

On a CPU torch.compile fuses these operations, if there is a C++ compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vp_train.tensors.compiling import compiled, compiled_exactly, has_compiler

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
    *,
    usual: bool = False,
) -> None:
    """Set accumulator [N, H] = accumulator * keep + addend * scale, in place.

    `addend` [N, H] may have another dtype.  `keep` and `scale` are [N]; None stands for 1.  It is
    fused on a CPU, where torch would first cast all of `addend`.  `usual` says whether the shape
    occurs often, so that compiling code for it pays.
    """
    run = _accumulate
    if (
        accumulator.device.type == "cpu"
        and accumulator.dtype is not addend.dtype
        and has_compiler()
    ):
        run = compiled_exactly(_accumulate) if usual else compiled(_accumulate)
    run(accumulator, addend, keep, scale)


def _accumulate(
    accumulator: Tensor, addend: Tensor, keep: Tensor | None, scale: Tensor | None
) -> None:
    if keep is not None:
        accumulator.mul_(keep[:, None])
    accumulator.add_(addend if scale is None else addend * scale[:, None])


def column_sums(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum [H] over the rows of `matrix` [R, H] in `dtype`.

    It works in blocks of rows, because torch would first cast the whole matrix.
    """
    return torch.stack(
        [block.sum(0, dtype=dtype) for block in torch.split(matrix, _SUMMED_ROWS)]
    ).sum(0)


def accumulate_transposed(accumulator: Tensor, addend: Tensor, scale: Tensor | None = None) -> None:
    """Add addend^T * scale to accumulator [N, H], for `addend` [H, N] and `scale` [], on a CPU.

    `addend` has another dtype.  It needs a compiler: see `has_compiler`.
    """
    compiled_exactly(_add_transposed)(accumulator, addend, scale)


def _add_transposed(accumulator: Tensor, addend: Tensor, scale: Tensor | None) -> None:
    accumulator.add_(addend.T if scale is None else addend.T * scale)
