"""What comparisons ask of a step: its time and its memory, of a long one from short ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from schedules.generators import GENERATORS
from vp_train.config import ConfigError, RunConfig
from vp_train.planning.cluster import limit_of
from vp_train.planning.degrees import split_ranks
from vp_train.planning.memory import most_host_bytes, total_bytes
from vp_train.planning.peaks import keeps_all
from vp_train.planning.plan import draft_step
from vp_train.planning.report import PlanReport, brief_report, with_costs
from vp_train.planning.short import short_step
from vp_train.planning.weigh import Scales

# A step of at most MOST_PLANNED forward passes is planned whole, in about a second.  Where many are
# looked at, short steps tell first of one with more than MOST_AT_ONCE whether it is worth that.
MOST_PLANNED, MOST_AT_ONCE = 1 << 14, 1 << 12


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

    @classmethod
    def of(cls, report: PlanReport) -> Outlook:
        """Return the outlook of a step that was planned whole."""
        memory, host = report.ranks[report.worst].memory.total, report.host.total
        return cls(report.step_seconds, memory, host, report.excess, report.host_excess, True)

    @property
    def fits(self) -> bool:
        return self.excess <= 0 and self.host_excess <= 0


def outlook_of(config: RunConfig, *, whole: int = MOST_PLANNED) -> Outlook:
    """Return what a step of `config` takes and needs.

    It is planned whole if it has at most `whole` forward passes, or if its order is searched for or
    comes from a file.  Of a longer one short steps say what it takes, and keep what it keeps.
    Those of gpipe keep less, so it is planned whole too.  Raises ConfigError like `brief_report`,
    and for a step of gpipe of more than MOST_PLANNED forward passes.
    """
    if config.schedule.file is None and not config.schedule.is_solved:
        count = num_passes(config)
        if keeps_all(config.schedule.name):
            if count > MOST_PLANNED:
                raise ConfigError(
                    f"a step of {config.schedule.name} with {count:,} forward passes is too long "
                    "to say what it takes; use fewer microbatches"
                )
        elif count > whole:
            return _of_short_steps(config)
    return Outlook.of(brief_report(config))


def _of_short_steps(config: RunConfig) -> Outlook:
    """Return what short steps say of a long one."""
    cluster, optim = config.cluster, config.optim
    drafted = draft_step(with_costs(config), cluster.num_gpus)
    step, passes, _ = short_step(drafted, config.schedule.name)
    limit = limit_of(cluster)
    seconds = passes + Scales(config, limit).after(step, optim)
    memory = max(total_bytes(step, [optim], rank)[0] for rank in range(step.num_ranks))
    host = most_host_bytes(step, optim, cluster.gpus_per_node).total
    return Outlook(seconds, memory, host, memory - limit, host - cluster.host_limit, False)


def promising(config: RunConfig, gains: Callable[[Outlook], bool]) -> Outlook:
    """Return the outlook of a step, planned whole where short steps promise that it is worth it.

    That is if it then fits and `gains`, and has at most MOST_PLANNED forward passes.  Raises
    ConfigError like `outlook_of`.
    """
    found = outlook_of(config, whole=MOST_AT_ONCE)
    if found.is_planned or num_passes(config) > MOST_PLANNED:
        return found
    return outlook_of(config) if found.fits and gains(found) else found


def num_passes(config: RunConfig) -> int:
    """Return the forward passes of a step of all stages of a named schedule."""
    family = GENERATORS[config.schedule.name]
    pp = split_ranks(config.parallel, config.cluster.num_gpus).pp
    return config.num_microbatches * family.layout_of(pp, config.schedule.num_chunks).num_stages
