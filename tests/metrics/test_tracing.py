"""A run traces one step, which no longer warms up."""

from __future__ import annotations

from vp_train.metrics.tracing import traced_step


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
