"""A profiled step is a trace that names the passes, and one that cannot be written is a warning."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.training import config_of, metrics_of, train
from vp_train.config import ConfigError
from vp_train.metrics import profiler
from vp_train.metrics.profiler import profiling
from vp_train.metrics.reporter import _past_profiles, _profile_words
from vp_train.planning.plan import make_plan


def test_the_chosen_ranks_and_steps_have_traces_that_name_passes_and_waits(ranks, tmp_path):
    config = config_of(
        tmp_path,
        steps=3,
        profile_steps=(2,),
        profile_ranks=(1,),
        trace_step=2,
        checkpoint_every=0,
        eval_every=0,
    )
    assert ranks(2).run(train, config) == [1, 1]
    (path,) = config.run.profiles.iterdir()
    assert path.name == "step-00000002-rank-00001.json.gz"
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events}
    program = make_plan(config, 2).program.ranks[1]
    assert {str(op.item) for op in program if op.action == "run"} <= names
    assert {str(op) for op in program if op.action == "wait"} <= names
    assert any(name.startswith("aten::") for name in names)
    assert len(metrics_of(config)) == 3  # recording a step changes nothing else of it
    assert (config.run.directory / "trace" / "step_times.json").exists()


def test_only_profiles_of_this_start_are_named(tmp_path):
    settings = config_of(tmp_path, profile_steps=(2, 6)).run
    settings.profiles.mkdir(parents=True)
    for step in (2, 6):
        (settings.profiles / f"step-{step:08d}-rank-00000.json.gz").touch()
    first, later, past = (_profile_words(settings, step) for step in (1, 3, 7))
    assert first.endswith("step-00000002-rank-00000.json.gz, step-00000006-rank-00000.json.gz")
    assert later.endswith(f"{settings.profiles}: step-00000006-rank-00000.json.gz")
    assert past == ""
    assert [bool(_past_profiles(settings, step)) for step in (1, 6, 7)] == [False, False, True]
    assert _past_profiles(settings, 7).startswith("run.profile_steps=[2,6] are done")


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file")
    with profiling(tmp_path / "profile", 2, 0, "cpu"):
        torch.ones(2).sum()
    said = capsys.readouterr().err.splitlines()
    assert any("profile" in line and "cannot be written" in line for line in said)


def test_a_profiler_that_does_not_start_is_a_warning(tmp_path, monkeypatch, capsys):
    def start(self):
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(torch.profiler.profile, "start", start)
    with profiling(tmp_path / "profile", 2, 0, "cpu"):
        torch.ones(2).sum()
    assert "cannot be written (no profiler here); going on without" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_is_recorded_from_its_begin_to_its_end_and_on_cuda_with_its_memory(
    tmp_path, monkeypatch, capsys, device, fails
):
    """A stand-in for torch's profiler and allocator notes what is asked of them."""
    asked = []

    class Profiler:
        def __init__(self, activities):
            asked.append([activity.name for activity in activities])

        def start(self):
            asked.append("start")

        def stop(self):
            asked.append("stop")

        def export_chrome_trace(self, path):
            Path(path).write_text("trace")

    def record(**options):
        asked.append(options)

    monkeypatch.setattr(profiler, "profile", Profiler)
    memory = SimpleNamespace(
        _record_memory_history=record,
        _dump_snapshot=lambda path: Path(path).write_text("memory"),
    )
    monkeypatch.setattr(torch.cuda, "memory", memory)
    ends = pytest.raises(ValueError, match="step") if fails else contextlib.nullcontext()
    with ends, profiling(tmp_path / "profile", 2, 3, device):
        asked.append("step")
        if fails:
            raise ValueError("step")
    on_cuda = device == "cuda"
    begin, end = [{"max_entries": 200_000}] * on_cuda, [{"enabled": None}] * on_cuda
    activities = ["CPU", "CUDA"][: 1 + on_cuda]
    assert asked == [activities, "start", *begin, "step", "stop", *end]
    files = {path.name: path.read_text() for path in (tmp_path / "profile").iterdir()}
    expected = {"step-00000002-rank-00003.json.gz": "trace"}
    if on_cuda:
        expected["step-00000002-rank-00003.pickle"] = "memory"
    assert files == expected
    assert capsys.readouterr().err == ""


def test_a_profiler_that_does_not_start_is_neither_stopped_nor_exported(tmp_path, monkeypatch):
    class Profiler:
        def __init__(self, activities):
            pass

        def start(self):
            raise RuntimeError("no profiler here")

    monkeypatch.setattr(profiler, "profile", Profiler)
    ran = []
    with profiling(tmp_path / "profile", 2, 0, "cuda"):
        ran.append(True)
    assert ran == [True]
    assert not (tmp_path / "profile").exists()


def test_a_step_or_a_rank_that_does_not_exist_is_refused_before_the_run(tmp_path):
    late = config_of(tmp_path, profile_steps=(30,))
    with pytest.raises(ConfigError, match=r"profile_steps has step 30, .* give an earlier step"):
        make_plan(late, 2)
    config = config_of(tmp_path, profile_steps=(2,), profile_ranks=(0, 2))
    with pytest.raises(ConfigError, match=r"run.profile_ranks has rank 2, .* are 0 to 1"):
        make_plan(config, 2)
    make_plan(config_of(tmp_path, profile_ranks=(0, 2)), 2)
