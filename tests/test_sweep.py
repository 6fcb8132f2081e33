"""A sweep trains every combination in turn, checks all before the first, and compares them."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from functools import cache
from itertools import product
from pathlib import Path
from threading import Timer

import pytest

from tests.programs import finished
from vp_train.checkpoint.manifest import write_manifest
from vp_train.commands import sweep as module
from vp_train.commands.agent import noting_signals
from vp_train.commands.command import Command
from vp_train.commands.sweep import SWEEP, RunResult, best_of, is_sweep, runs_of, sweep
from vp_train.commands.train import _OPTIONS, main
from vp_train.config import ConfigError
from vp_train.durable import checkpoint_name
from vp_train.settings import load_config
from vp_train.settings.files import config_text


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    return tmp_path


def words_of(*words):
    return [run.words for run in runs_of(words)[0]]


# Which runs


def test_every_combination_of_lists_is_a_run_and_the_last_list_changes_first():
    words = [
        "model=nano",
        "optim.lr=1e-3,3e-4",
        "parallel.layers_per_stage=[1,2]",
        "run.seed=1,2,3",
    ]
    runs, base = runs_of(words)
    assert base == "sweep"
    assert [run.name for run in runs] == [f"sweep-{index}" for index in range(6)]
    chosen = [(float(run.chosen["optim.lr"]), run.chosen["run.seed"]) for run in runs]
    assert chosen == [*product((1e-3, 3e-4), "123")]
    for index, run in enumerate(runs):
        assert set(run.chosen) == {"optim.lr", "run.seed"}
        assert (run.words[0], run.words[2]) == (words[0], words[2])
        assert run.words[-1] == f"run.name='sweep-{index}'"


def test_values_are_written_as_in_hydra():
    assert words_of("run.seed=range(1,4)") == words_of("run.seed=choice(1,2,3)")
    assert [words[0] for words in words_of("data.path='a,b','c d'")] == [
        "data.path='a,b'",
        "data.path='c d'",
    ]
    assert [words[0] for words in words_of("schedule=1f1b,v_half", "loss.z_loss=0")] == [
        "schedule=1f1b",
        "schedule=v_half",
    ]
    assert words_of("data.path=/a=(b") == [("data.path=/a=(b", "run.name='sweep-0'")]


def test_a_line_of_a_file_is_a_run_and_nothing_in_it_is_executed(place):
    (place / "grid.txt").write_text(
        "# rate and seed\n\n"
        "optim.lr=1e-3 run.seed=1\n"
        f"optim.lr=3e-4 'data.path=two words' data.cache_dir=$(touch {place}/ran)\n"
        "run.name=mine\r\n"
    )
    assert words_of("grid.txt", "model=nano") == [
        ("model=nano", "optim.lr=1e-3", "run.seed=1", "run.name='grid-0'"),
        (
            *("model=nano", "optim.lr=3e-4", "data.path=two words", "data.cache_dir=$(touch"),
            *(f"{place}/ran)", "run.name='grid-1'"),
        ),
        ("model=nano", "run.name='mine'"),
    ]
    assert not (place / "ran").exists()
    runs, _ = runs_of(["grid.txt", "model.num_layers=2,4"])
    assert [run.name for run in runs] == [
        "grid-0",
        "grid-1",
        "grid-2",
        "grid-3",
        "mine-0",
        "mine-1",
    ]
    assert [run.chosen.get("model.num_layers") for run in runs] == ["2", "4"] * 3


def test_a_name_in_the_words_is_the_base_of_all_names():
    runs, base = runs_of(["run.name=rates", "optim.lr=1,2"])
    assert (base, [run.name for run in runs]) == ("rates", ["rates-0", "rates-1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give lists such as optim.lr=1e-3,3e-4"),
        (["missing.txt"], "missing.txt is not there; the first word is an override or a file"),
        (["empty.txt"], "empty.txt has no line with overrides"),
        (["quote.txt"], "quote.txt: line 2: No closing quotation"),
        (["same.txt"], "two runs of the sweep are called one"),
        (["optim.lr=1e-3,3e-4", "optim.lr=1e-2"], "are the same setting; drop one of the two"),
        (["run.seed=1", "run.seed=2"], "or write a list as in run.seed=A,B"),
        (["named.txt", "run.seed=1,2"], "run.seed=1,2 and run.seed=3 are the same setting"),
        (["run.root=a,b"], "all runs of a sweep lie in one root"),
        (["run.name=a,b"], "run.name=a,b has signs that a name cannot have; give one name"),
        (["run.name='a'"], "run.name='a' has signs that"),
        (["named.txt", "run.name=../one"], "run.name='../one' is not a directory name"),
        (["optim.lr=interval(0,1)"], "a sweep takes a list of values"),
        (["model=glob(*)"], "a sweep takes a list of values"),
        (["run.seed=shuffle(1,2,3)"], "a sweep takes a list of values"),
        (["run.seed=shuffle(range(1,9))"], "a sweep takes a list of values"),
        (["run.seed=range(5,1)"], "run.seed=range(5,1) has no values"),
        (["optim.lr=range(0,1000000000000)"], "more than 10,000 combinations"),
        (["run.seed=range(1,1000)", "run.steps=range(1,1000)"], "more than 10,000 combinations"),
    ],
)
def test_what_cannot_be_swept_is_refused(words, said, place):
    (place / "empty.txt").write_text("# nothing\n")
    (place / "quote.txt").write_text("run.steps=1\ndata.path='half\n")
    (place / "same.txt").write_text("run.name=one\nrun.name=one\n")
    (place / "named.txt").write_text("run.name=one run.seed=3\n")
    with pytest.raises(ConfigError) as error:
        runs_of(words)
    assert said in str(error.value)


# Their training

SMALL = ("data=synthetic", "model.num_layers=4", "parallel.pp=2", "run.steps=3")


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs that were trained; `trained.codes` has the exit codes of some."""

    class Names(list):
        def __init__(self):
            self.codes = {}
            self.words = []

    names = Names()
    load = cache(load_config)  # it takes a good part of a second
    monkeypatch.setattr(module, "load_config", load)

    def train(arguments, signals):
        config = load(arguments)
        directory, code = config.run.directory, names.codes.get(config.run.name, 0)
        names.append(config.run.name)
        names.words.append(arguments)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(config_text(config))
        lines = [
            {"step": step, "loss": 9 - step + config.optim.lr, "tokens_per_second": 10.0 * step}
            for step in range(1, config.run.steps + 1 - bool(code))
        ]
        lines[-1] |= {"validation_loss": 5 - config.optim.lr, "peak_bytes": 2.0**20}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "metrics.jsonl").write_text(text + '{"step": null}\n{"step": 9, "lo')
        if not code:
            place = directory / "checkpoints" / checkpoint_name(config.run.steps)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            write_manifest(place, config.run.steps, {}, {})
        return code, "vp-train: it broke" if code else None

    monkeypatch.setattr(module, "_trained", train)
    return names


def swept(*words):
    return sweep(Command("vp-train", "", lambda *_: 0, "", _OPTIONS), ["-m", *words])


def table(place):
    rows = json.loads((place / "runs/sweep.json").read_text())
    with (place / "runs/sweep.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == [row["run"] for row in rows]
    return rows


def test_a_run_that_fails_stops_no_other_and_the_best_is_marked(trained, place, capsys):
    trained.codes = {"sweep-1": 70}
    assert swept(*SMALL, "optim.lr=0.1,0.3,0.2") == 70
    assert trained == ["sweep-0", "sweep-1", "sweep-2"]
    rows = table(place)
    assert [row["exit_code"] for row in rows] == [0, 70, 0]
    assert [row["best"] for row in rows] == [False, False, True]  # 0.3 is lower, but failed
    assert rows[2] == {
        "run": "sweep-2",
        "optim.lr": "0.2",
        "exit_code": 0,
        "steps": 3,
        "loss": 6.2,
        "validation_loss": 4.8,
        "tokens_per_second": 20.0,
        "peak_bytes": 2.0**20,
        "reason": None,
        "best": True,
    }
    printed = capsys.readouterr().out.splitlines()
    assert rows[1]["reason"] == "vp-train: it broke"
    assert "sweep-1: vp-train: it broke" in printed
    assert printed[0] == "sweep: run 1 of 3, sweep-0: optim.lr=0.1"
    (line,) = (line for line in printed if line.split()[-1:] == ["best"])
    assert line.split() == [
        "sweep-2",
        "0.2",
        "3",
        "6.2000",
        "4.8000",
        "20",
        "1.0",
        "MiB",
        "0",
        "best",
    ]


@pytest.mark.slow
def test_a_sweep_that_leaves_goes_on_without_the_finished_runs(trained, place, capsys):
    trained.codes = {"sweep-1": 75}
    assert swept(*SMALL, "optim.lr=0.1,0.3,0.2") == 75
    assert trained == ["sweep-0", "sweep-1"]
    assert "run.resume=true goes on" in capsys.readouterr().err
    assert [row["exit_code"] for row in table(place)] == [0, 75, None]
    trained.clear()
    trained.codes = {}
    assert swept(*SMALL, "optim.lr=0.1,0.3,0.2", "run.resume=true") == 0
    assert trained == ["sweep-1", "sweep-2"]
    assert [row["exit_code"] for row in table(place)] == [0, 0, 0]
    manifest = place / "runs/sweep-2/checkpoints/step-00000003/manifest.json"
    manifest.write_text("{")  # only the name of a checkpoint is left: the run is not finished
    trained.clear()
    assert swept(*SMALL, "optim.lr=0.1,0.3,0.2", "run.resume=true") == 0
    assert trained == ["sweep-2"]
    with pytest.raises(ConfigError, match=r"is of a sweep of 3 runs, and sweep-1 is none of these"):
        swept(*SMALL, "optim.lr=0.1", "run.resume=true")
    with pytest.raises(ConfigError, match=r"has run with optim.lr=0.1, so it is of another sweep"):
        swept(*SMALL, "optim.lr=0.2,0.3", "run.resume=true")


@pytest.mark.parametrize("saving", ["run.checkpoint_every=45", "run.checkpoint_every=0"])
def test_it_is_said_that_finished_runs_have_more_steps(trained, place, capsys, saving):
    words = [word for word in SMALL if not word.startswith("run.steps=")]
    words += ["optim.lr=0.1,0.3", saving]
    assert swept(*words, "run.steps=3") == 0
    trained.clear()
    for steps, more in ((3, ""), (2, ", more than run.steps=2")):
        capsys.readouterr()
        assert swept(*words, f"run.steps={steps}", "run.resume=true") == 0
        assert trained == []
        first = capsys.readouterr().out.splitlines()[0]
        assert first == f"sweep: run 1 of 2, sweep-0, is finished: 3 steps{more}"
    assert swept(*words, "run.steps=4", "run.resume=true") == 0
    assert trained == ["sweep-0", "sweep-1"]


def test_a_run_that_failed_without_a_checkpoint_is_mended_and_the_others_stay(trained, place):
    trained.codes = {"sweep-1": 1, "sweep-2": 75}
    assert swept(*SMALL, "optim.lr=0.1,0.3,0.2,0.4") == 75
    assert trained == ["sweep-0", "sweep-1", "sweep-2"]
    trained.clear()
    trained.codes = {}
    assert swept(*SMALL, "optim.lr=0.1,0.5,0.2,0.4", "run.resume=true") == 0
    assert trained == ["sweep-1", "sweep-2", "sweep-3"]
    begun = [any(word.startswith("run.resume=") for word in words) for words in trained.words[-3:]]
    assert begun == [True, True, False], "one that never started has nothing to resume"
    with pytest.raises(ConfigError, match=r"has run with optim.lr=0.5, so it is of another sweep"):
        swept(*SMALL, "optim.lr=0.1,0.3,0.2,0.4", "run.resume=true")


def test_a_sweep_that_saves_nothing_does_not_take_the_results_of_another(trained, place):
    words = (*SMALL, "run.checkpoint_every=0")
    assert swept(*words, "optim.lr=0.1,0.3") == 0
    with pytest.raises(ConfigError, match=r"has run with optim.lr=0.1, so it is of another sweep"):
        swept(*words, "optim.lr=0.2,0.4", "run.resume=true")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("optim.lr=0.1,-1", r"^run 2 of 2 \(optim.lr=-1\): optim.lr=-1.0 is too small"),
        ("parallel.pp=2,3", r"^run 2 of 2 \(parallel.pp=3\): .*num_layers=4"),
        ("optim.lr=0.1,,0.2", r"item 2 of its list is empty: optim.lr=0.1,0.2$"),
        ("optim.lr=range(1,3", r"a closing bracket is missing: optim.lr=range\(1,3\)$"),
        ("schedule=1f1b,1f2b", r"^run 2 of 2 \(schedule=1f2b\): schedule=1f2b is not known"),
    ],
)
def test_nothing_starts_unless_all_runs_can(trained, words, said):
    with pytest.raises(ConfigError, match=said):
        swept(*(word for word in SMALL if word.split("=")[0] != words.split("=")[0]), words)
    assert trained == []


def test_a_used_directory_is_refused_before_the_first_run(trained):
    swept(*SMALL, "run.seed=1,2")
    trained.clear()
    with pytest.raises(ConfigError, match=r"^run 1 of 2 .*already holds a run"):
        swept(*SMALL, "run.seed=1,2")
    assert trained == []


def test_only_trains_one_run_in_this_process(trained, capsys):
    given = []
    command = Command("vp-train", "", lambda config, *_: given.append(config) or 0, "", _OPTIONS)
    words = ["--only", "1", "--ranks", "2", *SMALL, "run.seed=1,2"]
    assert sweep(command, ["-m", *words]) == 0
    assert [(config.run.name, config.run.seed) for config in given] == [("sweep-1", 2)]
    words[1] = "2"
    with pytest.raises(ConfigError, match=r"--only 2 of 2 runs; .* --array 0-1$"):
        sweep(command, ["-m", *words])


def test_on_several_nodes_each_run_is_started_alone(trained):
    with pytest.raises(ConfigError, match="on several nodes train each with --only"):
        swept(*SMALL, "run.seed=1,2", "--nodes", "2", "--node", "0", "--head", "here")


def test_a_sweep_without_a_list_is_refused(trained):
    with pytest.raises(ConfigError, match=r"no setting has one; write for example .*, or drop -m$"):
        swept(*SMALL)
    assert trained == []


def test_help_is_no_sweep():
    assert is_sweep(["-m", "run.seed=1,2"])
    assert is_sweep(["run.seed=1,2", "--multirun"])
    assert not is_sweep(["-m", "--help"])
    assert not is_sweep(["run.seed=1"])


def test_without_validation_the_loss_decides_and_nothing_that_is_not_finite_does():
    def result(loss, validation_loss, exit_code=0):
        return RunResult("run", {}, exit_code, 1, loss, validation_loss)

    low, high = result(1.0, None), result(2.0, 0.5)
    assert best_of([high, low]) is low
    assert best_of([result(1.0, 3.0), high]) is high
    for value in (math.nan, math.inf):
        assert best_of([result(value, None), low]) is low
        assert best_of([result(1.0, value), high, result(value, value)]) is high
        assert best_of([result(value, value)]) is None
    assert best_of([result(None, None), low]) is low
    assert best_of([result(1.0, 3.0, 70)]) is None


def test_a_run_gets_the_signals_of_its_sweep(place, monkeypatch):
    program = place / "python"
    program.write_text(
        f'#!/bin/sh\n[ "${SWEEP}" = "$PPID" ] || exit 1\n'
        "trap 'echo left >&2; exit 75' TERM\ntouch started\n"
        "while true; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def ask():
        while not Path(place, "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with noting_signals() as signals:
        Timer(0, ask).start()
        assert module._trained(["run.seed=1"], signals) == (75, "left")
        assert signals.has_request


def run_of_a_sweep():
    os.environ[SWEEP] = str(os.getppid() if sys.argv.pop() == "alive" else os.getpid())
    main()


@pytest.mark.parametrize("sweep", ["alive", "gone"])
def test_a_run_trains_as_long_as_its_sweep_lives(sweep):
    done = finished(run_of_a_sweep, "--version", sweep)
    if sweep == "alive":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 137
        assert re.fullmatch(r"vp-train: the launcher, process \d+, is gone; .*\n", done.stderr)


def test_what_outlives_a_run_takes_no_line_of_the_next_one(place, monkeypatch):
    program = place / "python"
    program.write_text(
        "#!/bin/sh\n"
        "if [ -e started ]; then\n"
        "  sleep 0.5; echo second >&2; sleep 0.2; echo third >&2; exit 70\n"
        "fi\n"
        "touch started\n"
        "(sleep 0.2; echo late >&2; sleep 1) &\n"
        "echo first >&2; exit 70\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(module, "_LEFT_SECONDS", 0.05)
    with noting_signals() as signals:
        assert module._trained([], signals) == (70, "first")
        assert module._trained([], signals) == (70, "third")


def test_runs_whose_validations_have_other_samples_are_named():
    def of(*words):
        return load_config(["model=nano", *words])

    few, many, none = of(), of("micro_batch_size=2"), of("micro_batch_size=4", "run.eval_every=0")
    assert module._unlike_words([few, of("optim.lr=1e-3"), none]) == ""
    words = module._unlike_words([many, few])
    assert words.startswith("validations have 16, 32 sequences, so their losses do not compare")
    assert words.endswith("set run.eval_sequences=32 for all runs")
    same = of("micro_batch_size=2", "run.eval_sequences=16")
    assert module._unlike_words([few, same]) == ""
