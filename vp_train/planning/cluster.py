"""The links that a run's messages take on a cluster, and what passes and messages cost there.

Ranks are numbered as in `degrees` and fill one node after the other.  Tensor-parallel ranks are
neighbours, then come the ranks of a pipeline, then the replicas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from schedules.problem import Problem
from schedules.vocab import End
from vp_train.config import ClusterConfig, CostConfig, RunConfig
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import ITEM_BYTES, message_bytes, sum_seconds


@dataclass(frozen=True, slots=True)
class Link:
    """A link: where it leads, its latency in seconds, and its bandwidth."""

    where: str
    seconds: float
    bytes_per_second: float

    def of_group(self, num_ranks: int) -> float:
        """Return the latency of a collective in seconds: one message per level of a tree."""
        return self.seconds * math.ceil(math.log2(num_ranks)) if num_ranks > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Links:
    """The slowest link that each kind of group uses anywhere in the cluster."""

    tensor: Link
    pipeline: Link  # hops between stages, and the collectives of the vocabulary
    data: Link


def links_of(cluster: ClusterConfig, degrees: Degrees) -> Links:
    """Return the link of each kind of group: inside a node if no such group leaves its node."""
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
    """Return the peak FLOP/s of one GPU in the dtype of the run."""
    value: float = getattr(config.cluster, f"{config.run.dtype}_flops_per_second")
    return value


def on_cluster(config: RunConfig, degrees: Degrees) -> RunConfig:
    """Return `config` with the costs of its passes and messages on its cluster.

    Measured pass times stay as they are.
    """
    cluster, cost, links = config.cluster, config.cost, links_of(config.cluster, degrees)
    # A lookup reads and writes this rank's share of the embeddings.
    lookup = 2 * message_bytes(config) / degrees.pp / degrees.tp / cluster.memory_bytes_per_second
    on_links = replace(
        cost,
        flops_per_second=peak_flops(config) * cluster.efficiency,
        hop_seconds=links.pipeline.seconds,
        hop_bytes_per_second=links.pipeline.bytes_per_second,
        collective_seconds=links.pipeline.of_group(degrees.pp * degrees.tp),
        collective_bytes_per_second=links.pipeline.bytes_per_second,
        tensor_seconds=links.tensor.of_group(degrees.tp),
        tensor_bytes_per_second=links.tensor.bytes_per_second,
        lookup_seconds=lookup if cost.lookup_seconds is None else cost.lookup_seconds,
        lookup_grad_seconds=2 * lookup
        if cost.lookup_grad_seconds is None
        else cost.lookup_grad_seconds,
    )
    parallel = replace(config.parallel, pp=degrees.pp, dp=degrees.dp)
    return replace(config, cost=on_links, parallel=parallel)


def assumed_costs(config: RunConfig, degrees: Degrees) -> RunConfig:
    """Return `config` with the costs on its cluster for all that was left at a default, on GPUs.

    The defaults are those of a CPU.
    """
    if config.run.device != "cuda":
        return config
    default, costed = CostConfig(), on_cluster(config, degrees)
    chosen = {
        item.name: getattr(config.cost, item.name)
        for item in fields(CostConfig)
        if getattr(config.cost, item.name) != getattr(default, item.name)
    }
    return replace(costed, cost=replace(costed.cost, **chosen))


def tied_seconds(config: RunConfig, degrees: Degrees, problem: Problem) -> float:
    """Return the seconds that summing the gradient of a tied matrix takes.

    It is 0 unless the input and the output layer keep copies of it on two different ranks.
    """
    one_copy = problem.algorithm.sharded or problem.root(End.INPUT) == problem.root(End.OUTPUT)
    if one_copy or not config.model.tied_embeddings:
        return 0.0
    link, item = links_of(config.cluster, degrees).pipeline, ITEM_BYTES[config.run.dtype]
    num_bytes = max(4, item) * config.model.vocab_size * config.model.hidden_size / degrees.tp
    return sum_seconds(link.seconds, link.bytes_per_second, num_bytes, 2)


def gradient_seconds(config: RunConfig, degrees: Degrees, num_parameters: int) -> float:
    """Return the seconds that reducing gradients over the replicas adds to a step of one rank.

    With ZeRO-1 the all-gather of its parameters is included.  The part `cluster.overlap` of both
    hides behind passes.  Nothing hides with optim.offload: DeepSpeed sums gradients by all-reduce,
    as `adamw` does, and waits for everything.
    """
    item = ITEM_BYTES[config.run.dtype]
    link = links_of(config.cluster, degrees).data

    def whole_sum(num_bytes: float) -> float:
        return sum_seconds(link.of_group(degrees.dp), link.bytes_per_second, num_bytes, degrees.dp)

    gradients = whole_sum(max(4, item) * num_parameters)
    if config.optim.name == "adamw":
        return gradients * (1 - config.cluster.overlap)
    # An all-gather or a reduce-scatter moves half as much as an all-reduce.
    gathered = whole_sum(item * num_parameters) / 2
    if config.optim.offload:
        return gradients + gathered
    return (gradients / 2 + gathered) * (1 - config.cluster.overlap)
