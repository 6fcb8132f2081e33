"""ZeRO-1: every replica keeps and updates a part of the optimizer's state (arXiv 1910.02054).

Parameters and gradients are flat tensors with the same buckets.  A reduce-scatter sums the
gradients of a bucket, AdamW updates this replica's part, and an all-gather collects the new
parameters in the compute dtype.  In bfloat16 4 + 2 bytes per parameter travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vp_train.config import OptimConfig
from vp_train.optim.adamw import MOMENTS, FusedAdamW, fresh_state
from vp_train.optim.buckets import Bucket, Countdown
from vp_train.optim.gradients import Gradients, Poison
from vp_train.optim.optimizer import State, squared_norm
from vp_train.optim.replicas import Replicas, TiedWeight
from vp_train.tensors.pending import Pending


@dataclass(frozen=True, slots=True)
class _Shard:
    """This replica's part of a bucket: elements [start, stop) of the flat tensors.

    kept: "parameter", "exp_avg" and "exp_avg_sq", [stop - start] in the dtype of the gradients.
    counted: the gradients that count for the norm.
    """

    bucket: Bucket
    start: int
    stop: int
    kept: dict[str, Tensor]
    counted: tuple[Tensor, ...]
    adamw: FusedAdamW


class ZeroAdamW:
    """AdamW whose moments and fp32 copies of lower-precision parameters are split over replicas.

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
        self._parameters, self._gradients, self._replicas = dict(parameters), gradients, replicas
        self._tied = tied
        self._flat = _flatten(self._parameters, gradients)
        self._shards = {  # by the index of the bucket
            index: self._shard(bucket, optim)
            for index, bucket in enumerate(gradients.layout.buckets)
            if bucket.start < bucket.stop
        }
        self._shard_of = {
            name: index for index, shard in self._shards.items() for name in shard.bucket.names
        }
        self._countdown = Countdown(gradients.layout, self._sum, early=optim.overlap_sums)
        self._gathers_late = optim.overlap_gathers
        self._sums: list[Pending] = []
        self._poison = Poison()
        self._gathers: dict[int, Pending] = {}  # by the index of the bucket
        self._updates = 0

    def _shard(self, bucket: Bucket, optim: OptimConfig) -> _Shard:
        start, stop = bucket.part(self._replicas.rank, self._replicas.size)
        # If the parameters already have the gradients' dtype, this is a view and not a copy.
        kept = {"parameter": self._flat[start:stop].to(self._gradients.dtype)}
        kept |= {moment: torch.zeros_like(kept["parameter"]) for moment in MOMENTS}
        decaying: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        counted = []
        state: dict[Tensor, dict[str, Tensor]] = {}
        for span in filter(None, (span.within(start, stop) for span in bucket.spans)):
            here = slice(span.start - start, span.stop - start)
            piece = nn.Parameter(kept["parameter"][here])
            piece.grad = self._gradients.flat[span.start : span.stop]
            state[piece] = fresh_state({moment: kept[moment][here] for moment in MOMENTS})
            (decaying if span.decays else others).append(piece)
            if span.counts:
                counted.append(piece.grad)
        adamw = FusedAdamW(decaying, others, state, optim)
        return _Shard(bucket, start, stop, kept=kept, counted=tuple(counted), adamw=adamw)

    @property
    def updates(self) -> int:
        return self._updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates = count
        for shard in self._shards.values():
            for values in shard.adamw.state.values():
                values["step"].fill_(count)

    def ready(self, names: Sequence[str]) -> None:
        self._countdown.ready(names)

    def _sum(self, bucket: Bucket) -> None:
        if self._replicas.size > 1 and bucket.start < bucket.stop:
            self._poison.add(self._gradients.of(bucket))
            self._sums.append(self._replicas.scatter_sum(self._gradients.of(bucket)))

    def reduce(self) -> None:
        """Start the sums that have not started, and wait for all.  Collective.

        Afterwards a replica has the sums of its parts only, so `grad` of all parameters is None.
        """
        self._countdown.finish()
        for pending in self._sums:
            pending.wait()
        self._sums.clear()
        if self._tied is not None:  # both ranks own the same part of it, alone in its bucket
            shard = self._shards[self._shard_of[self._tied.name]]
            self._tied.sum(self._gradients.flat[shard.start : shard.stop])
        for parameter in self._parameters.values():
            parameter.grad = None

    def poison(self) -> Tensor | None:
        return self._poison.take()

    def squared_norm(self) -> Tensor:
        return squared_norm(
            [part for shard in self._shards.values() for part in shard.counted], self._flat.device
        )

    @torch.no_grad()
    def step(self, rate: float, scale: float) -> None:
        """Update and gather the buckets in the order in which the next step reads them."""
        self.settle()
        self._updates += 1
        for index in self._gradients.layout.reading_order:
            shard = self._shards.get(index)
            if shard is None:
                continue
            if scale != 1:
                self._gradients.flat[shard.start : shard.stop].mul_(scale)
            shard.adamw.step(rate)
            self._round(shard)
            if self._replicas.size > 1:
                whole = self._flat[shard.bucket.start : shard.bucket.stop]
                self._gathers[index] = self._replicas.gather(whole)
        if not self._gathers_late:
            self.settle()

    def _round(self, shard: _Shard) -> None:
        if self._flat.dtype is not self._gradients.dtype:
            self._flat[shard.start : shard.stop].copy_(shard.kept["parameter"])

    def need(self, names: Sequence[str]) -> None:
        if not self._gathers:
            return
        for name in names:
            pending = self._gathers.pop(self._shard_of.get(name, -1), None)
            if pending is not None:
                pending.wait()

    def settle(self) -> None:
        while self._gathers:
            self._gathers.pop(next(iter(self._gathers))).wait()

    # The state of all replicas, joined from their parts and split again

    @torch.no_grad()
    def state(self) -> State:
        """Return all state in host memory on the first replica, and empty tables on the others.

        The first replica receives the parts one by one.
        """
        self.settle()
        whole: State = {kind: {} for kind in ("parameter", *MOMENTS)}
        for shard in self._shards.values():
            for kind, part in shard.kept.items():
                flat = joined(part, self._replicas)
                if flat is not None:
                    for name, start, stop in self._bounds(shard):
                        values = flat[start - shard.bucket.start : stop - shard.bucket.start]
                        whole[kind][name] = values.view(self._parameters[name].shape)
        for name, parameter in self._parameters.items():
            if name not in self._shard_of and not self._replicas.rank:
                for kind in whole:
                    whole[kind][name] = torch.empty(parameter.shape, dtype=self._gradients.dtype)
        return whole

    def _bounds(self, shard: _Shard) -> Iterator[tuple[str, int, int]]:
        for name in shard.bucket.names:
            yield name, *self._gradients.layout.bounds[name]

    @torch.no_grad()
    def restore(self, read: Callable[[str, str], Tensor]) -> None:
        self.settle()
        for name, parameter in self._parameters.items():
            if name not in self._shard_of:
                parameter.copy_(read("parameter", name))
        for shard in self._shards.values():
            for name, start, stop in self._bounds(shard):
                for kind in shard.kept:
                    self._take(shard, kind, name, start, stop, read)

    def _take(
        self,
        shard: _Shard,
        kind: str,
        name: str,
        start: int,
        stop: int,
        read: Callable[[str, str], Tensor],
    ) -> None:
        """Load one tensor, whose elements are [start, stop) of the flat tensors."""
        low, high = max(start, shard.start), min(stop, shard.stop)
        if low >= high and kind != "parameter":
            return
        values = read(kind, name)
        if kind == "parameter":
            self._parameters[name].copy_(values)
        if low < high:
            shard.kept[kind][low - shard.start : high - shard.start] = values.flatten()[
                low - start : high - start
            ]


def _flatten(parameters: dict[str, nn.Parameter], gradients: Gradients) -> Tensor:
    """Move all parameters into one new tensor with the layout of the gradients, and return it."""
    first = next(iter(parameters.values()), torch.empty(0))
    flat = torch.zeros(gradients.layout.num_elements, dtype=first.dtype, device=first.device)
    for name, parameter in parameters.items():
        start, stop = gradients.layout.bounds[name]
        place = flat[start:stop].view(parameter.shape)
        place.copy_(parameter.detach())
        parameter.data = place
    return flat


def joined(part: Tensor, replicas: Replicas) -> Tensor | None:
    """Return the parts of all replicas, concatenated in host memory, on the first replica.

    Returns None on the others.  Collective.
    """
    host = part.detach().cpu().contiguous()
    if replicas.rank:
        dist.send(host, group=replicas.group, group_dst=0)
        return None
    size = host.numel()
    flat = torch.empty(size * replicas.size, dtype=host.dtype)
    flat[:size] = host
    for replica in range(1, replicas.size):
        dist.recv(
            flat[replica * size : (replica + 1) * size], group=replicas.group, group_src=replica
        )
    return flat
