"""The backends of passes S and T by name, those of a CPU, and the oracle.

Every algorithm works with every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vp_train.tensors.precision import accumulate, statistics_dtype, widened
from vp_train.vocab.chunks import CHUNKS
from vp_train.vocab.joined import Joined
from vp_train.vocab.passes import Backend, Product, Softmax, cap, lifted
from vp_train.vocab.products import VocabProducts
from vp_train.vocab.rows import extend, softmax_factor
from vp_train.vocab.rows import scale as scale_rows
from vp_train.vocab.shard import Owned

_FLOAT16_ROWS = 1 << 15  # P W sums this many rows in float16


def make_backend(
    name: str,
    weight: Tensor,
    grad: Tensor,
    softcap: float | None,
    recompute_fraction: float,
    products: VocabProducts | None = None,
) -> Backend:
    """Return the backend called `name`; layers that never run at once may share `products`.

    `recompute_fraction` is the part of the rows whose logits the backend `recompute` computes again
    in T.  Raises ValueError for an unknown name.
    """
    by_chunks = Joined if weight.is_cuda else Chunked
    match name:
        case "reference":
            return Reference(weight, grad, softcap)
        case "chunked":
            return by_chunks(weight, grad, softcap, 0.0, products)
        case "recompute":
            return by_chunks(weight, grad, softcap, recompute_fraction, products)
        case _:
            raise ValueError(f"backend {name!r} is not known; choose one of {', '.join(BACKENDS)}")


BACKENDS = ("reference", "chunked", "recompute")


@dataclass(slots=True)
class _Chunks:
    """P of the chunks kept, one after the other in `exponentials`.

    P of chunk i is relative to `maxima[i]` [T].
    """

    exponentials: Tensor
    maxima: list[Tensor] = field(default_factory=list)


class Chunked:
    """Process the rows in chunks that stay in the cache of a CPU, with a running maximum.

    [T, R] exists once, as P in the compute dtype.  The first `recompute` (a fraction) of the rows
    keep nothing: T computes their logits again, which costs a fourth matrix product.
    """

    def __init__(
        self,
        weight: Tensor,
        grad: Tensor,
        softcap: float | None,
        recompute: float,
        products: VocabProducts | None = None,
    ) -> None:
        self._weight, self._grad, self._softcap = weight, grad, softcap
        self._first_kept = round(recompute * len(weight))
        self._free: list[Tensor] = []  # kept: on a CPU fresh memory costs as much as filling it
        self._products = products or VocabProducts()

    def prepare(self, num_tokens: int) -> None:
        pass

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        num_tokens = x.shape[0]
        precise, product = statistics_dtype(x.dtype), None
        running = torch.empty(3, num_tokens, dtype=precise, device=x.device)
        if not len(self._weight):
            running.zero_()[0].fill_(-torch.inf)
        kept = num_tokens * (len(self._weight) - self._first_kept) if keep else 0
        held, maximum = _Chunks(self._take(x, kept)), running[0]
        for start, stop, place in self._chunks(num_tokens):
            rows = self._weight[start:stop]
            p = self._block(held.exponentials if keep else None, place, x, stop - start)
            logits = self._products.logits(x, rows, p)
            before, maximum = maximum, torch.empty_like(running[0])
            self._extend(logits, p, running, maximum, owned.row_of_token, start)
            if input_term:
                lowered = torch.exp(before - maximum) if start else None
                product = self._products.sum_with(product, p, rows, lowered)
            if keep and place is not None:
                held.maxima.append(maximum)
        if input_term and product is None:  # no rows
            product = torch.zeros_like(x, dtype=precise)
        target = cap(running[2], self._softcap)
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
        assert isinstance(held, _Chunks)
        product, undo, right = None, None, self._products.scratch("x", x.shape, x.dtype, x.device)
        # Of a chunk that is computed again: its largest logits, and statistics that nobody reads.
        own, unused = lse.new_empty(len(x)), lse.new_empty(3, len(x))
        if x.dtype is torch.float16:
            grad_loss, undo = lifted(x, grad_loss * softmax_factor(None, lse, z_loss))
            z_loss = 0.0
        maxima = iter(held.maxima)
        for start, stop, place in self._chunks(x.shape[0]):
            p = self._block(held.exponentials, place, x, stop - start)
            if place is None:
                logits, maximum = self._products.logits(x, self._weight[start:stop], p), own
                self._extend(logits, p, unused, maximum, None, 0)
            else:
                maximum = next(maxima)
            scale_rows(x, grad_loss, right, reference=maximum, lse=lse, z_loss=z_loss)
            self._products.add_transposed_matmul(self._grad[start:stop], p, right, undo)
            if input_term:
                relative = torch.exp(maximum - lse)
                part = self._products.matmul(p, self._weight[start:stop])
                if product is None:
                    product = widened(part, lse.dtype, relative)
                else:
                    accumulate(product, part, scale=relative)
        if input_term and product is None:  # no rows
            product = torch.zeros_like(x, dtype=lse.dtype)
        if x.device.type == "cpu":
            self._free.append(held.exponentials)
        return None if product is None else Product(product, None)

    def held_bytes(self, held: object) -> int:
        assert isinstance(held, _Chunks)
        return held.exponentials.nbytes + sum(maximum.nbytes for maximum in held.maxima)

    def _extend(
        self,
        logits: Tensor,
        p: Tensor,
        running: Tensor,
        maximum: Tensor,
        row_of_token: Tensor | None,
        start: int,
    ) -> None:
        """Extend the statistics by a chunk; its P is relative to the largest logit so far."""
        extend(logits, p, running, maximum, row_of_token, start, self._softcap, slack=0.0)

    def _chunk_rows(self, num_tokens: int) -> int:
        rows = CHUNKS["cpu"].num_rows(num_tokens, self._weight.itemsize)
        return min(rows, _FLOAT16_ROWS) if self._weight.dtype is torch.float16 else rows

    def _chunks(self, num_tokens: int) -> Iterator[tuple[int, int, int | None]]:
        """Yield the first and last row of each chunk, and the offset of its P; None if not kept."""
        first_kept, size = self._first_kept, self._chunk_rows(num_tokens)
        for start in range(0, first_kept, size):
            yield start, min(start + size, first_kept), None
        for start in range(first_kept, len(self._weight), size):
            yield start, min(start + size, len(self._weight)), num_tokens * (start - first_kept)

    def _block(self, kept: Tensor | None, place: int | None, x: Tensor, num_columns: int) -> Tensor:
        """Return memory for P of a chunk [T, C]: its place in `kept`, or scratch."""
        numel = x.shape[0] * num_columns
        if kept is None or place is None:
            return self._products.scratch("E", (len(x), num_columns), x.dtype, x.device)
        return kept[place : place + numel].view(-1, num_columns)

    def _take(self, x: Tensor, numel: int) -> Tensor:
        """Return memory for P from S to T, which T gives back."""
        for index, memory in enumerate(self._free):
            if memory.numel() == numel and memory.dtype is x.dtype:
                return self._free.pop(index)
        self._free.clear()  # the other sizes are no longer needed
        return torch.empty(numel, dtype=x.dtype, device=x.device)


@dataclass(frozen=True, slots=True)
class _Logits:
    capped: Tensor  # [T, R]
    slope: Tensor  # [T, R], the derivative of the softcap


class Reference:
    """The oracle: plain torch operations that materialise [T, R]."""

    def __init__(self, weight: Tensor, grad: Tensor, softcap: float | None) -> None:
        self._weight, self._grad, self._softcap = weight, grad, softcap

    def prepare(self, num_tokens: int) -> None:
        pass

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        precise = statistics_dtype(x.dtype)
        logits = (x @ self._weight.T).to(precise)
        held = _Logits(cap(logits, self._softcap), _slope(logits, self._softcap))
        lowest = x.new_full((x.shape[0], 1), -torch.inf, dtype=precise)
        maximum = torch.cat([held.capped, lowest], 1).amax(-1)  # -inf if there are no rows
        exponential = torch.exp(held.capped - maximum[:, None])
        target_logit = x.new_zeros(x.shape[:1], dtype=precise)
        target_logit[owned.positions] = held.capped[owned.positions, owned.rows]
        product = (exponential * held.slope) @ self._weight.to(precise) if input_term else None
        return Softmax(maximum, exponential.sum(-1), target_logit, product), held

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
        assert isinstance(held, _Logits)
        probabilities = torch.exp(held.capped - lse[:, None]) * held.slope
        scale = grad_loss * (1 + 2 * z_loss * lse)
        self._grad.add_(
            ((probabilities * scale[:, None]).T @ x.to(probabilities.dtype)).to(self._grad.dtype)
        )
        if not input_term:
            return None
        return Product(probabilities @ self._weight.to(probabilities.dtype), None)

    def held_bytes(self, held: object) -> int:
        assert isinstance(held, _Logits)
        return held.capped.nbytes + held.slope.nbytes


def _slope(logits: Tensor, softcap: float | None) -> Tensor:
    return torch.ones_like(logits) if softcap is None else 1 - torch.tanh(logits / softcap) ** 2
