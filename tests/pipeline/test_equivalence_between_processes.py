"""Processes compute what one unsharded process does, with data, tensor and pipeline parallelism."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.meshes import mesh_for
from tests.pipeline.compare import largest_difference
from tests.pipeline.equivalence import ALGORITHMS, assert_equivalent, compare, config_of
from tests.pipeline.truth import Whole, random_batch
from vp_train.assembly import build_rank
from vp_train.config import LossConfig, ScheduleConfig, VocabConfig
from vp_train.planning.plan import make_plan

pytestmark = pytest.mark.usefixtures("unrefined")
SIZES = [(1, 1, 64), (2, 4, 100), (3, 2, 101), (4, 8, 1000)]


@pytest.mark.parametrize(("p", "m", "vocab_size"), SIZES)
def test_equals_one_process_in_float64(ranks, p, m, vocab_size):
    """Matrices are tied in every other case; with one rank more, in the other half of them."""
    configs = [
        config_of(p, m, vocab_size, vocab=VocabConfig(algorithm), tied=(i + p) % 2 == 1)
        for i, algorithm in enumerate(ALGORITHMS)
    ]
    assert_equivalent(ranks, p, configs, 1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "zero1"])
@pytest.mark.parametrize(("dp", "p", "tp"), [(1, 2, 2), (2, 2, 1), (2, 2, 2), (1, 3, 1), (4, 1, 1)])
def test_data_tensor_and_pipeline_parallel_equal_one_process(ranks, dp, p, tp, optimizer):
    """Both schedules run with both algorithms, on each layout each pair with one optimizer.

    Matrices are tied in half of the cases, in the other half with one stage more.  On eight ranks
    each optimizer has one of the schedules, with one_barrier.
    """
    more = {"num_stages": 2 * p, "dp": dp, "tp": tp, "optimizer": optimizer}
    half = optimizer == "zero1"
    configs = [
        config_of(
            p,
            3,
            101,
            schedule=schedule,
            vocab=VocabConfig(("none", "one_barrier")[(i + half + (dp * p * tp == 8)) % 2]),
            tied=(i + p) % 2 == 1,
            **more,
        )
        for i, schedule in enumerate(("1f1b", "v_half"))
        if dp * p * tp < 8 or i == half
    ]
    assert_equivalent(ranks, dp * p * tp, configs, 1e-9)


def test_replicas_that_offload_activations_equal_one_process(ranks):
    configs = [
        config_of(2, 4, 101, schedule=schedule, num_stages=4, dp=2, optimizer=optimizer)
        for schedule, optimizer in (("1f1b", "adamw"), ("interleaved", "zero1"))
    ]
    configs = [
        replace(config, parallel=replace(config.parallel, offload_activations=1.0))
        for config in configs
    ]
    assert all(make_plan(config, 4).schedule.offloads for config in configs)
    assert_equivalent(ranks, 4, configs, 1e-9)


@pytest.mark.parametrize(("dp", "p"), [(2, 1), (2, 2)])
def test_an_optimizer_in_host_memory_equals_one_process(ranks, dp, p):
    config = config_of(p, 3, 101, num_stages=2, dp=dp, optimizer="zero1")
    config = replace(config, optim=replace(config.optim, offload=True))
    assert_equivalent(ranks, dp * p, [config], 1e-9)


def attention_forwards(rank, world_size, config):
    """Return how often the attention of each of this rank's stages runs forward in a step."""
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
def test_each_stage_recomputes_what_its_setting_says(ranks, schedule):
    config = config_of(2, 3, 101, schedule=schedule, num_stages=4)
    modes = ("full", "none", "none", "selective")
    config = replace(config, parallel=replace(config.parallel, recompute_per_stage=modes))
    found = {
        stage: count
        for counts in ranks(2).run(attention_forwards, config)
        for stage, count in counts.items()
    }
    assert found == {
        stage: 3 if recompute == "none" else 6 for stage, recompute in enumerate(modes)
    }


def summed_early(rank, world_size, config):
    """Return the parameters whose sums over replicas have begun when the executor's step ends."""
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


def evaluate(rank, world_size, config):
    plan = make_plan(config, world_size)
    model = build_rank(config, plan, mesh_for(plan))
    batch = random_batch(config, 0)
    trained = model.train_step(*batch)
    before = [p.grad.clone() for p in model.parameters.values() if p.grad is not None]
    evaluated = model.evaluator.step(*batch)
    unchanged = all(
        torch.equal(a, p.grad) for a, p in zip(before, model.parameters.values(), strict=True)
    )
    return (
        None if trained is None else trained.item(),
        None if evaluated is None else evaluated.item(),
        unchanged,
    )


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
    config = config_of(
        2,
        1,
        100,
        vocab=VocabConfig(backend="recompute", recompute_fraction=0.3),
        backend="recompute",
    )
    assert ranks(2).run(rows_recomputed, config) == [15, 15]


def logprobs(rank, world_size, config):
    plan = make_plan(config, world_size)
    mesh = mesh_for(plan)
    tokens, labels = random_batch(config, 0)
    ours = build_rank(config, plan, mesh).evaluator.logprobs(tokens, labels)
    with torch.no_grad():
        all_of_them = torch.log_softmax(
            Whole(config, torch.float64).logits(tokens.flatten(0, 1)), -1
        ).view(*tokens.shape, -1)
    theirs = all_of_them.gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(
        labels == -100, 0.0
    )
    return None if ours is None else largest_difference(ours, theirs)


def test_logprobs_are_those_of_one_process_whatever_the_loss(ranks):
    config = config_of(
        3, 5, 101, loss=LossConfig(z_loss=0.1, normalisation="sequence"), softcap=2.0
    )
    config = replace(config, run=replace(config.run, eval_microbatches=5))
    differences = ranks(3).run(logprobs, config)
    assert all(difference < 1e-12 for difference in differences), differences


def compare_split_sequences(rank, world_size, *arguments):
    """Run `compare` with megatron's sequence parallelism on CPUs.

    Megatron allocates on the current CUDA device, which this replaces by the CPU.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")
    return compare(rank, world_size, *arguments)


@pytest.mark.parametrize(("dp", "p", "tp"), [(1, 2, 2), (2, 1, 2)])
def test_split_sequences_equal_one_process(ranks, monkeypatch, dp, p, tp):
    """Every pair of family and schedule occurs in one of the two layouts.

    Two thirds of them have their activations in host memory.
    """
    monkeypatch.setattr("vp_train.planning.plan.SEQUENCE_DEVICES", ("cpu",))
    base = config_of(p, 3, 101, num_stages=2 * p, dp=dp, tp=tp)
    families = [
        {},
        {"qk_norm": True, "post_norms": True, "logit_softcap": 3.0, "embedding_scale": True},
        {
            "normalisation": "layernorm",
            "activation": "gelu",
            "linear_bias": True,
            "positions": "learned",
        },
    ]
    schedules = (("1f1b", "none"), ("zb_v", "selective"), ("v_half", "full"))
    configs = [
        replace(
            base,
            model=replace(base.model, **family),
            schedule=ScheduleConfig(schedule),
            parallel=replace(
                base.parallel,
                sequence_parallel=True,
                recompute=recompute,
                offload_activations=float(i != j),
            ),
        )
        for i, family in enumerate(families)
        for j, (schedule, recompute) in enumerate(schedules)
        if (i + j + dp) % 2
    ]
    assert_equivalent(ranks, dp * p * tp, configs, 1e-9, function=compare_split_sequences)
