"""The section `cost`: what passes and messages cost on a device."""

from __future__ import annotations

from dataclasses import dataclass

from vp_train.config.bounds import DEVICES, DTYPES, LINEAR_DTYPES
from vp_train.config.errors import ConfigError
from vp_train.config.setting import check_section, setting


@dataclass(frozen=True)
class CostConfig:
    """The seconds that the planner assumes for passes and messages of one microbatch.

    Those of passes follow from FLOPs at `flops_per_second`.  Measured times, which vp-profile
    writes, replace that estimate.  `measured_*` say what was measured; those that are not null must
    agree with the run.  A message takes its fixed time and, if a bandwidth is given, its bytes
    divided by the bandwidth.  What is null follows on GPUs from `cluster`, and on a CPU it is that
    of a core which two ranks share.
    """

    flops_per_second: float | None = setting(
        None,
        "Rate of all passes, unless those of their parts are given; null: 5e10 on a CPU.",
        unit="FLOP/s",
        least=1,
    )
    matrix_flops_per_second: float | None = setting(
        None, "Rate of large matrix products.", unit="FLOP/s", least=1
    )
    attention_flops_per_second: float | None = setting(
        None,
        "Rate of causal attention over long sequences, counting what the mask leaves.",
        unit="FLOP/s",
        least=1,
    )
    memory_bytes_per_second: float | None = setting(
        None, "Bandwidth of elementwise kernels.", unit="bytes/s", least=1
    )
    kernel_seconds: float | None = setting(
        None, "Fixed time of a kernel; null: 0 on a CPU.", unit="s", least=0
    )
    multiprocessors: int | None = setting(
        None,
        "Multiprocessors over which tiles of products run in waves; 0: any number; null: 0 on a "
        "CPU.",
        least=0,
    )
    layer_launch_seconds: float | None = setting(
        None,
        "What a CPU takes to issue the kernels of a layer's forward and backward; null: that of "
        "the cluster.",
        unit="s",
        least=0,
    )
    logit_bytes: float = setting(
        6.0,
        "Bytes that S and T read and write per token and vocabulary row, beside their products.",
        least=0,
    )
    contention: float | None = setting(
        None, "Part by which layers take longer beside a sharded vocabulary; null: none.", least=0
    )
    hop_seconds: float | None = setting(
        None, "Fixed time of a message between stages; null: 2e-4 on a CPU.", unit="s", least=0
    )
    hop_bytes_per_second: float | None = setting(
        None, "Bandwidth between stages.", unit="bytes/s", least=1
    )
    collective_seconds: float | None = setting(
        None,
        "Fixed time of a collective of a sharded vocabulary; null: 5e-4 on a CPU.",
        unit="s",
        least=0,
    )
    collective_bytes_per_second: float | None = setting(
        None, "Bandwidth of that collective.", unit="bytes/s", least=1
    )
    host_bytes_per_second: float | None = setting(
        None,
        "Bandwidth between a rank and its host, in each direction, for offload_activations; "
        "null: transfers take no time.",
        unit="bytes/s",
        least=1,
    )
    tensor_seconds: float | None = setting(
        None,
        "Fixed time of an all-reduce over tensor-parallel ranks, 4 per layer; on a cluster also of "
        "an unsharded vocabulary; null: 0 on a CPU.",
        unit="s",
        least=0,
    )
    tensor_bytes_per_second: float | None = setting(
        None, "Bandwidth of that all-reduce.", unit="bytes/s", least=1
    )
    measured_layer_flops: float | None = setting(
        None, "Forward FLOPs of the measured layer; other layers are refused.", unit="FLOP"
    )
    measured_dtype: str | None = setting(None, "run.dtype when measured.", choices=DTYPES)
    measured_linear_dtype: str | None = setting(
        None, "run.linear_dtype when measured.", choices=LINEAR_DTYPES
    )
    measured_device: str | None = setting(None, "run.device when measured.", choices=DEVICES)
    measured_cuda_graphs: bool | None = setting(None, "run.cuda_graphs when measured.")
    measured_on: str | None = setting(None, "Name of the device in the report of vp-plan.")
    layer_forward_seconds: float | None = setting(None, "Measured F of a layer.", unit="s", least=0)
    layer_backward_seconds: float | None = setting(
        None, "Measured B of a layer.", unit="s", least=0
    )
    layer_input_grad_seconds: float | None = setting(
        None, "Measured I of a layer.", unit="s", least=0
    )
    layer_weight_grad_seconds: float | None = setting(
        None, "Measured W of a layer.", unit="s", least=0
    )
    output_fixed_seconds: float = setting(
        0.0,
        "Fixed part of S and T of a shard; counts only with output_row_seconds.",
        unit="s",
        least=0,
    )
    output_row_seconds: float | None = setting(
        None, "Measured S and T per vocabulary row.", unit="s", least=0
    )
    lookup_seconds: float | None = setting(None, "Measured E of a shard.", unit="s", least=0)
    lookup_grad_seconds: float | None = setting(None, "Measured G of a shard.", unit="s", least=0)
    rank_slowness: tuple[float, ...] | None = setting(
        None, "Factors by which the ranks are slower than all this; null: 1 for all.", above=0
    )

    def __post_init__(self) -> None:
        check_section("cost.", self)
        if self.rank_slowness == ():
            raise ConfigError("cost.rank_slowness=[] has no value; give one for each rank, or null")

    @property
    def has_rates(self) -> bool:
        """Return whether products, attention and elementwise kernels have rates of their own."""
        return self.matrix_flops_per_second is not None

    @property
    def is_measured(self) -> bool:
        """Return whether the times of layers or of the output layer were measured."""
        return self.layer_forward_seconds is not None or self.output_row_seconds is not None


# What CostConfig leaves open, on a CPU core that two ranks share.
CPU_COSTS = {
    "flops_per_second": 5e10,
    "kernel_seconds": 0.0,
    "multiprocessors": 0,
    "hop_seconds": 2e-4,
    "collective_seconds": 5e-4,
    "tensor_seconds": 0.0,
}
