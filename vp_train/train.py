"""The main path: one rank of one run, from configuration to checkpoint.  Read it top to bottom.

`run_rank` connects the ranks, builds model and optimizer, trains every step, and ends the process
with an exit code.  `Run.train_step` is one optimizer step.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import astuple
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

from schedules.lower import Action
from schedules.timeline import Span, Timeline
from vp_train.assembly import RankModel, build_rank, compiled_parts, rank_device
from vp_train.checkpoint.saver import CheckpointError, Saver, set_aside
from vp_train.checkpoint.store import Damage, find
from vp_train.checkpoint.training import (
    Progress,
    begin_save,
    latest_of_run,
    load_weights,
    restore_run,
)
from vp_train.communication import flight_recorder
from vp_train.communication.control import ControlGroup
from vp_train.communication.nccl import require_gpu, take_gpu
from vp_train.communication.rendezvous import join_world
from vp_train.config import ConfigError, RunConfig, RunSettings
from vp_train.config.run import SETTLED_STEP
from vp_train.data import Batch, Source, open_source
from vp_train.data.ahead import Ahead
from vp_train.data.tokenizer import tokenizer_config
from vp_train.durable import checkpoint_name
from vp_train.failures import (
    EXIT_CONFIG,
    EXIT_OK,
    EXIT_TIME,
    Ending,
    SharedFailure,
)
from vp_train.mesh import Mesh, build_mesh
from vp_train.metrics.figures import RankFigures, figures_of
from vp_train.metrics.header import introduce
from vp_train.metrics.profiler import profiling
from vp_train.metrics.progress import StepReport, Validation
from vp_train.metrics.reporter import Reporter, write_report
from vp_train.metrics.run_directory import RunDirectory, removed_if_unused
from vp_train.metrics.step_times import RankTimes, pass_seconds
from vp_train.metrics.trackers import require_trackers
from vp_train.optim.adamw import StepHealth, clip_scale, gather_health, learning_rate
from vp_train.optim.verdict import Judge, Verdict
from vp_train.pipeline.executor import Observer, PlacedBatch
from vp_train.pipeline.recorder import Named, Recorder, joined_communications
from vp_train.pipeline.stopwatch import Part, Stopwatch
from vp_train.pipeline.timers import timer_of
from vp_train.planning.cluster import known_peak_flops
from vp_train.planning.plan import RunPlan, make_plan, replan
from vp_train.preflight.nodes import Preflight, must_compare, spans_nodes
from vp_train.supervision import requests as asked
from vp_train.supervision.ending import leave
from vp_train.supervision.heartbeat import Place
from vp_train.supervision.requests import Requests
from vp_train.supervision.watcher import Watcher
from vp_train.tensors import compiling

# What a rank does, as its heartbeat says it.
_TRAINING = "training"
_VALIDATING = "validating"
_COMPARING = "exchanging gradients, loss and norm with other ranks"
_SAVING = "saving with other ranks"


class DivergenceError(SharedFailure):
    """A step that the run does not survive.  The parameters are those after the previous step."""

    exit_code = EXIT_CONFIG


def run_rank(
    config: RunConfig,
    rank: int,
    num_ranks: int,
    config_yaml: str,
    *,
    only_preflight: bool = False,
    is_introduced: bool = False,
    has_lost_store: Callable[[], bool] = lambda: False,
) -> NoReturn:
    """Train as rank `rank` of `num_ranks`, then end the process with an exit code.

    `config_yaml` is the resolved configuration that the run directory keeps.  With `only_preflight`
    the nodes are checked, and nothing is trained.  `is_introduced` says whether somebody else has
    printed the first lines of the run.  `has_lost_store` returns whether the store has ended that
    this rank serves; the run then saves and ends.  Raises ConfigError for settings, data or
    checkpoints that the user must change; settings and data are checked before any process group
    exists.  Every other failure ends the process with a message.
    """
    if config.run.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch.compile would allocate memory on a GPU
    if config.run.compile == "off":
        compiling.turn_off(os.environ)
    requests = Requests.of_rank(rank, config.run, has_lost_store)
    requests.listen()
    watcher = Watcher(config.run, rank, num_ranks)
    directory: RunDirectory | None = None
    unused = ExitStack()  # removes the directory of a run that does not start
    try:
        watcher.place("planning")
        plan = make_plan(config, num_ranks)
        require_gpu(config.run)  # before minutes are spent on the data
        watcher.place("opening the data")
        source = open_source(config)
        watcher.place("preparing to connect")
        if rank == 0:
            require_trackers(config.run)
            if only_preflight:
                unused.enter_context(removed_if_unused(config.run))
            else:
                directory = RunDirectory(config.run)
                unused.callback(directory.forsake)
        if only_preflight or must_compare(os.environ, config.run):
            preflight = Preflight(
                config, plan.schedule.text(), source.contents, compiled=compiled_parts(config)
            )
            mesh = _connect(config, plan, watcher, preflight.compare_nodes)
            preflight.measure_network(mesh.world)
        else:
            mesh = _connect(config, plan, watcher)
        if only_preflight:
            watcher.stop()
            unused.close()
            leave(Ending(EXIT_OK, ""))
        if rank == 0 and not is_introduced:
            introduce(config, plan, source)
        watcher.place("building the model")
        parts = compiled_parts(config) if rank == 0 else ()
        model = build_rank(config, plan, mesh, compiling=compiling.announced(parts))
        run = Run(config, plan, mesh, source, model, requests=requests)
        watcher.follow(lambda: run.step, run.place)
        run.load()
        if run.first_step > config.run.steps:
            _leave_done(run.first_step - 1, config.run, rank)
        reporter = None if directory is None else _begin_report(run, directory, config_yaml)
        try:
            for step in run.steps():
                run.train_step(step, reporter)
            run.finish(reporter)
        except SharedFailure as error:
            run.give_up(str(error), reporter)
            raise
    except ConfigError:
        unused.close()
        raise
    except (Exception, SystemExit) as error:
        watcher.leave(error)
    watcher.stop()
    if reporter is not None:
        write_report(config.run)  # when no other rank waits any more
    leave(run.ending())


def traced_step(trace_step: int, done: int, steps: int) -> int:
    """Return the step that a run of `steps` times after it has `done` some, 0 for none.

    A resumed run that has done run.trace_step, or would begin with it, times step `SETTLED_STEP` of
    its own.  With fewer left it times none: a step of a process that still warms up would replace
    the one that was timed.
    """
    if not trace_step or not done or trace_step > done + 1:
        return trace_step
    later = done + SETTLED_STEP
    return later if later <= steps else 0


def _begin_report(run: Run, directory: RunDirectory, config_yaml: str) -> Reporter:
    """Return the reporter of a run; its directory then has what is known before the first step."""
    config, source = run.config, run.source
    reporter = Reporter(config, run.plan, directory, run.first_step)
    reporter.start(config_yaml, run.take_notices())
    if source.tokenizer is not None and source.end_token is not None:
        words = tokenizer_config(
            source.tokenizer,
            source.end_token,
            longest=config.model.seq_length,
            after_end=config.data.packing == "none",
        )
        directory.keep_tokenizer(source.tokenizer, words)
    return reporter


def _connect(
    config: RunConfig,
    plan: RunPlan,
    watcher: Watcher | None = None,
    comparing: Callable[[ControlGroup], None] | None = None,
) -> Mesh:
    """Initialise torch.distributed and build the mesh of process groups.

    Control messages go over gloo.  On CUDA with run.comm_backend=nccl, tensors go over NCCL.
    `watcher` watches the groups.  `comparing` is as in `build_mesh`.  Raises ConfigError like
    `take_gpu`, before the ranks connect.
    """
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    backend = take_gpu(os.environ, config.run)
    if backend == "nccl":  # every node needs the directory that its ranks write flight records to
        flight_recorder.file_of(os.environ, config.run.directory, 0).parent.mkdir(
            parents=True, exist_ok=True
        )
    if watcher is not None:
        watcher.place("connecting to the other ranks", waits=True)
    join_world(backend, timedelta(seconds=config.run.world_timeout_seconds))
    watching = None if watcher is None else watcher.watch
    return build_mesh(
        plan.degrees, plan.problem, config.run, watching=watching, comparing=comparing
    )


def _leave_done(done: int, settings: RunSettings, rank: int) -> NoReturn:
    """Leave a run whose newest checkpoint is of step `done`, with nothing left to do."""
    words = f"{settings.directory} has done all of its {done} steps; run.steps=N goes on to step N"
    leave(Ending(EXIT_OK, words if rank == 0 else ""))


def _spans(values: list[list[Any]]) -> list[Span]:
    """Return spans from the lists of fields that JSON makes of them."""
    return [Span(*fields) for fields in values]


class Run:
    """The training of one rank: its model, optimizer and data, and the actions of a step.

    step: the step that runs or has run last, 0 before the first one.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: RunPlan,
        mesh: Mesh,
        source: Source,
        model: RankModel,
        *,
        requests: Requests | None = None,
    ) -> None:
        self.config, self.plan, self.mesh = config, plan, mesh
        self.source, self.model = source, model
        self.step = 0
        self._requests = requests or Requests()
        self._left: str | None = None  # why the run leaves before its last step
        self._left_code = EXIT_TIME  # where it does
        self._doing = "loading"
        degrees = mesh.degrees
        self._judge = Judge(config.run, degrees.pp * degrees.tp if degrees.dp > 1 else None)
        self._timer = timer_of(rank_device(config), host_waits=config.run.comm_backend == "gloo")
        self._stopwatch = Stopwatch(self._timer)
        self._most_bytes = 0.0
        self._plans = {plan.work.num_microbatches: plan}  # by the microbatches of a step
        # A step, and the tokens that steps up to it have used, or that were left out.
        self._used = (0, 0)
        self._batches = Ahead(self._batch, config.run.steps)
        self._saver = Saver(
            config.run.checkpoints,
            mesh.steps,
            config.run.keep_checkpoints,
            device=config.run.device,
            patience_seconds=config.run.world_timeout_seconds,
        )
        self._counts: dict[str, list[float]] = {}  # labels and bytes of every validation set
        self._saved_step = 0  # of the newest checkpoint that was begun
        self._notices: list[str] = []
        self.first_step = 1

    def load(self) -> None:
        """Resume from the newest checkpoint, or start from the weights of run.init_from."""
        settings = self.config.run
        if settings.resume:
            self.first_step = 1 + self._resume()
        if settings.init_from is not None and self.first_step == 1:
            self._initialise(settings.init_from)
        self._await_others()

    @property
    def _traced_step(self) -> int:
        settings = self.config.run
        return traced_step(settings.trace_step, self.first_step - 1, settings.steps)

    def steps(self) -> Iterator[int]:
        """Yield the steps that remain, counted from 1, until the run is asked to leave.

        A run that goes back to a checkpoint repeats steps.
        """
        self.step = self.first_step - 1
        self._stopwatch.restart()  # to connect and to load is no part of the first step
        while self.step < self.config.run.steps and self._left is None:
            self.step += 1
            self._doing = "beginning"
            yield self.step

    def _batch(self, step: int) -> tuple[Batch, PlacedBatch | None]:
        """Return this replica's data of `step`, and on CUDA its copy on the device."""
        data_rank, num_replicas = self.mesh.data_rank, self.mesh.degrees.dp
        plan, start = self._plan_of(step), self._tokens_until(step - 1)
        batch = self.source.train_batch(start, plan.work.num_microbatches, data_rank, num_replicas)
        if self.config.run.device == "cpu":
            return batch, None
        return batch, self.model.trainer.place(batch.tokens, batch.labels)

    def _plan_of(self, step: int) -> RunPlan:
        """Return the plan of `step`, which the batch-size ramp may give fewer microbatches."""
        count = self.plan.ramp.at(step)
        if count not in self._plans:
            self._plans[count] = replan(self.config, self.plan, count)
        return self._plans[count]

    def _tokens_until(self, step: int) -> int:
        """Return the tokens that the steps up to `step` use, with those that were left out."""
        done, tokens = self._used
        ramp, work = self.plan.ramp, self.plan.work
        microbatches = self.mesh.degrees.dp * (ramp.until(step) - ramp.until(done))
        return tokens + microbatches * work.num_tokens

    def place(self) -> Place:
        """Return where this rank stands; another thread calls it.

        On CUDA the host runs ahead of the device, so the device may not have come so far.
        """
        doing = self._doing
        if doing not in (_TRAINING, _VALIDATING):
            return Place(f"step {self.step}, {doing}", waits=doing in (_COMPARING, _SAVING))
        op = (self.model.trainer if doing == _TRAINING else self.model.evaluator).operation
        if op is None:
            return Place(f"step {self.step}, {doing}")
        waits = op.action in (Action.ARRIVE, Action.WAIT, Action.NEED)
        return Place(f"step {self.step}, {doing}, {op}", waits)

    def train_step(self, step: int, reporter: Reporter | None) -> None:
        """Run optimizer step `step`, and the validation, trace and checkpoint that are due then.

        Only one rank of the run has a `reporter`.
        """
        settings = self.config.run
        if step not in settings.profile_steps or self.mesh.rank not in settings.profile_ranks:
            self._train_step(step, reporter, self._stopwatch)
            return
        with profiling(settings.profiles, step, self.mesh.rank, settings.device):
            self._train_step(step, reporter, Named(self._stopwatch))

    def _train_step(self, step: int, reporter: Reporter | None, observer: Observer) -> None:
        started, stopwatch = time.perf_counter(), self._stopwatch
        stopwatch.switch(Part.DATA)
        self._doing = "waiting for data"
        batch, placed = self._batches.take(step)
        self._doing = _TRAINING
        self.model.trainer.follow(self._plan_of(step).program)
        stopwatch.switch(Part.OPTIMIZER)
        self.model.gradients.zero()
        stopwatch.switch(Part.DATA)
        if step == self._traced_step:
            loss, traced = self._traced(batch, placed, observer)
        else:
            loss = self.model.train_step(
                batch.tokens, batch.labels, observer, segments=batch.segments, placed=placed
            )
            traced = None
        self._doing = _COMPARING
        stopwatch.switch(Part.GRADIENT_SUM)
        self.model.optimizer.reduce()
        stopwatch.switch(Part.OPTIMIZER)
        norm = self.model.optimizer.squared_norm() / self.model.loss_scale.value**2
        poison = self.model.optimizer.poison()
        stopwatch.switch(Part.WAITING)
        figures = self._figures()
        health = gather_health(
            self._own(loss),
            norm,
            self.mesh.steps,
            self._most_bytes,
            poison=poison,
            request=self._request(reporter),
            saved=self._saver.is_ready,
            figures=figures,
        )
        stopwatch.switch(Part.REST)
        if asked.leaves(health.request):
            self._left = asked.words(
                health.request, health.requesting_rank, spans_nodes=spans_nodes(os.environ)
            )
            self._left_code = asked.exit_code(health.request)
        rate = learning_rate(self.config.optim, step, self.config.run.steps)
        if not self._update(step, health, rate, reporter):
            return
        seconds = time.perf_counter() - started
        if reporter is not None:
            speed = self.mesh.degrees.dp * batch.tokens.numel() / seconds
            reporter.step(self._report_of(step, health, rate, speed))
        if traced is not None:
            self._report_trace(traced, health, reporter)
        if self._is_due(step, self.config.run.eval_every):
            stopwatch.switch(Part.VALIDATION)
            validation = self._validate()
            stopwatch.switch(Part.REST)
            if reporter is not None:
                reporter.validation(step, validation)
        if reporter is not None:
            reporter.record()
            if self._left is not None and step < self.config.run.steps:
                saves = "saves and " if self.config.run.saves else ""
                reporter.say(f"step {step}: {self._left}; the run {saves}ends")
        self._save_if_due(step, health, reporter)

    def _report_of(self, step: int, health: StepHealth, rate: float, speed: float) -> StepReport:
        """Return what is shown and recorded of a step; `speed` is in tokens per second."""
        return StepReport(
            step,
            health.loss,
            health.grad_norm,
            rate,
            speed,
            health.peak_bytes,
            self._judge.spikes,
            self._judge.skipped,
            self._figures_of_ranks(health),
        )

    def _save_if_due(self, step: int, health: StepHealth, reporter: Reporter | None) -> None:
        """Go on with the checkpoint that is being written, and begin one if it is due."""
        self._doing = _SAVING
        self._stopwatch.switch(Part.CHECKPOINT)
        if health.saved:
            self._saver.advance()
        is_last = step == self.config.run.steps
        wanted = self.config.run.saves and (is_last or health.request != asked.NOTHING)
        if wanted or self._is_due(step, self.config.run.checkpoint_every):
            self.begin_save(step, reporter)
        if not is_last and self._left is None:
            self._warn_of_save(reporter)
        self._stopwatch.switch(Part.REST)

    def _request(self, reporter: Reporter | None) -> int:
        """Return what this rank is asked for."""
        request = self._requests.current()
        if reporter is not None and reporter.has_no_reader:
            return max(request, asked.NO_READER)
        return request

    def _is_due(self, step: int, every: int) -> bool:
        """Return whether something that happens every `every` steps, and at the end, is due."""
        return every > 0 and (step % every == 0 or step == self.config.run.steps)

    def _update(
        self, step: int, health: StepHealth, rate: float, reporter: Reporter | None
    ) -> bool:
        """Clip and apply the gradients if nothing is wrong with them.

        All ranks see the same health and do the same.  Returns False if the run went back.
        """
        loss_scale = self.model.loss_scale
        if health.culprits and math.isfinite(health.loss) and loss_scale.failed():
            words = f"gradients overflow float16; the loss scale is {loss_scale.value:,.0f} now"
            self._judge.overflowed()
            self._say(f"step {step} skipped: {words}", reporter)
            return True
        can_go_back = self._saved_step > 0 or self.first_step > 1
        judgement = self._judge.judge(step, health, can_go_back=can_go_back)
        match judgement.verdict:
            case Verdict.APPLY:
                if judgement.words:
                    self._say(f"step {step}: {judgement.words}", reporter)
                clipping = clip_scale(health.grad_norm, self.config.optim.clip_grad_norm)
                self._stopwatch.switch(Part.OPTIMIZER)
                self.model.optimizer.step(rate, clipping / loss_scale.value)
                self._stopwatch.switch(Part.REST)
                loss_scale.passed()
            case Verdict.SKIP:
                self._say(f"step {step} skipped: {judgement.words}", reporter)
            case Verdict.GO_BACK:
                return not self._go_back(step, judgement.words, reporter)
            case Verdict.STOP:
                raise DivergenceError(
                    f"step {step}: {judgement.words}; the parameters are those after step "
                    f"{step - 1}. {judgement.way_out}"
                )
        return True

    def _go_back(self, step: int, words: str, reporter: Reporter | None) -> bool:
        """Go back to the newest checkpoint, and leave out the data since then.

        Returns False, having skipped `step` only, if there is no checkpoint.
        """
        self._doing = "saving"
        self._stopwatch.switch(Part.CHECKPOINT)
        self._saver.finish()
        self._warn_of_save(reporter)
        tokens = self._tokens_until(step)
        done = self._resume()
        if not done:
            words = f"{words}; there is no checkpoint to go back to"
            self._say(f"step {step} skipped: {words}", reporter)
            self._stopwatch.switch(Part.REST)
            return False
        self.step = self._saved_step = done
        self._used = done, tokens
        if reporter is not None:
            for line in self.take_notices():
                reporter.note(line)
            reporter.go_back(done)
        words = f"{words}; going back to step {done} and leaving out the data since then"
        self._say(f"step {step}: {words}", reporter)
        return True

    def _say(self, line: str, reporter: Reporter | None) -> None:
        """Print a line once for all ranks."""
        if reporter is not None:
            reporter.say(line)
        elif self.mesh.rank == 0:
            print(line, file=sys.stderr, flush=True)

    def _validate(self) -> list[Validation]:
        """Return the mean loss of every validation set, the same on all ranks."""
        found = []
        for name in self.source.validation_sets:
            self._doing = _VALIDATING
            batch = self.source.validation_batch(
                self.mesh.data_rank, self.mesh.degrees.dp, name=name
            )
            loss = self.model.evaluator.step(batch.tokens, batch.labels, segments=batch.segments)
            self._doing = _COMPARING
            mean = gather_health(self._own(loss), None, self.mesh.steps).loss
            per_byte = self._labels_per_byte(name, batch)
            bits = None if per_byte is None else mean * per_byte / math.log(2)
            found.append(Validation(name, mean, bits))
        return found

    def _labels_per_byte(self, name: str, batch: Batch) -> float | None:
        """Return the labels with a loss for each byte of their text, over all replicas.

        It is None where bytes are not known.  Collective in the first call for a set.
        """
        lengths = self.source.byte_lengths
        if lengths is None:
            return None
        if name not in self._counts:
            own = torch.zeros(2, dtype=torch.float64)
            if self.mesh.pipeline_rank == self.mesh.tensor_rank == 0:
                counted = batch.labels[batch.labels >= 0]
                own += torch.tensor([len(counted), int(lengths[counted].sum())])
            self._counts[name] = self.mesh.steps.all_gather(own).sum(0).tolist()
        num_labels, num_bytes = self._counts[name]
        return num_labels / num_bytes if num_bytes else None

    def _own(self, loss: torch.Tensor | None) -> torch.Tensor | None:
        """Return the loss on the rank that reports it, else None."""
        return loss if self.model.reports_loss else None

    def begin_save(self, step: int, reporter: Reporter | None) -> None:
        """Begin a checkpoint, and return when its tensors are copied.  Collective.

        It is written beside the next steps.  One that is still being written is awaited first.
        """
        if step == self._saved_step:
            return
        self._saver.finish()
        self._warn_of_save(reporter)
        self._requests.saved()
        contents = self.source.contents
        judge = self._judge
        progress = Progress(self._tokens_until(step), *judge.history, judge.spikes, judge.skipped)
        begin_save(self._saver, step, self.config, self.model, self.mesh, contents, progress)
        self._saved_step = step

    def finish_save(self) -> None:
        """Return when the newest checkpoint that was begun is complete.  Collective.

        Raises CheckpointError on all ranks if it could not be written.
        """
        self._doing = "saving"
        self._saver.finish()
        if (failure := self._saver.take_failure()) is not None:
            raise failure

    def give_up(self, words: str, reporter: Reporter | None) -> None:
        """Complete the checkpoint that was begun, if it can be, and close the metrics.  Collective.

        All ranks call it after a failure that they share, which `words` are of.  None of them
        leaves before the others can: a launcher soon ends those that a failed rank left behind.
        """
        with suppress(CheckpointError):
            self.finish_save()
        if reporter is not None:
            reporter.note(words)
            with suppress(OSError):
                reporter.close(failed=True)
        self.mesh.world.barrier()

    def _warn_of_save(self, reporter: Reporter | None) -> None:
        """Say that the newest save has failed, if it has.  The run goes on."""
        failure = self._saver.take_failure()
        if failure is not None and reporter is not None:
            reporter.say(f"{failure}; going on, the checkpoints before it are untouched")

    def _resume(self) -> int:
        """Load the newest undamaged checkpoint and return its step, 0 if there is none."""
        self._doing = "loading"
        path, damaged = latest_of_run(self.config.run.checkpoints, self.mesh.world)
        if path is None:
            return 0
        self._saver.leave_uncounted([each.name for each in damaged])
        if self.mesh.rank == 0:
            self._notices += [self._passed_over(each) for each in damaged]
        step, progress = restore_run(path, self.config, self.model, self.mesh, self.source.contents)
        self._used = step, progress.tokens
        self._judge.restore(progress.losses, progress.norms, progress.spikes, progress.skipped)
        self._await_others()
        return step

    def _passed_over(self, damage: Damage) -> str:
        """Set a checkpoint aside if its bytes were altered, and return a line for the notices.

        Only the first rank does so.  What else is wrong may be right again, as on a disk that did
        not answer.
        """
        directory, words = self.config.run.checkpoints, f"checkpoint passed over: {damage.words}"
        aside = set_aside(directory, damage.name) if damage.is_altered else None
        if aside is None:
            return words
        print(f"{directory / damage.name} is {aside.name} now", file=sys.stderr, flush=True)
        return f"{words}; it is {aside.name} now"

    def take_notices(self) -> list[str]:
        """Return what was said before there was a reporter, and forget it."""
        notices, self._notices = self._notices, []
        return notices

    def _initialise(self, source: str) -> None:
        """Load the weights of another run or of an import."""
        load_weights(find(Path(source).expanduser(), self.mesh.world), self.config, self.model)

    def _await_others(self) -> None:
        """Return when all ranks have compiled their kernels and loaded their parameters.

        A slow disk or compiler may take longer than a step's timeout.
        """
        self.mesh.world.barrier()

    def _traced(
        self, batch: Batch, placed: PlacedBatch | None, observer: Observer
    ) -> tuple[torch.Tensor | None, Recorder]:
        """Run a training step that times every pass and communication, from a common start."""
        recorder = Recorder(
            self.mesh.pipeline_rank,
            self._timer,
            list(self.model.parameters.values()),
            observer,
        )
        self._stopwatch.switch(Part.WAITING)
        self.mesh.steps.barrier()
        self._stopwatch.switch(Part.DATA)
        self._timer.start()
        loss = self.model.train_step(
            batch.tokens, batch.labels, recorder, segments=batch.segments, placed=placed
        )
        return loss, recorder

    def _figures(self) -> Callable[[], list[float]]:
        """Return a function that returns the numbers of `RankFigures` when the device is done.

        The memory is that of now: on a GPU the most in this step, since all of it is issued.
        """
        allocated, reserved = self._memory()
        self._most_bytes = max(self._most_bytes, allocated)
        return lambda: RankFigures(self._stopwatch.take(), allocated, reserved).numbers()

    def _figures_of_ranks(self, health: StepHealth) -> dict[str, float]:
        """Return the figures of all ranks for the record of a step."""
        best, ramp = self._best_seconds, self.plan.ramp
        if best is not None:
            best *= ramp.at(self.step) / ramp.full
        return figures_of(list(map(RankFigures.of, health.figures)), best)

    def _memory(self) -> tuple[float, float]:
        """Return the most bytes allocated and reserved; see `RankFigures`.

        CUDA graphs use memory that counts only as reserved, so with them that is both.
        """
        if self.config.run.device == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, 0.0
        stats = torch.cuda.memory_stats_as_nested_dict()
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = (
            float(stats[f"{name}_bytes"]["all"]["peak"]) for name in ("allocated", "reserved")
        )
        return reserved if self.config.run.cuda_graphs else allocated, reserved

    @cached_property
    def _best_seconds(self) -> float | None:
        """The seconds of a whole step with all ranks at their peak; None if that is unknown."""
        config, work, degrees = self.config, self.plan.work, self.mesh.degrees
        peak = known_peak_flops(config.cluster, config.run.dtype)
        if peak is None:
            return None
        return degrees.dp * work.step_flops / (peak * degrees.num_ranks)

    def _report_trace(
        self, recorder: Recorder, health: StepHealth, reporter: Reporter | None
    ) -> None:
        """Report all spans of the first pipeline, and the sums by kind of pass of all ranks."""
        # Other replicas and tensor-parallel ranks run the same passes.
        is_first = self.mesh.data_rank == 0 and self.mesh.tensor_rank == 0
        spans = recorder.spans
        passes, messages = (
            [astuple(span) for span in found] if is_first else []
            for found in (spans, recorder.communications)
        )
        processor = (
            recorder.processor_seconds if is_first and self.config.run.device == "cpu" else []
        )
        times = platform.node(), pass_seconds(spans)
        peak = recorder.peak_bytes
        own = (passes, messages, peak, self.model.num_parameters, processor, *times)
        gathered = self.mesh.world.all_gather_json(own)
        if reporter is not None:
            degrees = self.mesh.degrees
            ranks = [
                RankTimes(rank, *degrees.place(rank), host=host, pass_seconds=seconds)
                for rank, (*_, host, seconds) in enumerate(gathered)
            ]
            first = [gathered[degrees.rank(0, p, 0)][:5] for p in range(self.plan.num_ranks)]
            computed, communications, peaks, parameters, processors = zip(*first, strict=True)
            timeline = Timeline(
                tuple(tuple(_spans(values)) for values in computed),
                joined_communications([_spans(values) for values in communications]),
                tuple(map(float, peaks)),
                self._plan_of(self.step).timeline.peak_in_flight,
            )
            figures = list(map(RankFigures.of, health.figures))
            plan = self._plan_of(self.step)
            reporter.trace(timeline, parameters, ranks, figures, plan, processors=processors)

    def ending(self) -> Ending:
        """Return how this rank ends after `finish`; the first rank has the words."""
        warning = self._requests.clear()
        if self._left is None or self.step == self.config.run.steps:
            return Ending(EXIT_OK, warning)
        saved = (
            "a checkpoint is saved, run.resume=true goes on"
            if self.config.run.saves
            else "no checkpoint is saved, for run.checkpoint_every=0"
        )
        words = f"vp-train: stopped after step {self.step}, because {self._left}; {saved}{warning}"
        return Ending(self._left_code, words if self.mesh.rank == 0 else "")

    def finish(self, reporter: Reporter | None) -> None:
        """Finish the last step's communication, and report the peak memory of every stage.

        Raises CheckpointError on all ranks if the last checkpoint could not be written, or is not
        there any more.
        """
        self._doing = "saving"
        self.model.optimizer.settle()
        if self.config.run.device == "cuda":
            torch.cuda.synchronize()  # no rank may leave while others still gather
        self.finish_save()
        saved = self.config.run.checkpoints / checkpoint_name(self._saved_step)
        missing = (
            reporter.missing(saved if self._saved_step else None) if reporter is not None else None
        )
        peak = max(self._most_bytes, self._memory()[0])
        gathered = self.mesh.world.all_gather_json((peak, missing))
        for _, words in gathered:
            if words is not None:
                raise CheckpointError(f"the run is not whole: {words}")
        if reporter is not None:
            worst = [0.0] * self.plan.num_ranks
            for rank, (peak, _) in enumerate(gathered):
                pipeline_rank = self.mesh.degrees.place(rank)[1]
                worst[pipeline_rank] = max(worst[pipeline_rank], peak)
            reporter.finish(worst)
