"""The links that a run's messages take on a cluster, and what passes and messages cost there.

Ranks are numbered as in `degrees` and fill one node after the other.  Tensor-parallel ranks are
neighbours, then come the ranks of a pipeline, then the replicas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from schedules.problem import Problem
from schedules.vocab import End
from vp_train.config import ClusterConfig, CostConfig, OptimConfig
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import sum_seconds
from vp_train.planning.workload import Workload


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
    """Return the link of each kind of group: inside a node if no such group leaves its node.

    The ranks of a tensor-parallel group and those of a pipeline are a block of neighbours, so they
    share nodes if the size of the block divides that of a node.  Replicas fill the cluster.
    """
    on_one_node = degrees.num_ranks <= cluster.gpus_per_node

    def of_blocks(size: int) -> Link:
        return _link(cluster, leaves=not on_one_node and cluster.gpus_per_node % size > 0)

    return Links(
        tensor=of_blocks(degrees.tp),
        pipeline=of_blocks(degrees.pp * degrees.tp),
        data=_link(cluster, leaves=not on_one_node and degrees.dp > 1),
    )


def _link(cluster: ClusterConfig, *, leaves: bool) -> Link:
    """Return the link of a group that leaves its node, or does not."""
    if leaves:
        return Link("between nodes", cluster.network_seconds, cluster.network_bytes_per_second)
    return Link("inside a node", cluster.node_seconds, cluster.node_bytes_per_second)


def peak_flops(cluster: ClusterConfig, dtype: str) -> float:
    """Return the peak FLOP/s of one GPU in this dtype."""
    value: float = getattr(cluster, f"{dtype}_flops_per_second")
    return value


def known_peak_flops(cluster: ClusterConfig, dtype: str) -> float | None:
    """Return the peak FLOP/s of one GPU in this dtype, None if it was left at the default.

    The default is that of no machine.
    """
    peak = peak_flops(cluster, dtype)
    return None if peak == peak_flops(ClusterConfig(), dtype) else peak


def on_cluster(work: Workload, cluster: ClusterConfig, cost: CostConfig) -> CostConfig:
    """Return `cost` with the seconds that passes and messages take on this cluster.

    Measured pass times stay as they are.
    """
    degrees, links = work.degrees, links_of(cluster, work.degrees)
    # A lookup reads and writes this rank's share of the embeddings.
    lookup = 2 * work.message_bytes / degrees.pp / degrees.tp / cluster.memory_bytes_per_second
    return replace(
        cost,
        flops_per_second=peak_flops(cluster, work.dtype) * cluster.efficiency,
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


def assumed_costs(work: Workload, cluster: ClusterConfig, cost: CostConfig) -> CostConfig:
    """Return `cost` with the seconds on this cluster for all that was left at a default, on GPUs.

    The defaults are those of a CPU.
    """
    if not work.on_cuda:
        return cost
    default = CostConfig()
    chosen = {
        item.name: getattr(cost, item.name)
        for item in fields(CostConfig)
        if getattr(cost, item.name) != getattr(default, item.name)
    }
    return replace(on_cluster(work, cluster, cost), **chosen)


def layer_sum_seconds(work: Workload, cluster: ClusterConfig) -> float:
    """Return the seconds of one all-reduce of [T, H] over the tensor-parallel ranks."""
    link, tp = links_of(cluster, work.degrees).tensor, work.degrees.tp
    return sum_seconds(link.of_group(tp), link.bytes_per_second, work.message_bytes, tp)


def tied_seconds(work: Workload, cluster: ClusterConfig, problem: Problem) -> float:
    """Return the seconds that summing the gradient of a tied matrix takes.

    It is 0 unless the input and the output layer keep copies of it on two different ranks.
    """
    one_copy = problem.algorithm.sharded or problem.root(End.INPUT) == problem.root(End.OUTPUT)
    if one_copy or not work.model.tied_embeddings:
        return 0.0
    link, model = links_of(cluster, work.degrees).pipeline, work.model
    num_bytes = work.precise_bytes * model.vocab_size * model.hidden_size / work.degrees.tp
    return sum_seconds(link.seconds, link.bytes_per_second, num_bytes, 2)


def gradient_seconds(
    work: Workload, cluster: ClusterConfig, optim: OptimConfig, num_parameters: int
) -> float:
    """Return the seconds that reducing gradients over the replicas adds to a step of one rank.

    With ZeRO-1 the all-gather of its parameters is included.  The part `cluster.overlap` of both
    hides behind passes.  Nothing hides with optim.offload: DeepSpeed sums gradients by all-reduce,
    as `adamw` does, and waits for everything.
    """
    link, dp = links_of(cluster, work.degrees).data, work.degrees.dp

    def whole_sum(num_bytes: float) -> float:
        return sum_seconds(link.of_group(dp), link.bytes_per_second, num_bytes, dp)

    gradients = whole_sum(work.precise_bytes * num_parameters)
    if optim.name == "adamw":
        return gradients * (1 - cluster.overlap)
    # An all-gather or a reduce-scatter moves half as much as an all-reduce.
    gathered = whole_sum(work.item_bytes * num_parameters) / 2
    if optim.offload:
        return gradients + gathered
    return (gradients / 2 + gathered) * (1 - cluster.overlap)
