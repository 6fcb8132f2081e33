"""What fully sharded data parallelism would take for the same batch on the same cluster.

ZeRO-3 (arXiv 1910.02054) as FSDP runs it: every replica keeps a part of all parameters, gradients
and optimizer state.  Each forward gathers the parameters of the next layer while a layer computes,
each backward gathers them again and reduce-scatters the gradients of the layer before.  Layers may
be split over tensor-parallel ranks of a node too.  There is no pipeline, so there is no bubble, and
everything travels once per microbatch.  Optimizer state stays on the GPUs.  Compute, links and
bytes are those of this planner; the output layer is ours, in one piece.  Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from schedules.ir import Kind
from vp_train.config import ClusterConfig, CostConfig, OptimConfig
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
from vp_train.planning.memory import StateBytes, backward_bytes
from vp_train.planning.physics import Device, output_seconds
from vp_train.planning.workload import Workload
from vp_train.units import human_bytes
from vp_train.vocab.chunks import CHUNKS

_GIB = 2**30
_GATHERED = 2  # layers whose parameters, and whose gradients, are whole at a time
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class FsdpReport:
    """The predicted time and bytes of a step with FSDP.

    `seconds` of a step are `compute`, `tensor` (exposed tensor-parallel communication), `exposed`
    (gathers and reduce-scatters that no layer hides) and `optimizer`.  `exchange` are all gathers
    and reduce-scatters, hidden or not.  `num_bytes` are those of a rank at its peak.
    """

    degrees: Degrees
    micro_batch_size: int
    num_microbatches: int
    recompute: str
    compute: float
    tensor: float
    exposed: float
    exchange: float
    optimizer: float
    mfu: float
    num_bytes: float
    limit: float

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor + self.exposed + self.optimizer

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.limit


def best_fsdp(
    work: Workload,
    cluster: ClusterConfig,
    cost: CostConfig,
    optim: OptimConfig,
    *,
    num_sequences: int,
) -> FsdpReport | None:
    """Return the fastest step of `num_sequences` sequences that fits into memory.

    Every micro-batch size, every recomputation and every tensor-parallel degree within a node is
    tried.  If nothing fits, it is the step with the fewest bytes.  None if the batch does not
    divide over the GPUs with any degree.

    work: the model, and its dtype.  Its degrees and microbatches do not count.
    cost: measured rates count, and measured seconds do not, since they are of another split.
    """
    cost = replace(cost, measured_layer_flops=None, layer_forward_seconds=None)
    found = [
        fsdp_step(replaced, cluster, cost, optim, recompute=recompute)
        for tp in _tensor_degrees(work, cluster)
        for replaced in _microbatches(work, cluster, tp, num_sequences)
        for recompute in RECOMPUTE
    ]
    fitting = [report for report in found if report.fits]
    if fitting:
        return min(fitting, key=lambda report: report.seconds)
    return min(found, key=lambda report: report.num_bytes, default=None)


def fsdp_words(found: FsdpReport | None, seconds: float) -> str:
    """Return in words what FSDP takes where the plan takes `seconds`."""
    if found is None:
        return "the batch does not divide over the GPUs"
    size = human_bytes(found.num_bytes)
    if not found.fits:
        return f"does not fit: at least {size}, more than {found.limit / _GIB:g} GiB"
    change = found.seconds / seconds - 1
    return (
        f"{found.seconds:.3g} s, {abs(change):.1%} {'slower' if change > 0 else 'FASTER'}, {size}: "
        f"dp={found.degrees.dp} x tp={found.degrees.tp}, micro-batch {found.micro_batch_size}, "
        f"recomputation {found.recompute}, exposed communication "
        f"{(found.exposed + found.tensor) / found.seconds:.1%}"
    )


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


def fsdp_step(
    work: Workload, cluster: ClusterConfig, cost: CostConfig, optim: OptimConfig, *, recompute: str
) -> FsdpReport:
    """Return the report of one step whose degrees and microbatches are those of `work`."""
    cost = on_cluster(work, cluster, cost)
    link, dp, tp = links_of(cluster, work.degrees).data, work.degrees.dp, work.degrees.tp
    model, layers = work.share, work.model.num_layers
    layer = computed_layer(work, cost)
    again = recomputed_seconds(work, cost, recompute)
    tensor = tensor_seconds(work, cost, layer.weight_grad)
    tensor[Kind.B] += exchanged_again(work, cost, recompute)
    forward, backward = layer.forward + tensor[Kind.F], sum(layer[1:3]) + tensor[Kind.B] + again
    factor = launch_factor(work, cost, forward + backward)
    forward, backward = factor * forward, factor * backward
    rows = -(-work.model.vocab_size // tp)
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
    beyond = max(0.0, gather - forward) + max(0.0, gather + scatter - backward)
    computed = layers * (forward + backward) + output
    slack = computed - layers * (2 * gather + scatter)
    matrices = 1 if model.tied_embeddings else 2
    ends = matrices * (gather_rows + scatter_rows)
    exchanged = layers * (2 * gather + scatter) + ends
    slower = (cost.contention or 0.0) * min(computed, exchanged)  # of what runs beside it
    count = work.num_microbatches
    compute = count * (computed - layers * _sum_of(tensor) + slower)
    # Nothing runs beside the first gathers and the last scatters of a step.  Of a layer that would
    # be more than its pass, `beyond` has the rest already.
    first_and_last = gather_rows + scatter_rows
    others = max(0.0, count * ends - first_and_last - count * max(0.0, slack))
    exposed = count * layers * beyond + first_and_last + others
    exposed += min(gather, forward) + min(scatter, backward)
    parameters = layers * of_layer + matrices * matrix
    state = StateBytes.of(work, replace(optim, offload=False))
    held = parameters / dp * (state.weights + state.gradients + state.optimizer)
    moved = parameters / dp * (state.weights + state.gradients + 2 * state.optimizer)
    optimizer = moved / cluster.memory_bytes_per_second
    seconds = compute + count * layers * _sum_of(tensor) + exposed + optimizer
    peak = peak_flops(cluster, work.dtype)
    return FsdpReport(
        degrees=work.degrees,
        micro_batch_size=work.micro_batch_size,
        num_microbatches=count,
        recompute=recompute,
        compute=compute,
        tensor=count * layers * _sum_of(tensor),
        exposed=exposed,
        exchange=count * exchanged,
        optimizer=optimizer,
        mfu=work.step_flops / (seconds * peak * tp),
        num_bytes=held + _peak_bytes(work, recompute, of_layer, matrix),
        limit=cluster.memory_gib * _GIB,
    )


def _sum_of(tensor: dict[Kind, float]) -> float:
    """Return the exposed communication of a forward and a backward of one layer."""
    return tensor[Kind.F] + tensor[Kind.B]


def _exchange(link: Link, work: Workload, parameters: int, dp: int) -> tuple[float, float]:
    """Return the seconds of gathering parameters and of reduce-scattering their gradients."""
    return (
        link.gather(work.item_bytes * parameters, dp),
        link.gather(work.precise_bytes * parameters, dp),
    )


def _peak_bytes(work: Workload, recompute: str, of_layer: int, matrix: int) -> float:
    """Return the bytes of a rank beside its part of the state, at the peak of a microbatch.

    The output layer is where all activations are kept.  It holds exponentials for all rows, its
    matrix and the gradient, and one chunk of logits.
    """
    model, tokens = work.share, work.num_tokens
    whole = work.item_bytes + (work.precise_bytes if work.degrees.dp > 1 else 0)
    gathered = whole * max(_GATHERED * of_layer, matrix + of_layer)
    kept = model.num_layers * work.layer_bytes(recompute)
    rows = matrix // model.hidden_size
    logits = CHUNKS[work.device].logits_bytes(tokens, rows, work.precise_bytes)
    output = work.item_bytes * tokens * rows + logits
    output += 2 * work.precise_bytes * tokens * model.hidden_size
    return gathered + kept + max(output, backward_bytes(work, Kind.B, recompute))
