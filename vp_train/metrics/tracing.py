"""The traced step of a run: which one it is, and the report of what all ranks recorded in it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from schedules.timeline import Span, Timeline
from vp_train.assembly import RankModel
from vp_train.config.run import SETTLED_STEP
from vp_train.mesh import Mesh
from vp_train.metrics.figures import RankFigures
from vp_train.metrics.reporter import Reporter
from vp_train.metrics.step_times import RankTimes, pass_seconds
from vp_train.pipeline.executor import Observer
from vp_train.pipeline.recorder import Recorder, joined_communications
from vp_train.pipeline.stopwatch import Part, Stopwatch
from vp_train.pipeline.timers import Timer
from vp_train.planning.plan import RunPlan


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


class Tracer:
    """Records every pass and communication of a step on this rank, and reports those of all."""

    def __init__(self, device: str, mesh: Mesh, model: RankModel, timer: Timer) -> None:
        self._device, self._mesh, self._model, self._timer = device, mesh, model, timer

    def begin(self, inner: Observer, stopwatch: Stopwatch) -> Recorder:
        """Return the recorder of a step that all ranks begin together.  Collective."""
        parameters = list(self._model.parameters.values())
        recorder = Recorder(self._mesh.pipeline_rank, self._timer, parameters, inner)
        self._timer.settle()  # else every GPU would begin after what it still has of the last step
        stopwatch.switch(Part.WAITING)
        self._mesh.steps.barrier()
        stopwatch.switch(Part.DATA)
        self._timer.start()
        return recorder

    def report(
        self,
        recorder: Recorder,
        plan: RunPlan,
        figures: Sequence[Sequence[float]],
        reporter: Reporter | None,
    ) -> None:
        """Report all spans of the first pipeline, and the sums by kind of pass of all ranks.

        `plan` is that of the step, and `figures` are its `RankFigures` as numbers, by rank.
        Collective.
        """
        gathered = self._mesh.world.all_gather_json(self._recorded(recorder))
        if reporter is None:
            return
        degrees = self._mesh.degrees
        ranks = [
            RankTimes(rank, *degrees.place(rank), host=host, pass_seconds=seconds)
            for rank, (*_, host, seconds) in enumerate(gathered)
        ]
        first = [gathered[degrees.rank(0, p, 0)][:5] for p in range(plan.num_ranks)]
        computed, communications, peaks, parameters, processors = zip(*first, strict=True)
        timeline = Timeline(
            tuple(tuple(_spans(values)) for values in computed),
            joined_communications([_spans(values) for values in communications]),
            tuple(map(float, peaks)),
            plan.timeline.peak_in_flight,
        )
        found = list(map(RankFigures.of, figures))
        reporter.trace(timeline, parameters, ranks, found, plan, processors=processors)

    def _recorded(self, recorder: Recorder) -> tuple[Any, ...]:
        """Return as JSON what this rank recorded."""
        # Other replicas and tensor-parallel ranks run the same passes.
        is_first = self._mesh.data_rank == 0 and self._mesh.tensor_rank == 0
        spans = recorder.spans
        passes, messages = (
            [astuple(span) for span in found] if is_first else []
            for found in (spans, recorder.communications)
        )
        processor = recorder.processor_seconds if is_first and self._device == "cpu" else []
        times = platform.node(), pass_seconds(spans)
        parameters = self._model.num_parameters
        return passes, messages, recorder.peak_bytes, parameters, processor, *times


def _spans(values: list[list[Any]]) -> list[Span]:
    """Return spans from the lists of fields that JSON makes of them."""
    return [Span(*fields) for fields in values]
