"""Ranks that differ refuse to start together, on all of them and before their groups differ."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tests.programs import finished
from tests.training import config_of, laid_out
from vp_train.commands.train import main
from vp_train.communication.control import ControlGroup
from vp_train.config import RunConfig, RunSettings
from vp_train.mesh import build_mesh
from vp_train.planning.plan import make_plan
from vp_train.preflight import nodes
from vp_train.preflight.nodes import (
    Preflight,
    PreflightError,
    must_compare,
    settings_by_name,
    spans_nodes,
)


def refused(rank, num_ranks, configs, texts):
    """Check the nodes, and return the words of the refusal, or "" if there is none."""
    config = configs[rank]
    nodes._SEEN_SECONDS = 0.2
    group = dist.new_group(list(range(num_ranks)))
    world = ControlGroup.flat(group)
    checks = Preflight(config, "schedule", texts[rank])
    try:
        checks.compare_nodes(world)
        checks.measure_network(world)
    except PreflightError as error:
        return str(error)
    finally:
        dist.destroy_process_group(group)
    return ""


def test_equal_ranks_start_and_leave_nothing_behind(ranks, tmp_path):
    config = config_of(tmp_path)
    assert ranks(2).run(refused, [config] * 2, [("a",)] * 2) == ["", ""]
    assert os.listdir(config.run.directory) == []


def test_different_text_is_refused_on_all_ranks(ranks, tmp_path):
    config = config_of(tmp_path)
    words = ranks(2).run(refused, [config] * 2, [("a",), ("b",)])
    assert words[0] == words[1]
    assert "the text of data (b) is not that of node" in words[0]
    assert "\n" not in words[0]


def test_another_directory_is_refused(ranks, tmp_path):
    config = config_of(tmp_path)
    other = replace(config, run=replace(config.run, root=str(tmp_path / "elsewhere")))
    for words in ranks(2).run(refused, [config, other], [()] * 2):
        directory, settings = words.splitlines()
        assert f"{tmp_path / 'elsewhere'}" in directory
        assert "No such file" in directory
        assert "run.root" in settings
    assert os.listdir(config.run.directory) == []


def test_a_mark_from_the_network_names_no_file_elsewhere(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "secret").write_text("../secret")
    assert "did not say" in nodes._why_unshared(tmp_path / "runs", "../secret", 1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["runs", "secret"]


def test_a_directory_that_cannot_be_written_is_not_usable(tmp_path):
    mark = f".preflight-{'0' * 32}"
    (tmp_path / mark).write_text(mark)
    assert nodes._why_unshared(tmp_path, mark, 1) == ""
    (tmp_path / f"{mark}-1").touch()  # root may write anywhere, but not make this file again
    assert "cannot be written there" in nodes._why_unshared(tmp_path, mark, 1)
    (tmp_path / mark).write_text("other")
    assert "other contents" in nodes._why_unshared(tmp_path, mark, 1)


def test_the_command_checks_and_stops(tmp_path):
    words = ["--preflight", "model=nano", "data=synthetic", "parallel.pp=1", "run.name=one"]
    done = finished(main, *words, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    node, network = done.stdout.splitlines()
    assert f"{platform.node()}, rank 0: Python {platform.python_version()} torch " in node
    assert network.startswith("network   all-reduce of 16 MiB over 1 rank: ")
    assert not (tmp_path / "runs/one/metrics.jsonl").exists()


def met_with_other_degrees(rank, num_ranks, configs):
    config = configs[rank]
    plan = make_plan(config, num_ranks)
    checks = Preflight(config, plan.schedule.text(), ())
    try:
        build_mesh(plan.degrees, plan.problem, config.run, comparing=checks.compare_nodes)
    except PreflightError as error:
        return str(error)
    return ""


def test_ranks_with_other_degrees_are_refused_before_their_groups_differ(ranks, tmp_path):
    config = config_of(tmp_path)
    configs = [laid_out(config, pp=2, dp=1), laid_out(config, pp=1, dp=2)]
    try:
        for words in ranks(2).run(met_with_other_degrees, configs, timeout=30):
            assert "parallel.pp=1 instead of 2" in words
            assert "parallel.dp=2 instead of 1" in words
    finally:
        ranks(2).stop()  # groups that were not given to a mesh cannot be destroyed


@pytest.mark.parametrize(
    ("local", "world", "several"), [(None, None, False), ("4", "4", False), ("4", "8", True)]
)
def test_a_run_spans_nodes_if_its_launcher_has_started_some_of_its_ranks(local, world, several):
    given = {"LOCAL_WORLD_SIZE": local, "WORLD_SIZE": world}
    assert spans_nodes({name: value for name, value in given.items() if value}) is several


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize(("local", "world"), [("1", "1"), ("1", "2"), ("2", "2"), ("2", "4")])
def test_ranks_compare_notes_on_several_nodes_and_where_they_may_have_one_gpu(
    monkeypatch, device, backend, local, world
):
    monkeypatch.delattr(nodes.torch.cuda, "device_count")  # ranks may see other numbers of GPUs
    settings = RunSettings(device=device, comm_backend=backend)
    may_share = (device, backend) == ("cuda", "nccl") and world != "1"
    environment = {"LOCAL_WORLD_SIZE": local, "WORLD_SIZE": world}
    assert must_compare(environment, settings) is (local != world or may_share)


def test_settings_are_compared_by_their_dotted_names():
    settings = settings_by_name(RunConfig())
    assert settings["run.steps"] == "90"
    assert settings["num_microbatches"] == "8"
    assert all("(" not in name for name in settings)


def test_gpus_and_nccl_are_facts_of_runs_on_cuda(monkeypatch, tmp_path):
    config = config_of(tmp_path, device="cuda")
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=2**36, uuid="1234")
    monkeypatch.setattr(nodes.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nodes.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(nodes.torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(nodes.torch.cuda.nccl, "version", lambda: (2, 28, 3))
    assert nodes._gpu(config) == nodes.Gpu("NVIDIA H100", 2**36, 8, "1234")
    assert nodes._versions(config)["NCCL"] == "2.28.3"
    assert "NCCL" not in nodes._versions(config_of(tmp_path))
