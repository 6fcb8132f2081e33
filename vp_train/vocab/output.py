"""The output layer of one shard: passes S and T, and its message at each barrier.

It does not communicate itself.  T tokens, H hidden, R this rank's rows; x [T, H] is the output of
the final norm, W [R, H] the rows, y [T] the targets.

    S    Z = x W^T,  m' = max Z,  P = exp(Z - m'),  s' = sum P
    C1   lse = M + log sum_ranks s' exp(m' - M),  M = max_ranks m';  loss = lse - z_y
    v = exp(m' - lse):  v P is this shard's part of the softmax of the whole vocabulary
    dx = sum_ranks (v (P W) - W[y])      at C1b for one_barrier (P W formed in S), at C2 for the
         others (formed in T); summed in fp32, so that its error does not grow with the shards
    T    dW += P^T (v g x) - scatter(g x at the target rows)          g = dL/dloss [T]

(arXiv 2411.05288, Algorithms 1 and 2, with the softmax left unnormalised: T needs no pass over
[T, R] of its own.)
A shard without rows has m' = -inf and s' = 0, which is safe as long as some shard has rows.

The options of `loss.LossOptions` add no pass over [T, R] either.
z-loss: the softmax part of both gradients is scaled by 1 + 2 l lse.
Smoothing: z_y becomes (1 - a) z_y + (a / V) x . sum W, and W[y] changes in the same way.  Its term
of dW is the same for every row, so the last T of a step adds it once.
Softcap: P and the target's term contain the factor dz / d(x W^T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from schedules.ir import Kind
from schedules.vocab import Payload
from vp_train.tensors.precision import column_sums, statistics_dtype
from vp_train.tensors.streams import lend, to_device
from vp_train.vocab.backends import make_backend
from vp_train.vocab.loss import IGNORE_INDEX, LossOptions
from vp_train.vocab.passes import Product, Softmax
from vp_train.vocab.products import VocabProducts
from vp_train.vocab.rows import combine, input_term, loss_of, scale, subtract_targets
from vp_train.vocab.shard import Owned, Shard, require_within

_PLAIN = LossOptions()


@dataclass(slots=True)
class _Microbatch:
    """The state of one microbatch between its passes and barriers."""

    x: Tensor | None
    owned: Owned
    ignored: Tensor  # [T]
    grad_loss: Tensor  # [T]
    softmax: Softmax
    held: object | None  # the backend's state for T
    target_scale: Tensor | float  # [T], factor of the target's terms in both gradients
    maximum: Tensor | None = None  # [T], of the references of all shards, until lse is known
    lse: Tensor | None = None  # [T]
    loss: Tensor | None = None  # [T]
    dx: Tensor | None = None  # [T, H]: this shard's term, then the sum received


class OutputLayer:
    """The rows `shard` of an output matrix of `vocab_size` rows.

    weight: [R, H].
    grad: its main gradient [R, H], accumulated in place.
    input_gradient: the pass that forms this shard's term of dL/dx, S or T; None in evaluation.
    backend: a name of `backends.BACKENDS`; `recompute_fraction` as in `make_backend`.
    sum_dtype: in which the terms of the shards are summed, by default the statistics dtype.
    products: shared with layers that never run at the same time, for its scratch memory.
    """

    def __init__(
        self,
        weight: Tensor,
        grad: Tensor,
        shard: Shard,
        *,
        vocab_size: int,
        input_gradient: Kind | None,
        backend: str,
        options: LossOptions = _PLAIN,
        recompute_fraction: float = 1.0,
        sum_dtype: torch.dtype | None = None,
        products: VocabProducts | None = None,
    ) -> None:
        assert weight.shape == grad.shape
        assert weight.shape[0] == shard.num_rows
        self.weight, self.grad, self.shard = weight.detach(), grad, shard
        self.vocab_size, self.options, self.input_gradient = vocab_size, options, input_gradient
        self.sum_dtype = sum_dtype or statistics_dtype(weight.dtype)
        self.backend = make_backend(
            backend, self.weight, grad, options.softcap, recompute_fraction, products
        )

    @torch.no_grad()
    def warm_up(self, num_tokens: int) -> None:
        """Run the passes of a microbatch whose loss has weight 0, so that no step compiles code.

        Zeros are added to the gradient.
        """
        targets = torch.full((1, num_tokens), IGNORE_INDEX)
        if self.shard.num_rows:
            targets[:, 0] = self.shard.start  # there is code for targets among the own rows
        step = self.begin(targets, torch.zeros(targets.shape))
        x = self.weight.new_zeros(num_tokens, self.weight.shape[1])
        step.s(0, x, keep=self.input_gradient is not None)
        step.absorb(Payload.STATISTICS, 0, step.message(Payload.STATISTICS, 0)[None])
        if self.input_gradient is not None:
            step.t(0)
            step.absorb(Payload.INPUT_GRADIENT, 0, step.message(Payload.INPUT_GRADIENT, 0))
            step.input_grad(0)
        step.finish()

    def place(self, targets: Tensor) -> Targets:
        """Return what a step reads of `targets` [m, T], int64, on the device of the weights.

        Targets of IGNORE_INDEX have no loss.  Pass them on the CPU: on a GPU this call waits for
        the device.  Raises IndexError for a target that is not in the vocabulary.
        """
        ignored = targets == IGNORE_INDEX
        require_within(targets.masked_fill(ignored, 0), self.vocab_size, "label")
        device = self.weight.device
        return Targets(self.shard.owned(targets, device), to_device(ignored, device))

    def begin(self, targets: Tensor | Targets, weights: Tensor) -> OutputStep:
        """Begin a step over `targets`, placed or as for `place`.

        weights: dL/d(token loss), [m, T].
        """
        placed = targets if isinstance(targets, Targets) else self.place(targets)
        return OutputStep(self, placed, weights)


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of a step, on the device of the shard.

    owned: which of each microbatch the shard owns.
    ignored: [m, T], where a target is IGNORE_INDEX.
    """

    owned: list[Owned]
    ignored: Tensor

    def lend(self) -> None:
        """Record that the current stream uses the targets; see `tensors.streams`."""
        for tensor in (self.ignored, *(each for owned in self.owned for each in owned.tensors)):
            lend(tensor)


class OutputStep:
    """One step of an output layer.

    For each microbatch call `s`, then `message` and `absorb` for each barrier of the algorithm.
    Call `t` at any time after lse is known, and on the root `input_grad` after dx has arrived.
    Call `finish` at the end.  The gradient is complete after the last `t`.
    """

    @torch.no_grad()
    def __init__(self, layer: OutputLayer, targets: Targets, weights: Tensor) -> None:
        self._layer, self._options = layer, layer.options
        self._smoothing = layer.options.label_smoothing / layer.vocab_size  # a / V
        self._microbatches: dict[int, _Microbatch] = {}
        device, precise = layer.weight.device, statistics_dtype(layer.weight.dtype)
        self._owned, self._ignored = targets.owned, targets.ignored
        self._grad_loss = to_device(weights.to(precise), device).masked_fill(self._ignored, 0.0)
        self._left = len(targets.owned)  # number of T still to come
        layer.backend.prepare(targets.ignored.shape[1])
        if self._smoothing:
            # The sum over tokens of g x.
            self._smoothed = layer.weight.new_zeros(layer.weight.shape[1], dtype=precise)

    @cached_property
    def _row_sum(self) -> Tensor:
        """The sum of the rows [H].  The first S forms it: the rows may be in transfer before."""
        return column_sums(self._layer.weight, statistics_dtype(self._layer.weight.dtype))

    @torch.no_grad()
    def s(self, microbatch: int, x: Tensor, *, keep: bool = True) -> None:
        """Run pass S for x [T, H]; with `keep` false (evaluation) nothing is held for T."""
        owned, softcap = self._owned[microbatch], self._options.softcap
        in_s = self._layer.input_gradient is Kind.S
        softmax, held = self._layer.backend.s(x, owned, input_term=in_s, keep=keep)
        target_scale: Tensor | float = 1 - self._options.label_smoothing
        if softcap is not None:
            target_scale = 1 - (softmax.target_logit / softcap) ** 2
        if self._smoothing:
            shared = self._smoothing * (x.to(self._row_sum.dtype) @ self._row_sum)
            mixed = torch.add(shared, softmax.target_logit, alpha=1 - self._options.label_smoothing)
            softmax = replace(softmax, target_logit=mixed)
        self._microbatches[microbatch] = _Microbatch(
            x if keep else None,
            owned,
            ignored=self._ignored[microbatch],
            grad_loss=self._grad_loss[microbatch],
            softmax=softmax,
            held=held if keep else None,
            target_scale=target_scale,
        )

    @torch.no_grad()
    def message(self, payload: Payload, microbatch: int) -> Tensor:
        """Return what this rank contributes to the barrier that carries `payload`."""
        return _MESSAGES[payload](self, self._microbatches[microbatch])

    @torch.no_grad()
    def absorb(self, payload: Payload, microbatch: int, received: Tensor) -> None:
        """Take over the result of a barrier: messages gathered [n, ...], or reduced."""
        _ABSORBERS[payload](self, self._microbatches[microbatch], received)

    @torch.no_grad()
    def t(self, microbatch: int) -> None:
        """Run pass T: add the gradient of this shard's rows."""
        state = self._microbatches[microbatch]
        held, x, lse = state.held, state.x, state.lse
        assert held is not None
        assert lse is not None
        assert x is not None
        in_t = self._layer.input_gradient is Kind.T
        product = self._layer.backend.t(
            held, x, lse, state.grad_loss, z_loss=self._options.z_loss, input_term=in_t
        )
        if product is not None:
            state.dx = self._input_term(product, state, state.grad_loss)
        subtract_targets(self._layer.grad, x, state.owned, state.grad_loss, state.target_scale)
        if self._smoothing:
            self._smoothed += x.to(self._smoothed.dtype).T @ state.grad_loss
        state.held = state.x = None
        self._left -= 1
        if self._smoothing and not self._left:
            self._layer.grad.sub_(self._smoothed.to(self._layer.grad.dtype), alpha=self._smoothing)

    @torch.no_grad()
    def input_grad(self, microbatch: int) -> Tensor:
        """Return dL/dx [T, H] from the sum that the last barrier delivered to the root."""
        state = self._microbatches[microbatch]
        dx, state.dx = _known(state.dx), None
        if self._layer.input_gradient is Kind.S:
            return scale(dx, state.grad_loss, torch.empty_like(dx, dtype=self._layer.weight.dtype))
        return dx.to(self._layer.weight.dtype)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Return the loss of every token [m, T] in the statistics dtype, and end the step.

        It is 0 where the target is IGNORE_INDEX.
        """
        states = [self._microbatches.pop(microbatch) for microbatch in range(len(self._owned))]
        assert not self._microbatches
        assert all(state.held is None for state in states)
        return torch.stack([_known(state.loss) for state in states])

    @property
    def held_bytes(self) -> int:
        """Return the bytes held for T by all microbatches.

        These are the backend's state, x, and four values per token: reference, total, target logit,
        lse.
        """
        total = 0
        for state in self._microbatches.values():
            if state.held is not None and state.x is not None:
                total += (
                    self._layer.backend.held_bytes(state.held)
                    + state.x.nbytes
                    + 4 * state.softmax.reference.nbytes
                )
        return total

    def _input_term(
        self, product: Product, state: _Microbatch, gain: Tensor | None = None
    ) -> Tensor:
        """Return this shard's term of dx [T, H], times `gain` [T], of its product P W."""
        return input_term(
            product.values,
            product.reference,
            _known(state.lse),
            self._layer.weight,
            state.owned,
            state.target_scale,
            z_loss=self._options.z_loss,
            shared=self._smoothing * self._row_sum if self._smoothing else None,
            gain=gain,
            dtype=self._layer.sum_dtype,
        )

    # The messages of the algorithms, and what becomes of their results.  A message may be reduced
    # in place, so it must not alias state that is used later.

    def _statistics(self, state: _Microbatch) -> Tensor:
        """Return reference, total and target logit [3, T]."""
        return torch.stack(
            [state.softmax.reference, state.softmax.total, state.softmax.target_logit]
        )

    def _absorb_statistics(self, state: _Microbatch, gathered: Tensor) -> None:
        """Combine `gathered` [n, 3, T] in rank order, so that all ranks get the same bits."""
        state.lse, state.loss = combine(
            gathered, state.ignored, self._options.z_loss, self._layer.weight.dtype
        )

    def _maximum(self, state: _Microbatch) -> Tensor:
        return state.softmax.reference.clone()

    def _absorb_maximum(self, state: _Microbatch, received: Tensor) -> None:
        state.maximum = received

    def _sums(self, state: _Microbatch) -> Tensor:
        """Return total, relative to the maximum of all shards, and target logit [2, T]."""
        scale = torch.exp(state.softmax.reference - _known(state.maximum))
        return torch.stack([state.softmax.total * scale, state.softmax.target_logit])

    def _absorb_sums(self, state: _Microbatch, received: Tensor) -> None:
        state.lse, state.loss = loss_of(
            _known(state.maximum), received[0], received[1], state.ignored, self._options.z_loss
        )
        state.maximum = None

    def _input_term_of_s(self, state: _Microbatch) -> Tensor:
        product = Product(lend(_known(state.softmax.input_term)), state.softmax.reference)
        state.softmax = replace(state.softmax, input_term=None)  # free [T, H] early
        return self._input_term(product, state)

    def _dx(self, state: _Microbatch) -> Tensor:
        if self._layer.input_gradient is Kind.S:
            return self._input_term_of_s(state)
        dx, state.dx = _known(state.dx), None
        return dx

    def _absorb_dx(self, state: _Microbatch, received: Tensor) -> None:
        state.dx = received


def _known(value: Tensor | None) -> Tensor:
    """Return `value`, which an earlier barrier or pass must have set."""
    assert value is not None
    return value


# How each payload is formed and taken over; an algorithm only chooses payloads.
_MESSAGES: Mapping[Payload, Callable[[OutputStep, _Microbatch], Tensor]] = {
    Payload.STATISTICS: OutputStep._statistics,
    Payload.MAXIMUM: OutputStep._maximum,
    Payload.SUMS: OutputStep._sums,
    Payload.INPUT_GRADIENT: OutputStep._dx,
}
_ABSORBERS: Mapping[Payload, Callable[[OutputStep, _Microbatch, Tensor], None]] = {
    Payload.STATISTICS: OutputStep._absorb_statistics,
    Payload.MAXIMUM: OutputStep._absorb_maximum,
    Payload.SUMS: OutputStep._absorb_sums,
    Payload.INPUT_GRADIENT: OutputStep._absorb_dx,
}
