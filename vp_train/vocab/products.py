"""Matrix products of chunks of the vocabulary, as fast as each device allows, in reused memory."""

from __future__ import annotations

import torch
from torch import Tensor

from vp_train.tensors import kernels
from vp_train.tensors.precision import (
    accumulate,
    accumulate_transposed,
    statistics_dtype,
    widened,
)

_BLOCK_BYTES = 3 << 20  # size of a block of a transposed product
# Values between the rows of such a block.  With a stride that is a power of two, the rows would
# compete for the same cache lines.
_GAP = 32


class VocabProducts:
    """The products of one layer.

    Results lie in scratch memory and are valid until the next use of scratch of the same name.
    """

    def __init__(self) -> None:
        self._scratch: dict[tuple[str, torch.dtype], Tensor] = {}

    def logits(self, x: Tensor, rows: Tensor, out: Tensor | None) -> Tensor:
        """Return x rows^T [T, C], in the statistics dtype on CUDA, else in the dtype of x.

        The result is `out` [T, C] if that has its dtype.
        """
        if out is not None and (not x.is_cuda or out.dtype is statistics_dtype(out.dtype)):
            return torch.mm(x, rows.T, out=out)
        return self.matmul(x, rows.T)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b, in the statistics dtype on CUDA, else in the dtype of a."""
        shape = (len(a), b.shape[1])
        if a.is_cuda and a.dtype is not statistics_dtype(a.dtype):
            return torch.mm(
                a,
                b,
                out_dtype=torch.float32,
                out=self.scratch("product", shape, torch.float32, a.device),
            )
        return torch.mm(a, b, out=self.scratch("product", shape, a.dtype, a.device))

    def sum_with(
        self, before: Tensor | None, a: Tensor, b: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Return before * keep + a @ b [N, H] in the statistics dtype, for `keep` [N].

        It overwrites `before` [N, H]; None stands for 0, which costs nothing.
        """
        if before is not None:
            self.add_matmul(before, a, b, keep)
            return before
        precise = statistics_dtype(a.dtype)
        if a.dtype is precise:
            return torch.mm(a, b)
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=precise)
        return widened(self.matmul(a, b), precise)

    def add_matmul(
        self,
        accumulator: Tensor,
        a: Tensor,
        b: Tensor,
        keep: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Set accumulator [N, H] = accumulator * keep + a @ b * scale, with `keep` [N], `scale` [].

        On CUDA the product is never rounded.  Pass `scale` only for a and b in low precision.
        """
        if accumulator.dtype is not a.dtype and not a.is_cuda:
            accumulate(accumulator, self.matmul(a, b), keep, scale)
            return
        if keep is not None:
            accumulator.mul_(keep[:, None])
        if scale is not None:
            accumulator.addcmul_(self.matmul(a, b), scale)
        elif accumulator.dtype is a.dtype:
            accumulator.addmm_(a, b)
        else:
            torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)

    def add_transposed_matmul(
        self, accumulator: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None
    ) -> None:
        """Add a^T @ b * scale to accumulator [C, H], for a [T, C], b [T, H] and `scale` [].

        Pass `scale` only for b in low precision.  In low precision on a CPU this computes (b^T a)^T
        block by block: a product that transposes its larger operand takes 1.5 times as long, which
        costs more than adding a transposed block.
        """
        rest, hidden = 0, b.shape[1]
        size = max(1, _BLOCK_BYTES // (b.itemsize * hidden))
        if size <= len(accumulator) and kernels.suits(b, accumulator):
            left = b.T.contiguous()
            block = self.scratch("product", (hidden, size + _GAP), a.dtype, a.device)[:, :size]
            while rest + size <= len(accumulator):
                torch.mm(left, a[:, rest : rest + size], out=block)
                accumulate_transposed(accumulator[rest : rest + size], block, scale)
                rest += size
        if rest < len(accumulator):
            left = a[:, rest:].T
            self.add_matmul(accumulator[rest:], left, b, scale=scale)

    def scratch(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return uninitialised memory of `shape`, which calls of the same name and dtype share."""
        numel = 1
        for size in shape:
            numel *= size
        memory = self._scratch.get((name, dtype))
        if memory is None or memory.numel() < numel:
            memory = self._scratch[name, dtype] = torch.empty(numel, dtype=dtype, device=device)
        return memory[:numel].view(shape)
