"""The placement of layers on stages and of vocabulary rows on ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

from schedules.layout import Layout
from schedules.problem import Problem
from schedules.vocab import End
from vp_train.config import ConfigError, CostConfig, ModelConfig, ParallelConfig
from vp_train.config.data import exact
from vp_train.model import shape
from vp_train.planning.estimate import layer_pass_seconds, rank_slowness, row_seconds
from vp_train.planning.workload import Workload
from vp_train.units import count_words
from vp_train.vocab.shard import Shard, split_rows


def split_layers(model: ModelConfig, parallel: ParallelConfig, layout: Layout) -> tuple[range, ...]:
    """Return the global layers of each stage.  Raises ConfigError if they do not add up."""
    num_stages = layout.num_stages
    if parallel.recompute_per_stage is not None and len(parallel.recompute_per_stage) != num_stages:
        raise ConfigError(
            f"parallel.recompute_per_stage has "
            f"{count_words(len(parallel.recompute_per_stage), 'value')}, "
            f"but the model has {count_words(num_stages, 'stage')}; "
            f"give {num_stages}, or one for all as parallel.recompute"
        )
    if parallel.layers_per_stage is not None:
        counts = parallel.layers_per_stage
        if len(counts) != num_stages or sum(counts) != model.num_layers or min(counts) < 0:
            raise ConfigError(
                f"parallel.layers_per_stage={list(counts)} has "
                f"{count_words(len(counts), 'stage')} and {count_words(sum(counts), 'layer')}; it "
                f"needs {count_words(num_stages, 'count')} of at least 0 that add up to "
                f"model.num_layers={model.num_layers}"
            )
    elif parallel.placement == "redistribute":
        counts = redistribute(model.num_layers, layout, shape.head_in_layers(model))
    elif parallel.placement == "balanced":
        counts = balance(model.num_layers, layout)
    elif model.num_layers % num_stages:
        raise ConfigError(
            f"model.num_layers={model.num_layers} does not split over "
            f"{count_words(num_stages, 'stage')}; "
            f"use {', '.join(_ways_to_split(model.num_layers, parallel, layout))}"
        )
    else:
        counts = (model.num_layers // num_stages,) * num_stages
    starts = [sum(counts[:stage]) for stage in range(num_stages)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


def _ways_to_split(num_layers: int, parallel: ParallelConfig, layout: Layout) -> list[str]:
    """Return what makes stages equal or does without that; another model comes last.

    Where parallel.pp was inferred and fewer ranks would do, those come first, and no other model.
    """
    ways, per_rank = [], num_layers // layout.num_ranks
    is_open = parallel.pp is None and parallel.dp is None
    fewer = [
        str(pp)
        for pp in range(2, layout.num_ranks if is_open else 0)
        if layout.num_ranks % pp == 0 and num_layers % (pp * layout.num_chunks) == 0
    ]
    if fewer:
        ways.append(f"parallel.pp={' or '.join(fewer)}")
    if layout.name == "loop" and num_layers % layout.num_ranks == 0:
        counts = [count for count in range(1, per_rank + 1) if per_rank % count == 0]
        counts.sort(key=lambda count: (count == 1, abs(count - layout.num_chunks)))
        ways.append(f"schedule.num_chunks={' or '.join(map(str, counts[:3]))}")
    num_stages = layout.num_stages
    lower = num_layers // num_stages * num_stages
    sizes = " or ".join(str(size) for size in (lower, lower + num_stages) if size)
    last = "or vp-plan --search" if fewer else f"or model.num_layers={sizes}"
    return [*ways, "parallel.placement=balanced", "parallel.layers_per_stage", last]


@cache
def offloaded_layers(num_layers: int, part: float) -> int:
    """Return how many of a stage's layers keep their activations on the host.

    They are the first layers of the stage.  part: parallel.offload_activations; halves round up.
    """
    return math.floor(exact(part) * num_layers + Fraction(1, 2))


def nothing_offloaded_words(*, has_layers: bool) -> str:
    """Return why nothing is offloaded although the settings ask for it.

    has_layers: whether `offloaded_layers` is above 0 for any stage.
    """
    if has_layers:
        return "nothing: no activations live long enough for both ways of the link"
    return "nothing: parallel.offload_activations is less than half a layer of every stage"


def balance(num_layers: int, layout: Layout) -> tuple[int, ...]:
    """Return numbers of layers per stage that differ by at most one.

    The first stages get one layer more.  The first p stages are on p different ranks in every
    layout, so the extra layers are spread over the ranks.
    """
    per_stage, extra = divmod(num_layers, layout.num_stages)
    return tuple(per_stage + (stage < extra) for stage in range(layout.num_stages))


def redistribute(num_layers: int, layout: Layout, head_in_layers: float) -> tuple[int, ...]:
    """Return layers per stage that make the slowest stage as fast as possible.

    The last stage also computes the output layer, which takes as long as `head_in_layers` layers.
    It keeps k layers, where k minimises max(ceil((L - k) / (p - 1)), k + head) (arXiv 2411.05288,
    "Redis").  Some of the other stages have one layer more.  In a loop they are the last ones, else
    those after the first: of 60 random runs that suits nearly all, by up to 6 % of a step.
    """
    num_stages = layout.num_stages
    if num_stages == 1:
        return (num_layers,)

    def slowest(k: int) -> float:
        return max(math.ceil((num_layers - k) / (num_stages - 1)), k + head_in_layers)

    # Of equally good k the largest comes first: its split is the most even.
    last = min(range(num_layers // num_stages, -1, -1), key=slowest)
    share, extra = divmod(num_layers - last, num_stages - 1)
    first = num_stages - 1 - extra if layout.name == "loop" else 1
    return (*(share + (0 <= stage - first < extra) for stage in range(num_stages - 1)), last)


def split_vocabulary(
    work: Workload, problem: Problem, end: End, sizes: Sequence[int] | None
) -> tuple[Shard, ...]:
    """Return one shard per rank; it is empty on a rank that owns no rows of this end.

    sizes: the rows of each rank, if the vocabulary is sharded; None: as equal as possible.

    Raises ConfigError if sizes do not add up.
    """
    vocab_size, num_ranks = work.model.vocab_size, problem.layout.num_ranks
    if not problem.algorithm.sharded:
        if sizes is not None:
            raise ConfigError(
                f"vocab.shards={list(sizes)} needs a sharded vocabulary, but vocab=none; "
                "drop one of the two"
            )
        sizes = [vocab_size if rank == problem.root(end) else 0 for rank in range(num_ranks)]
    try:
        return split_rows(vocab_size, num_ranks, sizes)
    except ValueError as error:
        raise ConfigError(f"vocab.shards={list(sizes or [])}: {error}") from None


def balanced_rows(
    work: Workload,
    cost: CostConfig,
    layout: Layout,
    layers: Sequence[range],
    recompute: Sequence[str],
) -> list[int]:
    """Return rows per rank that make layers and rows together take every rank equally long.

    A rank whose layers alone take longer gets no rows.  `recompute` says for every stage what its
    backward recomputes.
    """
    slowness, seconds_per_row = rank_slowness(cost, layout.num_ranks), row_seconds(work, cost)
    if seconds_per_row == 0:  # rows that take no time cannot balance anything
        return [shard.num_rows for shard in split_rows(work.model.vocab_size, layout.num_ranks)]
    seconds_of = {kind: layer_pass_seconds(work, cost, kind) for kind in set(recompute)}
    busy = [
        slow
        * sum(seconds_of[recompute[stage]] * len(layers[stage]) for stage in layout.stages_of(rank))
        for rank, slow in enumerate(slowness)
    ]
    return fill_with_rows(
        work.model.vocab_size, busy, [slow * seconds_per_row for slow in slowness]
    )


def fill_with_rows(num_rows: int, busy: Sequence[float], row_seconds: Sequence[float]) -> list[int]:
    """Return rows per rank that bring all ranks to the same time, like water poured over them.

    Rank r is busy for busy[r] seconds without rows, and each row takes it row_seconds[r].  Ranks
    above the final level get none.
    """
    first = min(busy)
    busy = [seconds - first for seconds in busy]  # rows of large levels would be lost in rounding
    by_level = sorted(range(len(busy)), key=busy.__getitem__)
    level, width = 0.0, 0.0  # width: rows per second of level among the ranks under water
    poured = float(num_rows)
    for place, rank in enumerate(by_level):
        level = max(level, busy[rank])
        width += 1 / row_seconds[rank]
        above = busy[by_level[place + 1]] if place + 1 < len(by_level) else math.inf
        if poured <= (above - level) * width:
            level += poured / width
            break
        poured -= (above - level) * width
    exact = [
        max(0.0, level - seconds) / per_row
        for seconds, per_row in zip(busy, row_seconds, strict=True)
    ]
    # Round down, then give the rows left over to the ranks with the largest remainders.
    rows = [int(value) for value in exact]
    for rank in sorted(range(len(rows)), key=lambda r: rows[r] - exact[r])[: num_rows - sum(rows)]:
        rows[rank] += 1
    return rows
