"""What a run asks of an optimizer, and AdamW with a copy of its state in every replica."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vp_train.config import OptimConfig
from vp_train.optim.adamw import MOMENTS, build_adamw
from vp_train.optim.gradients import Gradients

State = dict[str, dict[str, Tensor]]  # "parameter", "exp_avg", "exp_avg_sq" of every parameter, by name


class Optimizer(Protocol):
    """Turns the gradients of all replicas into new parameters; they are the same in every replica."""

    updates: int  # applied so far

    def ready(self, names: Sequence[str]) -> None:
        """Start to sum the gradients of `names`, which are complete, over the replicas.  Collective, in the same order."""
        ...

    def reduce(self) -> None:
        """Sum those not summed yet and wait for all.  Collective."""
        ...

    def squared_norm(self) -> Tensor:
        """fp64 []: this rank's term of the squared norm of all gradients, each of which counts on one rank."""
        ...

    def step(self, rate: float, scale: float) -> None:
        """Update with learning rate `rate` and the gradients times `scale`, which uses them up."""
        ...

    def state(self) -> State:
        """In the precision it is kept in, of the first replica; others may give nothing.  Collective."""
        ...

    def restore(self, read: Callable[[str, str], Tensor]) -> None:
        """Take over what `read(kind, name)` returns for what this replica keeps, one tensor at a time."""
        ...


class ReplicatedAdamW:
    """AdamW on every replica alike, with fp32 copies of parameters of less precision.  `data` joins the replicas."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        gradients: Gradients,
        copied: frozenset[str],
        optim: OptimConfig,
        data: dist.ProcessGroup,
    ) -> None:
        self._parameters, self._gradients, self._data = dict(parameters), gradients, data
        self._masters = {
            name: parameter if parameter.dtype is gradients.dtype else nn.Parameter(parameter.detach().to(gradients.dtype))
            for name, parameter in parameters.items()
        }
        self._counted = [] if data.rank() else [name for name in parameters if name not in copied]
        self._adamw = build_adamw(self._masters.values(), optim)
        self._sums: dict[tuple[str, ...], dist.Work] = {}

    @property
    def updates(self) -> int:
        return next((int(values["step"].item()) for values in self._adamw.state.values()), 0)

    @updates.setter
    def updates(self, count: int) -> None:
        for values in self._adamw.state.values():
            values["step"].fill_(count)

    def ready(self, names: Sequence[str]) -> None:
        if self._data.size() > 1 and names:
            self._sums[tuple(names)] = dist.all_reduce(self._gradients.span(names), group=self._data, async_op=True)

    def reduce(self) -> None:
        started = {name for names in self._sums for name in names}
        for name in self._parameters:
            if name not in started:
                self.ready([name])
        for pending in self._sums.values():
            pending.wait()
        self._sums.clear()

    def squared_norm(self) -> Tensor:
        return squared_norm([self._gradients[name] for name in self._counted])

    @torch.no_grad()
    def step(self, rate: float, scale: float) -> None:
        if scale != 1:
            self._gradients.flat.mul_(scale)
        for name, master in self._masters.items():
            master.grad = self._gradients[name]
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._round()

    def state(self) -> State:
        moments = {
            moment: {name: self._adamw.state[master][moment] for name, master in self._masters.items()} for moment in MOMENTS
        }
        return {"parameter": {name: master.detach() for name, master in self._masters.items()}} | moments

    @torch.no_grad()
    def restore(self, read: Callable[[str, str], Tensor]) -> None:
        for kind, tensors in self.state().items():
            for name, tensor in tensors.items():
                tensor.copy_(read(kind, name))
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])


def squared_norm(gradients: list[Tensor]) -> Tensor:
    """fp64 [], on the host."""
    norms = torch._foreach_norm(gradients, 2, torch.float64) if gradients else []
    return torch.stack([norm.cpu() ** 2 for norm in norms]).sum() if norms else torch.zeros((), dtype=torch.float64)
