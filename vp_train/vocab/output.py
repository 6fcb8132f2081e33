"""The output layer of one shard: passes S and T, and what it says at each barrier.  It communicates nothing itself.

T tokens, H hidden, R this rank's rows; x [T, H] is the output of the final norm, W [R, H] the rows, y [T] the targets.

    S    Z = x W^T,  m' = max Z,  E = exp(Z - m'),  s' = sum E
    C1   lse = M + log sum_ranks s' exp(m' - M),  M = max_ranks m';  loss = lse - z_y
    v = exp(m' - lse):  v E is this shard's part of the softmax of the whole vocabulary
    dx = sum_ranks (v (E W) - W[y])      at C1b for one_barrier (E W formed in S), at C2 for the others (formed in T)
    T    dW += E^T (v g x) - scatter(g x at the target rows)          g = dL/dloss [T]

(arXiv 2411.05288, Algorithms 1 and 2, with the softmax left unnormalised: T needs no pass over [T, R] of its own.)
A shard without rows has m' = -inf and s' = 0, which is safe as long as some shard has rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from vp_train.vocab.shard import Shard

IGNORE_INDEX = -100

# Z is made in chunks of rows with this many elements: large enough for the GEMM, small enough to stay in cache on a CPU.
_CHUNK_ELEMENTS = {"cpu": 2 << 20, "cuda": 64 << 20}


@dataclass(frozen=True, slots=True)
class Softmax:
    """A shard's part of the softmax: `maximum`, `total`, `target_logit` [T] in the statistics dtype.

    `input_term`: E W [T, H] relative to `maximum`, if it was asked for.
    """

    maximum: Tensor
    total: Tensor
    target_logit: Tensor
    input_term: Tensor | None


class Backend(Protocol):
    """Computes S and T; every algorithm works with every backend."""

    def softmax(
        self, weight: Tensor, x: Tensor, positions: Tensor, rows: Tensor, *, input_term: bool, keep: bool
    ) -> tuple[Softmax, object]:
        """The softmax of a shard, and what to hold for T (with `keep`).  `positions`, `rows` [K]: the owned targets."""
        ...

    def input_term(self, weight: Tensor, held: object) -> Tensor:
        """E W [T, H], relative to the maximum."""
        ...

    def weight_grad(self, grad: Tensor, held: object, x: Tensor, lse: Tensor, grad_loss: Tensor) -> None:
        """grad [R, H] += (v E)^T (g x)."""
        ...

    def held_bytes(self, held: object) -> int: ...


@dataclass(slots=True)
class _Microbatch:
    """The state of one microbatch between its passes and barriers."""

    x: Tensor | None
    positions: Tensor
    rows: Tensor
    ignored: Tensor
    softmax: Softmax
    held: object | None  # for T
    maximum: Tensor | None = None  # over all shards; naive learns it before lse
    lse: Tensor | None = None
    loss: Tensor | None = None
    dx: Tensor | None = None  # to be sent, then the sum received


class OutputLayer:
    """Rows `shard` of the output layer: `weight` [R, H] and its main gradient `grad` [R, H], accumulated in place.

    Per microbatch: s, then message and absorb for each barrier of the algorithm, t at any time after C1 (naive: C1b), and on
    the root input_grad once dx has arrived.  `release` forgets a microbatch after its loss was read.
    """

    def __init__(self, weight: Tensor, grad: Tensor, shard: Shard, algorithm: str, backend: str) -> None:
        assert weight.shape == grad.shape
        assert weight.shape[0] == shard.num_rows
        self._weight, self._grad, self._shard = weight.detach(), grad, shard
        self._rules, self._backend = ALGORITHMS[algorithm], BACKENDS[backend]
        self._microbatches: dict[int, _Microbatch] = {}

    @torch.no_grad()
    def s(self, microbatch: int, x: Tensor, targets: Tensor, *, keep: bool = True) -> None:
        """Pass S for x [T, H] and targets [T]; with `keep` false (evaluation) nothing is held for T."""
        positions, rows = self._shard.owned(targets)
        softmax, held = self._backend.softmax(
            self._weight, x, positions, rows, input_term=keep and self._rules.input_term_in_s, keep=keep
        )
        self._microbatches[microbatch] = _Microbatch(
            x if keep else None, positions, rows, targets == IGNORE_INDEX, softmax, held if keep else None
        )

    @torch.no_grad()
    def message(self, barrier: str, microbatch: int) -> Tensor:
        """What this rank contributes to `barrier`."""
        return self._rules.messages[barrier](self._weight, self._microbatches[microbatch])

    @torch.no_grad()
    def absorb(self, barrier: str, microbatch: int, received: Tensor) -> None:
        """What `barrier` delivered: gathered [n, ...] or reduced."""
        self._rules.absorbers[barrier](self._microbatches[microbatch], received)

    @torch.no_grad()
    def t(self, microbatch: int, grad_loss: Tensor) -> None:
        """Pass T: add the gradient of this shard's rows; `grad_loss` [T] is g, 0 where a token has no loss."""
        state = self._microbatches[microbatch]
        held = state.held
        assert held is not None
        assert state.lse is not None
        assert state.x is not None
        if not self._rules.input_term_in_s:
            product = self._backend.input_term(self._weight, held)
            state.dx = (_input_term(product, self._weight, state) * grad_loss[:, None]).to(state.x.dtype)
        self._backend.weight_grad(self._grad, held, state.x, state.lse, grad_loss)
        at_targets = state.x[state.positions] * grad_loss[state.positions, None]
        self._grad.index_add_(0, state.rows, at_targets.to(self._grad.dtype), alpha=-1)
        state.held = state.x = None

    @torch.no_grad()
    def input_grad(self, microbatch: int, grad_loss: Tensor) -> Tensor:
        """dL/dx [T, H] from the sum that the last barrier delivered to the root."""
        state = self._microbatches[microbatch]
        assert state.dx is not None
        dx, state.dx = state.dx, None
        return dx * grad_loss[:, None].to(dx.dtype) if self._rules.input_term_in_s else dx

    def token_loss(self, microbatch: int) -> Tensor:
        """The loss of every token [T] in the statistics dtype, 0 where the target is IGNORE_INDEX."""
        loss = self._microbatches[microbatch].loss
        assert loss is not None
        return loss

    def release(self, microbatch: int) -> None:
        """Forget the microbatch."""
        del self._microbatches[microbatch]

    @property
    def held_bytes(self) -> int:
        """Bytes held for T by all microbatches: the backend's, and x."""
        total = 0
        for state in self._microbatches.values():
            if state.held is not None and state.x is not None:
                total += self._backend.held_bytes(state.held) + state.x.nbytes
        return total

    def assert_empty(self) -> None:
        """Every microbatch was released."""
        assert not self._microbatches, f"microbatches {sorted(self._microbatches)} were not released"


# What the algorithms say and hear.  A message may be reduced in place, so none aliases state that is used later.


def _statistics(weight: Tensor, state: _Microbatch) -> Tensor:
    """[3, T]: maximum, total, target logit."""
    return torch.stack([state.softmax.maximum, state.softmax.total, state.softmax.target_logit])


def _absorb_statistics(state: _Microbatch, gathered: Tensor) -> None:
    """gathered [n, 3, T], combined in rank order, so that all ranks get the same bits."""
    maxima, totals, logits = gathered.unbind(1)
    state.maximum = maxima.amax(0)
    total = (totals * torch.exp(maxima - state.maximum)).sum(0)
    _set_loss(state, total, logits.sum(0))


def _set_loss(state: _Microbatch, total: Tensor, target_logit: Tensor) -> None:
    assert state.maximum is not None
    state.lse = state.maximum + total.log()
    state.loss = (state.lse - target_logit).masked_fill_(state.ignored, 0.0)


def _maximum(weight: Tensor, state: _Microbatch) -> Tensor:
    return state.softmax.maximum.clone()


def _absorb_maximum(state: _Microbatch, received: Tensor) -> None:
    state.maximum = received


def _sums(weight: Tensor, state: _Microbatch) -> Tensor:
    """[2, T]: total relative to the maximum of all shards, target logit."""
    assert state.maximum is not None
    scale = torch.exp(state.softmax.maximum - state.maximum)
    return torch.stack([state.softmax.total * scale, state.softmax.target_logit])


def _absorb_sums(state: _Microbatch, received: Tensor) -> None:
    _set_loss(state, received[0], received[1])


def _input_term(product: Tensor, weight: Tensor, state: _Microbatch) -> Tensor:
    """This shard's term of dx before g [T, H]: v (E W) - W[y]."""
    assert state.lse is not None
    scaled = product * torch.exp(state.softmax.maximum - state.lse)[:, None].to(product.dtype)
    return scaled.index_add_(0, state.positions, weight[state.rows].to(scaled.dtype), alpha=-1)


def _input_term_of_s(weight: Tensor, state: _Microbatch) -> Tensor:
    product = state.softmax.input_term
    assert product is not None
    state.softmax = replace(state.softmax, input_term=None)  # [T, H], not to be kept until the end of the step
    return _input_term(product, weight, state).to(weight.dtype)


def _input_grad_of_t(weight: Tensor, state: _Microbatch) -> Tensor:
    assert state.dx is not None
    dx, state.dx = state.dx, None
    return dx


def _absorb_dx(state: _Microbatch, received: Tensor) -> None:
    state.dx = received


@dataclass(frozen=True, slots=True)
class _Rules:
    """One algorithm: whether S forms E W (else T does), and what is said and heard at each barrier."""

    input_term_in_s: bool
    messages: Mapping[str, Callable[[Tensor, _Microbatch], Tensor]]
    absorbers: Mapping[str, Callable[[_Microbatch, Tensor], None]]


_ONE_BARRIER = _Rules(
    True,
    {"C1": _statistics, "C1b": _input_term_of_s},
    {"C1": _absorb_statistics, "C1b": _absorb_dx},
)

ALGORITHMS: dict[str, _Rules] = {
    "none": _ONE_BARRIER,
    "one_barrier": _ONE_BARRIER,
    "two_barrier": _Rules(
        False,
        {"C1": _statistics, "C2": _input_grad_of_t},
        {"C1": _absorb_statistics, "C2": _absorb_dx},
    ),
    "naive": _Rules(
        False,
        {"C1": _maximum, "C1b": _sums, "C2": _input_grad_of_t},
        {"C1": _absorb_maximum, "C1b": _absorb_sums, "C2": _absorb_dx},
    ),
    "evaluate": _Rules(False, {"C1": _statistics}, {"C1": _absorb_statistics}),
}


def statistics_dtype(compute: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if compute is torch.float64 else torch.float32


@dataclass(slots=True)
class _Chunks:
    """E in chunks of rows: `exponentials[c]` [T, chunk] relative to `maxima[c]` [T], the maximum of chunks 0 to c."""

    maximum: Tensor
    exponentials: list[Tensor] = field(default_factory=list)
    maxima: list[Tensor] = field(default_factory=list)


class Chunked:
    """Walks the rows in chunks with a running maximum, so that [T, R] exists once, as E, in the compute dtype."""

    def softmax(
        self, weight: Tensor, x: Tensor, positions: Tensor, rows: Tensor, *, input_term: bool, keep: bool
    ) -> tuple[Softmax, object]:
        precise = statistics_dtype(weight.dtype)
        num_tokens = x.shape[0]
        maximum = x.new_full((num_tokens,), -torch.inf, dtype=precise)
        total = x.new_zeros(num_tokens, dtype=precise)
        target_logit = x.new_zeros(num_tokens, dtype=precise)
        product = x.new_zeros(x.shape, dtype=precise) if input_term else None
        held = _Chunks(maximum)
        start = 0
        for part in torch.split(weight, self._chunk_rows(weight, num_tokens)):
            if part.shape[0] == 0:
                continue  # an empty shard splits into one empty chunk
            logits = (x @ part.T).to(precise)
            here = (rows >= start) & (rows < start + part.shape[0])
            target_logit[positions[here]] = logits[positions[here], rows[here] - start]
            new_maximum = torch.maximum(maximum, logits.amax(-1))
            rescale = torch.exp(maximum - new_maximum)
            exponential = logits.sub_(new_maximum[:, None]).exp_()
            total = torch.addcmul(exponential.sum(-1), total, rescale)
            exponential = exponential.to(weight.dtype)
            if product is not None:
                product.mul_(rescale[:, None])
                _add_matmul(product, exponential, part)
            maximum = new_maximum
            start += part.shape[0]
            if keep:
                held.exponentials.append(exponential)
                held.maxima.append(maximum)
        held.maximum = maximum
        return Softmax(maximum, total, target_logit, product), held

    def input_term(self, weight: Tensor, held: object) -> Tensor:
        assert isinstance(held, _Chunks)
        product = weight.new_zeros(held.maximum.shape[0], weight.shape[1], dtype=held.maximum.dtype)
        start = 0
        for exponential, maximum, previous in zip(held.exponentials, held.maxima, [None, *held.maxima], strict=False):
            if previous is not None:
                product.mul_(torch.exp(previous - maximum)[:, None])
            _add_matmul(product, exponential, weight[start : start + exponential.shape[1]])
            start += exponential.shape[1]
        return product

    def weight_grad(self, grad: Tensor, held: object, x: Tensor, lse: Tensor, grad_loss: Tensor) -> None:
        assert isinstance(held, _Chunks)
        start = 0
        for exponential, maximum in zip(held.exponentials, held.maxima, strict=True):
            scale = torch.exp(maximum - lse) * grad_loss
            _add_matmul(grad[start : start + exponential.shape[1]], exponential.T, x * scale[:, None].to(x.dtype))
            start += exponential.shape[1]

    def held_bytes(self, held: object) -> int:
        assert isinstance(held, _Chunks)
        return sum(tensor.nbytes for tensor in (*held.exponentials, *held.maxima))

    def _chunk_rows(self, weight: Tensor, num_tokens: int) -> int:
        return max(1, _CHUNK_ELEMENTS[weight.device.type] // max(1, num_tokens))


@dataclass(frozen=True, slots=True)
class _Probabilities:
    probabilities: Tensor  # [T, R], the local softmax
    maximum: Tensor
    total: Tensor


class Reference:
    """Everything materialised, step by step as the algorithms are written: the oracle, and a plain reading of the paper."""

    def softmax(
        self, weight: Tensor, x: Tensor, positions: Tensor, rows: Tensor, *, input_term: bool, keep: bool
    ) -> tuple[Softmax, object]:
        precise = statistics_dtype(weight.dtype)
        logits = (x @ weight.T).to(precise)
        if weight.shape[0]:
            maximum = logits.amax(-1)
            total = (logits - maximum[:, None]).exp().sum(-1)
        else:
            maximum, total = x.new_full(x.shape[:1], -torch.inf, dtype=precise), x.new_zeros(x.shape[:1], dtype=precise)
        target_logit = x.new_zeros(x.shape[:1], dtype=precise)
        target_logit[positions] = logits[positions, rows]
        held = _Probabilities(torch.softmax(logits, -1), maximum, total)
        product = self.input_term(weight, held) if input_term else None
        return Softmax(maximum, total, target_logit, product), held

    def input_term(self, weight: Tensor, held: object) -> Tensor:
        assert isinstance(held, _Probabilities)
        return held.probabilities @ weight.to(held.probabilities.dtype) * held.total[:, None]

    def weight_grad(self, grad: Tensor, held: object, x: Tensor, lse: Tensor, grad_loss: Tensor) -> None:
        assert isinstance(held, _Probabilities)
        alpha = held.total * torch.exp(held.maximum - lse)
        dlogits = held.probabilities * (alpha * grad_loss)[:, None]
        grad.add_((dlogits.T @ x.to(dlogits.dtype)).to(grad.dtype))

    def held_bytes(self, held: object) -> int:
        assert isinstance(held, _Probabilities)
        return held.probabilities.nbytes + held.maximum.nbytes + held.total.nbytes


def _add_matmul(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """accumulator += a @ b, in place where the dtypes allow it."""
    if accumulator.dtype == a.dtype:
        accumulator.addmm_(a, b)
    else:
        accumulator.add_(a @ b)


BACKENDS: dict[str, Backend] = {"reference": Reference(), "chunked": Chunked()}
