"""A tracker gets every step and goes on with a resumed run; one that fails never stops the run."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from vp_train.config import ConfigError, RunConfig, RunSettings
from vp_train.config.run import TRACKERS
from vp_train.durable import UnreadableError
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
    if when != "at its end":
        tracker._thread.join(10)
        tracker.record(5, {"loss": 1.0})
        assert tracker._queue.empty(), "nothing is kept for it"
    tracker.close()
    said = capsys.readouterr().err
    assert said == "run.trackers: wandb failed (ValueError: no route); going on without it\n"


@pytest.mark.parametrize(
    ("steps", "reason"), [(2, "it has not answered for 0 s"), (3, "it is 3 steps behind")]
)
def test_a_service_that_does_not_answer_is_said_once_and_stops_neither_steps_nor_the_end(
    monkeypatch, capsys, steps, reason
):
    """The last word of the run takes the place of one of three steps that may wait."""
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    answers = threading.Event()
    tracker = Tracker("mlflow", lambda: answers.wait(60) and Kept())
    for step in range(steps):
        tracker.record(step, {})
    tracker.close()
    said = f"run.trackers: mlflow failed ({reason}); going on without it\n"
    assert capsys.readouterr().err == said
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


class Recorded:
    """A stand-in for an object of a service's package: it notes the calls of its methods."""

    def __init__(self, calls, **attributes):
        self._calls = calls
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        def method(*arguments, **options):
            self._calls.append((name, *arguments, *sorted(options.items())))

        return method


@pytest.fixture
def wandb(monkeypatch):
    """Put a stand-in in the place of wandb; return its calls, and what its run says of itself."""
    calls, attributes = [], {"disabled": False, "offline": False, "url": "https://a.b/run"}

    def init(**options):
        calls.append(("init", options))
        return Recorded(calls, **attributes)

    package = SimpleNamespace(init=init, Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", package)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return calls, attributes


def test_wandb_gets_the_settings_every_step_and_how_the_run_ended(
    wandb, tmp_path, monkeypatch, capsys
):
    calls, _ = wandb
    track("wandb", tmp_path, (1, 2))
    (_, options), *others = calls
    assert (options["project"], options["name"]) == ("vp_train", tmp_path.name)
    assert (options["dir"], options["resume"]) == (str(tmp_path), "allow")
    assert options["config"]["optim"]["lr"] == RunConfig().optim.lr
    assert options["settings"]["console"] == "off"
    assert others[0] == ("define_metric", "*", ("step_metric", "step"))
    assert [call[1]["step"] for call in others[1:3]] == [1, 2]
    assert [call[1]["loss"] for call in others[1:3]] == [1.0, 0.5]
    assert others[3:] == [("finish", ("exit_code", 0))]
    assert capsys.readouterr().err == "wandb     https://a.b/run\n"
    assert (tmp_path / "trackers" / "wandb").read_text() == f"{options['id']}\n"
    calls.clear()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    track("wandb", tmp_path, (3,), failed=True)
    assert (calls[0][1]["id"], calls[0][1]["project"]) == (options["id"], "mine")
    assert calls[-1] == ("finish", ("exit_code", 1))


@pytest.mark.parametrize(
    ("attributes", "mode", "said"),
    [
        ({"offline": True}, None, ""),
        ({"url": None}, None, ""),
        ({"disabled": True, "url": None}, "disabled", ""),
        ({"disabled": True}, None, "RuntimeError: nobody is logged in; wandb login, or WANDB_MODE"),
        ({"disabled": True}, "online", "RuntimeError: nobody is logged in"),
    ],
)
def test_wandb_says_where_a_run_is_and_where_nobody_is_logged_in(
    wandb, tmp_path, monkeypatch, capsys, attributes, mode, said
):
    wandb[1].update(attributes)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    track("wandb", tmp_path, (1,))
    err = capsys.readouterr().err
    assert said in err
    assert bool(said) == bool(err)
    assert (tmp_path / "trackers" / "wandb").exists() == (not said)


@pytest.fixture
def mlflow(monkeypatch):
    """Put a stand-in in the place of mlflow; return the calls of its client."""
    calls, runs, status = [], iter(range(9)), {}

    class Client(Recorded):
        def get_run(self, run):
            return SimpleNamespace(info=SimpleNamespace(status=status[run]))

        def set_terminated(self, run, **options):
            status[run] = options["status"]
            calls.append(("set_terminated", run, *options.items()))

        def get_experiment_by_name(self, name):
            calls.append(("experiment", name))
            return None if name == "vp_train" else SimpleNamespace(experiment_id="7")

        def create_experiment(self, name):
            return "3"

        def create_run(self, number, run_name):
            calls.append(("run", number, run_name))
            run = f"id{next(runs)}"
            status[run] = "RUNNING"
            return SimpleNamespace(info=SimpleNamespace(run_id=run))

    package = SimpleNamespace(MlflowClient=lambda tracking_uri: Client(calls, uri=tracking_uri))
    entities = SimpleNamespace(
        Param=lambda name, value: (name, value),
        Metric=lambda key, value, now, step: (key, value, now > 1e12, step),
    )
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("mlflow").setLevel(logging.INFO)  # as its import does
    return calls


def test_mlflow_gets_each_setting_once_every_step_and_how_the_run_ended(
    mlflow, tmp_path, monkeypatch, capsys
):
    track("mlflow", tmp_path, (1,))
    assert mlflow[:2] == [("experiment", "vp_train"), ("run", "3", tmp_path.name)]
    settings = [
        pair for name, _, (kind, pairs) in mlflow[2:-2] if kind == "params" for pair in pairs
    ]
    expected = dict(trackers._flat(asdict(RunConfig())))
    assert [name for name, _ in settings] == list(expected)
    assert dict(settings)["optim.lr"] == str(RunConfig().optim.lr)
    assert all(len(call[2][1]) <= 100 for call in mlflow[2:-2])
    assert len(mlflow[2:-2]) == -(-len(expected) // 100)
    metrics = [("loss", 1.0, True, 1), ("seconds/step", 0.5, True, 1)]
    assert mlflow[-2:] == [
        ("log_batch", "id0", ("metrics", metrics)),
        ("set_terminated", "id0", ("status", "FINISHED")),
    ]
    assert (tmp_path / "trackers" / "mlflow").read_text() == "id0\n"
    mlflow.clear()
    track("mlflow", tmp_path, (2,), failed=True)
    assert mlflow[0] == ("update_run", "id0", ("status", "RUNNING"))
    assert [name for name, *_ in mlflow] == ["update_run", "log_batch", "set_terminated"]
    assert mlflow[-1] == ("set_terminated", "id0", ("status", "FAILED"))
    (tmp_path / "trackers" / "mlflow").unlink()
    mlflow.clear()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    track("mlflow", tmp_path, ())
    assert mlflow[:2] == [("experiment", "mine"), ("run", "7", tmp_path.name)]
    assert capsys.readouterr().err == ""
    assert logging.getLogger("mlflow").level == logging.WARNING, "it says no more than that"


def test_a_run_that_mlflow_still_counts_as_running_has_failed(
    mlflow, tmp_path, monkeypatch, capsys
):
    run = RunSettings(name=tmp_path.name, root=str(tmp_path.parent), trackers=("mlflow",))
    end_failed(run)  # before the run is known there
    service = trackers._Mlflow(RunConfig(run=run), tmp_path)
    assert service._client.uri == f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.clear()
    end_failed(replace(run, trackers=("wandb",)))
    assert mlflow == []
    for _ in range(2):  # then it is no longer running
        end_failed(run)
        assert mlflow == [("set_terminated", "id0", ("status", "FAILED"))]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a.b")
    assert trackers._mlflow_client(tmp_path).uri == "http://a.b"
    assert capsys.readouterr().err == ""
    (tmp_path / "trackers" / "mlflow").write_text("nobody\n")
    end_failed(run)
    said = "run.trackers: mlflow failed (KeyError: 'nobody'); going on without it\n"
    assert capsys.readouterr().err == said


def test_the_name_of_a_run_in_a_service_is_not_read_through_a_link(tmp_path):
    assert trackers._known_as("wandb", tmp_path) is None
    trackers._keep("wandb", "abc", tmp_path)
    assert trackers._known_as("wandb", tmp_path) == "abc"
    (tmp_path / "trackers" / "wandb").rename(tmp_path / "elsewhere")
    (tmp_path / "trackers" / "wandb").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnreadableError, match="symbolic link"):
        trackers._known_as("wandb", tmp_path)


def track(name, directory, steps, *, failed=False):
    """Record `steps` with the tracker `name` of the run in `directory`."""
    run = RunSettings(name=directory.name, root=str(directory.parent), trackers=(name,))
    (tracker,) = trackers_of(RunConfig(run=run), directory)
    for step in steps:
        tracker.record(step, {"loss": 1.0 / step, "seconds/step": math.nan if step == 2 else 0.5})
    tracker.close(failed=failed)


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
