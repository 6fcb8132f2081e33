"""A run traces one step, which no longer warms up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

from vp_train.metrics.tracing import Tracer, traced_step
from vp_train.pipeline.stopwatch import Stopwatch


def test_a_resumed_run_times_no_step_that_warms_up():
    for trace_step, done, steps, expected in [
        (0, 0, 9, 0),
        (0, 7, 9, 0),
        (5, 0, 9, 5),
        (5, 0, 3, 5),
        (1, 0, 9, 1),
        (5, 3, 9, 5),
        (5, 4, 19, 9),
        (5, 5, 19, 10),
        (5, 12, 19, 17),
        (5, 14, 19, 19),
        (5, 15, 19, 0),
        (5, 18, 19, 0),
        (101, 100, 999, 105),
    ]:
        assert traced_step(trace_step, done, steps) == expected


class Gpu:
    """A timer of a GPU whose stream still has `queued` seconds of work as the host goes on."""

    def __init__(self, queued):
        self.host, self._stream, self.origin = 0.0, queued, None

    def settle(self):
        self.host = max(self.host, self._stream)

    def mark(self, used=None):
        return max(self.host, self._stream)

    def start(self):
        self.origin = self.mark()


def test_a_traced_step_has_one_origin_however_much_each_gpu_has_left_of_the_last_step():
    gpus, all_here = [Gpu(seconds) for seconds in (0.5, 3.0, 1.0)], Barrier(3)

    def begin(rank):
        def barrier():
            all_here.wait()
            latest = max(gpu.host for gpu in gpus)
            all_here.wait()
            gpus[rank].host = latest

        mesh = SimpleNamespace(pipeline_rank=rank, steps=SimpleNamespace(barrier=barrier))
        tracer = Tracer("cuda", mesh, SimpleNamespace(parameters={}), gpus[rank])
        tracer.begin(None, Stopwatch(gpus[rank]))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(begin, range(3)))
    assert [gpu.origin for gpu in gpus] == [3.0] * 3
