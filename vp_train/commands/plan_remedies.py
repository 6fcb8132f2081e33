"""What would let a plan fit that needs too much memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product, takewhile

from schedules.generators import GENERATORS
from schedules.render import duration
from vp_train.config import ConfigError, RunConfig
from vp_train.config.parallel import RECOMPUTE
from vp_train.planning.choice import changes_of
from vp_train.planning.cluster import MARGIN, limit_of
from vp_train.planning.compare import Help, proposing
from vp_train.planning.degrees import Degrees, split_ranks
from vp_train.planning.found import Estimate
from vp_train.planning.outlook import MOST_AT_ONCE, MOST_PLANNED, Outlook, outlook_of, promising
from vp_train.planning.placement import offloaded_layers, split_layers
from vp_train.planning.report import PlanReport
from vp_train.planning.space import most_chunks
from vp_train.planning.weigh import about_bytes
from vp_train.units import human_bytes, large_bytes

_NOT_ALONE = ", which is not enough alone"
_NO_MARGIN = f", which leaves less than {MARGIN:.0%} of the memory free"
_MORE_GPUS = "more GPUs per replica"
FACTORS = (2, 4, 8, 16, 32, 64)  # by which a pipeline may become longer, or nodes more


def remedies(config: RunConfig, report: PlanReport) -> list[str]:
    """Return the changes that save memory on the worst rank of `config`, the largest saving first.

    Every change is tried on its own, and the words say where it is not enough to leave as much free
    as a proposal does.
    """
    excess = report.excess
    config, report = _proposing(config, report)
    replicas = split_ranks(config.parallel, config.cluster.num_gpus).dp
    # What waits in host memory, and so is not saved on the GPU, only a simulation says.
    offloads = bool(config.parallel.offload_activations) and not config.schedule.is_solved
    needed = report.ranks[report.worst].memory.total

    def saved_by(changed: RunConfig) -> float:
        if changed == replace(config, optim=changed.optim):
            return needed - report.memory_with(changed.optim)
        # Balanced rows move bytes between ranks, and which one needs most then, a plan says.  Where
        # about these bytes suffice it is asked, too: several shards may be held at once.
        if not offloads and changed.vocab.balance == config.vocab.balance:
            saved = about_bytes(config) - about_bytes(changed)
            if saved < report.excess:
                return saved
        return needed - _changed(changed).memory

    tried: list[RunConfig] = []
    if replicas > 1:
        tried.append(replace(config, optim=replace(config.optim, name="zero1")))
    on_hosts = replace(config.optim, name="zero1", offload=True)
    needs_of_host = report.host_with(on_hosts).total
    if config.run.device == "cuda" and needs_of_host <= config.cluster.host_limit:
        tried.append(replace(config, optim=on_hosts))
    tried += _recomputing(config)
    if config.micro_batch_size > 1:
        count = config.num_microbatches * config.micro_batch_size
        tried.append(replace(config, micro_batch_size=1, num_microbatches=count))
    if config.vocab.algorithm == "none":
        tried.append(replace(config, vocab=replace(config.vocab, algorithm="one_barrier")))
    elif config.vocab.shards is None:
        tried.append(replace(config, vocab=replace(config.vocab, balance=True)))
    found = []
    for changed in tried:
        if changed == config:
            continue
        try:
            saved = saved_by(changed)
        except ConfigError:
            continue
        if saved > 0.01 * needed:
            words = f"{changes_of(config, changed)}: about {human_bytes(saved)} less"
            if changed.optim != config.optim and changed.optim.offload:
                words += host_words(needs_of_host)
            found.append((saved, words))
    saved, words = _saved_by_offloading(config, report)
    if saved > 0.01 * needed:
        found.append((saved, words))

    def enough(saved: float) -> str:
        if saved >= report.excess:
            return ""
        return _NOT_ALONE if saved < excess else _NO_MARGIN

    ordered = [words + enough(saved) for saved, words in sorted(found, reverse=True)]
    return [*ordered, _more_gpus_words(config, report.degrees)]


def _proposing(config: RunConfig, report: PlanReport) -> tuple[RunConfig, PlanReport]:
    """Return a plan as if there were only the memory that a proposal may use."""
    config = proposing(config)
    return config, replace(report, cluster=config.cluster)


def _recomputing(config: RunConfig) -> list[RunConfig]:
    """Return `config` with each recomputation of all stages."""
    return [
        replace(config, parallel=replace(config.parallel, recompute=kind, recompute_per_stage=None))
        for kind in RECOMPUTE[1:]
    ]


def host_words(num_bytes: float) -> str:
    """Return what a node needs of its memory, if it does, to be put behind other words."""
    return f", {large_bytes(num_bytes)} host RAM of a node" if num_bytes else ""


def about_word(found: Outlook | Help | Estimate) -> str:
    """Return the word in front of what was estimated, "" where the whole step was planned."""
    return "" if found.is_planned else "about "


def _changed(config: RunConfig) -> Outlook:
    """Return the outlook of a changed plan.  Raises ConfigError like `outlook_of`.

    Where the backward is split, short steps say less of memory, so it is planned whole more often.
    With offloading those of V-Min on 32 ranks needed 65 GiB more than a step of 80 microbatches.
    """
    family = GENERATORS.get(config.schedule.name)
    is_split = family is not None and family.split_backward
    return outlook_of(config, whole=MOST_PLANNED if is_split else MOST_AT_ONCE)


def _more_gpus_words(config: RunConfig, degrees: Degrees) -> str:
    """Return a longer pipeline that fits, how to get it, and what its step takes.

    Of those with 2, 4, 8 ... times as many stages it is the first.
    """
    limit, cluster = limit_of(config.cluster), config.cluster
    for longer in _longer(config, degrees):
        with suppress(ConfigError):
            if about_bytes(longer) > limit:
                continue
            found = None if longer.schedule.is_solved else promising(longer, lambda found: True)
            words = changes_of(config, longer)
            if longer.cluster != cluster:
                words = f"cluster.num_nodes={longer.cluster.num_nodes} {words}"
            how = "may fit"
            if found is not None:
                if not found.fits:
                    continue
                memory = f"{human_bytes(found.memory)}{host_words(found.host)}"
                how = f"{about_word(found)}{duration(found.seconds)}, {memory}"
            return f"{_MORE_GPUS}: {words}: {how}"
    fewer = " or a smaller parallel.dp" if degrees.dp > 1 else ""
    return f"{_MORE_GPUS}: cluster.num_nodes above {cluster.num_nodes}{fewer}, with another split"


def _longer(config: RunConfig, degrees: Degrees) -> Iterator[RunConfig]:
    """Yield `config` with longer pipelines for the same batch, with fewer replicas or more nodes.

    Each comes also with full recomputation; parallel.layers_per_stage is dropped, and so are chunks
    for which there are no layers.
    """
    pp, parallel = degrees.pp, replace(config.parallel, layers_per_stage=None)
    even = replace(parallel, dp=degrees.dp, placement="balanced")
    again = replace(even, recompute="full", recompute_per_stage=None)
    num_layers = config.model.num_layers
    factors = takewhile(lambda factor: factor * pp <= num_layers, FACTORS)
    for factor, kind in product(factors, dict.fromkeys((even, again))):
        longer = replace(kind, pp=factor * pp)
        schedule, most = config.schedule, most_chunks(longer.pp, num_layers)
        if (schedule.num_chunks or 0) > most > 1:
            schedule = replace(schedule, num_chunks=most)
        if degrees.dp % factor == 0:
            with suppress(ConfigError):  # a step has at most so many microbatches
                yield replace(
                    config,
                    schedule=schedule,
                    parallel=replace(longer, dp=degrees.dp // factor),
                    num_microbatches=factor * config.num_microbatches,
                )
        with suppress(ConfigError):  # nor is there any number of nodes
            more = replace(config.cluster, num_nodes=factor * config.cluster.num_nodes)
            yield replace(config, schedule=schedule, parallel=longer, cluster=more)


def host_remedies(
    config: RunConfig, report: PlanReport, progress: Callable[[str], object] = lambda words: None
) -> list[str]:
    """Return the changes that save memory of the hosts, the largest saving first, in words.

    Every change is planned on its own.  Bytes are those of a node.  What does not fit on the GPUs
    then comes last.  More nodes may not help: a longer pipeline has more microbatches in flight.
    """
    excess = report.host_excess
    config, report = _proposing(config, report)
    found: list[tuple[bool, float, str]] = []
    for words, changed in _lighter_on_hosts(config, report).items():
        progress(f"planning with {words}")
        try:
            then = _changed(changed)
        except ConfigError:
            continue
        saved, about = report.host.total - then.host, about_word(then)
        if saved < 0.01 * report.host.total:
            continue
        words += f": {about}{human_bytes(saved)} less in host memory per node"
        if then.host_excess > 0:
            words += _NOT_ALONE if saved < excess else _NO_MARGIN
        if then.excess > 0:
            words += (
                f"; but then a GPU needs {about}{human_bytes(then.memory)}, "
                f"{human_bytes(then.excess)} more than the {config.cluster.memory_gib:.4g} GiB "
                "that a proposal may use"
            )
        found.append((then.excess > 0, -saved, words))
    least = large_bytes(report.host.total / (1 - MARGIN))
    more = f"more than {least} of host memory per node (cluster.host_memory_gib)"
    return [*(words for *_, words in sorted(found)), more]


def _lighter_on_hosts(config: RunConfig, report: PlanReport) -> dict[str, RunConfig]:
    """Return the changes that may save memory of the hosts, as they are typed."""
    parallel, schedule, host = config.parallel, config.schedule, report.host
    changes: dict[str, RunConfig] = {}
    if host.optimizer:
        optim = replace(config.optim, offload=False)
        changes["optim.offload=false"] = replace(config, optim=optim)
    if not host.activations or schedule.is_solved or schedule.file is not None:
        return changes
    part = _largest_part(config, 1 - report.host_excess / host.activations)
    fewer = replace(parallel, offload_activations=part)
    changes[f"parallel.offload_activations={part:g}"] = replace(config, parallel=fewer)
    for again in _recomputing(config):
        if again != config:
            changes[changes_of(config, again)] = again
    if schedule.name == "interleaved":
        line = replace(config, schedule=replace(schedule, name="1f1b", num_chunks=None))
        changes[changes_of(config, line)] = line
    return changes


def _largest_part(config: RunConfig, fitting: float) -> float:
    """Return the largest parallel.offload_activations that moves this part of what moves now."""
    now = config.parallel.offload_activations
    most = fitting * _moved_layers(config, now)
    parts = (hundredths / 100 for hundredths in range(math.floor(100 * now), 0, -1))
    part = next((part for part in parts if _moved_layers(config, part) <= most), 0.0)
    moved = _moved_layers(config, part)  # many parts round to it; the plainest is their quotient
    plain = round(moved / config.model.num_layers, 2)
    return plain if _moved_layers(config, plain) == moved else part


def _moved_layers(config: RunConfig, part: float) -> int:
    """Return how many layers offload activations with parallel.offload_activations=`part`."""
    family, chunks = GENERATORS[config.schedule.name], config.schedule.num_chunks
    degrees = split_ranks(config.parallel, config.cluster.num_gpus)
    layout = family.layout_of(degrees.pp, chunks)
    stages = split_layers(config.model, config.parallel, layout)
    return sum(offloaded_layers(len(layers), part) for layers in stages)


def _saved_by_offloading(config: RunConfig, report: PlanReport) -> tuple[float, str]:
    """Return what the worst rank saves if all activations may go to its host, also in words."""
    parallel, is_whole = config.parallel, config.parallel.offload_activations == 1
    if config.run.device != "cuda" or is_whole or config.schedule.is_solved:
        return 0.0, ""
    offloads = replace(config, parallel=replace(parallel, offload_activations=1.0))
    with suppress(ConfigError):
        then = _changed(offloads)
        if then.host_excess <= 0:
            saved = report.ranks[report.worst].memory.total - then.memory
            words = f"parallel.offload_activations=1: {about_word(then)}{human_bytes(saved)} less"
            return saved, words + host_words(then.host)
    return 0.0, ""
