"""Recomputation in as few stages as memory needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vp_train.config import OptimConfig
from vp_train.planning.memory import total_bytes
from vp_train.planning.peaks import Peak, at_peak
from vp_train.planning.plan import Draft, StepPlan


@dataclass(frozen=True, slots=True)
class Savings:
    """What every stage of a choice saves if it recomputes.

    saving: a draft in which all do.
    of_stage: the bytes that each saves on its rank.
    orders: the stages of each rank, that which saves most first.
    """

    saving: Draft
    of_stage: Mapping[int, float]
    orders: tuple[list[int], ...]

    @classmethod
    def of(cls, without: Draft, saving: Draft, peaks: Sequence[Peak]) -> Savings:
        """Return what is saved between a draft in which no stage recomputes and `saving`."""
        layout = without.problem.layout
        kept, fewer = without.cost.stage_bytes, saving.cost.stage_bytes
        of_stage = {
            stage: count * (kept[stage] - fewer[stage])
            for rank, peak in enumerate(peaks)
            for stage, count in zip(layout.stages_of(rank), peak.counts, strict=True)
        }
        orders = tuple(
            sorted(layout.stages_of(rank), key=of_stage.__getitem__, reverse=True)
            for rank in range(len(peaks))
        )
        return cls(saving, of_stage, orders)

    def with_more(
        self, kinds: Sequence[str], excess: Mapping[int, float]
    ) -> tuple[str, ...] | None:
        """Return `kinds` with more stages that recompute on each rank that has an `excess`.

        There are as many as save these bytes, or all.  None if such a rank has none left.

        kinds: what every stage recomputes.
        """
        found = list(kinds)
        for rank, missing in excess.items():
            left = [s for s in self.orders[rank] if found[s] != self.saving.recompute[s]]
            if not left:
                return None
            for stage in left:
                found[stage] = self.saving.recompute[stage]
                missing -= self.of_stage[stage]
                if missing <= 0:
                    break
        return tuple(found)

    def with_fewer(
        self, kinds: Sequence[str], spare: Mapping[int, float], *, tries: bool
    ) -> tuple[str, ...]:
        """Return `kinds` with fewer stages that recompute on each rank that has `spare` bytes.

        Those that save least stop, as long as what they saved is spare.  With `tries` at least one
        stops, on the rank with most to spare: what a link carries away no rank has to keep.
        """
        found, recompute = list(kinds), self.saving.recompute
        for rank, left in spare.items():
            for stage in reversed(self.orders[rank]):
                if found[stage] == recompute[stage] and self.of_stage[stage] <= left:
                    found[stage] = "none"
                    left -= self.of_stage[stage]
        if tries and found == list(kinds):
            for rank in sorted(spare, key=spare.__getitem__, reverse=True):
                stages = [s for s in reversed(self.orders[rank]) if found[s] == recompute[s]]
                if stages:
                    found[stages[0]] = "none"
                    break
        return tuple(found)


@dataclass(frozen=True, slots=True)
class SomeRecompute:
    """The stages of a choice, of which as few recompute as memory needs.

    On every rank those come first that save most.  Steps in which as many stages of every rank
    recompute are made for that, and shared by the ranks.

    step: one in which no stage recomputes, as in `at_peak`, and which holds a shard.
    savings: what stages save.
    optimizers: those with which memory is looked at.
    steps, needs: what was computed, by the number of stages, and by the rank too.
    """

    step: StepPlan
    savings: Savings
    optimizers: Sequence[OptimConfig]
    steps: dict[int, StepPlan] = field(default_factory=dict)
    needs: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        schedule: str,
        without: Draft,
        saving: Draft,
        peaks: Sequence[Peak],
        optimizers: Sequence[OptimConfig],
    ) -> SomeRecompute:
        step = at_peak(without, schedule, peaks, holds=True)
        return cls(step, Savings.of(without, saving, peaks), optimizers)

    def where_needed(self, optim: OptimConfig, limit: float) -> tuple[str, ...]:
        """Return what every stage recomputes if ranks may need `limit` bytes with `optim`."""
        which = self.optimizers.index(optim)
        kinds, count = list(self.step.recompute), 0  # at first as many as on the rank before
        for rank, order in enumerate(self.savings.orders):
            while count > 0 and self._needs(rank, count - 1)[which] <= limit:
                count -= 1
            while count < len(order) and self._needs(rank, count)[which] > limit:
                count += 1
            for stage in order[:count]:
                kinds[stage] = self.savings.saving.recompute[stage]
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
            saving = self.savings.saving
            for stage in (stage for order in self.savings.orders for stage in order[:count]):
                kinds[stage] = saving.recompute[stage]
                held[stage] = saving.cost.stage_bytes[stage]
            cost = replace(self.step.cost, stage_bytes=tuple(held))
            self.steps[count] = replace(self.step, recompute=tuple(kinds), cost=cost)
        return self.steps[count]
