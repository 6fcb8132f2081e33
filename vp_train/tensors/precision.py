"""The dtypes of a run, and operations on tensors of different dtypes.

On a CPU torch.compile fuses these operations, if there is a C++ compiler.
"""

from __future__ import annotations

import importlib.util
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

_SUMMED_ROWS = 256  # rows that `column_sums` casts at a time
_COMPILED_SHAPES = 64  # compiled shapes per function; torch runs further shapes uncompiled


def statistics_dtype(compute: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, gradients and optimizer state: fp64 for fp64, else fp32."""
    return torch.float64 if compute is torch.float64 else torch.float32


def accumulate(
    accumulator: Tensor, addend: Tensor, keep: Tensor | None = None, scale: Tensor | None = None
) -> None:
    """Set accumulator [N, H] = accumulator * keep + addend * scale, in place.

    `addend` [N, H] may have another dtype.  `keep` and `scale` are [N]; None stands for 1.  It is
    fused on a CPU, where torch would first cast all of `addend`.
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
    """Return the sum [H] over the rows of `matrix` [R, H] in `dtype`.

    It works in blocks of rows, because torch would first cast the whole matrix.
    """
    return torch.stack(
        [block.sum(0, dtype=dtype) for block in torch.split(matrix, _SUMMED_ROWS)]
    ).sum(0)


def scaled(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Write x * scale [N, H] into `out` and return it, for `scale` [N] of any dtype.

    It is fused like `accumulate`.
    """
    mixed = x.device.type == "cpu" and x.dtype is not scale.dtype
    (compiled(_scale) if mixed and has_compiler() else _scale)(x, scale, out)
    return out


def _scale(x: Tensor, scale: Tensor, out: Tensor) -> None:
    torch.mul(x, scale[:, None], out=out)


def accumulate_transposed(accumulator: Tensor, addend: Tensor, scale: Tensor | None = None) -> None:
    """Add addend^T * scale to accumulator [N, H], for `addend` [H, N] and `scale` [], on a CPU.

    `addend` has another dtype.  It needs a compiler: see `has_compiler`.
    """
    compiled_exactly(_add_transposed)(accumulator, addend, scale)


def _add_transposed(accumulator: Tensor, addend: Tensor, scale: Tensor | None) -> None:
    accumulator.add_(addend.T if scale is None else addend.T * scale)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for all shapes; only a dimension of size 1 is compiled again."""
    return _compile(function, dynamic=True)


@cache
def compiled_exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for every shape anew.  That takes seconds, so use few shapes."""
    return _compile(function, dynamic=False)


@cache
def compiled_as_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for its first shape; if there is another one, for all shapes."""
    return _compile(function, dynamic=None)


def _compile(function: Callable[..., Any], *, dynamic: bool | None) -> Callable[..., Any]:
    import torch._dynamo  # slow; the first compilation would import it anyway

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _COMPILED_SHAPES)
    return torch.compile(function, dynamic=dynamic)


def runs_compiled(device: torch.device) -> bool:
    """Return whether torch.compile makes kernels for a GPU like `device`; they need Triton."""
    return device.type == "cuda" and has_compiler() and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def has_compiler() -> bool:
    """Return whether torch.compile works on this CPU: it needs g++ or the like, and Python.h."""
    compiler = shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    return compiler is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
