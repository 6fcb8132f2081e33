"""Ranks in one process: nothing is left behind, and on a GPU streams wait only for what they need.

A GPU of names stands in for a real one: it writes down which stream waits for what.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch

from schedules.problem import Collective
from schedules.vocab import End, Transfer
from tests.local import exchange
from tests.schedules.cases import problem
from vp_train.pipeline import local
from vp_train.pipeline.aside import Aside
from vp_train.pipeline.local import RankLost, Switchboard, run_ranks
from vp_train.pipeline.timers import HostTimer, timer_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SUMMED = (Transfer.REDUCE, Transfer.ALL_SUM)


def unwatched(pending):
    return pending


@pytest.mark.parametrize("transfer", Transfer)
def test_a_sender_has_sent_when_all_have_read_and_nothing_is_left(transfer):
    """Three rounds, whose messages are told apart, over a hop and a collective."""
    board = Switchboard(problem(3, 1, "one_barrier"), CPU, timeout_seconds=5.0)

    def work(rank):
        transport, found = board.transport(rank), []
        for number in range(3):
            rows = {Transfer.GATHER: rank + 1, Transfer.SCATTER: 6 * (rank == 1)}.get(transfer, 2)
            own = torch.full((rows,), 10.0 * number + rank)
            pending = transport.collective(
                exchange(transfer, rank), lambda own=own: own, (1, 2, 3), watch=unwatched
            )
            sent = transport.send(torch.tensor([rank, number]), (rank + 1) % 3, watch=unwatched)
            hop = transport.receive(
                torch.empty(2, dtype=torch.int64), (rank - 1) % 3, watch=unwatched
            )
            assert not hop.is_completed()
            assert hop.wait().tolist() == [(rank - 1) % 3, number]
            assert hop.is_completed()
            result = pending.wait()
            assert sent.wait().tolist() == [rank, number]
            assert sent.is_completed()
            assert pending.is_completed()
            found.append(result.tolist())
        return found

    found = run_ranks(board, work)
    if transfer in SUMMED:
        assert found[1] == [[30.0 * number + 3] * 2 for number in range(3)]
    assert board._calls == {}


def test_a_hop_is_sent_only_when_it_was_read():
    board = Switchboard(problem(2, 1, "none"), CPU, timeout_seconds=5.0)
    seen = threading.Event()

    def work(rank):
        transport = board.transport(rank)
        if rank == 1:
            assert seen.wait(5)
            return transport.receive(torch.empty(1), 0, watch=unwatched).wait().item()
        pending = transport.send(torch.ones(1), 1, watch=unwatched)
        early = pending.is_completed()
        seen.set()
        pending.wait()
        return early, pending.is_completed()

    assert run_ranks(board, work) == [(False, True), 1.0]


def test_a_message_of_one_owner_goes_nowhere_and_waits_for_nobody():
    board = Switchboard(problem(3, 1, "none"), CPU)
    for transfer in (Transfer.BROADCAST, Transfer.ALL_GATHER):
        own = torch.arange(2)
        pending = board.transport(2).collective(
            exchange(transfer, 1, end=End.OUTPUT), lambda own=own: own, (), watch=unwatched
        )
        assert pending.is_completed()
        assert pending.wait().shape == ((1, 2) if transfer is Transfer.ALL_GATHER else (2,))
    assert board._calls == {}


@pytest.mark.parametrize("schedule_vocab", ["none", "one_barrier"])
def test_only_the_ranks_of_both_ends_sum_what_these_share(schedule_vocab):
    board = Switchboard(problem(3, 1, schedule_vocab), CPU, timeout_seconds=5.0)

    def work(rank):
        tensor = torch.full((2,), rank + 1.0)
        board.transport(rank).sum_over_ends(tensor)
        return tensor.tolist()

    assert run_ranks(board, work) == [[4.0] * 2, [2.0] * 2, [4.0] * 2]
    alone = Switchboard(problem(1, 1, schedule_vocab), CPU, timeout_seconds=0.01)
    alone.transport(0).sum_over_ends(torch.ones(1))
    assert board._calls == alone._calls == {}


def test_the_first_rank_that_fails_is_named_to_all_that_wait():
    board = Switchboard(problem(3, 1, "none"), CPU, timeout_seconds=5.0)
    board.fail(2)
    board.fail(1)
    start = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 2 has failed; \('hop', 1, 0, 0\) never comes"):
        board.messages(("hop", 1, 0, 0), (1,))
    board.put(("hop", 1, 0, 0), 1, torch.ones(1), None, readers=1)
    with pytest.raises(RankLost, match="rank 2 has failed"):
        board.wait_until_read(("hop", 1, 0, 0))
    assert time.monotonic() - start < 4
    assert board.messages(("hop", 1, 0, 0), (1,)).readers == 1, "what has come can be read"
    with pytest.raises(AssertionError, match=r"rank 1 sends .* twice"):
        board.put(("hop", 1, 0, 0), 1, torch.ones(1), None, readers=1)


def test_threads_of_ranks_and_of_waits_keep_no_process_alive():
    board = Switchboard(problem(2, 1, "none"), CPU)
    assert all(run_ranks(board, lambda rank: threading.current_thread().daemon))
    never, before = threading.Event(), set(threading.enumerate())
    timer = HostTimer()
    assert isinstance(timer_of(CPU), HostTimer)

    class Never:
        def wait(self):
            never.wait(5)
            return torch.ones(1)

    pending = timer.watch(Never(), "hop", lambda mark: None)
    aside = Aside()
    queued = aside.issue(lambda: pending)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    assert all(thread.daemon for thread in threads)
    assert not pending.is_completed()
    never.set()
    assert queued.wait().item() == pending.wait().item() == 1
    assert pending.is_completed()
    assert queued.is_completed()


def test_a_communication_that_is_timed_ends_when_it_does_and_raises_where_it_is_waited_for():
    timer, marks = HostTimer(), []

    class Slow:
        def wait(self):
            time.sleep(0.02)
            return torch.ones(1)

    timer.start()
    pending = timer.watch(Slow(), "hop", marks.append)
    assert pending.wait().item() == 1
    (mark,) = marks
    assert 0.015 < timer.seconds(mark) < 5
    timer.start(at=mark - 3.0)
    assert timer.seconds(mark) == pytest.approx(3.0)
    assert timer.between([1.0, 3.0, 3.5]) == [2.0, 0.5]

    class Broken:
        def wait(self):
            raise ZeroDivisionError("it is broken")

    with pytest.raises(ZeroDivisionError, match="it is broken"):
        timer.watch(Broken(), "hop", marks.append).wait()
    assert marks == [mark]


class Gpu:
    """The parts of torch.cuda that a rank uses: streams and events that have only names."""

    def __init__(self):
        self.log, self._here, self.reached, self.slept = [], threading.local(), True, []
        self.names, self._lock = {}, threading.Lock()
        gpu = self

        class Stream:
            def __init__(self, device, priority=0):
                with gpu._lock:
                    self.name = f"stream {len(gpu.names)}"
                    gpu.names[self.name] = threading.current_thread()

            def wait_event(self, event):
                gpu.note(self.name, "waits", event.place)

            def wait_stream(self, other):
                gpu.note(self.name, "waits", other.name)

            def synchronize(self):
                gpu.note(self.name, "synchronize")

        class Event:
            def record(self, stream):
                self.place = stream.name, len(gpu.log)
                gpu.note(stream.name, "mark")

            def query(self):
                return gpu.reached

        self.Stream, self.Event = Stream, Event
        self._default = Stream(None)

    def note(self, *what):
        self.log.append(what)

    def current_stream(self, device):
        return getattr(self._here, "stream", self._default)

    def default_stream(self, device):
        return self._default

    def set_device(self, device):
        self.note("device", device)

    def _sleep(self, cycles):
        self.slept.append(cycles)

    @contextmanager
    def stream(self, stream):
        outside = self.current_stream(None)
        self._here.stream = stream
        yield
        self._here.stream = outside


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    names = ("Stream", "Event", "current_stream", "default_stream", "set_device", "_sleep")
    for name in (*names, "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


def test_the_passes_of_a_rank_have_a_stream_of_their_own_and_end_with_it(gpu):
    board = Switchboard(problem(1, 1, "none"), GPU)

    def work(rank):
        gpu.note("work", gpu.current_stream(GPU).name)

    run_ranks(board, work)
    assert gpu.log == [
        ("device", GPU),
        ("stream 1", "waits", "stream 0"),
        ("work", "stream 1"),
        ("stream 1", "synchronize"),
    ]
    gpu.log.clear()
    run_ranks(Switchboard(problem(1, 1, "none"), CPU), work)
    assert gpu.log == [("work", "stream 0")]


def test_a_communicator_waits_for_its_issue_and_for_the_message_and_the_passes_for_the_result(gpu):
    board = Switchboard(problem(2, 1, "none"), GPU, timeout_seconds=5.0)
    passes, sides = gpu.Stream(GPU), gpu.Stream(GPU)
    sender, receiver = board.transport(0), board.transport(1)
    with gpu.stream(sides):
        sender.send(torch.ones(1), 1, watch=unwatched)
    sent = gpu.log.index((sides.name, "mark"))
    with gpu.stream(passes):
        pending = receiver.receive(torch.empty(1), 0, watch=unwatched)
        assert gpu.log[sent + 1 :] == [(passes.name, "mark")], "nothing waits yet"
        issued = len(gpu.log) - 1
        gpu.note("a pass")
        assert not pending.is_completed()
        assert pending.wait().item() == 1
    (channel,) = {name for name, *_ in gpu.log} - {passes.name, sides.name, "a pass"}
    assert gpu.log[issued + 2 :] == [
        (channel, "waits", (passes.name, issued)),
        (channel, "waits", (sides.name, sent)),
        (channel, "mark"),
        (passes.name, "waits", (channel, issued + 4)),
    ]
    assert pending.is_completed()
    gpu.reached = False
    assert not pending.is_completed(), "the device has not come to it"
    with gpu.stream(passes):
        pending.wait()
    assert gpu.log[-1] == (passes.name, "waits", (channel, issued + 4))


def test_messages_of_one_communicator_are_read_in_the_order_of_issue_on_one_stream(gpu):
    board = Switchboard(problem(2, 1, "none"), GPU, timeout_seconds=5.0)
    sender, receiver = board.transport(0), board.transport(1)
    for value in (1.0, 2.0):
        sender.send(torch.tensor([value]), 1, watch=unwatched)
    first, second = (receiver.receive(torch.empty(1), 0, watch=unwatched) for _ in range(2))
    known = set(gpu.names)
    assert second.wait().item() == 2
    assert first.is_completed(), "the one before it was read first"
    assert first.wait().item() == 1
    assert len(receiver._channels) == 1
    assert set(gpu.names) == known


@pytest.mark.parametrize("continues", [None, Collective("C1", 0)])
def test_a_collective_that_continues_another_is_formed_beside_the_passes(gpu, continues):
    board = Switchboard(problem(2, 1, "one_barrier"), GPU, timeout_seconds=5.0)
    formed = []

    def message():
        formed.append(gpu.current_stream(GPU).name)
        return torch.ones(1)

    for rank in range(2):
        board.transport(rank).collective(
            exchange(Transfer.ALL_SUM, rank, continues=continues), message, (), watch=unwatched
        )
    assert len(set(formed)) == (1 if continues is None else 2)
    assert ("stream 0" in formed) == (continues is None)
    marks = [name for name, what, *_ in gpu.log if what == "mark"]
    assert set(marks) == set(formed)


def test_delays_are_drawn_by_seed_and_rank_and_stay_below_the_longest(gpu, monkeypatch):
    slept = []
    monkeypatch.setattr(local, "time", type("", (), {"sleep": slept.append}))

    def delays(device, seed, rank, longest=0.25):
        board = Switchboard(
            problem(4, 1, "none"), device, delay_seconds=longest, seed=seed, timeout_seconds=1
        )
        for times in (slept, gpu.slept):
            times.clear()
        transport = board.transport(rank)
        for _ in range(5):
            transport.send(torch.ones(1), (rank + 1) % 4, watch=unwatched)
        return tuple(slept), tuple(gpu.slept)

    found = {(seed, rank): delays(CPU, seed, rank) for seed in range(3) for rank in range(4)}
    assert len({of_host for of_host, _ in found.values()}) == 12
    for of_host, of_device in found.values():
        assert len(of_host) == 5
        assert not of_device
        assert all(0 < delay < 0.25 for delay in of_host)
    assert max(map(max, (of_host for of_host, _ in found.values()))) > 0.2
    again, nothing = delays(CPU, 1, 2)
    assert again == found[1, 2][0]
    nothing, cycles = delays(GPU, 1, 2)
    assert not nothing
    assert cycles == tuple(int(delay * 1e9) for delay in again)
    assert delays(CPU, 1, 2, longest=0.0) == ((), ())


def test_a_host_has_no_streams():
    board = Switchboard(problem(2, 1, "none"), CPU)
    transport = board.transport(0)
    assert transport.streams.mark() is None
    with transport.streams.beside("a side"), nullcontext():
        transport.streams.follow(None)


def test_a_message_of_one_communicator_waits_for_none_of_another():
    """Messages of the other end and of another sender were issued before, and have not come."""
    board = Switchboard(problem(3, 1, "one_barrier"), CPU, timeout_seconds=0.2)
    transports = [board.transport(rank) for rank in range(3)]

    def summed(rank, end):
        one = exchange(Transfer.ALL_SUM, rank, end=end)
        return transports[rank].collective(one, lambda: torch.ones(1), (), watch=unwatched)

    early = summed(0, End.INPUT)
    first = transports[0].receive(torch.empty(1), 1, watch=unwatched)
    second = transports[0].receive(torch.empty(1), 2, watch=unwatched)
    pending = [summed(rank, End.OUTPUT) for rank in range(3)]
    transports[2].send(torch.full((1,), 7.0), 0, watch=unwatched)
    assert pending[0].wait().item() == 3
    assert second.wait().item() == 7
    assert not early.is_completed()
    assert not first.is_completed()
    with pytest.raises(RankLost, match=r"\('hop', 1, 0, 0\) has not come for 0.2 s"):
        first.wait()
