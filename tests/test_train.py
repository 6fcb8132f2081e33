"""A run learns and reports, and stops at or skips steps whose values are not finite."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import vp_train.train as train_module
from schedules.ir import Kind, Pass, Schedule
from schedules.lower import Action, Op
from schedules.problem import Collective
from tests.meshes import mesh_for
from tests.programs import finished
from tests.training import (
    OFFLOADED,
    begin,
    config_of,
    config_on_letters,
    laid_out,
    metrics_of,
    release_locks,
    train,
    uncompiled,
)
from vp_train.assembly import build_rank
from vp_train.commands.train import main
from vp_train.config import (
    ConfigError,
    CostConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    VocabConfig,
)
from vp_train.data import Batch, open_source
from vp_train.mesh import build_mesh, connect
from vp_train.metrics.progress import Validation
from vp_train.metrics.trackers import Tracker
from vp_train.model import elementwise
from vp_train.optim.adamw import StepHealth
from vp_train.optim.loss_scale import LossScale
from vp_train.optim.verdict import Judge
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config
from vp_train.supervision.watcher import Watcher
from vp_train.train import DivergenceError, Run


def test_a_run_learns_and_leaves_everything_in_its_directory(ranks, tmp_path):
    config = config_of(tmp_path, steps=24, eval_every=12)
    ranks(2).run(train, config)
    records = metrics_of(config)
    assert [record["step"] for record in records] == list(range(1, 25))
    assert (
        records[23]["validation_loss"] < records[11]["validation_loss"] < records[0]["loss"] - 0.3
    )
    directory = tmp_path / "run"
    for name in (
        "config.yaml",
        "env.json",
        "schedule.txt",
        "schedule.svg",
        "trace/step.json",
        "trace/step.svg",
        "tensorboard",
    ):
        assert (directory / name).exists(), name
    events = json.loads((directory / "trace" / "step.json").read_text())["traceEvents"]
    assert {"0E0", "1F0", "0S3", "1T3", "0G3"} <= {event["name"] for event in events}
    lanes = {
        event["pid"]
        for event in events
        if event["name"] == "process_name" and "measured" in event["args"]["name"]
    }
    communications = {
        event["name"] for event in events if event["pid"] in lanes and event.get("tid") == 1
    }
    barriers = {f"{name}.{i}" for name in ("CE", "C0", "C1", "C1b", "CG") for i in range(4)}
    assert communications - {"thread_name"} == barriers | {
        f"{stage}{i}" for stage in ("0F", "1B") for i in range(4)
    }
    assert [path.name for path in sorted((directory / "checkpoints").iterdir())] == [
        "step-00000020",
        "step-00000024",
    ]


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
    done = finished(main, *words)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "a=b, c" / "searched"
    written = Schedule.parse((directory / "schedule.txt").read_text())
    assert written.name.startswith("auto from ")
    assert f"schedule  {written.name}, vocabulary one_barrier, 3 microbatches" in done.stdout
    events = json.loads((directory / "trace" / "step.json").read_text())["traceEvents"]
    lanes = {
        event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"
    }
    passes = sorted(
        (event for event in events if event["ph"] == "X" and event["tid"] == 0),
        key=lambda event: event["ts"],
    )
    for rank, order in enumerate(written.ranks):
        measured = [
            event["name"] for event in passes if event["pid"] == lanes[f"measured rank {rank}"]
        ]
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


def connect_alone(config):
    connect(config, make_plan(config, 2), Watcher(config.run, 0, 2))


def test_a_deterministic_run_asks_torch_for_it(monkeypatch, tmp_path):
    config = config_of(tmp_path, deterministic=True)
    monkeypatch.setattr("vp_train.mesh.join_world", lambda *_: None)
    monkeypatch.setattr("vp_train.mesh.build_mesh", lambda *_, **__: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        connect_alone(config)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_group_of_all_ranks_waits_for_the_world_s_time_and_every_other_for_a_step_s(
    ranks, tmp_path, monkeypatch
):
    config = config_of(tmp_path, timeout_seconds=7, world_timeout_seconds=70)
    made = []
    monkeypatch.setattr(
        "vp_train.mesh.join_world", lambda backend, timeout: made.append(timeout.total_seconds())
    )
    monkeypatch.setattr(
        "vp_train.mesh.build_mesh", lambda degrees, problem, settings, **_: made.append(settings)
    )
    connect_alone(config)
    assert made == [70, config.run]
    for seconds in ranks(4).run(timeouts_of, laid_out(config, pp=2, dp=2)):
        assert seconds == {"world": 70} | dict.fromkeys(
            ("steps", "tensor", "data", "down", "up", "input", "output"), 7
        )


def timeouts_of(rank, num_ranks, config):
    plan = make_plan(config, num_ranks)
    mesh = build_mesh(plan.degrees, plan.problem, config.run)
    peer = 1 - mesh.pipeline_rank
    groups = {
        "world": mesh.world.row,
        "steps": mesh.steps.row,
        "tensor": mesh.tensor,
        "data": mesh.data,
    }
    groups |= {"down": mesh.pipeline.sends[peer], "up": mesh.pipeline.receives[peer]}
    groups |= {end.value: group for end, group in mesh.pipeline.ends.items()}
    found = {
        name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for name, group in groups.items()
    }
    mesh.destroy()
    return found


def test_more_ranks_than_gpus_are_refused_on_all_of_them_before_they_meet(tmp_path, monkeypatch):
    config = config_of(tmp_path, device="cuda")
    # Later tests start processes, which must not inherit this environment.
    monkeypatch.setattr("vp_train.communication.nccl.set_environment", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for local_rank in "012":
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(
            ConfigError, match=r"3 ranks but 2 GPU\(s\) on this node, .* run.comm_backend=gloo"
        ):
            connect_alone(config)


def test_a_nan_loss_stops_a_float16_run_whatever_its_scale_and_an_overflow_is_a_skipped_step():
    scale = LossScale.of("float16")
    run = SimpleNamespace(
        model=SimpleNamespace(loss_scale=scale),
        _judge=Judge(RunConfig().run),
        _checkpoints=SimpleNamespace(saved_step=0),
        first_step=1,
        _say=lambda *_: None,
    )
    overflow = StepHealth(1.0, math.inf, ((1, "gradient"),), 0.0)
    assert Run._update(run, 3, overflow, 1.0)
    assert scale.value == 2.0**15, "an overflow"
    assert run._judge.skipped == 1
    with pytest.raises(DivergenceError, match="step 3: non-finite loss on rank 1"):
        Run._update(run, 3, StepHealth(math.nan, math.inf, ((1, "loss"),), 0.0), 1.0)
    assert scale.value == 2.0**15


def test_validation_keeps_to_documents_as_training_does(monkeypatch):
    monkeypatch.setattr(
        "vp_train.train.gather_health", lambda loss, *_: StepHealth(loss, 0.0, (), 0.0)
    )
    segments = torch.tensor([[[0, 1]]])
    batch = Batch(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), segments)
    seen = []
    run = SimpleNamespace(
        source=SimpleNamespace(validation_sets=("",), validation_batch=lambda *_, name: batch),
        mesh=SimpleNamespace(data_rank=0, degrees=SimpleNamespace(dp=1), steps=None),
        model=SimpleNamespace(
            evaluator=SimpleNamespace(step=lambda *_, segments: seen.append(segments) or 1.5)
        ),
        _now=lambda *_: None,
        _reported=lambda loss: loss,
        _bits_per_byte=SimpleNamespace(of=lambda *_: None),
    )
    assert Run._validate(run) == [Validation("", 1.5)]
    assert seen == [segments]


def poisoned(model):
    """Return a context in which a backward makes the gradient of the final norm NaN."""
    final, add = model.parameters["final_norm.weight"], elementwise.add_gradient

    def add_poison(parameter, gradient):
        add(parameter, gradient * torch.nan if parameter is final else gradient)

    return patch.object(elementwise, "add_gradient", add_poison)


def parameters_after(rank, num_ranks, config, poison):
    """Run one step, in which rank 1's gradients may be NaN.

    Returns the error, or "went on", and whether the parameters stayed the same.
    """
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    model = build_rank(config, plan, mesh)
    run = Run(config, plan, mesh, open_source(config), model)
    run.load()
    before = [parameter.detach().clone() for parameter in model.parameters.values()]
    said = "went on"
    try:
        with poisoned(model) if poison and rank == 1 else nullcontext():
            run.train_step(1)
    except DivergenceError as error:
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
    config = replace(config, model=replace(config.model, init_std=1e30, embedding_multiplier=1e30))
    for said in ranks(2).run(train, config):
        assert "10 steps in a row" in said


class SlowService:
    def __init__(self):
        self.steps, self.closed, self.failed = [], 0.0, False

    def record(self, step, values):
        time.sleep(0.02)
        self.steps.append(step)

    def close(self, *, failed):
        self.closed, self.failed = time.monotonic(), failed


def give_up(rank, num_ranks, config):
    """Train until the run does not survive a step; return what a tracker got, and when."""
    run = begin(rank, num_ranks, config)
    service = SlowService()
    if run.reporter is not None:
        run.reporter._log._writers.append(Tracker("slow", lambda: service))
    with suppress(DivergenceError):
        for step in run.steps():
            run.train_step(step)
    run.give_up("it diverged")
    return service.steps, service.closed, service.failed, time.monotonic()


def test_a_run_that_diverges_leaves_its_trackers_with_all_steps_and_all_ranks_wait(ranks, tmp_path):
    config = config_of(tmp_path, steps=50, on_nonfinite="skip", trace_step=0)
    config = replace(config, model=replace(config.model, init_std=1e30, embedding_multiplier=1e30))
    (steps, closed, failed, _), (*_, left) = ranks(2).run(give_up, config)
    assert steps == list(range(1, 10))
    assert failed
    assert left > closed


def replicas_with_a_nan(rank, num_ranks, config, optimizer):
    """Run one step of two replicas of one rank each.  Rank 1 makes a NaN in its backward."""
    config = replace(config, optim=replace(config.optim, name=optimizer))
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    run = Run(config, plan, mesh, open_source(config), build_rank(config, plan, mesh))
    try:
        with poisoned(run.model) if rank == 1 else nullcontext():
            run.train_step(1)
    except DivergenceError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("optimizer", ["adamw", "zero1"])
def test_a_nan_names_the_replica_that_made_it_before_the_sum(ranks, tmp_path, optimizer):
    config = config_of(tmp_path)
    config = replace(config, parallel=replace(config.parallel, dp=2, pp=1), num_microbatches=2)
    for said in ranks(2).run(replicas_with_a_nan, config, optimizer):
        assert said.startswith("step 1: non-finite gradient on rank 1 (replica 1); ")


def test_metrics_say_how_much_text_was_used_over_all_starts(ranks, tmp_path):
    """Law: tokens grow by those of a step, and passes by their share of the training samples."""
    config = config_on_letters(tmp_path, eval_every=0, trace_step=0)
    ranks(2).run(train, config, 3)
    ranks(2).run(release_locks)
    ranks(2).run(train, replace(config, run=replace(config.run, resume=True)), 5)
    records = metrics_of(config)
    of_step = config.num_microbatches * config.micro_batch_size * config.model.seq_length
    assert [record["tokens"] for record in records] == [of_step * step for step in range(1, 6)]
    one = open_source(config).tokens_of_pass
    assert [record["passes"] for record in records] == [n["tokens"] / one for n in records]


def with_a_spike(rank, num_ranks, config, spikes):
    """Train; the losses of the steps `spikes`, counted by data, are told 100 times too high."""
    run = begin(rank, num_ranks, config)
    steps, batches = [], []
    inner = run.model.train_step
    tokens = run.plan.work.num_microbatches * run.plan.work.num_tokens

    def train_step(*arguments, **options):
        loss = inner(*arguments, **options)
        batches.append(run._batches.tokens_until(run.step) // tokens)
        return loss if loss is None or batches[-1] not in spikes else 100 * loss

    run.model = Wrapped(run.model, train_step)
    try:
        for step in run.steps():
            steps.append(step)
            run.train_step(step)
        run.finish()
    except DivergenceError as error:
        return steps, batches, str(error)
    return steps, batches, ""


class Wrapped:
    """A model whose train_step is another function."""

    def __init__(self, model, train_step):
        self._model, self.train_step = model, train_step

    def __getattr__(self, name):
        return getattr(self._model, name)


def test_a_spike_goes_back_to_the_checkpoint_and_leaves_out_the_data(ranks, tmp_path):
    config = config_of(
        tmp_path, steps=22, on_spike="go_back", checkpoint_every=8, eval_every=0, trace_step=0
    )
    # Step 18 has the spike, and goes back to step 16.  Step 17 then has the data of step 19.
    for steps, batches, said in ranks(2).run(with_a_spike, config, {18}):
        assert steps == [*range(1, 19), *range(17, 23)]
        assert batches == [*range(1, 19), *range(19, 25)]
        assert said == ""
    assert [line["step"] for line in metrics_of(config)] == list(range(1, 23))
    assert metrics_of(config)[-1]["spikes"] == metrics_of(config)[-1]["skipped_steps"] == 1
    # A resumed run goes on with the data that comes next.
    ranks(2).run(release_locks)
    longer = replace(config, run=replace(config.run, steps=24, resume=True))
    for steps, batches, _ in ranks(2).run(with_a_spike, longer, set()):
        assert steps == [23, 24]
        assert batches == [25, 26]
    assert metrics_of(config)[-1]["spikes"] == metrics_of(config)[-1]["skipped_steps"] == 1


def scales_of(rank, num_ranks, config):
    """Start from a loss scale that is far too large.

    Returns, after every step: the loss scale, whether the optimizer updated, and the sum of squares
    of the parameters.
    """
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    run = Run(config, plan, mesh, open_source(config), build_rank(config, plan, mesh))
    run.load()
    run.model.loss_scale.value = 2.0**25
    scales, changed, norms = [], [], []
    for step in run.steps():
        before = run.model.optimizer.updates
        run.train_step(step)
        scales.append(run.model.loss_scale.value)
        changed.append(run.model.optimizer.updates > before)
        run.model.optimizer.settle()
        norms.append(
            sum(
                parameter.detach().double().square().sum().item()
                for parameter in run.model.parameters.values()
            )
        )
    return scales, changed, norms


@pytest.mark.slow
def test_steps_that_overflow_float16_are_skipped_until_the_loss_scale_is_right(ranks, tmp_path):
    config = config_of(
        tmp_path, steps=13, dtype="float16", checkpoint_every=0, eval_every=0, trace_step=0
    )
    norms = []
    for layout in (
        {"pp": 1, "dp": 2},
        {"pp": 1, "dp": 2, "optimizer": "zero1"},
        {**OFFLOADED, "dp": 2},
    ):
        for scales, changed, last in ranks(2).run(
            uncompiled, scales_of, laid_out(config, **layout)
        ):
            assert not any(changed[:3])
            assert all(changed[-5:])
            assert scales == [2.0 ** (25 - changed[:step].count(False)) for step in range(1, 14)]
            norms.append(last)
    for others in norms:
        assert others == pytest.approx(norms[0], rel=1e-3), "nothing of a skipped step may be left"


def test_sixteen_bits_learn_as_float32_does(ranks, tmp_path):
    runs = []
    for dtype in ("float32", "bfloat16", "float16"):
        config = config_of(tmp_path, dtype, dtype=dtype, checkpoint_every=0, eval_every=0)
        ranks(2).run(uncompiled, train, config)
        runs.append(metrics_of(config))
    assert len(runs[0]) == 8
    for exact, *others in zip(*runs, strict=True):
        for rounded in others:
            assert rounded["loss"] == pytest.approx(exact["loss"], rel=5e-3)
            # Later, rounding flips the signs of small gradients, and AdamW takes other steps.
            if exact["step"] <= 3:
                assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=2e-2)


@pytest.mark.slow
def test_bfloat16_converges_to_the_entropy_of_its_data(ranks, tmp_path):
    config = config_of(
        tmp_path,
        steps=60,
        dtype="bfloat16",
        checkpoint_every=0,
        eval_every=60,
        eval_microbatches=64,
    )
    config = replace(
        config,
        model=ModelConfig(
            num_layers=2,
            hidden_size=64,
            num_heads=2,
            num_query_groups=2,
            ffn_hidden_size=64,
            vocab_size=40,
            seq_length=64,
        ),
        optim=OptimConfig(lr=2e-2, warmup_steps=5, weight_decay=0.0),
        num_microbatches=2,
        micro_batch_size=8,
    )
    ranks(2).run(uncompiled, train, config, timeout=100)
    assert abs(metrics_of(config)[-1]["validation_loss"] - open_source(config).entropy) < 0.05


@pytest.mark.parametrize(
    ("doing", "operation", "said", "waits"),
    [
        ("training", Op(Action.RUN, Pass(1, Kind.F, 5)), "step 3, training, 1F5", False),
        ("training", Op(Action.ARRIVE, Pass(1, Kind.F, 5), 0), "training, arrive:1F5@0", True),
        ("training", Op(Action.NEED, Pass(1, Kind.F, 5)), "training, need:1F5", True),
        ("validating", Op(Action.WAIT, Collective("C1", 3)), "validating, wait:C1.3", True),
        ("waiting for data", None, "step 3, waiting for data", False),
        ("beginning", None, "step 3, beginning", False),
        (train_module._COMPARING, None, "with other ranks", True),
        (train_module._SAVING, None, "saving with other ranks", True),
    ],
)
def test_a_heartbeat_says_where_a_rank_is_and_whether_it_waits(doing, operation, said, waits):
    executor = SimpleNamespace(operation=operation)
    run = SimpleNamespace(
        step=3, _doing=doing, model=SimpleNamespace(trainer=executor, evaluator=executor)
    )
    activity = Run.activity(run)
    assert said in activity.doing
    assert activity.waits is waits


def test_minutes_alone_save_the_last_step_too(ranks, tmp_path):
    config = config_of(tmp_path, steps=3, checkpoint_every=0, checkpoint_minutes=60.0)
    ranks(2).run(train, config)
    assert [path.name for path in (config.run.directory / "checkpoints").iterdir()] == [
        "step-00000003"
    ]
