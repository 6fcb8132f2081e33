"""A run resumes exactly from its checkpoint, in any layout, and from that of no other run."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.meshes import mesh_for
from tests.pipeline.equivalence import config_of
from tests.pipeline.truth import random_batch
from tests.reliability.checkpoints import body_of, sign, two
from tests.training import save_run, uncompiled
from vp_train.assembly import build_rank
from vp_train.checkpoint import saver, store
from vp_train.checkpoint.manifest import read_manifest
from vp_train.checkpoint.training import (
    Progress,
    _with_tokens,
    latest_of_run,
    load_weights,
    restore_run,
)
from vp_train.communication.control import ControlGroup
from vp_train.config import ConfigError, ModelConfig, VocabConfig
from vp_train.planning.plan import make_plan

CONTENTS = ("abc", "def")
BATCH = "dp * num_microbatches * micro_batch_size"
PROGRESS = Progress(3, (1.5, 2.0), (0.25,), 5, 4)


def built(config, num_ranks):
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    return build_rank(config, plan, mesh), mesh


def updated(model, config, steps, replica=0):
    for step in steps:
        model.gradients.zero()
        model.train_step(*random_batch(config, step + 100 * replica))
        model.optimizer.reduce()
        model.optimizer.step(0.01 * step, 1.0)


def copies(model):
    """Return the tensors that a rank holds, by kind and name, each with its slice of the whole."""
    return {
        (kind, name): (tensor.clone(), model.splits.get(name))
        for kind, tensors in model.optimizer.state().items()
        for name, tensor in tensors.items()
        if name not in model.copied
    }


def save_after_two(rank, num_ranks, config, directory):
    model, mesh = built(config, num_ranks)
    updated(model, config, (1, 2))
    model.loss_scale.value, model.loss_scale.finite_steps = 4.0, 7
    path = save_run(Path(directory), 2, config, model, mesh, CONTENTS, PROGRESS)
    held = copies(model)
    updated(model, config, (3,))
    return (
        str(path),
        held,
        {name: parameter.detach().clone() for name, parameter in model.parameters.items()},
    )


def restore(rank, num_ranks, config, path):
    model, mesh = built(config, num_ranks)
    step, progress = restore_run(Path(path), config, model, mesh, CONTENTS)
    assert progress == PROGRESS
    state = step, model.optimizer.updates, model.loss_scale.value, model.loss_scale.finite_steps
    held = copies(model)
    updated(model, config, (3,))
    return (
        state,
        held,
        {name: parameter.detach().clone() for name, parameter in model.parameters.items()},
    )


def joined(results):
    """Assemble every whole tensor from the slices that the ranks hold."""
    whole = {}
    for held in results:
        for key, (tensor, split) in held.items():
            if split is None:
                whole[key] = tensor
                continue
            target = whole.setdefault(
                key, torch.full(split.whole_shape(tensor.shape), torch.nan, dtype=tensor.dtype)
            )
            split.part(
                torch.arange(target.shape[split.dim])
            )  # checks that the ranges are in bounds
            start = 0
            for first, last in split.ranges:
                target.narrow(split.dim, first, last - first).copy_(
                    tensor.narrow(split.dim, start, last - first)
                )
                start += last - first
    return whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_run_holds_and_computes_what_the_saved_one_did(ranks, tmp_path, dtype):
    config = config_of(2, 3, 101, dtype=dtype)
    saved = ranks(2).run(uncompiled, save_after_two, config, str(tmp_path))
    found = ranks(2).run(uncompiled, restore, config, saved[0][0])
    for (_, before, after), (state, held, later) in zip(saved, found, strict=True):
        assert state == (2, 2, 4.0, 7)
        assert held.keys() == before.keys()
        assert {kind for kind, _ in held} == {"parameter", "exp_avg", "exp_avg_sq"}
        for key, (tensor, _) in before.items():
            assert held[key][0].dtype is tensor.dtype is torch.float32
            assert torch.equal(held[key][0], tensor), key
        assert later.keys() == after.keys()
        for name, tensor in after.items():
            assert torch.equal(later[name], tensor), name


@pytest.mark.parametrize(
    ("p", "options"),
    [
        (1, {"num_stages": 4}),
        (2, {"num_stages": 4, "schedule": "v_half"}),
        (3, {"layers": (2, 0, 2), "vocab": VocabConfig(shards=(0, 90, 11))}),
    ],
)
def test_other_ranks_restore_the_same_values(ranks, tmp_path, p, options):
    config = config_of(2, 3, 101, num_stages=4, dtype="float32")
    saved = ranks(2).run(save_after_two, config, str(tmp_path))
    other = config_of(p, 3, 101, dtype="float32", **options)
    found = ranks(p).run(restore, other, saved[0][0])
    before, after = joined(held for _, held, _ in saved), joined(held for _, held, _ in found)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


def refusal(rank, num_ranks, config, path, contents):
    model, mesh = built(config, num_ranks)
    try:
        restore_run(Path(path), config, model, mesh, contents)
    except ConfigError as error:
        return str(error)
    return "restored"


def other_run(config, **changes):
    return replace(config, model=replace(config.model, **changes))


@pytest.mark.parametrize(
    ("changed", "contents", "message"),
    [
        (
            lambda c: other_run(c, norm_epsilon=1e-3),
            CONTENTS,
            "was saved with model.norm_epsilon=1e-05, this run has 0.001",
        ),
        (
            lambda c: replace(c, micro_batch_size=1),
            CONTENTS,
            "with parallel.dp * num_microbatches * micro_batch_size=6, this run has 3; use the "
            "same value, or give run.allow=[batch]; where parallel.dp is not set, it follows from "
            "the number of ranks",
        ),
        (
            lambda c: replace(c, run=replace(c.run, dtype="float64")),
            CONTENTS,
            "run.dtype=float32, this run has float64",
        ),
        (
            lambda c: replace(c, data=replace(c.data, seed=5)),
            CONTENTS,
            "data.seed=1234, this run has 5",
        ),
        (lambda c: c, ("abc", "xyz"), "the text or tokenizer of data.blend[1] is not what"),
        (lambda c: c, ("abc",), "the text or its tokenizer is not what"),
        (lambda c: replace(c, data=replace(c.data, cache_dir="elsewhere")), CONTENTS, "restored"),
        (lambda c: replace(c, optim=replace(c.optim, lr=1e-3)), CONTENTS, "restored"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_by_the_setting(
    ranks, tmp_path, changed, contents, message
):
    config = config_of(1, 3, 101, dtype="float32")
    ((path, *_),) = ranks(1).run(save_after_two, config, str(tmp_path))
    (answer,) = ranks(1).run(refusal, changed(config), path, contents)
    assert message in answer
    assert message == "restored" or path in answer


def progress(**changes):
    """Return the state of a progress with some values that no run has saved."""
    return {"tokens": 0, "losses": [], "norms": [], "spikes": 0, "skipped": 0} | changes


STATES = {
    "no state": {},
    "no settings": {"config": None},
    "settings of a list": {"config": [1]},
    "sections of text": {"config": {"model": "x"}},
    "updates of text": {"updates": "2"},
    "too many updates": {"updates": 3},
    "no contents": {"contents": None},
    "contents of numbers": {"contents": [1]},
    "no loss scale": {"loss_scale": None},
    "a loss scale of text": {"loss_scale": ["4", 7]},
    "a loss scale of zero": {"loss_scale": [0.0, 7]},
    "a loss scale without an end": {"loss_scale": [float("inf"), 7]},
    "a loss scale beyond all floats": {"loss_scale": [10**400, 7]},
    "a loss scale of three": {"loss_scale": [4.0, 7, 7]},
    "a step of another": {"step": 1},
    "progress of a number": {"progress": 1},
    "progress without losses": {"progress": {"left_out": 0, "norms": []}},
    "too many steps left out": {"progress": {"left_out": 10**30, "losses": [], "norms": []}},
    "too many tokens": {"progress": progress(tokens=10**30)},
    "a loss beyond all floats": {"progress": progress(losses=[10**400])},
    "steps of no size": {"progress": {"left_out": 0, "losses": [], "norms": []}, "config": {}},
    "a norm that is no number": {"progress": progress(norms=[float("nan")])},
    "fewer spikes than none": {"progress": progress(spikes=-1)},
    "progress with more": {"progress": progress(more=1)},
}


def test_progress_comes_back_and_that_of_older_versions_counts_its_tokens_by_steps():
    saved = json.loads(json.dumps(asdict(PROGRESS)))
    assert Progress.of(saved) == PROGRESS
    settings = {"model": {"seq_length": 8}, "batch": {BATCH: 6}}
    tokens = saved.pop("tokens")
    earlier = Progress.of(_with_tokens(saved | {"left_out": 3}, 4, settings))
    assert earlier == replace(PROGRESS, tokens=7 * 6 * 8)
    assert Progress.of(_with_tokens(None, 4, settings)) == Progress(tokens=4 * 6 * 8)
    saved |= {"tokens": tokens}
    assert _with_tokens(saved, 4, {}) == saved


def resume_from(rank, num_ranks, config, directory):
    """Return the checkpoint that a run would go on from, and what rank 0 says about others."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        path, damaged = latest_of_run(Path(directory), ControlGroup.flat(dist.group.WORLD))
    assert [(each.name, each.is_altered) for each in damaged] == [("step-00000002", False)]
    return path and path.name, said.getvalue()


@pytest.mark.parametrize("name", STATES)
def test_a_manifest_without_the_state_of_a_run_is_passed_over_by_name(ranks, tmp_path, name):
    directory, state = (
        tmp_path / "checkpoints",
        {
            "step": 2,
            "updates": 2,
            "loss_scale": [4.0, 7],
            "config": {"model": {"seq_length": 6}, "batch": {BATCH: 6}},
            "contents": ["a"],
        },
    )
    two(directory)
    for step in (1, 2):
        path = directory / f"step-{step:08d}"
        body = body_of(path)
        body["state"] = state | {"step": step, "updates": 1}
        if step == 2:
            body["state"] = body["state"] | STATES[name] if STATES[name] else {}
        sign(path, body)
    for rank, (chosen, said) in enumerate(ranks(2).run(resume_from, None, str(directory))):
        assert chosen == "step-00000001"
        assert len(said.splitlines()) == (rank == 0)
        assert rank or "step-00000002/manifest.json is damaged: state" in said


def load(rank, num_ranks, config, path):
    model, _ = built(config, num_ranks)
    try:
        load_weights(Path(path), config, model)
    except ConfigError as error:
        return str(error)
    state = model.optimizer.state()
    moments_are_zero = all(
        not tensor.any()
        for moment in ("exp_avg", "exp_avg_sq")
        for tensor in state[moment].values()
    )
    return copies(model), model.optimizer.updates, moments_are_zero


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_alone_start_another_run_of_any_layout_and_precision(ranks, tmp_path, dtype):
    config = config_of(2, 3, 101, dtype="float32")
    saved = ranks(2).run(save_after_two, config, str(tmp_path))
    before = {
        key: tensor
        for key, tensor in joined(held for _, held, _ in saved).items()
        if key[0] == "parameter"
    }
    longer = ModelConfig(
        **{
            **{f: getattr(config.model, f) for f in config.model.__dataclass_fields__},
            "seq_length": 9,
        }
    )
    other = replace(config_of(1, 2, 101, dtype=dtype, num_stages=2), model=longer)
    ((held, updates, moments_are_zero),) = ranks(1).run(uncompiled, load, other, saved[0][0])
    assert updates == 0
    assert moments_are_zero
    after = {key: tensor for key, (tensor, _) in held.items() if key[0] == "parameter"}
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype is (torch.float64 if dtype == "float64" else torch.float32)
        assert torch.equal(after[key], tensor.to(after[key].dtype)), key
    (answer,) = ranks(1).run(
        load, other_run(config_of(1, 3, 101, num_stages=2), ffn_hidden_size=32), saved[0][0]
    )
    assert "was saved with model.ffn_hidden_size=24, this run has 32; use the same value" in answer


def numbers(rank, num_ranks, directory, value):
    pieces = {
        "number": store.CheckpointTensor(torch.tensor(value)),
        "row": store.CheckpointTensor(torch.full((2,), value)),
    }
    path = saver.save(Path(directory), 1, pieces, {}, ControlGroup.flat(dist.group.WORLD), 1)
    read = {
        "number": store.CheckpointTensor(torch.tensor(torch.nan)),
        "row": store.CheckpointTensor(torch.full((2,), torch.nan)),
    }
    manifest = read_manifest(path)
    assert manifest.files["rank-00000.safetensors"].tensors["number"].shape == ()
    store.load(path, manifest, read)
    return read["number"].tensor, read["row"].tensor


def test_a_tensor_without_dimensions_comes_back(ranks, tmp_path):
    ((number, row),) = ranks(1).run(numbers, str(tmp_path), 3.25)
    assert number.shape == ()
    assert number.item() == 3.25
    assert row.tolist() == [3.25, 3.25]
