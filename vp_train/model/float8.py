"""Matrix products of linear layers in float8, through torch's scaled products.

A matrix is rounded to float8 values times scales.  A scale is the smallest power of two with which
the largest value fits.  So scaling itself rounds nothing, also in bfloat16, and where the values
are not much smaller than the largest one, y = x W^T and dx = dy W read the same rounded W.

Weights and activations are rounded to e4m3.  So are gradients with a scale for every row.  With one
scale for a whole gradient they are rounded to e5m2, which has less precision and more range
(arXiv 2209.05433).  Products are rounded to bfloat16.  A GPU forms them with the fast accumulation
of its tensor cores: on an H100 that changes the error of dx by at most 0.4 % of itself
(docs/memory.md).

dW = dy^T x stays a bfloat16 product that is added to an fp32 gradient (`linear.WeightGradStore`).
In float8 it would round x and dy a second time, along their tokens, and its sum over microbatches
would need an fp32 product [out, in] in memory, because scaled products do not accumulate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vp_train.tensors.compiling import compiled, compiles_on

PRECISE, WIDE = torch.float8_e4m3fn, torch.float8_e5m2
# Smaller maxima count as this, so that neither a scale nor its inverse leaves the range of fp32.
_SMALLEST = 2.0**-100
_MANTISSA, _EXPONENT = 0x007F_FFFF, 0x7F80_0000  # bits of an fp32


@dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix [N, K] in float8: `values` [N, K], row-major, times `scale`.

    scale: fp32 [N, 1] with a scale for every row, [1, 1] with one for the matrix.
    """

    values: Tensor
    scale: Tensor


def rounded(matrix: Tensor, dtype: torch.dtype, *, by_row: bool) -> Rounded:
    """Round `matrix` [N, K] to the float8 `dtype`, with a scale for every row or a single one.

    A row with a value that is not finite gets values that are NaN.
    """
    function: Callable[[Tensor, torch.dtype, bool], tuple[Tensor, Tensor]] = (
        compiled(_round) if matrix.is_cuda and compiles_on(matrix.device) else _round
    )
    return Rounded(*function(matrix, dtype, by_row))


def _round(matrix: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    dims = 1 if by_row else (0, 1)
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=dims, keepdim=True).float()
    ratio = largest.clamp(min=_SMALLEST) / torch.finfo(dtype).max
    # Up to the next power of two: a carry out of the mantissa.
    scale = ((ratio.view(torch.int32) + _MANTISSA) & _EXPONENT).view(torch.float32)
    values = (matrix * (1 / scale).to(matrix.dtype)).to(dtype)
    return values.contiguous(), scale


def scaled_product(a: Rounded, b: Rounded) -> Tensor:
    """Return a b^T for a [N, K] and b [M, K]: bfloat16 [N, M]."""
    product: Tensor = torch._scaled_mm(
        a.values,
        b.values.T,
        scale_a=a.scale,
        scale_b=b.scale.T,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product


class Float8Products:
    """The products of linear layers with bfloat16 weights [out, in] and activations [.., in].

    by_row: whether every row has a scale: every token, and every row or column of a weight.  Then
        the rounding of a token does not depend on other tokens.  Otherwise a matrix has one scale.
    """

    def __init__(self, *, by_row: bool) -> None:
        self._by_row = by_row
        self.gradient_dtype = PRECISE if by_row else WIDE
        # Rounded weights, and whether the weight is transposed; None while weights may change.
        self._kept: dict[tuple[nn.Parameter, bool], Rounded] | None = None

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Round every weight once within this context, in which no weight may change."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def output(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
        """Return x W^T [.., out], plus `bias` [out] if there is one."""
        y = self._product(x, PRECISE, self._weight(weight, transposed=False))
        return y if bias is None else y.add_(bias)

    def input_gradient(self, dy: Tensor, weight: nn.Parameter) -> Tensor:
        """Return dy W [.., in] for dy [.., out]."""
        return self._product(dy, self.gradient_dtype, self._weight(weight, transposed=True))

    def _product(self, x: Tensor, dtype: torch.dtype, weight: Rounded) -> Tensor:
        # Detached, or `rounded` would be compiled once more for tensors with a gradient.
        rows = rounded(x.detach().flatten(0, -2), dtype, by_row=self._by_row)
        return scaled_product(rows, weight).view(*x.shape[:-1], -1)

    def _weight(self, weight: nn.Parameter, *, transposed: bool) -> Rounded:
        key = (weight, transposed)
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        matrix = weight.detach()
        found = rounded(matrix.T if transposed else matrix, PRECISE, by_row=self._by_row)
        if self._kept is not None:
            self._kept[key] = found
        return found
