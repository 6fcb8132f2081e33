"""The examples for other schedulers: their files are valid, and their commands are ours."""

from __future__ import annotations

import importlib.util
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from vp_train.settings import load_config

EXAMPLES = Path(__file__).parents[2] / "launch" / "examples"
# The fields of jobset.x-k8s.io/v1alpha2 and of a SkyPilot task that an example may use.
JOBSET = {"failurePolicy", "replicatedJobs", "network", "successPolicy", "suspend"}
JOB = {"completionMode", "completions", "parallelism", "backoffLimit", "podFailurePolicy"}
TASK = {"name", "num_nodes", "resources", "workdir", "volumes", "setup", "run", "envs"}


def words_of(script):
    """Return the words of the command vp-train in a shell script."""
    (line,) = [
        line
        for line in script.replace("\\\n", " ").splitlines()
        if re.search(r"vp-train +--", line)
    ]
    words = shlex.split(line.strip())
    return words[next(i for i, word in enumerate(words) if word.endswith("vp-train")) + 1 :]


def place_of(words):
    """Return the nodes, the node and the head of a command, and check its overrides."""
    names = dict(zip(words[:6:2], words[1:6:2], strict=True))
    assert set(names) == {"--nodes", "--node", "--head"}
    config = load_config(words[6:])
    assert config.run.resume, "a restart goes on"
    return names, config


def num_ranks(config):
    return config.parallel.dp * config.parallel.pp * config.parallel.tp


def test_the_jobset_has_one_pod_per_node_and_never_repeats_78_or_74():
    text = yaml.safe_load((EXAMPLES / "jobset.yaml").read_text())
    assert (text["apiVersion"], text["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, spec = text["metadata"]["name"], text["spec"]
    assert set(spec) <= JOBSET
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert set(job) == JOB | {"template"}
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (ending,) = job["podFailurePolicy"]["rules"]
    assert ending["onExitCodes"]["containerName"] == container["name"]
    assert ending["onExitCodes"]["values"] == [74, 78]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy needs it
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    script = container["args"][0]
    place, config = place_of(words_of(script))
    assert int(place["--nodes"]) == job["completions"]
    assert place["--node"] == "$JOB_COMPLETION_INDEX"
    head = f"{name}-{replicated['name']}-0-0.{name}"
    assert f"HEAD={head}\n" in script
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert num_ranks(config) == gpus * job["completions"]


def test_the_skypilot_task_starts_one_launcher_per_node():
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert set(task) <= TASK
    place, config = place_of(words_of(task["run"]))
    assert place["--nodes"] == "$SKYPILOT_NUM_NODES"
    assert place["--node"] == "$SKYPILOT_NODE_RANK"
    assert num_ranks(config) == task["num_nodes"] * int(task["resources"]["accelerators"][-1])


@pytest.fixture
def example(monkeypatch):
    """Return the module of the example for submitit, without submitit."""
    path = EXAMPLES / "submitit_run.py"
    spec = importlib.util.spec_from_file_location("submitit_run", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "submitit_run", module)
    spec.loader.exec_module(module)
    return module


def command_that(code):
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(("code", "returned"), [(0, 0), (75, 75), (78, None)])
def test_a_task_returns_the_code_of_a_run_that_ended_or_stopped(example, code, returned):
    check = f"import sys; sys.exit({code} if sys.argv[1:] == ['a=1', 'run.resume=true'] else 9)"
    task = example.Train(["a=1"], command_that(check))
    if returned is None:
        with pytest.raises(RuntimeError, match="left with 78"):
            task()
    else:
        assert task() == returned


def test_a_job_is_submitted_with_one_task_per_node(example, monkeypatch, capsys):
    given = {}

    class Executor:
        def __init__(self, folder, cluster):
            given.update(folder=folder, cluster=cluster)

        def update_parameters(self, **parameters):
            given.update(parameters)

        def submit(self, task):
            given.update(overrides=task.overrides)
            return SimpleNamespace(job_id="42")

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    example.main(["--nodes", "4", "model=nano", "run.name=first"])
    assert capsys.readouterr().out == "42\n"
    assert (given["nodes"], given["tasks_per_node"]) == (4, 1)
    assert given["overrides"] == ["model=nano", "run.name=first"]


def test_submitit_runs_the_task_and_queues_what_goes_on(example, tmp_path):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    executor = submitit.AutoExecutor(str(tmp_path), cluster="debug")
    executor.update_parameters(name="vp_train", timeout_min=1, slurm_signal_delay_s=120)
    assert executor.submit(example.Train(["a=1"], command_that("pass"))).result() == 0
    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); time.sleep(60)"
    task = example.Train(["a=1"], command_that(waits))
    task.process = example.subprocess.Popen(command_that("import time; time.sleep(60)"))
    again = task.checkpoint()
    assert task.process.returncode == -15
    assert again.function.overrides == ["a=1"]
    assert again.function.process is None


@pytest.mark.parametrize(("handler", "code"), [("lambda *_: sys.exit(75)", 75), ("SIG_DFL", -15)])
def test_a_waiting_task_ends_when_submitit_interrupts_it(example, monkeypatch, handler, code):
    again = SimpleNamespace(DelayedSubmission=lambda task: task)
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(helpers=again))
    monkeypatch.setattr(example, "_SAVE_SECONDS", 40)
    # The run interrupts us once it would save, or dies as it does before it is ready to.
    waits = f"import os, sys, time; from signal import *; signal(SIGTERM, {handler}); "
    waits += "os.kill(os.getppid(), SIGUSR1)\nwhile True: time.sleep(.1)"
    task = example.Train(["a=1"], command_that(waits))
    queued = []
    before = signal.signal(signal.SIGUSR1, lambda *_: queued.append(task.checkpoint()))
    began = time.monotonic()
    try:
        assert task() == code
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - began < 30
    assert queued[0].overrides == ["a=1"]
