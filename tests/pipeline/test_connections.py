"""Before step 1 every communicator runs each collective that it runs in steps and evaluations."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.meshes import mesh_for
from tests.pipeline.equivalence import config_of
from tests.pipeline.truth import random_batch
from vp_train.assembly import build_rank
from vp_train.communication.communicators import (
    CONTROL_PURPOSES,
    NCCL,
    Purpose,
    plan_groups,
)
from vp_train.config import VocabConfig
from vp_train.mesh import _warm_up
from vp_train.planning.plan import make_plan

OPERATIONS = (
    "all_reduce",
    "all_gather_single",
    "reduce_scatter_single",
    "broadcast",
    "reduce",
    "all_to_all_single",
)


@contextmanager
def recorded():
    """Yield what gets the purpose and name of every collective, of messages of pairs the peers."""
    found, before = set(), {name: getattr(dist, name) for name in OPERATIONS}

    def record(name, *arguments, group, **named):
        if name == "all_to_all_single":
            for sends, counts in zip((False, True), arguments[2:4], strict=True):
                found.update((group.group_desc, sends, peer) for peer, n in enumerate(counts) if n)
        else:
            found.add((group.group_desc, name))
        return before[name](*arguments, group=group, **named)

    for name in OPERATIONS:
        setattr(dist, name, lambda *a, _name=name, **named: record(_name, *a, **named))
    try:
        yield found
    finally:
        for name, operation in before.items():
            setattr(dist, name, operation)


def connections(rank, num_ranks, config):
    """Return what a step and an evaluation run, and what the warm-up has run before."""
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    skipped = (*CONTROL_PURPOSES, Purpose.HOPS)
    groups = {group.group_desc: group for group in mesh.made}
    own = [
        (replace(spec, backend=NCCL), groups[spec.purpose])
        for spec in plan_groups(plan.degrees, plan.problem, nccl=True, row_width=num_ranks)
        if rank in spec.members and spec.purpose not in skipped
    ]
    with recorded() as warmed:
        _warm_up(own, rank, plan.degrees, plan.problem, torch.device("cpu"))
    model, batch = build_rank(config, plan, mesh), random_batch(config, 0)
    with recorded() as used:
        model.train_step(*batch)
        model.optimizer.reduce()
        model.optimizer.step(0.1, 1.0)
        model.optimizer.settle()
        model.evaluator.step(*batch)
    used = {entry for entry in used if entry[0] not in CONTROL_PURPOSES}
    return used, warmed


@pytest.mark.parametrize(
    ("num_ranks", "case"),
    [
        (2, {"vocab": VocabConfig("naive")}),
        (4, {"vocab": VocabConfig("one_barrier"), "tp": 2}),
        (4, {"vocab": VocabConfig("two_barrier"), "tp": 2}),
        (4, {"vocab": VocabConfig("none"), "tied": True, "dp": 2, "optimizer": "zero1"}),
        (4, {"vocab": VocabConfig("none"), "tp": 2}),
    ],
)
def test_no_step_runs_what_the_start_has_not(ranks, num_ranks, case):
    config = config_of(2, 2, 101, **case)
    config = replace(config, run=replace(config.run, eval_microbatches=2 * case.get("dp", 1)))
    for used, warmed in ranks(num_ranks).run(connections, config):
        assert used <= warmed
        assert len(used) > 2
