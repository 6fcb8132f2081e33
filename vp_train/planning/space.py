"""All ways to run a batch on a cluster, and what rules others out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from schedules.generators import GENERATORS, searched_schedules
from schedules.layout import Layout
from schedules.vocab import VOCAB_ALGORITHMS, searched_algorithms
from vp_train.config import ConfigError, ModelConfig, OptimConfig, RunConfig
from vp_train.config.parallel import RECOMPUTE
from vp_train.model import shape
from vp_train.planning.batch import batch_of
from vp_train.planning.choice import Choice, as_typed, even_placement, where_needed_values
from vp_train.planning.degrees import Degrees, check_tensor_split
from vp_train.planning.kept import ALL, Kept
from vp_train.planning.placement import offloaded_layers, redistribute, split_layers
from vp_train.planning.plan import MOST_FORWARD_PASSES, SEQUENCE_DEVICES
from vp_train.units import count_words

# Those that divide the batch are tried; for larger ones see `with_larger_microbatches`.
MICRO_BATCH_SIZES = tuple(range(1, 17))
_MOST_EMPTY = 2  # stages without a layer
# What rules out a step that has too many passes.
TOO_LONG = f"more than {MOST_FORWARD_PASSES:,} forward passes (microbatches x stages)"
_OF_ONE_RANK = (("1f1b", "none"), ("interleaved", "none"))  # schedules and algorithms


@dataclass(frozen=True, slots=True)
class Space:
    """All choices that can be planned, and how many others each constraint rules out.

    optimizers: those to choose from, None for all.
    kept: the settings that all choices share because they are not searched.
    """

    choices: tuple[Choice, ...]
    excluded: Counter[str]
    optimizers: tuple[OptimConfig, ...] | None = None
    kept: Kept = ALL


def space_of(config: RunConfig, kept: Kept = ALL) -> Space:
    """Return every way to run the batch of `config` on all GPUs of its cluster.

    The ranks of a tensor-parallel group are on one node.  What has another value than `kept` is
    ruled out, and counts under the first setting that it does not have.  The run as it was typed is
    a choice also where no search tries its values, such as micro_batch_size=7.
    """
    batch, found = batch_of(config), dict[Choice, str | None]()  # what rules it out
    excluded: Counter[str] = Counter()

    def add(choice: Choice) -> None:
        found[choice] = kept.against(choice) or _too_long(choice) or _moves_nothing(choice, config)

    tried = [size for size in MICRO_BATCH_SIZES if batch % size == 0]
    sizes = kept.with_value("micro_batch_size", tried)
    for degrees in splits_of(config):
        variants = list(_variants(config, degrees, kept))
        reason = _reason_against(config, degrees)
        if reason is None and batch % degrees.dp:
            reason = f"the batch: dp must divide its {count_words(batch, 'sequence')}"
        if reason is not None:
            excluded[reason] += len(variants) * len(sizes)
            continue
        for size in sizes:
            if batch % (degrees.dp * size):
                continue
            count = batch // degrees.dp // size
            for variant in variants:
                add(replace(variant, micro_batch_size=size, num_microbatches=count))
    typed = as_typed(config)
    if (
        typed is not None
        and typed not in found
        and (not typed.offload or config.run.device == "cuda")
        and typed.layout.num_stages <= config.model.num_layers + _MOST_EMPTY
        and _reason_against(config, typed.degrees) is None
    ):
        add(typed)
    excluded.update(reason for reason in found.values() if reason is not None)
    choices = tuple(choice for choice, reason in found.items() if reason is None)
    return Space(choices, excluded, kept.optimizers(config), kept)


def without_vocabulary_of(config: RunConfig, degrees: Degrees) -> Space:
    """Return the choices without vocabulary parallelism that are otherwise as `config` is.

    Schedule, number of chunks and placement differ, and where only some stages recompute, which.
    """
    parallel = config.parallel
    kinds = set(parallel.recompute_per_stage or (parallel.recompute,))
    strongest = max(kinds, key=RECOMPUTE.index)
    choices = tuple(
        replace(
            choice,
            micro_batch_size=config.micro_batch_size,
            num_microbatches=config.num_microbatches,
            offload=parallel.offload_activations,
        )
        for choice in _variants(config, degrees)
        if not choice.splits_vocabulary
        and choice.recompute == strongest
        and (len(kinds) > 1 or not choice.recompute_where_needed)
        and choice.sequence_parallel == parallel.sequence_parallel
    )
    return Space(choices, Counter(), (config.optim,))


def _variants(config: RunConfig, degrees: Degrees, kept: Kept = ALL) -> Iterator[Choice]:
    """Yield the choices for one split, as if each step had one microbatch of one sequence.

    They include values that are tried only because they are `kept`.  One rank gives every layer a
    stage of its own where only some recompute or offloading is kept; else that changes nothing.
    """
    pp, tp, model = degrees.pp, degrees.tp, config.model
    splits_sequences = config.run.device in SEQUENCE_DEVICES and model.seq_length % tp == 0
    both = (True, False) if tp > 1 and splits_sequences else (False,)
    schedules = kept.with_value("schedule.name", searched_schedules())
    algorithms = kept.with_value("vocab.algorithm", searched_algorithms())
    offload = kept.values.get("parallel.offload_activations", 0.0)
    balance = kept.values.get("vocab.balance", False)
    for schedule, vocab in product(schedules, algorithms) if pp > 1 else _OF_ONE_RANK:
        moves = pp > 1 and not VOCAB_ALGORITHMS[vocab].sharded
        for redistributes in (False, True) if moves else (False,):
            for num_chunks in _chunks(schedule, pp, model, kept, redistributes=redistributes):
                num_stages = GENERATORS[schedule].layout_of(pp, num_chunks).num_stages
                even = even_placement(model.num_layers, num_stages)
                kinds = [
                    (recompute, needed)
                    for recompute in RECOMPUTE
                    for needed in where_needed_values(recompute, num_stages)
                    if needed or pp > 1 or num_stages == 1 or offload
                ]
                for (recompute, needed), sequences in product(kinds, both):
                    yield Choice(
                        degrees,
                        micro_batch_size=1,
                        num_microbatches=1,
                        schedule=schedule,
                        vocab=vocab,
                        recompute=recompute,
                        num_chunks=num_chunks,
                        placement="redistribute" if redistributes else even,
                        sequence_parallel=sequences,
                        recompute_where_needed=needed,
                        offload=offload,
                        balance=balance,
                    )


def _chunks(
    schedule: str, pp: int, model: ModelConfig, kept: Kept = ALL, *, redistributes: bool = False
) -> Iterable[int | None]:
    """Return the stages per rank to try; every stage has a layer, but see `counts_of_chunks`."""
    family = GENERATORS[schedule]
    if family.layout != "loop":
        return (None,) if family.layout_of(pp).num_stages <= model.num_layers else ()
    if pp == 1:
        return (model.num_layers,) if model.num_layers > 1 else ()
    head = shape.head_in_layers(model) if redistributes else None
    counts = counts_of_chunks(pp, model.num_layers, head)
    wanted = kept.values.get("schedule.num_chunks")
    if wanted is None or not 2 <= wanted <= most_chunks(pp, model.num_layers):
        return counts
    return sorted({*counts, wanted})


@cache
def counts_of_chunks(pp: int, num_layers: int, head_in_layers: float | None) -> tuple[int, ...]:
    """Return the numbers of stages per rank that are worth a try, from 2 on.

    With smaller stages the pipeline fills and drains faster, and with more stages more is sent.  So
    a number is tried where the largest stage is smaller than with all lower ones, or where the
    layers divide by the stages.  `head_in_layers` is that of `redistribute`, None where it does not
    move any.

    Every stage has a layer.  Where it has only one, up to two stages may have none: the 126 layers
    of Llama 3 405B ran in 16 x 8 stages.
    """
    found, largest = list[int](), num_layers + 1
    for count in range(2, most_chunks(pp, num_layers) + 1):
        num_stages = pp * count
        most = (
            -(-num_layers // num_stages)
            if head_in_layers is None
            else max(redistribute(num_layers, Layout("loop", pp, count), head_in_layers))
        )
        if most < largest or num_layers % num_stages == 0:
            found.append(count)
        largest = min(largest, most)
    return tuple(found)


def most_chunks(pp: int, num_layers: int) -> int:
    """Return the most stages of a rank that a search tries with `pp` ranks."""
    return min(-(-num_layers // pp), (num_layers + _MOST_EMPTY) // pp)


def splits_of(config: RunConfig) -> list[Degrees]:
    """Return every split of all GPUs into dp x pp x tp with tensor parallelism inside nodes."""
    cluster = config.cluster
    return [
        Degrees(cluster.num_gpus // tp // pp, pp, tp)
        for tp in _divisors(cluster.gpus_per_node)
        for pp in _divisors(cluster.num_gpus // tp)
    ]


def replicas_of(config: RunConfig) -> list[int]:
    """Return the degrees dp that some split has which the model allows, the smallest first."""
    return sorted(
        {split.dp for split in splits_of(config) if _reason_against(config, split) is None}
    )


def fitting_batches(config: RunConfig) -> tuple[list[int], list[int]]:
    """Return the batches nearest to that of `config`, and the numbers of nodes, that have a split.

    Batches are in sequences, and one below comes first, if there is any.  Nodes are at most those
    of the cluster.
    """
    batch, replicas, cluster = batch_of(config), replicas_of(config), config.cluster
    below = max((batch // dp * dp for dp in replicas), default=0)
    above = min(-(-batch // dp) * dp for dp in replicas)
    per_node, num_layers = cluster.gpus_per_node, config.model.num_layers
    gpus = {
        dp * pp * tp
        for tp in _divisors(per_node)
        if _reason_against(config, Degrees(1, 1, tp)) is None
        for dp in _divisors(batch)
        for pp in range(1, num_layers + 1)
    }
    counts = [one // per_node for one in gpus if one % per_node == 0]
    fewer = max((count for count in counts if count <= cluster.num_nodes), default=None)
    return [size for size in (below, above) if size], [] if fewer is None else [fewer]


def _reason_against(config: RunConfig, degrees: Degrees) -> str | None:
    """Return the constraint that rules out a split for every batch and schedule, if one does."""
    if degrees.pp > config.model.num_layers:
        return f"model.num_layers={config.model.num_layers}, which pp cannot exceed"
    try:
        check_tensor_split(config.model, degrees.tp, num_ranks=config.cluster.num_gpus)
    except ConfigError as error:
        return str(error)
    return None


def _too_long(choice: Choice) -> str | None:
    """Return what rules out a choice whose step has more passes than can be planned."""
    if choice.layout.num_stages * choice.num_microbatches <= MOST_FORWARD_PASSES:
        return None
    return TOO_LONG


def _moves_nothing(choice: Choice, config: RunConfig) -> str | None:
    """Return what rules out a choice that offloads less than half a layer of every stage."""
    if not choice.offload:
        return None
    stages = split_layers(config.model, choice.parallel(config.parallel), choice.layout)
    if any(offloaded_layers(len(layers), choice.offload) for layers in stages):
        return None
    return f"parallel.offload_activations={choice.offload:g} is less than half a layer of a stage"


def _divisors(count: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(count) + 1) if count % divisor == 0]
    return sorted({*small, *(count // divisor for divisor in small)})
