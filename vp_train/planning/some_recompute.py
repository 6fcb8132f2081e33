"""Recomputation in as few stages as memory needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vp_train.config import OptimConfig
from vp_train.planning.memory import total_bytes
from vp_train.planning.peaks import Peak, at_peak
from vp_train.planning.plan import Draft, StepPlan


@dataclass(frozen=True, slots=True)
class SomeRecompute:
    """The stages of a choice, of which as few recompute as memory needs.

    On every rank those come first that save most.  Steps in which as many stages of every rank
    recompute are made for that, and shared by the ranks.

    step: one in which no stage recomputes, as in `at_peak`, and which holds a shard.
    saving: a draft in which all do.
    optimizers: those with which memory is looked at.
    orders: the stages of each rank, that which saves most first.
    saved: the bytes that every stage saves.
    steps, needs: what was computed, by the number of stages, and by the rank too.
    """

    step: StepPlan
    saving: Draft
    optimizers: Sequence[OptimConfig]
    orders: tuple[list[int], ...]
    saved: Mapping[int, float]
    steps: dict[int, StepPlan] = field(default_factory=dict)
    needs: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        schedule: str,
        without: Draft,
        saving: Draft,
        peaks: tuple[Peak, ...],
        optimizers: Sequence[OptimConfig],
    ) -> SomeRecompute:
        layout = without.problem.layout
        kept, fewer = without.cost.stage_bytes, saving.cost.stage_bytes
        saved = {
            stage: count * (kept[stage] - fewer[stage])
            for rank, peak in enumerate(peaks)
            for stage, count in zip(layout.stages_of(rank), peak.counts, strict=True)
        }
        orders = tuple(
            sorted(layout.stages_of(rank), key=saved.__getitem__, reverse=True)
            for rank in range(len(peaks))
        )
        step = at_peak(without, schedule, peaks, holds=True)
        return cls(step, saving, optimizers, orders, saved)

    def with_more(
        self, kinds: Sequence[str], excess: Mapping[int, float]
    ) -> tuple[str, ...] | None:
        """Return what every stage recomputes if ranks save these bytes more than with `kinds`.

        None if a rank has no other stage that could recompute.
        """
        found = list(kinds)
        for rank, missing in excess.items():
            left = [s for s in self.orders[rank] if found[s] != self.saving.recompute[s]]
            if not left:
                return None
            for stage in left:
                found[stage] = self.saving.recompute[stage]
                missing -= self.saved[stage]
                if missing <= 0:
                    break
        return tuple(found)

    def where_needed(self, optim: OptimConfig, limit: float) -> tuple[str, ...]:
        """Return what every stage recomputes if ranks may need `limit` bytes with `optim`."""
        which = self.optimizers.index(optim)
        kinds, count = list(self.step.recompute), 0  # at first as many as on the rank before
        for rank, order in enumerate(self.orders):
            while count > 0 and self._needs(rank, count - 1)[which] <= limit:
                count -= 1
            while count < len(order) and self._needs(rank, count)[which] > limit:
                count += 1
            for stage in order[:count]:
                kinds[stage] = self.saving.recompute[stage]
        return tuple(kinds)

    def _needs(self, rank: int, count: int) -> list[float]:
        """Return the bytes of a rank with each optimizer if so many of its stages recompute."""
        if (rank, count) not in self.needs:
            self.needs[rank, count] = total_bytes(self._step(count), self.optimizers, rank)
        return self.needs[rank, count]

    def _step(self, count: int) -> StepPlan:
        """Return the step in which so many stages of every rank recompute."""
        if count not in self.steps:
            kinds, held = list(self.step.recompute), list(self.step.cost.stage_bytes)
            for stage in (stage for order in self.orders for stage in order[:count]):
                kinds[stage] = self.saving.recompute[stage]
                held[stage] = self.saving.cost.stage_bytes[stage]
            cost = replace(self.step.cost, stage_bytes=tuple(held))
            self.steps[count] = replace(self.step, recompute=tuple(kinds), cost=cost)
        return self.steps[count]
