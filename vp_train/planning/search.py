"""The search for the fastest ways to run a model on a cluster, over every split of its GPUs.

A lower bound on the step time of a choice is cheap, and no schedule beats it.  The search first
computes the bound of every choice, which the code calls weighing.  Then it simulates choices in the
order of their bounds, until no choice left could be among the best.  A choice that cannot fit into
memory is refused instead of being simulated.  Choices are weighed in random order: if time runs out
early, those that were weighed are a sample of all.  One of them is simulated in any case.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from schedules.bound import step_bound
from schedules.cost import CostModel
from schedules.generators import GENERATORS, searched_schedules
from schedules.ir import Schedule
from schedules.timeline import Timeline
from schedules.vocab import searched_algorithms
from vp_train.config import RECOMPUTE, ClusterConfig, ConfigError, OptimConfig, RunConfig
from vp_train.planning.cluster import gradient_seconds, on_cluster, tied_seconds
from vp_train.planning.degrees import Degrees
from vp_train.planning.memory import rank_memory, rank_state
from vp_train.planning.plan import Draft, StepPlan, draft_step, named_base_order
from vp_train.planning.report import PlanReport, optimizer_seconds, report_of
from vp_train.planning.workload import Workload
from vp_train.units import human_bytes

_MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
_GIB = 2**30
# Settings that a choice resets because they do not go with what it sets.
_RESET = {
    "parallel": ("placement", "recompute_per_stage"),
    "schedule": ("file", "cap_gib", "cap_microbatches"),
}
# With this many microbatches per rank, every schedule but gpipe has reached its peak in flight.
_PIPELINES_FULL = 3


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run the batch."""

    degrees: Degrees
    micro_batch_size: int
    num_microbatches: int
    schedule: str
    vocab: str
    recompute: str

    def applied(self, config: RunConfig) -> RunConfig:
        """Return `config` with this choice.

        Layers that do not split evenly over the stages are placed as evenly as possible.
        """
        parallel, degrees = config.parallel, self.degrees
        return replace(
            config,
            schedule=replace(
                config.schedule, name=self.schedule, file=None, cap_gib=None, cap_microbatches=None
            ),
            vocab=replace(config.vocab, algorithm=self.vocab),
            parallel=replace(
                parallel,
                pp=degrees.pp,
                dp=degrees.dp,
                tp=degrees.tp,
                recompute=self.recompute,
                recompute_per_stage=None,
                placement="balanced" if parallel.placement == "even" else parallel.placement,
            ),
            micro_batch_size=self.micro_batch_size,
            num_microbatches=self.num_microbatches,
        )

    def overrides(self, config: RunConfig) -> str:
        """Return the overrides to append to the command line of `config` to use this choice.

        They include resets of settings that do not go with it.
        """
        degrees, chosen = self.degrees, self.applied(config)
        words = [f"parallel.dp={degrees.dp} parallel.pp={degrees.pp} parallel.tp={degrees.tp}"]
        words.append(
            f"schedule.name={self.schedule} vocab.algorithm={self.vocab} "
            f"parallel.recompute={self.recompute}"
        )
        words.append(
            f"micro_batch_size={self.micro_batch_size} num_microbatches={self.num_microbatches}"
        )
        for section, names in _RESET.items():
            for name in names:
                value = getattr(getattr(chosen, section), name)
                if value != getattr(getattr(config, section), name):
                    words.append(f"{section}.{name}={'null' if value is None else value}")
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A choice that cannot be run, and why.

    `bound` is the lower bound of its step in seconds.  `excess` are the bytes above the limit, if
    that is the reason.
    """

    choice: Choice
    reason: str
    bound: float = 0.0
    excess: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A choice that fits, and its report."""

    choice: Choice
    report: PlanReport


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a search: `best` is sorted, the fastest first.

    `open_choices` counts the choices that might be faster than the last of `best` but were not
    simulated in time.  Choices that were not weighed count too.
    """

    best: tuple[Found, ...]
    refused: tuple[Refusal, ...]
    num_choices: int
    num_simulated: int
    open_choices: int


def choices(config: RunConfig) -> Iterator[Choice]:
    """Yield every way to run the batch of `config` on all GPUs of its cluster.

    The batch is num_microbatches x micro_batch_size x parallel.dp (null: 1) sequences.  The ranks
    of a tensor-parallel group are on one node.
    """
    cluster, model = config.cluster, config.model
    batch = config.num_microbatches * config.micro_batch_size * (config.parallel.dp or 1)
    for tp in _divisors(cluster.gpus_per_node):
        for pp in _divisors(cluster.num_gpus // tp):
            degrees = Degrees(cluster.num_gpus // tp // pp, pp, tp)
            if pp > model.num_layers:
                continue
            for size in _MICRO_BATCH_SIZES:
                if batch % (degrees.dp * size):
                    continue
                for schedule in searched_schedules() if pp > 1 else ("1f1b",):
                    for vocab in searched_algorithms() if pp * tp > 1 else ("none",):
                        for recompute in RECOMPUTE:
                            yield Choice(
                                degrees,
                                micro_batch_size=size,
                                num_microbatches=batch // degrees.dp // size,
                                schedule=schedule,
                                vocab=vocab,
                                recompute=recompute,
                            )


def _divisors(count: int) -> list[int]:
    return [divisor for divisor in range(1, count + 1) if count % divisor == 0]


@dataclass(frozen=True, slots=True)
class _Candidate:
    choice: Choice
    draft: Draft
    bound: float  # of the whole step


def search(
    config: RunConfig, top: int, in_time: Callable[[], bool], progress: Callable[[str], object]
) -> Result:
    """Return the `top` fastest choices that fit, as far as they are found while `in_time()`.

    At least one choice is weighed, and simulated unless it cannot fit.  `progress` gets lines to
    show.  Raises ConfigError if there is no choice at all.
    """
    every = list(choices(config))
    if not every:
        raise ConfigError(
            f"no split of {config.cluster.num_gpus} GPUs has whole microbatches: "
            f"num_microbatches={config.num_microbatches} x "
            f"micro_batch_size={config.micro_batch_size} x parallel.dp={config.parallel.dp or 1} "
            "sequences must be a multiple of dp for some dp; use another batch"
        )
    # First weigh: a heap of candidates by their lower bounds.
    queue: list[tuple[float, int, _Candidate]] = []
    refused: list[Refusal] = []
    bounds: dict[tuple[object, ...], float] = {}
    weighing = list(enumerate(every))
    random.Random(1).shuffle(weighing)
    while weighing and (not queue or in_time()):
        number, choice = weighing.pop()
        candidate = _weigh(config, choice, bounds)
        if isinstance(candidate, Refusal):
            refused.append(candidate)
        else:
            queue.append((candidate.bound, number, candidate))
        progress(f"{len(every) - len(weighing):,} of {len(every):,} choices weighed")
    heapq.heapify(queue)
    # Then simulate until the smallest bound left is above the time of the last of the best.
    best: list[Found] = []
    simulated = 0
    while (
        queue
        and (len(best) < top or queue[0][0] < best[-1].report.step_seconds)
        and (not simulated or in_time())
    ):
        _, _, candidate = heapq.heappop(queue)
        if (refusal := _too_large(candidate, config.cluster, config.optim)) is not None:
            refused.append(refusal)
            progress(_progress(simulated, len(queue), best))
            continue
        report = _simulated(candidate, config.cluster, config.optim)
        simulated += 1
        if report.fits:
            best = sorted([*best, Found(candidate.choice, report)], key=_order)[:top]
        else:
            refused.append(
                Refusal(candidate.choice, report.memory_words, candidate.bound, report.excess)
            )
        progress(_progress(simulated, len(queue), best))
    last = best[-1].report.step_seconds if len(best) == top else float("inf")
    still_open = len(weighing) + sum(bound < last for bound, _, _ in queue)
    return Result(
        tuple(best),
        tuple(sorted(refused, key=lambda refusal: refusal.bound)),
        len(every),
        simulated,
        still_open,
    )


def _order(found: Found) -> tuple[float, float]:
    """Return the sort key: faster first, and less memory first if times agree in four digits."""
    memory = found.report.ranks[found.report.worst].memory.total
    return float(f"{found.report.step_seconds:.4g}"), memory


def _progress(simulated: int, left: int, best: list[Found]) -> str:
    shown = f", the best takes {best[0].report.step_seconds:.3g} s" if best else ""
    return f"{simulated} simulated, at most {left:,} more{shown}"


def _weigh(
    config: RunConfig, choice: Choice, bounds: dict[tuple[object, ...], float]
) -> _Candidate | Refusal:
    """Return the choice with a lower bound on its step, or why it cannot be run.

    `bounds` caches the bounds of the passes, which several schedules share.
    """
    chosen, cluster, optim = choice.applied(config), config.cluster, config.optim
    try:
        cost = on_cluster(Workload.of(chosen, choice.degrees), cluster, config.cost)
        draft = draft_step(replace(chosen, cost=cost), cluster.num_gpus)
    except ConfigError as error:
        return Refusal(choice, str(error))
    layout = draft.problem.layout
    key = (
        choice.degrees,
        choice.micro_batch_size,
        choice.vocab,
        choice.recompute,
        layout,
        draft.problem.split_backward,
    )
    if key not in bounds:
        bounds[key] = step_bound(draft.problem, draft.cost).seconds
    blank = _unordered(draft, Schedule(choice.schedule, ()), draft.cost)
    states = [rank_state(blank, optim, rank) for rank in range(layout.num_ranks)]
    parameters = max(state.parameters for state in states)
    after = gradient_seconds(draft.work, cluster, optim, parameters)
    after += tied_seconds(draft.work, cluster, draft.problem)
    after += max(optimizer_seconds(choice.degrees, cluster, optim, state) for state in states)
    return _Candidate(choice, draft, bounds[key] + after)


def _too_large(candidate: _Candidate, cluster: ClusterConfig, optim: OptimConfig) -> Refusal | None:
    """Return a refusal if no order of the passes fits into memory, else None."""
    minimum = minimum_step(candidate.choice.schedule, candidate.draft)
    limit = cluster.memory_gib * _GIB
    needs = [rank_state(minimum, optim, rank).state for rank in range(minimum.num_ranks)]
    if max(needs) <= limit:
        needs = [rank_memory(minimum, optim, rank).total for rank in range(minimum.num_ranks)]
    worst = max(range(len(needs)), key=needs.__getitem__)
    excess = needs[worst] - limit
    if excess <= 0:
        return None
    reason = (
        f"needs at least {human_bytes(needs[worst])} on rank {worst}, "
        f"{human_bytes(excess)} more than {cluster.memory_gib:g} GiB"
    )
    return Refusal(candidate.choice, reason, candidate.bound, excess)


def minimum_step(schedule: str, draft: Draft) -> StepPlan:
    """Return the step without its vocabulary passes, for a lower bound on memory.

    Adding the vocabulary passes keeps the order of the other passes, or with a split backward the
    number of microbatches in flight.  It can only increase the peak.  What is kept from I to W is
    left out, because W may follow I at once.
    """
    problem = draft.problem
    few = replace(
        problem,
        num_microbatches=min(problem.num_microbatches, _PIPELINES_FULL * problem.layout.num_ranks),
    )
    if schedule == "gpipe":
        few = problem
    order = Schedule(schedule, named_base_order(schedule, few))
    cost = (
        replace(draft.cost, weight_bytes=(0.0,) * problem.layout.num_stages)
        if problem.split_backward
        else draft.cost
    )
    return _unordered(draft, order, cost)


def _unordered(draft: Draft, schedule: Schedule, cost: CostModel) -> StepPlan:
    """Return a step that was not simulated: its timeline is empty."""
    return StepPlan(
        work=draft.work,
        layers=draft.layers,
        recompute=draft.recompute,
        shards=draft.shards,
        problem=draft.problem,
        cost=cost,
        schedule=schedule,
        timeline=Timeline((), (), (), ()),
        caps=(),
    )


def about_bytes(config: RunConfig) -> float:
    """Return about how many bytes the worst rank needs: those of `minimum_step` and a held shard.

    A schedule that is searched for or read from a file counts as 1f1b.  Raises ConfigError.
    """
    name = (
        config.schedule.name
        if config.schedule.name in GENERATORS and config.schedule.file is None
        else "1f1b"
    )
    vocab = config.vocab.algorithm if config.vocab.algorithm != "auto" else searched_algorithms()[0]
    named = replace(
        config,
        schedule=replace(
            config.schedule, name=name, file=None, cap_gib=None, cap_microbatches=None
        ),
        vocab=replace(config.vocab, algorithm=vocab),
    )
    draft = draft_step(named, config.cluster.num_gpus)
    minimum = minimum_step(name, draft)
    return max(
        rank_memory(minimum, config.optim, rank).total + draft.cost.shard_bytes[rank]
        for rank in range(minimum.num_ranks)
    )


def _simulated(candidate: _Candidate, cluster: ClusterConfig, optim: OptimConfig) -> PlanReport:
    draft = candidate.draft
    return report_of(draft.with_named(candidate.choice.schedule), cluster, optim)
