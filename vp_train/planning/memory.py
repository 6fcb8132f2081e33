"""Bytes of one rank: its weights, gradients and optimizer state, and the peak of a step.

Pure arithmetic over the order of the passes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

from schedules.ir import Kind, Pass
from schedules.simulate import peak_in_flight
from schedules.transfers import HostBytes
from schedules.vocab import End
from vp_train.config import ConfigError, OptimConfig
from vp_train.model import shape
from vp_train.planning.degrees import Degrees
from vp_train.planning.plan import StepPlan
from vp_train.planning.workload import Workload
from vp_train.tensors.alignment import HOST_BLOCK_BYTES, PASSES_AHEAD
from vp_train.units import human_bytes
from vp_train.vocab.chunks import CHUNKS, PANEL_BYTES

_GRAPH_MESSAGES = 3  # of [T, H]: the output of a stage, and its gradients of output and input
_CUBLAS_BYTES = 32 << 20  # that cuBLAS works in, for every thread and stream, on an H100
_MESSAGES = 4  # of [T, H] that are on their way or received early, at any time
_INDEX_BYTES = 8 * 6  # per token of a batch: ids, owners and their order (int64)
_TOKEN_BYTES = 4 * 8  # per token of a step: losses and statistics (fp32)


@dataclass(frozen=True, slots=True)
class StateBytes:
    """The bytes per parameter.

    Every replica keeps a whole `optimizer` state.  With ZeRO-1 there is only one, of which the
    replicas keep equal parts of every bucket.
    """

    weights: int
    gradients: int
    optimizer: int

    @classmethod
    def of(cls, work: Workload, optim: OptimConfig) -> StateBytes:
        """Return the bytes per parameter of AdamW in this trainer.

        Gradients and two moments are at least fp32.  Weights of a narrower dtype have an fp32 copy.
        """
        item, precise = work.item_bytes, work.precise_bytes
        kept = 2 * precise + (precise if item < precise else 0)
        return cls(item, precise, 0 if optim.offload else kept)


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The bytes of one rank at its peak in a step.

    `activations` are kept from F to B, and from I to W.  `vocabulary` is held from S to T.
    `working` is what passes need while they run, and messages.  `weights`, `gradients` and
    `optimizer` include the vocabulary rows of the rank.
    """

    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    vocabulary: float
    working: float

    @property
    def state(self) -> float:
        """The bytes that stay allocated between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.state + self.activations + self.vocabulary + self.working


def rank_memory(
    step: StepPlan, optim: OptimConfig, rank: int, state: StateBytes | None = None
) -> RankMemory:
    """Return the peak memory of one tensor-parallel rank of pipeline rank `rank`.

    If these differ by a vocabulary row, it is that of the larger.
    """
    activations, vocabulary, working = step_peak(step, optim, rank)
    kept = rank_state(step, optim, rank, state)
    return replace(kept, activations=activations, vocabulary=vocabulary, working=working)


def total_bytes(step: StepPlan, optimizers: Sequence[OptimConfig], rank: int) -> list[float]:
    """Return the `total` of `rank_memory` for each of the optimizers."""
    peak, parameters = sum(passes_peak(step, rank)), rank_parameters(step, rank)
    before = _pool_bytes(step, rank) + _kept_bytes(step, rank)
    return [
        state_of(step.work, optim, parameters).state
        + max(peak, before + _update_bytes(step, optim, parameters))
        for optim in optimizers
    ]


def rank_state(
    step: StepPlan, optim: OptimConfig, rank: int, state: StateBytes | None = None
) -> RankMemory:
    """Return the memory of a rank between two steps."""
    return state_of(step.work, optim, rank_parameters(step, rank), state)


def state_of(
    work: Workload, optim: OptimConfig, parameters: int, state: StateBytes | None = None
) -> RankMemory:
    """Return the memory of a rank with so many parameters between two steps."""
    per_parameter = StateBytes.of(work, optim) if state is None else state
    parts = work.degrees.dp if optim.name == "zero1" else 1
    return RankMemory(
        parameters,
        weights=parameters * per_parameter.weights,
        gradients=parameters * per_parameter.gradients,
        optimizer=parameters * per_parameter.optimizer / parts,
        activations=0.0,
        vocabulary=0.0,
        working=0.0,
    )


def machine_bytes() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_machine(step: StepPlan, optim: OptimConfig, num_bytes: int) -> None:
    """Raise ConfigError if all ranks do not fit into a machine of `num_bytes`.

    Their state counts, and what they keep for the backward.
    """
    states = [
        rank_state(step, optim, rank).state + host_bytes(step, optim, rank).optimizer
        for rank in range(step.num_ranks)
    ]
    needed = sum(states) * step.degrees.tp * step.degrees.dp
    if needed > num_bytes:
        raise ConfigError(
            f"weights, gradients and optimizer of all ranks take {human_bytes(needed)}, and this "
            f"machine has {human_bytes(num_bytes)}; choose a smaller model, or start on more nodes"
        )
    kept = sum(step.timeline.peak_bytes) * step.degrees.tp * step.degrees.dp
    if needed + kept > num_bytes:
        raise ConfigError(
            f"all ranks take {human_bytes(needed)} for weights, gradients and optimizer and up to "
            f"{human_bytes(kept)} for activations, and this machine has {human_bytes(num_bytes)}; "
            "lower micro_batch_size, set parallel.recompute=full, or start on more nodes"
        )


@dataclass(frozen=True, slots=True)
class HostUsage:
    """The bytes that ranks keep in host memory: offloaded activations, and the optimizer's state.

    With optim.offload the host has, of a replica's part of the parameters, weights, a gradient and
    two moments that are at least fp32, and weights on their way back to the device.
    """

    activations: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return self.activations + self.optimizer

    def excess_words(self, num_bytes: float) -> str:
        """Return what is too much for a node with `num_bytes`, and the way out, in words."""
        parts = {
            "activations": (self.activations, "lower parallel.offload_activations"),
            "optimizer state": (self.optimizer, "set optim.offload=false"),
        }
        found = {name: part for name, part in parts.items() if part[0]}
        kept = " and ".join(f"{human_bytes(size)} of {name}" for name, (size, _) in found.items())
        ways = ", ".join(way for _, way in found.values())
        return (
            f"the ranks of a node keep {kept} in host memory, {human_bytes(self.total - num_bytes)}"
            f" more than its {human_bytes(num_bytes)}; {ways}, or use more nodes"
        )


def host_bytes(step: StepPlan, optim: OptimConfig, rank: int) -> HostUsage:
    """Return what one tensor-parallel rank of pipeline rank `rank` keeps in host memory at most."""
    activations = step.timeline.host_bytes(rank, HOST_BLOCK_BYTES)
    return HostUsage(activations, host_state(step.work, optim, rank_parameters(step, rank)))


def host_state(work: Workload, optim: OptimConfig, parameters: int) -> float:
    """Return the bytes in host memory of the optimizer of a rank with so many parameters."""
    return host_optimizer_bytes(work, parameters) / work.degrees.dp if optim.offload else 0.0


def host_optimizer_bytes(work: Workload, parameters: int) -> int:
    """Return the bytes that so many parameters take in host memory with optim.offload."""
    return parameters * (4 * work.precise_bytes + work.item_bytes)


def most_host_bytes(step: StepPlan, optim: OptimConfig, ranks_per_node: int) -> HostUsage:
    """Return what the ranks of a node keep in its memory, on the node where that is most."""
    of_rank = [host_bytes(step, optim, rank) for rank in range(step.num_ranks)]
    return fullest_node(of_rank, step.degrees, ranks_per_node)


def fullest_node(of_rank: Sequence[HostUsage], degrees: Degrees, ranks_per_node: int) -> HostUsage:
    """Return `most_host_bytes` from what one rank of every pipeline rank keeps there."""
    nodes = nodes_of(degrees, ranks_per_node)
    return max((_of_node(of_rank, degrees, node) for node in nodes), key=lambda one: one.total)


def nodes_of(degrees: Degrees, ranks_per_node: int) -> list[range]:
    """Return the ranks of the run on each node; nodes of the same pipeline ranks are one."""
    period = math.lcm(degrees.pp * degrees.tp, ranks_per_node)
    ranks = range(min(degrees.num_ranks, period))
    return [ranks[first : first + ranks_per_node] for first in ranks[::ranks_per_node]]


def _of_node(of_rank: Sequence[HostUsage], degrees: Degrees, ranks: range) -> HostUsage:
    """Return what `ranks` of the run, those of a node, keep in its memory."""
    found = [of_rank[rank // degrees.tp % degrees.pp] for rank in ranks]
    return HostUsage(sum(one.activations for one in found), sum(one.optimizer for one in found))


def check_host(step: StepPlan, optim: OptimConfig, ranks: range, num_bytes: int) -> None:
    """Raise ConfigError if `ranks`, those of a node, keep more than `num_bytes` in its memory."""
    of_rank = [host_bytes(step, optim, rank) for rank in range(step.num_ranks)]
    found = _of_node(of_rank, step.degrees, ranks)
    if found.total > num_bytes:
        raise ConfigError(found.excess_words(num_bytes))


def rank_parameters(step: StepPlan, rank: int) -> int:
    """Return the number of parameters that a rank holds, copies of tied matrices included."""
    problem, model, tp = step.problem, step.work.share, step.degrees.tp
    count = sum(
        len(step.layers[stage]) for stage in problem.layout.stages_of(rank)
    ) * shape.layer_parameters(model)
    if problem.root(End.OUTPUT) == rank:
        count += shape.final_norm_parameters(model)
    if problem.root(End.INPUT) == rank:
        count += shape.position_parameters(model)
    rows = {end: math.ceil(step.shards[end][rank].num_rows / tp) for end in End}
    return count + model.hidden_size * (
        max(rows.values()) if model.tied_embeddings else sum(rows.values())
    )


def step_peak(step: StepPlan, optim: OptimConfig, rank: int) -> tuple[float, float, float]:
    """Return the bytes of activations, held shards and work of `rank` when their sum is highest.

    Activations that wait in host memory are not among them.

    While a pass runs, both what it adds and what it frees at its end are allocated.  After the
    passes the optimizer needs working memory too.
    """
    update = _update_bytes(step, optim, rank_parameters(step, rank))
    optimizer = (0.0, _pool_bytes(step, rank), _kept_bytes(step, rank) + update)
    return max(passes_peak(step, rank), optimizer, key=sum)


def _kept_bytes(step: StepPlan, rank: int) -> float:
    """Return the bytes of work that a rank keeps during the whole step."""
    work = step.work
    batches = 2 if work.on_cuda else 1  # a GPU has the next one, too
    per_token = _TOKEN_BYTES + batches * _INDEX_BYTES
    return _scratch_bytes(step, rank) + per_token * work.num_microbatches * work.num_tokens


def _exponentials_bytes(step: StepPlan, rank: int) -> float:
    """Return the bytes of the exponentials among what S holds for T; the rest is x."""
    return max(0.0, step.cost.shard_bytes[rank] - step.work.message_bytes)


def _pool_bytes(step: StepPlan, rank: int) -> float:
    """Return the bytes of exponentials that a CPU keeps for reuse and never frees."""
    if step.work.on_cuda:
        return 0.0
    return _exponentials_bytes(step, rank) * _most_held(step.schedule.ranks[rank])


def passes_peak(step: StepPlan, rank: int) -> tuple[float, float, float]:
    """Return what `step_peak` does, but of the passes alone."""
    work, order, cost = step.work, step.schedule.ranks[rank], step.cost
    message, on_cpu = float(work.message_bytes), not work.on_cuda
    exponentials = _exponentials_bytes(step, rank)
    activations, held = _graph_bytes(step, rank), _pool_bytes(step, rank)
    working = _kept_bytes(step, rank) + _MESSAGES * message + _rounded_weight_bytes(step, rank)
    working += _sent_bytes_of_others(step, rank) if on_cpu else _sent_bytes_ahead(step, rank)
    peak = activations, held, working
    highest = sum(peak)
    stages = frozenset(step.problem.layout.stages_of(rank))
    offloads = [one for one in step.schedule.offloads if one.item.stage in stages]
    hosted = HostBytes.of(offloads, cost).away(order) if offloads else repeat((0.0, 0.0))
    # Microbatches are equal, so what a pass does to memory is computed once for its stage and kind.
    effects: dict[tuple[int, Kind], tuple[float, ...]] = {}
    for item, (away, away_after) in zip(order, hosted, strict=False):
        key = (item.stage, item.kind)
        if key not in effects:
            change = cost.byte_change(item)
            left = _sent_bytes(item, step, rank) if on_cpu else 0.0
            in_held = item.kind in (Kind.S, Kind.T)
            if in_held and on_cpu and exponentials:
                change -= math.copysign(exponentials, change)
            layers, shards = (0.0, change) if in_held else (change, 0.0)
            meanwhile = _working_bytes(item, step)
            if not item.kind.is_vocabulary and _has_graphs(step, item.stage):
                layers, meanwhile = 0.0, message  # it gives a copy of its result away
            grown = max(0.0, layers)
            if item.kind is Kind.I and grown:
                # Layers end one after the other: when the last one needs most, it has not grown.
                grown -= grown / len(step.layers[item.stage])
            effects[key] = (layers, shards, left, meanwhile, grown)
        layers, shards, left, meanwhile, grown = effects[key]
        kept = activations + grown - away
        sharded = held + (shards if shards > 0.0 else 0.0)
        during = working + left + meanwhile
        if kept + sharded + during > highest:
            peak, highest = (kept, sharded, during), kept + sharded + during
        activations, held, working = activations + layers, held + shards, working + left
        if offloads:  # reloads take their memory before the next pass
            kept = activations - away_after
            if kept + held + working > highest:
                peak, highest = (kept, held, working), kept + held + working
    return peak


def _has_graphs(step: StepPlan, stage: int) -> bool:
    """Return whether the passes of a stage run as CUDA graphs; without layers there are none."""
    return step.work.cuda_graphs and bool(step.layers[stage])


def _graph_bytes(step: StepPlan, rank: int) -> float:
    """Return the bytes of CUDA graphs, which stay allocated.

    A stage has a set of graphs for every microbatch that it has in flight at any time.  Each has
    all that its passes keep and need at their peak, and what comes into a pass and out of it.  On a
    GPU cuBLAS has memory of its own for the forward and for the backward of a stage.
    """
    problem, found = step.problem, 0.0
    for stage in problem.layout.stages_of(rank):
        if not _has_graphs(step, stage):
            continue
        passes = (item for item in step.schedule.ranks[rank] if item.stage == stage)
        most = peak_in_flight(passes, problem)
        found += 2 * _CUBLAS_BYTES * step.work.on_cuda
        forward, backward = Pass(stage, Kind.F, 0), Pass(stage, problem.backward, 0)
        kept, needed = step.cost.byte_change(forward), _working_bytes(backward, step)
        found += most * (kept + needed + _GRAPH_MESSAGES * step.work.message_bytes)
    return found


def _most_held(order: tuple[Pass, ...]) -> int:
    """Return the largest number of microbatches between S and T at any time."""
    held = most = 0
    for item in order:
        held += (item.kind is Kind.S) - (item.kind is Kind.T)
        most = max(most, held)
    return most


def _is_hop(stage: int, other: int, step: StepPlan) -> bool:
    """Return whether tensors between these two stages go from one rank to another."""
    layout = step.problem.layout
    return 0 <= other < layout.num_stages and layout.rank_of(other) != layout.rank_of(stage)


def _sent_bytes(item: Pass, step: StepPlan, rank: int) -> float:
    """Return the bytes of hops, and of terms of sums that another rank receives, of a pass.

    They stay allocated until the host has seen that they have been sent.  Gloo does not say that,
    so on a CPU they stay until the end of the step.  On a GPU the host runs some passes ahead.
    """
    problem, work = step.problem, step.work
    message = float(work.message_bytes)
    neighbour = {Kind.F: item.stage + 1, Kind.B: item.stage - 1, Kind.I: item.stage - 1}.get(
        item.kind
    )
    if neighbour is not None and _is_hop(item.stage, neighbour, step):
        return message / work.sequence_ranks
    if item.kind is Kind.E and problem.algorithm.sharded and rank != problem.root(End.INPUT):
        return message * step.shards[End.INPUT][rank].num_rows / step.shards[End.INPUT][-1].stop
    if item.kind is Kind.S and problem.algorithm.sharded and rank != problem.root(End.OUTPUT):
        return float(work.input_gradient_bytes)
    return 0.0


def _sent_bytes_of_others(step: StepPlan, rank: int) -> float:
    """Return the bytes that the microbatches send which a short step lacks."""
    found = max((item.microbatch + 1 for item in step.schedule.ranks[rank]), default=0)
    one = list(step.problem.passes_of(rank, 0))
    lacks = step.problem.num_microbatches - found
    return lacks * sum(_sent_bytes(item, step, rank) for item in one)


def _sent_bytes_ahead(step: StepPlan, rank: int) -> float:
    """Return the bytes that the passes by which the host is ahead of a GPU send on average."""
    one = list(step.problem.passes_of(rank, 0))
    sent = sum(_sent_bytes(item, step, rank) for item in one)
    return float(math.ceil(PASSES_AHEAD * sent / max(1, len(one))))


def _scratch_bytes(step: StepPlan, rank: int) -> float:
    """Return the bytes of the buffers that S and T of a rank allocate once and reuse.

    They are the scaled x and a product, both [T, H], and the logits of a chunk of rows.
    """
    work, rows = step.work, math.ceil(step.shards[End.OUTPUT][rank].num_rows / step.degrees.tp)
    if not rows:
        return 0.0
    all_logits = float(work.precise_bytes * work.num_tokens * rows)
    if work.vocab.backend == "reference":
        return 4.0 * all_logits
    chunk = CHUNKS[work.device]
    logits = float(chunk.logits_bytes(work.num_tokens, rows, work.precise_bytes))
    separate = work.item_bytes < work.precise_bytes or work.held_values < 1
    products = 2.0 * work.precise_bytes * work.num_tokens * work.model.hidden_size
    not_kept = work.item_bytes * work.num_tokens * rows * (1 - work.held_values)
    panel = min(float(PANEL_BYTES), not_kept) if work.device == "cuda" else 0.0
    return products + panel + (logits if separate else 0.0)


def _rounded_weight_bytes(step: StepPlan, rank: int) -> float:
    """Return the bytes of the weights in float8, rounded once in a step for y and once for dx."""
    if not step.work.in_float8:
        return 0.0
    num_layers = sum(len(step.layers[stage]) for stage in step.problem.layout.stages_of(rank))
    return 2.0 * num_layers * shape.layer_matrix_parameters(step.work.share)


def _update_bytes(step: StepPlan, optim: OptimConfig, parameters: int) -> float:
    """Return the bytes that reducing gradients and updating parameters of a rank need.

    With optim.offload it is one bucket, because DeepSpeed sums in a copy.  Others work in place.
    """
    gradients = step.work.precise_bytes * parameters
    return float(min(gradients, optim.bucket_mib << 20)) if optim.offload else 0.0


def backward_bytes(work: Workload, kind: Kind, recompute: str) -> float:
    """Return the temporary bytes of a backward of `kind`, B or I, at its peak in a layer.

    The MLP is differentiated first, while all earlier activations are still kept.  With a gate the
    gradients of its activation's output and two inputs come on top, and the output itself, formed
    again; without compiled code another factor.  Without a gate it is the gradients of output and
    input; B has used up one tensor by then, and after I a part stays for W.
    """
    model, values = work.share, work.item_bytes * work.num_tokens
    wide = 5 - work.on_cuda if shape.is_gated(model) else 2 - (kind is Kind.B)
    formed, kept = work.layer_bytes("none"), work.layer_bytes(recompute)
    # A layer that is recomputed as a whole starts from a copy of its input.
    again = formed if recompute == "full" else formed - kept
    return float(values * (wide * model.ffn_hidden_size + 2 * model.hidden_size) + again)


def _working_bytes(item: Pass, step: StepPlan) -> float:
    """Return the temporary bytes of a pass: beyond what it leaves, less what it frees meanwhile."""
    work, model = step.work, step.work.share
    values = work.item_bytes * work.num_tokens
    match item.kind:
        case Kind.F:
            return 2.0 * values * model.hidden_size
        case Kind.B | Kind.I:
            return backward_bytes(work, item.kind, step.recompute[item.stage])
        case Kind.S | Kind.T:
            return 2.0 * work.precise_bytes * work.num_tokens * model.hidden_size
        case _:
            return float(work.message_bytes)
