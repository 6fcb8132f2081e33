"""The links that a run's messages take on a cluster, and what passes and messages cost there.

Ranks are numbered as in `degrees` and fill one node after the other.  Tensor-parallel ranks are
neighbours, then come the ranks of a pipeline, then the replicas.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

from schedules.problem import Problem
from schedules.vocab import End
from vp_train.config import ClusterConfig, CostConfig, ModelConfig, OptimConfig
from vp_train.config.cost import CPU_COSTS
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import sum_seconds
from vp_train.planning.workload import Workload

# The part of the memory of GPUs and of hosts that stays free in whatever a search or a plan
# proposes.  A plan that somebody types may use all of it.
MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Link:
    """A link: where it leads, its latency in seconds, and its bandwidth.

    `num_nodes` are those that a collective passes, and `step_seconds` what a ring takes from one to
    the next.
    """

    where: str
    seconds: float
    bytes_per_second: float
    num_nodes: int = 1
    step_seconds: float = 0.0

    def of_group(self, num_ranks: int) -> float:
        """Return the latency of a collective in seconds: one message per level of a tree."""
        return self.seconds * math.ceil(math.log2(num_ranks)) if num_ranks > 1 else 0.0

    def all_reduce(self, num_bytes: float, num_ranks: int) -> float:
        """Return the seconds of an all-reduce.  Its latency is that of a tree."""
        return sum_seconds(self.of_group(num_ranks), self.bytes_per_second, num_bytes, num_ranks)

    def gather(self, num_bytes: float, num_ranks: int) -> float:
        """Return the seconds of an all-gather or a reduce-scatter of `num_bytes` in total.

        It moves half of what an all-reduce moves, and passes all nodes one after the other.
        """
        if num_ranks == 1:
            return 0.0
        moved = (num_ranks - 1) / num_ranks * num_bytes / self.bytes_per_second
        return self.seconds + (self.num_nodes - 1) * self.step_seconds + moved


@dataclass(frozen=True, slots=True)
class Links:
    """The slowest link that each kind of group uses anywhere in the cluster.

    pipeline: hops between stages, and the collectives of the vocabulary.  data: the replicas.
    """

    tensor: Link
    pipeline: Link
    data: Link


@functools.cache
def links_of(cluster: ClusterConfig, degrees: Degrees) -> Links:
    """Return the link of each kind of group: inside a node if no such group leaves its node.

    The ranks of a tensor-parallel group and those of a pipeline are a block of neighbours, so they
    share nodes if the size of the block divides that of a node.  Replicas fill the cluster.

    A hop has one sender and one receiver, so it has the bandwidth of a port.  Collectives of the
    tensor-parallel ranks and of the replicas are rings, which use the ports of all their ranks in a
    node.
    """
    on_one_node, block = degrees.num_ranks <= cluster.gpus_per_node, degrees.pp * degrees.tp

    def of_blocks(size: int) -> bool:
        return not on_one_node and cluster.gpus_per_node % size > 0

    return Links(
        tensor=_link(cluster, degrees.tp, 1, leaves=of_blocks(degrees.tp)),
        pipeline=_link(cluster, block, 1, leaves=of_blocks(block), rings=False),
        data=_link(cluster, degrees.dp, block, leaves=not on_one_node and degrees.dp > 1),
    )


def _link(
    cluster: ClusterConfig, size: int, stride: int, *, leaves: bool, rings: bool = True
) -> Link:
    """Return the link of groups of `size` ranks, each `stride` ranks after the one before."""
    if not leaves:
        return Link("inside a node", cluster.node_seconds, cluster.node_bytes_per_second)
    node = cluster.gpus_per_node
    members = max(1, min(size, node // stride)) if rings else 1
    ports = min(1.0, (cluster.rails or node) / node)  # of a GPU, if all send at once
    across = members * ports * cluster.network_bytes_per_second
    nodes_between = math.ceil(((size - 1) * stride + 1) / node)
    if cluster.pod_nodes is not None and nodes_between > cluster.pod_nodes:
        # In each pod the ranks of one node send beyond it, and those of its other nodes do not.
        nodes_in_pod = min(size // members, cluster.pod_nodes * node // max(stride, node))
        across /= max(1.0, cluster.oversubscription / max(1, nodes_in_pod))
    return Link(
        "between nodes",
        cluster.network_seconds,
        min(across, cluster.node_bytes_per_second) if members > 1 else across,
        math.ceil(size / members),
        cluster.network_step_seconds,
    )


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
    """Return `cost` with the seconds on this cluster for all that was left open.

    Measured pass times and rates, and whatever else was chosen, stay as they are.  One chosen rate
    for all FLOPs replaces those of the parts.
    """
    degrees, links = work.degrees, links_of(cluster, work.degrees)
    # A lookup reads and writes this rank's share of the embeddings.
    lookup = 2 * work.message_bytes / degrees.pp / degrees.tp / cluster.memory_bytes_per_second
    found = replace(
        on_cpu(cost),
        flops_per_second=peak_flops(cluster, work.dtype) * cluster.efficiency,
        hop_seconds=links.pipeline.seconds,
        hop_bytes_per_second=links.pipeline.bytes_per_second,
        collective_seconds=links.pipeline.of_group(degrees.pp * degrees.tp),
        collective_bytes_per_second=links.pipeline.bytes_per_second,
        host_bytes_per_second=host_bytes_per_second(cluster),
        tensor_seconds=links.tensor.of_group(degrees.tp),
        tensor_bytes_per_second=links.tensor.bytes_per_second,
        lookup_seconds=lookup,
        lookup_grad_seconds=2 * lookup,
        contention=cluster.contention,
        layer_launch_seconds=cluster.layer_launch_seconds,
    )
    chosen = chosen_costs(cost)
    # Measured seconds of a layer stand alone: without measured rates other layers are refused.
    alone = cost.has_rates or cost.measured_layer_flops is not None or "flops_per_second" in chosen
    if cluster.multiprocessors and not alone:
        found = with_rates(found, cluster, work.dtype, alone=False)
    return replace(found, **chosen)


def chosen_costs(cost: CostConfig) -> dict[str, Any]:
    """Return the settings of `cost` that are not at their defaults."""
    default = CostConfig()
    return {
        item.name: getattr(cost, item.name)
        for item in fields(CostConfig)
        if getattr(cost, item.name) != getattr(default, item.name)
    }


def with_margin(cluster: ClusterConfig, margin: float = MARGIN) -> ClusterConfig:
    """Return `cluster` without the part `margin` of the memory of its GPUs and hosts."""
    kept, known = 1 - margin, cluster.host_memory_gib
    return replace(
        cluster,
        memory_gib=kept * cluster.memory_gib,
        host_memory_gib=None if known is None else kept * known,
    )


def limit_of(cluster: ClusterConfig, margin: float = 0.0) -> float:
    """Return the bytes that a rank may need where the part `margin` of them stays free."""
    return with_margin(cluster, margin).memory_gib * 2**30


def host_bytes_per_second(cluster: ClusterConfig) -> float:
    """Return the bandwidth between a GPU and its host while all GPUs of the node transfer."""
    own, of_node = cluster.host_bytes_per_second, cluster.host_node_bytes_per_second
    return own if of_node is None else min(own, of_node / cluster.gpus_per_node)


def with_rates(cost: CostConfig, cluster: ClusterConfig, dtype: str, *, alone: bool) -> CostConfig:
    """Return `cost` with the rates of a GPU of `cluster`, of kernels alone or in a run."""
    kept = 1.0 if alone else cluster.sustained
    peak = peak_flops(cluster, dtype) * kept
    return replace(
        cost,
        matrix_flops_per_second=peak * cluster.efficiency,
        attention_flops_per_second=peak * cluster.attention_efficiency,
        memory_bytes_per_second=cluster.memory_bytes_per_second * kept,
        kernel_seconds=cluster.kernel_seconds,
        multiprocessors=cluster.multiprocessors,
    )


def assumed_costs(work: Workload, cluster: ClusterConfig, cost: CostConfig) -> CostConfig:
    """Return the costs of a run: on GPUs those of `on_cluster`, on a CPU those of a core."""
    return on_cluster(work, cluster, cost) if work.on_cuda else on_cpu(cost)


def on_cpu(cost: CostConfig) -> CostConfig:
    """Return `cost` with the values of a CPU core for all that was left open."""
    return replace(cost, **{**CPU_COSTS, **chosen_costs(cost)})


def tied_on_two_ranks(problem: Problem, model: ModelConfig) -> bool:
    """Return whether two ranks have copies of one matrix, for the input and for the output."""
    one_copy = problem.algorithm.sharded or problem.root(End.INPUT) == problem.root(End.OUTPUT)
    return model.tied_embeddings and not one_copy


def tied_seconds(
    work: Workload, cluster: ClusterConfig, optim: OptimConfig, problem: Problem
) -> float:
    """Return the seconds in which two ranks sum the gradient of a tied matrix after the replicas.

    It is 0 unless the input and the output layer keep copies of it on two different ranks.  With
    ZeRO-1 a replica sums its part.
    """
    if not tied_on_two_ranks(problem, work.model):
        return 0.0
    link, model = links_of(cluster, work.degrees).pipeline, work.model
    num_bytes = work.precise_bytes * model.vocab_size * model.hidden_size / work.degrees.tp
    if optim.name == "zero1":
        num_bytes /= work.degrees.dp
    return sum_seconds(link.seconds, link.bytes_per_second, num_bytes, 2)


@dataclass(frozen=True, slots=True)
class ReplicaSeconds:
    """The seconds in which the replicas of a rank exchange these bytes, whether hidden or not.

    `sums` are those of the gradients, `gathers` those of the new parameters with ZeRO-1.
    """

    sums: float
    gathers: float


def replica_seconds(
    work: Workload, cluster: ClusterConfig, optim: OptimConfig, num_parameters: float
) -> ReplicaSeconds:
    """Return the seconds of summing and gathering `num_parameters` in one piece.

    DeepSpeed, which runs with optim.offload, sums gradients by all-reduce, as `adamw` does.
    """
    link, dp = links_of(cluster, work.degrees).data, work.degrees.dp
    gradients = work.precise_bytes * num_parameters
    if optim.name == "adamw":
        return ReplicaSeconds(link.all_reduce(gradients, dp), 0.0)
    gathered = link.gather(work.item_bytes * num_parameters, dp)
    if optim.offload:
        return ReplicaSeconds(link.all_reduce(gradients, dp), gathered)
    return ReplicaSeconds(link.gather(gradients, dp), gathered)


def gradient_seconds(
    work: Workload, cluster: ClusterConfig, optim: OptimConfig, num_parameters: int
) -> float:
    """Return the seconds that the exchange of the replicas adds to any step at least.

    What may overlap with passes may also be hidden by them.
    """
    whole = replica_seconds(work, cluster, optim, num_parameters)
    hidden = hideable_seconds(work, cluster, optim, num_parameters)
    return (whole.sums - hidden.sums) + (whole.gathers - hidden.gathers)


def hideable_seconds(
    work: Workload, cluster: ClusterConfig, optim: OptimConfig, num_parameters: int
) -> ReplicaSeconds:
    """Return the part of `replica_seconds` that passes may hide."""
    whole = replica_seconds(work, cluster, optim, num_parameters)
    return ReplicaSeconds(
        whole.sums * (optim.overlap_sums and not optim.offload),
        whole.gathers * (optim.overlap_gathers and not optim.offload),
    )
