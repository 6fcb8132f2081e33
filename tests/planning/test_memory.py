"""The predicted bytes of all ranks add up to the model, and are what torch allocates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from schedules.ir import Kind
from schedules.lower import Action, lower
from schedules.vocab import End
from tests.ranks import in_processes
from vp_train.config import ConfigError, OptimConfig
from vp_train.model import shape
from vp_train.planning.memory import (
    StateBytes,
    _most_held,
    _unsent_bytes,
    check_machine,
    rank_memory,
    rank_parameters,
    step_peak,
)
from vp_train.planning.plan import plan_step
from vp_train.settings import load_config

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


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_machine_without_room_for_the_state_of_all_ranks_is_refused(replicas):
    config, step = planned(f"parallel.dp={replicas}", num_ranks=2 * replicas)
    bytes_of_parameter = 4 + 4 + 8  # float32 with two moments
    needed = bytes_of_parameter * shape.num_parameters(config.model) * replicas
    check_machine(step, config.optim, needed)
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
            found, end = _unsent_bytes(item, step, rank), VOCABULARY_ENDS.get(item.kind)
            if end is None or vocab == "none" or rank == step.problem.root(end):
                assert found == hop * (item in sent)
            elif end is End.INPUT:
                assert found == hop / 2, "of the half of the rows that this rank has"
            else:
                assert found == step.work.input_gradient_bytes


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
    ids=["1f1b", "v_half", "norms of q and k, bfloat16, zero1"],
)
def test_predicted_bytes_are_what_torch_allocates(overrides, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    sys.modules.pop("plan_memory", None)
    import plan_memory

    monkeypatch.setattr(plan_memory.multiprocessing, "spawn", in_processes)
    rows = list(plan_memory.measured("case", overrides, tmp_path))
    assert rows
    for row in rows:
        assert row.measured > row.measured_state > 0
        assert abs(row.error) < 0.05
        kept = row.activations + row.vocabulary + row.working
        assert kept == pytest.approx(row.measured - row.state, rel=0.1)
