"""A collective that continues another is issued beside the passes."""

import gc
import threading
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist

from schedules.lower import Exchange
from schedules.problem import Collective
from schedules.vocab import End, Payload, Transfer
from vp_train.pipeline.comms import Comms, ProcessGroups
from vp_train.pipeline.groups import Groups
from vp_train.tensors.pending import Issued

PASS_SECONDS, MESSAGE_SECONDS = 1.0, 0.2


def comms_of(world_size, *, through_host=False):
    everyone = list(range(world_size))
    hops, output = (dist.new_group(everyone) for _ in range(2))
    of_peers = dict.fromkeys(everyone, hops)
    ends = {End.INPUT: None, End.OUTPUT: output}
    groups = Groups(tuple(everyone), tuple(everyone), of_peers, of_peers, ends)
    return Comms(ProcessGroups(groups, torch.device("cpu"), through_host=through_host))


def exchange(transfer, *, root=0, delivers=True, continues=None):
    return Exchange(
        End.OUTPUT,
        transfer,
        Payload.SUMS,
        root,
        0,
        counted=False,
        contributes=True,
        delivers=delivers,
        continues=continues,
    )


def unwatched(pending):
    return pending


def started(comms, collective, message, counts=(), earlier=None):
    """Start a collective; return its delivery, and the list to which it appends its result."""
    received = []
    return comms.start(collective, message, received.append, counts, earlier, unwatched), received


CONTINUED = Collective("C1", 0)


def sum_while_rank_1_computes(rank, world_size):
    """Return the seconds until rank 0 has the sum, and the sum; rank 1 runs a pass meanwhile."""
    comms = comms_of(world_size)

    def message():
        time.sleep(MESSAGE_SECONDS)
        return torch.full((2,), rank + 1.0)

    dist.barrier()
    start = time.monotonic()
    summed = exchange(Transfer.REDUCE, delivers=rank == 0, continues=CONTINUED)
    pending, total = started(comms, summed, message)
    following, received = started(
        comms, exchange(Transfer.BROADCAST), lambda: torch.full((2,), 7.0 - rank)
    )
    if rank == 1:
        time.sleep(PASS_SECONDS)
        seconds = 0.0
    else:
        pending()
        seconds = time.monotonic() - start
    following()
    comms.drain()
    return seconds, [value.tolist() for value in total], received[0].tolist()


def test_a_pass_does_not_delay_a_collective_that_others_wait_for(ranks):
    (seconds, total, first), (*_, second) = ranks(2).run(sum_while_rank_1_computes)
    assert MESSAGE_SECONDS <= seconds < PASS_SECONDS
    assert total == [[3.0, 3.0]]
    # The broadcast is issued after the sum on both ranks, although its message was ready earlier.
    assert first == second == [7.0, 7.0]


def fail_aside(rank, world_size):
    comms = comms_of(world_size)

    def message():
        raise ZeroDivisionError(f"no message on rank {rank}")

    pending, _ = started(comms, exchange(Transfer.REDUCE, continues=CONTINUED), message)
    with pytest.raises(ZeroDivisionError, match=f"no message on rank {rank}"):
        pending()
    return True


def test_an_error_beside_the_passes_is_raised_where_the_result_is_waited_for(ranks):
    assert ranks(2).run(fail_aside) == [True, True]


def threads_left_by_comms(rank, world_size):
    """Return the number of new threads during and after a Comms that uses its thread."""
    before = set(threading.enumerate())
    comms = comms_of(world_size)
    pending, _ = started(
        comms, exchange(Transfer.ALL_SUM, continues=CONTINUED), lambda: torch.ones(2)
    )
    pending()
    during = set(threading.enumerate()) - before
    del comms, pending
    gc.collect()
    return len(during), len(set(threading.enumerate()) - before)


def test_the_thread_has_ended_when_its_comms_are_gone(ranks):
    assert ranks(2).run(threads_left_by_comms) == [(1, 0), (1, 0)]


COUNTS = (2, 0, 3)


def gather_and_scatter(rank, world_size, through_host):
    """Return the rows gathered on rank 1, those scattered back, and a value received in a ring."""
    comms = comms_of(world_size, through_host=through_host)
    own = torch.full((COUNTS[rank], 2), float(rank))
    gathering, gathered = started(
        comms, exchange(Transfer.GATHER, root=1, delivers=rank == 1), lambda: own, COUNTS
    )
    if gathering is not None:
        gathering()
    message = gathered[0] * 10 if rank == 1 else own[:0]
    scattering, scattered = started(
        comms, exchange(Transfer.SCATTER, root=1), lambda: message, COUNTS
    )
    scattering()
    hop = comms.receive(torch.empty(1), (rank - 1) % world_size, watch=unwatched)
    comms.send(torch.tensor([float(rank)]), (rank + 1) % world_size, watch=unwatched)
    received = hop.wait().item()
    comms.drain()
    return gathered[0].tolist() if gathered else [], scattered[0].tolist(), received


@pytest.mark.parametrize("through_host", [False, True])
def test_rows_are_gathered_in_rank_order_and_scattered_to_their_owners(ranks, through_host):
    results = ranks(3).run(gather_and_scatter, through_host)
    assert [gathered for gathered, _, _ in results] == [[], [[0.0, 0.0]] * 2 + [[2.0, 2.0]] * 3, []]
    assert [scattered for _, scattered, _ in results] == [[[0.0, 0.0]] * 2, [], [[20.0, 20.0]] * 3]
    assert [received for *_, received in results] == [2.0, 0.0, 1.0]


class Recorded:
    """Streams that record the work of each stream, in the order of the host."""

    def __init__(self):
        self.log, self._current, self._marks = [], "passes", 0

    def mark(self):
        self._marks += 1
        self.log.append((self._current, f"mark {self._marks}"))
        return self._marks

    def follow(self, mark):
        if mark is not None:
            self.log.append((self._current, f"wait {mark}"))

    @contextmanager
    def beside(self, name):
        outside, self._current = self._current, f"side of {name}"
        yield
        self._current = outside

    def note(self, what):
        self.log.append((self._current, what))


class Alone:
    """A transport of one rank that issues continued collectives beside the passes, as on CUDA."""

    def __init__(self, streams):
        self.streams = streams

    def collective(self, exchange, message, counts, *, watch):
        with nullcontext() if exchange.continues is None else self.streams.beside(exchange.end):
            tensor = message()
            self.streams.note(f"issue {exchange.transfer}")
            return Waiting(self.streams, tensor, exchange.transfer)


class Waiting(Issued):
    def __init__(self, streams, tensor, transfer):
        super().__init__(None, tensor)
        object.__setattr__(self, "note", lambda: streams.note(f"wait for {transfer}"))

    def wait(self):
        self.note()
        return self.result


def test_starting_a_continued_barrier_does_not_stop_the_stream_of_the_passes():
    """C1 starts, then C1b which continues it, then a pass runs, then T which needs C1.

    Only T's wait for C1 stops the passes, by an event.
    """
    streams = Recorded()
    comms = Comms(Alone(streams))
    first, _ = started(comms, exchange(Transfer.ALL_GATHER), lambda: torch.ones(2))

    def message():
        streams.note("form the message")
        return torch.ones(2)

    second, _ = started(
        comms, exchange(Transfer.REDUCE, continues=CONTINUED), message, earlier=first
    )
    streams.note("a pass")
    first()
    streams.note("T")
    second()
    assert streams.log == [
        ("passes", "issue all_gather"),
        ("side of output", "wait for all_gather"),
        ("side of output", "mark 1"),
        ("side of output", "form the message"),
        ("side of output", "issue reduce"),
        ("passes", "a pass"),
        ("passes", "wait 1"),
        ("passes", "T"),
        ("passes", "wait for reduce"),
        ("passes", "mark 2"),
    ]


def test_a_continued_barrier_follows_the_passes_where_these_have_waited_already():
    streams = Recorded()
    comms = Comms(Alone(streams))
    first, _ = started(comms, exchange(Transfer.ALL_GATHER), lambda: torch.ones(2))
    first()
    streams.log.clear()
    started(comms, exchange(Transfer.REDUCE, continues=CONTINUED), lambda: torch.ones(2))
    assert streams.log == [
        ("passes", "mark 2"),
        ("side of output", "wait 2"),
        ("side of output", "issue reduce"),
    ]
