"""The interface of an optimizer, and AdamW with a copy of its state in every replica."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from vp_train.config import OptimConfig
from vp_train.optim.adamw import MOMENTS, FusedAdamW, by_decay, fresh_state
from vp_train.optim.buckets import Bucket, Countdown
from vp_train.optim.gradients import Gradients, Poison
from vp_train.optim.replicas import Replicas, TiedWeight
from vp_train.tensors.pending import Pending

_NORM_ELEMENTS = 1 << 16  # elements at a time on a CPU, where torch first casts them to float64

# "parameter", "exp_avg" or "exp_avg_sq" -> name of the parameter -> value
State = dict[str, dict[str, Tensor]]


class Optimizer(Protocol):
    """Turns the gradients of all replicas into new parameters, which are the same in every replica.

    In a step, call `ready` as gradients complete, then `reduce`, `squared_norm`, and `step` unless
    the step is skipped.  When `step` returns, new parameters may still be in transfer; `need` and
    `settle` wait for them.
    """

    updates: int  # applied so far

    def ready(self, names: Sequence[str]) -> None:
        """Record that the gradients of `names` are complete.

        When a bucket is complete, its sum over the replicas starts, and runs beside later passes.
        Each name comes at most once per step, in the same order in all replicas.  Collective.
        """
        ...

    def reduce(self) -> None:
        """Start the sums that have not started, and wait for all.  Collective.

        Then the gradient of a `TiedWeight` is summed over both ranks that hold it.
        """
        ...

    def poison(self) -> Tensor | None:
        """Return a number, [], that is finite if all gradients of this rank were.

        It is about the gradients before their sum over the replicas, and None if that is not
        known or there is one replica.
        """
        ...

    def squared_norm(self) -> Tensor:
        """Return this rank's term of the squared norm of all gradients: fp64 [].

        Every gradient counts on one rank.  The result is on the device of the gradients; this does
        not wait for the device.
        """
        ...

    def step(self, rate: float, scale: float) -> None:
        """Update with learning rate `rate` and the gradients times `scale`.

        The gradients are invalid afterwards.
        """
        ...

    def need(self, names: Sequence[str]) -> None:
        """Wait until the last update of the parameters `names` has arrived; cheap if it has."""
        ...

    def settle(self) -> None:
        """Wait for all parameters.  Call it before reading them outside passes."""
        ...

    def state(self) -> State:
        """Return all state, in the precision in which it is kept, on the first replica.

        Other replicas may return empty tables.  Collective.
        """
        ...

    def restore(self, read: Callable[[str, str], Tensor]) -> None:
        """Load the state that this replica keeps from `read(kind, name)`, one tensor at a time."""
        ...


class ReplicatedAdamW:
    """AdamW with its whole state on every replica, and fp32 copies of 16-bit parameters."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        gradients: Gradients,
        optim: OptimConfig,
        replicas: Replicas,
        tied: TiedWeight | None = None,
    ) -> None:
        self._parameters, self._gradients, self._replicas = dict(parameters), gradients, replicas
        self._tied = tied
        self._masters = {
            name: parameter
            if parameter.dtype is gradients.dtype
            else nn.Parameter(parameter.detach().to(gradients.dtype))
            for name, parameter in parameters.items()
        }
        spans = [span for bucket in gradients.layout.buckets for span in bucket.spans]
        self._counted = (
            []
            if replicas.rank
            else [gradients.flat[span.start : span.stop] for span in spans if span.counts]
        )
        fresh: dict[Tensor, dict[str, Tensor]] = {
            master: fresh_state({moment: torch.zeros_like(master) for moment in MOMENTS})
            for master in self._masters.values()
        }
        self._adamw = FusedAdamW(*by_decay(self._masters.values()), fresh, optim)
        self._countdown = Countdown(gradients.layout, self._sum, early=optim.overlap_sums)
        self._sums: list[Pending] = []
        self._poison = Poison()
        self._updates = 0

    @property
    def updates(self) -> int:
        return self._updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates = count
        for values in self._adamw.state.values():
            values["step"].fill_(count)

    def ready(self, names: Sequence[str]) -> None:
        self._countdown.ready(names)

    def _sum(self, bucket: Bucket) -> None:
        if self._replicas.size > 1 and bucket.start < bucket.stop:
            self._poison.add(self._gradients.of(bucket))
            self._sums.append(self._replicas.sum(self._gradients.of(bucket)))

    def reduce(self) -> None:
        self._countdown.finish()
        for pending in self._sums:
            pending.wait()
        self._sums.clear()
        if self._tied is not None:
            self._tied.sum(self._gradients[self._tied.name])

    def poison(self) -> Tensor | None:
        return self._poison.take()

    def squared_norm(self) -> Tensor:
        return squared_norm(self._counted, self._gradients.flat.device)

    @torch.no_grad()
    def step(self, rate: float, scale: float) -> None:
        if scale != 1:
            self._gradients.flat.mul_(scale)
        for name, master in self._masters.items():
            master.grad = self._gradients[name]
        self._adamw.step(rate)
        self._updates += 1
        self._round()

    def need(self, names: Sequence[str]) -> None:
        pass

    def settle(self) -> None:
        pass

    def state(self) -> State:
        moments = {
            moment: {
                name: self._adamw.state[master][moment] for name, master in self._masters.items()
            }
            for moment in MOMENTS
        }
        return {
            "parameter": {name: master.detach() for name, master in self._masters.items()}
        } | moments

    @torch.no_grad()
    def restore(self, read: Callable[[str, str], Tensor]) -> None:
        for kind, tensors in self.state().items():
            for name, tensor in tensors.items():
                tensor.copy_(read(kind, name))
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        rounded = [
            name
            for name, parameter in self._parameters.items()
            if parameter is not self._masters[name]
        ]
        if rounded:
            torch._foreach_copy_(
                [self._parameters[name] for name in rounded],
                [self._masters[name] for name in rounded],
            )


def squared_norm(gradients: list[Tensor], device: torch.device | None = None) -> Tensor:
    """Return the squared norm of `gradients`, fp64 [] on their device; 0 on `device` if none."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    if gradients[0].device.type == "cpu":
        gradients = [
            piece
            for gradient in gradients
            for piece in torch.split(gradient.flatten(), _NORM_ELEMENTS)
        ]
    return torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum()
