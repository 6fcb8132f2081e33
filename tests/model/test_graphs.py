"""Stages whose passes are replayed compute what those do that run them anew."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from tests.local import run_locally
from tests.pipeline.compare import assert_all_close
from tests.pipeline.equivalence import assert_equivalent, compare_locally, config_of
from tests.pipeline.truth import random_batch
from vp_train.config import ConfigError
from vp_train.model.graphs import _Slot, repeated
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config

pytestmark = pytest.mark.usefixtures("unrefined")
GRAPHS = "run.cuda_graphs=true"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCHEDULES = ["1f1b", "interleaved", "zb_h1", "v_half"]


def graphed(config, device="cpu", **run):
    run = replace(config.run, cuda_graphs=True, device=device, comm_backend="gloo", **run)
    return replace(config, run=run)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_one_process_in_float64(schedule):
    config = graphed(config_of(2, 5, 101, schedule=schedule, num_stages=4))
    assert_all_close(compare_locally(config, make_plan(config, 2)), 1e-9, schedule)


@pytest.mark.parametrize("optimizer", ["adamw", "zero1"])
def test_replicas_equal_one_process_in_float64(ranks, optimizer):
    """Sums of gradients begin, and weights arrive, before and after a pass instead of within."""
    config = config_of(2, 3, 101, schedule="v_half", num_stages=4, dp=2, optimizer=optimizer)
    assert_equivalent(ranks, 4, [graphed(config)], 1e-9)


@pytest.mark.parametrize(
    "word",
    [
        "parallel.tp=2",
        "parallel.offload_activations=0.5",
        "data.packing=documents",
        "run.linear_dtype=float8",
    ],
)
def test_passes_that_cannot_be_replayed_are_refused_by_name(word):
    (name, value), words = word.split("="), ["model=nano", "data=pystdlib", "run.dtype=bfloat16"]

    def plan(*more):
        make_plan(load_config([*words, "parallel.pp=2", word, GRAPHS, *more]), 4)

    with pytest.raises(ConfigError, match=f"{name}=.*, not of {value}; use ") as refused:
        plan()
    for way_out in str(refused.value).partition("; use ")[2].split(" or "):
        plan(way_out)


@pytest.mark.parametrize("split", [False, True])
def test_a_slot_is_freed_at_once(split):
    """The warm-up of a GPU frees its slot while Python's garbage collector is off."""
    config = config_of(1, 1, 101)

    def work(rank, model, together):
        stage = model.stages[0]
        x = torch.ones(config.model.seq_length, 1, config.model.hidden_size, dtype=torch.float64)
        slot = _Slot(stage, x, repeated, split=split)
        slot.forward(x)
        slot.backward(x)
        if split:
            slot.weights()
        reference = weakref.ref(slot)
        gc.disable()
        try:
            del slot
            return reference() is None
        finally:
            gc.enable()

    assert run_locally(config, make_plan(config, 1), work) == [True]


def steps_of(config, plan, batches):
    """Return the gradients of all ranks in a step of each of `batches`, by rank and name."""

    def work(rank, model, together):
        found = []
        for batch in batches:
            model.gradients.zero()
            together.gather(rank, None)
            model.train_step(*batch)
            found.append({name: p.grad.cpu().clone() for name, p in model.parameters.items()})
        return found

    return [
        {
            f"{rank} {name}": gradient
            for rank, of_rank in enumerate(ranks)
            for name, gradient in of_rank.items()
        }
        for ranks in zip(*run_locally(config, plan, work), strict=True)
    ]


@on_gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_graphs_of_a_gpu_equal_the_cpu_in_float64(schedule, recompute):
    config = config_of(2, 5, 101, schedule=schedule, num_stages=4)
    config = replace(config, parallel=replace(config.parallel, recompute=recompute))
    batches = [random_batch(config, seed) for seed in range(3)]
    plan = make_plan(config, 2)
    expected = steps_of(config, plan, batches)
    found = steps_of(graphed(config, "cuda", compile="off"), plan, batches)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, gradient in theirs.items():
            assert torch.allclose(ours[name], gradient, rtol=1e-9, atol=1e-12), (step, name)


@on_gpu
def test_graphs_of_a_gpu_change_no_bit_in_bfloat16():
    config = config_of(2, 4, 128, dtype="bfloat16", num_stages=4, schedule="zb_h1")
    config = replace(config, run=replace(config.run, device="cuda", comm_backend="gloo"))
    batches = [random_batch(config, seed) for seed in range(3)]
    plan = make_plan(config, 2)
    expected = steps_of(config, plan, batches)
    found = steps_of(graphed(config, "cuda"), plan, batches)
    for ours, theirs in zip(found, expected, strict=True):
        for name, gradient in theirs.items():
            assert torch.equal(ours[name], gradient), name
