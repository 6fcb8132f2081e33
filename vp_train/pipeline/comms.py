"""Asynchronous communication: hops between neighbouring stages, and the collectives of the vocabulary layers.

Every direction of hops and each end of the model has its own process group, so that one can never delay another's order (on
CUDA each group has a stream of its own).  Everything is issued from one thread, in program order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from schedules.vocab import End, Transfer


@dataclass(frozen=True, slots=True)
class Pending:
    """A communication under way, with the tensor it delivers and everything it must keep alive."""

    work: dist.Work | None
    result: Tensor
    source: Tensor | None = None

    def wait(self) -> Tensor:
        """The delivered tensor.  On CUDA the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.result


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups of one pipeline.  `ends[end]` is None where a single rank owns the whole layer: nothing to exchange.

    `ranks[i]` is the global rank of pipeline rank i.
    """

    ranks: tuple[int, ...]
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    ends: dict[End, dist.ProcessGroup | None]


class Comms:
    """What the executor calls to communicate; nothing blocks but `Pending.wait` and `drain`."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._sent: deque[Pending] = deque()

    def send(self, tensor: Tensor, peer: int, *, upstream: bool) -> None:
        """Issue the send of `tensor` to pipeline rank `peer`; `upstream` for gradients."""
        group = self._groups.backward if upstream else self._groups.forward
        self._keep(Pending(dist.isend(tensor, self._groups.ranks[peer], group=group), tensor))

    def receive(self, buffer: Tensor, peer: int, *, upstream: bool) -> Pending:
        """Issue the receive into `buffer` from pipeline rank `peer`."""
        group = self._groups.backward if upstream else self._groups.forward
        return Pending(dist.irecv(buffer, self._groups.ranks[peer], group=group), buffer)

    def collective(self, end: End, transfer: Transfer, tensor: Tensor, root: int, *, delivers: bool) -> Pending:
        """Issue a collective of the ranks of `end`; `root` is a pipeline rank.

        The result is `tensor` itself, reduced or received in place, or [num_ranks, *tensor.shape] for ALL_GATHER.  With
        `delivers` false nobody on this rank waits for it: it is kept alive until it is done.
        """
        group = self._groups.ends[end]
        if group is None:
            return Pending(None, tensor[None] if transfer is Transfer.ALL_GATHER else tensor)
        pending = self._issue(group, transfer, tensor, self._groups.ranks[root])
        if not delivers:
            self._keep(pending)
        return pending

    def _issue(self, group: dist.ProcessGroup, transfer: Transfer, tensor: Tensor, root: int) -> Pending:
        match transfer:
            case Transfer.BROADCAST:
                return Pending(dist.broadcast(tensor, root, group=group, async_op=True), tensor)
            case Transfer.REDUCE:
                return Pending(dist.reduce(tensor, root, group=group, async_op=True), tensor)
            case Transfer.ALL_MAX:
                return Pending(dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group, async_op=True), tensor)
            case Transfer.ALL_SUM:
                return Pending(dist.all_reduce(tensor, group=group, async_op=True), tensor)
            case Transfer.ALL_GATHER:
                result = torch.empty((group.size(), *tensor.shape), dtype=tensor.dtype, device=tensor.device)
                return Pending(dist.all_gather(list(result), tensor, group=group, async_op=True), result, tensor)

    def _keep(self, pending: Pending) -> None:
        self._sent.append(pending)
        while self._sent and self._sent[0].work is not None and self._sent[0].work.is_completed():
            self._sent.popleft().wait()

    def drain(self) -> None:
        """Wait for everything nobody else waits for."""
        while self._sent:
            self._sent.popleft().wait()
