"""The cost of every pass of a run.

Seconds are the measured ones if `cost` gives them, else `physics` has them.  Bytes follow from
shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from schedules.cost import CostModel
from schedules.ir import Kind
from schedules.problem import Problem
from schedules.vocab import Barrier, End, Payload, VocabAlgorithm
from vp_train.config import ConfigError, CostConfig
from vp_train.model import shape
from vp_train.planning.physics import Device, LayerSeconds, layer_seconds, output_seconds
from vp_train.planning.workload import Workload
from vp_train.vocab.shard import Shard

# Products of float8 with the rounding of their factors, against bfloat16.  On one H100 y and dx of
# four shapes were 1.39 to 1.52 times as fast with scales of rows (the second step 13 of
# benchmarks/results/gpu_check_nvidia_h100_80gb_hbm3.json).  1.4 follows from 7,186 against 5,760
# tokens/s of torchtitan's 8B model (its commit 7a04053, per-tensor scales) if the linear layers
# take 70 % of the time.  Data sheets name twice as many FLOP/s.
_FLOAT8_SPEED = 1.45

_OTHER_RUN = (
    "these pass times are not for it; use a cost that is, or one that counts FLOPs, e.g. cost=a100"
)


def estimate_cost(
    work: Workload,
    cost: CostConfig,
    problem: Problem,
    *,
    layers: Sequence[range],
    recompute: Sequence[str],
    shards: dict[End, tuple[Shard, ...]],
    offloaded: Sequence[int] = (),
) -> CostModel:
    """Return the seconds and bytes of every pass.

    layers, recompute: the layers of each stage, and what its backward recomputes.
    offloaded: how many layers of each stage may keep their activations on the host; (): none.
    shards: the vocabulary rows of each rank.

    Raises ConfigError if the pass times were measured on another model, dtype or device.
    """
    _check_measured(work, cost)
    layout, algorithm, tp = problem.layout, problem.algorithm, work.degrees.tp
    slowness = rank_slowness(cost, layout.num_ranks)
    offload_bytes = tuple(
        float(count * work.layer_bytes(kind))
        for count, kind in zip(offloaded, recompute, strict=False)
    )
    rows = [math.ceil(shard.num_rows / tp) for shard in shards[End.OUTPUT]]
    num_shards = tp * (layout.num_ranks if algorithm.sharded else 1)
    beside = algorithm.sharded and layout.num_ranks > 1 and not measured_layers(work, cost)
    slower = 1 + (cost.contention or 0.0) if beside else 1.0
    seconds = _stage_seconds(work, cost, layers, recompute, slower)
    seconds |= _shard_seconds(work, cost, rows, algorithm)
    return CostModel(
        {
            kind: tuple(
                value * slowness[index if kind.is_vocabulary else layout.rank_of(index)]
                for index, value in enumerate(values)
            )
            for kind, values in seconds.items()
        },
        hop_seconds=_hop_seconds(work, cost),
        barrier_seconds={
            barrier.name: _barrier_seconds(
                work, cost, barrier, num_shards, is_sharded=algorithm.sharded
            )
            for barrier in algorithm.barriers
        },
        stage_bytes=_stage_bytes(work, layers, recompute),
        shard_bytes=tuple(
            work.item_bytes * work.num_tokens * (work.held_values * count + work.model.hidden_size)
            for count in rows
        ),
        weight_bytes=_weight_grad_bytes(work, layers),
        offload_bytes=offload_bytes,
        offload_seconds=tuple(
            link_seconds(0.0, cost.host_bytes_per_second, num_bytes) for num_bytes in offload_bytes
        ),
    )


def _stage_bytes(
    work: Workload, layers: Sequence[range], recompute: Sequence[str]
) -> tuple[float, ...]:
    """Return the bytes that every stage keeps from F to B for one microbatch."""
    bytes_of_layer = {kind: work.layer_bytes(kind) for kind in set(recompute)}
    stages = [
        float(len(stage) * bytes_of_layer[kind])
        for stage, kind in zip(layers, recompute, strict=True)
    ]
    size, item_bytes = work.micro_batch_size, work.item_bytes
    if work.sequence_ranks > 1:  # the first stage keeps its input in whole sequences too
        stages[0] += work.message_bytes
    stages[0] += shape.embedding_activation_bytes(work.model, size, item_bytes)
    norm_bytes = shape.final_norm_activation_bytes(work.model, size, item_bytes)
    stages[-1] += norm_bytes / work.sequence_ranks
    return tuple(stages)


def _weight_grad_bytes(work: Workload, layers: Sequence[range]) -> tuple[float, ...]:
    """Return the bytes that every stage keeps from I to W for one microbatch."""
    of_layer = shape.layer_weight_grad_bytes(work.share, work.micro_batch_size, work.item_bytes)
    return tuple(float(len(stage) * of_layer) for stage in layers)


def link_seconds(fixed: float | None, bytes_per_second: float | None, num_bytes: float) -> float:
    """Return the seconds of one message over one link."""
    return (fixed or 0.0) + (0.0 if bytes_per_second is None else num_bytes / bytes_per_second)


def sum_seconds(
    fixed: float | None, bytes_per_second: float | None, num_bytes: float, num_ranks: int
) -> float:
    """Return the seconds of an all-reduce in a ring.

    Every rank sends 2 (n - 1) / n of the bytes.  A reduce-scatter or an all-gather takes half as
    long.
    """
    return (
        0.0
        if num_ranks == 1
        else link_seconds(fixed, bytes_per_second, 2 * (num_ranks - 1) / num_ranks * num_bytes)
    )


def _hop_seconds(work: Workload, cost: CostConfig) -> float:
    """Return the seconds of one hop, of which every tensor-parallel rank sends its part.

    Without sequence parallelism the receivers then all-gather the parts.
    """
    tp, message = work.degrees.tp, work.message_bytes
    sent = link_seconds(cost.hop_seconds, cost.hop_bytes_per_second, message / tp)
    if work.sequence_parallel:
        return sent
    return sent + sum_seconds(cost.tensor_seconds, cost.tensor_bytes_per_second, message, tp) / 2


def _barrier_seconds(
    work: Workload, cost: CostConfig, barrier: Barrier, num_shards: int, *, is_sharded: bool
) -> float:
    """Return the seconds of one collective of `num_shards` shards.

    Without vocabulary parallelism the shards are those of the tensor-parallel ranks of one stage.
    It is 0 if one rank owns the whole layer, because that rank waits for nobody.
    """
    if num_shards == 1:
        return 0.0
    precise = work.precise_bytes * work.num_tokens
    match barrier.payload:
        case Payload.ACTIVATIONS:
            num_bytes: float = work.message_bytes
        case Payload.INPUT_GRADIENT:
            num_bytes = work.input_gradient_bytes
        case Payload.EMBEDDINGS | Payload.EMBEDDING_GRADIENT:
            num_bytes = work.message_bytes * (num_shards - 1) / num_shards
        case Payload.STATISTICS:
            num_bytes = 3 * precise * (num_shards - 1)
        case Payload.MAXIMUM | Payload.SUMS:
            num_bytes = 2 * 2 * precise
    if is_sharded or cost.tensor_bytes_per_second is None:  # the last on a CPU
        return link_seconds(cost.collective_seconds, cost.collective_bytes_per_second, num_bytes)
    return link_seconds(cost.tensor_seconds, cost.tensor_bytes_per_second, num_bytes)


def rank_slowness(cost: CostConfig, num_ranks: int) -> tuple[float, ...]:
    """Return the factor by which each rank is slower than the other costs say."""
    factors = cost.rank_slowness
    if factors is None:
        return (1.0,) * num_ranks
    if len(factors) != num_ranks:
        raise ConfigError(
            f"cost.rank_slowness={list(factors)} has {len(factors)} values; "
            f"give one for each of the {num_ranks} ranks"
        )
    return factors


def layer_pass_seconds(work: Workload, cost: CostConfig, recompute: str) -> float:
    """Return the seconds of forward and backward of one layer on one microbatch."""
    seconds = _stage_seconds(work, cost, [range(1)], [recompute])
    (forward,), (backward,) = (seconds[kind] for kind in (Kind.F, Kind.B))
    return forward + backward


def row_seconds(work: Workload, cost: CostConfig) -> float:
    """Return the seconds that one more vocabulary row adds to S and T of a pipeline rank.

    Its tensor-parallel ranks share the rows.
    """
    many = 1 << 14  # waves of products count as whole ones, so one row may add nothing
    two, one = _output_seconds(work, cost, 2 * many), _output_seconds(work, cost, many)
    return (two - one) / many * (1 + _computed_again(work)) / work.degrees.tp


def _computed_again(work: Workload) -> float:
    """Return the products of S and T that vocab.backend=recompute adds, as a part of the others."""
    return work.vocab.recompute_fraction / 3 if work.vocab.backend == "recompute" else 0.0


def measured_layers(work: Workload, cost: CostConfig) -> bool:
    """Return whether `cost` has the measured seconds of the layers of this run."""
    of_these = cost.measured_layer_flops is None or _is_close(cost, work)
    return of_these and cost.layer_forward_seconds is not None


def _is_close(cost: CostConfig, work: Workload) -> bool:
    assert cost.measured_layer_flops is not None
    return math.isclose(cost.measured_layer_flops, work.layer_flops, rel_tol=0.01)


def computed_layer(work: Workload, cost: CostConfig) -> LayerSeconds:
    """Return the seconds of one layer of a tensor-parallel rank, without communication."""
    return layer_seconds(
        Device.of(cost),
        work.share,
        work.num_tokens,
        item_bytes=work.item_bytes,
        sum_bytes=work.precise_bytes,
        compiled=work.compiles_layers,
        sequence_ranks=work.sequence_ranks,
        linear_speed=_FLOAT8_SPEED if work.in_float8 else 1.0,
    )


def issue_seconds(work: Workload, cost: CostConfig) -> float:
    """Return the seconds that the CPU needs for the kernels of a layer; 0 if they do not count."""
    if work.cuda_graphs or measured_layers(work, cost):
        return 0.0
    return cost.layer_launch_seconds or 0.0


def launch_factor(work: Workload, cost: CostConfig, seconds: float) -> float:
    """Return by what a layer is slower than its passes, which take `seconds` together.

    Passes cannot take less time than the CPU needs to issue their kernels.  Measured ones do not,
    and a CUDA graph is issued at once.
    """
    issued = issue_seconds(work, cost)
    return max(1.0, issued / seconds) if seconds else 1.0


def tensor_seconds(work: Workload, cost: CostConfig, weight_grad: float) -> dict[Kind, float]:
    """Return the exposed seconds of tensor-parallel communication in the passes of one layer.

    weight_grad: the seconds of the products dW of the layer on one rank.

    A forward has two all-reduces, and nothing hides them.  A backward has two as well.  Each is
    hidden by the product dW of the same linear layer, unless W is a pass of its own.  With sequence
    parallelism an all-gather and a reduce-scatter take the place of each all-reduce, and a backward
    gathers the inputs of two linear layers once more.  The product dx hides that, and dW hides the
    reduce-scatter.
    """
    tp, message = work.degrees.tp, work.message_bytes
    if tp == 1:
        return dict.fromkeys((Kind.F, Kind.B, Kind.I, Kind.W), 0.0)
    summed = sum_seconds(cost.tensor_seconds, cost.tensor_bytes_per_second, message, tp)
    half = summed / 2
    qkv, _, up, _ = shape.linear_parameters(work.share)
    whole = sum(shape.linear_parameters(work.share))
    exposed = {Kind.B: 0.0, Kind.I: 0.0}
    for part in (qkv, up):
        product = weight_grad * part / whole  # dx takes as long as dW
        if work.sequence_parallel:
            gathered = max(0.0, half - product)
            exposed[Kind.B] += half + gathered + max(0.0, half - product)
            exposed[Kind.I] += half + gathered + half
        else:
            exposed[Kind.B] += max(0.0, summed - product)
            exposed[Kind.I] += summed
    return {Kind.F: 2 * summed, **exposed, Kind.W: 0.0}


def exposed_tensor_seconds(
    work: Workload, cost: CostConfig, recompute: str, *, split_backward: bool
) -> float:
    """Return the exposed tensor-parallel communication of a layer's passes on one microbatch."""
    weight_grad = computed_layer(work, cost).weight_grad
    if measured_layers(work, cost):
        tp = work.degrees.tp
        weight_grad = _either(cost.layer_weight_grad_seconds, weight_grad * tp) / tp
    exposed = tensor_seconds(work, cost, weight_grad)
    backward = exposed[Kind.I if split_backward else Kind.B]
    return exposed[Kind.F] + exchanged_again(work, cost, recompute) + backward


def _stage_seconds(
    work: Workload,
    cost: CostConfig,
    layers: Sequence[range],
    recompute: Sequence[str],
    slower: float = 1.0,
) -> dict[Kind, tuple[float, ...]]:
    """Return the seconds of F, B, I and W of every stage.

    With linear layers in float8, F and I take less, and W as long as in bfloat16.  B and I include
    what they recompute.  `slower` is a factor on what is computed, not on what is exchanged.
    """
    tp, computed = work.degrees.tp, computed_layer(work, cost)
    forward, input_grad, weight_grad = computed[:3]
    backward = input_grad + weight_grad
    if measured_layers(work, cost):
        forward = _either(cost.layer_forward_seconds, forward * tp) / tp
        backward = _either(cost.layer_backward_seconds, backward * tp) / tp
        input_grad = _either(cost.layer_input_grad_seconds, input_grad * tp) / tp
        weight_grad = _either(cost.layer_weight_grad_seconds, weight_grad * tp) / tp
    exposed = tensor_seconds(work, cost, weight_grad)
    of_one_layer = {
        Kind.F: slower * forward + exposed[Kind.F],
        Kind.B: slower * backward + exposed[Kind.B],
        Kind.I: slower * input_grad + exposed[Kind.I],
        Kind.W: slower * weight_grad,
    }
    of_kind = {
        kind: slower * recomputed_seconds(work, cost, kind) + exchanged_again(work, cost, kind)
        for kind in set(recompute)
    }
    both = of_one_layer[Kind.F] + of_one_layer[Kind.B]
    factor_of = {kind: launch_factor(work, cost, both + more) for kind, more in of_kind.items()}
    return {
        kind: tuple(
            len(stage)
            * factor_of[repeats]
            * (seconds + (of_kind[repeats] if kind in (Kind.B, Kind.I) else 0.0))
            for stage, repeats in zip(layers, recompute, strict=True)
        )
        for kind, seconds in of_one_layer.items()
    }


def recomputed_seconds(work: Workload, cost: CostConfig, recompute: str) -> float:
    """Return the seconds of computation that recomputation adds to the backward of one layer.

    A part of the FLOPs repeats as large a part of a measured forward.
    """
    if measured_layers(work, cost):
        assert cost.layer_forward_seconds is not None
        part = shape.recomputed_part(work.model, recompute)
        return part * cost.layer_forward_seconds / work.degrees.tp
    return computed_layer(work, cost).again(recompute)


def exchanged_again(work: Workload, cost: CostConfig, recompute: str) -> float:
    """Return the seconds of tensor-parallel communication that recomputation repeats in a layer.

    What runs again ends with the last tensor that the backward needs.  With `selective` that is the
    input of attention's output projection, whose sum is not repeated.  With `full` it is an input
    of the MLP's output projection, so only the sum after attention is repeated, unless a norm
    follows the MLP's sum.  With sequence parallelism the inputs of qkv and of the MLP are gathered
    again.
    """
    sums = {"none": 0, "selective": 0, "full": 2 if work.model.post_norms else 1}[recompute]
    gathers = {"none": 0, "selective": 1, "full": 2}[recompute]
    summed = sum_seconds(
        cost.tensor_seconds, cost.tensor_bytes_per_second, work.message_bytes, work.degrees.tp
    )
    return (sums + gathers) * summed / 2 if work.sequence_parallel else sums * summed


def _shard_seconds(
    work: Workload, cost: CostConfig, rows: Sequence[int], algorithm: VocabAlgorithm
) -> dict[Kind, tuple[float, ...]]:
    """Return the seconds of S, T, E and G of every shard.

    E and G are lookups and count as a tenth of a collective unless measured.  With
    vocab.backend=recompute T computes a part of the logits again, a fourth matrix product.
    """
    lookup, again = (cost.collective_seconds or 0.0) / 10, _computed_again(work)
    s_share = algorithm.products(Kind.S) / 3
    both = [_output_seconds(work, cost, count) for count in rows]
    return {
        Kind.S: tuple(s_share * seconds for seconds in both),
        Kind.T: tuple((1 - s_share + again) * seconds for seconds in both),
        Kind.E: (_either(cost.lookup_seconds, lookup),) * len(rows),
        Kind.G: (_either(cost.lookup_grad_seconds, lookup),) * len(rows),
    }


def _output_seconds(work: Workload, cost: CostConfig, num_rows: int) -> float:
    """Return the seconds of S and T of one rank together: three matrix products."""
    if cost.output_row_seconds is None or (
        cost.measured_layer_flops is not None and not _is_close(cost, work)
    ):
        return output_seconds(
            Device.of(cost),
            work.num_tokens,
            work.model.hidden_size,
            num_rows,
            work.precise_bytes,
            logit_bytes=cost.logit_bytes,
        )
    return cost.output_fixed_seconds + num_rows * cost.output_row_seconds if num_rows else 0.0


def _either(measured: float | None, estimate: float) -> float:
    return estimate if measured is None else measured


def _check_measured(work: Workload, cost: CostConfig) -> None:
    measured, flops = cost.measured_layer_flops, work.layer_flops
    if measured is not None and not cost.has_rates and not _is_close(cost, work):
        raise ConfigError(
            f"cost.measured_layer_flops={measured:g}, but a layer of this model takes {flops:g} "
            f"FLOPs forward per microbatch: {_OTHER_RUN}"
        )
    for name, of_cost, of_run in (
        ("dtype", cost.measured_dtype, work.dtype),
        ("linear_dtype", cost.measured_linear_dtype, work.linear_dtype),
        ("device", cost.measured_device, work.device),
        ("cuda_graphs", cost.measured_cuda_graphs, work.cuda_graphs),
    ):
        if of_cost not in (None, of_run):
            words = f"cost.measured_{name}={of_cost}, but run.{name}={of_run}".lower()
            own = f"run.{name}={of_cost}".lower()
            raise ConfigError(f"{words}: {_OTHER_RUN}; or set {own}")
