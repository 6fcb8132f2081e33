"""Every moment of a rank is charged to one part of its step, and a rank that is late is seen."""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from schedules.ir import Pass
from schedules.lower import Action
from tests.local import run_locally
from tests.pipeline.equivalence import config_of
from tests.pipeline.truth import random_batch
from tests.training import begin, laid_out
from tests.training import config_of as run_config_of
from vp_train.pipeline.stopwatch import Part, Stopwatch
from vp_train.pipeline.timers import CudaTimer, HostTimer
from vp_train.planning.plan import make_plan

LOADING_SECONDS = 0.2  # before the first step


class Counting:
    """A timer whose marks are one second apart, and which counts those it had to make."""

    def __init__(self):
        self.made, self._seconds = 0, itertools.count()

    def mark(self, used=None):
        self.made += used is None
        mark = used or SimpleNamespace()
        mark.second = next(self._seconds)
        return mark

    def between(self, marks):
        return [after.second - before.second for before, after in itertools.pairwise(marks)]


def spent(seconds):
    return {part: value for part, value in seconds.items() if value}


def test_time_belongs_to_the_last_switch_and_a_part_may_come_twice():
    watch = Stopwatch(Counting())
    assert spent(watch.take()) == {}
    for part in (Part.DATA, Part.DATA, Part.OPTIMIZER, Part.DATA, Part.WAITING):
        watch.switch(part)
    assert spent(watch.take()) == {Part.REST: 1, Part.DATA: 2, Part.OPTIMIZER: 1}
    assert spent(watch.take()) == {}  # waiting has not ended
    watch.switch(Part.REST)
    assert spent(watch.take()) == {Part.WAITING: 1}


def test_a_restart_forgets_what_was_before():
    watch = Stopwatch(Counting())
    watch.switch(Part.DATA)
    watch.restart()
    watch.switch(Part.OPTIMIZER)
    assert spent(watch.take()) == {Part.REST: 1}


def test_a_wait_within_a_pass_is_no_part_of_it_and_a_wait_between_lasts_to_the_next_pass():
    watch = Stopwatch(Counting())
    with watch.observe(Pass.parse("0F0"), lambda: 0), watch.waits(Action.NEED, "weights"):
        pass
    with watch.waits(Action.ARRIVE, "1B0"):
        pass
    with watch.observe(Pass.parse("0S0"), lambda: 0):
        pass
    watch.switch(Part.REST)
    assert spent(watch.take()) == {
        Part.REST: 1,
        Part.FORWARD_BACKWARD: 2,
        Part.GRADIENT_SUM: 1,
        Part.WAITING: 1,
        Part.VOCABULARY: 1,
    }


def test_a_wait_for_data_goes_on_as_data_and_no_other_wait_does():
    """The part that the time before belonged to does not matter."""
    watch = Stopwatch(Counting())
    watch.switch(Part.DATA)
    with watch.waits(Action.WAIT, "tokens"):
        pass
    watch.switch(Part.OPTIMIZER)
    assert spent(watch.take()) == {Part.REST: 1, Part.DATA: 2, Part.WAITING: 1}
    watch.switch(Part.DATA)
    watch.take()  # what comes next begins with data
    watch.switch(Part.OPTIMIZER)
    with watch.waits(Action.WAIT, "tokens"):
        pass
    watch.switch(Part.REST)
    assert spent(watch.take()) == {Part.DATA: 1, Part.OPTIMIZER: 1, Part.WAITING: 1}


def test_marks_are_used_again_so_a_run_needs_those_of_one_step():
    timer = Counting()
    watch, made = Stopwatch(timer), []
    for _ in range(4):
        for part in (*Part, *Part):
            watch.switch(part)
        assert sum(watch.take().values()) == 2 * len(Part)
        made.append(timer.made)
    assert made[0] == made[-1] == 2 * len(Part) + 1


class Late:
    """The stopwatch of a rank whose forwards take longer."""

    def __init__(self, watch, seconds):
        self._watch, self._seconds = watch, seconds
        self.waits, self.watch = watch.waits, watch.watch

    @contextmanager
    def observe(self, item, held_bytes):
        with self._watch.observe(item, held_bytes):
            if item.kind == "F":
                time.sleep(self._seconds)
            yield


def test_ranks_wait_as_long_as_the_slowest_computes():
    m, late = 4, 0.04

    def work(rank, model, together):
        watch = Stopwatch(HostTimer())
        model.gradients.zero()
        model.train_step(*random_batch(config, 1), watch)  # the first one allocates
        model.optimizer.reduce()
        together.gather(rank, None)
        watch.switch(Part.DATA)
        watch.take()
        model.train_step(*random_batch(config, 1), Late(watch, late if rank else 0.0))
        watch.switch(Part.REST)
        return watch.take()

    config = config_of(2, m, 101)
    early, slow = run_locally(config, make_plan(config, 2), work)
    assert slow[Part.FORWARD_BACKWARD] >= m * late
    assert early[Part.WAITING] >= 0.9 * m * late
    assert early[Part.FORWARD_BACKWARD] < slow[Part.FORWARD_BACKWARD]
    assert early[Part.VOCABULARY] > 0


def parts_and_walls(rank, num_ranks, config):
    """Return for every step its seconds by part, and the seconds between the exchanges."""
    run = begin(rank, num_ranks, config)
    found, inner, ends = [], run._stopwatch.take, [time.perf_counter()]
    run._stopwatch.take()

    def take():
        ends.append(time.perf_counter())
        found.append(inner())
        return found[-1]

    run._stopwatch.take = take
    time.sleep(LOADING_SECONDS)
    for step in run.steps():
        run.train_step(step)
    run.finish()
    return found, [after - before for before, after in itertools.pairwise(ends)]


@pytest.mark.parametrize("optimizer", ["adamw", "zero1"])
def test_the_parts_of_a_step_and_the_rest_are_its_wall_time_on_every_rank(
    ranks, tmp_path, optimizer
):
    config = run_config_of(tmp_path, steps=6, checkpoint_every=2, eval_every=3)
    if optimizer == "zero1":
        config = laid_out(config, pp=1, dp=2, optimizer="zero1")
    for parts, walls in ranks(2).run(parts_and_walls, config):
        assert len(parts) == len(walls) == 6
        assert sum(parts[0].values()) <= walls[0] - LOADING_SECONDS + 5e-3
        for part, wall in zip(parts[1:], walls[1:], strict=True):
            assert sum(part.values()) == pytest.approx(wall, abs=5e-3)
            assert min(part.values()) >= 0
            assert part[Part.FORWARD_BACKWARD] > 0
        assert [bool(part[Part.VALIDATION]) for part in parts] == [False] * 3 + [True] + [False] * 2
        assert parts[2][Part.CHECKPOINT] > parts[0][Part.CHECKPOINT]


class Event:
    """torch.cuda.Event, for a machine without a GPU."""

    waited: list[Event]

    def __init__(self, enable_timing):
        assert enable_timing
        self.moments = []

    def record(self, stream):
        self.moments.append(stream())

    def elapsed_time(self, after):
        return after.moments[-1] - self.moments[-1]

    def synchronize(self):
        self.waited.append(self)


def test_on_a_gpu_a_step_waits_once_and_its_seconds_are_those_of_the_stream(monkeypatch):
    milliseconds = itertools.count(0.0, 500.0)
    monkeypatch.setattr(Event, "waited", [], raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: milliseconds.__next__)
    watch = Stopwatch(CudaTimer(torch.device("cuda", 0)))
    for _ in range(2):
        Event.waited.clear()
        for part in (Part.DATA, Part.FORWARD_BACKWARD, Part.WAITING):
            watch.switch(part)
        seconds = watch.take()
        assert seconds[Part.DATA] == seconds[Part.FORWARD_BACKWARD] == 0.5
        (last,) = Event.waited
        assert last.moments[-1] == next(milliseconds) - 500.0, "nothing was recorded after it"
