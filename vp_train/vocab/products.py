"""Matrix products of chunks of the vocabulary, each in the way that is fastest where it runs, into memory used again."""

from __future__ import annotations

import torch
from torch import Tensor

from vp_train.tensors.precision import (
    accumulate,
    accumulate_transposed,
    has_compiler,
    statistics_dtype,
)

_BLOCK_BYTES = 3 << 20  # of a transposed product
_GAP = 32  # values between its rows: a power of two from one to the next would meet in the same lines of the cache


class Products:
    """The products of one layer.  What one returns is valid until the next call with the same name."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[str, torch.dtype], Tensor] = {}

    def logits(self, x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """x rows^T [T, C], in the statistics dtype on CUDA; it may be `out` [T, C] of the dtype of x."""
        if x.is_cuda and x.dtype is not statistics_dtype(x.dtype):
            return torch.mm(
                x,
                rows.T,
                out_dtype=torch.float32,
                out=self.scratch("product", out.shape, torch.float32, x.device),
            )
        fits = out.dtype is statistics_dtype(out.dtype)
        return torch.mm(
            x, rows.T, out=out if fits else self.scratch("product", out.shape, out.dtype, x.device)
        )

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, in the statistics dtype on CUDA."""
        shape = (len(a), b.shape[1])
        if a.is_cuda and a.dtype is not statistics_dtype(a.dtype):
            return torch.mm(
                a,
                b,
                out_dtype=torch.float32,
                out=self.scratch("product", shape, torch.float32, a.device),
            )
        return torch.mm(a, b, out=self.scratch("product", shape, a.dtype, a.device))

    def sum_with(self, before: Tensor | None, a: Tensor, b: Tensor, keep: Tensor) -> Tensor:
        """before keep + a @ b [N, H] in the statistics dtype, for `keep` [N], in the memory of `before` [N, H]; None: 0."""
        if before is not None:
            self.add_matmul(before, a, b, keep)
            return before
        precise = statistics_dtype(a.dtype)
        if a.dtype is precise:
            return torch.mm(a, b)
        return torch.mm(a, b, out_dtype=precise) if a.is_cuda else self.matmul(a, b).to(precise)

    def add_matmul(
        self,
        accumulator: Tensor,
        a: Tensor,
        b: Tensor,
        keep: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """accumulator [N, H] = accumulator keep + a @ b scale in place, `keep` [N] and `scale` [].

        On CUDA the product is never rounded.  A `scale` is only for a and b in low precision.
        """
        if accumulator.dtype is not a.dtype and not a.is_cuda:
            factor = None if scale is None else scale.expand(len(a))
            accumulate(accumulator, self.matmul(a, b), keep, factor)
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
        """accumulator [C, H] += a^T @ b scale in place, for a [T, C], b [T, H] and `scale` [].

        A `scale` is only for b in low precision.  In low precision on a CPU it is (b^T a)^T, block
        by block: a product that transposes its larger operand takes half as long again, which costs
        more than the sum of a transposed block.
        """
        rest = 0
        if a.device.type == "cpu" and accumulator.dtype is not a.dtype and has_compiler():
            size, hidden = max(1, _BLOCK_BYTES // (b.itemsize * b.shape[1])), b.shape[1]
            left = b.T.contiguous()
            block = self.scratch("product", (hidden, size + _GAP), a.dtype, a.device)[:, :size]
            while rest + size <= len(accumulator):
                torch.mm(left, a[:, rest : rest + size], out=block)
                accumulate_transposed(accumulator[rest : rest + size], block, scale)
                rest += size
        if rest < len(accumulator):
            self.add_matmul(accumulator[rest:], a[:, rest:].T, b, scale=scale)

    def scratch(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory of some content."""
        numel = 1
        for size in shape:
            numel *= size
        memory = self._scratch.get((name, dtype))
        if memory is None or memory.numel() < numel:
            memory = self._scratch[name, dtype] = torch.empty(numel, dtype=dtype, device=device)
        return memory[:numel].view(shape)
