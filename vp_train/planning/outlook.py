"""What comparisons ask of a step: its time and its memory, of a long one from short ones."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.generators import GENERATORS
from vp_train.config import RunConfig
from vp_train.planning.cluster import limit_of
from vp_train.planning.degrees import split_ranks
from vp_train.planning.memory import most_host_bytes
from vp_train.planning.plan import draft_step
from vp_train.planning.report import brief_report, with_costs
from vp_train.planning.short import short_step
from vp_train.planning.weigh import Scales

# Forward passes up to which a step is planned whole, in about a second, and up to which also where
# short steps say as well whether it is worth a line.
LONG, SHORT = 1 << 14, 1 << 12


@dataclass(frozen=True, slots=True)
class Outlook:
    """The time and the memory of a step.

    seconds: those of the step.
    memory: the bytes of the rank that needs most.
    host: the bytes of a node's host memory.
    excess, host_excess: the bytes above what a rank, and what a node has; at most 0 if they fit.
    is_planned: whether the whole step was planned, not short ones.
    """

    seconds: float
    memory: float
    host: float
    excess: float
    host_excess: float
    is_planned: bool

    @property
    def fits(self) -> bool:
        return self.excess <= 0 and self.host_excess <= 0


def outlook_of(config: RunConfig, *, whole: int = LONG) -> Outlook:
    """Return what a step of `config` takes and needs.  Raises ConfigError like `brief_report`.

    It is planned whole if it has at most so many forward passes, or if its order is searched for or
    comes from a file.  Of a longer one short steps say what it takes, and keep what it keeps.
    """
    cluster, optim = config.cluster, config.optim
    named = config.schedule.file is None and not config.schedule.is_solved
    if not named or num_passes(config) <= whole:
        report = brief_report(config)
        seconds, host = report.step_seconds, report.host.total
        memory, is_planned = report.ranks[report.worst].memory.total, True
    else:
        drafted = draft_step(with_costs(config), cluster.num_gpus)
        step, passes, _ = short_step(drafted, config.schedule.name)
        scales = Scales(config, limit_of(cluster))
        seconds, is_planned = passes + scales.after(step, optim), False
        memory = scales.needs(step, [optim])[0][0]
        host = most_host_bytes(step, optim, cluster.gpus_per_node).total
    return Outlook(
        seconds, memory, host, memory - limit_of(cluster), host - cluster.host_limit, is_planned
    )


def num_passes(config: RunConfig) -> int:
    """Return the forward passes of a step of all stages of a named schedule."""
    family = GENERATORS[config.schedule.name]
    pp = split_ranks(config.parallel, config.cluster.num_gpus).pp
    return config.num_microbatches * family.layout_of(pp, config.schedule.num_chunks).num_stages
