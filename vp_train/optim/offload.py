"""ZeRO-1 with its state in host memory (arXiv 2101.06840).  The only importer of deepspeed.

DeepSpeed sums, shards, updates and gathers, one after the other.  It all-reduces whole buckets, so
8 + 2 bytes per parameter travel in bfloat16, and no communication overlaps with passes.  It has no
part in the backward: the executor passes it complete gradients, in fp32 for parameters of lower
precision.  Norms and clipping are our own, because they need the ranks of all stages and float64.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vp_train.config import OptimConfig
from vp_train.optim.adamw import MOMENTS, build_adamw
from vp_train.optim.buckets import bucket_elements
from vp_train.optim.gradients import Gradients, Poison
from vp_train.optim.optimizer import State, squared_norm
from vp_train.optim.replicas import Replicas, TiedWeight
from vp_train.optim.zero import joined
from vp_train.quiet import quiet_deprecations


class OffloadedAdamW:
    """AdamW whose moments and fp32 parameters are split over the replicas, in host memory.

    It moves the parameters to new memory, so take no views of them before.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        gradients: Gradients,
        optim: OptimConfig,
        replicas: Replicas,
        tied: TiedWeight | None = None,
    ) -> None:
        self._gradients, self._replicas, self._tied = gradients, replicas, tied
        counted = {
            name
            for bucket in gradients.layout.buckets
            for span in bucket.spans
            for name in bucket.names
            if span.counts and span.start <= gradients.layout.bounds[name][0] < span.stop
        }
        self._names = {parameter: name for name, parameter in parameters.items()}
        groups: list[dict[str, Any]] = []
        self._group_counts: list[bool] = []
        # All or none of a group's parameters count for the norm, and a copy is a group of its own:
        # both ranks that hold it have the same part of it.
        copied = None if tied is None else tied.name
        for key in product((True, False), (False, True)):
            counts, _ = key
            owned = [
                p
                for name, p in parameters.items()
                if p.numel() and (name in counted, name == copied) == key
            ]
            for group in build_adamw(owned, optim).param_groups:
                if group["params"]:
                    groups.append(
                        {"params": group["params"], "weight_decay": group["weight_decay"]}
                    )
                    self._group_counts.append(counts)
        self._group_of = {
            self._names[p]: (p, index)
            for index, group in enumerate(groups)
            for p in group["params"]
        }
        self._started: set[str] = set()
        self._poison = Poison()
        self._updates = 0
        self._zero = (
            _deepspeed(groups, self._names, gradients.dtype, optim, replicas.group)
            if groups
            else None
        )

    @property
    def updates(self) -> int:
        return self._updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates = count
        for _, _, values in self._partitions():
            values["step"].fill_(count)

    def ready(self, names: Sequence[str]) -> None:
        if self._zero is None:
            return
        if not self._started:
            self._begin()
        for name in names:
            if name not in self._started and name in self._group_of:
                parameter, group = self._group_of[name]
                # DeepSpeed may replace the memory of the tensor that it gets, so it gets a view.
                gradient = self._gradients[name].detach()
                if self._replicas.size > 1:
                    self._poison.add(gradient)
                if self._zero.use_grad_accum_attribute:
                    parameter.grad_accum = gradient
                else:
                    parameter.grad = gradient
                self._zero.reduce_ready_partitions_and_remove_grads(parameter, group)
                self._started.add(name)

    def _begin(self) -> None:
        """Clear DeepSpeed's state of the previous step.

        `DeepSpeedZeroOptimizer.step` clears it, but it is not called for a skipped step.
        """
        zero: Any = self._zero
        for group in range(len(zero.bit16_groups)):
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        zero.micro_step_id = -1
        zero.reset_cpu_buffers()
        zero.setup_buckets()

    def reduce(self) -> None:
        self.ready(list(self._group_of))
        if self._zero is not None:
            self._zero.overlapping_partition_gradients_reduce_epilogue()
            # On a GPU the copies to the host are under way, and DeepSpeed waits in `step` only.
            self._zero._wait_for_offload_copies()
        self._started.clear()
        if self._tied is not None:
            own = self._shard(self._group_of[self._tied.name][1])
            terms = own.to(self._gradients.flat.device)
            self._tied.sum(terms)
            own.copy_(terms)

    def poison(self) -> Tensor | None:
        return self._poison.take()

    def squared_norm(self) -> Tensor:
        return squared_norm(
            [self._shard(index) for index, counts in enumerate(self._group_counts) if counts]
        )

    @torch.no_grad()
    def step(self, rate: float, scale: float) -> None:
        self._updates += 1
        if self._zero is None:
            return
        for index, group in enumerate(self._zero.optimizer.param_groups):
            group["lr"] = rate
            self._shard(index).mul_(scale)
        self._zero.step()

    def need(self, names: Sequence[str]) -> None:
        """Do nothing, because DeepSpeed's step waits for its gathers."""

    def settle(self) -> None:
        pass

    def _shard(self, group: int) -> Tensor:
        """Return the gradients of this replica's part of `group`, in host memory."""
        assert self._zero is not None
        gradient: Tensor = self._zero.single_partition_of_fp32_groups[group].grad
        return gradient

    # The state of all replicas, joined from their parts and split again

    @torch.no_grad()
    def state(self) -> State:
        """Return all state in host memory on the first replica, and empty tables on the others.

        The first replica receives the parts one by one.
        """
        whole: State = {kind: {} for kind in ("parameter", *MOMENTS)}
        for group, partition, values in self._partitions():
            for kind, part in _by_kind(partition, values).items():
                flat, start = joined(part, self._replicas), 0
                if flat is None:
                    continue
                for parameter in group:
                    whole[kind][self._names[parameter]] = flat[
                        start : start + parameter.numel()
                    ].view(parameter.shape)
                    start += parameter.numel()
        for parameter, name in self._names.items():
            if not parameter.numel():
                for kind in whole:
                    whole[kind][name] = torch.empty(parameter.shape, dtype=self._gradients.dtype)
        return whole

    @torch.no_grad()
    def restore(self, read: Callable[[str, str], Tensor]) -> None:
        for group, partition, values in self._partitions():
            first, start = self._replicas.rank * partition.numel(), 0
            for parameter in group:
                name, stop = self._names[parameter], start + parameter.numel()
                low, high = max(start, first), min(stop, first + partition.numel())
                parameter.copy_(read("parameter", name))
                for kind, part in _by_kind(partition, values).items() if low < high else ():
                    part[low - first : high - first] = read(kind, name).flatten()[
                        low - start : high - start
                    ]
                start = stop

    def _partitions(self) -> Iterator[tuple[list[nn.Parameter], Tensor, dict[str, Tensor]]]:
        """Yield of each group its parameters, this replica's part of them, and the part's state."""
        if self._zero is not None:
            for group, partition in zip(
                self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True
            ):
                yield group, partition, self._zero.optimizer.state[partition]


def _by_kind(partition: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"parameter": partition.detach()} | {moment: values[moment] for moment in MOMENTS}


def _deepspeed(
    groups: list[dict[str, Any]],
    names: Mapping[nn.Parameter, str],
    precise: torch.dtype,
    optim: OptimConfig,
    data: dist.ProcessGroup,
) -> Any:
    """Return DeepSpeed's optimizer.

    It replaces the storage of the parameters by one flat tensor per group.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found none
    quiet_deprecations()
    import deepspeed
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        OffloadDeviceEnum,
    )
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    class Zero(DeepSpeedZeroOptimizer):  # type: ignore[misc]
        def _configure_master_weights(self, **_: object) -> torch.dtype:
            return precise

        def create_gradient_handling_hooks(self) -> None:
            """Create no hooks, because the executor owns the backward."""

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Otherwise its first use on a CPU compiles C++ for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), dist_init_required=False, verbose=False
    )
    offload = DeepSpeedZeroOffloadOptimizerConfig(
        device=OffloadDeviceEnum.cpu, pin_memory=torch.cuda.is_available()
    )
    adamw = torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.epsilon, fused=True
    )
    zero = Zero(
        adamw,
        param_names=dict(names),
        timers=NoopTimer(),
        optimizer_params={},
        verbose=False,
        contiguous_gradients=False,
        reduce_bucket_size=bucket_elements(optim, precise.itemsize),
        allgather_bucket_size=bucket_elements(optim, precise.itemsize),
        dp_process_group=data,
        offload_optimizer_config=offload,
        gradient_accumulation_dtype=precise,
        communication_data_type=precise,
        gradient_average=False,
        partition_grads=False,
        overlap_comm=False,
        check_grad_overflow=False,
        compute_grad_norm=True,
    )
    for partition in zero.single_partition_of_fp32_groups:
        adamw.state[partition] = {
            "step": torch.zeros((), dtype=torch.float32, device=partition.device),
            **{moment: torch.zeros_like(partition) for moment in MOMENTS},
        }
    return zero
