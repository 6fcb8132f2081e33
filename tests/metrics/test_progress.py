"""The lines that remain on a terminal and in a log file."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from vp_train.metrics.progress import Progress, StepReport
from vp_train.units import clock

REPORT = StepReport(1, 2.0, 1.0, 1e-3, 10.0, 1.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0:00"), (75, "1:15"), (3599, "59:59"), (3675, "1:01:15"), (360_000, "100:00:00")],
)
def test_the_time_left_reads_like_a_clock(seconds, text):
    assert clock(seconds) == text


def test_a_rank_that_leaves_without_a_word_leaves_the_cursor_visible():
    out = io.StringIO()
    progress = Progress(5, 1, 10, Console(file=out, width=110, force_terminal=True))
    progress.step(REPORT)
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")
    progress.close()


def test_a_line_reaches_the_log_file_before_the_next_step():
    class Flushed(io.StringIO):
        seen = ""

        def flush(self):
            self.seen = self.getvalue()

    out = Flushed()
    Progress(5, 1, 10, Console(file=out, width=110)).step(REPORT)
    assert "loss 2.0000" in out.seen


def test_a_message_longer_than_the_terminal_stays_one_line_of_the_log():
    out = io.StringIO()
    Progress(5, 1, 10, Console(file=out, width=40)).say("step 3: [bold] " + "x" * 200)
    assert out.getvalue() == "step 3: [bold] " + "x" * 200 + "\n"


def test_the_live_line_of_a_narrow_terminal_is_one_line():
    out = io.StringIO()
    progress = Progress(50, 1, 10, Console(file=out, width=40, force_terminal=True))
    progress.step(replace(REPORT, step=2))  # no line that stays: only the live one
    progress._live.refresh()
    assert "\n" not in out.getvalue()
    assert "step  2/50" in out.getvalue()
    progress.close()
