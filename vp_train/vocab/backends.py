"""How a shard computes S and T.  Every algorithm works with every backend.

T tokens, H hidden, R rows of the shard; z = x W^T [T, R], or c tanh(x W^T / c) with a softcap c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vp_train.vocab.rows import add, exponentiate
from vp_train.vocab.shard import Owned

# The logits of a chunk of rows: large enough for the matrix products, on a CPU small enough to stay in cache.
_CHUNK_BYTES = {"cpu": 6 << 20, "cuda": 256 << 20}


@dataclass(frozen=True, slots=True)
class Softmax:
    """A shard's part of the softmax: `maximum` and `total` = sum exp(z - maximum), [T], and z at the targets owned, else 0.

    In the statistics dtype.  `input_term`: E W [T, H] relative to `maximum`, if it was asked for, where E = exp(z - maximum)
    dz / d(x W^T).
    """

    maximum: Tensor
    total: Tensor
    target_logit: Tensor
    input_term: Tensor | None


class Backend(Protocol):
    """The two passes over `weight` [R, H], with `grad` [R, H] accumulated in place."""

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        """The softmax of x [T, H], and with `keep` what to hold for T."""
        ...

    def t(self, held: object, x: Tensor, lse: Tensor, scale: Tensor, *, input_term: bool) -> Tensor | None:
        """grad += (P scale)^T x for P = exp(z - lse) dz / d(x W^T), `lse` and `scale` [T]; returns P W [T, H] if asked for.

        `held` is used up.
        """
        ...

    def held_bytes(self, held: object) -> int: ...


def statistics_dtype(compute: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if compute is torch.float64 else torch.float32


def make_backend(name: str, weight: Tensor, grad: Tensor, softcap: float | None, recompute_fraction: float) -> Backend:
    """By its name; `recompute_fraction`: the part of the rows for which `recompute` forms the logits again in T."""
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
    """E of the chunks kept, one after the other in `exponentials`, each relative to its entry of `maxima` [T]."""

    exponentials: Tensor
    maxima: list[Tensor] = field(default_factory=list)


class Chunked:
    """Walks the rows in chunks with a running maximum: [T, R] exists once, as E in the compute dtype, or in part not at all.

    The first `recompute` of the rows keep nothing: T forms their logits again, for a fourth matrix product.
    """

    def __init__(self, weight: Tensor, grad: Tensor, softcap: float | None, recompute: float) -> None:
        self._weight, self._grad, self._softcap = weight, grad, softcap
        self._first_kept = round(recompute * len(weight))
        self._free: list[Tensor] = []  # on a CPU fresh memory costs as much as filling it
        self._scratch: dict[tuple[str, torch.dtype], Tensor] = {}

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        precise = statistics_dtype(x.dtype)
        num_tokens = x.shape[0]
        maximum = x.new_full((num_tokens,), -torch.inf, dtype=precise)
        total = x.new_zeros(num_tokens, dtype=precise)
        target_logit = x.new_zeros(num_tokens, dtype=precise)
        product = x.new_zeros(x.shape, dtype=precise) if input_term else None
        held = _Chunks(self._take(x, num_tokens * (len(self._weight) - self._first_kept) if keep else 0))
        for start, stop, place in self._chunks(num_tokens):
            rows = self._weight[start:stop]
            keeps = keep and place is not None
            exponential = self._block(held.exponentials if keeps else None, place, x, stop - start)
            logits = self._logits(x, rows, exponential)
            _pick(target_logit, logits, owned, start)
            previous = maximum
            maximum, part = exponentiate(logits, previous, exponential, self._softcap)
            rescale = torch.exp(previous - maximum)
            total = torch.addcmul(part, total, rescale)
            if product is not None:
                self._add_matmul(product.mul_(rescale[:, None]), exponential, rows)
            if keeps:
                held.maxima.append(maximum)
        return Softmax(maximum, total, _cap(target_logit, self._softcap), product), held

    def t(self, held: object, x: Tensor, lse: Tensor, scale: Tensor, *, input_term: bool) -> Tensor | None:
        assert isinstance(held, _Chunks)
        product = x.new_zeros(x.shape, dtype=lse.dtype) if input_term else None
        maxima = iter(held.maxima)
        for start, stop, place in self._chunks(x.shape[0]):
            exponential = self._block(held.exponentials, place, x, stop - start)
            if place is None:
                maximum, _ = exponentiate(
                    self._logits(x, self._weight[start:stop], exponential), lse, exponential, self._softcap
                )
            else:
                maximum = next(maxima)
            relative = torch.exp(maximum - lse)
            scaled = torch.mul(x, (relative * scale)[:, None], out=self._reused("x", x.numel(), x.dtype, x).view_as(x))
            self._add_matmul(self._grad[start:stop], exponential.T, scaled)
            if product is not None:
                product.addcmul_(self._matmul(exponential, self._weight[start:stop]).to(product.dtype), relative[:, None])
        if x.device.type == "cpu":
            self._free.append(held.exponentials)
        return product

    def held_bytes(self, held: object) -> int:
        assert isinstance(held, _Chunks)
        return held.exponentials.nbytes + sum(maximum.nbytes for maximum in held.maxima)

    def _chunks(self, num_tokens: int) -> Iterator[tuple[int, int, int | None]]:
        """Rows from, rows to, and where E of the chunk is kept; None if it is not."""
        weight, first_kept = self._weight, self._first_kept
        logits_dtype = weight.dtype if weight.device.type == "cpu" else statistics_dtype(weight.dtype)
        size = max(1, _CHUNK_BYTES[weight.device.type] // (logits_dtype.itemsize * max(1, num_tokens)))
        for start in range(0, first_kept, size):
            yield start, min(start + size, first_kept), None
        for start in range(first_kept, len(weight), size):
            yield start, min(start + size, len(weight)), num_tokens * (start - first_kept)

    # Matrix products and the memory they write to

    def _logits(self, x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """x rows^T [T, C], in the statistics dtype on CUDA; it may be `out`, where E is to go."""
        if x.is_cuda and x.dtype is not statistics_dtype(x.dtype):
            logits = self._reused("scratch", out.numel(), torch.float32, x).view(out.shape)
            return torch.mm(x, rows.T, out_dtype=torch.float32, out=logits)
        fits = out.dtype is statistics_dtype(out.dtype)
        return torch.mm(x, rows.T, out=out if fits else self._reused("scratch", out.numel(), out.dtype, x).view(out.shape))

    def _matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, valid until the next."""
        return torch.mm(a, b, out=self._reused("scratch", a.shape[0] * b.shape[1], a.dtype, a).view(a.shape[0], -1))

    def _add_matmul(self, accumulator: Tensor, a: Tensor, b: Tensor) -> None:
        """accumulator += a @ b in place; on CUDA the product is never rounded to the dtype of a and b."""
        if accumulator.dtype is a.dtype:
            accumulator.addmm_(a, b)
        elif a.is_cuda:
            torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
        else:
            add(accumulator, self._matmul(a, b))

    def _block(self, kept: Tensor | None, place: int | None, x: Tensor, num_columns: int) -> Tensor:
        """Memory for E of a chunk [T, C]: where it is kept, or scratch."""
        numel = x.shape[0] * num_columns
        if kept is None or place is None:
            return self._reused("E", numel, x.dtype, x).view(-1, num_columns)
        return kept[place : place + numel].view(-1, num_columns)

    def _reused(self, name: str, numel: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        """Scratch memory, the same at every call."""
        memory = self._scratch.get((name, dtype))
        if memory is None or memory.numel() < numel:
            memory = self._scratch[name, dtype] = torch.empty(numel, dtype=dtype, device=like.device)
        return memory[:numel]

    def _take(self, x: Tensor, numel: int) -> Tensor:
        """Memory to hold E in, given back by T."""
        for index, memory in enumerate(self._free):
            if memory.numel() == numel and memory.dtype is x.dtype:
                return self._free.pop(index)
        self._free.clear()  # of another size
        return torch.empty(numel, dtype=x.dtype, device=x.device)


@dataclass(frozen=True, slots=True)
class _Logits:
    capped: Tensor  # [T, R]
    slope: Tensor


class Reference:
    """Everything materialised, plainly: the oracle."""

    def __init__(self, weight: Tensor, grad: Tensor, softcap: float | None) -> None:
        self._weight, self._grad, self._softcap = weight, grad, softcap

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        precise = statistics_dtype(x.dtype)
        logits = (x @ self._weight.T).to(precise)
        held = _Logits(_cap(logits, self._softcap), _slope(logits, self._softcap))
        lowest = x.new_full((x.shape[0], 1), -torch.inf, dtype=precise)
        maximum = torch.cat([held.capped, lowest], 1).amax(-1)  # of no rows: -inf
        exponential = torch.exp(held.capped - maximum[:, None])
        target_logit = x.new_zeros(x.shape[:1], dtype=precise)
        target_logit[owned.positions] = held.capped[owned.positions, owned.rows]
        product = (exponential * held.slope) @ self._weight.to(precise) if input_term else None
        return Softmax(maximum, exponential.sum(-1), target_logit, product), held

    def t(self, held: object, x: Tensor, lse: Tensor, scale: Tensor, *, input_term: bool) -> Tensor | None:
        assert isinstance(held, _Logits)
        probabilities = torch.exp(held.capped - lse[:, None]) * held.slope
        self._grad.add_(((probabilities * scale[:, None]).T @ x.to(probabilities.dtype)).to(self._grad.dtype))
        return probabilities @ self._weight.to(probabilities.dtype) if input_term else None

    def held_bytes(self, held: object) -> int:
        assert isinstance(held, _Logits)
        return held.capped.nbytes + held.slope.nbytes


def _pick(target_logit: Tensor, logits: Tensor, owned: Owned, start: int) -> None:
    """Write the logits of the targets that fall into a chunk of rows from `start`, without asking the device which do."""
    columns = owned.rows - start
    inside = (columns >= 0) & (columns < logits.shape[1])
    found = logits[owned.positions, columns.clamp(0, logits.shape[1] - 1)].to(target_logit.dtype)
    target_logit[owned.positions] = torch.where(inside, found, target_logit[owned.positions])


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _slope(logits: Tensor, softcap: float | None) -> Tensor:
    return torch.ones_like(logits) if softcap is None else 1 - torch.tanh(logits / softcap) ** 2
