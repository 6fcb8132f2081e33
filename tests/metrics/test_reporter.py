"""The reports of rank 0: the plan, a record of every step, the trace and the final table."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from schedules.vocab import End
from vp_train.config.optim import usual_rate
from vp_train.metrics import reporter as reporter_module
from vp_train.metrics.header import header, introduce
from vp_train.metrics.progress import StepReport, Validation
from vp_train.metrics.reporter import Reporter
from vp_train.metrics.run_directory import RunDirectory, TakenError
from vp_train.metrics.summary import SUMMARY
from vp_train.model.shape import num_parameters
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config
from vp_train.units import human_bytes

SOURCE = SimpleNamespace(description="ten documents", warnings=())


def report(step):
    return StepReport(step, 2.0 / step, 1.0, 1e-3, 10.0, 2.0**30)


def stretched(timeline, factor):
    """Return the same passes, `factor` times as long."""
    rows = [
        [replace(s, start=factor * s.start, end=factor * s.end) for s in row]
        for row in timeline.compute
    ]
    return replace(timeline, compute=tuple(map(tuple, rows)), comm=(), bound=0.0)


def test_names_of_files_reach_no_terminal_as_control_characters(capsys):
    config = load_config(["model=nano"])
    source = SimpleNamespace(description="text/\x1b[2J", warnings=("data.validation: \x1b]0;a\a",))
    introduce(config, make_plan(config, 4), source)
    out = capsys.readouterr().out
    assert out.startswith(
        "data      text/\\x1b[2J\nwarning   data.validation: \\x1b]0;a\\x07\nmodel "
    )


@pytest.fixture
def started(tmp_path):
    """Return a run before its first step: (config, plan, directory, reporter)."""

    def start(*overrides, num_ranks=2, first_step=1):
        settings = [
            "model=nano",
            "model.num_layers=4",
            "num_microbatches=4",
            f"run.root={tmp_path}",
            "run.steps=4",
            *overrides,
        ]
        config = load_config(settings)
        plan, directory = make_plan(config, num_ranks), RunDirectory(config.run)
        reporter = Reporter(config, plan, directory, first_step)
        introduce(config, plan, SOURCE)
        reporter.start("model: nano\n")
        return config, plan, directory, reporter

    return start


def records(directory):
    """Return the records without the tokens per second over the interval, which vary."""
    found = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    for record in found:
        assert record.pop("interval_tokens_per_second", 1.0) > 0
    return found


def line_of(words, name):
    (line,) = [line for line in words.splitlines() if line.split()[:1] == [name]]
    return " ".join(line.split()[1:])


def test_before_the_first_step_everything_known_is_said_and_written(started, capsys):
    config, plan, directory, _ = started(first_step=3)
    written = {path.name for path in directory.path.iterdir()}
    assert written >= {
        "config.yaml",
        "env.json",
        "schedule.txt",
        "schedule.svg",
        "tensorboard",
        "trace",
        "LOCK",
    }
    assert (directory.path / "config.yaml").read_text() == "model: nano\n"
    assert (directory.path / "schedule.txt").read_text() == plan.schedule.text()
    assert (
        "1f1b, vocabulary one_barrier: as planned" in (directory.path / "schedule.svg").read_text()
    )
    words = capsys.readouterr().out
    assert line_of(words, "data") == "ten documents"
    assert line_of(words, "mesh").startswith("2 ranks = ")
    assert line_of(words, "mesh").endswith("optim.name=adamw")
    assert line_of(words, "pipeline") == "rank 0: layers 0-1 rank 1: layers 2-3"
    length = config.model.seq_length
    batch = f"4 microbatches of 1 x {length} tokens: 4 sequences, {4 * length:,} tokens a step"
    assert line_of(words, "schedule").endswith(batch)
    assert f"(ln V = {math.log(config.model.vocab_size):.2f}), float32 on cpu" in line_of(
        words, "model"
    )
    assert line_of(words, "planned").endswith("; assumes 50 GFLOP/s, vp-profile measures")
    assert "advice" not in words
    assert "rows" not in words
    assert line_of(words, "run") == f"{directory.path}, steps 3 to 4"


def test_measured_costs_are_not_called_assumed():
    given = ["model=nano", "cost.flops_per_second=2e12"]
    for words, is_said in (([], True), (["cost.layer_forward_seconds=0.1"], False)):
        config = load_config([*given, *words])
        lines = header(config, make_plan(config, 2), SOURCE)
        said = [line for line in lines if "assumes 2,000 GFLOP/s," in line]
        assert len(said) == is_said


def test_the_header_says_the_batch_of_all_replicas():
    config = load_config(["model=nano", "parallel.pp=2", "micro_batch_size=2"])
    (line,) = (
        line for line in header(config, make_plan(config, 6), SOURCE) if line.startswith("schedule")
    )
    batch = "8 microbatches of 2 x 64 tokens, 3 replicas: 48 sequences, 3,072 tokens a step"
    assert line.endswith(batch)


def test_a_large_model_with_the_default_rate_is_warned_of_with_that_of_an_import(started):
    for name, given, warned in (
        ("llama3_8b", [], "optim.lr=0.0001 for this size"),
        ("gpt_30b", [], "optim.lr=6e-05 for this size"),
        ("gpt_30b", ["optim.lr=1e-3"], None),
        ("small", [], None),
    ):
        config = load_config([f"model={name}", *given])
        plan = make_plan(load_config(["model=nano"]), 2)
        lines = [line for line in header(config, plan, SOURCE) if line.startswith("warning")]
        assert len(lines) == (warned is not None)
        assert all(line.endswith(warned) for line in lines)
        assert usual_rate(num_parameters(config.model)) < config.optim.lr


def test_the_room_for_checkpoints_is_that_of_parameters_and_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    for dtype, item_bytes in (("float32", 4), ("bfloat16", 4), ("float64", 8)):
        given = ["model=nano", f"run.root={tmp_path}", f"run.dtype={dtype}", "run.steps=1"]
        config = load_config(given)
        (line,) = [line for line in header(config, make_plan(config, 2), SOURCE) if "free" in line]
        size = human_bytes(3 * item_bytes * num_parameters(config.model))
        assert line.startswith(f"warning   {config.run.directory} is on a disk with 0 B free")
        assert f"checkpoints take {size} more ({size} each" in line


def test_it_is_said_what_waits_in_host_memory(started, capsys):
    for part, words in ((1, "up to .* in a step, .* at a time"), (0.1, "nothing: .* half a layer")):
        started(f"parallel.offload_activations={part}", f"run.name=of{part}")
        assert re.fullmatch(words + ".*", line_of(capsys.readouterr().out, "offload"))
    started("run.name=none")
    assert "offload" not in capsys.readouterr().out


def test_rows_that_are_not_the_equal_ones_are_said(started, capsys):
    _, plan, *_ = started("parallel.layers_per_stage=[3,1]", "vocab.balance=true")
    counts = [f"{shard.num_rows:,}" for shard in plan.shards[End.OUTPUT]]
    assert counts[0] != counts[1]
    words = f"{' '.join(counts)} of the vocabulary, by pipeline rank"
    assert line_of(capsys.readouterr().out, "rows") == words


def test_a_traced_step_that_never_comes_is_said_before_the_first_step(started, capsys):
    for trace_step, words in (
        (0, ""),
        (4, ""),
        (5, ""),
        (6, "run.trace_step=6 .* run.steps=4, .*"),
    ):
        started(f"run.trace_step={trace_step}", f"run.name=of{trace_step}")
        out = capsys.readouterr().out
        assert ("\ntrace" in out) == bool(words)
        assert not words or re.fullmatch(words, line_of(out, "trace"))


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "mesh", "pipeline"),
    [
        (
            ["parallel.dp=2"],
            4,
            "(the first replica is ranks 0-1)",
            "rank 0: layers 0-1 rank 1: layers 2-3",
        ),
        (
            ["parallel.dp=2", "parallel.pp=1"],
            2,
            "(the first replica is rank 0)",
            "rank 0: layers 0-3",
        ),
        (["parallel.tp=2"], 4, None, "ranks 0-1: layers 0-1 ranks 2-3: layers 2-3"),
        (["schedule=v_half"], 2, None, "rank 0: layers 0, 3 rank 1: layers 1, 2"),
        (["parallel.layers_per_stage=[4,0]"], 2, None, "rank 0: layers 0-3 rank 1: layers none"),
    ],
)
def test_ranks_are_told_what_lives_where(started, capsys, overrides, num_ranks, mesh, pipeline):
    started(*overrides, num_ranks=num_ranks)
    words = capsys.readouterr().out
    assert line_of(words, "mesh").startswith(f"{num_ranks} ranks = ")
    assert ("first replica" in words) == (mesh is not None)
    assert mesh is None or mesh in line_of(words, "mesh")
    assert line_of(words, "pipeline") == pipeline


def test_a_step_has_one_record_with_what_fell_on_it(started, capsys):
    config, plan, directory, reporter = started()
    reporter.step(report(1))
    assert records(directory) == []  # its validation may come yet
    reporter.validation(1, [Validation("", 1.25)])
    reporter.record()
    reporter.step(report(2))
    reporter.trace(stretched(plan.timeline, 3.0), (11, 12))
    reporter.record()
    first, second = records(directory)
    steps = {
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens_per_second": 10.0,
        "peak_bytes": 2.0**30,
        "spikes": 0,
        "skipped_steps": 0,
    }
    assert first == {"step": 1, "loss": 2.0, **steps, "validation_loss": 1.25}
    assert second == {
        "step": 2,
        "loss": 1.0,
        **steps,
        "bubble_measured": pytest.approx(stretched(plan.timeline, 3.0).mean_bubble),
        "bubble_predicted": pytest.approx(plan.timeline.mean_bubble),
        "gap_measured": pytest.approx(
            stretched(plan.timeline, 3.0).makespan / plan.timeline.bound - 1
        ),
        "gap_predicted": pytest.approx(plan.timeline.gap),
    }
    assert second["gap_measured"] > 1.5
    uniform = math.log(config.model.vocab_size)
    assert (
        f"step 1  validation loss 1.2500  (a uniform guess has ln V = {uniform:.4f})"
        in capsys.readouterr().out
    )
    with pytest.raises(AssertionError):
        reporter.record()  # a second record of a step


def test_a_run_that_goes_on_keeps_the_records_before_its_first_step(started, tmp_path):
    (tmp_path / "default").mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "default" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    _, _, directory, reporter = started("run.resume=true", first_step=3)
    reporter.step(report(3))
    reporter.record()
    assert [(record["step"], record["loss"]) for record in records(directory)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0 / 3),
    ]


def test_a_traced_step_lies_beside_the_planned_one(started):
    _, plan, directory, reporter = started()
    reporter.step(report(1))
    reporter.trace(stretched(plan.timeline, 2.0), (11, 12))
    events = json.loads((directory.trace / "step.json").read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(names) == 2 * plan.num_ranks
    assert "1f1b, vocabulary one_barrier: as measured" in (directory.trace / "step.svg").read_text()


def test_a_step_without_a_bound_has_no_gap(started):
    _, plan, directory, reporter = started()
    reporter._plan = replace(plan, timeline=replace(plan.timeline, bound=0.0))
    reporter.step(report(1))
    reporter.trace(stretched(plan.timeline, 2.0), (11, 12))
    reporter.record()
    assert not [name for name in records(directory)[0] if name.startswith("gap")]


def test_at_the_end_the_table_has_every_rank_where_a_step_was_traced(started, capsys):
    _, plan, directory, reporter = started()
    reporter.step(report(1))
    reporter.trace(stretched(plan.timeline, 2.0), (11_000_000, 12_000_000))
    reporter.record()
    capsys.readouterr()
    reporter.finish([2.0**20, 3.0 * 2**20])
    words = capsys.readouterr().out
    rows = [line.split() for line in words.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert [(row[1], row[3], row[4], row[-2], row[-1]) for row in rows] == [
        ("0-1", "11.00", "M", "1.0", "MiB"),
        ("2-3", "12.00", "M", "3.0", "MiB"),
    ]
    assert words.splitlines()[-1] == f"everything is in {directory.path}"


def test_without_a_traced_step_there_is_no_table(started, capsys):
    _, _, directory, reporter = started()
    reporter.step(report(1))
    reporter.say("a word")
    reporter.record()
    reporter.finish([1.0, 1.0])
    words = capsys.readouterr().out
    assert "a word" in words.splitlines()
    assert "one traced step" not in words
    assert words.splitlines()[-1] == f"everything is in {directory.path}"


def test_a_lock_that_somebody_removes_takes_no_record_along(started, capsys):
    _, _, directory, reporter = started()
    for step in (1, 2, 3):
        reporter.step(report(step))
        if step == 3:
            (directory.path / "LOCK").unlink()
        reporter.record()
    assert [record["step"] for record in records(directory)] == [1, 2, 3]
    assert "LOCK was removed while this run used it" in capsys.readouterr().out
    assert (directory.path / "LOCK").is_file()


def test_a_directory_that_somebody_removes_goes_on_with_the_step(started, capsys):
    config, _, directory, reporter = started()
    reporter.step(report(1))
    reporter.record()
    shutil.rmtree(directory.path)
    reporter.step(report(2))
    reporter.record()
    assert [record["step"] for record in records(directory)] == [2]
    assert (directory.path / "config.yaml").read_text() == "model: nano\n"
    assert "it is made again, without what was in it" in capsys.readouterr().out
    shutil.rmtree(directory.path)
    other = RunDirectory(config.run)
    reporter.step(report(3))
    with pytest.raises(TakenError, match="uses it now"):
        reporter.record()
    assert not other.metrics.exists()


def test_what_is_missing_at_the_end_is_said(started, capsys):
    _, _, directory, reporter = started()
    checkpoint = directory.path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    assert reporter.missing(None) is None
    assert reporter.missing(checkpoint).startswith(f"{checkpoint} is not there any more")
    (checkpoint / "manifest.json").write_text("{}")
    assert reporter.missing(checkpoint) is None
    shutil.rmtree(directory.path)
    capsys.readouterr()
    assert reporter.missing(None) is None
    said = f"{directory.path} was removed while this run used it; it is made again, without what"
    assert capsys.readouterr().out.startswith(said)


def test_a_file_of_notices_that_cannot_be_written_is_said_once(started, capsys):
    _, _, directory, reporter = started()
    reporter.say("first")
    assert directory.notices.read_text().endswith(" first\n")
    directory.notices.unlink()
    directory.notices.mkdir()
    for _ in range(2):
        reporter.say("second")
    said = capsys.readouterr()
    assert said.out.splitlines()[-2:] == ["second"] * 2
    assert said.err.count("notices.txt cannot be written") == len(said.err.splitlines()) == 1


def test_the_speed_of_an_interval_counts_the_tokens_and_the_time_since_its_first_step(
    started, monkeypatch
):
    """The ramp has half the microbatches until step 2."""
    now = [50.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(reporter_module, "time", clock)
    overrides = ["run.log_every=2", "run.steps=6", "batch_ramp=[[2,2]]", "parallel.dp=1"]
    config, _, directory, reporter = started(*overrides, num_ranks=2)
    sequence = config.model.seq_length * config.micro_batch_size
    counts = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4}
    for step, count in counts.items():
        now[0] += 1.0 + step
        reporter.step(report(step))
        reporter.record()
        steps = [each for each in (step - 1, step) if each]
        expected = sum(counts[each] for each in steps) * sequence / sum(1.0 + e for e in steps)
        record = json.loads(directory.metrics.read_text().splitlines()[-1])
        assert record["interval_tokens_per_second"] == pytest.approx(expected), (step, count)
    reporter.go_back(3)
    now[0] += 10.0
    reporter.step(report(4))
    reporter.record()
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["interval_tokens_per_second"] == pytest.approx(4 * sequence / 10.0)


def test_the_loss_of_a_validation_is_the_mean_of_its_sets(started, capsys):
    _, _, directory, reporter = started()
    reporter.step(report(1))
    reporter.validation(1, [Validation("a", 1.0, 0.5), Validation("b", 4.0)])
    reporter.record()
    (record,) = records(directory)
    found = {key: value for key, value in record.items() if key.startswith("validation")}
    assert found == {
        "validation_loss": 2.5,
        "validation/a/loss": 1.0,
        "validation/a/bits_per_byte": 0.5,
        "validation/b/loss": 4.0,
    }
    assert "step 1  validation loss a 1.0000 (0.500 bits/byte)  b 4.0000" in capsys.readouterr().out


def test_the_record_of_step_0_is_written_with_that_of_step_1(started, capsys):
    _, _, directory, reporter = started()
    reporter.validation(0, [Validation("", 1.5)])
    assert "step 0  validation loss 1.5000" in capsys.readouterr().out
    assert records(directory) == [], "a directory with metrics holds a run that has done a step"
    for step in (1, 2):
        reporter.step(report(step))
        reporter.record()
    zero, *others = records(directory)
    assert zero == {"step": 0, "validation_loss": 1.5}
    assert [(record["step"], "validation_loss" in record) for record in others] == [
        (1, False),
        (2, False),
    ]


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_traced_step_keeps_its_words_and_one_far_from_its_plan_is_explained(
    started, capsys, monkeypatch, factor
):
    monkeypatch.setattr("sys.argv", ["vp-train", "cost=mine.yaml", "cluster=h100", "run.name=x"])
    _, plan, directory, reporter = started()
    reporter.step(report(1))
    reporter.trace(stretched(plan.timeline, factor), (11, 12))
    reporter.record()
    times = json.loads((directory.trace / "step_times.json").read_text())
    assert (times["step"], times["cost"]["overrides"]) == (1, ["cost=mine.yaml", "cluster=h100"])
    reporter.finish([1.0, 1.0])
    words = capsys.readouterr().out
    assert "the step: planned " in words
    assert (f"vp-explain {directory.path} says where" in words) == (factor == 3.0)


def test_the_last_words_say_where_the_time_went_and_what_was_profiled(started, capsys):
    config, _, directory, reporter = started("run.profile_steps=[1]")
    config.run.profiles.mkdir()
    (config.run.profiles / "step-00000001-rank-00000.json.gz").touch()
    reporter.step(replace(report(1), figures={"seconds/data": 1.0, "seconds/optimizer": 3.0}))
    reporter.record()
    reporter.finish([5.0, 6.0])
    *_, time_words, profile, last = capsys.readouterr().out.splitlines()
    assert time_words == "the time: optimizer 75.0%, data 25.0%"
    assert profile.endswith(": step-00000001-rank-00000.json.gz")
    assert last == f"everything is in {directory.path}"
    summary = json.loads((directory.path / "summary.json").read_text())
    ranks = [{"rank": 0, "peak_bytes": 5.0}, {"rank": 1, "peak_bytes": 6.0}]
    assert summary == {"schema": SUMMARY, "ranks": ranks}


def test_the_batch_ramp_is_said_as_far_as_it_is_left():
    config = load_config(["num_microbatches=8", "batch_ramp=[[10,2],[20,4]]"])
    assert reporter_module._ramp_words(config, 1) == (
        "2 sequences until step 10, 4 sequences until step 20, then all microbatches"
    )
    assert reporter_module._ramp_words(config, 10).startswith("2 sequences until step 10, ")
    left = "4 sequences until step 20, then all microbatches"
    assert reporter_module._ramp_words(config, 11) == left
    assert reporter_module._ramp_words(config, 20) == left
    assert reporter_module._ramp_words(config, 21) == ""


def test_a_console_whose_reader_has_gone_says_nothing_more_and_ends_nothing(monkeypatch, capfd):
    moved = []
    monkeypatch.setattr(reporter_module.os, "dup2", lambda old, new: moved.append((old, new)))

    class Pipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    console = reporter_module._Console(file=Pipe())
    assert not console.has_no_reader
    for _ in range(2):
        console.print("a line")
        assert console.has_no_reader
    ((null, target),) = moved
    assert os.path.samestat(os.fstat(null), os.stat(os.devnull))
    assert target == sys.stdout.fileno()
    os.close(null)
