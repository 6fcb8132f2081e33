"""The choices beside one that a search tries: they differ in few things."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from schedules.generators import GENERATORS, searched_schedules
from schedules.vocab import VOCAB_ALGORITHMS, searched_algorithms
from vp_train.config.parallel import RECOMPUTE
from vp_train.planning.choice import Choice, even_placement, where_needed_values
from vp_train.planning.plan import MOST_FORWARD_PASSES
from vp_train.planning.space import MICRO_BATCH_SIZES, most_chunks

OFFLOADED = (0.5, 1.0)  # parts of the layers that searches offload, besides none


def offloading(choice: Choice, num_layers: int, *, where_needed: bool = False) -> list[Choice]:
    """Return the choices that offload activations and recompute at most as much as `choice`.

    With `where_needed` also those in which only the stages recompute that need it: it is dear to
    find out which, so a search tries them beside the best only.  A stage of one layer offloads all
    or nothing.  One rank also gives every layer a stage of its own, or two layers one of which goes
    to the host: in one stage activations live too short for both ways of the link.
    """
    strongest = RECOMPUTE.index(choice.recompute)
    moves_half = choice.layout.num_stages < num_layers
    bases = [(choice, OFFLOADED if moves_half else OFFLOADED[-1:])]
    for part in OFFLOADED if choice.degrees.pp == 1 else ():
        count = math.ceil(num_layers * part)
        if count > 1:
            place = even_placement(num_layers, count)
            split = replace(choice, schedule="interleaved", num_chunks=count, placement=place)
            bases.append((split, (part,)))
    return [
        replace(
            base,
            recompute=recompute,
            recompute_where_needed=needed,
            recompute_per_stage=None,
            offload=part,
            optimizer=None,
        )
        for base, parts in dict.fromkeys(bases)
        for recompute in RECOMPUTE[: strongest + 1]
        for needed in where_needed_values(recompute, base.layout.num_stages)[: 1 + where_needed]
        for part in parts
    ]


def neighbours(choice: Choice, others: Iterable[Choice], number: int = 1) -> list[Choice]:
    """Return those of the `others` that differ in `number` things, offloading as much as `choice`.

    These things are the degrees, the size of a microbatch, the schedule with its chunks, the
    vocabulary algorithm, the placement, what is recomputed, and sequence parallelism.  With the
    degrees the chunks and sequence parallelism may change, and with the algorithm the placement.
    To one pipeline rank, where what is recomputed decides them, the schedule, the algorithm and the
    placement change with all else.
    """
    return [
        other if other.offload == choice.offload else replace(other, offload=choice.offload)
        for other in others
        if _differences(choice, other) == number
    ]


def with_other_chunks(choice: Choice, num_layers: int) -> list[Choice]:
    """Return the choices whose ranks have one stage more or less, where this is free."""
    if choice.num_chunks is None:
        return []
    pp, counts = choice.degrees.pp, (choice.num_chunks - 1, choice.num_chunks + 1)
    return [
        replace(
            choice,
            num_chunks=count,
            placement=choice.placement
            if choice.redistributes
            else even_placement(num_layers, pp * count),
            recompute_where_needed=choice.recomputes_partly,
            recompute_per_stage=None,
            optimizer=None,
        )
        for count in counts
        if 2 <= count <= most_chunks(pp, num_layers)
        and pp * count * choice.num_microbatches <= MOST_FORWARD_PASSES
    ]


def with_larger_microbatches(choice: Choice) -> list[Choice]:
    """Return the choices with up to twice as large microbatches that no space has for their size.

    They recompute at most as much: a small model on a fast GPU needs them, and where the host is
    too slow for smaller ones, these recompute for nothing.  The next ones come beside the best.
    """
    size, strongest = choice.micro_batch_size, RECOMPUTE.index(choice.recompute)
    sequences = size * choice.num_microbatches
    return [
        replace(
            choice,
            micro_batch_size=larger,
            num_microbatches=sequences // larger,
            recompute=recompute,
            recompute_where_needed=choice.recomputes_partly and recompute != "none",
            recompute_per_stage=None,
            optimizer=None,
        )
        for larger in range(max(size, MICRO_BATCH_SIZES[-1]) + 1, 2 * size + 1)
        if sequences % larger == 0
        for recompute in RECOMPUTE[: strongest + 1]
    ]


def in_the_same_stages(choice: Choice) -> list[Choice]:
    """Return the choices with another schedule of the same layout or another algorithm.

    All else stays, such as the stages that recompute and balanced rows, which were found for
    `choice`.  None moves the vocabulary, which changes the stages.
    """
    family = GENERATORS[choice.schedule]
    others = [
        replace(choice, schedule=name)
        for name in searched_schedules()
        if name != choice.schedule and GENERATORS[name].layout == family.layout
    ]
    others += [
        replace(choice, vocab=name)
        for name in searched_algorithms()
        if name != choice.vocab and VOCAB_ALGORITHMS[name].sharded and choice.splits_vocabulary
    ]
    return [replace(other, optimizer=None) for other in others]


def _differences(choice: Choice, other: Choice) -> int:
    """Return in how many things two choices differ, see `neighbours`."""
    splits, moves = choice.degrees != other.degrees, choice.vocab != other.vocab
    schedules = choice.schedule != other.schedule or (
        choice.num_chunks != other.num_chunks and not splits
    )
    places = choice.redistributes != other.redistributes and not moves
    if other.degrees.pp == 1 and (splits or choice.degrees.pp == 1):
        moves = schedules = places = False
    return (
        splits
        + moves
        + (choice.micro_batch_size != other.micro_batch_size)
        + schedules
        + places
        + (
            choice.recompute != other.recompute
            or choice.recomputes_partly != other.recomputes_partly
        )
        + (choice.sequence_parallel != other.sequence_parallel and not splits)
    )
