"""What would let a plan fit that needs too much memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product, takewhile
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change that saves memory of GPUs or hosts where a plan needs too much.

    text: what to do in words, and `overrides` what to append for it; None if that is not known.
    saved: the bytes of the rank, or with `on_hosts` of the node, that needs most.
    seconds: those of the step then, None if only a search says.
    host: the bytes that a node then needs of its memory.
    is_planned: whether the whole step was planned.
    is_saved_exact: whether `saved` follows from the plan, also where the step then is estimated.
    is_enough: whether the plan fits then; None where nothing was planned that says it.
    lacks: what it lacks to let the plan fit, in words; "" if nothing.
    memory: the bytes of the rank that needs most where they are said.
    """

    text: str
    overrides: str | None
    saved: float | None = None
    seconds: float | None = None
    host: float = 0.0
    is_planned: bool = True
    on_hosts: bool = False
    is_saved_exact: bool = False
    is_enough: bool | None = None
    lacks: str = ""
    memory: float | None = None

    @property
    def words(self) -> str:
        """The remedy in a line, with figures that were not planned whole behind `~`."""
        mark, found = about_mark(self), list[str]()
        if self.saved is not None:
            where = " in host memory per node" if self.on_hosts else ""
            about = "" if self.is_saved_exact else mark
            found.append(f"{about}{human_bytes(self.saved)} less{where}")
        if self.seconds is not None:
            step = "step " if found else ""
            found.append(f"{step}{mark}{duration(self.seconds)}")
        if self.memory is not None:
            found.append(f"{mark}{human_bytes(self.memory)}")
        if not self.on_hosts and self.host:
            found.append(host_words(self.host, mark).removeprefix(", "))
        figures = f": {', '.join(found)}" if found else ""
        return f"{self.text}{figures}{self.lacks}"

    def record(self) -> dict[str, Any]:
        """Return the remedy for JSON."""
        return {
            "words": self.words,
            "overrides": self.overrides,
            "saved_bytes": None if self.on_hosts else self.saved,
            "saved_host_bytes": self.saved if self.on_hosts else None,
            "step_seconds": self.seconds,
            "bytes": self.memory,
            "host_total_bytes": self.host,
            "planned": self.is_planned,
            "enough": self.is_enough,
        }


def remedies(
    config: RunConfig, report: PlanReport, progress: Callable[[str], object] = lambda words: None
) -> list[Remedy]:
    """Return the changes that save memory on the worst rank of `config`, the largest saving first.

    Every change is tried on its own, and the words say where it is not enough to leave as much free
    as a proposal does.  `progress` gets lines to show meanwhile.
    """
    excess = report.excess
    config, report = _proposing(config, report)
    replicas = split_ranks(config.parallel, config.cluster.num_gpus).dp
    needed = report.ranks[report.worst].memory.total
    is_solved = config.schedule.is_solved
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
    parallel = config.parallel
    if config.run.device == "cuda" and parallel.offload_activations < 1 and not is_solved:
        tried.append(replace(config, parallel=replace(parallel, offload_activations=1.0)))
    found = list[Remedy]()
    for changed in tried:
        if changed == config:
            continue
        words = changes_of(config, changed)
        progress(f"planning with {words}")
        with suppress(ConfigError):
            then = None if is_solved else _changed(changed)
            host = needs_of_host if changed.optim.offload else 0.0
            if then is not None:
                host = then.host
            if host > max(config.cluster.host_limit, report.host.total):
                continue
            is_exact = changed == replace(config, optim=changed.optim)
            if is_exact:
                saved = needed - report.memory_with(changed.optim)
            elif then is None:
                saved = about_bytes(config) - about_bytes(changed)
            else:
                saved = needed - then.memory
            if saved > 0.01 * needed:
                lacks = _lack(saved, excess, report.excess)
                knows = then is not None or is_exact
                has_room = host <= config.cluster.host_limit
                remedy = Remedy(
                    words,
                    words,
                    saved,
                    None if then is None else then.seconds,
                    host,
                    is_planned=then is not None and then.is_planned,
                    is_saved_exact=is_exact,
                    is_enough=has_room and not lacks if knows or lacks else None,
                    lacks=lacks,
                )
                found.append(remedy)
    found.sort(key=lambda one: (one.saved or 0.0, one.text), reverse=True)
    progress("planning longer pipelines")
    return [*found, _more_gpus(config, report.degrees)]


def _lack(saved: float, excess: float, with_margin: float) -> str:
    """Return what a saving lacks of the excess, and of that with the margin of a proposal."""
    if saved >= with_margin:
        return ""
    return _NOT_ALONE if saved < excess else _NO_MARGIN


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


def host_words(num_bytes: float, mark: str = "") -> str:
    """Return what a node needs of its memory, if it does, to be put behind other words."""
    return f", {mark}{large_bytes(num_bytes)} host RAM of a node" if num_bytes else ""


def about_mark(found: Help | Estimate | Outlook | Remedy) -> str:
    """Return the mark in front of what was estimated, "" where the whole step was planned."""
    return "" if found.is_planned else "~"


def _changed(config: RunConfig) -> Outlook:
    """Return the outlook of a changed plan.  Raises ConfigError like `outlook_of`.

    Where the backward is split, short steps say less of memory, so it is planned whole more often.
    With offloading those of V-Min on 32 ranks needed 65 GiB more than a step of 80 microbatches.
    """
    family = GENERATORS.get(config.schedule.name)
    is_split = family is not None and family.split_backward
    return outlook_of(config, whole=MOST_PLANNED if is_split else MOST_AT_ONCE)


def _more_gpus(config: RunConfig, degrees: Degrees) -> Remedy:
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
            text = f"{_MORE_GPUS}: {words}"
            if found is None:
                return Remedy(f"{text}: may fit", words, is_planned=False)
            if found.fits:
                return Remedy(
                    text,
                    words,
                    seconds=found.seconds,
                    host=found.host,
                    is_planned=found.is_planned,
                    is_enough=True,
                    memory=found.memory,
                )
    fewer = " or a smaller parallel.dp" if degrees.dp > 1 else ""
    nodes = f"cluster.num_nodes above {cluster.num_nodes}{fewer}, with another split"
    return Remedy(f"{_MORE_GPUS}: {nodes}", None)


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
) -> list[Remedy]:
    """Return the changes that save memory of the hosts, the largest saving first.

    Every change is planned on its own.  Bytes are those of a node.  What does not fit on the GPUs
    then comes last.  More nodes may not help: a longer pipeline has more microbatches in flight.
    """
    excess = report.host_excess
    config, report = _proposing(config, report)
    found: list[tuple[bool, float, str, Remedy]] = []
    for words, changed in _lighter_on_hosts(config, report).items():
        progress(f"planning with {words}")
        try:
            then = _changed(changed)
        except ConfigError:
            continue
        saved = report.host.total - then.host
        if saved < 0.01 * report.host.total:
            continue
        lacks = _lack(saved, excess, report.host_excess)
        if then.excess > 0:
            lacks += (
                f"; but then a GPU needs {about_mark(then)}{human_bytes(then.memory)}, "
                f"{human_bytes(then.excess)} more than the {config.cluster.memory_gib:.4g} GiB "
                "that a proposal may use"
            )
        remedy = Remedy(
            words,
            words,
            saved,
            then.seconds,
            then.host,
            then.is_planned,
            on_hosts=True,
            is_enough=not lacks,
            lacks=lacks,
        )
        found.append((then.excess > 0, -saved, words, remedy))
    least = large_bytes(report.host.total / (1 - MARGIN))
    more = f"more than {least} of host memory per node (cluster.host_memory_gib)"
    return [*(remedy for *_, remedy in sorted(found, key=lambda one: one[:3])), Remedy(more, None)]


def _lighter_on_hosts(config: RunConfig, report: PlanReport) -> dict[str, RunConfig]:
    """Return the changes that may save memory of the hosts, as they are typed."""
    parallel, schedule, host = config.parallel, config.schedule, report.host
    lighter = list[RunConfig]()
    if host.optimizer:
        lighter.append(replace(config, optim=replace(config.optim, offload=False)))
    if host.activations and not schedule.is_solved and schedule.file is None:
        part = _largest_part(config, 1 - report.host_excess / host.activations)
        fewer = replace(parallel, offload_activations=part)
        lighter.append(replace(config, parallel=fewer))
        lighter += _recomputing(config)
        if schedule.name == "interleaved":
            line = replace(schedule, name="1f1b", num_chunks=None)
            lighter.append(replace(config, schedule=line))
    return {changes_of(config, one): one for one in lighter if one != config}


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
