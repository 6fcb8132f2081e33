"""Compare the training of ranks with that of one process, for all layouts and schedules."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from schedules.vocab import VOCAB_ALGORITHMS
from tests.local import run_locally
from tests.meshes import mesh_for
from tests.pipeline.compare import Comparison, assert_all_close
from tests.pipeline.truth import random_batch, random_mask, random_segments, train_whole
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
from vp_train.planning.plan import make_plan

NUM_STEPS = 2  # the second one begins with updated weights and moments


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
        run=RunSettings(dtype=dtype, eval_microbatches=1),
        num_microbatches=m,
        micro_batch_size=2,
    )


def as_one_process(config, dp):
    """Return the config of the same training in one process.

    Configs that differ only in layout or schedule have the same result.
    """
    return RunConfig(
        model=config.model,
        loss=config.loss,
        optim=replace(config.optim, name="adamw", offload=False),
        run=config.run,
        num_microbatches=dp * config.num_microbatches,
        micro_batch_size=config.micro_batch_size,
    )


def compare(rank, world_size, cases, masked=False, packed=False):
    """Train each config; return comparisons of loss, gradients and parameters with one process."""
    comparisons = []
    for config, plan, truth in cases:
        mesh = mesh_for(plan)
        model = build_rank(config, plan, mesh)

        def health_of(loss, norm, mesh=mesh):
            return gather_health(loss, norm, mesh.world)

        arguments = (config, plan, model, mesh.data_rank, as_tensors(truth), health_of)
        comparisons.append(comparison_of(*arguments, masked=masked, packed=packed))
    return comparisons


def compare_locally(config, plan, masked=False, packed=False, **board):
    """Do what `compare` does for one config, with all ranks in this process."""
    truth = truth_of(config, 1, masked=masked, packed=packed)

    def work(rank, model, together):
        return comparison_of(
            config,
            plan,
            model,
            0,
            truth,
            partial(together.health, rank),
            masked=masked,
            packed=packed,
        )

    return run_locally(config, plan, work, **board)


def truth_of(config, dp, *, masked=False, packed=False):
    """Return NUM_STEPS steps of `dp` replicas of `config`, computed by one process."""
    dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
    return train_whole(as_one_process(config, dp), NUM_STEPS, dtype, masked=masked, packed=packed)


def as_arrays(truth):
    """Return the steps with arrays, which can be sent to processes without shared memory."""
    return [
        (loss, *({name: tensor.numpy() for name, tensor in named.items()} for named in values))
        for loss, *values in truth
    ]


def as_tensors(truth):
    """Return the steps of `as_arrays` with tensors again."""
    tensor = torch.from_numpy
    return [
        (loss, *({name: tensor(array) for name, array in named.items()} for named in values))
        for loss, *values in truth
    ]


def comparison_of(config, plan, model, data_rank, truth, health_of, *, masked, packed):
    """Compare the steps of `model`, the model of one rank, with the `truth` of one process."""
    m = config.num_microbatches
    whole = as_one_process(config, plan.degrees.dp)
    own = slice(data_rank * m, (data_rank + 1) * m)
    keeps_gradients = config.optim.name != "zero1"  # ZeRO-1 has only its part of the gradients
    kinds = ("gradient", "parameter") if keeps_gradients else ("parameter",)
    compared = Comparison(
        frozenset({"loss", *(f"{kind} {name}" for kind in kinds for name in truth[0][2])})
    )
    for step, (loss, gradients, updated) in enumerate(truth, start=1):
        model.gradients.zero()
        mask = random_mask(whole, step)[own] if masked else None
        segments = random_segments(whole, step)[own] if packed else None
        tokens, labels = (values[own] for values in random_batch(whole, step))
        ours = model.train_step(tokens, labels, mask=mask, segments=segments)
        model.optimizer.reduce()
        health = health_of(ours if model.reports_loss else None, model.optimizer.squared_norm())
        assert health.culprits == (), (step, health)
        compared.add("loss", health.loss, loss)
        for name, parameter in model.parameters.items():
            assert keeps_gradients == (parameter.grad is not None), name
            if keeps_gradients:
                compared.add(
                    f"gradient {name}", parameter.grad, part_of(gradients[name], name, model.splits)
                )
        rate = learning_rate(config.optim, step, NUM_STEPS)
        model.optimizer.step(rate, clip_scale(health.grad_norm, config.optim.clip_grad_norm))
        model.optimizer.settle()
        for name, parameter in model.parameters.items():
            compared.add(
                f"parameter {name}", parameter.detach(), part_of(updated[name], name, model.splits)
            )
    return compared


def part_of(tensor, name, splits):
    return splits[name].part(tensor) if name in splits else tensor


def assert_equivalent(
    ranks, p, configs, tolerance, *, masked=False, packed=False, function=compare
):
    """Assert that `p` processes over gloo compute what one process does, for each config."""
    cases = []
    for config in configs:
        plan = make_plan(config, p)
        cases.append(
            (
                config,
                plan,
                as_arrays(truth_of(config, plan.degrees.dp, masked=masked, packed=packed)),
            )
        )
    results = ranks(p).run(function, cases, masked, packed, timeout=100)
    for config, *comparisons in zip(configs, *results, strict=True):
        assert_all_close(comparisons, tolerance, config.vocab, config.schedule, config.model)


def assert_equivalent_locally(p, configs, tolerance, *, masked=False, packed=False):
    """Assert that `p` ranks in this process compute what one process does, for each config."""
    for config in configs:
        comparisons = compare_locally(config, make_plan(config, p), masked, packed)
        assert_all_close(comparisons, tolerance, config.vocab, config.schedule, config.model)


ALGORITHMS = list(VOCAB_ALGORITHMS)
SHARDED = [name for name, algorithm in VOCAB_ALGORITHMS.items() if algorithm.sharded]
