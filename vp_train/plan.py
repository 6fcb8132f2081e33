"""RunConfig + number of ranks -> RunPlan: everything decided before a process group, a tensor or a device exists.

The plan is a pure function, so every rank computes the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from schedules.check import check_program, check_schedule
from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.ir import Kind, Schedule
from schedules.lower import Program, lower
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.timeline import Timeline
from schedules.vocab import VOCAB_ALGORITHMS, End, VocabAlgorithm, evaluation
from vp_train.config import ConfigError, ModelConfig, ParallelConfig, RunConfig
from vp_train.model import shape
from vp_train.vocab.shard import Shard, split_rows

DEFAULT_RANKS = 4  # where neither a launcher nor parallel.pp says how many
_ITEM_BYTES = {"float32": 4, "float64": 8}
# Of the three matrix products of a shard, those in S: Z, and with it dx for one_barrier; the rest are T's.
_S_GEMMS = {"none": 2, "one_barrier": 2, "two_barrier": 1, "naive": 1}


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, where and when.

    `layers[s]` are the global layers of stage s; `shards[end][r]` the rows of rank r.
    """

    layers: tuple[range, ...]
    shards: dict[End, tuple[Shard, ...]]
    problem: Problem
    cost: CostModel
    schedule: Schedule
    timeline: Timeline

    @property
    def layers_of_ranks(self) -> tuple[tuple[range, ...], ...]:
        """The layers of each rank's stages."""
        layout = self.problem.layout
        return tuple(tuple(self.layers[stage] for stage in layout.stages_of(rank)) for rank in range(layout.num_ranks))

    @property
    def num_ranks(self) -> int:
        return self.problem.layout.num_ranks


@dataclass(frozen=True, slots=True)
class RunPlan(StepPlan):
    """What every rank will do: a step, and the programs that run it and the evaluation."""

    program: Program
    evaluation_problem: Problem
    evaluation_program: Program


def make_plan(config: RunConfig, num_ranks: int) -> RunPlan:
    """Decide the whole run for `num_ranks` pipeline ranks.  Raises ConfigError, naming the value and the way out."""
    step = plan_step(config, num_ranks)
    problem, cost = step.problem, step.cost
    program = lower(step.schedule, problem, cost)
    check_program(program, problem)
    num_evaluated = max(1, config.run.eval_microbatches)
    evaluated = Problem(problem.layout, num_evaluated, evaluation(problem.algorithm), forward_only=True)
    evaluation_program = lower(generate("gpipe", evaluated, cost), evaluated, cost)
    check_program(evaluation_program, evaluated)
    return RunPlan(
        step.layers, step.shards, problem, cost, step.schedule, step.timeline, program, evaluated, evaluation_program
    )


def plan_step(config: RunConfig, num_ranks: int) -> StepPlan:
    """Decide and simulate one step, without the programs that would run it.  Raises ConfigError like `make_plan`."""
    if config.parallel.pp not in (None, num_ranks):
        raise ConfigError(
            f"parallel.pp={config.parallel.pp}, but {num_ranks} ranks were started; "
            f"start {config.parallel.pp} (torchrun --nproc-per-node) or leave parallel.pp=null"
        )
    algorithm = VOCAB_ALGORITHMS.get(config.vocab.algorithm)
    if algorithm is None:
        raise ConfigError(f"vocab.algorithm={config.vocab.algorithm} is not known; choose one of {', '.join(VOCAB_ALGORITHMS)}")
    if config.schedule.name not in GENERATORS:
        raise ConfigError(f"schedule.name={config.schedule.name} is not known; choose one of {', '.join(GENERATORS)}")
    family = GENERATORS[config.schedule.name]
    layout = family.layout_of(num_ranks)
    layers = split_layers(config.model, config.parallel, layout.num_stages)
    problem = Problem(layout, config.num_microbatches, algorithm, family.split_backward)
    shards = {end: _shards(config, problem, end) for end in End}
    cost = estimate_cost(config, layers, shards, algorithm)
    schedule = generate(config.schedule.name, problem, cost)
    check_schedule(schedule, problem)
    return StepPlan(layers, shards, problem, cost, schedule, simulate(schedule, problem, cost))


def split_layers(model: ModelConfig, parallel: ParallelConfig, num_stages: int) -> tuple[range, ...]:
    """The global layers of each stage.  Raises ConfigError where they do not add up."""
    if parallel.layers_per_stage is not None:
        counts = parallel.layers_per_stage
        if len(counts) != num_stages or sum(counts) != model.num_layers or min(counts) < 0:
            raise ConfigError(
                f"parallel.layers_per_stage={list(counts)} has {len(counts)} stages and {sum(counts)} layers; "
                f"it needs {num_stages} counts of at least 0 that add up to model.num_layers={model.num_layers}"
            )
    elif parallel.placement == "redistribute":
        counts = redistribute(model.num_layers, num_stages, shape.head_in_layers(model))
    elif model.num_layers % num_stages:
        lower_count = model.num_layers // num_stages * num_stages
        choices = " or ".join(str(n) for n in (lower_count, lower_count + num_stages) if n)
        raise ConfigError(
            f"model.num_layers={model.num_layers} does not split over {num_stages} stages; "
            f"use model.num_layers={choices}, or set parallel.layers_per_stage"
        )
    else:
        counts = (model.num_layers // num_stages,) * num_stages
    starts = [sum(counts[:stage]) for stage in range(num_stages)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


def redistribute(num_layers: int, num_stages: int, head_in_layers: float) -> tuple[int, ...]:
    """Layers per stage that make the slowest stage fastest when the last one also computes the output layer.

    The last stage keeps k layers, where k minimises max(ceil((L - k) / (p - 1)), k + head) (arXiv 2411.05288, "Redis").
    """
    if num_stages == 1:
        return (num_layers,)

    def slowest(k: int) -> float:
        return max(math.ceil((num_layers - k) / (num_stages - 1)), k + head_in_layers)

    last = min(range(num_layers // num_stages, -1, -1), key=slowest)  # of equal ones, the evenest
    each, extra = divmod(num_layers - last, num_stages - 1)
    return (*(each + (stage >= num_stages - 1 - extra) for stage in range(num_stages - 1)), last)


def _shards(config: RunConfig, problem: Problem, end: End) -> tuple[Shard, ...]:
    """One shard per rank, empty on ranks that own no rows of this end."""
    vocab_size, num_ranks = config.model.vocab_size, problem.layout.num_ranks
    sizes: Sequence[int] | None = config.vocab.shards
    if not problem.algorithm.sharded:
        if sizes is not None:
            raise ConfigError(f"vocab.shards={list(sizes)} needs a sharded vocabulary, but vocab=none; drop one of the two")
        sizes = [vocab_size if rank == problem.root(end) else 0 for rank in range(num_ranks)]
    elif vocab_size < num_ranks:
        raise ConfigError(f"model.vocab_size={vocab_size} is smaller than {num_ranks} ranks; use fewer ranks or vocab=none")
    try:
        return split_rows(vocab_size, num_ranks, sizes)
    except ValueError as error:
        raise ConfigError(f"vocab.shards={list(sizes or [])}: {error}") from None


def estimate_cost(
    config: RunConfig, layers: Sequence[range], shards: dict[End, tuple[Shard, ...]], algorithm: VocabAlgorithm
) -> CostModel:
    """Seconds as measured where `cost` gives them, else from FLOPs; bytes from shapes.

    Raises ConfigError where the measured layers were not those of this model.
    """
    _check_measured(config)
    model, size = config.model, config.micro_batch_size
    item_bytes = _ITEM_BYTES[config.run.dtype]
    rows = [shard.num_rows for shard in shards[End.OUTPUT]]
    stage_bytes = [float(len(stage) * shape.layer_activation_bytes(model, size, item_bytes)) for stage in layers]
    stage_bytes[-1] += shape.final_norm_activation_bytes(model, size, item_bytes)
    return CostModel(
        _stage_seconds(config, layers) | _shard_seconds(config, rows, _S_GEMMS[algorithm.name] / 3),
        config.cost.hop_seconds,
        {barrier.name: config.cost.collective_seconds for barrier in algorithm.barriers},
        tuple(stage_bytes),
        tuple(float(item_bytes * size * model.seq_length * (count + model.hidden_size)) for count in rows),
        tuple(float(len(stage) * shape.layer_weight_grad_bytes(model, size, item_bytes)) for stage in layers),
    )


def _stage_seconds(config: RunConfig, layers: Sequence[range]) -> dict[Kind, tuple[float, ...]]:
    """F, B, I and W of each stage; B takes twice F, and I and W half of B each, unless measured."""
    cost = config.cost
    forward = _layer_flops(config) / cost.flops_per_second
    of_one_layer = {
        Kind.F: _either(cost.layer_forward_seconds, forward),
        Kind.B: _either(cost.layer_backward_seconds, 2 * forward),
        Kind.I: _either(cost.layer_input_grad_seconds, forward),
        Kind.W: _either(cost.layer_weight_grad_seconds, forward),
    }
    return {kind: tuple(len(stage) * seconds for stage in layers) for kind, seconds in of_one_layer.items()}


def _shard_seconds(config: RunConfig, rows: Sequence[int], s_share: float) -> dict[Kind, tuple[float, ...]]:
    """S, T, E and G of each shard; E and G are lookups, a tenth of a barrier each unless measured."""
    cost, lookup = config.cost, config.cost.collective_seconds / 10
    both = [_output_seconds(config, count) for count in rows]
    return {
        Kind.S: tuple(s_share * seconds for seconds in both),
        Kind.T: tuple((1 - s_share) * seconds for seconds in both),
        Kind.E: (_either(cost.lookup_seconds, lookup),) * len(rows),
        Kind.G: (_either(cost.lookup_grad_seconds, lookup),) * len(rows),
    }


def _output_seconds(config: RunConfig, num_rows: int) -> float:
    """S and T of one shard together: three matrix products."""
    cost, model = config.cost, config.model
    if cost.output_row_seconds is None:
        return 6 * config.micro_batch_size * model.seq_length * num_rows * model.hidden_size / cost.flops_per_second
    return cost.output_fixed_seconds + num_rows * cost.output_row_seconds if num_rows else 0.0


def _either(measured: float | None, estimate: float) -> float:
    return estimate if measured is None else measured


def _layer_flops(config: RunConfig) -> int:
    return shape.layer_flops(config.model, config.micro_batch_size * config.model.seq_length)


def _check_measured(config: RunConfig) -> None:
    measured, here = config.cost.measured_layer_flops, _layer_flops(config)
    if measured is not None and not math.isclose(measured, here, rel_tol=0.01):
        raise ConfigError(
            f"cost.measured_layer_flops={measured:g}, but a layer of this model takes {here:g} FLOPs forward per microbatch: "
            "these pass times are not for it; use a cost that is, or one that counts FLOPs, e.g. cost=a100"
        )
