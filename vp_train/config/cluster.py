"""The section `cluster`: the machines that a run is planned for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vp_train.config.bounds import MOST_RANKS_OF_A_MODEL, MOST_REPLICAS
from vp_train.config.setting import check_section, setting


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that a run is planned for.

    `vp-plan` always reads it, runs and `vp-simulate` only on GPUs.  There it decides the order of
    passes, what is offloaded, and the MFU.  If you type no `cluster=`, `vp-train` takes the preset
    named after its GPU, which `--print-config` does not show.
    Links are those of one GPU, in one direction: `node_*` to the other GPUs of its node,
    `network_*` to other nodes.  `host_*` count with optim.offload and
    parallel.offload_activations.  With `multiprocessors` passes are split into matrix products,
    attention and elementwise kernels, each with its own rate.  Without it all FLOPs run at
    `efficiency`, and nothing else takes time.
    """

    num_nodes: int = setting(1, "Number of nodes.", least=1, most=MOST_REPLICAS)
    gpus_per_node: int = setting(4, "GPUs per node.", least=1, most=MOST_RANKS_OF_A_MODEL)
    memory_gib: float = setting(
        4.0, "Memory that a rank may allocate on its GPU.", unit="GiB", above=0
    )
    bfloat16_flops_per_second: float = setting(1e11, "Peak of a GPU.", unit="FLOP/s", least=1)
    float16_flops_per_second: float = setting(1e11, "Peak of a GPU.", unit="FLOP/s", least=1)
    float32_flops_per_second: float = setting(1e11, "Peak of a GPU.", unit="FLOP/s", least=1)
    float64_flops_per_second: float = setting(5e10, "Peak of a GPU.", unit="FLOP/s", least=1)
    float8: bool = setting(True, "Whether GPUs have products in float8, as from an H100 on.")
    efficiency: float = setting(
        0.5,
        "Part of the peak that large matrix products reach, unless cost has measured times.",
        above=0,
        most=1,
    )
    attention_efficiency: float = setting(
        0.5, "Part of the peak that causal attention reaches over long sequences.", above=0, most=1
    )
    multiprocessors: int = setting(
        0, "Multiprocessors of a GPU; 0: all FLOPs run at efficiency.", least=0, most=100_000
    )
    kernel_seconds: float = setting(0.0, "Fixed time of a kernel.", unit="s", least=0)
    layer_launch_seconds: float = setting(
        0.0,
        "What a CPU takes to issue the kernels of a layer's forward and backward; in a plan a "
        "layer takes at least as long.",
        unit="s",
        least=0,
    )
    sustained: float = setting(
        1.0,
        "Part of the rates of kernels alone that passes keep in a run: clocks under the limit of "
        "power, late hosts, the slowest of many GPUs.",
        above=0,
        most=1,
    )
    contention: float = setting(
        0.0,
        "Part by which layers take longer beside the collectives of a sharded vocabulary, "
        "which hold some multiprocessors.",
        least=0,
    )
    memory_bytes_per_second: float = setting(
        1e10, "Bandwidth of a GPU's memory.", unit="bytes/s", least=1
    )
    node_seconds: float = setting(2e-4, "Fixed time of a message within a node.", unit="s", least=0)
    node_bytes_per_second: float = setting(1e9, "Bandwidth within a node.", unit="bytes/s", least=1)
    network_seconds: float = setting(
        1e-3, "Fixed time of a message between nodes.", unit="s", least=0
    )
    network_bytes_per_second: float = setting(
        1e8, "Bandwidth of one port between nodes.", unit="bytes/s", least=1
    )
    rails: int | None = setting(
        None, "Ports of a node, which its GPUs share; null: one for each GPU.", least=1
    )
    network_step_seconds: float = setting(
        0.0, "Time of one step of a ring between nodes.", unit="s", least=0
    )
    pod_nodes: int | None = setting(
        None, "Nodes that reach each other at full bandwidth; null: all.", least=1
    )
    oversubscription: float = setting(
        1.0, "Factor by which a port is slower between pods, with all GPUs sending.", least=1
    )
    host_bytes_per_second: float = setting(
        1e10, "Bandwidth between a GPU and its host.", unit="bytes/s", least=1
    )
    host_node_bytes_per_second: float | None = setting(
        None,
        "Bandwidth between all GPUs of a node and its host together, in each direction; null: that "
        "of each.",
        unit="bytes/s",
        least=1,
    )
    host_memory_gib: float | None = setting(
        None,
        "Memory of a node's host that its ranks may allocate for activations and optimizer state; "
        "0: none; null: not checked.",
        unit="GiB",
        least=0,
    )
    host_memory_bytes_per_second: float = setting(
        1e10, "A GPU's share of the bandwidth of host memory.", unit="bytes/s", least=1
    )

    def __post_init__(self) -> None:
        check_section("cluster.", self)

    @property
    def num_gpus(self) -> int:
        """The GPUs of all nodes."""
        return self.num_nodes * self.gpus_per_node

    @property
    def host_limit(self) -> float:
        """The bytes that the ranks of a node may keep in its memory, infinity if not known."""
        known = self.host_memory_gib
        return math.inf if known is None else known * 2**30
