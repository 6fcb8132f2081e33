"""A tracker gets every step and goes on with a resumed run; one that fails never stops the run."""

from __future__ import annotations

import math
import threading
import time
from importlib.util import find_spec

import pytest

from vp_train.config import TRACKERS, ConfigError, RunConfig, RunSettings
from vp_train.metrics import trackers
from vp_train.metrics.log import MetricsLog
from vp_train.metrics.trackers import Tracker, end_failed, require_trackers, trackers_of


class Kept:
    """A service that keeps what it gets."""

    def __init__(self):
        self.records, self.ended = [], None

    def record(self, step, values):
        self.records.append((step, values))

    def close(self, *, failed):
        self.ended = "failed" if failed else "finished"


@pytest.mark.parametrize("failed", [False, True])
def test_a_tracker_is_one_more_writer_and_has_everything_when_it_is_closed(tmp_path, failed):
    kept = Kept()
    log = MetricsLog(
        tmp_path / "metrics.jsonl", tmp_path / "tb", 0, [Tracker("kept", lambda: kept)]
    )
    for step in (1, 2):
        log.record(step, {"loss": float(step)})
    log.go_back(1)
    log.record(2, {"loss": 3.0})
    log.close(failed=failed)
    assert kept.records == [(1, {"loss": 1.0}), (2, {"loss": 2.0}), (2, {"loss": 3.0})]
    assert kept.ended == ("failed" if failed else "finished")


@pytest.mark.parametrize("when", ["at its start", "at a step", "at its end"])
def test_a_service_that_fails_is_said_once_and_the_steps_go_on(when, capsys):
    class Broken(Kept):
        def record(self, step, values):
            if when == "at a step":
                raise ValueError("no route\nto host")

        def close(self, *, failed):
            raise ValueError("no route")

    def start():
        if when == "at its start":
            raise ValueError("no route")
        return Broken()

    tracker = Tracker("wandb", start)
    for step in range(5):
        tracker.record(step, {"loss": 1.0})
    tracker.close()
    said = capsys.readouterr().err
    assert said == "run.trackers: wandb failed (ValueError: no route); going on without it\n"


def test_a_service_that_does_not_answer_stops_neither_steps_nor_the_end(monkeypatch, capsys):
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    answers = threading.Event()
    tracker = Tracker("mlflow", lambda: answers.wait(60) and Kept())
    for step in range(3):
        tracker.record(step, {})
    tracker.close()
    assert capsys.readouterr().err == (
        "run.trackers: mlflow failed (it is 3 steps behind); going on without it\n"
    )
    for step in range(9):
        tracker.record(step, {})
    tracker.close()
    answers.set()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_refused_with_the_command_that_installs_it(name, monkeypatch):
    settings = RunSettings(trackers=(name,))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"pip install 'vp_train\[{name}\]'"):
        require_trackers(settings)
    require_trackers(RunSettings())


def test_a_folder_with_the_name_of_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "folder_only").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers._PACKAGES, "wandb", ("folder_only",))
    with pytest.raises(ConfigError, match="needs the package folder_only"):
        require_trackers(RunSettings(trackers=("wandb",)))


def installed(name):
    return all(find_spec(package) is not None for package in trackers._PACKAGES[name])


def track(name, directory, steps):
    """Record `steps` with the tracker `name` of the run in `directory`."""
    run = RunSettings(name=directory.name, root=str(directory.parent), trackers=(name,))
    (tracker,) = trackers_of(RunConfig(run=run), directory)
    for step in steps:
        tracker.record(step, {"loss": 1.0 / step, "seconds/step": math.nan if step == 2 else 0.5})
    tracker.close()


@pytest.mark.skipif(not installed("wandb"), reason="needs wandb")
def test_wandb_offline_keeps_a_run_and_its_resume_under_one_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    track("wandb", tmp_path, (1, 2))
    track("wandb", tmp_path, (3,))
    assert capsys.readouterr().err == ""
    name = (tmp_path / "trackers" / "wandb").read_text().strip()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert files
    until = time.monotonic() + 30
    for path in files:  # another process writes them
        while b"seconds/step" not in path.read_bytes():
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.skipif(not installed("mlflow"), reason="needs mlflow-skinny, sqlalchemy and alembic")
def test_mlflow_goes_on_with_the_run_in_the_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track("mlflow", tmp_path, (1, 2))
    track("mlflow", tmp_path, (3,))
    assert "failed" not in capsys.readouterr().err
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'vp_train'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (tmp_path / "trackers" / "mlflow").read_text().strip()
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == str(RunConfig().optim.lr)
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in losses] == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]


@pytest.mark.skipif(not installed("mlflow"), reason="needs mlflow-skinny, sqlalchemy and alembic")
def test_mlflow_knows_a_run_whose_processes_were_ended_as_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = RunSettings(name=tmp_path.name, root=str(tmp_path.parent), trackers=("mlflow",))
    end_failed(run)  # before the run is known there
    service = trackers._Mlflow(RunConfig(run=run), tmp_path)
    assert service._client.get_run(service._run).info.status == "RUNNING"
    end_failed(run)
    assert service._client.get_run(service._run).info.status == "FAILED"
    service.close(failed=False)
    end_failed(run)
    assert service._client.get_run(service._run).info.status == "FINISHED"
    (tmp_path / "trackers" / "mlflow").write_text("nobody\n")
    capsys.readouterr()
    end_failed(run)
    said = capsys.readouterr().err
    assert said.startswith("run.trackers: mlflow failed (")
    assert said.count("\n") == 1
