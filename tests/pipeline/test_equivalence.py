"""Every schedule with every vocabulary algorithm computes what one unsharded process computes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from schedules.generators import GENERATORS
from tests.local import run_locally
from tests.meshes import mesh_for
from tests.pipeline.compare import Comparison, assert_all_close, largest_difference
from tests.pipeline.truth import Whole, random_batch, random_mask, random_segments, train_whole
from vp_train.assembly import build_rank
from vp_train.config import (
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunSettings,
    ScheduleConfig,
    VocabConfig,
)
from vp_train.optim.adamw import clip_scale, gather_health, learning_rate
from vp_train.plan import make_plan

NUM_STEPS = 3


def config_of(
    p,
    m,
    vocab_size,
    *,
    schedule="1f1b",
    vocab=None,
    tied=False,
    dtype="float64",
    layers=None,
    backend="chunked",
    num_stages=None,
    softcap=None,
    loss=None,
    dp=None,
    tp=1,
    optimizer="adamw",
):
    model = ModelConfig(
        num_layers=(num_stages or p) if layers is None else sum(layers),
        hidden_size=16,
        num_heads=2 * tp,
        num_query_groups=tp,
        ffn_hidden_size=24,
        vocab_size=vocab_size,
        seq_length=6,
        tied_embeddings=tied,
        init_std=0.3,
        logit_softcap=softcap,
    )
    return RunConfig(
        model=model,
        schedule=ScheduleConfig(schedule),
        vocab=replace(vocab or VocabConfig(), backend=backend),
        parallel=ParallelConfig(pp=p, dp=dp, tp=tp, layers_per_stage=layers),
        loss=loss or LossConfig(),
        optim=OptimConfig(optimizer, lr=1e-2, warmup_steps=1, clip_grad_norm=0.5),
        run=RunSettings(dtype=dtype),
        num_microbatches=m,
        micro_batch_size=2,
    )


def as_one_process(config, dp):
    """The same training by one process: of all configurations that differ in layout and schedule alone, the same."""
    return RunConfig(
        model=config.model,
        loss=config.loss,
        optim=replace(config.optim, name="adamw", offload=False),
        run=config.run,
        num_microbatches=dp * config.num_microbatches,
        micro_batch_size=config.micro_batch_size,
    )


def compare(rank, world_size, cases, masked=False, packed=False):
    """Train each config, as planned, sharded and whole; a comparison of loss, gradients and parameters of each."""
    comparisons = []
    for config, plan in cases:
        mesh = mesh_for(plan)
        model = build_rank(config, plan, mesh)

        def health_of(loss, norm, mesh=mesh):
            return gather_health(loss, norm, mesh.world)

        comparisons.append(comparison_of(config, plan, model, mesh.data_rank, health_of, masked=masked, packed=packed))
    return comparisons


def compare_locally(config, plan, masked=False, packed=False, **board):
    """The same with all ranks in this process; each rank's comparison."""
    dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
    train_whole(as_one_process(config, 1), NUM_STEPS, dtype, masked=masked, packed=packed)  # once for all ranks

    def work(rank, model, together):
        return comparison_of(config, plan, model, 0, partial(together.health, rank), masked=masked, packed=packed)

    return run_locally(config, plan, work, **board)


def comparison_of(config, plan, model, data_rank, health_of, *, masked, packed):
    """Compare NUM_STEPS steps of `model`, the model of one rank, with those of one process."""
    m = config.num_microbatches
    dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
    everything = as_one_process(config, plan.degrees.dp)
    mine = slice(data_rank * m, (data_rank + 1) * m)
    truth = train_whole(everything, NUM_STEPS, dtype, masked=masked, packed=packed)
    keeps_gradients = config.optim.name != "zero1"  # which takes them away
    of_each = ("gradient", "parameter") if keeps_gradients else ("parameter",)
    compared = Comparison(frozenset({"loss", *(f"{what} {name}" for what in of_each for name in truth[0][2])}))
    for step, (loss, gradients, updated) in enumerate(truth, start=1):
        model.gradients.zero()
        mask = random_mask(everything, step)[mine] if masked else None
        segments = random_segments(everything, step)[mine] if packed else None
        tokens, labels = (values[mine] for values in random_batch(everything, step))
        ours = model.train_step(tokens, labels, mask=mask, segments=segments)
        model.optimizer.reduce()
        health = health_of(ours if model.answers else None, model.optimizer.squared_norm())
        assert health.culprits == (), (step, health)
        compared.add("loss", health.loss, loss)
        for name, parameter in model.parameters.items():
            assert keeps_gradients == (parameter.grad is not None), name
            if keeps_gradients:
                compared.add(f"gradient {name}", parameter.grad, part_of(gradients[name], name, model.splits))
        rate = learning_rate(config.optim, step, NUM_STEPS)
        model.optimizer.step(rate, clip_scale(health.grad_norm, config.optim.clip_grad_norm))
        model.optimizer.settle()
        for name, parameter in model.parameters.items():
            compared.add(f"parameter {name}", parameter.detach(), part_of(updated[name], name, model.splits))
    return compared


def part_of(tensor, name, splits):
    return splits[name].part(tensor) if name in splits else tensor


def assert_equivalent(ranks, p, configs, tolerance, *, masked=False, packed=False):
    """Over gloo, between processes."""
    cases = [(config, make_plan(config, p)) for config in configs]
    results = ranks(p).run(compare, cases, masked, packed, timeout=100)
    for config, *comparisons in zip(configs, *results, strict=True):
        assert_all_close(comparisons, tolerance, config.vocab, config.schedule, config.model)


def assert_equivalent_locally(p, configs, tolerance, *, masked=False, packed=False):
    """With all ranks in this process."""
    for config in configs:
        comparisons = compare_locally(config, make_plan(config, p), masked, packed)
        assert_all_close(comparisons, tolerance, config.vocab, config.schedule, config.model)


SIZES = [(1, 1, 64), (2, 4, 100), (3, 2, 101), (4, 8, 1000)]
ALGORITHMS = ["none", "naive", "one_barrier", "two_barrier"]


@pytest.mark.parametrize(("p", "m", "vocab_size"), SIZES)
def test_equals_one_process_in_float64(ranks, p, m, vocab_size):
    configs = [
        config_of(p, m, vocab_size, vocab=VocabConfig(algorithm), tied=tied)
        for algorithm in ALGORITHMS
        for tied in (False, True)
    ]
    assert_equivalent(ranks, p, configs, 1e-9)


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_every_schedule_equals_one_process(name, p):
    stages = GENERATORS[name].layout_of(p).num_stages
    configs = [
        config_of(p, m, 101, schedule=name, vocab=VocabConfig(algorithm), tied=tied, num_stages=stages)
        for m in (1, 2, 8)
        for algorithm in ("none", "one_barrier", "two_barrier")
        for tied in (False, True)
    ]
    assert_equivalent_locally(p, configs, 1e-9)


def test_a_solved_schedule_and_recomputation_equal_one_process():
    config = config_of(3, 4, 101, num_stages=6)
    solved = replace(config, schedule=ScheduleConfig("auto", cap_microbatches=4.5))
    mixed = ("full", "none", "selective", "full", "selective", "none")
    recomputed = [
        replace(config_of(3, 4, 101, schedule="v_half", num_stages=6), parallel=ParallelConfig(**options))
        for options in ({"recompute": "full"}, {"recompute": "selective"}, {"recompute_per_stage": mixed})
    ]
    assert_equivalent_locally(3, [solved, *recomputed], 1e-9)


def attention_forwards(rank, world_size, config):
    """Forwards of the attention of each of this rank's stages in a step."""
    plan = make_plan(config, world_size)
    model = build_rank(config, plan, mesh_for(plan))
    counts = dict.fromkeys(model.stages, 0)

    def counting(stage):
        def count(*_):
            counts[stage] += 1

        return count

    for number, stage in model.stages.items():
        for layer in stage.layers.values():
            layer.layer.self_attention.core_attention.register_forward_hook(counting(number))
    model.train_step(*random_batch(config, 1))
    return counts


@pytest.mark.parametrize("schedule", ["interleaved", "v_half"])
def test_each_stage_recomputes_what_it_is_told(ranks, schedule):
    config = config_of(2, 3, 101, schedule=schedule, num_stages=4)
    told = ("full", "none", "none", "selective")
    config = replace(config, parallel=replace(config.parallel, recompute_per_stage=told))
    found = {stage: count for counts in ranks(2).run(attention_forwards, config) for stage, count in counts.items()}
    assert found == {stage: 3 if recompute == "none" else 6 for stage, recompute in enumerate(told)}


def summed_early(rank, world_size, config):
    """The parameters whose sums over the replicas have begun when the step of the executor ends."""
    plan = make_plan(config, world_size)
    model = build_rank(config, plan, mesh_for(plan))
    begun, ready = set(), model.optimizer.ready
    model.optimizer.ready = lambda names: (begun.update(names), ready(names))
    model.train_step(*random_batch(config, 1))
    missing = model.parameters.keys() - begun
    model.optimizer.reduce()
    return missing


@pytest.mark.parametrize("optimizer", ["adamw", "zero1"])
def test_gradients_are_summed_over_the_replicas_while_others_compute(ranks, optimizer):
    config = config_of(2, 3, 101, dp=2, schedule="zb_h1", optimizer=optimizer)
    assert ranks(4).run(summed_early, config) == [set()] * 4


def test_unequal_shards_and_stages_equal_one_process():
    configs = [
        config_of(3, 4, 101, vocab=VocabConfig(algorithm, shards=(0, 90, 11)), layers=(2, 2, 0), backend=backend)
        for algorithm in ("naive", "one_barrier", "two_barrier")
        for backend in ("reference", "chunked", "recompute")
    ]
    assert_equivalent_locally(3, configs, 1e-9)


def test_ranks_without_rows_equal_one_process():
    """T takes no time there, and may come before the barrier that continues C1."""
    configs = [
        config_of(4, 3, 101, vocab=VocabConfig(algorithm, shards=(0, 101, 0, 0)))
        for algorithm in ("naive", "one_barrier", "two_barrier")
    ]
    assert_equivalent_locally(4, configs, 1e-9)


LOSSES = [
    {"loss": LossConfig(label_smoothing=0.1, z_loss=0.01)},
    {"loss": LossConfig(z_loss=0.01, normalisation="sequence"), "softcap": 3.0},
    {"loss": LossConfig(label_smoothing=0.1, normalisation="sequence"), "tied": True},
]


@pytest.mark.parametrize("masked", [False, True])
def test_loss_options_and_masks_equal_one_process(masked):
    configs = [config_of(3, 4, 101, vocab=VocabConfig(algorithm), **options) for algorithm in ALGORITHMS for options in LOSSES]
    assert_equivalent_locally(3, configs, 1e-9, masked=masked)


def test_packed_documents_equal_documents_that_run_alone():
    """In one process each document starts at position 0 and is attended to by itself; masks and recomputation included."""
    plain = [
        config_of(2, 4, 101, schedule=name, num_stages=stages) for name, stages in (("1f1b", 2), ("zb_h1", 2), ("v_half", 4))
    ]
    recomputed = [replace(config, parallel=replace(config.parallel, recompute="full")) for config in plain]
    undivided = config_of(2, 3, 101, vocab=VocabConfig("none"), loss=LossConfig(normalisation="sequence"))
    assert_equivalent_locally(2, [*plain, *recomputed, undivided], 1e-9, packed=True)
    assert_equivalent_locally(2, [plain[1], recomputed[1]], 1e-9, masked=True, packed=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_smaller_than_the_ranks_equals_one_process(tied):
    configs = [config_of(4, 3, size, vocab=VocabConfig(algorithm), tied=tied) for algorithm in ALGORITHMS for size in (2, 3)]
    assert_equivalent_locally(4, configs, 1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "zero1"])
@pytest.mark.parametrize(("dp", "p", "tp"), [(1, 2, 2), (2, 2, 1), (2, 2, 2), (1, 3, 1), (4, 1, 1)])
def test_data_tensor_and_pipeline_parallel_equal_one_process(ranks, dp, p, tp, optimizer):
    configs = [
        config_of(p, 3, 101, schedule=schedule, vocab=VocabConfig(algorithm), num_stages=2 * p, tied=tied, **more)
        for schedule in ("1f1b", "v_half")
        for algorithm in ("none", "one_barrier")
        for tied in (False, True)
        for more in ({"dp": dp, "tp": tp, "optimizer": optimizer},)
    ]
    assert_equivalent(ranks, dp * p * tp, configs, 1e-9)


@pytest.mark.parametrize(("dp", "p"), [(2, 1), (2, 2)])
def test_an_optimizer_in_host_memory_equals_one_process(ranks, dp, p):
    config = config_of(p, 3, 101, num_stages=2, dp=dp, optimizer="zero1")
    config = replace(config, optim=replace(config.optim, offload=True))
    assert_equivalent(ranks, dp * p, [config], 1e-9)


def test_float32_stays_within_1e_4():
    configs = [config_of(2, 4, 100, vocab=VocabConfig(algorithm), dtype="float32") for algorithm in ALGORITHMS]
    assert_equivalent_locally(2, configs, 1e-4)


def evaluate(rank, world_size, config):
    plan = make_plan(config, world_size)
    model = build_rank(config, plan, mesh_for(plan))
    batch = random_batch(config, 0)
    trained = model.train_step(*batch)
    before = [p.grad.clone() for p in model.parameters.values() if p.grad is not None]
    evaluated = model.evaluator.step(*batch)
    unchanged = all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters.values(), strict=True))
    return (None if trained is None else trained.item(), None if evaluated is None else evaluated.item(), unchanged)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluation_gives_the_training_loss_and_touches_no_gradient(ranks, algorithm):
    config = config_of(3, 5, 101, vocab=VocabConfig(algorithm))
    config = replace(config, run=replace(config.run, eval_microbatches=5))
    results = ranks(3).run(evaluate, config)
    assert any(trained is not None for trained, *_ in results)
    for trained, evaluated, unchanged in results:
        assert (trained is None) == (evaluated is None)
        assert trained is None or trained == pytest.approx(evaluated, rel=1e-12)
        assert unchanged


def rows_recomputed(rank, world_size, config):
    plan = make_plan(config, world_size)
    return build_rank(config, plan, mesh_for(plan)).output_layer.backend._first_kept


def test_every_rank_recomputes_its_fraction_of_the_rows(ranks):
    config = config_of(2, 1, 100, vocab=VocabConfig(backend="recompute", recompute_fraction=0.3), backend="recompute")
    assert ranks(2).run(rows_recomputed, config) == [15, 15]


def logprobs(rank, world_size, config):
    plan = make_plan(config, world_size)
    mesh = mesh_for(plan)
    tokens, labels = random_batch(config, 0)
    ours = build_rank(config, plan, mesh).evaluator.logprobs(tokens, labels)
    with torch.no_grad():
        all_of_them = torch.log_softmax(Whole(config, torch.float64).logits(tokens.flatten(0, 1)), -1).view(*tokens.shape, -1)
    theirs = all_of_them.gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels == -100, 0.0)
    return None if ours is None else largest_difference(ours, theirs)


def test_logprobs_are_those_of_one_process_whatever_the_loss(ranks):
    config = config_of(3, 5, 101, loss=LossConfig(z_loss=0.1, normalisation="sequence"), softcap=2.0)
    config = replace(config, run=replace(config.run, eval_microbatches=5))
    differences = ranks(3).run(logprobs, config)
    assert all(difference < 1e-12 for difference in differences), differences


def compare_split_sequences(rank, world_size, cases):
    """`compare`, with megatron's exchange of sequence parts on CPUs: it allocates on the current CUDA device."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    return compare(rank, world_size, cases)


@pytest.mark.parametrize(("dp", "p", "tp"), [(1, 2, 2), (2, 1, 2)])
def test_split_sequences_equal_one_process(ranks, monkeypatch, dp, p, tp):
    monkeypatch.setattr("vp_train.plan.SEQUENCE_DEVICES", ("cpu",))
    base = config_of(p, 3, 101, num_stages=2 * p, dp=dp, tp=tp)
    families = [
        {},
        {"qk_norm": True, "post_norms": True, "logit_softcap": 3.0, "embedding_scale": True},
        {"normalisation": "layernorm", "activation": "gelu", "linear_bias": True, "positions": "learned"},
    ]
    configs = [
        replace(
            base,
            model=replace(base.model, **family),
            schedule=ScheduleConfig(schedule),
            parallel=replace(base.parallel, sequence_parallel=True, recompute=recompute),
        )
        for family in families
        for schedule, recompute in (("1f1b", "none"), ("zb_v", "selective"), ("v_half", "full"))
    ]
    cases = [(config, make_plan(config, dp * p * tp)) for config in configs]
    results = ranks(dp * p * tp).run(compare_split_sequences, cases, timeout=100)
    for config, *comparisons in zip(configs, *results, strict=True):
        assert_all_close(comparisons, 1e-9, config.model, config.schedule)
