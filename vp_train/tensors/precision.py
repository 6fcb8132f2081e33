"""Which precision goes with which, and sums of several, fused by torch.compile on a CPU where there is a C++ compiler."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}

_SUMMED_ROWS = 256  # at a time
_COMPILED_SHAPES = 64  # of one function; torch runs any more uncompiled


def statistics_dtype(compute: torch.dtype) -> torch.dtype:
    """Of sums, gradients and what the optimizer keeps: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if compute is torch.float64 else torch.float32


def accumulate(
    accumulator: Tensor, addend: Tensor, keep: Tensor | None = None, scale: Tensor | None = None
) -> None:
    """accumulator [N, H] = accumulator keep + addend scale, for `addend` of another dtype and `keep` and `scale` [N], None: 1.

    Fused on a CPU, where torch would first cast `addend` as a whole.
    """
    mixed = accumulator.device.type == "cpu" and accumulator.dtype is not addend.dtype
    (compiled(_accumulate) if mixed and has_compiler() else _accumulate)(
        accumulator, addend, keep, scale
    )


def _accumulate(
    accumulator: Tensor, addend: Tensor, keep: Tensor | None, scale: Tensor | None
) -> None:
    if keep is not None:
        accumulator.mul_(keep[:, None])
    accumulator.add_(addend if scale is None else addend * scale[:, None])


def column_sums(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the rows of `matrix` [R, H] in `dtype`, by blocks: torch would first cast all of it."""
    return torch.stack(
        [block.sum(0, dtype=dtype) for block in torch.split(matrix, _SUMMED_ROWS)]
    ).sum(0)


def scaled(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """x scale [N, H] in the dtype of x, in `out`, for `scale` [N] of another dtype: fused like `accumulate`."""
    mixed = x.device.type == "cpu" and x.dtype is not scale.dtype
    (compiled(_scale) if mixed and has_compiler() else _scale)(x, scale, out)
    return out


def _scale(x: Tensor, scale: Tensor, out: Tensor) -> None:
    torch.mul(x, scale[:, None], out=out)


def accumulate_transposed(accumulator: Tensor, addend: Tensor, scale: Tensor | None = None) -> None:
    """accumulator [N, H] += addend^T scale for `addend` [H, N] of another dtype on a CPU and `scale` []; needs a compiler."""
    compiled_exactly(_add_transposed)(accumulator, addend, scale)


def _add_transposed(accumulator: Tensor, addend: Tensor, scale: Tensor | None) -> None:
    accumulator.add_(addend.T if scale is None else addend.T * scale)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For any shapes, of which a size of 1 alone is compiled again."""
    return _compile(function, dynamic=True)


@cache
def compiled_exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Again for every shape, which takes seconds: there must be few."""
    return _compile(function, dynamic=False)


def _compile(function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
    import torch._dynamo  # which the first compilation would import

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _COMPILED_SHAPES)
    return torch.compile(function, dynamic=dynamic)


@cache
def has_compiler() -> bool:
    """Whether torch.compile would find what it needs on a CPU: the compiler and Python's headers."""
    compiler = shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    return compiler is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
