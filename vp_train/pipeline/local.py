"""A transport between the ranks of a pipeline that run as threads of one process.

It needs one GPU or none, and no process groups.  On a GPU every rank has a stream for its passes
and one for each communicator.  So the order of work, stalls and the lifetimes of tensors are those
of many GPUs.  Optional random delays, with a seed, change which rank is early.

A communicator is an end of the vocabulary, or a pair of sender and receiver.  It handles its
messages in the order of issue.  The host of a rank waits for the messages of others, and its device
waits for their events.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from schedules.lower import Exchange
from schedules.problem import Problem
from schedules.vocab import End, Transfer
from vp_train.pipeline.comms import Watch
from vp_train.tensors.pending import Issued, Pending, Then
from vp_train.tensors.streams import Mark, Streams, lend, streams_of, with_index

Result = TypeVar("Result")
_Key = tuple[object, ...]


class RankLost(RuntimeError):
    """The error if another rank of this process has failed or does not answer."""


@dataclass(slots=True)
class _Call:
    """One communication: the messages sent so far, and the number of ranks yet to read them."""

    readers: int
    messages: dict[int, tuple[Tensor, Mark]] = field(default_factory=dict)
    counts: Sequence[int] = ()


class Switchboard:
    """Connects the ranks of one process.

    delay_seconds: the longest delay before a rank issues a message; delays are drawn with `seed`.
    timeout_seconds: how long a rank waits for another one before it raises RankLost.
    """

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        *,
        delay_seconds: float = 0.0,
        seed: int = 0,
        timeout_seconds: float = 60.0,
    ) -> None:
        self.num_ranks = problem.layout.num_ranks
        self.members = {end: problem.shard_ranks(end) for end in End}
        self.end_ranks = tuple(sorted({problem.root(end) for end in End}))
        self.device, self.delay_seconds, self.seed = with_index(device), delay_seconds, seed
        self._timeout = timeout_seconds
        self._changed = Condition()
        self._calls: dict[_Key, _Call] = {}
        self._failed: int | None = None

    def transport(self, rank: int) -> LocalTransport:
        """Return the transport of `rank`."""
        return LocalTransport(self, rank)

    def put(
        self,
        key: _Key,
        rank: int,
        message: Tensor,
        mark: Mark,
        *,
        readers: int,
        counts: Sequence[int] = (),
    ) -> None:
        """Store the message of `rank` for the call `key`, which `readers` ranks will read."""
        with self._changed:
            call = self._calls.setdefault(key, _Call(readers))
            assert rank not in call.messages, f"rank {rank} sends {key} twice"
            call.messages[rank], call.counts = (message, mark), counts or call.counts
            self._changed.notify_all()

    def messages(self, key: _Key, senders: Sequence[int]) -> _Call:
        """Wait until all `senders` have stored their messages; return the call `key`."""

        def complete() -> bool:
            return key in self._calls and self._calls[key].messages.keys() >= set(senders)

        with self._changed:
            self._wait_for(complete, key)
            return self._calls[key]

    def read(self, key: _Key) -> None:
        """Record that one rank has read the messages; the last reader removes them."""
        with self._changed:
            self._calls[key].readers -= 1
            if not self._calls[key].readers:
                del self._calls[key]
                self._changed.notify_all()

    def is_read(self, key: _Key) -> bool:
        """Return whether all readers have read the call `key`, which must have had messages."""
        with self._changed:
            return key not in self._calls

    def wait_until_read(self, key: _Key) -> None:
        """Wait until all readers have read the call `key`."""
        with self._changed:
            self._wait_for(lambda: key not in self._calls, key)

    def fail(self, rank: int) -> None:
        """Wake all ranks that wait for `rank`, which has failed."""
        with self._changed:
            self._failed = rank if self._failed is None else self._failed
            self._changed.notify_all()

    def _wait_for(self, ready: Callable[[], bool], key: _Key) -> None:
        ended = self._changed.wait_for(lambda: ready() or self._failed is not None, self._timeout)
        if ready():
            return
        if ended:
            raise RankLost(f"rank {self._failed} has failed; {key} never comes")
        raise RankLost(f"{key} has not come for {self._timeout:g} s")


class _Channel:
    """One communicator on one rank: its pending work in the order of issue."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._queue: deque[_Arriving] = deque()
        self._lock = Lock()  # a step that is timed waits in other threads

    @contextmanager
    def current(self) -> Iterator[None]:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def add(self, arriving: _Arriving) -> None:
        self._queue.append(arriving)

    def complete(self, wanted: _Arriving) -> None:
        """Do all work that was issued up to and including `wanted`."""
        with self._lock:
            while wanted.done is None:
                self._queue.popleft().perform()


class _Arriving:
    """A read that this rank has issued: it waits for the messages of a call."""

    def __init__(
        self, channel: _Channel, streams: Streams, perform: Callable[[], Tensor], after: Mark
    ) -> None:
        self._channel, self._streams, self._perform, self._after = channel, streams, perform, after
        self.done: tuple[Tensor, Mark] | None = None

    def perform(self) -> None:
        with self._channel.current():
            # The communicator waits for the stream that issued the read, as NCCL does.
            self._streams.follow(self._after)
            result = self._perform()
            self.done = result, self._streams.mark()

    def wait(self) -> Tensor:
        self._channel.complete(self)
        assert self.done is not None
        result, mark = self.done
        self._streams.follow(mark)
        return lend(result)

    def is_completed(self) -> bool:
        return self.done is not None and _reached(self.done[1])


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message that other ranks have yet to read."""

    board: Switchboard
    key: _Key
    message: Tensor

    def wait(self) -> Tensor:
        self.board.wait_until_read(self.key)
        return self.message

    def is_completed(self) -> bool:
        return self.board.is_read(self.key)


def _reached(mark: Mark) -> bool:
    return mark is None or bool(mark.query())


class LocalTransport:
    """The transport of one rank of a `Switchboard`."""

    def __init__(self, board: Switchboard, rank: int) -> None:
        self._board, self._rank = board, rank
        self.streams = streams_of(board.device)
        self._channels: dict[_Key, _Channel] = {}
        self._calls: dict[_Key, int] = defaultdict(int)
        self._random = random.Random(board.seed * 1_000 + rank)
        self._spinning = board.device.type == "cuda"

    def send(self, tensor: Tensor, peer: int, *, watch: Watch) -> Pending:
        key = self._next("hop", self._rank, peer)
        self._put(key, tensor, readers=1)
        return watch(_Sent(self._board, key, tensor))

    def receive(self, buffer: Tensor, peer: int, *, watch: Watch) -> Pending:
        key = self._next("hop", peer, self._rank)

        def read(call: _Call, messages: list[Tensor]) -> Tensor:
            return buffer.copy_(messages[0])

        return watch(self._arriving(key, (peer,), read))

    def collective(
        self,
        exchange: Exchange,
        message: Callable[[], Tensor],
        counts: Sequence[int],
        *,
        watch: Watch,
    ) -> Pending:
        end, members = exchange.end, self._board.members[exchange.end]
        if len(members) == 1:  # nothing to exchange, and nothing to wait for beside the passes
            own = message()
            own = own[None] if exchange.transfer is Transfer.ALL_GATHER else own
            return Then(Issued(None, own), lend)
        with nullcontext() if exchange.continues is None else self.streams.beside(end):
            own = message()
            key = self._next(end)
            readers = 1 if exchange.transfer.to_root else len(members)
            self._put(key, own, readers=readers, counts=counts)
            if not exchange.delivers:
                return watch(_Sent(self._board, key, own))
            place = members.index(self._rank)
            root = members.index(exchange.root)

            def read(call: _Call, messages: list[Tensor]) -> Tensor:
                return _result(exchange.transfer, messages, place, root, call.counts)

            return watch(self._arriving(key, members, read))

    def sum_over_ends(self, tensor: Tensor) -> None:
        ends = self._board.end_ranks
        if len(ends) == 1 or self._rank not in ends:
            return
        key = self._next("ends")
        self._put(key, tensor.clone(), readers=len(ends))

        def read(call: _Call, messages: list[Tensor]) -> Tensor:
            return torch.stack(messages).sum(0)

        tensor.copy_(self._arriving(key, ends, read).wait())

    def _next(self, *channel: object) -> _Key:
        number = self._calls[channel]
        self._calls[channel] += 1
        return (*channel, number)

    def _put(self, key: _Key, message: Tensor, *, readers: int, counts: Sequence[int] = ()) -> None:
        delay = self._random.random() * self._board.delay_seconds
        if delay and self._spinning:
            torch.cuda._sleep(int(delay * 1e9))  # type: ignore[no-untyped-call]  # cycles, 1 to 2 per ns
        elif delay:
            time.sleep(delay)
        mark = self.streams.mark()
        self._board.put(key, self._rank, message, mark, readers=readers, counts=counts)

    def _arriving(
        self, key: _Key, senders: Sequence[int], read: Callable[[_Call, list[Tensor]], Tensor]
    ) -> _Arriving:
        channel = self._channel(key[:-1])

        def perform() -> Tensor:
            call = self._board.messages(key, senders)
            messages = []
            for sender in senders:
                message, mark = call.messages[sender]
                self.streams.follow(mark)
                messages.append(lend(message))
            result = read(call, messages)
            self._board.read(key)
            return result

        arriving = _Arriving(channel, self.streams, perform, self.streams.mark())
        channel.add(arriving)
        return arriving

    def _channel(self, name: _Key) -> _Channel:
        if name not in self._channels:
            self._channels[name] = _Channel(
                _stream_on(self._board.device) if self._spinning else None
            )
        return self._channels[name]


def _result(
    transfer: Transfer, messages: list[Tensor], place: int, root: int, counts: Sequence[int]
) -> Tensor:
    """Return the result of member `place`, given the messages of all members in order."""
    match transfer:
        case Transfer.BROADCAST:
            return messages[root].clone()
        case Transfer.REDUCE | Transfer.ALL_SUM:
            return torch.stack(messages).sum(0)
        case Transfer.ALL_MAX:
            return torch.stack(messages).amax(0)
        case Transfer.ALL_GATHER:
            return torch.stack(messages)
        case Transfer.GATHER:
            assert [len(message) for message in messages] == list(counts)
            return torch.cat(messages)
        case Transfer.SCATTER:
            return messages[root].split_with_sizes(list(counts))[place].clone()


def run_ranks(board: Switchboard, work: Callable[[int], Result]) -> list[Result]:
    """Run work(rank) of every rank in its own thread, and return the results in rank order.

    Raises the first error of a rank, RankLost only if there is no other.  The other ranks end when
    they wait for that rank.
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with _own_stream(board.device):
                results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)
            board.fail(rank)

    threads = [Thread(target=run, args=(rank,), daemon=True) for rank in range(board.num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:  # ranks that have lost another one say the least
        raise next((error for error in errors if not isinstance(error, RankLost)), errors[0])
    return [results[rank] for rank in range(board.num_ranks)]


def _stream_on(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Make a new stream current, for the passes of one rank."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    stream = _stream_on(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
