"""Asynchronous communication: hops between neighbouring stages, and the collectives of the vocabulary layers.

Every direction of hops and each end of the model has its own process group, so that one can never delay another's order (on
CUDA each group has a stream of its own, and each pair that hops has two groups).  Everything is issued in program order.
Once a message had to be waited for, the collectives of that end are issued by a thread beside the passes; everything else by
the thread that runs them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from schedules.vocab import End, Transfer
from vp_train.pipeline.groups import Groups

_STOP_SECONDS = 5.0  # of patience with a thread whose message never comes


class Pending(Protocol):
    """A communication under way."""

    def wait(self) -> Tensor:
        """The delivered tensor.  On CUDA the current stream waits, not the host."""
        ...

    def is_completed(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Issued:
    """With the tensor it delivers and everything it must keep alive."""

    work: dist.Work | None
    result: Tensor
    source: Tensor | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.result

    def is_completed(self) -> bool:
        return self.work is None or self.work.is_completed()


@dataclass(frozen=True, slots=True)
class _Queued:
    """One that the thread of an `_Aside` issues."""

    issued: Future[_Issued]

    def wait(self) -> Tensor:
        return self.issued.result().wait()

    def is_completed(self) -> bool:
        return self.issued.done() and self.issued.result().is_completed()


@dataclass(frozen=True, slots=True)
class _PassedOn:
    """One that only rank `source` gets: from it the result goes on to the others of `group`, all `num_rows` rows of it."""

    pending: Pending
    source: int
    group: dist.ProcessGroup
    num_rows: int | None  # None: as many as there are here

    def wait(self) -> Tensor:
        result = self.pending.wait()
        if self.num_rows is not None and len(result) != self.num_rows:
            result = result.new_empty((self.num_rows, *result.shape[1:]))
        dist.broadcast(result, self.source, group=self.group)
        return result

    def is_completed(self) -> bool:
        return self.pending.is_completed()


@dataclass(frozen=True, slots=True)
class _Staged:
    """One whose result is still to go to the device."""

    pending: Pending
    device: torch.device

    def wait(self) -> Tensor:
        return self.pending.wait().to(self.device)

    def is_completed(self) -> bool:
        return self.pending.is_completed()


_Task = tuple[Future[_Issued], Callable[[], _Issued]]


class _Aside:
    """A thread that issues one communication after the other, each as soon as its message is there.

    A daemon, unlike those of concurrent.futures: a rank that failed must be able to exit while a message never comes.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        thread = Thread(target=_serve, args=(self._queue,), daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._queue, thread)

    def issue(self, action: Callable[[], _Issued]) -> _Queued:
        issued: Future[_Issued] = Future()
        self._queue.put((issued, action))
        return _Queued(issued)


def _serve(queue: SimpleQueue[_Task | None]) -> None:
    while True:
        task = queue.get()
        if task is None:
            return
        _settle(*task)
        del task  # tensors must not live until the next one comes


def _settle(issued: Future[_Issued], action: Callable[[], _Issued]) -> None:
    try:
        issued.set_result(action())
    except BaseException as error:  # for whoever waits
        issued.set_exception(error)


def _stop(queue: SimpleQueue[_Task | None], thread: Thread) -> None:
    """Runs at exit too: a thread that lets go of communications while the interpreter shuts down aborts the process."""
    queue.put(None)
    if thread is not current_thread():
        thread.join(_STOP_SECONDS)


class Comms:
    """What the executor calls to communicate; nothing blocks but `Pending.wait` and `drain`.

    With `through_host` every message is copied to the host and every result to `device`: gloo cannot send what is on a GPU.
    """

    def __init__(self, groups: Groups, device: torch.device, *, through_host: bool = False) -> None:
        self._groups, self._device, self._through_host = groups, device, through_host
        self._sent: deque[Pending] = deque()
        self._asides: dict[End, _Aside] = {}

    def send(self, tensor: Tensor, peer: int, *, upstream: bool) -> None:
        """Issue the send of `tensor` to pipeline rank `peer`; `upstream` for gradients."""
        group, tensor = self._groups.hop(peer, upstream=upstream), self._outbound(tensor)
        self._keep(_Issued(dist.isend(tensor, self._groups.ranks[peer], group=group), tensor))

    def receive(self, buffer: Tensor, peer: int, *, upstream: bool) -> Pending:
        """Issue the receive into `buffer` from pipeline rank `peer`."""
        group = self._groups.hop(peer, upstream=upstream)
        if self._through_host:
            buffer = torch.empty_like(buffer, device="cpu")
        return self._inbound(_Issued(dist.irecv(buffer, self._groups.ranks[peer], group=group), buffer))

    def collective(
        self, end: End, transfer: Transfer, tensor: Tensor, root: int, *, delivers: bool, counts: Sequence[int] = ()
    ) -> Pending:
        """Issue a collective of the ranks of `end`; `root` is a pipeline rank.

        The result is `tensor` itself, reduced or received in place; [num_ranks, *tensor.shape] for ALL_GATHER; for GATHER and
        SCATTER, which need the `counts` of rows of each rank, the root has the rows of all ranks, one rank's after the
        other's.  With `delivers` false nobody on this rank waits for it: it is kept alive until it is done.
        """
        return self._collective(end, transfer, lambda: tensor, root, delivers=delivers, counts=counts)

    def collective_aside(
        self, end: End, transfer: Transfer, message: Callable[[], Tensor], root: int, *, delivers: bool
    ) -> Pending:
        """The same with a `message` that may have to be waited for.  It is called in another thread, on CPUs.

        On CUDA waiting does not block the host, and all communicators must be issued from one thread.
        """
        group = self._groups.ends[end]
        if group is not None and end not in self._asides and dist.get_backend(group) == "gloo":
            self._asides[end] = _Aside()
        return self._collective(end, transfer, message, root, delivers=delivers)

    def _collective(
        self,
        end: End,
        transfer: Transfer,
        message: Callable[[], Tensor],
        root: int,
        *,
        delivers: bool,
        counts: Sequence[int] = (),
    ) -> Pending:
        group, aside = self._groups.ends[end], self._asides.get(end)
        if group is None:
            tensor = message()
            return _Issued(None, tensor[None] if transfer is Transfer.ALL_GATHER else tensor)

        leader = self._groups.leaders[root]

        def issue() -> _Issued:
            return self._issue(group, transfer, self._outbound(message()), leader, counts)

        pending: Pending = issue() if aside is None else aside.issue(issue)
        if not delivers:
            self._keep(pending)
        elif self._groups.tensor is not None and transfer in (Transfer.REDUCE, Transfer.GATHER):
            pending = _PassedOn(pending, leader, self._groups.tensor, sum(counts) if transfer is Transfer.GATHER else None)
        return self._inbound(pending)

    def _outbound(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self._through_host else tensor

    def _inbound(self, pending: Pending) -> Pending:
        return _Staged(pending, self._device) if self._through_host else pending

    def _issue(self, group: dist.ProcessGroup, transfer: Transfer, tensor: Tensor, root: int, counts: Sequence[int]) -> _Issued:
        match transfer:
            case Transfer.BROADCAST:
                return _Issued(dist.broadcast(tensor, root, group=group, async_op=True), tensor)
            case Transfer.REDUCE:
                return _Issued(dist.reduce(tensor, root, group=group, async_op=True), tensor)
            case Transfer.ALL_MAX:
                return _Issued(dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group, async_op=True), tensor)
            case Transfer.ALL_SUM:
                return _Issued(dist.all_reduce(tensor, group=group, async_op=True), tensor)
            case Transfer.ALL_GATHER:
                result = torch.empty((group.size(), *tensor.shape), dtype=tensor.dtype, device=tensor.device)
                return _Issued(dist.all_gather(list(result), tensor, group=group, async_op=True), result, tensor)
            case Transfer.GATHER | Transfer.SCATTER:
                at_root, nothing = dist.get_rank() == root, [0] * group.size()
                to_root = list(nothing)
                to_root[dist.get_group_rank(group, root)] = counts[group.rank()]
                from_root = list(counts) if at_root else nothing
                sent, received = (to_root, from_root) if transfer is Transfer.GATHER else (from_root, to_root)
                result = tensor.new_empty((sum(received), *tensor.shape[1:]))
                work = dist.all_to_all_single(result, tensor, received, sent, group=group, async_op=True)
                return _Issued(work, result, tensor)

    def _keep(self, pending: Pending) -> None:
        self._sent.append(pending)
        while self._sent and self._sent[0].is_completed():
            self._sent.popleft().wait()

    def drain(self) -> None:
        """Wait for everything nobody else waits for."""
        while self._sent:
            self._sent.popleft().wait()
