"""The meter of a rank: its seconds by part of a step, its memory, and the figures of all ranks."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch

from vp_train.config import RunConfig
from vp_train.metrics.figures import RankFigures, figures_of
from vp_train.metrics.progress import StepReport
from vp_train.optim.adamw import StepHealth
from vp_train.optim.verdict import Judge
from vp_train.pipeline.stopwatch import Stopwatch
from vp_train.planning.cluster import known_peak_flops
from vp_train.planning.degrees import Degrees
from vp_train.planning.plan import RunPlan


class Meter:
    """Measures the steps of one rank.

    most_bytes: the most memory that `memory` has found.
    """

    def __init__(self, config: RunConfig, plan: RunPlan, stopwatch: Stopwatch) -> None:
        self._config, self._plan, self._stopwatch = config, plan, stopwatch
        self.most_bytes = 0.0

    def figures(self) -> Callable[[], list[float]]:
        """Return a function that returns the numbers of `RankFigures` when the device is done.

        The memory is that of now: on a GPU the most in this step, since all of it is issued.
        """
        allocated, reserved = self.memory()
        return lambda: RankFigures(self._stopwatch.take(), allocated, reserved).numbers()

    def memory(self) -> tuple[float, float]:
        """Return the most bytes allocated and reserved; see `RankFigures`.

        CUDA graphs use memory that counts only as reserved, so with them that is both.
        """
        if self._config.run.device == "cpu":
            allocated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
            reserved = 0.0
        else:
            stats = torch.cuda.memory_stats_as_nested_dict()
            torch.cuda.reset_peak_memory_stats()
            allocated, reserved = (
                float(stats[f"{name}_bytes"]["all"]["peak"]) for name in ("allocated", "reserved")
            )
            allocated = reserved if self._config.run.cuda_graphs else allocated
        self.most_bytes = max(self.most_bytes, allocated)
        return allocated, reserved

    def report(
        self,
        step: int,
        health: StepHealth,
        judge: Judge,
        *,
        rate: float,
        speed: float,
        trained: Mapping[str, float],
    ) -> StepReport:
        """Return what is shown and recorded of a step.

        `rate` is its learning rate, `speed` in tokens per second, `trained` are its figures of
        `Batches.trained`.
        """
        return StepReport(
            step,
            health.loss,
            health.grad_norm,
            rate,
            speed,
            health.peak_bytes,
            judge.spikes,
            judge.skipped,
            {**trained, **self._figures_of_ranks(step, health)},
        )

    def _figures_of_ranks(self, step: int, health: StepHealth) -> dict[str, float]:
        best, ramp = self._best_seconds, self._plan.ramp
        if best is not None:
            best *= ramp.at(step) / ramp.full
        return figures_of(list(map(RankFigures.of, health.figures)), best)

    @cached_property
    def _best_seconds(self) -> float | None:
        """The seconds of a whole step with all ranks at their peak; None if that is unknown."""
        config, work, degrees = self._config, self._plan.work, self._plan.degrees
        peak = known_peak_flops(config.cluster, config.run.dtype)
        if peak is None:
            return None
        return degrees.dp * work.step_flops / (peak * degrees.num_ranks)


def worst_of_stages(peaks: Sequence[float], degrees: Degrees) -> list[float]:
    """Return the most of the `peaks` of all ranks by rank of the pipeline."""
    worst = [0.0] * degrees.pp
    for rank, peak in enumerate(peaks):
        pipeline_rank = degrees.place(rank)[1]
        worst[pipeline_rank] = max(worst[pipeline_rank], peak)
    return worst
