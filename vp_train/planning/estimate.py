"""The cost of every pass of a run.

Seconds are the measured ones if `cost` gives them, else they follow from FLOPs.  Bytes follow from
shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from schedules.cost import CostModel
from schedules.ir import Kind
from schedules.layout import Layout
from schedules.vocab import Barrier, End, Payload, VocabAlgorithm
from vp_train.config import ConfigError, RunConfig
from vp_train.model import shape
from vp_train.vocab.shard import Shard

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

_OTHER_RUN = (
    "these pass times are not for it; use a cost that is, or one that counts FLOPs, e.g. cost=a100"
)


def estimate_cost(
    config: RunConfig,
    layout: Layout,
    layers: Sequence[range],
    shards: dict[End, tuple[Shard, ...]],
    algorithm: VocabAlgorithm,
) -> CostModel:
    """Return the seconds and bytes of every pass.

    Raises ConfigError if the pass times were measured on another model, dtype or device.
    """
    _check_measured(config)
    slowness = rank_slowness(config, layout.num_ranks)
    model, size, tp = (
        shape.tensor_share(config.model, config.parallel.tp),
        config.micro_batch_size,
        config.parallel.tp,
    )
    item_bytes = ITEM_BYTES[config.run.dtype]
    rows = [math.ceil(shard.num_rows / tp) for shard in shards[End.OUTPUT]]
    num_shards = tp * (layout.num_ranks if algorithm.sharded else 1)
    on_cuda = config.run.device == "cuda"
    sequence_ranks = tp if config.parallel.sequence_parallel else 1
    stages = _with_recompute(config, layers)
    bytes_of_layer = {
        recompute: layer_bytes(config, recompute)
        for recompute in {recompute for recompute, _ in stages}
    }
    stage_bytes = [float(len(stage) * bytes_of_layer[recompute]) for recompute, stage in stages]
    if sequence_ranks > 1:  # the first stage keeps its input in whole sequences too
        stage_bytes[0] += message_bytes(config)
    stage_bytes[0] += shape.embedding_activation_bytes(model, size, item_bytes)
    stage_bytes[-1] += (
        shape.final_norm_activation_bytes(model, size, item_bytes, fused_norms=on_cuda)
        / sequence_ranks
    )
    return CostModel(
        {
            kind: tuple(
                value * slowness[index if kind.is_vocabulary else layout.rank_of(index)]
                for index, value in enumerate(values)
            )
            for kind, values in (
                _stage_seconds(config, layers) | _shard_seconds(config, rows, algorithm)
            ).items()
        },
        _hop_seconds(config),
        {
            barrier.name: _barrier_seconds(config, barrier, num_shards)
            for barrier in algorithm.barriers
        },
        tuple(stage_bytes),
        tuple(
            item_bytes * size * model.seq_length * (held_part(config) * count + model.hidden_size)
            for count in rows
        ),
        tuple(
            float(len(stage) * shape.layer_weight_grad_bytes(model, size, item_bytes))
            for stage in layers
        ),
    )


def layer_bytes(config: RunConfig, recompute: str) -> int:
    """Return the activation bytes that one layer keeps per microbatch and tensor-parallel rank."""
    tp = config.parallel.tp
    return shape.layer_activation_bytes(
        shape.tensor_share(config.model, tp),
        config.micro_batch_size,
        ITEM_BYTES[config.run.dtype],
        fused_norms=config.run.device == "cuda",
        recompute=recompute,
        sequence_ranks=tp if config.parallel.sequence_parallel else 1,
    )


def message_bytes(config: RunConfig) -> int:
    """Return the bytes of [T, H] in the compute dtype.

    A hop, the broadcast C0 and an all-reduce over the tensor-parallel ranks move this much.
    """
    return (
        ITEM_BYTES[config.run.dtype]
        * config.micro_batch_size
        * config.model.seq_length
        * config.model.hidden_size
    )


def link_seconds(fixed: float, bytes_per_second: float | None, num_bytes: float) -> float:
    """Return the seconds of one message over one link."""
    return fixed + (0.0 if bytes_per_second is None else num_bytes / bytes_per_second)


def sum_seconds(
    fixed: float, bytes_per_second: float | None, num_bytes: float, num_ranks: int
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


def _hop_seconds(config: RunConfig) -> float:
    """Return the seconds of one hop, of which every tensor-parallel rank sends its part.

    Without sequence parallelism the receivers then all-gather the parts.
    """
    cost, tp, message = config.cost, config.parallel.tp, message_bytes(config)
    sent = link_seconds(cost.hop_seconds, cost.hop_bytes_per_second, message / tp)
    if config.parallel.sequence_parallel:
        return sent
    return sent + sum_seconds(cost.tensor_seconds, cost.tensor_bytes_per_second, message, tp) / 2


def input_gradient_bytes(config: RunConfig) -> int:
    """Return the bytes of one shard's term of dL/dx: [T, H] in vocab.sum_dtype."""
    item = ITEM_BYTES[config.run.dtype]
    summed = item if config.vocab.sum_dtype == "compute" else max(4, item)
    return message_bytes(config) // item * summed


def _barrier_seconds(config: RunConfig, barrier: Barrier, num_shards: int) -> float:
    """Return the seconds of one collective of `num_shards` shards.

    It is 0 if one rank owns the whole layer, because that rank waits for nobody.
    """
    if num_shards == 1:
        return 0.0
    tokens = config.micro_batch_size * config.model.seq_length
    precise = max(4, ITEM_BYTES[config.run.dtype]) * tokens
    match barrier.payload:
        case Payload.ACTIVATIONS:
            num_bytes: float = message_bytes(config)
        case Payload.INPUT_GRADIENT:
            num_bytes = input_gradient_bytes(config)
        case Payload.EMBEDDINGS | Payload.EMBEDDING_GRADIENT:
            num_bytes = message_bytes(config) * (num_shards - 1) / num_shards
        case Payload.STATISTICS:
            num_bytes = 3 * precise * (num_shards - 1)
        case Payload.MAXIMUM | Payload.SUMS:
            num_bytes = 2 * 2 * precise
    cost = config.cost
    return link_seconds(cost.collective_seconds, cost.collective_bytes_per_second, num_bytes)


def rank_slowness(config: RunConfig, num_ranks: int) -> tuple[float, ...]:
    """Return the factor by which each rank is slower than the other costs say."""
    factors = config.cost.rank_slowness
    if factors is None:
        return (1.0,) * num_ranks
    if len(factors) != num_ranks:
        raise ConfigError(
            f"cost.rank_slowness={list(factors)} has {len(factors)} values; "
            f"give one for each of the {num_ranks} ranks"
        )
    return factors


def layer_seconds(config: RunConfig) -> float:
    """Return the seconds of forward and backward of one layer on one microbatch."""
    parallel = replace(config.parallel, recompute_per_stage=None)
    seconds = _stage_seconds(replace(config, parallel=parallel), [range(1)])
    (forward,), (backward,) = (seconds[kind] for kind in (Kind.F, Kind.B))
    return forward + backward


def row_seconds(config: RunConfig) -> float:
    """Return the seconds that one more vocabulary row adds to S and T of a pipeline rank.

    Its tensor-parallel ranks share the rows.
    """
    return (_output_seconds(config, 2) - _output_seconds(config, 1)) / config.parallel.tp


def _stage_seconds(config: RunConfig, layers: Sequence[range]) -> dict[Kind, tuple[float, ...]]:
    """Return the seconds of F, B, I and W of every stage.

    Unless measured, B takes twice as long as F, and I and W take half of B.  B and I include what
    they recompute.
    """
    cost, tp = config.cost, config.parallel.tp
    forward = _layer_flops(config) / cost.flops_per_second
    summed = 2 * sum_seconds(
        cost.tensor_seconds, cost.tensor_bytes_per_second, message_bytes(config), tp
    )
    # With sequence parallelism the backward all-gathers the inputs of two linear layers once more.
    # An all-gather takes half as long as an all-reduce.
    gathered = summed / 2 if config.parallel.sequence_parallel else 0.0
    one_forward = _either(cost.layer_forward_seconds, forward) / tp + summed
    of_one_layer = {
        Kind.F: one_forward,
        Kind.B: _either(cost.layer_backward_seconds, 2 * forward) / tp + summed + gathered,
        Kind.I: _either(cost.layer_input_grad_seconds, forward) / tp + summed + gathered,
        Kind.W: _either(cost.layer_weight_grad_seconds, forward) / tp,
    }
    again = [
        shape.recomputed_part(config.model, recompute) * one_forward
        for recompute, _ in _with_recompute(config, layers)
    ]
    return {
        kind: tuple(
            len(stage) * (seconds + (more if kind in (Kind.B, Kind.I) else 0.0))
            for stage, more in zip(layers, again, strict=True)
        )
        for kind, seconds in of_one_layer.items()
    }


def _with_recompute(config: RunConfig, layers: Sequence[range]) -> list[tuple[str, range]]:
    """Return each stage's kind of recomputation, and its layers."""
    return [(config.parallel.recompute_of(stage), held) for stage, held in enumerate(layers)]


def _shard_seconds(
    config: RunConfig, rows: Sequence[int], algorithm: VocabAlgorithm
) -> dict[Kind, tuple[float, ...]]:
    """Return the seconds of S, T, E and G of every shard.

    E and G are lookups and count as a tenth of a collective unless measured.  With
    vocab.backend=recompute T computes a part of the logits again, a fourth matrix product.
    """
    cost, lookup = config.cost, config.cost.collective_seconds / 10
    s_share = algorithm.products(Kind.S) / 3
    again = config.vocab.recompute_fraction / 3 if config.vocab.backend == "recompute" else 0.0
    both = [_output_seconds(config, count) for count in rows]
    return {
        Kind.S: tuple(s_share * seconds for seconds in both),
        Kind.T: tuple((1 - s_share + again) * seconds for seconds in both),
        Kind.E: (_either(cost.lookup_seconds, lookup),) * len(rows),
        Kind.G: (_either(cost.lookup_grad_seconds, lookup),) * len(rows),
    }


def _output_seconds(config: RunConfig, num_rows: int) -> float:
    """Return the seconds of S and T of one rank together: three matrix products."""
    cost, model = config.cost, config.model
    if cost.output_row_seconds is None:
        return (
            6
            * config.micro_batch_size
            * model.seq_length
            * num_rows
            * model.hidden_size
            / cost.flops_per_second
        )
    return cost.output_fixed_seconds + num_rows * cost.output_row_seconds if num_rows else 0.0


def held_part(config: RunConfig) -> float:
    """Return how many values per token and vocabulary row are held from S to T."""
    match config.vocab.backend:
        case "recompute":
            return 1 - config.vocab.recompute_fraction
        case "reference":
            return 2.0
        case _:
            return 1.0


def _either(measured: float | None, estimate: float) -> float:
    return estimate if measured is None else measured


def _layer_flops(config: RunConfig) -> int:
    return shape.layer_flops(config.model, config.micro_batch_size * config.model.seq_length)


def _check_measured(config: RunConfig) -> None:
    cost, run, flops = config.cost, config.run, _layer_flops(config)
    measured = cost.measured_layer_flops
    if measured is not None and not math.isclose(measured, flops, rel_tol=0.01):
        raise ConfigError(
            f"cost.measured_layer_flops={measured:g}, but a layer of this model takes {flops:g} "
            f"FLOPs forward per microbatch: {_OTHER_RUN}"
        )
    for name, of_cost, of_run in (
        ("dtype", cost.measured_dtype, run.dtype),
        ("device", cost.measured_device, run.device),
    ):
        if of_cost not in (None, of_run):
            raise ConfigError(
                f"cost.measured_{name}={of_cost}, but run.{name}={of_run}: {_OTHER_RUN}"
            )
