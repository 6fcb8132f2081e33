"""What would make a step shorter, with the command for it: Explanation -> remedies.

The measured seconds become settings of `cost`, so other schedules can be planned with them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from schedules.generators import searched_schedules
from schedules.ir import Kind, Pass
from schedules.lower import Action
from schedules.vocab import searched_algorithms
from vp_train.config import ConfigError, RunConfig
from vp_train.config.typed import shell_word
from vp_train.explain.causes import SLOW, Explanation
from vp_train.planning.plan import StepPlan, plan_step
from vp_train.profile.costs import measured_cost

WORTH = 0.02  # of the step: what saves less is not advised
_MOST_FORWARD_PASSES = 1 << 13  # of a step for which other schedules are tried
_COSTS = "explained.yaml"  # of this step; those that vp-profile measures have another name
_PROFILED = "measured.yaml"


@dataclass(frozen=True, slots=True)
class Alternative:
    """A schedule with a vocabulary algorithm, simulated with the measured times.

    peak_bytes: the activations of the worst rank.
    """

    schedule: str
    vocab: str
    seconds: float
    peak_bytes: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The run's own schedule and all others, fastest first, by the same simulation."""

    own: Alternative
    others: tuple[Alternative, ...]

    @property
    def fastest(self) -> Alternative:
        """The fastest of all, the run's own if no other one is faster."""
        return min((self.own, *self.others), key=lambda item: item.seconds)


@dataclass(frozen=True, slots=True)
class GoingOn:
    """How a command goes on with the run.

    base: the words with which it takes the settings of the run.
    done: the step that it goes on from; 0 where there is no checkpoint.
    steps: run.steps, 0 if it is not known.
    run: the directory of the run, as it was typed.
    larger: the overrides for half as many microbatches of twice the size, if they fit.
    """

    base: str
    done: int
    steps: int
    run: str
    larger: str | None = None

    @property
    def profiled(self) -> int:
        """A step that is still to come, and not the first one, which also warms up."""
        return self.done + 2

    @property
    def words(self) -> str:
        """The base, with more steps if the run has too few left."""
        more = f" run.steps={self.profiled}" if self.profiled > self.steps else ""
        return f"{self.base}{more}"


@dataclass(frozen=True, slots=True)
class Remedy:
    """Something that makes the step shorter, or its plan truer.

    seconds: of the step with it, by simulation; None where that is not known.
    """

    cause: str
    words: str
    command: str
    seconds: float | None = None


def cost_settings(explanation: Explanation, plan: StepPlan) -> dict[str, Any]:
    """Return the settings of `cost` that follow from the measured step.

    They are those that vp-profile measures, and on a CPU the times of messages.  Slow ranks become
    rank_slowness.
    """
    step = explanation.step
    settings: dict[str, Any] = dict(measured_cost(plan, explanation.own))
    if step.device == "cpu":
        times = {row.name: row.measured for row in explanation.kinds if row.measured is not None}
        others = (*Kind, "hop", Action.OFFLOAD, Action.RELOAD)
        barriers = [times[name] for name in times if name not in others]
        if "hop" in times:
            settings["hop_seconds"] = times["hop"]
        if barriers:
            settings["collective_seconds"] = fmean(barriers)
    copies = [span for span in step.measured.comm if span.kind in (Action.OFFLOAD, Action.RELOAD)]
    copied = sum(step.cost.offload(_stage_of(span.name))[0] for span in copies)
    if step.device != "cpu" and copied and (seconds := sum(span.seconds for span in copies)):
        settings["host_bytes_per_second"] = copied / seconds
    if max(explanation.slowness) > 1:
        settings["rank_slowness"] = list(explanation.slowness)
    return settings


def _stage_of(copy: str) -> int:
    """Return the stage of a copy such as `offload:2F0`."""
    return Pass.parse(copy.partition(":")[2]).stage


def as_traced(explanation: Explanation, config: RunConfig, schedule: Path) -> RunConfig:
    """Return the settings of the run as its traced step had them.

    The number of microbatches may have grown since.  The file `schedule` has what schedule=auto
    found, so it is not searched for again.
    """
    problem = explanation.step.problem
    config = replace(config, num_microbatches=problem.num_microbatches)
    if not config.schedule.is_solved:
        return config
    found = replace(config.schedule, file=str(schedule), cap_gib=None, cap_microbatches=None)
    vocab = replace(config.vocab, algorithm=problem.algorithm.name)
    return replace(config, schedule=found, vocab=vocab)


def plan_of(explanation: Explanation, config: RunConfig) -> StepPlan:
    """Return the plan of the run.  Raises ConfigError if its settings have another layout now."""
    plan = plan_step(config, len(explanation.ranks))
    if plan.problem != explanation.step.problem:
        raise ConfigError("config.yaml of the run has another layout than the traced step")
    return plan


def compare_schedules(
    config: RunConfig,
    plan: StepPlan,
    settings: Mapping[str, Any],
    proceed: Callable[[], bool] = lambda: True,
) -> Comparison | None:
    """Return how long the step would take with other schedules at the measured costs.

    It is None for a step so large that this would take minutes.  `proceed` is asked before every
    simulation whether to go on.
    """
    problem, num_ranks = plan.problem, plan.degrees.num_ranks
    if problem.layout.num_stages * problem.num_microbatches > _MOST_FORWARD_PASSES:
        return None
    measured = replace(config, cost=replace(config.cost, **settings))
    own = _simulated(measured, num_ranks)
    if own is None:
        return None
    found = []
    for name in searched_schedules():
        for algorithm in searched_algorithms():
            if not proceed():
                break
            chosen = replace(
                measured,
                schedule=replace(
                    measured.schedule, name=name, file=None, cap_gib=None, cap_microbatches=None
                ),
                vocab=replace(measured.vocab, algorithm=algorithm),
            )
            if (other := _simulated(chosen, num_ranks)) is not None:
                found.append(other)
    return Comparison(own, tuple(sorted(found, key=lambda item: item.seconds)))


def larger_microbatches(config: RunConfig, plan: StepPlan) -> str | None:
    """Return the overrides for half as many microbatches, twice as large: the same batch.

    It is None where no such step can be planned.
    """
    if config.num_microbatches % 2 or config.batch_ramp:
        return None
    number, size = config.num_microbatches // 2, 2 * config.micro_batch_size
    try:
        larger = replace(config, num_microbatches=number, micro_batch_size=size)
        plan_step(larger, plan.degrees.num_ranks)
    except ConfigError:
        return None
    return f"num_microbatches={number} micro_batch_size={size}"


def _simulated(config: RunConfig, num_ranks: int) -> Alternative | None:
    """Return the simulated step; None if the settings do not allow it."""
    try:
        plan = plan_step(config, num_ranks)
    except ConfigError:
        return None
    timeline = plan.timeline
    return Alternative(
        plan.schedule.name,
        plan.problem.algorithm.name,
        timeline.makespan,
        max(timeline.peak_bytes),
    )


def remedies(
    explanation: Explanation,
    going_on: GoingOn,
    comparison: Comparison | None = None,
    cost_file: str | None = None,
) -> list[Remedy]:
    """Return what would help, what saves most first.

    `cost_file` has the measured costs if they were written.
    """
    found: list[Remedy] = []
    base, trains = going_on.base, f"vp-train {going_on.words}"
    costs = cost_file or _COSTS
    with_costs = shell_word("cost", str(costs))

    def add(name: str, words: str, command: str, seconds: float | None = None) -> None:
        if seconds is None and (what_if := explanation.what_if(name)) is not None:
            seconds = what_if.seconds
        if seconds is not None and explanation.saves(seconds, WORTH):
            found.append(Remedy(name, words, command, seconds))

    num_ranks, cpus = len(explanation.ranks), explanation.step.cpus
    enough = cpus is not None and num_ranks <= cpus
    add(
        "processors",
        "other programs or other threads of the ranks used the processors; run on an idle machine"
        if enough
        else "every rank needs a processor of its own; or use fewer ranks here",
        "" if enough or cpus is None else f"{trains} parallel.pp={cpus} parallel.dp=1",
    )
    listed = ",".join(f"{factor:g}" for factor in explanation.slowness)
    balanced = "vocab.balance=true" if explanation.step.problem.algorithm.sharded else ""
    add(
        "equal_ranks",
        f"{_slow_words(explanation)}: look there for other programs, heat or a slow clock; or plan "
        "with it",
        f"vp-simulate {base} cost.rank_slowness=[{listed}] {balanced}".rstrip(),
    )
    if len({rank.host for rank in explanation.ranks}) > 1 or explanation.on_processor == 1:
        add("planned_network", "time the network", f"vp-train {base} --preflight")
    if going_on.larger is not None:
        words = "fewer and larger microbatches, if the memory allows them"
        add("between", words, f"{trains} {going_on.larger}")
    add(
        "between",
        "a profile of a step shows what the host does between passes",
        f"{trains} run.profile_steps=[{going_on.profiled}]",
    )
    words = "copies to the host and back delay passes: lower parallel.offload_activations"
    add("free_copies", words, "")
    if explanation.rows is not None:
        rows = ",".join(map(str, explanation.rows))
        add("even_rows", "other vocabulary rows", f"{trains} vocab.shards=[{rows}]")
    writes = shlex.join(["vp-explain", going_on.run, "--cost", costs])
    first = "" if cost_file else f"{writes} && "
    add("order", "plan with the measured times", f"{first}{trains} {with_costs}")
    if comparison is not None and (best := comparison.fastest) is not comparison.own:
        add(
            "schedule",
            "the fastest schedule by simulation with the measured times",
            f"{first}{trains} schedule={best.schedule} vocab={best.vocab} {with_costs}",
            explanation.measured_seconds * best.seconds / comparison.own.seconds,
        )
    found.sort(key=lambda remedy: remedy.seconds or 0.0)
    if _is_misjudged(explanation):
        found.append(
            Remedy(
                "passes",
                "pass times were assumed: measure them, and plan with that",
                f"vp-profile {base} cluster.num_nodes=1 cluster.gpus_per_node={num_ranks} "
                f"--cost {_PROFILED}"
                if cost_file is None
                else f"vp-simulate {base} {with_costs}",
            )
        )
    return found


def _slow_words(explanation: Explanation) -> str:
    names = [f"rank {rank.rank} on {rank.host}" for rank in explanation.slow[:4] if rank.host]
    return ", ".join(names) or "slow ranks"


def _is_misjudged(explanation: Explanation) -> bool:
    """Return whether assumed pass times are off by more than a tenth."""
    rows = [
        row for row in explanation.kinds if row.name in tuple(Kind) and row.source != "measured"
    ]
    planned = sum(row.count * row.planned for row in rows)
    measured = sum(row.count * (row.measured or 0.0) for row in rows)
    return not 1 / SLOW < (measured / planned if planned else 1.0) < SLOW
