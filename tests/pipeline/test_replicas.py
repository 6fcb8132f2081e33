"""Gradients are summed over replicas layer by layer beside passes, and gathers end before reads."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.meshes import mesh_for
from tests.pipeline.equivalence import config_of
from tests.pipeline.truth import random_batch
from vp_train.assembly import build_rank
from vp_train.config import LossConfig, OptimConfig, VocabConfig
from vp_train.optim.adamw import gather_health
from vp_train.optim.replicas import Replicas
from vp_train.planning.plan import make_plan


def announced(rank, world_size, config):
    """Return the names in each call of `ready`, the units of each stage, and all parameters."""
    plan = make_plan(config, world_size)
    model = build_rank(config, plan, mesh_for(plan))
    calls, ready = [], model.optimizer.ready
    model.optimizer.ready = lambda names: (calls.append(tuple(names)), ready(names))
    for step in (1, 2):
        calls.clear()
        model.gradients.zero()
        model.train_step(*random_batch(config, step))
        model.optimizer.reduce()
    return (
        [names for names in calls if names],
        [stage.units for stage in model.stages.values()],
        set(model.parameters),
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "v_half"])
def test_layers_are_announced_one_by_one_the_last_first(ranks, schedule):
    config = config_of(
        2,
        3,
        101,
        dp=2,
        schedule=schedule,
        num_stages=4 if schedule == "v_half" else 2,
        layers=(2, 3),
    )
    if schedule == "v_half":
        config = replace(config, parallel=replace(config.parallel, layers_per_stage=(2, 1, 1, 2)))
        config = replace(config, model=replace(config.model, num_layers=6))
    results = ranks(4).run(announced, config)
    for calls, stages, parameters in results:
        for units in stages:
            assert [names for names in calls if names in units] == list(units)
        assert sorted(name for names in calls for name in names) == sorted(parameters), "each once"
    for other in (0, 1):
        assert results[other][0] == results[other + 2][0], "in the same order in all replicas"


class _Late:
    """A gather whose values are NaN until `wait`."""

    def __init__(self, pending, values):
        pending.wait()
        self._values, self._gathered = values, values.clone()
        values.fill_(torch.nan)

    def wait(self):
        self._values.copy_(self._gathered)


def losses(rank, world_size, config):
    """Return losses of three steps and their evaluations, and the parameters of a checkpoint.

    Every gather is late.
    """
    plan = make_plan(config, world_size)
    mesh = mesh_for(plan)
    model = build_rank(config, plan, mesh)
    gather, found = Replicas.gather, []
    Replicas.gather = lambda self, values: _Late(gather(self, values), values)
    try:
        for step in (1, 2, 3):
            model.gradients.zero()
            loss = model.train_step(*random_batch(config, step))
            model.optimizer.reduce()
            health = gather_health(
                loss if model.reports_loss else None, model.optimizer.squared_norm(), mesh.world
            )
            model.optimizer.step(0.01, 1.0)
            loss = model.evaluator.step(*random_batch(config, 4)) if step > 1 else None
            evaluated = gather_health(loss if model.reports_loss else None, None, mesh.world)
            found += [health.loss, health.grad_norm, evaluated.loss]
        state = model.optimizer.state()
        model.optimizer.settle()
    finally:
        Replicas.gather = gather
    kept = [value.clone() for value in state["parameter"].values()]
    return found, kept, [parameter.detach().clone() for parameter in model.parameters.values()]


@pytest.mark.parametrize(
    ("algorithm", "tied"), [("none", True), ("one_barrier", False), ("two_barrier", True)]
)
@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_no_pass_reads_a_parameter_before_it_was_gathered(ranks, schedule, algorithm, tied):
    config = config_of(
        2,
        3,
        101,
        dp=2,
        schedule=schedule,
        vocab=VocabConfig(algorithm),
        tied=tied,
        num_stages=4,
        loss=LossConfig(label_smoothing=0.1, z_loss=0.1),
        optimizer="zero1",
    )
    config = replace(config, run=replace(config.run, eval_microbatches=6))
    config = replace(config, optim=OptimConfig("zero1", bucket_mib=1))
    for found, kept, trained in ranks(4).run(losses, config):
        assert all(map(math.isfinite, found))
        assert all(value.isfinite().all() for value in (*kept, *trained))


def joins_the_replicas_before_the_first_pass(rank, world_size, config):
    """Return the data-parallel collectives of a step before its first `need` of parameters."""
    plan = make_plan(config, world_size)
    mesh = mesh_for(plan)
    model = build_rank(config, plan, mesh)
    calls, needed = [], []
    need = model.optimizer.need
    model.optimizer.need = lambda names: (needed.append(names), need(names))
    restored = {
        name: getattr(dist, name)
        for name in ("all_reduce", "all_gather", "broadcast", "reduce", "barrier")
    }
    for name, collective in restored.items():

        def noted(*arguments, name=name, collective=collective, group=None, **options):
            if group is mesh.data and not needed:
                calls.append(name)
            return collective(*arguments, group=group, **options)

        setattr(dist, name, noted)
    try:
        model.train_step(*random_batch(config, 1))
    finally:
        for name, collective in restored.items():
            setattr(dist, name, collective)
    model.optimizer.reduce()
    return calls, len(needed) > 0


def test_a_step_does_not_queue_behind_parameters_that_are_still_gathered(ranks):
    """All collectives of one data-parallel group run in the order of issue."""
    config = config_of(2, 3, 101, dp=2, optimizer="zero1")
    assert ranks(4).run(joins_the_replicas_before_the_first_pass, config) == [([], True)] * 4


class _Summed:
    """A sum over replicas that is done."""

    def wait(self):
        pass


def copies_of_a_tied_matrix(rank, world_size, config):
    """Return the tied matrix of this rank after a step, None if it has none.

    The replicas of each pipeline rank begin their sums with another replica, as rings of NCCL may.
    """
    plan = make_plan(config, world_size)
    mesh = mesh_for(plan)
    model = build_rank(config, plan, mesh)

    def in_an_order_of_its_own(replicas, values):
        terms = [torch.empty_like(values) for _ in range(replicas.size)]
        dist.all_gather(terms, values.clone(), group=replicas.group)
        first = mesh.pipeline_rank
        values.copy_(sum(terms[first + 1 :] + terms[:first], start=terms[first]))
        return _Summed()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replicas, "sum", in_an_order_of_its_own)
        patch.setattr(Replicas, "scatter_sum", in_an_order_of_its_own)
        model.gradients.zero()
        model.train_step(*random_batch(config, 1 + mesh.data_rank))
        model.optimizer.reduce()
    model.optimizer.step(0.01, 1.0)
    model.optimizer.settle()
    return model.parameters.get("embedding.weight")


def test_copies_of_a_tied_matrix_stay_the_same_bits_in_whatever_order_replicas_sum(ranks):
    plain = config_of(2, 3, 101, dp=3, vocab=VocabConfig("none"), tied=True, dtype="float32")
    found = {}
    for optim in (
        OptimConfig("adamw"),
        OptimConfig("zero1"),
        OptimConfig("zero1", offload=True),
    ):
        copies = ranks(6).run(copies_of_a_tied_matrix, replace(plain, optim=optim))
        assert all(torch.equal(copy, copies[0]) for copy in copies)
        found[optim] = copies[0]
    first, *others = found.values()
    assert all(torch.allclose(first, other, atol=1e-4) for other in others)
