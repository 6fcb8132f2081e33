"""Passes S and T on a GPU: few launches, each product once over all rows that are kept.

Chunks of logits fill the columns of one matrix P [T, R] that has one reference per token: the
largest logit of the first chunk, unless a later one exceeds it by far.  So P W is
one product, not a sum over chunks that reads and writes [T, H] each time, and dW is P^T times one
scaled x.  After its chunks a panel of columns is made relative to the last reference, which
almost never changes a value.

Rows that are not kept form panels of their own, in scratch memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vp_train.tensors.alignment import rounded_up
from vp_train.tensors.precision import statistics_dtype
from vp_train.vocab.chunks import CHUNKS, PANEL_BYTES
from vp_train.vocab.passes import Product, Softmax, cap, lifted
from vp_train.vocab.products import VocabProducts
from vp_train.vocab.rows import exponentials, extend, fastest_warps, relate, softmax_factor
from vp_train.vocab.rows import scale as scale_rows
from vp_train.vocab.shard import Owned

_ALIGNED_BYTES = 16  # between the rows of P, for fast loads


@dataclass(frozen=True, slots=True)
class _Panel:
    """Rows [start, stop) whose P is one matrix, in chunks of `size` rows."""

    start: int
    stop: int
    size: int
    kept: bool

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Return the first and last row of each chunk."""
        starts = range(self.start, self.stop, self.size)
        return [(start, min(start + self.size, self.stop)) for start in starts]


@dataclass(frozen=True, slots=True)
class _Held:
    """P [T, K] of the rows kept, None if there are none, and its reference [T]."""

    exponentials: Tensor | None
    reference: Tensor


class Joined:
    """The backend of GPUs for `chunked` and `recompute`; on a CPU it is right, but slow.

    The first `recompute` (a fraction) of the rows keep nothing: T computes their logits again.
    P is at most exp(SLACK).  In float16 its products need the fp32 results of a GPU, so on a CPU
    float16 raises ValueError.
    """

    def __init__(
        self,
        weight: Tensor,
        grad: Tensor,
        softcap: float | None,
        recompute: float,
        products: VocabProducts | None = None,
    ) -> None:
        if weight.dtype is torch.float16 and not weight.is_cuda:
            raise ValueError(
                "on a CPU products with P overflow float16; take Chunked, whose P is at most 1"
            )
        self._weight, self._grad, self._softcap = weight, grad, softcap
        self._first_kept = round(recompute * len(weight))
        self._products = products or VocabProducts()
        self._num_warps: dict[tuple[int, int], int | None] = {}  # by the shape of a chunk

    def prepare(self, num_tokens: int) -> None:
        """Measure once per number of tokens which kernel for a chunk is the fastest.

        It waits for the device, so it must not run while another rank may need an answer.
        """
        shape = (num_tokens, min(self._chunk_rows(num_tokens), len(self._weight)))
        if all(shape) and shape not in self._num_warps:
            weight = self._weight
            self._num_warps[shape] = fastest_warps(shape, weight.dtype, weight.device)

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        precise, product, exponentials_kept = statistics_dtype(x.dtype), None, None
        running = torch.empty(3, len(x), dtype=precise, device=x.device)
        reference = running[0]
        if not len(self._weight):
            running.zero_()[0].fill_(-torch.inf)
        for panel in self._panels(len(x), keep):
            before = reference
            p = self._matrix(x, panel) if panel.kept or input_term else None
            references = torch.empty(len(panel.chunks), len(x), dtype=precise, device=x.device)
            for index, (start, stop) in enumerate(panel.chunks):
                out = None if p is None else p[:, start - panel.start : stop - panel.start]
                logits = self._products.logits(x, self._weight[start:stop], out)
                extend(
                    logits,
                    out,
                    running,
                    references[index],
                    owned.row_of_token,
                    start,
                    self._softcap,
                    num_warps=self._num_warps.get((len(x), stop - start)),
                )
            reference = references[-1]
            if p is not None:
                relate(p, references, panel.size)
            if panel.kept:
                exponentials_kept = p
            if input_term and p is not None:
                if product is not None:
                    relate(product, torch.stack([before, reference]), product.shape[1])
                product = self._products.sum_with(
                    product, p, self._weight[panel.start : panel.stop]
                )
        if input_term and product is None:  # no rows
            product = torch.zeros_like(x, dtype=precise)
        target = cap(running[2], self._softcap)
        held = _Held(exponentials_kept, running[0]) if keep else None
        return Softmax(running[0], running[1], target, product), held

    def t(
        self,
        held: object,
        x: Tensor,
        lse: Tensor,
        grad_loss: Tensor,
        *,
        z_loss: float,
        input_term: bool,
    ) -> Product | None:
        assert isinstance(held, _Held)
        reference, product, undo = held.reference, None, None
        right = self._products.scratch("x", x.shape, x.dtype, x.device)
        if x.dtype is torch.float16:
            factor = grad_loss * softmax_factor(reference, lse, z_loss)
            factor, undo = lifted(x, factor)
            scale_rows(x, factor, right)
        else:
            scale_rows(x, grad_loss, right, reference=reference, lse=lse, z_loss=z_loss)
        for panel in self._panels(len(x), keep=True):
            p = held.exponentials if panel.kept else self._again(x, panel, reference)
            assert p is not None
            # With `undo` the product lies in memory of its own: it must not be that of all rows.
            for start, stop in panel.chunks if undo is not None else [(panel.start, panel.stop)]:
                columns = p[:, start - panel.start : stop - panel.start]
                self._products.add_transposed_matmul(self._grad[start:stop], columns, right, undo)
            if input_term:
                product = self._products.sum_with(
                    product, p, self._weight[panel.start : panel.stop]
                )
        if input_term and product is None:  # no rows
            return Product(torch.zeros_like(x, dtype=lse.dtype), None)
        return None if product is None else Product(product, reference)

    def held_bytes(self, held: object) -> int:
        assert isinstance(held, _Held)
        # The reference is one of the statistics.
        return 0 if held.exponentials is None else held.exponentials.untyped_storage().nbytes()

    def _again(self, x: Tensor, panel: _Panel, reference: Tensor) -> Tensor:
        """Return P of a panel that was not kept."""
        p = self._matrix(x, panel)
        for start, stop in panel.chunks:
            out = p[:, start - panel.start : stop - panel.start]
            logits = self._products.logits(x, self._weight[start:stop], out)
            exponentials(logits, out, reference, self._softcap)
        return p

    def _matrix(self, x: Tensor, panel: _Panel) -> Tensor:
        """Return memory for P [T, K] of a panel: its own if it is kept, or scratch."""
        width, aligned = panel.stop - panel.start, _ALIGNED_BYTES // x.itemsize
        shape = (len(x), rounded_up(width, aligned))
        if panel.kept:
            return torch.empty(shape, dtype=x.dtype, device=x.device)[:, :width]
        return self._products.scratch("E", shape, x.dtype, x.device)[:, :width]

    def _chunk_rows(self, num_tokens: int) -> int:
        item_bytes = statistics_dtype(self._weight.dtype).itemsize
        return CHUNKS["cuda"].num_rows(num_tokens, item_bytes)

    def _panels(self, num_tokens: int, keep: bool) -> Iterator[_Panel]:
        """Yield the panels of all rows; the last one is kept, if any is."""
        size, num_rows = self._chunk_rows(num_tokens), len(self._weight)
        first_kept = self._first_kept if keep else num_rows
        row_bytes = self._weight.itemsize * max(1, num_tokens)
        width = max(1, PANEL_BYTES // row_bytes // size) * size
        for start in range(0, first_kept, width):
            yield _Panel(start, min(start + width, first_kept), size, kept=False)
        if first_kept < num_rows:
            yield _Panel(first_kept, num_rows, size, kept=True)
