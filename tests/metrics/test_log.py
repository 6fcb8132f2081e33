"""Every step has one record, in the file and in TensorBoard, however often a run is resumed."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.disk import largest_file
from vp_train.metrics.log import MetricsLog


def write(directory, last_step, steps, scale):
    log = MetricsLog(directory / "metrics.jsonl", directory / "tensorboard", last_step)
    for step in steps:
        log.record(step, {"loss": scale * step})
    log.close()


@pytest.mark.parametrize("last_step", [0, 2])
def test_tensorboard_and_file_agree_after_a_resume(tmp_path, last_step):
    write(tmp_path, 0, range(1, 5), 1.0)
    write(tmp_path, last_step, range(last_step + 1, 4), 10.0)
    expected = [(step, step * (10.0 if step > last_step else 1.0)) for step in range(1, 4)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(record["step"], record["loss"]) for record in map(json.loads, lines)] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


def test_a_kill_while_later_steps_are_dropped_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path, 0, range(1, 5), 1.0)
    before = (tmp_path / "metrics.jsonl").read_text()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, [3], 1.0)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_record_can_be_read_at_once_and_every_line_is_strict_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0)
    log.record(1, {"a": math.inf, "b": -math.inf, "c": math.nan, "d": 0.5})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()  # before close: a kill now loses nothing
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": None,
        "d": 0.5,
    }
    log.close()


def test_files_that_cannot_be_written_are_named_once_and_the_run_goes_on(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0)
    log.record(1, {"loss": 1.0})
    with largest_file(40):  # a part of the next line fits
        log.record(2, {"loss": 2.0})
        log.record(3, {"loss": 3.0})
    log.record(4, {"loss": 4.0})
    log.close()
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" cannot be written (File too large)")[0] for line in said] == [
        str(tmp_path / "metrics.jsonl"),
        str(next((tmp_path / "tensorboard").iterdir())),
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 4]


def test_a_full_disk_does_not_end_a_run_that_goes_back(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0)
    for step in (1, 2, 3):
        log.record(step, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_text()
    with largest_file(10):
        log.go_back(2)
        log.record(3, {"loss": 2.0})
    log.record(4, {"loss": 2.0})
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert f"{tmp_path}/metrics.jsonl cannot be written (File too large); going on" in said[0]
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    log.go_back(2)  # there is space again
    log.record(3, {"loss": 3.0})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_removed_directory_is_said_once(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    log = MetricsLog(tmp_path / "run/metrics.jsonl", tmp_path / "run/tensorboard", 0)
    shutil.rmtree(tmp_path / "run")
    for step in (1, 2):
        log.record(step, {"loss": 1.0})
    log.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "run/metrics.jsonl cannot be written (it was removed); steps that it cannot take are"
        in line
    )
    assert not (tmp_path / "run").exists()


def test_a_link_in_the_place_of_a_log_is_not_followed(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tensorboard").symlink_to(tmp_path / "elsewhere")
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0)
    log.record(1, {"loss": 1.0})
    assert "tensorboard cannot be written (it is a symbolic link)" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere" / "lines")
    before = (tmp_path / "elsewhere" / "lines").read_text()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere" / "lines")
    log.go_back(0)
    log.record(1, {"loss": 2.0})
    assert "metrics.jsonl is a symbolic link" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").is_symlink()
    assert [path.read_text() for path in (tmp_path / "elsewhere").iterdir()] == [before]


def test_a_writer_that_cannot_be_closed_leaves_no_other_open(tmp_path, capsys):
    closed = []

    class Other:
        def __init__(self, name):
            self.name = name

        def close(self, *, failed):
            closed.append(self.name)
            raise OSError(errno.EIO, "no answer", self.name)

    others = [Other("a"), Other("b")]
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0, others)
    log.close()
    assert closed == ["a", "b"]
    assert capsys.readouterr().err.count("cannot be written (no answer); going on without") == 2


@pytest.mark.parametrize("back", [0, 1, 2, 3])
def test_tensorboard_and_file_agree_after_a_run_goes_back(tmp_path, back):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0)
    for step in (1, 2, 3):
        log.record(step, {"loss": float(step)})
    log.go_back(back)
    for step in range(back + 1, 5):
        log.record(step, {"loss": 10.0 * step})
    log.close()
    expected = [(step, step * (1.0 if step <= back else 10.0)) for step in range(1, 5)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(record["step"], record["loss"]) for record in map(json.loads, lines)] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
