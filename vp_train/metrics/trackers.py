"""Metrics for services that follow runs: Weights & Biases and MLflow, by `run.trackers`.

Each has a thread of its own, so that a service that does not answer stops no step.  One that fails
is a warning, and the run goes on without it.  Both read their own environment variables
(WANDB_MODE, MLFLOW_TRACKING_URI, ...).  The folder trackers/ of a run keeps the names under which
they know it, so that a resumed run goes on there.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any, Protocol

from vp_train.config import ConfigError, RunConfig, RunSettings, printable
from vp_train.durable import read_text, replace

_PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
_CLOSE_SECONDS = 60.0  # how long a run waits at its end for a tracker
_MOST_WAITING = 10_000  # steps
_MOST_PARAMETERS = 100  # in one message to MLflow

Record = tuple[int, dict[str, float]]


def require_trackers(settings: RunSettings) -> None:
    """Raise ConfigError if a package that run.trackers needs is not installed."""
    for name in settings.trackers:
        for package in _PACKAGES[name]:
            found = importlib.util.find_spec(package)
            if found is None or found.origin is None:  # a folder of that name is no package
                raise ConfigError(
                    f"run.trackers=[{name}] needs the package {package}, which is not installed; "
                    f"pip install 'vp_train[{name}]', or leave it out"
                )


class Service(Protocol):
    """A service that keeps metrics.  Its methods are called in one thread, and may raise."""

    def record(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self, *, failed: bool) -> None: ...


class Tracker:
    """A writer of metrics that hands them to a service, in a thread.

    A run that goes back to a checkpoint records its steps again: the services keep both.
    """

    def __init__(self, name: str, open_service: Callable[[], Service]) -> None:
        """Start the thread; `open_service` is called in it."""
        self._name, self._open = name, open_service
        self._queue: Queue[Record | None] = Queue(_MOST_WAITING)
        self._has_failed = False
        self._run_failed = False
        self._thread = Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the values of a step, unless the service has failed."""
        if self._has_failed:
            return
        try:
            self._queue.put_nowait((step, dict(values)))
        except Full:
            self._fail(f"it is {_MOST_WAITING:,} steps behind")

    def go_back(self, step: int) -> None:
        pass

    def close(self, *, failed: bool = False) -> None:
        """Wait until the service has everything, for at most a minute."""
        self._run_failed = failed
        until = time.monotonic() + _CLOSE_SECONDS
        try:
            self._queue.put(None, timeout=_CLOSE_SECONDS)
        except Full:
            self._fail(f"it is {_MOST_WAITING:,} steps behind")
            return
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"it has not answered for {_CLOSE_SECONDS:.0f} s")

    def _serve(self) -> None:
        try:
            service = self._open()
            while not self._has_failed and (record := self._queue.get()) is not None:
                service.record(*record)
            service.close(failed=self._run_failed)
        except (Exception, SystemExit) as error:
            self._fail(_reason(error))
        self._drop()

    def _fail(self, reason: str) -> None:
        """Say once that the tracker gets nothing more."""
        if not self._has_failed:
            self._has_failed = True
            _warn(self._name, reason)

    def _drop(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            pass


def _reason(error: BaseException) -> str:
    reason = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {reason.splitlines()[0]}"


def _warn(name: str, reason: str) -> None:
    words = printable(f"run.trackers: {name} failed ({reason}); going on without it")
    print(words, file=sys.stderr, flush=True)


def trackers_of(config: RunConfig, directory: Path) -> Iterator[Tracker]:
    """Yield a tracker for each name in run.trackers.  `directory` is that of the run."""
    services: dict[str, Callable[[RunConfig, Path], Service]] = {"wandb": _Wandb, "mlflow": _Mlflow}
    for name in dict.fromkeys(config.run.trackers):
        make = services[name]
        yield Tracker(name, lambda make=make: make(config, directory))  # type: ignore[misc]


class _Wandb:
    """A run of Weights & Biases, in the folder wandb/ of the run's directory."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        wandb: Any = import_module("wandb")
        known = _known_as("wandb", directory)
        own = known or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", config.run.project),
            name=config.run.name,
            id=own,
            resume="allow",
            dir=str(directory),
            config=asdict(config),
            settings=wandb.Settings(console="off", silent=True, save_code=False, login_timeout=1),
        )
        if self._run.disabled and os.environ.get("WANDB_MODE") != "disabled":
            raise RuntimeError("nobody is logged in; wandb login, or WANDB_MODE=offline")
        if not self._run.offline and self._run.url:
            print(f"wandb     {self._run.url}", file=sys.stderr, flush=True)
        if known is None:
            _keep("wandb", own, directory)
        self._run.define_metric("*", step_metric="step")

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    """A run of MLflow, in mlflow.db of the run's directory unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self._client = _mlflow_client(directory)
        self._entities: Any = import_module("mlflow.entities")
        known = _known_as("mlflow", directory)
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._run = known
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", config.run.project)
        found = self._client.get_experiment_by_name(experiment)
        number = (
            self._client.create_experiment(experiment) if found is None else found.experiment_id
        )
        self._run = self._client.create_run(number, run_name=config.run.name).info.run_id
        _keep("mlflow", self._run, directory)
        settings = [self._entities.Param(name, str(value)) for name, value in _flat(asdict(config))]
        for start in range(0, len(settings), _MOST_PARAMETERS):
            self._client.log_batch(self._run, params=settings[start : start + _MOST_PARAMETERS])

    def record(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1_000)
        metrics = [self._entities.Metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")


def end_failed(settings: RunSettings) -> None:
    """Say of a run whose processes were ended that it has failed, where it still counts as running.

    W&B notices that by itself.  What goes wrong is a warning.
    """
    if "mlflow" not in settings.trackers:
        return
    try:
        known = _known_as("mlflow", settings.directory)
        if known is None:
            return
        client = _mlflow_client(settings.directory)
        if client.get_run(known).info.status == "RUNNING":
            client.set_terminated(known, status="FAILED")
    except Exception as error:
        _warn("mlflow", _reason(error))


def _mlflow_client(directory: Path) -> Any:
    """Return a client of MLflow: of mlflow.db in a run's directory, or of MLFLOW_TRACKING_URI."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow: Any = import_module("mlflow")
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # its import sets the level
    place = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{directory.resolve()}/mlflow.db")
    return mlflow.MlflowClient(tracking_uri=place)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings with their whole names, such as `optim.lr`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _known_as(service: str, directory: Path) -> str | None:
    """Return the name under which `service` knows the run, None if it does not know it yet."""
    path = directory / "trackers" / service
    return read_text(path, follow=False).strip() if path.exists() else None


def _keep(service: str, name: str, directory: Path) -> None:
    """Keep the name under which `service` knows the run."""
    path = directory / "trackers" / service
    path.parent.mkdir(exist_ok=True)
    replace(path, f"{name}\n")
