"""Laws of the executor's parts: messages without a waiter, `Once`, `Buffers`, and the recorder."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.distributed as dist

from schedules.ir import Pass
from schedules.lower import Action
from schedules.timeline import Span
from schedules.vocab import Transfer
from tests.local import run_locally
from tests.pipeline.equivalence import config_of
from tests.pipeline.test_comms import comms_of, exchange, started, unwatched
from tests.pipeline.truth import random_batch
from vp_train.config import VocabConfig
from vp_train.pipeline.buffers import Buffers, Once
from vp_train.pipeline.recorder import Recorder, joined_communications
from vp_train.planning.plan import make_plan

LATE_SECONDS = 0.4


def drain_without_a_waiter(rank, world_size, what):
    """Return the seconds until rank 0 has drained, and whether its message lived until then.

    Rank 1 is late.  It returns the message that it receives.
    """
    comms = comms_of(world_size)
    message = torch.full((4,), rank + 1.0)
    alive = weakref.ref(message.untyped_storage())
    dist.barrier()
    start = time.monotonic()
    if rank == 1:
        time.sleep(LATE_SECONDS)
    if what == "collective":
        assert (
            started(
                comms, exchange(Transfer.ALL_SUM, delivers=False), lambda message=message: message
            )[0]
            is None
        )
    elif rank == 0:
        comms.send(message, 1, watch=unwatched)
    else:
        return comms.receive(torch.empty(4), 0, watch=unwatched).wait().tolist()
    data = message.data_ptr()
    del message
    gc.collect()
    # These tensors would reuse the memory of the message if it was freed too early.
    scribble = [torch.full((4,), -7.0) for _ in range(1000)]
    reused = any(other.data_ptr() == data for other in scribble)
    lived = alive() is not None
    comms.drain()
    return time.monotonic() - start, lived and not reused


@pytest.mark.parametrize("what", ["collective", "hop"])
def test_a_message_without_a_waiter_lives_until_drain_has_waited_for_it(ranks, what):
    first, second = ranks(2).run(drain_without_a_waiter, what)
    seconds, alive = first
    assert seconds >= 0.9 * LATE_SECONDS  # the barrier lets ranks go at slightly different times
    assert alive
    if what != "collective":
        assert second == [1.0] * 4


def sum_without_a_waiter(rank, world_size):
    """Return the sums in place after `drain`; rank 1 joins all of them late."""
    comms = comms_of(world_size)
    messages = [torch.full((4,), rank + 1.0 + count) for count in range(3)]
    dist.barrier()
    for message in messages:
        if rank == 1:
            time.sleep(LATE_SECONDS / 2)
        started(comms, exchange(Transfer.ALL_SUM, delivers=False), lambda message=message: message)
    comms.drain()
    return [message.tolist() for message in messages]


def test_what_drain_has_waited_for_is_complete(ranks):
    assert ranks(2).run(sum_without_a_waiter) == [[[3.0 + 2 * count] * 4 for count in range(3)]] * 2


def test_an_action_is_done_once_however_often_it_is_called():
    done = []
    once = Once(lambda: done.append(1))
    assert done == []
    for first in (True, False, False):
        assert once() is first
        assert done == [1]


def test_an_action_is_done_once_by_two_threads_and_both_return_after_it():
    for _ in range(20):
        done, seen, together = [], [], threading.Barrier(3)

        def act(done=done):
            time.sleep(0.002)
            done.append(1)

        once = Once(act)

        def call(once=once, done=done, seen=seen, together=together):
            together.wait()
            once()
            seen.append(len(done))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert done == [1]
        assert seen == [1, 1, 1]


def test_a_value_is_put_once_and_taken_once_and_what_is_left_is_named():
    buffers: Buffers[str] = Buffers()
    buffers.put("x", 1, 0, "first")
    buffers.put("x", 1, 1, "second")
    with pytest.raises(AssertionError, match=r"\('x', 1, 0\) is put twice"):
        buffers.put("x", 1, 0, "third")
    assert buffers.look("x", 1, 0) == buffers.take("x", 1, 0) == "first"
    assert buffers.look("x", 1, 0) is None
    with pytest.raises(KeyError):
        buffers.take("x", 1, 0)
    with pytest.raises(AssertionError, match=r"left over after the step: .*'x', 1, 1"):
        buffers.assert_empty()
    buffers.take("x", 1, 1)
    buffers.assert_empty()


class Ticking:
    """A timer on which every call of `mark` takes one second."""

    def __init__(self):
        self._marks, self._origin = itertools.count(1000.0), 0.0

    def start(self):
        self._origin = self.mark()

    def mark(self, used=None):
        return next(self._marks)

    def between(self, marks):
        return [after - before for before, after in itertools.pairwise(marks)]

    def seconds(self, mark):
        return mark - self._origin

    def watch(self, pending, channel, done):
        return pending


def test_spans_start_at_the_moment_from_which_they_count():
    timer = Ticking()
    recorder = Recorder(3, timer, [])
    timer.start()
    for token in ("0F0", "0S0"):
        with recorder.observe(Pass.parse(token), lambda: 0):
            timer.mark()
    assert [(span.rank, span.name, span.start, span.end) for span in recorder.spans] == [
        (3, "0F0", 1.0, 3.0),
        (3, "0S0", 4.0, 6.0),
    ]


def test_the_processor_seconds_of_a_pass_leave_out_what_its_thread_sleeps():
    recorder = Recorder(0, Ticking(), [])
    with recorder.observe(Pass.parse("0F0"), lambda: 0):
        time.sleep(0.03)
    with recorder.observe(Pass.parse("0B0"), lambda: 0):
        until = time.thread_time() + 0.01
        while time.thread_time() < until:
            pass
    asleep, awake = recorder.processor_seconds
    assert 0 <= asleep < 0.01 <= awake < 0.02


def test_communications_are_recorded_from_issue_to_end_under_what_they_are():
    """A hop, a barrier and two kinds of copies; one that has not ended is left out."""

    class Ending(Ticking):
        def watch(self, pending, channel, done):
            if pending != "never ends":
                done(self.mark())
            return pending

    recorder = Recorder(2, Ending(), [])
    for name, pending in (
        ("0F3", "a"),
        ("C1b.5", "b"),
        ("offload:0F4", "c"),
        ("1B0", "never ends"),
    ):
        assert recorder.watch(name, "channel", pending) == pending
    with recorder.waits(Action.RELOAD, Pass.parse("3F4")):
        pass
    with recorder.waits(Action.NEED, Pass.parse("3F4")):
        pass
    found = [(s.name, s.kind, s.stage, s.microbatch) for s in recorder.communications]
    assert found == [
        ("0F3", "hop", -1, -1),
        ("C1b.5", "C1b", -1, 5),
        ("offload:0F4", "offload", -1, -1),
        ("reload:3F4", "reload", 3, 4),
    ]
    assert all(span.end - span.start == 1 and span.rank == 2 for span in recorder.communications)


def test_what_a_rank_has_to_keep_is_what_it_saved_and_holds_until_its_backward():
    weight, held = torch.nn.Parameter(torch.ones(8, dtype=torch.float64)), {"bytes": 0}
    recorder, peaks = Recorder(0, Ticking(), [weight]), []
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    for token, num_bytes in (("0F0", 0), ("0F1", 0), ("0S0", 1000), ("0B0", 24), ("0F2", 0)):
        held["bytes"] = num_bytes
        with recorder.observe(Pass.parse(token), lambda: held["bytes"]):
            if "F" in token:
                (x * weight[:4]).exp()  # saves x, its result, and a view of the weight
        peaks.append(recorder.peak_bytes)
    of_one = 2 * 4 * 8
    assert peaks == [of_one, 2 * of_one, *[2 * of_one + 1000] * 3]


def test_a_communication_begins_where_the_last_rank_issues_it_and_ends_where_it_ends_last():
    random, spans = Random(0), []
    for rank in range(3):
        own = []
        for number in range(20):
            start = random.randrange(50)
            own.append(Span(rank, f"C0.{number}", "C0", -1, number, start, start + 1.0 + rank))
        spans.append(own)
    spans[1].pop()  # one that a rank takes no part in
    joined = joined_communications(spans)
    assert sorted(span.microbatch for span in joined) == list(range(20))
    assert [span.start for span in joined] == sorted(span.start for span in joined)
    for span in joined:
        of_it = [other for own in spans for other in own if other.name == span.name]
        last = max(of_it, key=lambda other: other.end)
        assert (span.end, span.rank) == (last.end, last.rank)
        assert span.start == min(max(other.start for other in of_it), span.end)


def recorded(config):
    """Return for each rank the peak of a recorded step, and its spans on a `Ticking` timer."""

    def work(rank, model, together):
        timer = Ticking()
        recorder = PassRecorder(rank, timer, list(model.parameters.values()))
        timer.start()
        model.train_step(*random_batch(config, 1), recorder)
        return recorder.peak_bytes, [(span.start, span.end) for span in recorder.spans]

    return run_locally(config, make_plan(config, 2), work)


class PassRecorder(Recorder):
    def watch(self, name, channel, pending):
        return pending


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "v_half"])
def test_a_full_pipeline_keeps_no_more_with_more_microbatches(schedule):
    peaks = []
    for m in (1, 6, 12, 24):
        results = recorded(config_of(2, m, 101, schedule=schedule, num_stages=4))
        peaks.append([peak for peak, _ in results])
        for _, spans in results:
            assert spans == [(2.0 * count + 1, 2.0 * count + 2) for count in range(len(spans))]
    few, *full = peaks
    assert full[0] == full[1] == full[2]
    for alone, many in zip(few, full[0], strict=True):
        assert 0 < alone < many


@pytest.mark.parametrize("p", [1, 2])
def test_the_output_of_the_last_layer_gives_the_log_probabilities_where_it_is_asked_for(p):
    """Every sequence is asked at a position of its own, in microbatches of two."""
    config = config_of(p, 2, 101, vocab=VocabConfig("none"))
    config = replace(config, run=replace(config.run, eval_microbatches=3))
    plan = make_plan(config, p)
    tokens = torch.randint(101, (3, 2, 6), generator=torch.Generator().manual_seed(4))
    labels, positions = tokens.roll(1, -1), torch.tensor([[0, 5], [3, 1], [5, 2]])

    def work(rank, model, together):
        logprobs = model.evaluator.logprobs(tokens, labels)
        x = model.evaluator.hidden(tokens, positions)
        return logprobs, x, model.parameters.get("output.weight")

    *others, (logprobs, x, matrix) = run_locally(config, plan, work)
    assert all(found[:2] == (None, None) for found in others)
    assert x.shape == (3, 2, 16)
    expected = torch.log_softmax(x.double() @ matrix.double().T, -1)
    for i, b in itertools.product(range(3), range(2)):
        at = int(positions[i, b])
        found = expected[i, b, labels[i, b, at]]
        assert logprobs[i, b, at].item() == pytest.approx(found.item(), rel=1e-9)


def test_a_batch_of_another_number_of_microbatches_is_refused_with_the_setting_to_change():
    config = config_of(1, 2, 101)
    config = replace(config, run=replace(config.run, eval_microbatches=3))

    def work(rank, model, together):
        for executor, count, words in (
            (
                model.trainer.step,
                3,
                "3 microbatches for a program of 2; pass 2, or .* with num_mic",
            ),
            (
                model.evaluator.logprobs,
                2,
                "2 microbatches for a program of 3; pass 3, or .* with run.eval_m",
            ),
        ):
            batch = torch.zeros(count, 2, 6, dtype=torch.int64)
            with pytest.raises(ValueError, match=words):
                executor(batch, batch)
        batch = torch.zeros(2, 2, 6, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"call logprobs of RankModel\.evaluator instead"):
            model.trainer.logprobs(batch, batch)
        assert model.trainer.operation is None

    run_locally(config, make_plan(config, 1), work)
