"""A resumed run equals the uninterrupted run, also with another parallel layout."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.data.cases import write_letters
from tests.meshes import mesh_for
from tests.training import (
    OFFLOADED,
    config_of,
    config_on_letters,
    laid_out,
    metrics_of,
    release_locks,
    train,
    uncompiled,
)
from vp_train.assembly import build_rank
from vp_train.checkpoint import run as checkpoints
from vp_train.checkpoint.manifest import (
    BATCH,
    MANIFEST,
    StoredFile,
    file_name,
    saved_batch,
    write_manifest,
)
from vp_train.checkpoint.training import _require_same_text
from vp_train.commands.place import Place
from vp_train.commands.train import _batch_change, _train, check_steps
from vp_train.config import (
    BlendEntry,
    ConfigError,
    DataConfig,
    RunSettings,
    VocabConfig,
)
from vp_train.data import open_source
from vp_train.durable import checkpoint_name
from vp_train.failures import EXIT_CONFIG
from vp_train.metrics.run_directory import RunDirectory
from vp_train.planning.degrees import wanted_ranks
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config
from vp_train.settings.files import config_text
from vp_train.train import Run, _leave_done


def packed_blend(tmp_path):
    """Return a blend of two corpora whose documents are packed into sequences."""
    write_letters(tmp_path / "one", [200] * 10)
    write_letters(tmp_path / "two", [50] * 20)
    entries = (
        BlendEntry(path=str(tmp_path / "one"), weight=0.7),
        BlendEntry(path=str(tmp_path / "two"), weight=0.3),
    )
    return DataConfig(
        "blend",
        blend=entries,
        packing="documents",
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.2,
    )


def split_over_two(config):
    """Return the configuration with two query groups, so that two tensor ranks can split them."""
    return replace(config, model=replace(config.model, num_query_groups=2))


@pytest.fixture(scope="module")
def whole_run(ranks, tmp_path_factory):
    """Return whole_run(dtype): it trains on two ranks without interruption, once for all tests.

    It returns the configuration of the run.
    """

    @cache
    def of(dtype):
        config = split_over_two(config_of(tmp_path_factory.mktemp("whole"), dtype=dtype))
        ranks(2).run(uncompiled, train, config)
        return config

    return of


@pytest.mark.parametrize("data", ["synthetic", "packed blend with a ramp"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(ranks, whole_run, tmp_path, data):
    part = split_over_two(config_of(tmp_path, "part"))
    if data == "synthetic":
        whole = whole_run("float32")
    else:
        part = replace(
            part,
            data=packed_blend(tmp_path),
            model=replace(part.model, vocab_size=300),
            batch_ramp=([2, 2], [5, 4]),  # the smaller steps end after the checkpoint
        )
        whole = replace(part, run=replace(part.run, name="whole"))
        ranks(2).run(train, whole)
    ranks(2).run(train, part, 6)  # its last checkpoint is of step 4
    resumed = replace(part, run=replace(part.run, resume=True))
    ranks(2).run(release_locks)
    assert ranks(2).run(train, resumed) == [5, 5]
    for ours, theirs in zip(metrics_of(part), metrics_of(whole), strict=True):
        for key in ("step", "loss", "grad_norm", "learning_rate", "validation_loss"):
            assert ours.get(key) == theirs.get(key), key


def train_and_take(rank, num_ranks, config, stop_after):
    """Train until step `stop_after`, and return the tokens of all steps in their order.

    They are those of this rank's replica, by step.
    """
    taken, run = [], loaded_run(config, num_ranks)
    for step in run.steps():
        batch, _ = run._batches.make(step)
        taken.append(batch.tokens.flatten().tolist())
        run.train_step(step)
        if step == stop_after:
            run.finish_save()
            break
    return taken


def loaded_run(config, num_ranks):
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    run = Run(config, plan, mesh, open_source(config), build_rank(config, plan, mesh))
    run.load()
    return run


def test_steps_and_sequences_of_other_sizes_take_every_token_once(ranks, tmp_path):
    first = config_of(tmp_path, eval_every=0, trace_step=0, checkpoint_every=1)  # 8 x 16 tokens
    first = replace(first, batch_ramp=([1, 2],))
    run = replace(first.run, resume=True, allow=("batch", "sequence"))
    data = replace(first.data, sample_length=16)
    longer = replace(
        laid_out(first, pp=1, dp=2),  # 4 x 24 tokens on each of two replicas
        run=run,
        data=data,
        batch_ramp=(),
        model=replace(first.model, seq_length=24),
    )
    shorter = replace(  # 12 x 4 tokens
        first, run=run, data=data, num_microbatches=6, model=replace(first.model, seq_length=4)
    )
    stream = []
    for config, stop_after in ((first, 2), (longer, 4), (replace(shorter, batch_ramp=()), 6)):
        by_rank = ranks(2).run(train_and_take, config, stop_after)
        for step in zip(*by_rank[: config.parallel.dp or 1], strict=True):
            stream += [token for tokens in step for token in tokens]
    assert len(stream) == (2 + 8) * 16 + 2 * 8 * 24 + 2 * 12 * 4
    samples = open_source(first).train_batch(0, -(-len(stream) // 16 // 2)).tokens.flatten()
    assert stream == samples.tolist()[: len(stream)]


def test_other_steps_and_sequences_are_refused_unless_they_are_allowed(
    ranks, tmp_path, monkeypatch
):
    config = config_of(tmp_path, eval_every=0, trace_step=0)
    ranks(2).run(train, config, 4)
    ranks(2).run(release_locks)
    data = replace(config.data, sample_length=16)
    resumed = replace(config, run=replace(config.run, resume=True), data=data)
    for changes, word in (
        ({"num_microbatches": 2}, "batch"),
        ({"batch_ramp": ([6, 2],)}, "batch"),
        ({"model": replace(config.model, seq_length=32)}, "sequence"),
    ):
        for message in ranks(2).run(refused, replace(resumed, **changes)):
            assert f"use the same value, or give run.allow=[{word}]" in message
    assert saved_batch(config.run.checkpoints) == 8
    assert saved_batch(tmp_path) is None
    # The launcher and ranks of torchrun know the batch from the degrees and the number of ranks.
    assert _batch_change(replace(resumed, num_microbatches=2), Place(), 2) == (8, 4)
    assert _batch_change(laid_out(resumed, pp=1, dp=2), Place(), 0) == (8, 8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert _batch_change(resumed, None, 0) == (8, 16)
    assert _batch_change(config, None, 0) is None


UNEQUAL = {"pp": 3, "vocab": VocabConfig("two_barrier", shards=(11, 0, 90))}
TENSOR = {"dp": 2, "tp": 2, "pp": 1, "optimizer": "zero1"}
REPLICAS = {"dp": 2, "pp": 2, "optimizer": "zero1"}


EMPTY_ENDS = {
    "pp": 4,
    "layers": (0, 3, 3, 0),
    "vocab": VocabConfig("one_barrier", shards=(0, 50, 51, 0)),
    "optimizer": "zero1",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        (EMPTY_ENDS, UNEQUAL, "float32"),
        (TENSOR, REPLICAS, "bfloat16"),
        (TENSOR, {"pp": 2}, "float32"),
        (REPLICAS, OFFLOADED, "float32"),
    ],
)
def test_another_layout_and_schedule_go_on_from_the_same_checkpoint(
    ranks, whole_run, tmp_path, before, after, dtype
):
    whole, part = whole_run(dtype), split_over_two(config_of(tmp_path, "part", dtype=dtype))
    first, then = (
        laid_out(part, **before),
        laid_out(replace(part, run=replace(part.run, resume=True)), **after),
    )
    for config, stop_after in ((first, 4), (then, None)):
        num_ranks = wanted_ranks(config.parallel)
        ranks(num_ranks).run(uncompiled, train, config, stop_after)
        ranks(num_ranks).run(release_locks)
    assert len(metrics_of(part)) == 8
    for ours, theirs in zip(metrics_of(part), metrics_of(whole), strict=True):
        for key in ("loss", "validation_loss") if ours["step"] in (4, 8) else ("loss",):
            # In bfloat16, other layouts round sums differently, and errors of eight steps add up.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5 if dtype == "float32" else 2e-3)


def who_loaded(rank, num_ranks, config, place):
    """Let rank 1 load late, and return the ranks that had loaded when this one goes on."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("restore_run", "load_weights"):
            patched.setattr(checkpoints, name, late(getattr(checkpoints, name), rank, place))
        loaded_run(config, num_ranks)
        return sorted(os.listdir(place))


def late(load, rank, place):
    def loaded(*arguments):
        time.sleep(0.2 * rank)
        found = load(*arguments)
        Path(place, str(rank)).touch()
        return found

    return loaded


@pytest.mark.parametrize("origin", ["its checkpoint", "other weights"])
def test_no_rank_begins_before_all_have_loaded(ranks, whole_run, tmp_path, origin):
    config = whole_run("float32")
    run = replace(config.run, resume=True)
    if origin == "other weights":
        run = replace(config.run, name="other", init_from=str(config.run.directory))
    assert ranks(2).run(who_loaded, replace(config, run=run), str(tmp_path)) == [["0", "1"]] * 2


def test_weights_from_elsewhere_are_validated_once_before_the_first_step(
    ranks, whole_run, tmp_path
):
    whole = whole_run("float32")
    config = replace(whole, run=config_of(tmp_path, steps=4, checkpoint_every=2).run)
    config = replace(config, run=replace(config.run, init_from=str(whole.run.directory)))
    again = replace(config, run=replace(config.run, resume=True))
    for start, stop_after, first in ((config, 1, 1), (again, 3, 1), (again, None, 3)):
        assert ranks(2).run(uncompiled, train, start, stop_after) == [first] * 2
        ranks(2).run(release_locks)
    records = metrics_of(config)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[0]["validation_loss"] == metrics_of(whole)[-1]["validation_loss"]
    assert "loss" not in records[0]
    assert records[1]["seconds/validation"] == 0.0, "it is no part of the first step"


def test_a_run_goes_on_with_the_same_text_elsewhere_and_with_no_other(ranks, tmp_path):
    config = config_on_letters(tmp_path, eval_every=0, trace_step=0)
    ranks(2).run(train, config, 4)
    ranks(2).run(release_locks)
    (tmp_path / "text").rename(tmp_path / "moved")
    moved = replace(
        config,
        data=replace(config.data, path=f"{tmp_path}/moved/"),
        run=replace(config.run, resume=True),
    )
    assert ranks(2).run(train, moved, 5) == [5, 5]
    ranks(2).run(release_locks)
    (tmp_path / "moved" / "more.txt").write_text("another document")
    for message in ranks(2).run(refused, moved):
        assert "the text or its tokenizer is not what" in message
        assert f"add data.path={tmp_path}/cache/text-" in message
        assert "run.init_from=" in message
    with pytest.raises(
        ConfigError,
        match=r"the text or tokenizer of data.blend\[1\] is not what there was trained on",
    ):
        _require_same_text(["a", "b"], ["a", "c"], "there", config.data)


def test_a_checkpoint_of_another_model_is_refused(ranks, tmp_path):
    config = config_of(tmp_path)
    ranks(2).run(train, config, 4)
    ranks(2).run(release_locks)
    other = config_of(tmp_path, resume=True)
    other = replace(other, model=replace(other.model, num_query_groups=2))
    for message in ranks(2).run(refused, other):
        assert "saved with model.num_query_groups=1, this run has 2" in message


def refused(rank, num_ranks, config):
    try:
        train(rank, num_ranks, config)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_a_resumed_float16_run_has_its_loss_scale_again(ranks, tmp_path):
    config = config_of(tmp_path, dtype="float16", eval_every=0, trace_step=0)
    assert ranks(2).run(uncompiled, loss_scale_of, config, 2.0**11) == [2.0**11] * 2
    ranks(2).run(release_locks)
    resumed = replace(config, run=replace(config.run, resume=True))
    assert ranks(2).run(uncompiled, loss_scale_of, resumed, None) == [2.0**11] * 2


def loss_scale_of(rank, num_ranks, config, first):
    """Return the loss scale after a step that begins with scale `first`.

    If `first` is None, return the restored scale.
    """
    run = loaded_run(config, num_ranks)
    if first is not None:
        run.model.loss_scale.value = first
        run.train_step(4)  # a checkpoint is due at this step
        run.finish_save()
    return run.model.loss_scale.value


def test_fewer_steps_than_a_run_has_done_are_refused_before_anything_else(tmp_path):
    run = RunSettings(root=str(tmp_path), name="run", steps=5, resume=True)
    for step in (4, 12):
        path = run.checkpoints / checkpoint_name(step)
        path.mkdir(parents=True)
        write_manifest(path, step, {}, {})
    for name in ("step-00000099", ".writing-step-00000020"):  # they hold nothing
        (run.checkpoints / name).mkdir()
    damaged = run.checkpoints / checkpoint_name(98) / MANIFEST
    damaged.parent.mkdir()
    damaged.write_text("{}")
    with pytest.raises(ConfigError, match=r"run\.steps=5, but .* is of step 12; give at least 12"):
        check_steps(run)
    check_steps(replace(run, steps=12))
    check_steps(replace(run, resume=False))


@pytest.mark.parametrize(
    ("module", "function", "words", "said"),
    [
        ("train", "main", "run.resume=true run.steps=7", "is of step 8; give at least 8"),
        ("train", "main", "run.resume=true num_microbatches=9", "sequences of a step=8, this"),
        ("convert", "export_model", "nowhere out", "nowhere is not a directory; give that"),
    ],
)
def test_a_refusal_does_not_wait_for_torch(tmp_path, module, function, words, said):
    path = tmp_path / "runs/default/checkpoints" / checkpoint_name(8)
    path.mkdir(parents=True)
    (path / file_name(0)).write_bytes(b"right")
    stored = StoredFile(5, hashlib.blake2b(b"right").hexdigest(), {})
    state = {"config": {"batch": {BATCH: 8}}}
    write_manifest(path, 8, state, {file_name(0): stored.as_json()})
    config = load_config(["model=nano", "parallel.pp=2"])
    (tmp_path / "runs/default/config.yaml").write_text(config_text(config))
    code = f"import atexit, sys; from vp_train.commands.{module} import {function} as main\n"
    code += "atexit.register(lambda: print('torch' in sys.modules)); main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert said in done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_a_checkpoint_with_other_bytes_refuses_no_steps(tmp_path):
    run = RunSettings(root=str(tmp_path), name="run", steps=13, resume=True)
    for step, content in ((11, b"right"), (15, b"wrong")):
        path = run.checkpoints / checkpoint_name(step)
        path.mkdir(parents=True)
        (path / file_name(0)).write_bytes(content)
        stored = StoredFile(5, hashlib.blake2b(b"right").hexdigest(), {})
        write_manifest(path, step, {}, {file_name(0): stored.as_json()} if step == 15 else {})
    check_steps(run)
    with pytest.raises(ConfigError, match=r"is of step 11; give at least 11"):
        check_steps(replace(run, steps=10))


def test_a_run_sets_a_damaged_checkpoint_aside_and_keeps_a_notice(ranks, tmp_path):
    config = config_of(tmp_path, eval_every=0, trace_step=0, checkpoint_every=2)
    ranks(2).run(train, config, 4)
    ranks(2).run(release_locks)
    place = config.run.checkpoints / checkpoint_name(4) / file_name(1)
    place.write_bytes(place.read_bytes()[:-8] + b"12345678")
    resumed = replace(config, run=replace(config.run, resume=True))
    assert ranks(2).run(train, resumed, 6) == [3, 3]
    assert sorted(path.name for path in config.run.checkpoints.iterdir()) == [
        "step-00000004",
        "step-00000004.damaged",
        "step-00000006",
    ]
    notices = (config.run.directory / "notices.txt").read_text().splitlines()
    words = f"checkpoint passed over: {place} does not match its hash; it is {place.parent.name}"
    assert len(notices) == 1
    assert notices[0].endswith(f"{words}.damaged now")


def test_a_run_that_is_in_use_is_refused_before_its_checkpoints_are_looked_at(tmp_path, capsys):
    run = RunSettings(root=str(tmp_path), name="run", resume=True)
    directory = RunDirectory(run)
    words = ["model=nano", "data=synthetic", f"run.root={tmp_path}", "run.name=run"]
    (run.checkpoints / checkpoint_name(7)).mkdir(parents=True)
    with pytest.raises(ConfigError, match="is in use by process"):
        _train(load_config([*words, "run.resume=true", "run.steps=3"]), [], {})
    assert directory.hold() is None


def test_a_run_that_is_done_says_so(monkeypatch):
    left = []
    monkeypatch.setattr("vp_train.train.leave", left.append)
    for rank in (0, 1):
        _leave_done(12, RunSettings(steps=12), rank)
    assert [ending.code for ending in left] == [0, 0]
    assert (
        left[0].words == "runs/default has done all of its 12 steps; run.steps=N goes on to step N"
    )
    assert left[1].words == ""
