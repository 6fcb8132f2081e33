"""A run learns, reports, resumes exactly, and ends with a message when something goes wrong."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from schedules.ir import Schedule
from tests.data.cases import text_config, write_letters
from tests.meshes import mesh_for
from vp_train import flight_recorder
from vp_train.assembly import build_rank
from vp_train.checkpoint.training import _require_same_text
from vp_train.cli import load_config
from vp_train.config import (
    BlendEntry,
    ConfigError,
    CostConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunSettings,
    ScheduleConfig,
    VocabConfig,
)
from vp_train.data import Batch, open_source
from vp_train.degrees import wanted_ranks
from vp_train.exits import EXIT_HANG, EXIT_INTERNAL, EXIT_IO
from vp_train.mesh import build_mesh
from vp_train.metrics.reporter import Reporter
from vp_train.metrics.run_directory import RunDirectory
from vp_train.optim.adamw import StepHealth
from vp_train.optim.loss_scale import LossScale
from vp_train.plan import make_plan
from vp_train.train import NonFiniteError, Run, _connect


def config_of(root, name="run", steps=8, p=2, **run):
    return RunConfig(
        model=ModelConfig(
            num_layers=6, hidden_size=32, num_heads=2, num_query_groups=1, ffn_hidden_size=48, vocab_size=101, seq_length=16
        ),
        parallel=ParallelConfig(pp=p),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        data=DataConfig(name="synthetic"),
        run=RunSettings(
            **(
                {
                    "name": name,
                    "root": str(root),
                    "steps": steps,
                    "eval_every": 4,
                    "eval_microbatches": 3,
                    "checkpoint_every": 4,
                    "trace_step": 3,
                }
                | run
            )
        ),
        num_microbatches=4,
        micro_batch_size=2,
    )


def train(rank, num_ranks, config, stop_after=None):
    """What `run_rank` does, in a process group that exists already."""
    plan = make_plan(config, num_ranks)
    directory = RunDirectory(config.run) if rank == 0 else None
    mesh = mesh_for(plan)
    source = open_source(config)
    run = Run(config, plan, mesh, source, build_rank(config, plan, mesh))
    reporter = None
    if directory is not None:
        reporter = Reporter(config, plan, directory, run.first_step)
        reporter.start("resolved: true\n", source)
    try:
        for step in run.steps():
            run.train_step(step, reporter)
            if step == stop_after:
                return run.first_step
        run.finish(reporter)
    except NonFiniteError as error:
        return str(error)
    return run.first_step


def metrics_of(config):
    lines = (Path(config.run.root) / config.run.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_learns_and_leaves_everything_in_its_directory(ranks, tmp_path):
    config = config_of(tmp_path, steps=40, eval_every=20)
    ranks(2).run(train, config)
    records = metrics_of(config)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[39]["validation_loss"] < records[19]["validation_loss"] < records[0]["loss"] - 0.3
    directory = tmp_path / "run"
    for name in ("config.yaml", "env.json", "schedule.txt", "schedule.svg", "trace/step.json", "trace/step.svg", "tensorboard"):
        assert (directory / name).exists(), name
    events = json.loads((directory / "trace" / "step.json").read_text())["traceEvents"]
    assert {"0E0", "1F0", "0S3", "1T3", "0G3"} <= {event["name"] for event in events}
    lanes = {event["pid"] for event in events if event["name"] == "process_name" and "measured" in event["args"]["name"]}
    communications = {event["name"] for event in events if event["pid"] in lanes and event.get("tid") == 1}
    barriers = {f"{name}.{i}" for name in ("CE", "C0", "C1", "C1b", "CG") for i in range(4)}
    assert communications - {"thread_name"} == barriers | {f"{stage}{i}" for stage in ("0F", "1B") for i in range(4)}
    assert [path.name for path in sorted((directory / "checkpoints").iterdir())] == ["step-00000036", "step-00000040"]


def packed_blend(tmp_path):
    """Two corpora of documents that are shorter than a sequence."""
    write_letters(tmp_path / "one", [200] * 10)
    write_letters(tmp_path / "two", [50] * 20)
    entries = (BlendEntry(path=str(tmp_path / "one"), weight=0.7), BlendEntry(path=str(tmp_path / "two"), weight=0.3))
    return DataConfig("blend", blend=entries, packing="documents", cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)


@pytest.mark.parametrize("data", ["synthetic", "packed blend"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(ranks, tmp_path, data):
    whole, part = config_of(tmp_path, "whole"), config_of(tmp_path, "part")
    if data == "packed blend":
        given = {"data": packed_blend(tmp_path), "model": replace(whole.model, vocab_size=300)}
        whole, part = replace(whole, **given), replace(part, **given)
    ranks(2).run(train, whole)
    ranks(2).run(train, part, 6)  # its last checkpoint is of step 4
    resumed = replace(part, run=replace(part.run, resume=True))
    ranks(2).run(release_locks)
    assert ranks(2).run(train, resumed) == [5, 5]
    for ours, theirs in zip(metrics_of(part), metrics_of(whole), strict=True):
        for key in ("step", "loss", "grad_norm", "learning_rate", "validation_loss"):
            assert ours.get(key) == theirs.get(key), key


TINY = [
    "model=nano",
    "model.hidden_size=32",
    "model.seq_length=16",
    "model.vocab_size=1001",
    "data=synthetic",
    "parallel.pp=2",
    "num_microbatches=3",
    "cost.collective_seconds=1e-6",
    "cost.hop_seconds=1e-6",
    "run.steps=4",
    "run.trace_step=3",
    "run.eval_every=2",
    "run.eval_microbatches=2",
]


def test_a_searched_schedule_is_what_runs_and_can_be_run_again(ranks, tmp_path):
    root = f"run.root='{tmp_path}/a=b, c'"
    words = [*TINY, root, "schedule=auto", "vocab=auto", "run.name=searched"]
    done = subprocess.run([sys.executable, "-m", "vp_train", *words], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "a=b, c" / "searched"
    written = Schedule.parse((directory / "schedule.txt").read_text())
    assert written.name.startswith("auto from ")
    assert f"schedule  {written.name}, vocabulary one_barrier, 3 microbatches" in done.stdout
    events = json.loads((directory / "trace" / "step.json").read_text())["traceEvents"]
    lanes = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    passes = sorted((event for event in events if event["ph"] == "X" and event["tid"] == 0), key=lambda event: event["ts"])
    for rank, order in enumerate(written.ranks):
        measured = [event["name"] for event in passes if event["pid"] == lanes[f"measured rank {rank}"]]
        assert measured == list(map(str, order))

    stored = f"schedule.file='{directory}/schedule.txt'"
    again = load_config([*TINY, root, stored, "vocab=one_barrier", "run.name=again"])
    ranks(2).run(train, again)
    assert (directory.parent / "again" / "schedule.txt").read_text() == written.text()
    searched = load_config([*TINY, root, "run.name=searched"])
    for ours, theirs in zip(metrics_of(again), metrics_of(searched), strict=True):
        for key in ("step", "loss", "grad_norm", "validation_loss"):
            assert ours.get(key) == theirs.get(key), key


def test_ranks_that_search_for_themselves_train_and_evaluate_as_any_schedule_does(ranks, tmp_path):
    plain = replace(config_of(tmp_path, "plain"), vocab=VocabConfig("none"), num_microbatches=3)
    searched = replace(
        plain,
        run=replace(plain.run, name="searched"),
        schedule=ScheduleConfig("auto", cap_microbatches=4.0),
        vocab=VocabConfig("auto"),
        cost=CostConfig(collective_seconds=1e-6, hop_seconds=1e-6),
    )
    ranks(2).run(train, plain)
    ranks(2).run(train, searched)
    text = (tmp_path / "searched" / "schedule.txt").read_text()
    assert text.startswith("# auto from ")
    assert {"0S0", "1S0"} <= set(text.split()), "a sharded algorithm, other than the plain run's"
    for ours, theirs in zip(metrics_of(searched), metrics_of(plain), strict=True):
        for key in ("loss", "validation_loss") if ours["step"] in (4, 8) else ("loss",):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


def release_locks(rank, num_ranks):
    import gc

    gc.collect()


UNEQUAL = {"pp": 3, "vocab": VocabConfig("two_barrier", shards=(11, 0, 90))}
TENSOR = {"dp": 2, "tp": 2, "pp": 1, "optimizer": "zero1"}
REPLICAS = {"dp": 2, "pp": 2, "optimizer": "zero1"}
OFFLOADED = {"dp": 4, "pp": 1, "optimizer": "zero1", "offload": True}


EMPTY_ENDS = {"pp": 4, "layers": (0, 3, 3, 0), "vocab": VocabConfig("one_barrier", shards=(0, 50, 51, 0)), "optimizer": "zero1"}


def laid_out(config, *, pp, dp=1, tp=1, optimizer="adamw", offload=False, vocab=None, layers=None):
    """The same training by other ranks."""
    return replace(
        config,
        parallel=ParallelConfig(pp=pp, dp=dp, tp=tp, layers_per_stage=layers),
        optim=replace(config.optim, name=optimizer, offload=offload),
        vocab=vocab or config.vocab,
        num_microbatches=config.num_microbatches // dp,
    )


@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        ({"pp": 2}, UNEQUAL, "float32"),
        (REPLICAS, {"pp": 2}, "bfloat16"),
        (TENSOR, REPLICAS, "bfloat16"),
        (TENSOR, REPLICAS, "float32"),
        (REPLICAS, OFFLOADED, "float32"),
        (EMPTY_ENDS, {"pp": 2}, "float32"),
    ],
)
def test_another_layout_and_schedule_go_on_from_the_same_checkpoint(ranks, tmp_path, before, after, dtype):
    whole, part = (config_of(tmp_path, name, dtype=dtype) for name in ("whole", "part"))
    whole, part = (replace(config, model=replace(config.model, num_query_groups=2)) for config in (whole, part))
    ranks(2).run(train, whole)
    first, then = laid_out(part, **before), laid_out(replace(part, run=replace(part.run, resume=True)), **after)
    for config, stop_after in ((first, 4), (then, None)):
        num_ranks = wanted_ranks(config.parallel)
        ranks(num_ranks).run(train, config, stop_after)
        ranks(num_ranks).run(release_locks)
    assert len(metrics_of(part)) == 8
    for ours, theirs in zip(metrics_of(part), metrics_of(whole), strict=True):
        for key in ("loss", "validation_loss") if ours["step"] in (4, 8) else ("loss",):
            # bfloat16 rounds the sums of other layouts differently, and each of eight steps builds on the one before
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5 if dtype == "float32" else 2e-3)


def test_a_run_goes_on_with_the_same_text_elsewhere_and_with_no_other(ranks, tmp_path):
    config = config_of(tmp_path, eval_every=0, trace_step=0)
    write_letters(tmp_path / "text", [200] * 10)
    config = replace(config, data=text_config(tmp_path), model=replace(config.model, vocab_size=300))
    ranks(2).run(train, config, 4)
    ranks(2).run(release_locks)
    (tmp_path / "text").rename(tmp_path / "moved")
    moved = replace(config, data=replace(config.data, path=f"{tmp_path}/moved/"), run=replace(config.run, resume=True))
    assert ranks(2).run(train, moved, 5) == [5, 5]
    ranks(2).run(release_locks)
    (tmp_path / "moved" / "more.txt").write_text("another document")
    for message in ranks(2).run(refused, moved):
        assert "the text or its tokenizer is not what" in message
        assert "run.init_from=" in message
    with pytest.raises(ConfigError, match=r"the text or tokenizer of data.blend\[1\] is not what there was trained on"):
        _require_same_text(["a", "b"], ["a", "c"], "there")


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


def test_a_deterministic_run_asks_torch_for_it(monkeypatch, tmp_path):
    config = config_of(tmp_path, deterministic=True)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("vp_train.train.build_mesh", lambda *_, **__: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        _connect(config, make_plan(config, 2))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_group_of_all_ranks_waits_for_the_world_s_time_and_every_other_for_a_step_s(ranks, tmp_path, monkeypatch):
    config = config_of(tmp_path, timeout_seconds=7, world_timeout_seconds=70)
    made = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: made.append(timeout.total_seconds()))
    monkeypatch.setattr("vp_train.train.build_mesh", lambda degrees, problem, settings, **_: made.append(settings))
    _connect(config, make_plan(config, 2))
    assert made == [70, config.run]
    for seconds in ranks(4).run(timeouts_of, laid_out(config, pp=2, dp=2)):
        assert seconds == {"world": 70} | dict.fromkeys(("steps", "tensor", "data", "down", "up", "input", "output"), 7)


def timeouts_of(rank, num_ranks, config):
    plan = make_plan(config, num_ranks)
    mesh = build_mesh(plan.degrees, plan.problem, config.run)
    peer = 1 - mesh.pipeline_rank
    groups = {"world": mesh.world.row, "steps": mesh.steps.row, "tensor": mesh.tensor, "data": mesh.data}
    groups |= {"down": mesh.pipeline.sends[peer], "up": mesh.pipeline.receives[peer]}
    groups |= {end.value: group for end, group in mesh.pipeline.ends.items()}
    found = {name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for name, group in groups.items()}
    mesh.destroy()
    return found


def test_more_ranks_than_gpus_are_refused_on_all_of_them_before_they_meet(tmp_path, monkeypatch):
    config = config_of(tmp_path, device="cuda")
    monkeypatch.setattr("vp_train.train.set_environment", lambda *_: None)  # tests to come start processes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local_rank in "01":
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(ConfigError, match=r"2 ranks on a node whose GPUs are 1, .* run.comm_backend=gloo"):
            _connect(config, make_plan(config, 2))


def test_a_loss_that_is_no_number_stops_a_float16_run_whatever_its_scale():
    scale = LossScale.of("float16")
    run = SimpleNamespace(
        model=SimpleNamespace(loss_scale=scale),
        _memory=SimpleNamespace(skipped_in_a_row=0),
        config=RunConfig(),
        mesh=SimpleNamespace(rank=0),
    )
    Run._handle_nonfinite(run, 3, StepHealth(1.0, math.inf, ((1, "gradient"),), 0.0))
    assert scale.value == 2.0**15, "an overflow"
    with pytest.raises(NonFiniteError, match="step 3: non-finite loss on rank 1"):
        Run._handle_nonfinite(run, 3, StepHealth(math.nan, math.inf, ((1, "loss"),), 0.0))
    assert scale.value == 2.0**15


def test_a_resumed_float16_run_has_its_loss_scale_again(ranks, tmp_path):
    config = config_of(tmp_path, dtype="float16", eval_every=0, trace_step=0)
    assert ranks(2).run(loss_scale_of, config, 2.0**11) == [2.0**11] * 2
    ranks(2).run(release_locks)
    assert ranks(2).run(loss_scale_of, replace(config, run=replace(config.run, resume=True)), None) == [2.0**11] * 2


def loss_scale_of(rank, num_ranks, config, first):
    """After a step that begins with `first`, None: with what was saved."""
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    run = Run(config, plan, mesh, open_source(config), build_rank(config, plan, mesh))
    if first is not None:
        run.model.loss_scale.value = first
        run.train_step(4, None)  # which is saved
    return run.model.loss_scale.value


def test_validation_keeps_to_documents_as_training_does(monkeypatch):
    monkeypatch.setattr("vp_train.train.gather_health", lambda loss, *_: StepHealth(loss, 0.0, (), 0.0))
    segments = torch.tensor([[[0, 1]]])
    batch = Batch(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), segments)
    seen = []
    run = SimpleNamespace(
        source=SimpleNamespace(validation_batch=lambda *_: batch),
        mesh=SimpleNamespace(data_rank=0, degrees=SimpleNamespace(dp=1), steps=None),
        model=SimpleNamespace(evaluator=SimpleNamespace(step=lambda *_, segments: seen.append(segments) or 1.5)),
        _on_device=lambda given: given,
        _own=lambda loss: loss,
    )
    assert Run._validate(run) == 1.5
    assert seen == [segments]


def parameters_after(rank, num_ranks, config, poison):
    """Parameters before and after one step in which rank 1's gradients are poisoned, and what happened."""
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    model = build_rank(config, plan, mesh)
    run = Run(config, plan, mesh, open_source(config), model)
    before = [parameter.detach().clone() for parameter in model.parameters.values()]
    if poison and rank == 1:
        inner = model.parameters["final_norm.weight"]
        inner.register_hook(lambda grad: torch.full_like(grad, torch.nan))
    said = "went on"
    try:
        run.train_step(1, None)
    except NonFiniteError as error:
        said = str(error)
    dist.barrier()
    model.optimizer.settle()
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters.values(), strict=True))
    return said, same


def test_a_nonfinite_gradient_stops_before_the_update_and_names_step_and_rank(ranks, tmp_path):
    for said, same in ranks(2).run(parameters_after, config_of(tmp_path), True):
        assert "step 1: non-finite gradient on rank 1" in said
        assert "run.on_nonfinite=skip" in said
        assert same


def test_a_nonfinite_step_can_be_skipped(ranks, tmp_path):
    config = config_of(tmp_path, on_nonfinite="skip")
    assert ranks(2).run(parameters_after, config, True) == [("went on", True)] * 2
    assert ranks(2).run(parameters_after, config, False) == [("went on", False)] * 2


def test_skipping_ends_when_nothing_is_finite_any_more(ranks, tmp_path):
    config = config_of(tmp_path, steps=50, on_nonfinite="skip")
    config = replace(config, model=replace(config.model, init_std=1e30))
    for said in ranks(2).run(train, config):
        assert "10 steps in a row" in said


def scales_of(rank, num_ranks, config):
    """Loss scales after every step, from one far too large, and the steps at which parameters changed."""
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    run = Run(config, plan, mesh, open_source(config), build_rank(config, plan, mesh))
    run.model.loss_scale.value = 2.0**30
    scales, changed, norms = [], [], []
    for step in run.steps():
        before = run.model.optimizer.updates
        run.train_step(step, None)
        scales.append(run.model.loss_scale.value)
        changed.append(run.model.optimizer.updates > before)
        run.model.optimizer.settle()
        norms.append(sum(parameter.detach().double().square().sum().item() for parameter in run.model.parameters.values()))
    return scales, changed, norms


def test_steps_that_overflow_float16_are_skipped_until_the_loss_scale_is_right(ranks, tmp_path):
    config = config_of(tmp_path, steps=20, dtype="float16", checkpoint_every=0, eval_every=0, trace_step=0)
    norms = []
    for layout in ({"pp": 1, "dp": 2}, {"pp": 1, "dp": 2, "optimizer": "zero1"}, {**OFFLOADED, "dp": 2}):
        for scales, changed, last in ranks(2).run(scales_of, laid_out(config, **layout)):
            assert not any(changed[:3])
            assert all(changed[-5:])
            assert scales == [2.0 ** (30 - changed[:step].count(False)) for step in range(1, 21)]
            norms.append(last)
    for others in norms:
        assert others == pytest.approx(norms[0], rel=1e-3), "nothing of a skipped step may be left"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_learn_as_float32_does(ranks, tmp_path, dtype):
    runs = [config_of(tmp_path, name, dtype=name, checkpoint_every=0, eval_every=0) for name in ("float32", dtype)]
    for config in runs:
        ranks(2).run(train, config)
    assert len(metrics_of(runs[0])) == 8
    for exact, rounded in zip(*map(metrics_of, runs), strict=True):
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=5e-3)
        if exact["step"] <= 3:  # later, small gradients have taken other signs, and AdamW other ways
            assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=2e-2)


def test_bfloat16_converges_to_the_entropy_of_its_data(ranks, tmp_path):
    config = config_of(tmp_path, steps=100, dtype="bfloat16", checkpoint_every=0, eval_every=100, eval_microbatches=64)
    config = replace(
        config,
        model=ModelConfig(
            num_layers=2, hidden_size=64, num_heads=2, num_query_groups=2, ffn_hidden_size=64, vocab_size=40, seq_length=64
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=10, weight_decay=0.0),
        micro_batch_size=8,
    )
    ranks(2).run(train, config, timeout=100)
    assert abs(metrics_of(config)[-1]["validation_loss"] - open_source(config).entropy) < 0.05


MISBEHAVING = """
import os, sys, threading, time
from pathlib import Path
import vp_train.train
from vp_train.train import Run
from vp_train.cli import train
def watch(groups, failed):
    Run.nccl_failed = staticmethod(failed)
    return threading.Event()
vp_train.train.watch = watch
inner = Run.train_step
def failing(self, step, reporter):
    if step == 2 and self.mesh.rank == 1:
        {deed}
    inner(self, step, reporter)
Run.train_step = failing
train()
"""


def misbehave(tmp_path, deed, patience, *, timeout):
    """A run of two ranks, of which the second does `deed` in step 2."""
    script = tmp_path / "misbehaving.py"
    script.write_text(MISBEHAVING.replace("{deed}", deed))
    overrides = ["model=nano", "data=synthetic", f"run.root={tmp_path}/runs", "run.steps=100", "run.trace_step=0"]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(script), *overrides, f"run.timeout_seconds={patience}"),
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_a_rank_that_hangs_ends_the_job_when_its_time_is_up(tmp_path):
    done = misbehave(tmp_path, "time.sleep(1000)", 15, timeout=100)
    assert done.returncode != 0
    assert "rank 0: stopped at step 2, another rank has not answered for 15 s (run.timeout_seconds)" in done.stderr, done.stderr
    assert re.search(rf"exitcode +: {EXIT_HANG} ", done.stderr)  # as torchrun reports it
    assert "Traceback" not in done.stderr.partition("rank 0: stopped")[0]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("TIMEOUT", EXIT_HANG, "another rank has not answered for 60 s (run.timeout_seconds); it may hang"),
        ("REMOTE_ERROR", EXIT_INTERNAL, "another rank went away"),
    ],
)
def test_an_error_of_nccl_ends_the_job_with_a_line_that_names_the_record(tmp_path, error, code, words):
    record = flight_recorder.file_of({}, tmp_path / "runs" / "default", 1)
    write = f"Path('{record.parent}').mkdir(); Path('{record}').write_text('last words')"
    done = misbehave(tmp_path, f"{write}; Run.nccl_failed('{error}')", 60, timeout=50)
    assert f"rank 1: stopped at step 2, {words}; its last communications: {record}\n" in done.stderr, done.stderr
    assert re.search(rf"rank +: 1 .*\n +exitcode +: {code} ", done.stderr)
    assert "Traceback" not in done.stderr.partition("rank 1: stopped")[0]


def test_a_rank_that_raises_ends_the_job_with_its_traceback(tmp_path):
    done = misbehave(tmp_path, 'raise RuntimeError("deliberate failure")', 60, timeout=50)  # nobody waits for the dead
    assert done.returncode != 0
    assert "rank 1 failed at step 2" in done.stderr
    assert "RuntimeError: deliberate failure" in done.stderr
    assert done.stderr.count("deliberate failure") <= 2  # the raise line and the message: one traceback


def test_a_file_that_cannot_be_written_ends_the_job_with_a_line(tmp_path):
    deed = 'raise OSError(28, "No space left on device", "metrics.jsonl")'
    done = misbehave(tmp_path, deed, 60, timeout=50)
    assert done.returncode != 0
    assert "vp-train: [Errno 28] No space left on device: 'metrics.jsonl', at step 2; once that is mended" in done.stderr
    assert "Traceback" not in done.stderr.partition("vp-train: [Errno 28]")[0]
    assert re.search(rf"exitcode +: {EXIT_IO} ", done.stderr)


@pytest.mark.parametrize("when", ["they train", "they start"])
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path, when):
    overrides = ["model=nano", "data=synthetic", f"run.root={tmp_path}/runs", "run.steps=10000", "parallel.pp=2"]
    launcher = subprocess.Popen([sys.executable, "-m", "vp_train", *overrides], stdout=subprocess.PIPE, text=True)
    if when == "they train":
        for line in launcher.stdout:
            if line.startswith("step"):
                break
    while len(ranks := children_of(launcher.pid)) < 2:
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "ranks live on"
        time.sleep(0.05)


def children_of(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_a_reader_that_goes_away_ends_the_run_with_a_word(tmp_path):
    overrides = ["model=nano", "data=synthetic", "parallel.pp=2", "run.steps=50", "run.log_every=1", f"run.root={tmp_path}"]
    command = [sys.executable, "-m", "vp_train", *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=90) == 128 + signal.SIGPIPE
        assert "vp-train: nobody reads the output any more" in process.stderr.read()
