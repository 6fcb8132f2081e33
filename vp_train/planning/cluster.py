"""What a cluster makes of a run: which links its messages take, and so what passes and messages cost.

Ranks are numbered as in `degrees`, and fill one node after the other: tensor-parallel ranks are neighbours, then come the ranks
of a pipeline, then replicas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from schedules.problem import Problem
from schedules.vocab import End
from vp_train.config import ClusterConfig, RunConfig
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import ITEM_BYTES, message_bytes, sum_seconds


@dataclass(frozen=True, slots=True)
class Link:
    """`where` it leads, what a message takes on it whatever its size, and its bandwidth."""

    where: str
    seconds: float
    bytes_per_second: float

    def of_group(self, num_ranks: int) -> float:
        """The fixed seconds of a collective: one message after the other along a tree."""
        return self.seconds * math.ceil(math.log2(num_ranks)) if num_ranks > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Links:
    """The slowest link that each purpose uses anywhere in the cluster."""

    tensor: Link
    pipeline: Link  # hops, and the barriers of the vocabulary
    data: Link


def links_of(cluster: ClusterConfig, degrees: Degrees) -> Links:
    """Inside a node where no group of that purpose leaves it."""
    replicas, pipeline, tensor = range(degrees.dp), range(degrees.pp), range(degrees.tp)
    return Links(
        _slowest(
            cluster, ([degrees.rank(d, p, t) for t in tensor] for d in replicas for p in pipeline)
        ),
        _slowest(
            cluster, ([degrees.rank(d, p, t) for p in pipeline for t in tensor] for d in replicas)
        ),
        _slowest(
            cluster, ([degrees.rank(d, p, t) for d in replicas] for p in pipeline for t in tensor)
        ),
    )


def _slowest(cluster: ClusterConfig, groups: Iterable[list[int]]) -> Link:
    if any(
        group[0] // cluster.gpus_per_node != group[-1] // cluster.gpus_per_node for group in groups
    ):
        return Link("between nodes", cluster.network_seconds, cluster.network_bytes_per_second)
    return Link("inside a node", cluster.node_seconds, cluster.node_bytes_per_second)


def peak_flops(config: RunConfig) -> float:
    """FLOPs per second of one GPU in the dtype of the run, at its peak."""
    value: float = getattr(config.cluster, f"{config.run.dtype}_flops_per_second")
    return value


def on_cluster(config: RunConfig, degrees: Degrees) -> RunConfig:
    """`config` with the cost of passes and messages on its cluster.  Measured pass times stay."""
    cluster, cost, links = config.cluster, config.cost, links_of(config.cluster, degrees)
    rows = (
        2 * message_bytes(config) / degrees.pp / degrees.tp / cluster.memory_bytes_per_second
    )  # read and written
    told = replace(
        cost,
        flops_per_second=peak_flops(config) * cluster.efficiency,
        hop_seconds=links.pipeline.seconds,
        hop_bytes_per_second=links.pipeline.bytes_per_second,
        collective_seconds=links.pipeline.of_group(degrees.pp * degrees.tp),
        collective_bytes_per_second=links.pipeline.bytes_per_second,
        tensor_seconds=links.tensor.of_group(degrees.tp),
        tensor_bytes_per_second=links.tensor.bytes_per_second,
        lookup_seconds=rows if cost.lookup_seconds is None else cost.lookup_seconds,
        lookup_grad_seconds=2 * rows
        if cost.lookup_grad_seconds is None
        else cost.lookup_grad_seconds,
    )
    parallel = replace(config.parallel, pp=degrees.pp, dp=degrees.dp)
    return replace(config, cost=told, parallel=parallel)


def tied_seconds(config: RunConfig, degrees: Degrees, problem: Problem) -> float:
    """What summing the gradient of a tied matrix takes, where both ends have one, on two ranks."""
    split = problem.algorithm.sharded or problem.root(End.INPUT) == problem.root(End.OUTPUT)
    if split or not config.model.tied_embeddings:
        return 0.0
    link, item = links_of(config.cluster, degrees).pipeline, ITEM_BYTES[config.run.dtype]
    num_bytes = max(4, item) * config.model.vocab_size * config.model.hidden_size / degrees.tp
    return sum_seconds(link.seconds, link.bytes_per_second, num_bytes, 2)


def gradient_seconds(config: RunConfig, degrees: Degrees, num_parameters: int) -> float:
    """What summing the gradients of one rank over the replicas adds to a step, and with ZeRO-1 gathering its parameters.

    Both run beside passes, but for those of optim.offload: DeepSpeed sums as `adamw` does, and waits for everything.
    """
    item = ITEM_BYTES[config.run.dtype]
    link = links_of(config.cluster, degrees).data

    def whole_sum(num_bytes: float) -> float:
        return sum_seconds(link.of_group(degrees.dp), link.bytes_per_second, num_bytes, degrees.dp)

    gradients = whole_sum(max(4, item) * num_parameters)
    if config.optim.name == "adamw":
        return gradients * (1 - config.cluster.overlap)
    gathered = whole_sum(item * num_parameters) / 2  # half a sum, and so is scattering one
    if config.optim.offload:
        return gradients + gathered
    return (gradients / 2 + gathered) * (1 - config.cluster.overlap)
