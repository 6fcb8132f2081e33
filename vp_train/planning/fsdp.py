"""What fully sharded data parallelism would take for the same batch on the same cluster.

ZeRO-3 (arXiv 1910.02054) as FSDP runs it: every replica keeps a part of all parameters, gradients
and optimizer state.  Each forward gathers the parameters of the next layer while a layer computes,
each backward gathers them again and reduce-scatters the gradients of the layer before.  Layers may
be split over tensor-parallel ranks of a node too.  There is no pipeline, so there is no bubble, and
everything travels once per microbatch.  Compute, links and bytes are those of this planner; the
output layer is ours, in one piece.  Pure arithmetic.

FSDP has the means against a lack of memory that pipelines have: its first layers recompute, as many
as must; the activations of its first layers wait in host memory, as far as no pass is late; the
optimizer runs on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from schedules.ir import Kind
from vp_train.config import ClusterConfig, CostConfig, OptimConfig
from vp_train.config.parallel import RECOMPUTE
from vp_train.model import shape
from vp_train.planning.cluster import Link, links_of, on_cluster, peak_flops
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import (
    computed_layer,
    exchanged_again,
    launch_factor,
    recomputed_seconds,
    tensor_seconds,
)
from vp_train.planning.memory import backward_bytes, host_optimizer_bytes, state_of
from vp_train.planning.physics import Device, output_seconds
from vp_train.planning.report import optimizer_seconds
from vp_train.planning.workload import Workload
from vp_train.tensors.alignment import HOST_BLOCK_BYTES, rounded_up
from vp_train.units import count_words
from vp_train.vocab.chunks import CHUNKS

_GIB = 2**30
_GATHERED = 2  # layers whose parameters, and whose gradients, are whole at a time
_ON_DEVICE = 2  # the last layers, for which a copy to the host and back has no time


@dataclass(frozen=True, slots=True)
class Means:
    """What may be in host memory: activations, and the optimizer."""

    activations: bool
    optimizer: bool

    @property
    def words(self) -> str:
        """Return in words what may be in host memory."""
        names = ["activations"] * self.activations + ["the optimizer"] * self.optimizer
        return f"{' and '.join(names) or 'nothing'} may be in host memory"


ON_HOSTS, ON_GPUS = Means(activations=True, optimizer=True), Means(False, False)


@dataclass(frozen=True, slots=True)
class FsdpReport:
    """The predicted time and bytes of a step with FSDP.

    `seconds` of a step are `compute`, `tensor` (exposed tensor-parallel communication), `exposed`
    (gathers and reduce-scatters that no layer hides) and `optimizer`.  `exchange` are all gathers
    and reduce-scatters, hidden or not.  `num_bytes` are those of a rank at its peak, and
    `host_bytes` those that it keeps in host memory.

    Of `num_layers` the first `num_recomputed` recompute, and the activations of the first
    `num_offloaded` wait in host memory.  `offloads_optimizer`: whether the optimizer runs there.
    """

    degrees: Degrees
    micro_batch_size: int
    num_microbatches: int
    recompute: str
    num_layers: int
    num_recomputed: int
    num_offloaded: int
    offloads_optimizer: bool
    compute: float
    tensor: float
    exposed: float
    exchange: float
    optimizer: float
    mfu: float
    num_bytes: float
    host_bytes: float
    limit: float

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor + self.exposed + self.optimizer

    @property
    def memory_words(self) -> str:
        """Return in words what is done for memory."""
        some = 0 < self.num_recomputed < self.num_layers
        words = [f"recomputation {self.recompute}"]
        words[0] += f" in {self.num_recomputed} of {self.num_layers} layers" if some else ""
        if self.num_offloaded:
            number = self.num_offloaded
            words.append(f"activations of {count_words(number, 'layer')} offloaded")
        if self.offloads_optimizer:
            words.append("optimizer offloaded")
        return ", ".join(words)

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.limit

    def record(self) -> dict[str, Any]:
        """Return the step for JSON, in bytes, seconds and fractions."""
        return asdict(self) | {"seconds": self.seconds, "fits": self.fits}


def best_fsdp(
    work: Workload,
    cluster: ClusterConfig,
    cost: CostConfig,
    optim: OptimConfig,
    *,
    num_sequences: int,
    means: Means = ON_HOSTS,
) -> FsdpReport | None:
    """Return the fastest step of `num_sequences` sequences that fits into memory.

    Every micro-batch size, every recomputation, every tensor-parallel degree within a node and both
    places of the optimizer are tried.  As few layers recompute, and then as few offload, as memory
    allows.  If nothing fits, it is the step with the fewest bytes.  None if the batch does not
    divide over the GPUs with any degree.

    work: the model, and its dtype.  Its degrees and microbatches do not count.
    cost: measured rates count, and measured seconds do not, since they are of another split.
    means: what may be in host memory.
    """
    found = [
        step
        for tp in _tensor_degrees(work, cluster)
        for replaced in _microbatches(work, cluster, tp, num_sequences)
        for step in _steps_of(replaced, cluster, cost, optim, means)
    ]
    return _best(found)


def best_step(
    work: Workload,
    cluster: ClusterConfig,
    cost: CostConfig,
    optim: OptimConfig,
    means: Means,
) -> FsdpReport | None:
    """Return the best step of `best_fsdp` whose degrees and microbatches are those of `work`.

    None if host memory cannot keep the optimizer.
    """
    return _best(_steps_of(work, cluster, cost, optim, means))


def _best(found: Sequence[FsdpReport]) -> FsdpReport | None:
    """Return the fastest step that fits; if none does, the one with the fewest bytes."""
    fitting = [report for report in found if report.fits]
    if fitting:
        return min(fitting, key=lambda report: report.seconds)
    return min(found, key=lambda report: report.num_bytes, default=None)


def _steps_of(
    work: Workload,
    cluster: ClusterConfig,
    cost: CostConfig,
    optim: OptimConfig,
    means: Means,
) -> list[FsdpReport]:
    """Return the leanest steps of every recomputation and every place of the optimizer."""
    cost = replace(cost, measured_layer_flops=None, layer_forward_seconds=None)
    costs = on_cluster(work, cluster, cost)
    moves = means.activations
    return [
        step
        for recompute in RECOMPUTE
        for offload in (False, True)[: 1 + means.optimizer]
        for place in [replace(optim, name="zero1", offload=offload)]
        if (step := _leanest(work, cluster, costs, place, recompute, moves=moves)) is not None
    ]


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that no split of FSDP divides, and the nearest one that a split divides.

    num_sequences, nearest: their sequences.
    degrees: the split of the nearest.
    """

    num_sequences: int
    nearest: int
    degrees: Degrees


def undivided_batch(work: Workload, cluster: ClusterConfig, num_sequences: int) -> Batch | None:
    """Return the batch if it divides over the GPUs with no tensor-parallel degree, else None."""
    found = list[Batch]()
    for tp in _tensor_degrees(work, cluster):
        dp = cluster.num_gpus // tp
        share, rest = divmod(num_sequences, dp)
        if share and not rest:
            return None
        shares = (max(1, share), share + 1)
        found += [Batch(num_sequences, dp * count, Degrees(dp, 1, tp)) for count in shares]
    return min(found, key=lambda batch: abs(batch.nearest - num_sequences))


def _tensor_degrees(work: Workload, cluster: ClusterConfig) -> list[int]:
    model, found = work.model, []
    for tp in (1, 2, 4, 8):
        # The heads are a multiple of the groups.
        widths = (model.num_query_groups, model.ffn_hidden_size, model.seq_length)
        whole = not any(width % tp for width in widths) and cluster.gpus_per_node % tp == 0
        if whole and (tp == 1 or (work.on_cuda and not model.qk_norm_whole)):
            found.append(tp)
    return found


def _microbatches(
    work: Workload, cluster: ClusterConfig, tp: int, num_sequences: int
) -> list[Workload]:
    """Return the work of each micro-batch size, with sequence parallelism where tp > 1."""
    dp = cluster.num_gpus // tp
    share, rest = divmod(num_sequences, dp)
    if rest or not share:
        return []
    return [
        replace(
            work,
            degrees=Degrees(dp, 1, tp),
            sequence_parallel=tp > 1,
            micro_batch_size=size,
            num_microbatches=share // size,
        )
        for size in range(1, share + 1)
        if share % size == 0 and (size & (size - 1) == 0 or size == share)
    ]


def _leanest(
    work: Workload,
    cluster: ClusterConfig,
    cost: CostConfig,
    optim: OptimConfig,
    recompute: str,
    *,
    moves: bool,
) -> FsdpReport | None:
    """Return the step in which as few layers recompute, then as few offload, as memory allows.

    If none fits, all recompute, and as many offload as can, none unless activations may go
    (`moves`).  None if host memory cannot keep the optimizer.  `cost` is that on the cluster.
    """
    memory, num_layers = _Memory.of(work, optim, recompute), work.model.num_layers
    limit = cluster.memory_gib * _GIB
    room = cluster.host_limit / cluster.gpus_per_node - memory.host_optimizer
    if room < 0:
        return None
    room = room if moves else 0.0
    link = links_of(cluster, work.degrees).data
    gather, _ = _exchange(link, work, shape.layer_parameters(work.share), work.degrees.dp)
    forward = min(_Layer.of(work, cost, kind).forward for kind in ("none", recompute))
    rate = cost.host_bytes_per_second
    assert rate is not None, "a cluster has a link to its hosts"

    def most_offloaded(number: int) -> int:
        return memory.most_offloaded(number, max(forward, gather), rate, room)

    numbers = range(num_layers + 1) if recompute != "none" else range(1)
    number = next(
        (number for number in numbers if memory.peak(number, most_offloaded(number)) <= limit),
        numbers[-1],
    )
    most = most_offloaded(number)
    few = next((few for few in range(most) if memory.peak(number, few) <= limit), most)
    return _step(work, cluster, cost, optim, recompute, number, few)


def fsdp_step(
    work: Workload,
    cluster: ClusterConfig,
    cost: CostConfig,
    optim: OptimConfig,
    *,
    recompute: str,
    num_recomputed: int | None = None,
    num_offloaded: int = 0,
) -> FsdpReport:
    """Return the report of one step whose degrees and microbatches are those of `work`.

    optim: with `offload` the optimizer runs on the host.
    num_recomputed: how many layers recompute, the first ones; None: all.
    num_offloaded: how many layers keep their activations on the host, the first ones.  No pass
    waits for that; `best_fsdp` chooses no more than the link can carry.
    """
    if num_recomputed is None:
        num_recomputed = work.model.num_layers
    cost, optim = on_cluster(work, cluster, cost), replace(optim, name="zero1")
    return _step(work, cluster, cost, optim, recompute, num_recomputed, num_offloaded)


def _step(
    work: Workload,
    cluster: ClusterConfig,
    cost: CostConfig,
    optim: OptimConfig,
    recompute: str,
    num_recomputed: int,
    num_offloaded: int,
) -> FsdpReport:
    """Return the report of one step with the costs on the cluster."""
    link, dp, tp = links_of(cluster, work.degrees).data, work.degrees.dp, work.degrees.tp
    model, num_layers = work.share, work.model.num_layers
    if recompute == "none":
        num_recomputed = 0
    # The layers of each kind, the first ones first.
    layers = [
        (count, _Layer.of(work, cost, kind))
        for count, kind in ((num_recomputed, recompute), (num_layers - num_recomputed, "none"))
        if count
    ]
    rows = _rows(work)
    output = output_seconds(
        Device.of(cost),
        work.num_tokens,
        model.hidden_size,
        rows,
        work.precise_bytes,
        logit_bytes=cost.logit_bytes,
    )
    of_layer, matrix = shape.layer_parameters(model), rows * model.hidden_size
    gather, scatter = _exchange(link, work, of_layer, dp)
    gather_rows, scatter_rows = _exchange(link, work, matrix, dp)
    # Layers gather the next one and scatter the one before.  What is left of them hides the ends.
    beyond = sum(
        n * (max(0.0, gather - layer.forward) + max(0.0, gather + scatter - layer.backward))
        for n, layer in layers
    )
    computed = sum(n * (layer.forward + layer.backward) for n, layer in layers) + output
    tensor = sum(n * layer.tensor for n, layer in layers)
    slack = computed - num_layers * (2 * gather + scatter)
    matrices = 1 if model.tied_embeddings else 2
    ends = matrices * (gather_rows + scatter_rows)
    exchanged = num_layers * (2 * gather + scatter) + ends
    slower = (cost.contention or 0.0) * min(computed, exchanged)  # of what runs beside it
    count = work.num_microbatches
    compute = count * (computed - tensor + slower)
    # Nothing runs beside the first gathers and the last scatters of a step.  Of a layer that would
    # be more than its pass, `beyond` has the rest already.
    first_and_last = gather_rows + scatter_rows
    others = max(0.0, count * ends - first_and_last - count * max(0.0, slack))
    exposed = count * beyond + first_and_last + others
    first = layers[0][1]
    exposed += min(gather, first.forward) + min(scatter, first.backward)
    state = state_of(work, optim, _parameters(work))
    optimizer = optimizer_seconds(work.degrees, cluster, optim, state)
    seconds = compute + count * tensor + exposed + optimizer
    peak = peak_flops(cluster, work.dtype)
    memory = _Memory.of(work, optim, recompute)
    return FsdpReport(
        degrees=work.degrees,
        micro_batch_size=work.micro_batch_size,
        num_microbatches=count,
        recompute=recompute if num_recomputed else "none",
        num_layers=num_layers,
        num_recomputed=num_recomputed,
        num_offloaded=num_offloaded,
        offloads_optimizer=optim.offload,
        compute=compute,
        tensor=count * tensor,
        exposed=exposed,
        exchange=count * exchanged,
        optimizer=optimizer,
        mfu=work.step_flops / (seconds * peak * tp),
        num_bytes=memory.peak(num_recomputed, num_offloaded),
        host_bytes=memory.host(num_recomputed, num_offloaded),
        limit=cluster.memory_gib * _GIB,
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer: the seconds of its passes, `tensor` of them exposed communication of its ranks."""

    forward: float
    backward: float
    tensor: float

    @classmethod
    def of(cls, work: Workload, cost: CostConfig, recompute: str) -> _Layer:
        """Return the layer whose backward recomputes `recompute`."""
        layer = computed_layer(work, cost)
        tensor = tensor_seconds(work, cost, layer.weight_grad)
        tensor[Kind.B] += exchanged_again(work, cost, recompute)
        again = recomputed_seconds(work, cost, recompute)
        forward, backward = layer.forward + tensor[Kind.F], sum(layer[1:3]) + tensor[Kind.B] + again
        factor = launch_factor(work, cost, forward + backward)
        return cls(factor * forward, factor * backward, tensor[Kind.F] + tensor[Kind.B])


@dataclass(frozen=True, slots=True)
class _Memory:
    """The bytes of a rank.

    always: its part of the state, and layers and a matrix that are whole for a while.
    small, large: what a layer that recomputes keeps for the backward, and one that does not.
    head: what the output layer takes for one microbatch.
    backward, again: the temporary bytes of a backward, without and with recomputation.
    host_optimizer: those of the optimizer in host memory.
    """

    num_layers: int
    always: float
    small: int
    large: int
    head: float
    backward: float
    again: float
    host_optimizer: float

    @classmethod
    def of(cls, work: Workload, optim: OptimConfig, recompute: str) -> _Memory:
        """Return the bytes with the state of ZeRO-1 in `optim` and all else sharded too."""
        model, tokens, dp = work.share, work.num_tokens, work.degrees.dp
        of_layer, rows = shape.layer_parameters(model), _rows(work)
        matrix = rows * model.hidden_size
        state = state_of(work, optim, _parameters(work))
        whole = work.item_bytes + (work.precise_bytes if dp > 1 else 0)
        gathered = whole * max(_GATHERED * of_layer, matrix + of_layer)
        # The output layer, where all activations are kept, holds exponentials for all rows, its
        # matrix and the gradient, and one chunk of logits.
        head = work.item_bytes * tokens * rows
        head += CHUNKS[work.device].logits_bytes(tokens, rows, work.precise_bytes)
        head += 2 * work.precise_bytes * tokens * model.hidden_size
        on_host = host_optimizer_bytes(work, _parameters(work)) / dp if optim.offload else 0.0
        return cls(
            num_layers=model.num_layers,
            always=(state.weights + state.gradients) / dp + state.optimizer + gathered,
            small=work.layer_bytes(recompute),
            large=work.layer_bytes("none"),
            head=head,
            backward=backward_bytes(work, Kind.B, "none"),
            again=backward_bytes(work, Kind.B, recompute),
            host_optimizer=on_host,
        )

    def peak(self, num_recomputed: int, num_offloaded: int) -> float:
        """Return the bytes at the peak of a step.

        What is offloaded comes back into the room that later layers have left.
        """
        small = max(0, num_recomputed - num_offloaded)
        large = self.num_layers - max(num_recomputed, num_offloaded)
        kept = small * self.small + large * self.large
        last = self.again if num_recomputed == self.num_layers else self.backward
        peak = kept + max(self.head, last)
        if num_recomputed:
            peak = max(peak, min(kept, num_recomputed * self.small) + self.again)
        return self.always + peak

    def host(self, num_recomputed: int, num_offloaded: int) -> float:
        """Return the bytes in host memory."""
        small = min(num_recomputed, num_offloaded)
        blocks = small * _in_blocks(self.small) + (num_offloaded - small) * _in_blocks(self.large)
        return blocks + self.host_optimizer

    def most_offloaded(
        self, num_recomputed: int, seconds: float, bytes_per_second: float, room: float
    ) -> int:
        """Return how many of the first layers may offload so that no pass is late.

        Activations leave beside the forwards of later layers, and come back beside their backwards,
        which take no less than the `seconds` of a forward.  `room`: the bytes of host memory.
        """
        beside = self.num_layers - _ON_DEVICE
        small, large = self.small / bytes_per_second, self.large / bytes_per_second
        first = min(num_recomputed, beside)
        fit = (beside * seconds / small, room / _in_blocks(self.small))
        found = max(0, math.floor(min(first, *fit)))
        if found < num_recomputed:
            return found
        time = min((beside - found) * seconds, beside * seconds - found * small)
        left = room - found * _in_blocks(self.small)
        more = min(beside - found, time / large, left / _in_blocks(self.large))
        return found + max(0, math.floor(more))


def _in_blocks(num_bytes: int) -> int:
    return rounded_up(num_bytes, HOST_BLOCK_BYTES)


def _rows(work: Workload) -> int:
    """Return the vocabulary rows of a tensor-parallel rank, those of the largest part."""
    return -(-work.model.vocab_size // work.degrees.tp)


def _parameters(work: Workload) -> int:
    """Return the parameters of a tensor-parallel rank of all replicas together."""
    matrices = 1 if work.model.tied_embeddings else 2
    of_layers = work.model.num_layers * shape.layer_parameters(work.share)
    return of_layers + matrices * _rows(work) * work.share.hidden_size


def _exchange(link: Link, work: Workload, parameters: int, dp: int) -> tuple[float, float]:
    """Return the seconds of gathering parameters and of reduce-scattering their gradients."""
    return (
        link.gather(work.item_bytes * parameters, dp),
        link.gather(work.precise_bytes * parameters, dp),
    )
