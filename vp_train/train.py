"""The main path: one rank of one run, from configuration to checkpoint.  Read it top to bottom."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from schedules.timeline import Span, Timeline
from vp_train.assembly import RankModel, build_rank, rank_device
from vp_train.checkpoint.store import CheckpointError, find, latest
from vp_train.checkpoint.training import load_weights, restore_run, save_run
from vp_train.communication import flight_recorder
from vp_train.communication.nccl import set_environment, watch
from vp_train.config import ConfigError, RunConfig
from vp_train.data import Batch, Source, open_source
from vp_train.data.ahead import Ahead
from vp_train.failures import (
    EXIT_CONFIG,
    EXIT_INTERNAL,
    EXIT_IO,
    EXIT_OK,
    LOST_PEER,
    peer_failure,
    silent_peer,
)
from vp_train.mesh import Mesh, build_mesh
from vp_train.metrics.progress import StepReport
from vp_train.metrics.reporter import Reporter
from vp_train.metrics.run_directory import RunDirectory, run_path
from vp_train.optim.adamw import StepHealth, clip_scale, gather_health, learning_rate
from vp_train.pipeline.recorder import Recorder, joined_communications, timer_of
from vp_train.planning.plan import RunPlan, make_plan

_UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)
_MAX_SKIPS = 10  # non-finite steps in a row that run.on_nonfinite=skip tolerates


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the parameters are those of the step before."""


def run_rank(config: RunConfig, rank: int, num_ranks: int, config_yaml: str) -> NoReturn:
    """Train as rank `rank`, and leave the process.  Raises ConfigError before any process group exists."""
    if config.run.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # torch.compile would take memory of a GPU that is there
        )
    plan = make_plan(config, num_ranks)
    source = open_source(config)
    directory = RunDirectory(config.run) if rank == 0 else None
    step, started = 0, time.time()
    patience = config.run.world_timeout_seconds  # until all ranks have connected
    watches: list[Event] = []

    def leave_with_nccl(error: str) -> None:
        """Leave before torch's watchdog aborts the process."""
        failure = silent_peer(patience, config.run) if error == "TIMEOUT" else LOST_PEER
        record = flight_recorder.file_of(os.environ, run_path(config.run), rank)
        last = (
            f"; its last communications: {record}"
            if flight_recorder.wait_for(record, started)
            else ""
        )
        _leave(failure.code, f"rank {rank}: stopped at step {step}, {failure.words}{last}")

    try:
        mesh = _connect(config, plan, lambda groups: watches.append(watch(groups, leave_with_nccl)))
        patience = config.run.timeout_seconds
        run = Run(config, plan, mesh, source, build_rank(config, plan, mesh))
        reporter = None
        if directory is not None:
            reporter = Reporter(config, plan, directory, run.first_step)
            reporter.start(config_yaml, source)
            if config.data.tokenizer is None and source.tokenizer is not None:
                directory.keep_tokenizer(source.tokenizer)
        for step in run.steps():
            run.train_step(step, reporter)
        run.finish(reporter)
    except ConfigError:
        raise
    except NonFiniteError as error:
        _leave(EXIT_CONFIG, f"vp-train: {error}" if rank == 0 else "")
    except CheckpointError as error:
        _leave(EXIT_IO, f"vp-train: {error}" if rank == 0 else "")
    except (BrokenPipeError, SystemExit):  # rich raises the second when it meets the first
        _leave(
            128 + signal.SIGPIPE,
            f"vp-train: nobody reads the output any more, stopped at step {step}",
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            words = f"{error}, at step {step}; once that is mended, run.resume=true goes on from the newest checkpoint there is"
            _leave(EXIT_IO, f"vp-train: {words}")
        if (failure := peer_failure(error, config.run)) is not None:
            _leave(failure.code, f"rank {rank}: stopped at step {step}, {failure.words}")
        _leave(EXIT_INTERNAL, f"rank {rank} failed at step {step}\n{traceback.format_exc()}")
    for watched in watches:
        watched.set()
    dist.destroy_process_group()
    _leave(EXIT_OK)


def _connect(
    config: RunConfig,
    plan: RunPlan,
    watching: Callable[[Sequence[dist.ProcessGroup]], None] | None = None,
) -> Mesh:
    """Ranks agree over gloo; on CUDA the executor's tensors move over NCCL.  `watching` as in `build_mesh`."""
    if config.run.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    backend = "gloo"
    if config.run.device == "cuda":
        set_environment(os.environ, config.run, run_path(config.run))
        if not torch.cuda.is_available():
            raise ConfigError("run.device=cuda, but torch finds no GPU here; use run.device=cpu")
        local_rank, num_local = (
            int(os.environ.get("LOCAL_RANK", "0")),
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        num_devices = torch.cuda.device_count()
        if config.run.comm_backend == "nccl":
            backend = "nccl"
            if num_local > num_devices:
                raise ConfigError(
                    f"{num_local} ranks on a node whose GPUs are {num_devices}, and NCCL wants one for each; start fewer ranks "
                    "here, or let them share GPUs with run.comm_backend=gloo"
                )
        torch.cuda.set_device(local_rank % num_devices)
    if backend == "nccl":  # on every node: where its ranks are to leave their flight recorders
        flight_recorder.file_of(os.environ, run_path(config.run), 0).parent.mkdir(
            parents=True, exist_ok=True
        )
    dist.init_process_group(backend, timeout=timedelta(seconds=config.run.world_timeout_seconds))
    return build_mesh(plan.degrees, plan.problem, config.run, watching=watching)


def _leave(code: int, message: str = "") -> NoReturn:
    """Say why and leave at once: destructors of process groups would wait for peers, or abort beside their own threads."""
    if message:
        sys.stderr.write(f"{message}\n")  # one write: lines of several ranks must not mix
    sys.stderr.flush()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)


def _spans(values: list[list[Any]]) -> list[Span]:
    """Return spans from their fields, as JSON gives them back."""
    return [Span(*fields) for fields in values]


@dataclass(slots=True)
class _Memory:
    """What a run remembers between steps besides model and optimizer."""

    skipped_in_a_row: int = 0
    saved_step: int = 0


class Run:
    """Model, optimizer and data of one rank, and what happens in a step."""

    def __init__(
        self, config: RunConfig, plan: RunPlan, mesh: Mesh, source: Source, model: RankModel
    ) -> None:
        self.config, self.plan, self.mesh, self.source, self.model = (
            config,
            plan,
            mesh,
            source,
            model,
        )
        self._checkpoints = run_path(config.run) / "checkpoints"
        self._memory = _Memory()
        self._batches = Ahead(
            lambda step: source.train_batch(step, mesh.data_rank, mesh.degrees.dp), config.run.steps
        )
        self.first_step = 1 + (self._resume() if config.run.resume else 0)
        if config.run.init_from is not None and self.first_step == 1:
            self._initialise(config.run.init_from)
        self._traced_step = (
            max(config.run.trace_step, self.first_step) if config.run.trace_step else 0
        )

    def steps(self) -> range:
        """The steps still to do."""
        return range(self.first_step, self.config.run.steps + 1)

    def train_step(self, step: int, reporter: Reporter | None) -> None:
        """One optimizer step, and the validation, trace and checkpoint that fall on it."""
        started = time.perf_counter()
        batch = self._batches.take(step)
        self.model.gradients.zero()
        if step == self._traced_step:
            loss, traced = self._traced(batch)
        else:
            loss, traced = (
                self.model.train_step(batch.tokens, batch.labels, segments=batch.segments),
                None,
            )
        self.model.optimizer.reduce()
        norm = self.model.optimizer.squared_norm() / self.model.loss_scale.value**2
        health = gather_health(self._own(loss), norm, self.mesh.steps, self._peak_bytes())
        rate = self._update(step, health)
        seconds = time.perf_counter() - started
        if reporter is not None:
            speed = self.mesh.degrees.dp * batch.tokens.numel() / seconds
            reporter.step(
                StepReport(step, health.loss, health.grad_norm, rate, speed, health.peak_bytes)
            )
        if traced is not None:
            self._report_trace(traced, reporter)
        if self._falls_on(step, self.config.run.eval_every):
            validation = self._validate()
            if reporter is not None:
                reporter.validation(step, validation)
        if reporter is not None:
            reporter.record()
        if self._falls_on(step, self.config.run.checkpoint_every):
            self._save(step, reporter)

    def _falls_on(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.run.steps)

    def _update(self, step: int, health: StepHealth) -> float:
        """Clip and apply the gradients, unless a value is not finite; returns the learning rate."""
        rate, loss_scale = (
            learning_rate(self.config.optim, step, self.config.run.steps),
            self.model.loss_scale,
        )
        if health.culprits:
            self._handle_nonfinite(step, health)
            return rate
        self._memory.skipped_in_a_row = 0
        clipping = clip_scale(health.grad_norm, self.config.optim.clip_grad_norm)
        self.model.optimizer.step(rate, clipping / loss_scale.value)
        loss_scale.passed()
        return rate

    def _handle_nonfinite(self, step: int, health: StepHealth) -> None:
        """Every rank sees the same health, so all skip or all stop."""
        where = ", ".join(f"{what} on rank {rank}" for rank, what in health.culprits)
        if math.isfinite(health.loss) and self.model.loss_scale.failed():
            if self.mesh.rank == 0:
                scale = self.model.loss_scale.value
                print(
                    f"step {step} skipped: gradients overflow float16; the loss scale is {scale:,.0f} now",
                    file=sys.stderr,
                )
            return
        self._memory.skipped_in_a_row += 1
        if self.config.run.on_nonfinite == "stop":
            raise NonFiniteError(
                f"step {step}: non-finite {where}; the parameters are those after step {step - 1}. "
                "Lower optim.lr, or set run.on_nonfinite=skip to leave such steps out"
            )
        if self._memory.skipped_in_a_row >= _MAX_SKIPS:
            raise NonFiniteError(
                f"step {step}: non-finite {where}, {_MAX_SKIPS} steps in a row; lower optim.lr"
            )
        if self.mesh.rank == 0:
            print(f"step {step} skipped: non-finite {where}", file=sys.stderr, flush=True)

    def _validate(self) -> float:
        batch = self.source.validation_batch(self.mesh.data_rank, self.mesh.degrees.dp)
        loss = self.model.evaluator.step(batch.tokens, batch.labels, segments=batch.segments)
        return gather_health(self._own(loss), None, self.mesh.steps).loss

    def _own(self, loss: torch.Tensor | None) -> torch.Tensor | None:
        """Return the loss on the rank that reports it, else None."""
        return loss if self.model.reports_loss else None

    def _save(self, step: int, reporter: Reporter | None) -> None:
        """A checkpoint that cannot be written is a warning, except at the end of the run."""
        try:
            save_run(
                self._checkpoints, step, self.config, self.model, self.mesh, self.source.contents
            )
        except CheckpointError as error:
            if step == self.config.run.steps:
                raise
            if reporter is not None:
                reporter.say(
                    f"step {step}: {error}; going on, the checkpoints before it are untouched"
                )

    def _resume(self) -> int:
        """Load the newest undamaged checkpoint; returns its step, 0 if there is none."""
        path = latest(self._checkpoints, self.mesh.world)
        return (
            0
            if path is None
            else restore_run(path, self.config, self.model, self.mesh, self.source.contents)
        )

    def _initialise(self, source: str) -> None:
        """Take over the weights of another run."""
        load_weights(find(Path(source).expanduser(), self.mesh.world), self.config, self.model)

    def _traced(self, batch: Batch) -> tuple[torch.Tensor | None, Recorder]:
        """Run a training step with every pass and communication timed, from a common start."""
        timer = timer_of(
            rank_device(self.config), host_waits=self.config.run.comm_backend == "gloo"
        )
        recorder = Recorder(self.mesh.pipeline_rank, timer, list(self.model.parameters.values()))
        self.mesh.steps.barrier()
        timer.start()
        loss = self.model.train_step(batch.tokens, batch.labels, recorder, segments=batch.segments)
        return loss, recorder

    def _peak_bytes(self) -> float:
        """The most memory so far: on a GPU what torch allocated there, else what was resident in the host's."""
        if self.config.run.device == "cuda":
            return float(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    def _report_trace(self, recorder: Recorder, reporter: Reporter | None) -> None:
        passes, messages = (
            [astuple(span) for span in spans] for spans in (recorder.spans, recorder.communications)
        )
        mine = (passes, messages, recorder.peak_bytes, self.model.num_parameters)
        everyone = self.mesh.world.all_gather_json(mine)
        if reporter is not None:
            first = [
                everyone[self.mesh.degrees.rank(0, p, 0)] for p in range(self.plan.num_ranks)
            ]  # others do the same
            spans, communications, peaks, parameters = zip(*first, strict=True)
            timeline = Timeline(
                tuple(tuple(_spans(values)) for values in spans),
                joined_communications([_spans(values) for values in communications]),
                tuple(map(float, peaks)),
                self.plan.timeline.peak_in_flight,
            )
            reporter.trace(timeline, parameters)

    def finish(self, reporter: Reporter | None) -> None:
        """The last word: the table of all ranks."""
        self.model.optimizer.settle()  # nobody leaves while others gather
        everyone = self.mesh.world.all_gather_json(self._peak_bytes())
        if reporter is not None:
            worst = [0.0] * self.plan.num_ranks
            for rank, peak in enumerate(everyone):
                pipeline_rank = self.mesh.degrees.place(rank)[1]
                worst[pipeline_rank] = max(worst[pipeline_rank], peak)
            reporter.finish(worst)
