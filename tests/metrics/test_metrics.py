"""The files of a run: its locked directory, one record per step, and lines for a log file."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from vp_train.config import ConfigError, RunSettings
from vp_train.metrics.log import MetricsLog
from vp_train.metrics.progress import ProgressDisplay, StepReport
from vp_train.metrics.run_directory import RunDirectory, make_directory, refuse_used
from vp_train.metrics.summary import RankSummary, rank_table
from vp_train.planning.degrees import Degrees
from vp_train.units import human_bytes

HOLDER = """
import sys
from vp_train.config import RunSettings
from vp_train.metrics.run_directory import RunDirectory
directory = RunDirectory(RunSettings(root=sys.argv[1]))
print("holding", flush=True)
sys.stdin.read()
"""


def test_a_directory_in_use_is_refused_and_free_again_when_its_process_is_killed(tmp_path):
    settings = RunSettings(root=str(tmp_path))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "holding\n"
    with pytest.raises(ConfigError, match=f"is in use by process {holder.pid}"):
        RunDirectory(settings)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert RunDirectory(settings).path == tmp_path / "default"


@pytest.mark.parametrize("name", ["", "checkpoints", "logs"])
def test_a_directory_of_a_run_that_takes_no_file_is_named_with_the_way_out(
    tmp_path, monkeypatch, name
):
    settings = RunSettings(root=str(tmp_path), resume=True)
    place = settings.directory / name
    place.mkdir(parents=True)
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != place and access(path, mode))
    with pytest.raises(OSError, match="let this user write there, or set") as caught:
        make_directory(settings)
    assert caught.value.filename == str(place)


def test_a_finished_run_is_not_overwritten(tmp_path):
    settings = RunSettings(root=str(tmp_path))
    directory = RunDirectory(settings)
    directory.metrics.write_text('{"step": 1}\n')
    with pytest.raises(
        ConfigError, match=r"already holds a run; continue it with run\.resume=true"
    ):
        refuse_used(settings)
    refuse_used(replace(settings, resume=True))
    refuse_used(replace(settings, name="other"))


@pytest.mark.parametrize(
    ("program", "shown"),
    [("/bin/vp-train", "/bin/vp-train"), ("/lib/vp_train/__main__.py", "vp-train")],
)
def test_the_environment_names_versions_and_a_command_for_a_shell(
    tmp_path, monkeypatch, program, shown
):
    monkeypatch.setattr(sys, "argv", [program, "run.steps=1"])
    directory = RunDirectory(RunSettings(root=str(tmp_path)))
    directory.write_environment(["too much is left out"])
    environment = json.loads((directory.path / "env.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["command"] == [shown, "run.steps=1"]
    assert environment["warnings"] == ["too much is left out"]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_step_has_one_record_after_a_resume_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, tmp_path / "tensorboard", 0)
    for step in (1, 2, 3):
        log.record(step, {"loss": step / 2, "grad_norm": math.nan})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    log = MetricsLog(path, tmp_path / "tensorboard", 2)
    log.record(3, {"loss": 9.0})
    log.close()
    assert [(record["step"], record["loss"]) for record in records(path)] == [
        (1, 0.5),
        (2, 1.0),
        (3, 9.0),
    ]
    assert records(path)[0]["grad_norm"] is None
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_log_file_gets_plain_lines_every_few_steps():
    out = io.StringIO()
    figures = {"interval_tokens_per_second": 12_345.6, "bubble_mean": 0.25}
    progress = ProgressDisplay(RunSettings(steps=25), 3, Console(file=out, width=80))
    for step in range(3, 26):
        report = StepReport(step, 2.0, 1.0, 1e-3, 1.0, 2.5 * 2**30, figures=figures)
        progress.step(step, report.values())
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/25", "10/25", "20/25", "25/25"]
    for part in (
        "loss 2.0000",
        "grad norm 1.000",
        "lr 1.00e-03",
        "12,346 tokens/s",
        "bubble 25.0%",
        "peak 2.50 GiB",
        "0:00 left",
    ):
        assert part in lines[-1]
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize(("norm", "words"), [(123.4567, "123.457"), (1.5e20, "1.500e+20")])
def test_a_gradient_norm_stays_short_however_large_it_is(norm, words):
    out = io.StringIO()
    progress = ProgressDisplay(RunSettings(steps=1), 1, Console(file=out, width=80))
    progress.step(1, StepReport(1, 2.0, norm, 1e-3, 1.0, 1.0).values())
    assert f"  grad norm {words}  " in out.getvalue()


def test_a_terminal_gets_a_live_line():
    out = io.StringIO()
    console = Console(file=out, width=110, force_terminal=True)
    progress = ProgressDisplay(RunSettings(steps=5), 1, console)
    progress.step(1, {"loss": 2.0})
    progress.close()
    assert "\x1b[" in out.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"), (3 * 2**40, "3,072.00 GiB")],
)
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text


def test_the_table_fits_and_shows_prediction_beside_measurement():
    out = io.StringIO()
    row = RankSummary(
        rank=31,
        layers="120-127",
        vocabulary_rows=262_144,
        num_parameters=21_000_000_000,
        busy=0.9,
        predicted_bubble=0.1,
        measured_bubble=0.123,
        predicted_bytes=80 * 2**30,
        measured_bytes=81 * 2**30,
        peak_bytes=99 * 2**30,
    )
    Console(file=out, width=110).print(rank_table([row], "title", Degrees(1, 32, 1)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 110
    assert not any("…" in line for line in lines)
    (body,) = [line for line in lines if "120-127" in line]
    for part in (
        "31",
        "262,144",
        "21.00 B",
        "90.0%",
        "10.0%",
        "12.3%",
        "80.00 GiB",
        "81.00 GiB",
        "99.00 GiB",
    ):
        assert part in body
