"""Asynchronous communication: hops between stages, and the collectives of the vocabulary layers.

The executor calls `Comms`.  It keeps communications that nothing else waits for, and hands over the
results of the others.  A `Transport` moves the messages: `ProcessGroups` here, over
torch.distributed, or `local.LocalTransport` between ranks of one process.

Everything is issued in program order.  A collective that continues another is issued beside the
passes: on CUDA on a side stream, and with gloo, where waiting blocks the host, by a thread.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from schedules.lower import Exchange
from schedules.vocab import End, Transfer
from vp_train.pipeline.aside import Aside
from vp_train.pipeline.buffers import Once
from vp_train.pipeline.groups import Groups
from vp_train.tensors.collectives import all_gather_single
from vp_train.tensors.pending import Issued, Pending, Then
from vp_train.tensors.streams import Mark, Streams, lend, streams_of

Watch = Callable[[Pending], Pending]


class Delivery:
    """A collective whose result is handed over once, by the first caller.

    Later callers wait until that is done: on a CPU the thread waits, on a device the stream.
    """

    def __init__(
        self, pending: Pending, hand_over: Callable[[Tensor], None], streams: Streams
    ) -> None:
        self._pending, self._hand_over, self._streams = pending, hand_over, streams
        self._mark: Mark = None
        self._once = Once(self._deliver)

    def __call__(self) -> None:
        if not self._once():
            self._streams.follow(self._mark)

    def _deliver(self) -> None:
        self._hand_over(self._pending.wait())
        self._mark = self._streams.mark()


class Transport(Protocol):
    """Moves tensors between the ranks of one pipeline.

    Only `Pending.wait` waits for other ranks.  A transport that copies messages to the host first,
    such as `ProcessGroups` with `through_host`, also blocks the host while it issues them.  `watch`
    may wrap an issued communication, to measure its time.
    """

    streams: Streams

    def send(self, tensor: Tensor, peer: int, *, watch: Watch) -> Pending:
        """Issue the send of `tensor` to pipeline rank `peer`."""
        ...

    def receive(self, buffer: Tensor, peer: int, *, watch: Watch) -> Pending:
        """Issue the receive into `buffer` from pipeline rank `peer`."""
        ...

    def collective(
        self,
        exchange: Exchange,
        message: Callable[[], Tensor],
        counts: Sequence[int],
        *,
        watch: Watch,
    ) -> Pending:
        """Issue a collective; beside the passes if it continues another, for which `message` waits.

        The result depends on `exchange.transfer`.  For ALL_GATHER over n shards it is
        [n, *message.shape].  GATHER and SCATTER need the `counts` of rows of each shard, and the
        root has the rows of all shards in their order.  Otherwise it is the tensor that `message`
        returned, reduced or received in place.
        """
        ...

    def sum_over_ends(self, tensor: Tensor) -> None:
        """Sum `tensor` in place over the ranks of the first and last stage, and wait."""
        ...


class Comms:
    """The communication interface of the executor.

    Only `drain` and `sum_over_ends` wait for other ranks.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        # By communicator, a peer or an end: each completes what it was given in order, and none
        # waits for another.
        self._kept: defaultdict[int | End, deque[Pending]] = defaultdict(deque)

    def send(self, tensor: Tensor, peer: int, *, watch: Watch) -> None:
        """Send `tensor` to pipeline rank `peer`."""
        self._keep(peer, self._transport.send(tensor, peer, watch=watch))

    def receive(self, buffer: Tensor, peer: int, *, watch: Watch) -> Pending:
        """Issue the receive into `buffer` from pipeline rank `peer`, and return it."""
        return self._transport.receive(buffer, peer, watch=watch)

    def start(
        self,
        exchange: Exchange,
        message: Callable[[], Tensor],
        hand_over: Callable[[Tensor], None],
        counts: Sequence[int],
        earlier: Delivery | None,
        watch: Watch,
    ) -> Delivery | None:
        """Start a collective; return its delivery, None on ranks that receive no result.

        `message` forms this rank's contribution.  If the collective continues another, `message` is
        called beside the passes, after `earlier` has been delivered.  `earlier` is None if that has
        already happened.
        """
        if exchange.continues is None:
            formed = message()
            pending = self._transport.collective(exchange, lambda: formed, counts, watch=watch)
        else:
            ready = self._transport.streams.mark() if earlier is None else None

            def continued() -> Tensor:
                if earlier is None:
                    self._transport.streams.follow(ready)
                else:
                    earlier()
                return message()

            pending = self._transport.collective(exchange, continued, counts, watch=watch)
        if exchange.delivers:
            return Delivery(pending, hand_over, self._transport.streams)
        self._keep(exchange.end, pending)
        return None

    def sum_over_ends(self, tensor: Tensor) -> None:
        """Sum `tensor` in place over the ranks of the first and last stage, and wait."""
        self._transport.sum_over_ends(tensor)

    def _keep(self, communicator: int | End, pending: Pending) -> None:
        """Keep a communication until it is seen complete; let go of all that are complete now."""
        self._kept[communicator].append(pending)
        for kept in self._kept.values():
            while kept and kept[0].is_completed():
                kept.popleft().wait()

    def drain(self) -> None:
        """Wait for all communications that nothing else waits for."""
        for kept in self._kept.values():
            while kept:
                kept.popleft().wait()


class ProcessGroups:
    """A transport over the process groups of a pipeline.

    With `through_host` every message is copied to the host and every result back to `device`,
    because gloo cannot send from a GPU.  The host waits for these copies.  With `whole_hops` every
    tensor-parallel rank sends its whole activation, as sequence parallelism needs.  Otherwise all
    of them have the same activation, each sends a part of it, and the receivers gather the parts.

    Another stream than the issuing one may wait for a communication, so each wait lends the result.
    """

    def __init__(
        self,
        groups: Groups,
        device: torch.device,
        *,
        through_host: bool = False,
        whole_hops: bool = False,
    ) -> None:
        self._groups, self._device, self._through_host = groups, device, through_host
        self._tensor = groups.tensor
        self._hop_parts = 1 if whole_hops or self._tensor is None else self._tensor.size()
        self._asides: dict[End, Aside] = {}
        self.streams = streams_of(torch.device("cpu") if through_host else device)

    def send(self, tensor: Tensor, peer: int, *, watch: Watch) -> Pending:
        part = self._part(tensor) if self._splits(tensor) else tensor
        part = self._outbound(part)
        group = self._groups.sends[peer]
        work = dist.isend(part, self._groups.ranks[peer], group=group)
        return watch(Then(Issued(work, part), lend))

    def receive(self, buffer: Tensor, peer: int, *, watch: Watch) -> Pending:
        parted = self._splits(buffer)
        into = torch.empty_like(self._part(buffer)) if parted else buffer
        if self._through_host:
            into = torch.empty_like(into, device="cpu")
        group = self._groups.receives[peer]
        work = dist.irecv(into, self._groups.ranks[peer], group=group)
        pending = self._inbound(watch(Then(Issued(work, into), lend)))
        if parted:
            assert self._tensor is not None
            return Then(pending, partial(_join, self._tensor, buffer))
        return pending

    def _splits(self, tensor: Tensor) -> bool:
        return self._hop_parts > 1 and tensor.numel() % self._hop_parts == 0

    def _part(self, tensor: Tensor) -> Tensor:
        assert self._tensor is not None
        return tensor.view(self._hop_parts, -1)[self._tensor.rank()]

    def collective(
        self,
        exchange: Exchange,
        message: Callable[[], Tensor],
        counts: Sequence[int],
        *,
        watch: Watch,
    ) -> Pending:
        end, transfer = exchange.end, exchange.transfer
        group = self._groups.ends[end]
        if group is None:  # one rank owns the whole layer
            tensor = message()
            own = tensor[None] if transfer is Transfer.ALL_GATHER else tensor
            return Then(Issued(None, own), lend)
        leader = self._groups.leaders[exchange.root]

        def issue() -> Pending:
            own = self._outbound(message())
            return watch(Then(_start_collective(group, transfer, own, leader, counts), lend))

        pending = self._in_order(end, issue, beside=exchange.continues is not None)
        if exchange.delivers and self._tensor is not None:
            if transfer is Transfer.REDUCE:
                pending = Then(pending, partial(_pass_on, self._tensor, leader, None))
            elif transfer is Transfer.GATHER:
                pending = Then(pending, partial(_pass_on, self._tensor, leader, sum(counts)))
        return self._inbound(pending) if exchange.delivers else pending

    def _in_order(self, end: End, issue: Callable[[], Pending], *, beside: bool) -> Pending:
        """Issue a collective of `end` in program order, without stopping the passes.

        On CUDA `Pending.wait` blocks a stream, so a side stream waits.  Otherwise a thread waits.
        After its first collective this thread issues all collectives of this end, to keep their
        order.
        """
        if self._device.type == "cuda" and not self._through_host:
            if not beside:
                return issue()
            with self.streams.beside(end):
                return issue()
        if beside and end not in self._asides:
            self._asides[end] = Aside()
        aside = self._asides.get(end)
        return issue() if aside is None else aside.issue(issue)

    def sum_over_ends(self, tensor: Tensor) -> None:
        if self._groups.end_ranks is not None:
            dist.all_reduce(tensor, group=self._groups.end_ranks)

    def _outbound(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self._through_host else tensor

    def _inbound(self, pending: Pending) -> Pending:
        if not self._through_host:
            return pending
        return Then(pending, methodcaller("to", self._device))


def _join(group: dist.ProcessGroup, whole: Tensor, part: Tensor) -> Tensor:
    """Gather into `whole` the parts of a hop that the ranks of `group` have received."""
    all_gather_single(whole.view(-1), part, group)
    return whole


def _pass_on(group: dist.ProcessGroup, source: int, num_rows: int | None, result: Tensor) -> Tensor:
    """Broadcast over `group` the `result` that only rank `source` has received.

    `source` has `num_rows` rows.  None means that `result` has the same shape on all ranks.
    """
    if num_rows is not None and len(result) != num_rows:
        result = result.new_empty((num_rows, *result.shape[1:]))
    dist.broadcast(result, source, group=group)
    return result


def _start_collective(
    group: dist.ProcessGroup, transfer: Transfer, tensor: Tensor, root: int, counts: Sequence[int]
) -> Issued:
    """Issue a collective of `group`; `root` is a rank of the default group."""
    match transfer:
        case Transfer.BROADCAST:
            return Issued(dist.broadcast(tensor, root, group=group, async_op=True), tensor)
        case Transfer.REDUCE:
            return Issued(dist.reduce(tensor, root, group=group, async_op=True), tensor)
        case Transfer.ALL_MAX:
            maximum = dist.ReduceOp.MAX
            return Issued(dist.all_reduce(tensor, maximum, group=group, async_op=True), tensor)
        case Transfer.ALL_SUM:
            return Issued(dist.all_reduce(tensor, group=group, async_op=True), tensor)
        case Transfer.ALL_GATHER:
            result = tensor.new_empty((group.size(), *tensor.shape))
            flat = result.view(-1, *tensor.shape[1:])
            work = all_gather_single(flat, tensor, group, async_op=True)
            return Issued(work, result, tensor)
        case Transfer.GATHER | Transfer.SCATTER:
            at_root, nothing = dist.get_rank() == root, [0] * group.size()
            to_root = list(nothing)
            to_root[dist.get_group_rank(group, root)] = counts[group.rank()]
            from_root = list(counts) if at_root else nothing
            gathers = transfer is Transfer.GATHER
            sent, received = (to_root, from_root) if gathers else (from_root, to_root)
            result = tensor.new_empty((sum(received), *tensor.shape[1:]))
            work = dist.all_to_all_single(
                result, tensor, received, sent, group=group, async_op=True
            )
            return Issued(work, result, tensor)
