"""The lines that remain on a terminal and in a log file."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from vp_train.config import ConfigError, RunSettings
from vp_train.config.figures import PROGRESS
from vp_train.metrics import progress as progress_module
from vp_train.metrics.progress import (
    ProgressDisplay,
    Validation,
    folded,
    print_line,
    validation_words,
)
from vp_train.units import clock, plural

SETTINGS = RunSettings(steps=5)
VALUES = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "peak_bytes": 1.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0:00"), (75, "1:15"), (3599, "59:59"), (3675, "1:01:15"), (360_000, "100:00:00")],
)
def test_the_time_left_reads_like_a_clock(seconds, text):
    assert clock(seconds) == text


def test_only_one_thing_is_in_the_singular():
    assert [plural(count, "rank") for count in (0, 1, 2)] == ["ranks", "rank", "ranks"]
    assert plural(2, "microbatch") == "microbatches"


def test_a_rank_that_leaves_without_a_word_leaves_the_cursor_visible():
    out = io.StringIO()
    progress = ProgressDisplay(SETTINGS, 1, Console(file=out, width=110, force_terminal=True))
    progress.step(1, VALUES)
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")
    progress.close()


def test_a_line_reaches_the_log_file_before_the_next_step():
    class Flushed(io.StringIO):
        seen = ""

        def flush(self):
            self.seen = self.getvalue()

    out = Flushed()
    ProgressDisplay(SETTINGS, 1, Console(file=out, width=110)).step(1, VALUES)
    assert "loss 2.0000" in out.seen


def test_a_message_longer_than_the_terminal_stays_one_line_of_the_log():
    out = io.StringIO()
    ProgressDisplay(SETTINGS, 1, Console(file=out, width=40)).say("step 3: [bold] " + "x" * 200)
    assert out.getvalue() == "step 3: [bold] " + "x" * 200 + "\n"


def test_a_line_for_a_terminal_is_printed_as_it_is():
    line, out = "step 3: [bold]12[/bold] 'runs/x' https://a.b " + "x" * 200, io.StringIO()
    print_line(Console(file=out, width=40, force_terminal=True), line)
    assert out.getvalue() == f"{line}\n"


@pytest.fixture
def stopped(monkeypatch):
    """Stop the clock: on a busy machine even a few lines take seconds."""
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: 100.0))


@pytest.mark.parametrize("width", [40, 80])
def test_the_live_lines_of_a_terminal_cut_nothing(width, stopped):
    out = io.StringIO()
    settings = RunSettings(steps=50, progress=PROGRESS)
    progress = ProgressDisplay(settings, 1, Console(file=out, width=width, force_terminal=True))
    progress.step(2, dict.fromkeys(PROGRESS, 0.25))  # no line that stays: only the live ones
    progress._live.refresh()
    shown = out.getvalue()
    for words in ("step  2/50", "loss 0.2500", "waiting worst 250 ms", "MFU 25.0%", "0:00 left"):
        assert words in shown
    assert "…" not in shown
    progress.close()


def test_parts_are_folded_between_and_never_within():
    parts = ["step 1/9", "loss 1.0", "a part that is too long", "left"]
    assert folded(parts, 18) == ["step 1/9  loss 1.0", "a part that is too long", "left"]
    assert folded(parts, 17) == ["step 1/9", "loss 1.0", "a part that is too long", "left"]
    assert folded(parts, 99) == ["  ".join(parts)]


def test_a_line_has_the_chosen_figures_in_their_order_and_leaves_out_what_is_unknown():
    out = io.StringIO()
    settings = RunSettings(steps=5, progress=("mfu", "seconds/waiting_worst", "loss"))
    progress = ProgressDisplay(settings, 1, Console(file=out, width=20))
    progress.step(1, {"loss": 2.0, "seconds/waiting_worst": 0.05})
    progress.step(5, {"loss": 2.0, "seconds/waiting_worst": 0.05})
    assert out.getvalue().splitlines() == [
        "run.progress: not known on this device, so left out: mfu (mfu: cluster has no peak of "
        "this device)",
        "step 1/5  waiting worst 50 ms  loss 2.0000",
        "step 5/5  waiting worst 50 ms  loss 2.0000",
    ]
    with pytest.raises(ConfigError, match=r"run.progress='bubble' is not known"):
        RunSettings(progress=("bubble",))


def test_a_run_that_goes_back_behind_its_first_step_still_knows_the_time_left(stopped):
    """The run goes back from step 101, whose checkpoint is damaged, to that of step 99."""
    out = io.StringIO()
    settings = RunSettings(steps=102, log_every=1, progress=("left",))
    progress = ProgressDisplay(settings, 101, Console(file=out, width=80))
    for step in (101, 99, 100, 101, 102):
        progress.step(step, {})
    assert out.getvalue().count("0:00 left") == 5


@pytest.mark.parametrize(("first", "every"), [(1, 1), (1, 3), (2, 3), (4, 4), (7, 100)])
def test_the_first_step_the_last_one_and_every_few_of_them_stay(first, every):
    out = io.StringIO()
    settings = RunSettings(steps=11, log_every=every, progress=("loss",))
    progress = ProgressDisplay(settings, first, Console(file=out, width=80))
    for step in range(first, 12):
        progress.step(step, {"loss": float(step)})
    said = [int(line.split("/")[0].split()[-1]) for line in out.getvalue().splitlines()]
    assert said == [s for s in range(first, 12) if s % every == 0 or s in (first, 11)]


def test_the_time_left_is_that_of_as_many_steps_as_are_left(monkeypatch):
    now, out = [100.0], io.StringIO()
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    settings = RunSettings(steps=9, log_every=1, progress=("left",))
    progress = ProgressDisplay(settings, 3, Console(file=out, width=80))
    for step, left in ((3, "1:00"), (4, "0:50"), (5, "0:40"), (9, "0:00")):
        now[0] += 10.0 * ((step == 9 and 4) or 1)
        progress.step(step, {})
        assert out.getvalue().splitlines()[-1] == f"step {step}/9  {left} left"


def test_what_is_unknown_at_the_first_step_is_said_there_and_not_again():
    out = io.StringIO()
    settings = RunSettings(steps=3, log_every=1, progress=("bubble_mean", "loss"))
    progress = ProgressDisplay(settings, 1, Console(file=out, width=80))
    for step in (1, 2, 3):
        progress.step(step, {"loss": 1.0})
    first, *others = out.getvalue().splitlines()
    assert first == "run.progress: not known on this device, so left out: bubble_mean"
    assert others == [f"step {step}/3  loss 1.0000" for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("found", "values"),
    [
        (Validation("", 1.25), {"validation_loss": 1.25}),
        (
            Validation("", 1.25, 0.0),
            {"validation_loss": 1.25, "validation_bits_per_byte": 0.0},
        ),
        (
            Validation("code", 2.0, 0.5),
            {"validation/code/loss": 2.0, "validation/code/bits_per_byte": 0.5},
        ),
    ],
)
def test_a_validation_is_known_by_the_name_of_its_set(found, values):
    assert found.values() == values


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([Validation("", 1.25)], "validation loss 1.2500"),
        ([Validation("", 1.25, 0.0)], "validation loss 1.2500 (0.000 bits/byte)"),
        ([Validation("code", 2.0, 0.5)], "validation loss code 2.0000 (0.500 bits/byte)"),
        (
            [Validation("", 8.295, 4.38), Validation("val", 8.2807), Validation("b", 8.0, 3.967)],
            "validation loss held out 8.2950 (4.380 bits/byte)  val 8.2807  b 8.0000 (3.967)",
        ),
        (
            [Validation("a", 1.0), Validation("b", 2.0, 0.5)],
            "validation loss a 1.0000  b 2.0000 (0.500 bits/byte)",
        ),
    ],
)
def test_sets_share_a_line_that_says_the_unit_once(found, words):
    assert validation_words(found) == words


def test_no_older_step_stands_below_a_line_that_stays():
    out = io.StringIO()
    settings = RunSettings(steps=50, log_every=20)
    progress = ProgressDisplay(settings, 1, Console(file=out, width=80, force_terminal=True))
    for step, stays in ((18, False), (19, False), (20, True)):
        progress.step(step, {"loss": 0.25})
        shown = out.getvalue().rpartition("\x1b[2K")[2]
        assert re.findall(r"step (\d+)/", shown) == [str(step)], "at once, and only once"
        assert shown.endswith("\n") == stays
    progress.say("step 20  validation loss 0.2500")
    assert "19/50" not in out.getvalue().rpartition("\x1b[2K")[2]
    progress.close()


def test_no_live_line_stays_at_the_end():
    out = io.StringIO()
    progress = ProgressDisplay(
        RunSettings(steps=50), 1, Console(file=out, width=80, force_terminal=True)
    )
    progress.step(2, {"loss": 0.25})
    progress._live.refresh()
    assert "step  2/50" in out.getvalue().rpartition("\x1b[2K")[2]
    progress.close()
    assert "step" not in out.getvalue().rpartition("\x1b[2K")[2]
    ProgressDisplay(RunSettings(steps=50), 1, Console(file=out, width=80)).close()
