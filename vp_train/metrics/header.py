"""The first lines of a run: what will run where.  They are printed before anything is compiled."""

from __future__ import annotations

import math
from contextlib import suppress

from schedules.render import facts
from schedules.vocab import End
from vp_train.config import RunConfig, printable
from vp_train.config.optim import rate_advice
from vp_train.data import Source
from vp_train.metrics.run_directory import disk_warning
from vp_train.model.shape import num_parameters
from vp_train.planning.cluster import assumed_costs
from vp_train.planning.degrees import Degrees
from vp_train.planning.placement import nothing_offloaded_words
from vp_train.planning.plan import RunPlan, row_advice
from vp_train.settings.resume import weight_words
from vp_train.tensors.alignment import HOST_BLOCK_BYTES
from vp_train.units import count_words, human_bytes, plural

_MOST_RANKS = 6  # of which every number of rows is shown


def introduce(config: RunConfig, plan: RunPlan, source: Source) -> None:
    """Print the `header` of a run."""
    with suppress(BrokenPipeError):  # a reader like `head`; the reporter notices it, too
        print("\n".join(map(printable, header(config, plan, source))), flush=True)


def header(config: RunConfig, plan: RunPlan, source: Source) -> list[str]:
    """Return the lines about data, model, ranks and schedule of a run."""
    model = config.model
    return [
        f"data      {source.description}",
        *(f"warning   {words}" for words in warnings_of(config, plan, source)),
        f"model     {num_parameters(model) / 1e6:.1f} M parameters, vocabulary "
        f"{model.vocab_size:,} (ln V = {math.log(model.vocab_size):.2f}), "
        f"{config.run.dtype} on {config.run.device}",
        f"mesh      {_mesh(plan.degrees)}, optim.name={config.optim.name}",
        f"pipeline  {_stages(plan)}",
        *([f"rows      {words}"] if (words := _row_words(plan)) else []),
        f"schedule  {plan.schedule.name}, vocabulary {plan.problem.algorithm.name}, "
        f"{_batch(config, plan.degrees.dp)}",
        f"planned   {facts(plan.timeline)}; "
        f"activations at most {human_bytes(max(plan.timeline.peak_bytes))}"
        f"{_assumed_words(config, plan)}",
        *([f"offload   {words}"] if (words := _offload_words(plan)) else []),
        *([f"advice    {advice}"] if (advice := row_advice(config, plan)) else []),
    ]


def warnings_of(config: RunConfig, plan: RunPlan, source: Source) -> list[str]:
    """Return what is doubtful about data, weights, learning rate and disk, one sentence each."""
    advice = rate_advice(config.optim, num_parameters(config.model))
    room = disk_warning(config.run, _checkpoint_bytes(plan))
    return [*source.warnings, *weight_words(config), *filter(None, (advice, room))]


def _checkpoint_bytes(plan: RunPlan) -> int:
    """Return the bytes of a checkpoint: the parameters and the two moments of AdamW."""
    return 3 * plan.work.precise_bytes * num_parameters(plan.work.model)


def _assumed_words(config: RunConfig, plan: RunPlan) -> str:
    """Return the rate of a CPU that the planned time assumes; empty where it is of this device."""
    if config.run.device != "cpu" or config.cost.is_measured or config.cost.has_rates:
        return ""
    rate = assumed_costs(plan.work, config.cluster, config.cost).flops_per_second or 0.0
    return f"; assumes {rate / 1e9:,g} GFLOP/s, vp-profile measures"


def _mesh(degrees: Degrees) -> str:
    """Return the degrees of parallelism in words, and the ranks of the first replica."""
    ranks = degrees.pp * degrees.tp
    first = "rank 0" if ranks == 1 else f"ranks 0-{ranks - 1}"
    replicas = f" (the first replica is {first})" if degrees.dp > 1 else ""
    return f"{count_words(degrees.num_ranks, 'rank')} = {degrees}{replicas}"


def _batch(config: RunConfig, replicas: int) -> str:
    """Return the microbatches of a replica in words, and the whole batch of a step."""
    microbatches, length = config.num_microbatches, config.model.seq_length
    sequences = replicas * microbatches * config.micro_batch_size
    each = f", {replicas} replicas" if replicas > 1 else ""
    return (
        f"{count_words(microbatches, 'microbatch')} of {config.micro_batch_size} x "
        f"{length} tokens{each}: {count_words(sequences, 'sequence')}, "
        f"{sequences * length:,} tokens a step"
    )


def _stages(plan: RunPlan) -> str:
    """Return the layers of every rank of the first replica in words."""
    degrees, lines = plan.degrees, []
    for rank, stages in enumerate(plan.layers_of_ranks):
        name = f"{plural(degrees.tp, 'rank')} {degrees.ranks_of(rank)}"
        layers = [
            f"{stage[0]}-{stage[-1]}" if len(stage) > 1 else f"{stage[0]}"
            for stage in stages
            if stage
        ]
        lines.append(f"{name}: layers {', '.join(layers) or 'none'}")
    return "  ".join(lines)


def _row_words(plan: RunPlan) -> str:
    """Return the vocabulary rows of every pipeline rank; empty where equal ones are the rule.

    Of many ranks only the fewest and the most are named.
    """
    vocab = plan.work.vocab
    if not plan.problem.algorithm.sharded or not (vocab.balance or vocab.shards is not None):
        return ""
    counts = [shard.num_rows for shard in plan.shards[End.OUTPUT]]
    if len(counts) > _MOST_RANKS:
        return f"{min(counts):,} to {max(counts):,} of the vocabulary on a pipeline rank"
    return f"{'  '.join(f'{count:,}' for count in counts)} of the vocabulary, by pipeline rank"


def _offload_words(plan: RunPlan) -> str:
    """Return what goes to host memory in words; empty if no activations are to be offloaded."""
    timeline, ranks = plan.timeline, range(plan.num_ranks)
    if not plan.cost.offload_bytes:
        return ""
    if not timeline.transfers:
        return nothing_offloaded_words(has_layers=any(plan.cost.offload_bytes))
    moved = max(map(timeline.moved_bytes, ranks))
    held = max(timeline.host_bytes(rank, HOST_BLOCK_BYTES) for rank in ranks)
    return (
        f"up to {human_bytes(moved)} of a rank's activations wait in host memory in a step, "
        f"{human_bytes(held)} at a time"
    )
