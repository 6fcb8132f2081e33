"""Runs on GPUs are planned for the machines that they have, whoever starts their ranks."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch

from vp_train.commands import machine
from vp_train.commands.machine import PRESETS, gpu_name, machine_words
from vp_train.commands.place import Place
from vp_train.commands.train import _on_its_machines, _train
from vp_train.config import ClusterConfig
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config
from vp_train.settings.files import config_text

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
OF_H100 = ["cluster=h100_80g_node", "run.device=cuda", "run.dtype=float32"]
TWO_OF_FOUR = ["cluster.num_nodes=2", "cluster.gpus_per_node=4"]
RUN = ["model=nano", "run.device=cuda"]


def words_of(*overrides, gpu=H100, problem=""):
    return machine_words(load_config(overrides), overrides, 2, 4, gpu, problem)


@pytest.mark.parametrize(("name", "preset"), PRESETS.items())
def test_a_gpu_has_the_preset_of_its_name_and_all_else_stays(name, preset):
    given = [*RUN, "run.dtype=float16"]
    words, line = words_of(*given, gpu=name)
    found, typed = load_config([*given, *words]), load_config([f"cluster={preset}"]).cluster
    assert found.cluster == replace(typed, num_nodes=2, gpus_per_node=4)
    assert replace(found, cluster=ClusterConfig()) == load_config(given)
    assert line == f"{preset}, by the name of the GPU, {name}"
    size = name.partition("GB")[0].rpartition("-")[2].rpartition(" ")[2]
    assert size == "H200" or found.cluster.memory_gib < int(size) * 1e9 / 2**30 + 1


def test_what_is_typed_stands_and_the_rest_follows_from_the_launch():
    assert words_of(*RUN, "cluster=a100_80g_node") == (TWO_OF_FOUR, "")
    assert words_of(*RUN, "cluster=laptop") == (TWO_OF_FOUR, "")
    words, _ = words_of(*RUN, "cluster.gpus_per_node=8", "cluster.memory_gib=70")
    assert words == [*OF_H100, "cluster.num_nodes=2"]
    cluster = load_config(
        [*RUN, "cluster.gpus_per_node=8", "cluster.memory_gib=70", *words]
    ).cluster
    assert (cluster.gpus_per_node, cluster.memory_gib, cluster.num_nodes) == (8, 70.0, 2)
    assert cluster.multiprocessors == 132
    assert words_of(*RUN, "cluster.float32_flops_per_second=5e13") == (TWO_OF_FOUR, "")


def test_an_unknown_gpu_is_said_with_what_to_type_and_no_gpu_is_nothing_to_say():
    words, line = words_of(*RUN, gpu="NVIDIA B200")
    assert words == TWO_OF_FOUR
    assert line.startswith("no preset for NVIDIA B200, so costs are assumed to be those of ")
    assert line.endswith(
        "cluster=NAME: a100_40g_node, a100_80g_node, h100_80g_node, h200_141g_node"
    )
    words, unread = words_of(*RUN, gpu="", problem="RuntimeError: busy")
    assert words == TWO_OF_FOUR
    why = "the name of the GPU cannot be read (RuntimeError: busy)"
    assert unread == line.replace("no preset for NVIDIA B200", why)
    assert words_of(*RUN, gpu="") == (TWO_OF_FOUR, "")


def test_a_resumed_run_keeps_its_cluster_and_takes_one_if_it_had_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = load_config([*RUN, "run.name=one"])
    first.run.directory.mkdir(parents=True)
    saved, resumed = first.run.directory / "config.yaml", ("run.name=one", "run.resume=true")
    saved.write_text(config_text(first))
    words, _ = words_of(*resumed)
    assert words == [*OF_H100, *TWO_OF_FOUR]
    assert load_config([*resumed, *words]).cluster.multiprocessors == 132

    taken = load_config([*RUN, "run.name=one", *OF_H100, "cluster.memory_gib=70"])
    saved.write_text(config_text(taken))
    assert words_of(*resumed) == (TWO_OF_FOUR, "")
    assert load_config([*resumed, *TWO_OF_FOUR]).cluster == replace(
        taken.cluster, num_nodes=2, gpus_per_node=4
    )
    assert words_of(*resumed, gpu="NVIDIA B200") == (
        TWO_OF_FOUR,
        "no preset for NVIDIA B200; this run keeps the cluster that it was planned for",
    )


@pytest.mark.parametrize("before", PRESETS)
@pytest.mark.parametrize("now", PRESETS)
def test_a_run_that_is_resumed_on_other_gpus_says_so(tmp_path, monkeypatch, before, now):
    monkeypatch.chdir(tmp_path)
    first = load_config(["model=nano", "run.name=one", f"cluster={PRESETS[before]}"])
    first.run.directory.mkdir(parents=True)
    (first.run.directory / "config.yaml").write_text(config_text(first))
    words, line = words_of("run.name=one", "run.resume=true", gpu=now)
    assert words == TWO_OF_FOUR
    told = (
        "this run was planned for other GPUs and keeps that cluster; type "
        f"cluster={PRESETS[now]} to plan for {now}"
    )
    assert line == ("" if now == before else told)


@pytest.fixture
def gpus(monkeypatch):
    """Let this process see eight GPUs whose name is `H100`."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: H100)


def test_ranks_of_agents_and_of_torchrun_have_the_plan_that_vp_plan_shows(
    gpus, monkeypatch, capsys
):
    typed = [*RUN, "parallel.pp=8", "schedule=v_half", "model.num_layers=16", "parallel.dp=2"]
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    of_agents = [
        _on_its_machines(load_config(typed), typed, Place(2, node, head="a"), 0, says=node == 0)
        for node in range(2)
    ]
    of_torchrun = _on_its_machines(load_config(typed), typed, None, 0, says=False)
    assert capsys.readouterr().out == f"cluster   h100_80g_node, by the name of the GPU, {H100}\n"
    planned = load_config(
        [*typed, "cluster=h100_80g_node", "cluster.num_nodes=2", "run.dtype=float32"]
    )
    for config, overrides in (*of_agents, of_torchrun):
        assert config == planned
        assert load_config(overrides) == planned, "as the ranks of an agent read it"
    untold = make_plan(load_config(typed), 16)
    plan = make_plan(planned, 16)
    assert plan.timeline.makespan < untold.timeline.makespan
    assert load_config(typed).cluster == ClusterConfig()


def test_nodes_of_torchrun_with_other_numbers_of_ranks_have_the_same_settings(gpus, monkeypatch):
    typed, found = [*RUN, "parallel.pp=2"], []
    for name, value in (("WORLD_SIZE", "12"), ("GROUP_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for num_local in ("8", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", num_local)
        found.append(_on_its_machines(load_config(typed), typed, None, 0, says=False)[0])
    assert found[0] == found[1]
    assert (found[0].cluster.num_nodes, found[0].cluster.gpus_per_node) == (2, 6)


def test_what_vp_train_launches_is_planned_for_its_gpus_and_its_ranks_read_the_same(
    gpus, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    launched = []
    monkeypatch.setattr(
        "vp_train.commands.launch.launch", lambda *given, **_: launched.append(given)
    )
    for device, lines in (("cuda", 1), ("cpu", 0)):
        typed = [*RUN, f"run.device={device}", "parallel.pp=2", "parallel.dp=1"]
        _train(load_config(typed), typed, {})
        config, overrides, *_ = launched.pop()
        assert load_config(overrides).cluster == config.cluster
        assert config.cluster.gpus_per_node == (2 if device == "cuda" else 4)
        assert (config.cluster.multiprocessors == 132) is (device == "cuda")
        assert capsys.readouterr().out.count("h100_80g_node") == lines


def test_a_copy_of_this_process_asks_for_the_name(gpus, monkeypatch):
    here, counted = os.getpid(), []

    def count():
        if os.getpid() == here:
            counted.append("CUDA may have been started where no later copy can use it")
        return 8

    monkeypatch.setattr(torch.cuda, "device_count", count)
    assert gpu_name() == (H100, "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: str(os.getpid()))
    assert int(gpu_name()[0]) != here
    assert not counted
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_name() == ("", "")


def test_why_a_name_cannot_be_read_is_said(gpus, monkeypatch):
    def fails(_):
        raise RuntimeError("CUDA error:\nout of " + 9999 * "memory")

    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    name, problem = gpu_name()
    assert name == ""
    assert problem.startswith("RuntimeError: CUDA error: out of memory")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: os._exit(1))
    assert gpu_name() == ("", "the process that asks for it died")


def test_a_driver_that_hangs_is_not_waited_for_and_leaves_no_process(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: time.sleep(600))
    monkeypatch.setattr(machine, "_ASK_SECONDS", 0.2)
    copies = []

    def fork():
        copies.append(os.fork())
        return copies[-1]

    monkeypatch.setattr(machine, "fork", fork)
    began = time.monotonic()
    assert gpu_name() == ("", "its driver does not answer within 0.2 s")
    assert time.monotonic() - began < 60
    with pytest.raises(ChildProcessError):
        os.waitpid(copies[0], os.WNOHANG)
