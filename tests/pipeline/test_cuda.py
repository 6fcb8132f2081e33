"""The same program on a GPU gives the same numbers."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from schedules.vocab import VOCAB_ALGORITHMS
from tests.local import run_locally
from tests.meshes import mesh_for
from tests.pipeline.test_equivalence import config_of
from tests.pipeline.test_local import gradients_of
from tests.pipeline.test_offload import offloading, plan_of
from tests.pipeline.truth import random_batch
from vp_train.assembly import build_rank
from vp_train.config import VocabConfig
from vp_train.pipeline.offload import HostLink
from vp_train.pipeline.stopwatch import Part, Stopwatch
from vp_train.pipeline.timers import timer_of
from vp_train.planning.plan import make_plan

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_device(config, device):
    run = replace(config.run, device=device, comm_backend="gloo", compile="off")
    return replace(config, run=run)


@on_gpu
@pytest.mark.parametrize("p", [1, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_h1", "zb_v", "v_half"])
@pytest.mark.parametrize("algorithm", VOCAB_ALGORITHMS)
def test_ranks_on_streams_of_a_gpu_equal_the_cpu_in_float64(p, schedule, algorithm):
    config = config_of(p, 4, 101, schedule=schedule, vocab=VocabConfig(algorithm), num_stages=2 * p)
    plan, batch = make_plan(config, p), random_batch(config, 1)
    cpu, gpu = (gradients_of(on_device(config, device), plan, batch) for device in ("cpu", "cuda"))
    assert gpu.keys() == cpu.keys()
    for name, expected in cpu.items():
        assert torch.allclose(gpu[name].cpu(), expected, rtol=1e-9, atol=1e-12), name


@on_gpu
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "v_half"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_activations_in_host_memory_equal_the_cpu_in_float64(monkeypatch, schedule, recompute):
    moved, copy = [], HostLink.copy

    def counting(link, side, pairs):
        moved.extend(target.nbytes for target, _ in pairs)
        return copy(link, side, pairs)

    monkeypatch.setattr(HostLink, "copy", counting)
    config = config_of(3, 4, 101, schedule=schedule, num_stages=6)
    config = replace(config, parallel=replace(config.parallel, recompute=recompute))
    batch = random_batch(config, 1)
    expected = gradients_of(on_device(config, "cpu"), make_plan(config, 3), batch)
    gpu = offloading(on_device(config, "cuda"))
    for seed in range(5):
        plan = plan_of(gpu, 3, seed)
        found = gradients_of(gpu, plan, batch, delay_seconds=4e-4, seed=seed)
        for name, tensor in expected.items():
            assert torch.allclose(found[name].cpu(), tensor, rtol=1e-9, atol=1e-12), name
    assert sum(moved) > 0


@on_gpu
def test_the_parts_of_a_step_are_its_time_on_the_stream_of_the_passes():
    config = on_device(config_of(2, 4, 101), "cuda")

    def work(rank, model, together):
        watch, found = Stopwatch(timer_of(torch.device("cuda", torch.cuda.current_device()))), []
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first one allocates
            model.gradients.zero()
            together.gather(rank, None)
            watch.switch(Part.REST)
            watch.switch(Part.DATA)
            begin.record()
            watch.take()
            model.train_step(*random_batch(config, 1), watch)
            model.optimizer.reduce()
            end.record()
            watch.switch(Part.REST)
            found = watch.take()
        return found, begin.elapsed_time(end) / 1e3

    for parts, seconds in run_locally(config, make_plan(config, 2), work):
        assert sum(parts.values()) == pytest.approx(seconds, abs=1e-3)
        assert 0 < parts[Part.FORWARD_BACKWARD] < seconds


def gradients_on(rank, num_ranks, config, device):
    config = on_device(config, device)
    plan = make_plan(config, num_ranks)
    model = build_rank(config, plan, mesh_for(plan))
    loss = model.train_step(*random_batch(config, 1))
    return None if loss is None else loss.item(), {
        name: parameter.grad.cpu() for name, parameter in model.parameters.items()
    }


@on_gpu
@pytest.mark.parametrize(
    ("schedule", "algorithm"), [("1f1b", "one_barrier"), ("v_half", "two_barrier")]
)
def test_processes_that_share_a_gpu_equal_the_cpu_in_float64(ranks, schedule, algorithm):
    """The processes communicate over gloo, through host memory."""
    config = config_of(4, 4, 101, schedule=schedule, vocab=VocabConfig(algorithm), num_stages=8)
    on_cpu, on_gpu = (ranks(4).run(gradients_on, config, device) for device in ("cpu", "cuda"))
    assert any(cpu_loss is not None for cpu_loss, _ in on_cpu)
    for (cpu_loss, cpu), (gpu_loss, gpu) in zip(on_cpu, on_gpu, strict=True):
        assert (gpu_loss is None) == (cpu_loss is None)
        assert gpu_loss is None or gpu_loss == pytest.approx(cpu_loss, rel=1e-9)
        assert gpu.keys() == cpu.keys()
        for name, expected in cpu.items():
            assert torch.allclose(gpu[name], expected, rtol=1e-9, atol=1e-12), name


@on_gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["schedule=v_half", "parallel.recompute=selective"],
        ["optim.name=zero1", "parallel.dp=2"],
    ],
)
def test_the_trainer_on_a_gpu_loses_as_on_the_cpu_in_bfloat16(tmp_path, more):
    """Four ranks that share the GPUs run vp-train from its command line to its checkpoint."""
    common = [
        "model=nano",
        "model.num_layers=8",
        "data=synthetic",
        "run.dtype=bfloat16",
        "run.steps=10",
        f"run.root={tmp_path}",
    ]
    degrees = ["parallel.pp=2"] if "parallel.dp=2" in more else ["parallel.pp=4"]
    losses = {}
    for device in ("cpu", "cuda"):
        words = [
            *common,
            *degrees,
            *more,
            f"run.device={device}",
            "run.comm_backend=gloo",
            f"run.name={device}",
        ]
        command, environment = (
            [sys.executable, "-m", "vp_train", *words],
            os.environ | {"OMP_NUM_THREADS": "1"},
        )
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=110, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        losses[device] = [json.loads(line)["loss"] for line in lines]
        assert (tmp_path / device / "checkpoints" / "step-00000010").is_dir()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)
    assert losses["cuda"][-1] < losses["cuda"][0]
