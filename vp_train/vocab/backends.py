"""Compute passes S and T of one shard.  Every algorithm works with every backend.

T tokens, H hidden, R rows of the shard.  The logits are z = x W^T [T, R], or c tanh(x W^T / c) with
a softcap c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vp_train.tensors.precision import accumulate, statistics_dtype
from vp_train.vocab.products import Products
from vp_train.vocab.rows import Statistics, fold
from vp_train.vocab.rows import scale as scale_rows
from vp_train.vocab.shard import Owned

# Bytes of the logits of a chunk of rows.  They must be large enough for fast matrix products.
# On a CPU they must also stay in cache.
_CHUNK_BYTES = {"cpu": 6 << 20, "cuda": 256 << 20}
_LARGEST = 2.0**15  # float16 holds this much


@dataclass(frozen=True, slots=True)
class Softmax:
    """The part of the softmax that one shard computes, all in the statistics dtype.

    maximum: the largest logit of this shard's rows [T].
    total: sum exp(z - maximum) [T].
    target_logit: z at the target [T], 0 where this shard does not own the target.
    input_term: P W [T, H] with P = exp(z - maximum) dz / d(x W^T), None unless it was requested.
    """

    maximum: Tensor
    total: Tensor
    target_logit: Tensor
    input_term: Tensor | None


class Backend(Protocol):
    """The two passes over `weight` [R, H], with `grad` [R, H] accumulated in place."""

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        """Return the softmax of x [T, H], and with `keep` the state that `t` needs."""
        ...

    def t(
        self, held: object, x: Tensor, lse: Tensor, scale: Tensor, *, input_term: bool
    ) -> Tensor | None:
        """Add (P scale)^T x to `grad`; return P W [T, H] if `input_term`, else None.

        P = exp(z - lse) dz / d(x W^T); `lse` and `scale` are [T].  `held` comes from `s` and can be
        used only once.
        """
        ...

    def held_bytes(self, held: object) -> int:
        """Return the bytes of `held`."""
        ...


def make_backend(
    name: str, weight: Tensor, grad: Tensor, softcap: float | None, recompute_fraction: float
) -> Backend:
    """Return the backend called `name`.

    `recompute_fraction` is the part of the rows whose logits the backend `recompute` computes again
    in T.  Raises ValueError for an unknown name.
    """
    match name:
        case "reference":
            return Reference(weight, grad, softcap)
        case "chunked":
            return Chunked(weight, grad, softcap, 0.0)
        case "recompute":
            return Chunked(weight, grad, softcap, recompute_fraction)
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
    """Process the rows in chunks with a running maximum.

    [T, R] exists once, as P in the compute dtype.  The first `recompute` (a fraction) of the rows
    keep nothing: T computes their logits again, which costs a fourth matrix product.
    """

    def __init__(
        self, weight: Tensor, grad: Tensor, softcap: float | None, recompute: float
    ) -> None:
        self._weight, self._grad, self._softcap = weight, grad, softcap
        self._first_kept = round(recompute * len(weight))
        self._usual: torch.Size | None = None  # shape of the first chunk, which most chunks have
        self._free: list[Tensor] = []  # kept: on a CPU fresh memory costs as much as filling it
        self._products = Products()

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        num_tokens = x.shape[0]
        statistics = Statistics.none(x, statistics_dtype(x.dtype))
        product: Tensor | None = None
        held = _Chunks(
            self._take(x, num_tokens * (len(self._weight) - self._first_kept) if keep else 0)
        )
        for start, stop, place in self._chunks(num_tokens):
            rows = self._weight[start:stop]
            keeps = keep and place is not None
            exponential = self._block(held.exponentials if keeps else None, place, x, stop - start)
            logits = self._products.logits(x, rows, exponential)
            column = owned.row_of_token - start if start else owned.row_of_token
            statistics, rescale = self._fold(logits, statistics, column, exponential)
            if input_term:
                product = self._products.sum_with(product, exponential, rows, rescale)
            if keeps:
                held.maxima.append(statistics.maximum)
        if input_term and product is None:  # no rows
            product = torch.zeros_like(x, dtype=statistics.total.dtype)
        target = _cap(statistics.target, self._softcap)
        return Softmax(statistics.maximum, statistics.total, target, product), held

    def t(
        self, held: object, x: Tensor, lse: Tensor, scale: Tensor, *, input_term: bool
    ) -> Tensor | None:
        assert isinstance(held, _Chunks)
        product: Tensor | None = None
        maxima, none = iter(held.maxima), Statistics.none(x, lse.dtype)
        no_column = torch.full_like(lse, -1, dtype=torch.int64)
        scale, undo = _lifted(x, scale) if x.dtype is torch.float16 else (scale, None)
        for start, stop, place in self._chunks(x.shape[0]):
            exponential = self._block(held.exponentials, place, x, stop - start)
            if place is None:
                logits = self._products.logits(x, self._weight[start:stop], exponential)
                maximum = self._fold(logits, none, no_column, exponential)[0].maximum
            else:
                maximum = next(maxima)
            relative = torch.exp(maximum - lse)
            right = scale_rows(
                x, relative * scale, self._products.scratch("x", x.shape, x.dtype, x.device)
            )
            self._products.add_transposed_matmul(self._grad[start:stop], exponential, right, undo)
            if input_term:
                part = self._products.matmul(exponential, self._weight[start:stop])
                if product is None:
                    product = torch.mul(part, relative[:, None])
                else:
                    accumulate(product, part, scale=relative)
        if input_term and product is None:  # no rows
            product = torch.zeros_like(x, dtype=lse.dtype)
        if x.device.type == "cpu":
            self._free.append(held.exponentials)
        return product

    def held_bytes(self, held: object) -> int:
        assert isinstance(held, _Chunks)
        return held.exponentials.nbytes + sum(maximum.nbytes for maximum in held.maxima)

    def _fold(
        self, logits: Tensor, before: Statistics, column: Tensor, out: Tensor
    ) -> tuple[Statistics, Tensor]:
        self._usual = self._usual or out.shape
        return fold(logits, before, column, out, self._softcap, usual=out.shape == self._usual)

    def _chunk_rows(self, num_tokens: int) -> int:
        weight = self._weight
        logits_dtype = (
            weight.dtype if weight.device.type == "cpu" else statistics_dtype(weight.dtype)
        )
        rows = _CHUNK_BYTES[weight.device.type] // (logits_dtype.itemsize * max(1, num_tokens))
        if logits_dtype is torch.float16:
            rows = min(rows, int(_LARGEST))  # P W sums this many rows in float16
        return max(1, rows)

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

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        precise = statistics_dtype(x.dtype)
        logits = (x @ self._weight.T).to(precise)
        held = _Logits(_cap(logits, self._softcap), _slope(logits, self._softcap))
        lowest = x.new_full((x.shape[0], 1), -torch.inf, dtype=precise)
        maximum = torch.cat([held.capped, lowest], 1).amax(-1)  # -inf if there are no rows
        exponential = torch.exp(held.capped - maximum[:, None])
        target_logit = x.new_zeros(x.shape[:1], dtype=precise)
        target_logit[owned.positions] = held.capped[owned.positions, owned.rows]
        product = (exponential * held.slope) @ self._weight.to(precise) if input_term else None
        return Softmax(maximum, exponential.sum(-1), target_logit, product), held

    def t(
        self, held: object, x: Tensor, lse: Tensor, scale: Tensor, *, input_term: bool
    ) -> Tensor | None:
        assert isinstance(held, _Logits)
        probabilities = torch.exp(held.capped - lse[:, None]) * held.slope
        self._grad.add_(
            ((probabilities * scale[:, None]).T @ x.to(probabilities.dtype)).to(self._grad.dtype)
        )
        return probabilities @ self._weight.to(probabilities.dtype) if input_term else None

    def held_bytes(self, held: object) -> int:
        assert isinstance(held, _Logits)
        return held.capped.nbytes + held.slope.nbytes


def _lifted(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return `scale` [T] times a power of two, and the inverse of that power [].

    x * scale would underflow in float16.  The power makes it as large as the sum over T rows
    allows.
    """
    if not len(x):
        return scale, None
    largest = len(x) * (x.abs().amax(-1) * scale.abs()).max()
    exponent = torch.log2(_LARGEST / largest).floor().clamp_max(64)
    exponent = torch.where((largest > 0) & largest.isfinite(), exponent, 0.0)
    return scale * torch.exp2(exponent), torch.exp2(-exponent)


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _slope(logits: Tensor, softcap: float | None) -> Tensor:
    return torch.ones_like(logits) if softcap is None else 1 - torch.tanh(logits / softcap) ** 2
