"""Messages are kept as long as they must be, split where they divide, and copied where they go."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

from schedules.ir import Kind, Pass
from schedules.lower import Action, Exchange
from schedules.timeline import Span
from schedules.vocab import End, Payload, Transfer
from tests.local import run_locally
from tests.meshes import alone
from tests.pipeline.equivalence import config_of
from tests.pipeline.test_offload import offloading, plan_of
from tests.pipeline.truth import random_batch
from vp_train.config import VocabConfig
from vp_train.pipeline import comms as comms_module
from vp_train.pipeline.aside import Aside, _stop
from vp_train.pipeline.comms import Comms, Delivery, ProcessGroups, _start_collective
from vp_train.pipeline.groups import Groups
from vp_train.pipeline.offload import HostLink
from vp_train.pipeline.recorder import Named, Recorder, joined_communications
from vp_train.pipeline.stopwatch import Part, Stopwatch
from vp_train.pipeline.timers import CudaTimer, HostTimer
from vp_train.tensors.pending import Issued, Then
from vp_train.tensors.streams import CudaStreams, HostOrder, Lead

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")  # a device that this machine has


def unwatched(pending):
    return pending


def exchange(transfer, *, delivers=True, continues=None):
    return Exchange(
        End.OUTPUT,
        transfer,
        Payload.SUMS,
        0,
        0,
        counted=False,
        contributes=True,
        delivers=delivers,
        continues=continues,
    )


class Sending:
    """A communication that ends when the test says so, and notes who waits for it."""

    def __init__(self, name, log):
        self.name, self.log, self.done = name, log, False

    def wait(self):
        self.log.append(self.name)
        return torch.ones(1)

    def is_completed(self):
        return self.done


class Issuing:
    """A transport whose communications end when the test says so."""

    streams = HostOrder()

    def __init__(self):
        self.log, self.made = [], []

    def send(self, tensor, peer, *, watch):
        self.made.append(Sending(f"{len(self.made)}", self.log))
        return watch(self.made[-1])

    def collective(self, exchange, message, counts, *, watch):
        return self.send(message(), exchange.root, watch=watch)


def test_sends_to_a_peer_are_kept_in_order_until_the_first_has_ended_or_all_are_drained():
    transport = Issuing()
    comms, log, made = Comms(transport), transport.log, transport.made

    def send():
        comms.send(torch.ones(1), 1, watch=unwatched)

    send()
    send()
    made[1].done = True
    send()
    assert log == [], "the first has not ended, so the others are kept behind it"
    made[0].done = True
    send()
    assert log == ["0", "1"]
    comms.drain()
    assert log == ["0", "1", "2", "3"]
    comms.drain()
    assert log == ["0", "1", "2", "3"]


def test_a_message_is_let_go_while_one_of_another_communicator_has_not_ended():
    transport = Issuing()
    comms, log, made = Comms(transport), transport.log, transport.made
    undelivered = exchange(Transfer.REDUCE, delivers=False)
    assert undelivered.root == 0
    for peer in (0, 2):
        comms.send(torch.ones(1), peer, watch=unwatched)
    comms.start(undelivered, lambda: torch.ones(1), log.append, (), None, unwatched)
    made[1].done = made[2].done = True
    comms.send(torch.ones(1), 0, watch=unwatched)
    assert log == ["1", "2"]
    comms.drain()
    assert sorted(log[2:]) == ["0", "3"]


class Reaching(HostOrder):
    """Streams that note when the host waits for the device, and until which mark."""

    def __init__(self, log):
        self.log, self.count = log, 0

    def mark(self):
        self.count += 1
        return self.count

    def reach(self, mark):
        self.log.append(mark)


def test_the_host_issues_a_pass_when_the_device_has_done_all_but_the_last_two():
    config = config_of(2, 3, 101, schedule="zb_h1", vocab=VocabConfig("one_barrier"))
    plan = plan_of(config, 2)

    def work(rank, model, together):
        log = []

        class Passes(Noting):
            def observe(self, item, held_bytes):
                log.append(str(item))
                return nullcontext()

        model.trainer._lead = Lead(Reaching(log), 2)
        model.train_step(*random_batch(config, 1), Passes())
        return log

    for rank, log in enumerate(run_locally(config, plan, work)):
        passes = [str(op.item) for op in plan.program.ranks[rank] if op.action is Action.RUN]
        expected = passes[:3]
        for done, name in enumerate(passes[3:], 1):
            expected += [done, name]
        assert log == [*expected, len(passes) - 2]


def test_on_a_gpu_the_host_waits_for_an_event():
    waited = []
    event = SimpleNamespace(synchronize=lambda: waited.append("event"))
    streams = CudaStreams(torch.device("cuda", 0))
    streams.reach(None)
    assert waited == []
    streams.reach(event)
    assert waited == ["event"]


def test_a_result_is_handed_over_once_and_who_comes_later_follows_that():
    log = []

    class Streams(HostOrder):
        def mark(self):
            log.append("mark")
            return "its end"

        def follow(self, mark):
            log.append(f"follow {mark}")

    delivery = Delivery(Sending("wait", log), lambda tensor: log.append("hand over"), Streams())
    assert log == []
    delivery()
    assert log == ["wait", "hand over", "mark"]
    delivery()
    assert log == ["wait", "hand over", "mark", "follow its end"]


def test_a_collective_without_a_result_here_is_kept_and_one_with_a_result_is_not():
    log, exchanges = [], []

    class Transport:
        streams = HostOrder()

        def collective(self, exchange, message, counts, *, watch):
            exchanges.append((exchange, message().tolist(), counts))
            return watch(Sending(exchange.transfer.value, log))

    comms, got = Comms(Transport()), []
    arguments = (lambda: torch.ones(1), got.append, (3, 4), None, unwatched)
    assert comms.start(exchange(Transfer.REDUCE, delivers=False), *arguments) is None
    delivery = comms.start(exchange(Transfer.ALL_SUM), *arguments)
    assert [counts for *_, counts in exchanges] == [(3, 4)] * 2
    comms.drain()
    assert log == ["reduce"]
    delivery()
    assert log == ["reduce", "all_sum"]
    assert len(got) == 1


def test_what_needs_no_work_is_complete_and_delivers_itself():
    source, result = torch.ones(1), torch.zeros(1)
    issued = Issued(None, result, source)
    assert issued.is_completed()
    assert issued.wait() is result
    work, log = SimpleNamespace(done=False), []
    work.is_completed, work.wait = lambda: work.done, lambda: log.append("wait")
    issued = Issued(work, result)
    assert not issued.is_completed()
    work.done = True
    assert issued.is_completed()
    assert issued.wait() is result
    assert log == ["wait"]


def test_what_follows_a_communication_happens_when_somebody_waits_and_not_before():
    work, log = SimpleNamespace(done=False), []
    work.is_completed, work.wait = lambda: work.done, lambda: log.append("wait")
    finished = Then(Issued(work, torch.ones(1)), lambda result: log.append("finish") or 2 * result)
    assert not finished.is_completed()
    work.done = True
    assert finished.is_completed()
    assert log == []
    assert finished.wait().tolist() == [2]
    assert log == ["wait", "finish"]


@pytest.fixture
def transport_of(monkeypatch):
    """Return a function for transports whose messages go nowhere; their arguments are noted."""
    calls = []
    work = SimpleNamespace(is_completed=lambda: True, wait=lambda: None)

    def noted(name):
        def call(tensor, *arguments, **options):
            calls.append((name, tensor, arguments, options))
            return work

        return call

    def all_gather_single(whole, part, group, **options):
        calls.append(("gather", part, (group,), options))
        whole.view(group.size(), -1).copy_(part.view(1, -1))
        return work

    fake = SimpleNamespace(isend=noted("isend"), irecv=noted("irecv"), broadcast=noted("broadcast"))
    monkeypatch.setattr(comms_module, "dist", fake)
    monkeypatch.setattr(comms_module, "all_gather_single", all_gather_single)

    def made(tp=1, rank=0, device=CPU, **settings):
        group = SimpleNamespace(size=lambda: tp, rank=lambda: rank)
        groups = Groups(
            ranks=(10, 11),
            leaders=(20, 21),
            sends={1: "to 1"},
            receives={1: "from 1"},
            ends={End.INPUT: None, End.OUTPUT: None},
            tensor=group if tp > 1 else None,
        )
        return ProcessGroups(groups, device, **settings), calls

    return made


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("through_host", [False, True])
def test_a_hop_is_split_over_tensor_parallel_ranks_where_its_values_divide(
    transport_of, tp, through_host
):
    for rank in {0, tp - 1}:
        device = ELSEWHERE if through_host else CPU
        transport, calls = transport_of(tp, rank, device, through_host=through_host)
        for shape, divides in (((2, 1, 4), True), ((3, 1, 5), tp == 1)):
            calls.clear()
            count = torch.Size(shape).numel()
            message = torch.arange(float(count)).view(shape)
            transport.send(message, 1, watch=unwatched)
            ((name, sent, arguments, options),) = calls
            assert (name, arguments, options) == ("isend", (11,), {"group": "to 1"})
            split = divides and tp > 1
            part = count // tp
            own = message.view(-1)[rank * part : (rank + 1) * part] if split else message
            assert torch.equal(sent.view(-1), own.reshape(-1))
            calls.clear()
            buffer = torch.empty(shape, device=device)
            pending = transport.receive(buffer, 1, watch=unwatched)
            ((name, into, arguments, options),) = calls
            assert (name, arguments, options) == ("irecv", (11,), {"group": "from 1"})
            assert into.numel() == own.numel()
            assert into.device == CPU
            assert pending.is_completed()
            result = pending.wait()
            assert result.device == device
            assert result.shape == (shape if split or not through_host else into.shape)
            assert [name for name, *_ in calls[1:]] == (["gather"] if split else [])
            if not through_host:
                assert result is buffer


def test_whole_hops_are_sent_by_every_tensor_parallel_rank(transport_of):
    transport, calls = transport_of(2, 1, whole_hops=True)
    message = torch.arange(8.0)
    transport.send(message, 1, watch=unwatched)
    assert calls[0][1] is message
    buffer = torch.empty(8)
    assert transport.receive(buffer, 1, watch=unwatched).wait() is buffer
    assert [name for name, *_ in calls] == ["isend", "irecv"]


def test_one_owner_of_a_layer_keeps_its_message(transport_of):
    transport, calls = transport_of()
    for transfer in Transfer:
        own = torch.arange(3)
        pending = transport.collective(exchange(transfer), lambda own=own: own, (), watch=None)
        assert pending.is_completed()
        result = pending.wait()
        assert result.shape == ((1, 3) if transfer is Transfer.ALL_GATHER else (3,))
        assert result.data_ptr() == own.data_ptr()
    assert calls == []


@pytest.mark.parametrize("delivers", [True, False])
def test_only_a_result_that_is_awaited_here_is_copied_to_the_device(delivers):
    group = alone()
    ends = {End.INPUT: None, End.OUTPUT: group}
    transport = ProcessGroups(Groups((0,), (0,), {}, {}, ends), ELSEWHERE, through_host=True)
    summed = exchange(Transfer.ALL_SUM, delivers=delivers)
    pending = transport.collective(summed, lambda: torch.ones(2), (), watch=unwatched)
    assert pending.wait().device == (ELSEWHERE if delivers else CPU)
    assert pending.is_completed()


@pytest.mark.parametrize("num_rows", [2, 5])
def test_what_only_the_leader_receives_is_passed_on_to_its_tensor_parallel_ranks(
    transport_of, num_rows
):
    """Other ranks have no rows, or as many as the result has, before it arrives."""
    _, calls = transport_of()
    received = torch.zeros(2, 3)
    result = comms_module._pass_on("tensor", 20, num_rows, received)
    assert result.shape == (num_rows, 3)
    assert (result is received) == (num_rows == 2)
    ((name, passed, arguments, options),) = calls
    assert (name, arguments, options) == ("broadcast", (20,), {"group": "tensor"})
    assert passed is result
    assert comms_module._pass_on("tensor", 20, None, received) is received


def test_rows_go_from_and_to_the_owner_alone():
    """The root of a group of one gathers and scatters its own rows."""
    group = alone()
    for transfer in (Transfer.GATHER, Transfer.SCATTER):
        own = torch.arange(6.0).view(3, 2)
        issued = _start_collective(group, transfer, own, 0, (3,))
        assert torch.equal(issued.wait(), own)
        assert issued.source is own
    gathered = _start_collective(group, Transfer.ALL_GATHER, own, 0, ())
    assert gathered.wait().shape == (1, 3, 2)
    assert gathered.source is own


def test_the_thread_beside_the_passes_keeps_no_tensor_of_a_message_that_has_been_waited_for():
    aside, tensor = Aside(), torch.ones(3)
    alive = weakref.ref(tensor.untyped_storage())
    pending = aside.issue(lambda tensor=tensor: Issued(None, tensor))
    assert pending.wait().tolist() == [1, 1, 1]
    assert pending.is_completed()
    settled = threading.Event()
    aside.issue(lambda: settled.set() or Issued(None, torch.ones(1)))
    assert settled.wait(5)
    del tensor, pending
    gc.collect()
    assert alive() is None


def test_a_thread_beside_the_passes_is_waited_for_where_it_is_stopped():
    """Its work ends first.  A thread that stops itself does not wait for itself."""
    begun, before = threading.Event(), set(threading.enumerate())
    aside = Aside()
    (thread,) = set(threading.enumerate()) - before

    def slow():
        begun.set()
        time.sleep(0.05)
        return Issued(None, torch.ones(1))

    pending = aside.issue(slow)
    assert begun.wait(5)
    del aside
    gc.collect()
    assert not thread.is_alive()
    assert pending.is_completed()
    queue, errors = SimpleQueue(), []

    def itself():
        try:
            _stop(queue, threading.current_thread())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=itself)
    thread.start()
    thread.join(5)
    assert errors == []
    assert queue.get_nowait() is None


def test_of_ranks_that_end_together_the_first_counts():
    spans = [[Span(rank, "C0.1", "C0", -1, 1, float(rank), 5.0)] for rank in range(3)]
    (joined,) = joined_communications(spans)
    assert (joined.rank, joined.start, joined.end) == (0, 2.0, 5.0)


def test_a_stopwatch_asks_its_timer_for_nothing_where_nothing_was_switched():
    class Strict(HostTimer):
        def between(self, marks):
            assert len(marks) > 1
            return super().between(marks)

    watch = Stopwatch(Strict())
    assert set(watch.take().values()) == {0.0}
    watch.switch(Part.DATA)
    assert watch.take()[Part.REST] >= 0
    assert set(watch.take().values()) == {0.0}


class Probe:
    """Streams and timed events of a GPU that only have names."""

    def __init__(self):
        self.log, self._here, self.count, self.made = [], "passes", 0, 0
        probe = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self, stream):
                probe.count += 1
                self.at = 1000.0 * probe.count
                probe.log.append(f"mark on {stream}")

            def synchronize(self):
                probe.log.append("synchronize")

            def elapsed_time(self, other):
                return other.at - self.at

        self.Event = Event

    def Stream(self, device):
        self.made += 1
        return f"probe {self.made}"

    def current_stream(self, device):
        return self._here

    @contextmanager
    def stream(self, stream):
        outside, self._here = self._here, stream
        yield
        self._here = outside


@pytest.mark.parametrize("host_waits", [False, True])
def test_on_a_gpu_a_stream_of_its_channel_waits_for_the_end_of_a_communication(
    monkeypatch, host_waits
):
    probe, marks = Probe(), []
    for name in ("Event", "Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(probe, name))
    timer = CudaTimer(torch.device("cuda", 0), host_waits=host_waits)
    pending = Sending("wait", probe.log)
    channels = ["hops", "ends", "hops"]
    for channel in channels:
        assert timer.watch(pending, channel, marks.append) is pending
    assert len(marks) == (0 if host_waits else len(channels))
    expected = [["wait", f"mark on probe {number}"] for number in (1, 2, 1)[: len(marks)]]
    assert probe.log == ["mark on passes", *(event for events in expected for event in events)]
    if marks:
        assert timer.seconds(marks[0]) == 1.0
        assert probe.log[-1] == "synchronize"
    timer.start()
    mark = timer.mark()
    assert timer.seconds(mark) == 1.0
    assert timer.mark(mark) is mark, "a mark is set again"
    assert timer.seconds(mark) == 2.0


class Noting:
    """An observer that notes what it is asked to watch."""

    def __init__(self):
        self.log = []

    def observe(self, item, held_bytes):
        self.log.append(("observe", str(item), held_bytes()))
        return nullcontext()

    def waits(self, action, item):
        self.log.append(("waits", action, str(item)))
        return nullcontext()

    def watch(self, name, channel, pending):
        self.log.append(("watch", name, channel))
        return pending


def test_observers_around_another_pass_on_all_that_they_see():
    for outer in (Named, lambda inner: Recorder(0, HostTimer(), [], inner)):
        inner = Noting()
        observer = outer(inner)
        for token in ("0F0", "0B0"):
            with observer.observe(Pass.parse(token), lambda: 7):
                pass
        with observer.waits(Action.ARRIVE, "x"), observer.waits(Action.OFFLOAD, Pass.parse("0F0")):
            pass
        assert inner.log == [
            *(("observe", "0F0", 7), ("observe", "0B0", 7)),
            *(("waits", Action.ARRIVE, "x"), ("waits", Action.OFFLOAD, "0F0")),
        ]
    named = Named(inner)
    assert named.watch("C0.1", "input", "pending") == "pending"
    assert inner.log[-1] == ("watch", "C0.1", "input")


class Marking(HostOrder):
    """Streams on which a copy ends later, as on a GPU."""

    def mark(self):
        return SimpleNamespace(query=lambda: True)


def is_forward(op):
    return op.action is Action.RUN and op.item.kind is Kind.F


@pytest.mark.parametrize("copies_end_later", [False, True])
def test_an_observer_sees_the_passes_waits_and_messages_of_the_program_in_its_order(
    copies_end_later,
):
    """A copy that has ended when it is issued is nothing to watch.

    The weights of the stages are fixed meanwhile.
    """
    config = offloading(config_of(2, 3, 101, schedule="zb_h1", num_stages=4))
    plan = plan_of(config, 2)

    def work(rank, model, together):
        if copies_end_later:
            model.trainer._link = HostLink(Marking(), CPU)
        observer = Noting()

        @contextmanager
        def fixed_weights():
            observer.log.append(("fixed",))
            yield
            observer.log.append(("free",))

        for stage in model.trainer._modules.stages.values():
            stage.fixed_weights = fixed_weights
        model.train_step(*random_batch(config, 1), observer)
        return observer.log

    moves = (Action.OFFLOAD, Action.OFFLOADED, Action.RELOAD, Action.RESTORED)
    for rank, log in enumerate(run_locally(config, plan, work)):
        expected, reads = [("waits", Action.WAIT, "tokens of all replicas")], []
        stages = len({op.item.stage for op in plan.program.ranks[rank] if is_forward(op)})
        expected += [("fixed",)] * stages
        for op in plan.program.ranks[rank]:
            if op.action is Action.RUN:
                expected.append(("observe", str(op.item)))
            elif op.action in (Action.SEND, Action.RECV):
                expected.append(("watch", str(op.item), f"{op.action} {op.peer}"))
            elif op.action is Action.START:
                expected.append(("watch", str(op.item), op.exchange.end))
            elif op.action is Action.NEED and not op.item.kind.is_vocabulary:
                reads.append(str(op.item))
            elif op.action.waits or op.action in moves:
                expected.append(("waits", op.action, str(op.item)))
            if copies_end_later and op.action in (Action.OFFLOAD, Action.RELOAD):
                expected.append(("watch", str(op), op.action))
        expected += [("free",)] * stages
        expected.append(("waits", Action.WAIT, "messages"))
        seen = [event[:2] if event[0] == "observe" else event for event in log]
        # A stage waits for its weights layer by layer, within its first pass.
        layers = [("waits", Action.NEED, item) for item in reads]
        assert {event for event in seen if event in layers} == set(layers)
        assert [event for event in seen if event not in layers] == expected
        first = seen.index(layers[0])
        assert seen[first - 1] == ("observe", reads[0])
        assert sum(event[0] == "waits" and event[1] in moves for event in log) >= 4


@pytest.mark.parametrize("transfer", Transfer)
@pytest.mark.parametrize("is_root", [False, True])
def test_a_collective_is_issued_and_not_waited_for(monkeypatch, transfer, is_root):
    """The group has three ranks; rank 11 of the run is the root and the second of them."""
    calls, work = [], SimpleNamespace()

    def noted(name):
        def call(*arguments, **options):
            calls.append((name, arguments, options))
            return work

        return call

    names = ("broadcast", "reduce", "all_reduce", "all_to_all_single")
    fake = SimpleNamespace(**{name: noted(name) for name in names})
    fake.ReduceOp = SimpleNamespace(MAX="max")
    fake.get_rank = lambda: 11 if is_root else 12
    fake.get_group_rank = lambda group, root: root - 10
    group = SimpleNamespace(size=lambda: 3, rank=lambda: 1 if is_root else 2)
    monkeypatch.setattr(comms_module, "dist", fake)
    monkeypatch.setattr(comms_module, "all_gather_single", noted("all_gather"))
    own = torch.arange(8.0).view(4, 2)
    issued = _start_collective(group, transfer, own, 11, (2, 0, 5))
    assert issued.work is work
    ((name, arguments, options),) = calls
    assert options.pop("async_op") is True
    rows = len(issued.result)
    match transfer:
        case Transfer.BROADCAST | Transfer.REDUCE:
            assert (name, arguments) == (transfer.value, (own, 11))
            assert options == {"group": group}
            assert issued.result is own
        case Transfer.ALL_MAX | Transfer.ALL_SUM:
            operation = ("max",) if transfer is Transfer.ALL_MAX else ()
            assert (name, arguments) == ("all_reduce", (own, *operation))
            assert options == {"group": group}
            assert issued.result is own
        case Transfer.ALL_GATHER:
            flat, part, of = arguments
            assert (name, part, of, options) == ("all_gather", own, group, {})
            assert (flat.shape, issued.result.shape) == ((12, 2), (3, 4, 2))
            assert flat.data_ptr() == issued.result.data_ptr()
        case Transfer.GATHER | Transfer.SCATTER:
            result, sent, received_rows, sent_rows = arguments
            assert (name, options) == ("all_to_all_single", {"group": group})
            assert result is issued.result
            assert sent is issued.source is own
            to_root = [0, 0 if is_root else 5, 0]
            from_root = [2, 0, 5] if is_root else [0, 0, 0]
            if transfer is Transfer.GATHER:
                assert (sent_rows, received_rows, rows) == (to_root, from_root, sum(from_root))
            else:
                assert (sent_rows, received_rows, rows) == (from_root, to_root, sum(to_root))
            assert issued.result.shape[1:] == (2,)
