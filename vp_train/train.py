"""The main path: one rank of one run, from configuration to checkpoint.  Read it top to bottom.

`run_rank` connects the ranks, builds model and optimizer, trains every step, and ends the process
with an exit code.  `Run.train_step` is one optimizer step.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import NoReturn

import torch

from vp_train.assembly import RankModel, build_rank, compiled_parts, rank_device
from vp_train.batches import Batches
from vp_train.checkpoint.run import RunCheckpoints
from vp_train.checkpoint.saver import CheckpointError
from vp_train.checkpoint.text import advising_kept_text
from vp_train.communication.nccl import require_gpu
from vp_train.config import ConfigError, RunConfig, RunSettings
from vp_train.data import Batch, Source, open_source
from vp_train.data.tokenizer import tokenizer_config
from vp_train.failures import EXIT_CONFIG, EXIT_OK, Ending, SharedFailure
from vp_train.mesh import Mesh, connect
from vp_train.metrics.bits import BitsPerByte
from vp_train.metrics.header import introduce, warnings_of
from vp_train.metrics.meter import Meter, worst_of_stages
from vp_train.metrics.profiler import profiling
from vp_train.metrics.progress import Validation
from vp_train.metrics.reporter import Reporter, write_report
from vp_train.metrics.run_directory import RunDirectory, removed_if_unused
from vp_train.metrics.tracing import Tracer, traced_step
from vp_train.metrics.trackers import require_trackers
from vp_train.optim.adamw import StepHealth, clip_scale, gather_health, learning_rate
from vp_train.optim.verdict import Judge, Verdict
from vp_train.pipeline.executor import Observer
from vp_train.pipeline.recorder import Named, Recorder
from vp_train.pipeline.stopwatch import Part, Stopwatch
from vp_train.pipeline.timers import timer_of
from vp_train.planning.plan import RunPlan, make_plan
from vp_train.preflight.nodes import Preflight, must_compare, spans_nodes
from vp_train.supervision.ending import leave
from vp_train.supervision.heartbeat import Activity
from vp_train.supervision.requests import NO_READER, Interruption, Requests
from vp_train.supervision.watcher import Watcher
from vp_train.tensors import compiling
from vp_train.units import count_words

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
    warnings: Sequence[str] = ()
    unused = ExitStack()  # removes the directory of a run that does not start
    try:
        watcher.note("planning")
        plan = make_plan(config, num_ranks)
        require_gpu(config.run)  # before minutes are spent on the data
        watcher.note("opening the data")
        with advising_kept_text(config):
            source = open_source(config, progress=rank == 0)  # all ranks wait for who prepares it
        watcher.note("preparing to connect")
        if rank == 0:
            require_trackers(config.run)
            if only_preflight:
                unused.enter_context(removed_if_unused(config.run))
            else:
                warnings = warnings_of(config, plan, source)  # reads text while nobody waits
                directory = RunDirectory(config.run)
                unused.callback(directory.forsake)
        mesh = _meet(config, plan, source, watcher, compares=only_preflight)
        if only_preflight:
            watcher.stop()
            unused.close()
            leave(Ending(EXIT_OK, ""))
        if rank == 0 and not is_introduced:
            introduce(config, plan, source)
        watcher.note("building the model")
        parts = compiled_parts(config) if rank == 0 else ()
        model = build_rank(config, plan, mesh, compiling=compiling.announced(parts))
        run = Run(config, plan, mesh, source, model, requests=requests)
        watcher.follow(lambda: run.step, run.activity)
        run.load()
        if run.first_step > config.run.steps:
            _leave_done(run.first_step - 1, config.run, rank)
        if directory is not None:
            run.reporter = _begin_report(run, directory, config_yaml, warnings)
        try:
            run.validate_weights()
            for step in run.steps():
                run.train_step(step)
            run.finish()
        except SharedFailure as error:
            run.give_up(str(error))
            raise
    except ConfigError:
        unused.close()
        raise
    except (Exception, SystemExit) as error:
        watcher.leave(error)
    watcher.stop()
    if run.reporter is not None:
        write_report(config.run)  # when no other rank waits any more
    leave(run.ending())


class Run:
    """The training of one rank: its model, optimizer and data, and what it does in a step.

    step: the step that runs or has run last, 0 before the first one.
    first_step: the step after the checkpoint that `load` has found, else 1.
    reporter: on the one rank that reports the run, None on the others.
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
        self.step, self.first_step = 0, 1
        self.reporter: Reporter | None = None
        self._requests = requests or Requests()
        self._interruption: Interruption | None = None  # if the run leaves before its last step
        self._doing = "loading"
        degrees = mesh.degrees
        self._judge = Judge(config.run, degrees.pp * degrees.tp if degrees.dp > 1 else None)
        timer = timer_of(rank_device(config), host_waits=config.run.comm_backend == "gloo")
        self._stopwatch = Stopwatch(timer)
        self._meter = Meter(config, plan, self._stopwatch)
        self._tracer = Tracer(config.run.device, mesh, model, timer)
        self._batches = Batches(config, plan, mesh, source, model)
        self._checkpoints = RunCheckpoints(
            config,
            mesh,
            model,
            batches=self._batches,
            judge=self._judge,
            requests=self._requests,
        )
        self._bits_per_byte = BitsPerByte(source, mesh)

    def text_words(self) -> str:
        """Return how much text the run uses until its last step, and what of it is done."""
        whole, done = (self._batches.trained(n) for n in (self.config.run.steps, self.step))
        words = f"{int(whole['tokens']):,} by step {self.config.run.steps}"
        if "passes" in whole:
            words += f", {whole['passes']:.3g} passes over the text"
        return f"{words}; {int(done['tokens']):,} of them are done" if self.step else words

    def load(self) -> None:
        """Resume from the newest checkpoint, or start from the weights of run.init_from."""
        settings = self.config.run
        if settings.resume:
            self.step = self._checkpoints.restore()
            self.first_step = self.step + 1
        if settings.init_from is not None and self.first_step == 1:
            self._checkpoints.initialise(settings.init_from)
        self._checkpoints.await_others()

    def take_notices(self) -> list[str]:
        """Return the notices about checkpoints that were passed over, and forget them."""
        return self._checkpoints.take_notices()

    def validate_weights(self) -> None:
        """Validate the weights of run.init_from before the first step, to compare with later ones.

        The record is that of step 0.  A resumed run has it already.
        """
        settings = self.config.run
        if settings.init_from is None or not settings.eval_every or self.first_step > 1:
            return
        validation = self._validate()
        if self.reporter is not None:
            self.reporter.validation(0, validation)

    def steps(self) -> Iterator[int]:
        """Yield the steps that remain, counted from 1, until the run is asked to leave.

        A run that goes back to a checkpoint repeats steps.
        """
        self._stopwatch.restart()  # what comes before the first step is no part of it
        while self.step < self.config.run.steps and self._interruption is None:
            self.step += 1
            self._doing = "beginning"
            yield self.step

    def train_step(self, step: int) -> None:
        """Run optimizer step `step`, and the validation, trace and checkpoint that are due then."""
        settings = self.config.run
        with self._profiled(step) as observer:
            started = time.perf_counter()
            batch, loss, recorder = self._run_passes(step, observer)
            health = self._agree(loss)
            rate = learning_rate(self.config.optim, step, settings.steps)
            if not self._update(step, health, rate):
                return  # the run has gone back to a checkpoint
            if self.reporter is not None:
                tokens = self.mesh.degrees.dp * batch.tokens.numel()
                speed = tokens / (time.perf_counter() - started)
                trained = self._batches.trained(step)
                report = self._meter.report(
                    step, health, self._judge, rate=rate, speed=speed, trained=trained
                )
                self.reporter.step(report)
            if recorder is not None:
                plan = self._batches.plan_of(step)
                self._tracer.report(recorder, plan, health.figures, self.reporter)
            if settings.is_due(step, settings.eval_every):
                validation = self._validate()
                if self.reporter is not None:
                    self.reporter.validation(step, validation)
            if self.reporter is not None:
                self.reporter.record()
            self._save_if_due(step, health)

    @contextmanager
    def _profiled(self, step: int) -> Iterator[Observer]:
        """Yield what observes the passes of a step.  Let torch profile it if the user asks so."""
        settings = self.config.run
        if step not in settings.profile_steps or self.mesh.rank not in settings.profile_ranks:
            yield self._stopwatch
            return
        with profiling(settings.profiles, step, self.mesh.rank, settings.device):
            yield Named(self._stopwatch)

    def _run_passes(
        self, step: int, observer: Observer
    ) -> tuple[Batch, torch.Tensor | None, Recorder | None]:
        """Run all forward and backward passes of a step.

        Returns its batch, the loss on the rank that has it, and the recorder of a traced step.
        """
        settings, recorder = self.config.run, None
        self._now(Part.DATA, "waiting for data")
        batch, placed = self._batches.take(step)
        self._now(Part.OPTIMIZER, _TRAINING)
        self.model.gradients.zero()
        self._now(Part.DATA)
        self.model.trainer.follow(self._batches.plan_of(step).program)
        if step == traced_step(settings.trace_step, self.first_step - 1, settings.steps):
            observer = recorder = self._tracer.begin(observer, self._stopwatch)
        loss = self.model.train_step(
            batch.tokens, batch.labels, observer, segments=batch.segments, placed=placed
        )
        return batch, loss, recorder

    def _agree(self, loss: torch.Tensor | None) -> StepHealth:
        """Complete the gradients, and exchange loss, norm and requests.  Collective.

        A request of any rank interrupts the run after this step.
        """
        optimizer = self.model.optimizer
        self._now(Part.GRADIENT_SUM, _COMPARING)
        optimizer.reduce()
        self._now(Part.OPTIMIZER)
        norm = optimizer.squared_norm() / self.model.loss_scale.value**2
        poison = optimizer.poison()
        self._now(Part.WAITING)
        figures = self._meter.figures()
        request = self._requests.current()
        if self.reporter is not None and self.reporter.has_no_reader:
            request = max(request, NO_READER)
        health = gather_health(
            self._reported(loss),
            norm,
            self.mesh.steps,
            self._meter.most_bytes,
            poison=poison,
            request=request,
            saved=self._checkpoints.is_ready,
            figures=figures,
        )
        self._now(Part.REST)
        self._interruption = Interruption.of(
            health.request, health.requesting_rank, spans_nodes=spans_nodes(os.environ)
        )
        return health

    def _update(self, step: int, health: StepHealth, rate: float) -> bool:
        """Clip and apply the gradients if nothing is wrong with them.

        All ranks see the same health and do the same.  Returns False if the run went back.
        """
        loss_scale = self.model.loss_scale
        if health.culprits and math.isfinite(health.loss) and loss_scale.failed():
            words = f"gradients overflow float16; the loss scale is {loss_scale.value:,.0f} now"
            self._judge.overflowed()
            self._say(f"step {step} skipped: {words}")
            return True
        can_go_back = self._checkpoints.saved_step > 0 or self.first_step > 1
        judgement = self._judge.judge(step, health, can_go_back=can_go_back)
        match judgement.verdict:
            case Verdict.APPLY:
                if judgement.words:
                    self._say(f"step {step}: {judgement.words}")
                clipping = clip_scale(health.grad_norm, self.config.optim.clip_grad_norm)
                self._now(Part.OPTIMIZER)
                self.model.optimizer.step(rate, clipping / loss_scale.value)
                self._now(Part.REST)
                loss_scale.passed()
            case Verdict.SKIP:
                self._say(f"step {step} skipped: {judgement.words}")
            case Verdict.GO_BACK:
                return not self._go_back(step, judgement.words)
            case Verdict.STOP:
                raise DivergenceError(
                    f"step {step}: {judgement.words}; the parameters are those after step "
                    f"{step - 1}. {judgement.way_out}"
                )
        return True

    def _go_back(self, step: int, words: str) -> bool:
        """Go back to the newest checkpoint, and leave out the data since then.

        Returns False, having skipped `step` only, if there is no checkpoint.
        """
        self._now(Part.CHECKPOINT, "saving")
        self._checkpoints.settle(self._say)
        self._doing = "loading"
        done = self._checkpoints.go_back(step)
        if not done:
            self._say(f"step {step} skipped: {words}; there is no checkpoint to go back to")
            self._now(Part.REST)
            return False
        self.step = done
        if self.reporter is not None:
            for line in self.take_notices():
                self.reporter.note(line)
            self.reporter.go_back(done)
        words = f"{words}; going back to step {done} and leaving out the data since then"
        self._say(f"step {step}: {words}")
        return True

    def _validate(self) -> list[Validation]:
        """Return the mean loss of every validation set, the same on all ranks."""
        found, replica = [], (self.mesh.data_rank, self.mesh.degrees.dp)
        for name in self.source.validation_sets:
            self._now(Part.VALIDATION, _VALIDATING)
            batch = self.source.validation_batch(*replica, name=name)
            loss = self.model.evaluator.step(batch.tokens, batch.labels, segments=batch.segments)
            self._doing = _COMPARING
            mean = gather_health(self._reported(loss), None, self.mesh.steps).loss
            found.append(Validation(name, mean, self._bits_per_byte.of(name, batch.labels, mean)))
        self._now(Part.REST)
        return found

    def _save_if_due(self, step: int, health: StepHealth) -> None:
        """Go on with the save that is under way, and begin one if a checkpoint is due.

        One is due in the last step before the run leaves, which is said first.
        """
        interruption, settings = self._interruption, self.config.run
        if interruption is not None and step < settings.steps:
            saves = "saves and " if settings.saves else ""
            self._say(f"step {step}: {interruption.reason}; the run {saves}ends")
        self._now(Part.CHECKPOINT, _SAVING)
        self._checkpoints.save_if_due(step, health, self._say, leaves=interruption is not None)
        self._now(Part.REST)

    def finish_save(self) -> None:
        """Return when the newest checkpoint that was begun is complete.  Collective.

        Raises CheckpointError on all ranks if it could not be written.
        """
        self._doing = "saving"
        self._checkpoints.finish()

    def finish(self) -> None:
        """Finish the last step's communication, and report the peak memory of every stage.

        Raises CheckpointError on all ranks if the last checkpoint could not be written, or is not
        there any more.
        """
        self._doing = "saving"
        self.model.optimizer.settle()
        if self.config.run.device == "cuda":
            torch.cuda.synchronize()  # no rank may leave while others still gather
        self.finish_save()
        newest, reporter = self._checkpoints.newest, self.reporter
        missing = None if reporter is None else reporter.missing(newest)
        self._meter.memory()
        gathered = self.mesh.world.all_gather_json((self._meter.most_bytes, missing))
        for _, words in gathered:
            if words is not None:
                raise CheckpointError(f"the run is not whole: {words}")
        if reporter is not None:
            reporter.finish(worst_of_stages([peak for peak, _ in gathered], self.mesh.degrees))

    def give_up(self, words: str) -> None:
        """Complete the checkpoint that was begun, if it can be, and close the metrics.  Collective.

        All ranks call it after a failure that they share, which `words` are of.  None of them
        leaves before the others can: a launcher soon ends those that a failed rank left behind.
        """
        with suppress(CheckpointError):
            self.finish_save()
        if self.reporter is not None:
            self.reporter.note(words)
            with suppress(OSError):
                self.reporter.close(failed=True)
        self.mesh.world.barrier()

    def ending(self) -> Ending:
        """Return how this rank ends after `finish`; the first rank has the words."""
        warning = self._requests.clear()
        if self._interruption is None or self.step == self.config.run.steps:
            return Ending(EXIT_OK, warning)
        ending = self._interruption.ending(self.step, is_saved=self.config.run.saves)
        words = f"{ending.words}{warning}" if self.mesh.rank == 0 else ""
        return replace(ending, words=words)

    def activity(self) -> Activity:
        """Return where this rank stands; another thread calls it.

        On CUDA the host runs ahead of the device, so the device may not have come so far.
        """
        doing = self._doing
        where = f"step {self.step}, {doing}"
        if doing not in (_TRAINING, _VALIDATING):
            return Activity(where, waits=doing in (_COMPARING, _SAVING))
        op = (self.model.trainer if doing == _TRAINING else self.model.evaluator).operation
        return Activity(where) if op is None else Activity(f"{where}, {op}", op.action.waits)

    def _now(self, part: Part, doing: str | None = None) -> None:
        """Charge the time from here on to `part`, and let the heartbeat say `doing` if given."""
        self._stopwatch.switch(part)
        self._doing = doing or self._doing

    def _reported(self, loss: torch.Tensor | None) -> torch.Tensor | None:
        """Return the loss on the rank that reports it, else None."""
        return loss if self.model.reports_loss else None

    def _say(self, line: str) -> None:
        """Print a line once for all ranks."""
        if self.reporter is not None:
            self.reporter.say(line)
        elif self.mesh.rank == 0:
            print(line, file=sys.stderr, flush=True)


def _meet(
    config: RunConfig, plan: RunPlan, source: Source, watcher: Watcher, *, compares: bool
) -> Mesh:
    """Connect the ranks.  Compare their nodes too, if `compares` or if they are several."""
    if not (compares or must_compare(os.environ, config.run)):
        return connect(config, plan, watcher)
    preflight = Preflight(
        config, plan.schedule.text(), source.contents, compiled=compiled_parts(config)
    )
    mesh = connect(config, plan, watcher, preflight.compare_nodes)
    preflight.measure_network(mesh.world)
    return mesh


def _begin_report(
    run: Run, directory: RunDirectory, config_yaml: str, warnings: Sequence[str]
) -> Reporter:
    """Return the reporter of a run; its directory then has what is known before the first step."""
    config, source = run.config, run.source
    reporter = Reporter(config, run.plan, directory, run.first_step)
    reporter.start(config_yaml, run.take_notices(), warnings, text=run.text_words())
    if source.tokenizer is not None and source.end_token is not None:
        words = tokenizer_config(
            source.tokenizer,
            source.end_token,
            begin=source.begin_token,
            longest=config.model.seq_length,
            after_end=config.data.packing == "none",
        )
        directory.keep_tokenizer(source.tokenizer, words)
    return reporter


def _leave_done(done: int, settings: RunSettings, rank: int) -> NoReturn:
    """Leave a run whose newest checkpoint is of step `done`, with nothing left to do."""
    steps = count_words(done, "step")
    words = f"{settings.directory} has done all of its {steps}; run.steps=N goes on to step N"
    leave(Ending(EXIT_OK, words if rank == 0 else ""))
