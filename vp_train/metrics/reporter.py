"""The report of a run by rank 0: on the console and in the files of the run's directory."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from rich.console import Console

from schedules.render import chrome_trace, svg
from schedules.timeline import Timeline
from schedules.vocab import End
from vp_train.config import RunConfig, RunSettings, printable
from vp_train.config.run import SETTLED_STEP
from vp_train.durable import UnreadableError, open_to_append, write_all
from vp_train.metrics.figures import RankFigures, Spent
from vp_train.metrics.log import MetricsLog, warn_unwritten
from vp_train.metrics.progress import (
    ProgressDisplay,
    StepReport,
    Validation,
    print_line,
    validation_words,
)
from vp_train.metrics.resumed import rate_words
from vp_train.metrics.run_directory import RunDirectory, TakenError
from vp_train.metrics.step_times import RankTimes, step_times
from vp_train.metrics.summary import (
    SUMMARY,
    explain_words,
    rank_table,
    step_words,
    summarize,
)
from vp_train.metrics.trackers import trackers_of
from vp_train.planning.plan import RunPlan
from vp_train.units import count_words, loss_words


def _ramp_words(config: RunConfig, first_step: int) -> str:
    """Return what is left of the batch-size ramp in words; empty if that is nothing."""
    ramp = [(step, count) for step, count in config.batch_ramp if step >= first_step]
    parts = [f"{count_words(count, 'sequence')} until step {step:,}" for step, count in ramp]
    return ", ".join([*parts, "then all microbatches"]) if parts else ""


def _past_profiles(settings: RunSettings, first_step: int) -> str:
    """Return in words that no step of run.profile_steps is to come; empty if one is."""
    if not settings.profile_steps or max(settings.profile_steps) >= first_step:
        return ""
    steps = ",".join(map(str, settings.profile_steps))
    return f"run.profile_steps=[{steps}] are done, so no step is recorded; give later ones"


def _no_trace_words(settings: RunSettings) -> str:
    """Return in words that run.trace_step is beyond the last step; empty for the default one."""
    if settings.trace_step <= settings.steps or settings.trace_step == SETTLED_STEP:
        return ""
    return (
        f"run.trace_step={settings.trace_step} is beyond the last step, run.steps="
        f"{settings.steps}, so no step is timed; give an earlier one, or more steps"
    )


def _profile_words(settings: RunSettings, first_step: int) -> str:
    """Return which steps were profiled, and into which files.

    It is empty without a step of run.profile_steps from `first_step` on.  Files of an earlier start
    are not named.
    """
    if max(settings.profile_steps, default=0) < first_step:
        return ""
    names = sorted(
        path.name
        for path in settings.profiles.glob("step-*.json.gz")
        if path.name >= f"step-{first_step:08d}-"
    )
    if not names:
        return f"no step of run.profile_steps={list(settings.profile_steps)} was profiled"
    return f"profiles for https://ui.perfetto.dev are in {settings.profiles}: {', '.join(names)}"


class _Console(Console):
    """A console that goes silent when its reader has gone, as `head` does."""

    has_no_reader = False

    def on_broken_pipe(self) -> None:
        self.has_no_reader = self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Reporter:
    """A reporter writes console lines, metrics, schedule, trace and final table of one run.

    Metrics go to metrics.jsonl, to TensorBoard and to run.trackers.
    """

    def __init__(
        self, config: RunConfig, plan: RunPlan, directory: RunDirectory, first_step: int
    ) -> None:
        self._config, self._plan, self._directory = config, plan, directory
        self._console = _Console(width=None if sys.stdout.isatty() else 110)
        trackers = trackers_of(config, directory.path)
        # A run that begins anew has no record yet, not even that of step 0.
        last_step = first_step - 1 if first_step > 1 else -1
        self._log = MetricsLog(directory.metrics, directory.tensorboard, last_step, trackers)
        self._first_step = first_step
        # The last steps, and when they ended.
        self._ended: deque[tuple[int, float]] = deque(maxlen=config.run.log_every + 1)
        self._spent = Spent()
        self._traced = plan  # of the step that was measured
        self._measured: Timeline | None = None
        self._parameters: Sequence[int] = ()
        self._has_warned = False
        self._pending: tuple[StepReport, dict[str, float]] | None = None
        self._baseline: dict[str, float] = {}  # the record of step 0, until that of step 1

    def start(
        self,
        config_yaml: str,
        notices: Sequence[str] = (),
        warnings: Sequence[str] = (),
        *,
        text: str = "",
    ) -> None:
        """Write configuration, environment and schedule, and print which steps are to come.

        `text` says how much text these use.

        `notices` and `warnings` were said before there was a reporter; the former are kept in
        notices.txt, the latter in env.json.
        """
        config, plan, directory = self._config, self._plan, self._directory
        rates = rate_words(config, self._first_step - 1)
        directory.write("config.yaml", config_yaml)
        directory.write_environment(warnings)
        directory.write("schedule.txt", plan.schedule.text())
        title = f"{plan.schedule.name}, vocabulary {plan.problem.algorithm.name}: as planned"
        directory.write("schedule.svg", svg(plan.timeline, title))
        lines = [
            *([f"batch     {words}"] if (words := _ramp_words(config, self._first_step)) else []),
            f"run       {directory.path}, steps {self._first_step} to {config.run.steps}",
            *([f"tokens    {text}"] if text else []),
            *([f"resumed   {rates}"] if rates else []),
            *(
                [f"profile   {words}"]
                if (words := _past_profiles(config.run, self._first_step))
                else []
            ),
            *([f"trace     {words}"] if (words := _no_trace_words(config.run)) else []),
        ]
        for line in lines:
            print_line(self._console, line)
        for notice in notices:
            self.note(notice)
        self._progress = ProgressDisplay(config.run, self._first_step, self._console)
        self._ended.append((self._first_step - 1, time.monotonic()))

    @property
    def has_no_reader(self) -> bool:
        """Return whether nobody reads the console any more."""
        return self._console.has_no_reader

    def say(self, line: str) -> None:
        """Print a line that stays on the console, and keep it in notices.txt."""
        self._progress.say(line)
        self.note(line)

    def note(self, line: str) -> None:
        """Keep a line in notices.txt, for the report."""
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        try:
            descriptor = open_to_append(self._directory.notices)
            try:
                write_all(descriptor, f"{now} {printable(line)}\n".encode())
            finally:
                os.close(descriptor)
        except UnreadableError as error:
            self._warn(self._directory.notices, OSError(None, str(error)))
        except OSError as error:
            self._warn(self._directory.notices, error)

    def _warn(self, path: Path, error: OSError) -> None:
        """Say once that a file of the run cannot be written."""
        if not self._has_warned:
            self._has_warned = True
            warn_unwritten(path, error)

    def step(self, report: StepReport) -> None:
        """Show a finished step, and keep its values until `record` writes them.

        `validation` and `trace` may add values in between.
        """
        self._ended.append((report.step, time.monotonic()))
        work, ramp = self._plan.work, self._plan.ramp
        (before, began), (step, ended) = self._ended[0], self._ended[-1]
        microbatches = work.degrees.dp * (ramp.until(step) - ramp.until(before))
        values = report.values() | {
            "interval_tokens_per_second": microbatches * work.num_tokens / (ended - began)
        }
        self._progress.step(report.step, values)
        self._spent.add(report.figures)
        self._pending = (report, values)

    def go_back(self, step: int) -> None:
        """Drop the records after `step`: the run goes on from its checkpoint."""
        self._log.go_back(step)
        self._pending = None
        self._ended.clear()
        self._ended.append((step, time.monotonic()))

    def validation(self, step: int, found: Sequence[Validation]) -> None:
        """Show the validation after `step`, and add its figures to the step's record.

        Step 0 is before the first one.  Its record is written with that of step 1: a directory with
        metrics holds a run that has done a step.  Where nothing is held out of training,
        validation_loss is the mean of the named sets.
        """
        if step == 0:
            values = self._baseline
        else:
            assert self._pending is not None
            values = self._pending[1]
        values["validation_loss"] = sum(each.loss for each in found) / len(found)
        for each in found:
            values.update(each.values())
        uniform = math.log(self._config.model.vocab_size)
        guess = f"(a uniform guess has ln V = {loss_words(uniform)})"
        self._progress.say(f"step {step}  {validation_words(found)}  {guess}")

    def trace(
        self,
        measured: Timeline,
        parameters: Sequence[int],
        ranks: Sequence[RankTimes] = (),
        figures: Sequence[RankFigures] = (),
        plan: RunPlan | None = None,
        *,
        processors: Sequence[Sequence[float]] = (),
    ) -> None:
        """Write the measured step next to the predicted one: for Perfetto, programs and people.

        The step is kept for the final table.  `parameters` are the numbers of parameters by rank
        of the pipeline.  `ranks` and `figures` are those of all ranks of the run, `processors` the
        seconds of each pass on a processor, by rank of the pipeline.
        `plan` is that of the step, if it is not the one of all steps.
        """
        self._measured, self._parameters = measured, parameters
        self._traced = plan or self._plan
        assert self._pending is not None
        planned = self._traced.timeline
        self._pending[1].update(
            bubble_measured=measured.mean_bubble, bubble_predicted=planned.mean_bubble
        )
        if planned.gap is not None:
            self._pending[1].update(
                gap_measured=measured.makespan / planned.bound - 1.0, gap_predicted=planned.gap
            )
        trace = chrome_trace({"predicted": planned, "measured": measured})
        times = step_times(
            self._config,
            self._traced,
            measured,
            step=self._pending[0].step,
            ranks=ranks,
            figures=figures,
            processors=processors,
            words=sys.argv[1:],
        )
        names = f"{self._plan.schedule.name}, vocabulary {self._plan.problem.algorithm.name}"
        try:
            self._directory.write("trace/step_times.json", json.dumps(times))
            self._directory.write("trace/step.json", json.dumps(trace))
            self._directory.write("trace/step.svg", svg(measured, f"{names}: as measured"))
        except OSError as error:
            warn_unwritten(self._directory.trace, error)

    def record(self) -> None:
        """Write the record of the step.

        Call it before the step's checkpoint, so that no kill can lose the record of a saved step.
        """
        assert self._pending is not None
        report, values = self._pending
        self._hold(report.step - 1)
        if self._baseline:
            self._log.record(0, self._baseline)
            self._baseline = {}
        self._log.record(report.step, values)
        self._pending = None

    def _hold(self, last_step: int) -> None:
        """Make the run's directory again if it was removed, and begin its log after `last_step`.

        Raises TakenError if another process uses the directory now.
        """
        try:
            lost = self._directory.hold()
        except TakenError:
            raise
        except OSError as error:
            self._warn(self._directory.path, error)
            return
        if lost is not None:
            self.say(f"{lost}, without what was in it")
            self._log.go_back(last_step)

    def missing(self, checkpoint: Path | None) -> str | None:
        """Return what of the run is not there at its end, in words; None if nothing is missing.

        `checkpoint` is the newest one, None if the run has saved none.
        """
        try:
            if (lost := self._directory.hold()) is not None:
                self.say(f"{lost}, without what was in it")
        except OSError as error:
            return str(error)
        if checkpoint is None or (checkpoint / "manifest.json").is_file():
            return None
        return f"{checkpoint} is not there any more, somebody has removed it"

    def finish(self, peak_bytes: Sequence[float]) -> None:
        """Print the table of all ranks if a step was traced, and close all files.

        `peak_bytes` are the peaks of memory by rank.
        """
        self._progress.close()
        ranks = [{"rank": rank, "peak_bytes": peak} for rank, peak in enumerate(peak_bytes)]
        if self._measured is not None:
            rows = [shard.num_rows for shard in self._plan.shards[End.OUTPUT]]
            table = summarize(
                self._traced.timeline,
                self._measured,
                layers=self._plan.layers_of_ranks,
                rows=rows,
                parameters=self._parameters,
                peaks=peak_bytes,
            )
            ranks = list(map(asdict, table))
            degrees = self._plan.degrees
            step = "one traced step" + (" of the first replica" if degrees.dp > 1 else "")
            title = f"What was planned and what was measured ({step})"
            self._console.print(rank_table(table, title, degrees))
            print_line(
                self._console,
                step_words(self._traced.timeline, self._measured, self._config.run.device),
            )
            if words := explain_words(self._traced.timeline, self._measured, self._directory.path):
                print_line(self._console, words)
        if words := self._spent.words():
            print_line(self._console, words)
        if words := _profile_words(self._config.run, self._first_step):
            print_line(self._console, words)
        print_line(self._console, f"everything is in {self._directory.path}")
        self.close()
        summary = {"schema": SUMMARY, "ranks": ranks}
        try:
            self._directory.write("summary.json", json.dumps(summary, indent=1) + "\n")
        except OSError as error:
            warn_unwritten(self._directory.path / "summary.json", error)

    def close(self, *, failed: bool = False) -> None:
        """Close all files, and wait for what run.trackers have not got yet.

        `failed` says whether the run has failed.
        """
        self._log.close(failed=failed)


def write_report(settings: RunSettings) -> None:
    """Write report.html from the files of a run that has ended.

    Nothing is written, and nothing said, if it is not wanted or its packages are not installed.
    What goes wrong is a warning: a report is worth less than the run.
    """
    if not settings.report:
        return
    from vp_train.report import page

    if not page.is_possible():
        return
    try:
        page.write_report(settings.directory)
    except Exception as error:
        what = error if isinstance(error, OSError) else OSError(None, str(error))
        warn_unwritten(settings.directory / page.NAME, what)
