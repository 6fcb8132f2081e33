"""The predicted bytes of all ranks add up to the model, and are what torch allocates."""

from __future__ import annotations

import functools
import math
import random
import sys
from pathlib import Path

import pytest

from schedules.ir import Kind
from schedules.lower import Action, lower
from schedules.vocab import End
from tests.ranks import in_processes
from vp_train.config import ConfigError, OptimConfig
from vp_train.model import shape
from vp_train.planning import memory as memory_module
from vp_train.planning.memory import (
    StateBytes,
    _most_held,
    _sent_bytes,
    check_machine,
    host_bytes,
    passes_peak,
    rank_memory,
    rank_parameters,
    rank_state,
    step_peak,
)
from vp_train.planning.plan import plan_step
from vp_train.settings import load_config
from vp_train.units import human_bytes

VOCABULARY_ENDS = {Kind.E: End.INPUT, Kind.S: End.OUTPUT}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NANO = ["model=nano", "parallel.pp=2", "num_microbatches=4"]


def planned(*overrides, num_ranks=2):
    config = load_config([*NANO, *overrides])
    return config, plan_step(config, num_ranks)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "v_half"])
@pytest.mark.parametrize("vocab", ["none", "one_barrier"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_ranks_together_have_every_parameter_once(schedule, vocab, tied):
    config, step = planned(
        f"schedule={schedule}", f"vocab={vocab}", f"model.tied_embeddings={tied}"
    )
    copies = 0
    if tied and vocab == "none" and schedule != "v_half":  # both ends are on different ranks
        copies = config.model.vocab_size * config.model.hidden_size
    found = sum(rank_parameters(step, rank) for rank in range(2))
    assert found == shape.num_parameters(config.model) + copies


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "v_half"])
@pytest.mark.parametrize("vocab", ["none", "one_barrier", "two_barrier"])
def test_the_most_shards_held_are_the_peak_of_s_minus_t(schedule, vocab):
    """Compare with a count over every prefix of the order, also on ranks without a shard."""
    _, step = planned(f"schedule={schedule}", f"vocab={vocab}", "num_microbatches=6")
    most = []
    for order in step.schedule.ranks:
        prefixes = [[item.kind for item in order[:length]] for length in range(len(order) + 1)]
        most.append(max(prefix.count(Kind.S) - prefix.count(Kind.T) for prefix in prefixes))
        assert _most_held(order) == most[-1]
    assert max(most) >= 1
    assert (min(most) == 0) == (vocab == "none")


def test_a_machine_has_room_for_a_state_in_host_memory_too():
    """A parameter in float32 has four values for the update, and one on its way back."""
    words = ["optim.name=zero1", "optim.offload=true", "parallel.dp=2", "run.device=cuda"]
    config, step = planned(*words, num_ranks=4)
    needed = shape.num_parameters(config.model) * (2 * (4 + 4) + 4 * 4 + 4)
    with pytest.raises(ConfigError, match=f"and this machine has {human_bytes(needed - 1)};"):
        check_machine(step, config.optim, needed - 1)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_machine_without_room_for_the_state_of_all_ranks_is_refused(replicas):
    config, step = planned(f"parallel.dp={replicas}", num_ranks=2 * replicas)
    bytes_of_parameter = 4 + 4 + 8  # float32 with two moments
    needed = bytes_of_parameter * shape.num_parameters(config.model) * replicas
    kept = sum(step.timeline.peak_bytes) * replicas
    check_machine(step, config.optim, needed + kept)
    with pytest.raises(ConfigError, match=r"for activations, and this machine has .*; lower micro"):
        check_machine(step, config.optim, needed + kept - 1)
    with pytest.raises(ConfigError, match="choose a smaller model"):
        check_machine(step, config.optim, needed - 1)


def test_tensor_parallel_ranks_share_matrices_and_rows_and_copy_norms():
    config, step = planned()
    _, half = planned("parallel.tp=2", num_ranks=4)
    norms = 2 * 2 * config.model.hidden_size
    for rank, last in ((0, 0), (1, config.model.hidden_size)):
        whole = rank_parameters(step, rank) - norms - last
        assert rank_parameters(half, rank) - norms - last == whole / 2


@pytest.mark.parametrize(
    ("dtype", "optimizer", "dp", "expected"),
    [
        ("float64", "adamw", 1, (8, 8, 16)),
        ("float32", "adamw", 2, (4, 4, 8)),
        ("bfloat16", "adamw", 2, (2, 4, 12)),
        ("float16", "adamw", 1, (2, 4, 12)),
        ("bfloat16", "zero1", 4, (2, 4, 12 / 4)),
    ],
)
def test_bytes_per_parameter(dtype, optimizer, dp, expected):
    config, step = planned(
        f"run.dtype={dtype}", f"optim.name={optimizer}", f"parallel.dp={dp}", num_ranks=2 * dp
    )
    memory = rank_memory(step, config.optim, 1)
    found = (memory.weights, memory.gradients, memory.optimizer)
    assert found == tuple(memory.parameters * num_bytes for num_bytes in expected)
    assert StateBytes.of(step.work, OptimConfig("zero1", offload=True)).optimizer == 0


FEW_ACTIVATIONS = ["parallel.dp=4", "model.seq_length=4", "num_microbatches=1"]


def memory_of(*overrides):
    """The memory of the last of two pipeline ranks, in four replicas."""
    config, step = planned(*overrides, num_ranks=8)
    return rank_memory(step, config.optim, 1)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_zero1_sums_and_gathers_in_place(dtype, device):
    common = [*FEW_ACTIVATIONS, f"run.dtype={dtype}", f"run.device={device}"]
    replicated = memory_of("optim.name=adamw", *common)
    memory = memory_of("optim.name=zero1", *common)
    assert memory.working == pytest.approx(replicated.working, rel=0.05)


@pytest.mark.parametrize("bucket_mib", [1, 64])
def test_a_step_of_an_offloaded_optimizer_peaks_with_a_bucket_where_passes_keep_little(bucket_mib):
    common = [
        *FEW_ACTIVATIONS,
        "optim.name=zero1",
        "optim.offload=true",
        "run.dtype=bfloat16",
        "model.hidden_size=256",
    ]
    memory = memory_of(*common, f"optim.bucket_mib={bucket_mib}")
    assert memory.activations == 0
    assert 2**20 < 4 * memory.parameters < 64 * 2**20
    assert memory.working == pytest.approx(min(4 * memory.parameters, bucket_mib * 2**20), rel=0.05)


@functools.cache
def drawn():
    """Return steps of odd sizes with every schedule, backend, dtype and device, and more."""
    draw, found = random.Random(5), []
    for index in range(20):
        device, tp = draw.choice((("cpu", 1), ("cpu", 1), ("cuda", 1), ("cuda", 2)))
        vocab = draw.choice(("none", "one_barrier", "two_barrier"))
        zero1 = index % 3 == 0
        words = [
            f"schedule={('1f1b', 'zb_h1', 'v_half', 'interleaved')[index % 4]}",
            f"vocab={vocab}",
            f"vocab.backend={draw.choice(('chunked', 'recompute', 'reference'))}",
            f"vocab.sum_dtype={draw.choice(('float32', 'compute'))}",
            f"run.device={device}",
            f"run.dtype={draw.choice(('bfloat16', 'float32', 'float64'))}",
            f"parallel.tp={tp}",
            f"parallel.recompute={draw.choice(('none', 'selective', 'full'))}",
            f"parallel.offload_activations={draw.choice((0.0, 0.5)) if device == 'cuda' else 0}",
            f"model.activation={draw.choice(('gelu', 'swiglu'))}",
            f"model.positions={draw.choice(('learned', 'rope'))}",
            f"model.tied_embeddings={draw.random() < 0.5}",
            f"model.seq_length={draw.choice((2, 10, 62))}",
            f"model.vocab_size={draw.choice((97, 4_001))}",
            f"model.num_layers={draw.choice((4, 8))}",
            f"num_microbatches={draw.randint(2, 7)}",
            f"micro_batch_size={draw.randint(1, 2)}",
            f"optim.name={'zero1' if zero1 else 'adamw'}",
            f"optim.offload={zero1}",
        ]
        if device == "cuda" and draw.random() < 0.5:
            words += ["run.linear_dtype=float8", "run.dtype=bfloat16"]
        found.append(planned(*words, num_ranks=2 * tp))
    return found


def own_rows(step, rank, end=End.OUTPUT):
    return -(-step.shards[end][rank].num_rows // step.degrees.tp)


def moments(step, optim, rank):
    """Yield the bytes of activations, shards and work whenever one of them may be at its most."""
    work, model, on_cuda = step.work, step.work.model, step.work.device == "cuda"
    item = {"bfloat16": 2, "float32": 4, "float64": 8}[work.dtype]
    precise, tokens = max(4, item), work.micro_batch_size * model.seq_length
    message, rows, root = item * tokens * model.hidden_size, own_rows(step, rank), step.problem.root
    backend, sharded = work.vocab.backend, step.problem.algorithm.sharded
    exponentials = item * tokens * rows * {"chunked": 1, "recompute": 0, "reference": 2}[backend]
    batch = (32 + 48 * (1 + on_cuda)) * tokens * work.num_microbatches
    if rows and backend == "reference":
        batch += 4 * precise * tokens * rows
    elif rows:
        of_chunk = (32 if on_cuda else 6) << 20
        chunk = max(2_048 if on_cuda else 1, of_chunk // (precise * tokens))
        batch += 2 * precise * tokens * model.hidden_size
        if item < precise or backend == "recompute":
            batch += precise * tokens * min(rows, chunk)
        if on_cuda and backend == "recompute":
            batch += item * tokens * rows
    of_layer = shape.layer_matrix_parameters(work.share)
    layers = sum(len(one) for one in step.layers_of_ranks[rank])
    weights = 2 * layers * of_layer * (work.linear_dtype == "float8")
    order, alive, held, sent = step.schedule.ranks[rank], {}, 0, 0
    most = max(
        sum((one.kind is Kind.S) - (one.kind is Kind.T) for one in order[:end])
        for end in range(len(order) + 1)
    )
    pool = 0 if on_cuda else exponentials * most
    layout = step.problem.layout

    def is_hop(stage, other):
        return 0 <= other < layout.num_stages and layout.rank_of(other) != layout.rank_of(stage)

    def sent_by(one):
        """The bytes of a hop, or of a term of a sum that another rank receives."""
        if one.kind is Kind.E and sharded and rank != root(End.INPUT):
            return message * step.shards[End.INPUT][rank].num_rows / model.vocab_size
        if one.kind is Kind.S and sharded and rank != root(End.OUTPUT):
            return message if work.vocab.sum_dtype == "compute" else message // item * precise
        way = {Kind.F: 1, Kind.B: -1, Kind.I: -1}.get(one.kind, 0)
        return message * (way != 0 and is_hop(one.stage, one.stage + way))

    # The host is eight passes ahead of a GPU, of any kinds.
    first = [one for one in order if one.microbatch == 0]
    ahead = math.ceil(8 * sum(map(sent_by, first)) / len(first))
    always = batch + 4 * message + weights + ahead * on_cuda
    yield 0, pool, always
    gradients = precise * rank_parameters(step, rank)
    yield 0, pool, batch + (min(gradients, 64 << 20) if optim.offload else 0)
    offloads = [one for one in step.schedule.offloads if one.item.stage in layout.stages_of(rank)]
    away = {}

    for one in order:
        stage, kind, key = one.stage, one.kind, (one.stage, one.microbatch)
        for offload in offloads:
            if offload.free_before == one:
                away[offload.item] = step.cost.offload_bytes[stage_of(offload)]
        shard = message + (exponentials if on_cuda else 0)
        before, held_before = sum(alive.values()), held
        if kind is Kind.F:
            alive[key] = step.cost.stage_bytes[stage]
        elif kind is Kind.I:
            alive[key] = step.cost.weight_bytes[stage]
        elif kind in (Kind.B, Kind.W):
            del alive[key]
        held += shard * ((kind is Kind.S) - (kind is Kind.T))
        after = sum(alive.values())
        sent += 0 if on_cuda else sent_by(one)
        if kind is Kind.F:
            beside = 2 * message
        elif kind in (Kind.B, Kind.I):
            wide = (4 if on_cuda else 5) if model.activation == "swiglu" else 1 + (kind is Kind.I)
            beside = 2 * message + wide * item * tokens * work.share.ffn_hidden_size
            recompute = step.recompute[stage]
            kept = 0 if recompute == "full" else work.layer_bytes(recompute)
            beside += work.layer_bytes("none") - kept
        elif kind in (Kind.S, Kind.T):
            beside = 2 * precise * tokens * model.hidden_size
        else:
            beside = message
        grown = max(0.0, after - before)
        if kind is Kind.I and grown:  # the last of the layers has kept nothing for W yet
            grown *= 1 - 1 / len(step.layers[stage])
        yield (
            before + grown - sum(away.values()),
            max(held_before, held) + pool,
            always + sent + beside,
        )
        for offload in offloads:
            if offload.reload_after == one:
                del away[offload.item]
        yield after - sum(away.values()), held + pool, always + sent


def stage_of(offload):
    return offload.item.stage


def test_the_peak_of_a_step_is_that_of_a_ledger_of_all_its_passes():
    """The ledger has every tensor that is alive in a pass, and the highest sum of them."""
    kinds, num_moved = set(), 0
    for config, step in drawn():
        for rank in range(2):
            found = step_peak(step, config.optim, rank)
            every = list(moments(step, config.optim, rank))
            highest = max(map(sum, every))
            assert sum(found) == pytest.approx(highest)
            tops = [moment for moment in every if sum(moment) >= highest * (1 - 1e-9)]
            assert any(found == pytest.approx(moment) for moment in tops)
            assert rank_memory(step, config.optim, rank).total == pytest.approx(
                sum(found) + rank_state(step, config.optim, rank).state
            )
            kinds.add((found[0] > 0, found[1] > 0))
        num_moved += len(step.schedule.offloads)
    assert len(kinds) == 4
    assert num_moved > 0


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "v_half"])
def test_graphs_keep_as_much_for_every_microbatch_that_a_stage_ever_has_in_flight(schedule):
    words = [f"schedule={schedule}", "parallel.pp=4", "model.num_layers=8", "num_microbatches=8"]
    config, step = planned(*words, "run.cuda_graphs=true", num_ranks=4)
    _, without = planned(*words, num_ranks=4)
    last = step.problem.stage_kinds[-1]
    of_one = set()
    for rank, order in enumerate(step.schedule.ranks):
        kinds = [
            [item.kind for item in order if item.stage == stage]
            for stage in step.problem.layout.stages_of(rank)
        ]
        in_flight = sum(
            max(found[:stop].count(Kind.F) - found[:stop].count(last) for stop in range(len(found)))
            for found in kinds
        )
        kept, less = (step_peak(one, config.optim, rank)[0] for one in (step, without))
        assert less < kept
        if step.problem.root(End.OUTPUT) != rank:  # it has the final norm, too
            of_one.add(round(kept / in_flight))
    assert len(of_one) == 1


def test_what_stays_between_steps_is_counted_by_hand():
    """Layers, norms and positions on one tensor-parallel rank, and the larger share of the rows."""
    for config, step in drawn():
        model, optim = config.model, config.optim
        item = {"bfloat16": 2, "float32": 4, "float64": 8}[config.run.dtype]
        precise = max(4, item)
        for rank in range(2):
            stages = step.problem.layout.stages_of(rank)
            count = sum(len(step.layers[stage]) for stage in stages)
            count *= shape.layer_parameters(step.work.share)
            last = step.problem.layout.num_stages - 1
            if last in stages:
                count += model.hidden_size
            if 0 in stages and model.positions == "learned":
                count += model.seq_length * model.hidden_size
            rows = [own_rows(step, rank, end) for end in End]
            count += model.hidden_size * (max(rows) if model.tied_embeddings else sum(rows))
            assert rank_parameters(step, rank) == count
            moments_of = 0 if optim.offload else 2 * precise + (precise if item < precise else 0)
            assert rank_state(step, optim, rank).state == count * (item + precise + moments_of)
            there = host_bytes(step, optim, rank)
            assert there.optimizer == (count * (4 * precise + item) if optim.offload else 0)
            assert there.total == there.optimizer + there.activations


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "v_half"])
def test_activations_and_shards_are_those_of_the_simulation(schedule):
    """All memory may peak in a pass with few activations but much working memory."""
    config, step = planned(f"schedule={schedule}", "run.device=cuda", "num_microbatches=12")
    outputs = 4 * 64 * 64  # of a stage, which the executor keeps
    for rank in range(2):
        activations, shards, _ = step_peak(step, config.optim, rank)
        simulated = step.timeline.peak_bytes[rank]
        assert (
            simulated * 0.95
            <= activations + shards
            <= simulated + step.timeline.peak_in_flight[rank] * outputs
        )


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "v_half", "interleaved"])
@pytest.mark.parametrize("vocab", ["none", "one_barrier"])
def test_on_a_cpu_stays_what_the_program_of_a_rank_sends_and_nothing_else(schedule, vocab):
    """Hops, and for a sharded vocabulary what roots on other ranks receive of E and S."""
    _, step = planned(f"schedule={schedule}", f"vocab={vocab}", "model.num_layers=8")
    program = lower(step.schedule, step.problem, step.cost)
    hop = float(step.work.message_bytes)
    for rank, order in enumerate(step.schedule.ranks):
        sent = {op.item for op in program.ranks[rank] if op.action is Action.SEND}
        assert sent
        for item in order:
            found, end = _sent_bytes(item, step, rank), VOCABULARY_ENDS.get(item.kind)
            if end is None or vocab == "none" or rank == step.problem.root(end):
                assert found == hop * (item in sent)
            elif end is End.INPUT:
                assert found == hop / 2, "of the half of the rows that this rank has"
            else:
                assert found == step.work.input_gradient_bytes


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_on_a_gpu_stays_what_the_last_passes_have_sent(monkeypatch, sequence_parallel):
    """A rank between others sends a message in each pass of the steady state of 1F1B."""
    words = ["run.device=cuda", "vocab=none", "parallel.pp=4", "num_microbatches=12"]
    splits = f"parallel.sequence_parallel={sequence_parallel}"
    _, step = planned(*words, "parallel.tp=2", splits, num_ranks=8)
    found = []
    for ahead in (1, 5):
        monkeypatch.setattr(memory_module, "PASSES_AHEAD", ahead)
        found.append(passes_peak(step, 1)[2])
    hop = step.work.message_bytes / (2 if sequence_parallel else 1)
    assert found[1] - found[0] == 4 * hop


@pytest.mark.parametrize("num_microbatches", [8, 32])
def test_what_a_gpu_keeps_does_not_grow_with_microbatches(num_microbatches):
    config, step = planned(
        "run.device=cuda", "vocab=one_barrier", f"num_microbatches={num_microbatches}"
    )
    base, base_step = planned("run.device=cuda", "vocab=one_barrier", "num_microbatches=6")
    for rank in range(2):
        assert step_peak(step, config.optim, rank)[0] == step_peak(base_step, base.optim, rank)[0]


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "model=small",
            "model.vocab_size=8192",
            "parallel.pp=2",
            "model.num_layers=4",
            "num_microbatches=4",
        ],
        [
            "model=small",
            "model.vocab_size=8192",
            "parallel.pp=2",
            "model.num_layers=4",
            "schedule=v_half",
            "vocab=two_barrier",
            "micro_batch_size=2",
            "num_microbatches=4",
        ],
        [
            "model=small",
            "model.vocab_size=8192",
            "parallel.pp=2",
            "model.num_layers=4",
            "schedule=v_half",
            "parallel.recompute=full",
            "micro_batch_size=2",
            "num_microbatches=4",
        ],
        [
            "model=small_qwen",
            "model.vocab_size=8192",
            "parallel.pp=1",
            "model.num_layers=2",
            "parallel.dp=2",
            "optim.name=zero1",
            "run.dtype=bfloat16",
            "num_microbatches=4",
        ],
    ],
    ids=["1f1b", "v_half", "v_half, recomputed", "norms of q and k, bfloat16, zero1"],
)
def test_predicted_bytes_are_what_torch_allocates(overrides, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    sys.modules.pop("plan_memory", None)
    import plan_memory

    monkeypatch.setattr(plan_memory.multiprocessing, "spawn", in_processes)
    rows = list(plan_memory.measured("case", overrides, tmp_path))
    assert rows
    # A step that recomputes keeps so little that messages which are soon gone count more.
    most, of_kept = (0.07, 0.2) if "parallel.recompute=full" in overrides else (0.05, 0.1)
    for row in rows:
        assert row.measured > row.measured_state > 0
        assert abs(row.error) < most
        kept = row.activations + row.vocabulary + row.working
        assert kept == pytest.approx(row.measured - row.state, rel=of_kept)
