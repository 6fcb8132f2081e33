"""All decisions of a run before it starts: RunConfig + number of ranks -> RunPlan.

No process group, tensor or device exists yet.  The plan is a pure function of the configuration, so
every rank computes the same one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from schedules.bound import step_bound
from schedules.check import check_base, check_program, check_schedule
from schedules.cost import CostModel
from schedules.generators import GENERATORS, BaseOrderError, base_order, complete, generate
from schedules.generators.auto import CapError, Option, Watch, solve
from schedules.generators.stored import recognise
from schedules.generators.weave import BaseOrder
from schedules.ir import Kind, Schedule
from schedules.layout import Layout
from schedules.lower import Program, lower
from schedules.offload import place_transfers
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.timeline import Timeline
from schedules.torch_csv import from_csv
from schedules.vocab import VOCAB_ALGORITHMS, End, VocabAlgorithm, evaluation, searched_algorithms
from vp_train.config import (
    ConfigError,
    CostConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    printable,
)
from vp_train.config.errors import unknown
from vp_train.durable import UnreadableError, read_text
from vp_train.planning.cluster import assumed_costs, tied_seconds
from vp_train.planning.degrees import Degrees, split_ranks
from vp_train.planning.estimate import estimate_cost
from vp_train.planning.placement import (
    balanced_rows,
    offloaded_layers,
    split_layers,
    split_vocabulary,
)
from vp_train.planning.ramp import BatchRamp
from vp_train.planning.workload import Workload
from vp_train.units import count_words, human_bytes, plural
from vp_train.vocab.shard import Shard, split_rows

SEARCHING = "schedule=auto: searching for the fastest schedule"
SEQUENCE_DEVICES = ("cuda",)
_LARGEST_SCHEDULE = 1 << 24  # bytes; a pass takes about 7
_MOST_LINES = 1_100  # of a schedule; parallel.pp is at most 1,024
_LARGE_SCHEDULE = 1 << 20  # bytes, which take a second to parse
_MICROBATCH = re.compile(r"\b[0-9]{1,9}[A-Z]([0-9]{1,9})\b")  # of a pass
_VISIBLE = 5e-4  # of a gap; less is printed as the same
_LONGEST_NAME = 200  # characters of a schedule's name
# Planning takes a minute at this size, which 64 ranks reach with 2,048 microbatches.
MOST_FORWARD_PASSES = 1 << 17


def in_its_memory_words(gap: float, held: float | None) -> str:
    """Return what follows a gap: `StepPlan.gap_in_its_memory`, if it is known and smaller."""
    if held is None or gap - held < _VISIBLE:
        return ""
    return f", {held:.1%} over that in its memory"


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The plan of one step: what is computed, on which rank and when.

    Every replica does the same.  Ranks are pipeline ranks here, each of which is `degrees.tp`
    ranks of the run.  `layers[s]` are the global layers of stage s, and `recompute[s]` says what
    its backward recomputes.  `shards[end][r]` are the vocabulary rows of rank r.  If the schedule
    was found under a cap, `caps[r]` are the bytes that rank r may keep, and the timeline's lower
    bound is the one for these caps.  Otherwise `caps` is empty.
    """

    work: Workload
    layers: tuple[range, ...]
    recompute: tuple[str, ...]
    shards: dict[End, tuple[Shard, ...]]
    problem: Problem
    cost: CostModel
    schedule: Schedule
    timeline: Timeline
    caps: tuple[float, ...]

    @property
    def degrees(self) -> Degrees:
        return self.work.degrees

    def gap_in_its_memory(self) -> float | None:
        """Return the time above the bound of schedules that keep no more on any rank, a fraction.

        None where activations wait in host memory, of which the bound knows nothing.
        """
        if self.cost.offload_bytes:
            return None
        bound = step_bound(self.problem, self.cost, self.timeline.peak_bytes).seconds
        return max(0.0, self.timeline.makespan / bound - 1) if bound else 0.0

    @property
    def layers_of_ranks(self) -> tuple[tuple[range, ...], ...]:
        """The layers of each rank, by stage."""
        layout = self.problem.layout
        return tuple(
            tuple(self.layers[stage] for stage in layout.stages_of(rank))
            for rank in range(layout.num_ranks)
        )

    @property
    def num_ranks(self) -> int:
        return self.problem.layout.num_ranks


@dataclass(frozen=True, slots=True)
class RunPlan(StepPlan):
    """A step, and the programs with which every rank runs it and the evaluation.

    The step is one after the batch-size ramp; `replan` plans those within it.
    """

    ramp: BatchRamp
    program: Program
    evaluation_problem: Problem
    evaluation_program: Program


def make_plan(config: RunConfig, num_ranks: int, watch: Watch | None = None) -> RunPlan:
    """Plan and check the whole run on `num_ranks` ranks.

    `watch` sees the search of schedule=auto go on.  Raises ConfigError, which names the value and
    the way out.
    """
    degrees = split_ranks(config.parallel, num_ranks)
    _check_profile(config, num_ranks)
    num_evaluated = config.eval_microbatches_of(degrees.dp)
    _check_size(degrees.pp, num_evaluated, "run.eval_microbatches")
    step = plan_step(config, num_ranks, watch)
    problem, cost = step.problem, step.cost
    ramp = BatchRamp.of(
        config.batch_ramp, config.num_microbatches, config.micro_batch_size, degrees.dp
    )
    evaluated = Problem(
        problem.layout, num_evaluated, evaluation(problem.algorithm), forward_only=True
    )
    evaluation_program = lower(generate("gpipe", evaluated, cost), evaluated, cost)
    check_program(evaluation_program, evaluated)
    return RunPlan(
        work=step.work,
        layers=step.layers,
        recompute=step.recompute,
        shards=step.shards,
        problem=problem,
        cost=cost,
        schedule=step.schedule,
        timeline=step.timeline,
        caps=step.caps,
        ramp=ramp,
        program=_program(step),
        evaluation_problem=evaluated,
        evaluation_program=evaluation_program,
    )


def _check_profile(config: RunConfig, num_ranks: int) -> None:
    """Raise ConfigError for a rank or a step to be profiled that the run does not have."""
    beyond = [rank for rank in config.run.profile_ranks if rank >= num_ranks]
    if config.run.profile_steps and beyond:
        raise ConfigError(
            f"run.profile_ranks has rank {beyond[0]}, but the ranks are 0 to {num_ranks - 1}"
        )
    late = [step for step in config.run.profile_steps if step > config.run.steps]
    if late:
        raise ConfigError(
            f"run.profile_steps has step {late[0]}, but the last one is run.steps="
            f"{config.run.steps}; give an earlier step, or more steps"
        )


def replan(config: RunConfig, plan: RunPlan, num_microbatches: int) -> RunPlan:
    """Return the plan of a step with another number of microbatches on the same ranks.

    What a rank owns stays as in `plan`.  Raises ConfigError if the schedule cannot have that
    number.
    """
    if num_microbatches == plan.work.num_microbatches:
        return plan
    try:
        resized = replace(config, num_microbatches=num_microbatches, batch_ramp=())
        step = plan_step(resized, plan.degrees.num_ranks)
    except ConfigError as error:
        words = (
            f"batch_ramp has steps of {count_words(num_microbatches, 'microbatch')} in each replica"
        )
        raise ConfigError(f"{words}: {error}") from None
    ours, theirs = (
        (one.layers, one.recompute, one.shards, one.problem.layout) for one in (step, plan)
    )
    assert ours == theirs, "what a rank owns depends on the number of microbatches"
    return replace(
        plan,
        work=step.work,
        problem=step.problem,
        cost=step.cost,
        schedule=step.schedule,
        timeline=step.timeline,
        program=_program(step),
    )


def check_ramp(config: RunConfig, plan: RunPlan) -> None:
    """Raise ConfigError if the batch-size ramp falls, or one of its steps cannot be planned."""
    unit, before = config.micro_batch_size * plan.degrees.dp, 0
    for step, count in plan.ramp.stages:
        if not before <= count <= plan.ramp.full:
            what, other = "more than", f"{plan.ramp.full * unit} of a full step"
            if count < before:
                what, other = "fewer than", f"{before * unit} before"
            raise ConfigError(
                f"batch_ramp: {count_words(count * unit, 'sequence')} until step {step} are {what} "
                f"the {other}, and a ramp rises; give smaller steps "
                "first, none above a full one, or drop it"
            )
        before = count
    for num_microbatches in plan.ramp.sizes:
        replan(config, plan, num_microbatches)


def _program(step: StepPlan) -> Program:
    """Return the checked program of a step."""
    problem = step.problem
    program = lower(step.schedule, problem, step.cost, tied=step.work.model.tied_embeddings)
    check_program(program, problem)
    return program


def plan_step(config: RunConfig, num_ranks: int, watch: Watch | None = None) -> StepPlan:
    """Plan and simulate one step, without the programs that would run it.

    `watch` sees the search of schedule=auto go on, and may end it.  Raises ConfigError like
    `make_plan`, and KeyboardInterrupt if the search was ended before it found anything.
    """
    if config.schedule.is_solved:
        return _solved(config, num_ranks, watch)
    if config.schedule.file is not None:
        return _stored(config, _workload(config, num_ranks), Path(config.schedule.file))
    return draft_step(config, num_ranks).with_named(config.schedule.name)


def named_base_order(name: str, problem: Problem) -> BaseOrder:
    """Return the checked base order of the schedule `name`.  Raises ConfigError if it is wrong."""
    try:
        return base_order(name, problem)
    except BaseOrderError as error:
        raise ConfigError(str(error)) from None


def draft_step(config: RunConfig, num_ranks: int) -> Draft:
    """Plan one step of a named schedule before its passes are ordered.

    Raises ConfigError like `make_plan`.
    """
    work, name = _workload(config, num_ranks), config.schedule.name
    if name not in GENERATORS:
        raise ConfigError(unknown(f"schedule.name={name}", name, (*GENERATORS, "auto")))
    layout = _layout(name, work.degrees.pp, config.schedule.num_chunks)
    return _draft(
        config, work, layout, _algorithm(config.vocab.algorithm), GENERATORS[name].split_backward
    )


def _workload(config: RunConfig, num_ranks: int) -> Workload:
    degrees = split_ranks(config.parallel, num_ranks)
    if config.parallel.sequence_parallel and config.run.device not in SEQUENCE_DEVICES:
        raise ConfigError(
            "parallel.sequence_parallel=true needs run.device=cuda, not "
            f"{config.run.device}: megatron-core exchanges parts of sequences on GPUs only; drop it"
        )
    return Workload.of(config, degrees)


def row_advice(config: RunConfig, step: StepPlan) -> str | None:
    """Return advice to balance the work of `step` by uneven vocabulary rows, in words.

    It is None if that would gain less than 1 %.
    """
    work, problem, layers, recompute = step.work, step.problem, step.layers, step.recompute
    if not problem.algorithm.sharded or work.vocab.balance or work.vocab.shards is not None:
        return None
    cost = assumed_costs(work, config.cluster, config.cost)
    rows = balanced_rows(work, cost, problem.layout, layers, recompute)
    shards = {end: split_rows(work.model.vocab_size, step.num_ranks, rows) for end in End}
    balanced = estimate_cost(work, cost, problem, layers=layers, recompute=recompute, shards=shards)
    now, then = busiest_seconds(problem, step.cost), busiest_seconds(problem, balanced)
    if then >= 0.99 * now:
        return None
    return (
        f"vocab.balance=true would take {1 - then / now:.1%} off the work of the busiest rank, "
        f"with {min(rows):,} to {max(rows):,} rows"
    )


def busiest_seconds(problem: Problem, cost: CostModel) -> float:
    """Return the seconds of work of one microbatch on the busiest rank."""
    ranks = range(problem.layout.num_ranks)
    return max(sum(cost.seconds(item) for item in problem.passes_of(rank, 0)) for rank in ranks)


@dataclass(frozen=True, slots=True)
class Draft:
    """A step whose passes are not ordered yet."""

    work: Workload
    layers: tuple[range, ...]
    recompute: tuple[str, ...]
    shards: dict[End, tuple[Shard, ...]]
    problem: Problem
    cost: CostModel

    def with_carried(self, turn: float | None = None) -> Draft:
        """Return this step as if what the links to hosts carry never took memory of the device.

        turn: the seconds of a link for what a rank offloads of one microbatch, None for those of
        its forwards.
        """
        cost, kept = self.cost, list(self.cost.stage_bytes)
        if not cost.offload_bytes:
            return self
        for rank in range(self.problem.layout.num_ranks):
            stages = self.problem.layout.stages_of(rank)
            needed = sum(cost.offload(stage)[1] for stage in stages)
            free = turn or sum(cost.pass_seconds[Kind.F][stage] for stage in stages)
            part = min(1.0, free / needed) if needed else 1.0
            for stage in stages:
                kept[stage] -= part * cost.offload(stage)[0]
        return replace(self, cost=replace(cost, stage_bytes=tuple(kept)))

    def with_named(self, name: str) -> StepPlan:
        """Generate the schedule `name`, then check and simulate this step with it.

        Raises ConfigError, naming the pass, if its generator returns a wrong base order.
        """
        try:
            schedule = generate(name, self.problem, self.cost)
        except BaseOrderError as error:
            raise ConfigError(str(error)) from None
        return self.with_schedule(schedule)

    def with_schedule(self, schedule: Schedule, caps: tuple[float, ...] = ()) -> StepPlan:
        """Check and simulate this step with `schedule`.

        If it has no transfers to the host, those of the settings are placed.  Raises ValueError if
        the schedule does not solve this problem.
        """
        check_schedule(schedule, self.problem)
        if not schedule.offloads:
            schedule = place_transfers(schedule, self.problem, self.cost)
        for offload in schedule.offloads:
            if not self.cost.offload(offload.item.stage)[0]:
                raise ValueError(
                    f"it offloads {offload.item}, but stage {offload.item.stage} offloads none of "
                    "its layers; set parallel.offload_activations"
                )
        return self.with_timeline(schedule, simulate(schedule, self.problem, self.cost, caps), caps)

    def with_timeline(
        self, schedule: Schedule, timeline: Timeline, caps: tuple[float, ...] = ()
    ) -> StepPlan:
        """Return this step with `schedule` and what its simulation says, unchecked."""
        return StepPlan(
            work=self.work,
            layers=self.layers,
            recompute=self.recompute,
            shards=self.shards,
            problem=self.problem,
            cost=self.cost,
            schedule=schedule,
            timeline=timeline,
            caps=caps,
        )


def _draft(
    config: RunConfig,
    work: Workload,
    layout: Layout,
    algorithm: VocabAlgorithm,
    split_backward: bool,
) -> Draft:
    cost = assumed_costs(work, config.cluster, config.cost)
    return draft(work, cost, config.parallel, layout, algorithm, split_backward=split_backward)


def draft(
    work: Workload,
    cost: CostConfig,
    parallel: ParallelConfig,
    layout: Layout,
    algorithm: VocabAlgorithm,
    *,
    split_backward: bool,
) -> Draft:
    """Plan one step before its passes are ordered; degrees are those of `work`.

    Raises ConfigError if the step is too long, or if layers, rows or measured costs do not fit it.
    """
    _check_size(layout.num_stages, work.num_microbatches, "num_microbatches")
    layers = split_layers(work.model, parallel, layout)
    recompute = tuple(parallel.recompute_of(stage) for stage in range(layout.num_stages))
    rows: Sequence[int] | None = work.vocab.shards
    if work.vocab.balance and algorithm.sharded:
        rows = balanced_rows(work, cost, layout, layers, recompute)
    problem = Problem(layout, work.num_microbatches, algorithm, split_backward)
    shards = {end: split_vocabulary(work, problem, end, rows) for end in End}
    part = parallel.offload_activations
    costs = estimate_cost(
        work,
        cost,
        problem,
        layers=layers,
        recompute=recompute,
        shards=shards,
        offloaded=[offloaded_layers(len(stage), part) for stage in layers] if part else (),
    )
    return Draft(
        work, layers=layers, recompute=recompute, shards=shards, problem=problem, cost=costs
    )


def _check_size(num_stages: int, num_microbatches: int, setting: str) -> None:
    """Raise ConfigError for a step with more passes than can be planned."""
    if num_stages * num_microbatches > MOST_FORWARD_PASSES:
        raise ConfigError(
            f"{setting}: {count_words(num_microbatches, 'microbatch')} on "
            f"{count_words(num_stages, 'stage')} are more than {MOST_FORWARD_PASSES:,} "
            f"forward passes; lower {setting}, or set a smaller parallel.pp or a larger parallel.dp"
        )


def _algorithm(name: str) -> VocabAlgorithm:
    if name == "auto":
        raise ConfigError(
            "vocab.algorithm=auto needs schedule=auto; with another schedule choose one of "
            f"{', '.join(VOCAB_ALGORITHMS)}"
        )
    if name not in VOCAB_ALGORITHMS:
        known = unknown(f"vocab.algorithm={name}", name, tuple(VOCAB_ALGORITHMS))
        raise ConfigError(f"{known}, or auto with schedule=auto")
    return VOCAB_ALGORITHMS[name]


def _layout(name: str, num_ranks: int, num_chunks: int | None) -> Layout:
    try:
        return GENERATORS[name].layout_of(num_ranks, num_chunks)
    except ValueError as error:
        raise ConfigError(
            f"schedule.num_chunks={num_chunks} with schedule.name={name}: {error}; add "
            "schedule.num_chunks=null"
        ) from None


def read_schedule(path: Path) -> str:
    """Return the text of schedule.file.  Raises ConfigError where there is none."""
    try:
        return read_text(path, _LARGEST_SCHEDULE)
    except UnreadableError as error:
        raise ConfigError(
            f"schedule.file={error}; vp-simulate --out DIR writes DIR/schedule.txt"
        ) from None


def _stored(config: RunConfig, work: Workload, path: Path) -> StepPlan:
    """Return the step of a schedule from a file.

    The file is our own text, or a CSV of torch.distributed.pipelining.  A CSV has no vocabulary
    passes, so they are added.
    """
    text = read_schedule(path)
    try:
        if text.count("\n") > _MOST_LINES:
            raise ValueError(f"it has more than {_MOST_LINES:,} lines; every rank has one")
        if len(text) > _LARGE_SCHEDULE:
            _check_microbatches(text, work.num_microbatches)
        is_csv = path.suffix.lower() == ".csv"
        schedule = from_csv(text, path.stem) if is_csv else Schedule.parse(text.rstrip())
        schedule = replace(schedule, name=printable(schedule.name)[:_LONGEST_NAME])
        layout, split_backward = recognise(schedule)
        if layout.num_ranks != work.degrees.pp:
            raise ValueError(
                f"it is for {layout.num_ranks} pipeline {plural(layout.num_ranks, 'rank')}, not "
                f"{work.degrees.pp}; "
                f"use parallel.pp={layout.num_ranks}"
            )
        algorithm = _algorithm(config.vocab.algorithm)
        _check_problem(schedule, work.num_microbatches, algorithm)
        step = _draft(config, work, layout, algorithm, split_backward)
        if is_csv:
            check_base(schedule, step.problem)
            schedule = complete(
                schedule.name, schedule.ranks, step.problem, step.cost, keep_order=True
            )
        return step.with_schedule(schedule)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"schedule.file={path} does not fit this run: {error}") from None


def _check_problem(schedule: Schedule, num_microbatches: int, algorithm: VocabAlgorithm) -> None:
    """Raise ValueError if a schedule is a whole one for other microbatches or another vocabulary.

    What it lacks or has beyond that is for `check_schedule`.
    """
    passes = list(schedule.passes())
    found = {item.microbatch for _, item in passes}
    forwards = {item.microbatch for _, item in passes if item.kind is Kind.F and not item.stage}
    if forwards == found == set(range(len(found))):
        _require_microbatches(len(found), num_microbatches)
    num_ranks, ranks = schedule.num_ranks, {rank for rank, item in passes if item.kind is Kind.S}
    if num_ranks == 1 or len(ranks) not in (1, num_ranks):
        return
    is_split = len(ranks) > 1
    if is_split == algorithm.sharded:
        return
    words = f"split over all ranks, but vocab={algorithm.name} keeps it on one"
    if not is_split:
        words = f"on rank {min(ranks)} alone, but vocab={algorithm.name} splits it over all"
    fitting = [known.name for known in VOCAB_ALGORITHMS.values() if known.sharded == is_split]
    raise ValueError(f"its output layer is {words}; use vocab={' or '.join(reversed(fitting))}")


def _check_microbatches(text: str, num_microbatches: int) -> None:
    """Raise ValueError if a text with passes is for another number of microbatches.

    It is looked at before it is parsed, which takes seconds for a million passes.
    """
    found = max(map(int, _MICROBATCH.findall(text)), default=num_microbatches - 1) + 1
    _require_microbatches(found, num_microbatches)


def _require_microbatches(found: int, num_microbatches: int) -> None:
    """Raise ValueError if a schedule is for `found` microbatches, which are others."""
    if found == num_microbatches:
        return
    fits = found * 2 <= MOST_FORWARD_PASSES
    way_out = f"use num_microbatches={found}" if fits else "that is more than can be planned"
    raise ValueError(
        f"it is for {count_words(found, 'microbatch')}, not {num_microbatches:,}; {way_out}"
    )


def searched_drafts(
    config: RunConfig, num_ranks: int, algorithms: Sequence[str]
) -> list[tuple[Option, Draft]]:
    """Return what schedule=auto searches with these vocabulary algorithms: options and their steps.

    These are all base schedules that the settings allow, each with its layout.  Raises ConfigError
    if they allow none.
    """
    work = _workload(config, num_ranks)
    drafts: list[tuple[Option, Draft]] = []
    refusals: list[str] = []
    for name, family in GENERATORS.items():
        for algorithm in map(_algorithm, algorithms):
            try:
                layout = _searched_layout(name, work.degrees.pp, config.schedule.num_chunks)
                step = _draft(config, work, layout, algorithm, family.split_backward)
            except ConfigError as error:
                refusals.append(str(error))
            else:
                drafts.append((Option(name, step.problem, step.cost), step))
    if not drafts:
        raise ConfigError(refusals[0])
    return drafts


def _solved(config: RunConfig, num_ranks: int, watch: Watch | None) -> StepPlan:
    """Return the step of the fastest schedule that the search finds under the cap on memory.

    It tries all base schedules with their layouts and, with vocab=auto, all algorithms.
    """
    settings = config.schedule
    names = searched_algorithms() if config.vocab.algorithm == "auto" else (config.vocab.algorithm,)
    drafts = searched_drafts(config, num_ranks, names)
    num_ranks = drafts[0][1].work.degrees.pp
    cost = drafts[0][1].cost
    caps = (_cap_bytes(settings, drafts[0][1]),) * num_ranks
    try:
        return _fastest_with_tied(config, drafts, caps, watch)
    except BaseOrderError as error:
        raise ConfigError(str(error)) from None
    except CapError as error:
        if error.is_stopped:
            raise KeyboardInterrupt(
                "schedule=auto was stopped before it found a schedule that fits: the best so far "
                f"keeps {human_bytes(error.reached)} on rank {error.rank}, the cap is "
                f"{human_bytes(error.cap)}"
            ) from None
        if settings.cap_gib is not None or settings.cap_microbatches is not None:
            raise ConfigError(_cap_words(error, config, cost.microbatch_bytes(num_ranks))) from None
        # Nobody asked for this cap.  Use the lowest peak that the search reached instead.
        return _fastest_with_tied(config, drafts, (error.reached,) * num_ranks, watch)


def _fastest_with_tied(
    config: RunConfig,
    drafts: Sequence[tuple[Option, Draft]],
    caps: tuple[float, ...],
    watch: Watch | None,
) -> StepPlan:
    """Return the step of the fastest schedule found, counting what a tied matrix takes after it.

    Where two ranks sum the gradient of their copies, steps that have one copy are searched too.
    Raises CapError and BaseOrderError like `solve`.
    """

    def found(among: Sequence[tuple[Option, Draft]]) -> tuple[StepPlan, bool]:
        solution = solve([option for option, _ in among], caps, watch)
        step = next(step for option, step in among if option is solution.option)
        return step.with_schedule(solution.schedule, caps), solution.is_stopped

    def tied(step: Draft | StepPlan) -> float:
        """Return the seconds of that sum, which on a CPU are not known."""
        work, problem = step.work, step.problem
        return tied_seconds(work, config.cluster, config.optim, problem) if work.on_cuda else 0.0

    best, is_stopped = found(drafts)
    others = [(option, step) for option, step in drafts if tied(step) < tied(best)]
    if others and not is_stopped:
        with suppress(CapError):
            other, _ = found(others)
            best = min(best, other, key=lambda step: step.timeline.makespan + tied(step))
    return best


def _searched_layout(name: str, num_ranks: int, num_chunks: int | None) -> Layout:
    """Return the layout of a schedule; `num_chunks` counts if the schedule leaves a choice."""
    family = GENERATORS[name]
    return family.layout_of(num_ranks, num_chunks if family.layout == "loop" else None)


def _cap_bytes(settings: ScheduleConfig, step: Draft) -> float:
    """Return the cap of every rank; unless one is set, what 1F1B keeps on the rank with most."""
    cost, layout = step.cost, step.problem.layout
    if settings.cap_gib is not None:
        return settings.cap_gib * 2**30
    if settings.cap_microbatches is not None:
        return settings.cap_microbatches * cost.microbatch_bytes(layout.num_ranks)
    more = max(1, step.problem.algorithm.extra_in_flight)
    most = max(
        (layout.num_ranks - (rank if layout.num_chunks == 1 else 0) + more)
        * sum(cost.stage_bytes[stage] for stage in layout.stages_of(rank))
        for rank in range(layout.num_ranks)
    )
    return most + 2 * max(cost.shard_bytes)


def _cap_words(error: CapError, config: RunConfig, unit: float) -> str:
    """Return why a cap is too low, and the least cap that works, in words.

    unit: the bytes that the layers of a microbatch keep on a rank, on average.
    """
    setting, word, other = "schedule.cap_microbatches", "times the layers of a microbatch", ""
    if config.schedule.cap_gib is not None:
        setting, word, unit = "schedule.cap_gib", "GiB", 2**30
        other = ", or use a smaller micro_batch_size" * (config.micro_batch_size > 1)
    reached = f"{error.reached / unit:.4g} {word} on rank {error.rank}"
    why = f"a single microbatch keeps {reached}, and no schedule less"
    if error.reached > error.alone * (1 + 1e-9):
        alone = f"{error.alone / unit:.4g}"
        why = f"the best schedule found keeps {reached}, and a single microbatch {alone}"
    return (
        f"{setting}={error.cap / unit:.4g} is too low: {why}.  "
        f"Set {setting} to {_rounded_up(error.reached / unit)} or more{other}"
    )


def digits_behind(value: float) -> int:
    """Return how many of the first four digits of a positive value stand behind its point."""
    return 3 - math.floor(math.log10(value))


def _rounded_up(value: float) -> str:
    """Return the least number of four digits that is not below `value`, which is positive."""
    digits = digits_behind(value)
    return f"{math.ceil(value * 10.0**digits) / 10.0**digits:.{max(0, digits)}f}"
