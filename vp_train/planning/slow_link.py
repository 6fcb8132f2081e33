"""How slow the links to the hosts may be for plans that offload activations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from schedules.offload import place_transfers
from schedules.simulate import simulate_order
from vp_train.config import OptimConfig, RunConfig
from vp_train.planning.choice import Choice
from vp_train.planning.cluster import host_bytes_per_second
from vp_train.planning.estimate import link_seconds
from vp_train.planning.plan import StepPlan
from vp_train.planning.short import short_step
from vp_train.planning.weigh import Scales

_HALVINGS = 6  # of the bandwidth there is, by which the least is known


def link_of(config: RunConfig) -> float:
    """Return the bandwidth between a GPU and its host in bytes per second."""
    own = config.cost.host_bytes_per_second
    return host_bytes_per_second(config.cluster) if own is None else own


def with_link(config: RunConfig, bytes_per_second: float) -> RunConfig:
    """Return `config` with a bandwidth between a GPU and its host that is not above `link_of`.

    That of the cluster, which the optimizer uses, becomes slower by the same part.
    """
    own, part = config.cost.host_bytes_per_second, bytes_per_second / link_of(config)
    cost = replace(config.cost, host_bytes_per_second=None if own is None else bytes_per_second)
    bandwidth = part * host_bytes_per_second(config.cluster)
    cluster = replace(config.cluster, host_bytes_per_second=bandwidth)
    return replace(config, cost=cost, cluster=cluster)


@dataclass(frozen=True)
class SlowLink:
    """A choice that offloads activations, beside links of any speed.

    Nothing goes late, so a slower link carries less, and the passes take as long.  Short steps say
    how much stays on the device: their order does not depend on the link, so it is searched once.
    """

    config: RunConfig
    choice: Choice

    @cached_property
    def _short(self) -> StepPlan:
        candidate = self._scales.draft(self.choice)
        return short_step(candidate.draft, self.choice.schedule)[0]

    @cached_property
    def _scales(self) -> Scales:
        return Scales(self.config, math.inf, (self._optimizer,))

    @property
    def _optimizer(self) -> OptimConfig:
        return self.choice.optimizer or self.config.optim

    def needs(self, bytes_per_second: float) -> float:
        """Return the bytes of the worst rank with such a link."""
        step = self._short
        count = 1 + max(item.microbatch for item in step.schedule.ranks[0])
        few = replace(step.problem, num_microbatches=count)
        cost = replace(
            step.cost,
            offload_seconds=tuple(
                link_seconds(0.0, bytes_per_second, size) for size in step.cost.offload_bytes
            ),
        )
        schedule = place_transfers(replace(step.schedule, offloads=()), few, cost)
        timeline = simulate_order(schedule, few, cost)
        slower = replace(step, cost=cost, schedule=schedule, timeline=timeline)
        ((needs, _),) = self._scales.needs(slower, (self._optimizer,))
        return needs

    def least(self, limit: float) -> float:
        """Return about the least bandwidth in bytes per second with which the worst rank fits.

        limit: the bytes that it may need.
        """
        fits, misses = link_of(self.config), 0.0
        for _ in range(_HALVINGS):
            middle = (fits + misses) / 2
            if self.needs(middle) <= limit:
                fits = middle
            else:
                misses = middle
        return fits

    def later(self, bytes_per_second: float) -> float:
        """Return the seconds by which the optimizer of a step takes longer with such a link."""
        slow = Scales(with_link(self.config, bytes_per_second), math.inf, (self._optimizer,))
        after, now = (one.after(self._short, self._optimizer) for one in (slow, self._scales))
        return after - now
