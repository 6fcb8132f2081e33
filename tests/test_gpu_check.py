"""The GPU check runs without a GPU, and no step that fails stops the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # its scripts import each other by their bare names

import gpu_check  # noqa: E402
import gpu_steps  # noqa: E402
from gpu import common, layers, runs, setup  # noqa: E402
from gpu_steps import STEPS  # noqa: E402

from tests.programs import finished, python  # noqa: E402
from tests.ranks import in_processes  # noqa: E402

WELL = """
import json, sys
check = {"what": "it", "expected": "1", "measured": "1"}
checks = [check | {"passed": passed} for passed in (True, None)]
open(sys.argv[1], "w").write(json.dumps({"checks": checks, "figures": {"a": 1}}))
"""
BADLY = {
    "raises": ("raise ZeroDivisionError('here')", "raised"),
    "aborts": ("import os; os.abort()", "ended by SIGABRT"),
    "hangs": ("import time; time.sleep(60)", "not done in 5 s"),
    "leaves": ("import os; os._exit(3)", "exit code 3"),
    "checks nothing": ("pass", "failed"),
    "measures something else": (WELL.replace("True, None", "True, False"), "failed"),
}


def task(number, name, code, seconds=30.0):
    return gpu_check.Task(number, name, seconds, (sys.executable, "-c", code))


def results_in(path):
    return gpu_check.Results(path / "gpu_check_cpu.json", {"commit": "0"})


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_no_step_stops_the_others(tmp_path):
    results, todo = results_in(tmp_path), []
    for name, (code, _) in BADLY.items():
        todo.append(task(len(todo) + 1, name, code, 5.0 if name == "hangs" else 30.0))
        todo.append(task(len(todo) + 1, "after it", WELL))
    assert not gpu_check.check(todo, results, 100.0, jobs=2)
    written = json.loads((tmp_path / "gpu_check_cpu.json").read_text())
    assert written["commit"] == "0"
    assert [step["step"] for step in written["steps"]] == [each.number for each in todo]
    statuses = {step["name"]: step["status"] for step in written["steps"]}
    assert statuses == {name: status for name, (_, status) in BADLY.items()} | {
        "after it": "passed"
    }
    assert any("ZeroDivisionError: here" in line for line in written["steps"][0]["output"])
    table = gpu_check.summary(written["steps"])
    assert table.count("FAILED") == len(BADLY) + 1  # one of them is a check


def test_every_result_is_written_at_once_and_what_has_no_time_left_is_not_run(tmp_path):
    results = results_in(tmp_path)
    later = "import json, sys; assert len(json.load(open({!r}))['steps']) == 1".format(
        str(tmp_path / "gpu_check_cpu.json")
    )
    todo = [task(1, "first", WELL), task(2, "second", later + WELL)]
    assert gpu_check.check(todo, results, 60.0)
    assert not gpu_check.check([task(3, "third", WELL)], results, 1.0)
    assert results.records[3]["status"] == "no time left"


def test_what_a_step_found_before_it_died_is_kept(tmp_path):
    results = results_in(tmp_path)
    assert not gpu_check.check([task(1, "half", WELL + "raise SystemExit(9)")], results, 60.0)
    record = results.records[1]
    assert (record["status"], len(record["checks"]), record["figures"]) == (
        "exit code 9",
        2,
        {"a": 1},
    )


class Forked:
    """A process of Python in the place of subprocess.Popen's: a copy of this one.

    It has made its imports, and writes to the file `stdout` if there is one.
    """

    def __init__(self, command, cwd, stdout=None, env=None, **_):
        self.returncode, (_, *words) = None, command
        sys.stdout.flush()
        self._process = os.fork()
        if self._process:
            return
        multiprocessing.current_process()._config["daemon"] = False  # it may start processes
        code = 1
        try:
            for number in (1, 2) if stdout is not None else ():
                os.dup2(stdout.fileno(), number)
            os.environ.update(env or {})
            os.chdir(cwd)
            sys.argv = ["python", *words]
            python()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self):
        _, status = os.waitpid(self._process, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def run_forked(command, cwd, stdout=None, **_):
    """Do what subprocess.run does; the output goes where that of this process goes."""
    process = Forked(command, cwd)
    process.wait()
    return subprocess.CompletedProcess(command, process.returncode, "")


def on_the_cpu(rank, number, folder):
    replaced = SimpleNamespace(
        **{name: getattr(subprocess, name) for name in ("PIPE", "STDOUT", "CompletedProcess")},
        Popen=Forked,
        run=run_forked,
    )
    for module in (common, layers, runs, setup):
        module.subprocess = replaced
    gpu_steps.main([str(number), "cpu", str(folder / "result.json")])


# All steps in CI; elsewhere those that take little: all are half a minute.
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", sorted(STEPS) if os.environ.get("CI") else [2, 3, 4, 8])
def test_a_step_runs_on_the_cpu(tmp_path, number):
    in_processes(on_the_cpu, (number, tmp_path), 1)
    checks = json.loads((tmp_path / "result.json").read_text())["checks"]
    assert checks
    assert [check for check in checks if check["passed"] is False] == []
    assert all(check["measured"] for check in checks)
    if number not in (6, 7, 9, 10, 11, 14):  # these only measure times
        assert any(check["passed"] for check in checks)


def warm_python():
    """Be `python`, and start such ones too."""
    _, sys.executable, *words = sys.argv
    sys.argv[1:] = words
    python()


def test_the_script_runs_a_step_and_writes_where_it_did(programs, tmp_path):
    words = [ROOT / "benchmarks" / "gpu_check.py", "--device", "cpu", "--out", tmp_path]
    done = finished(warm_python, str(programs / "python"), *map(str, words), "--steps", "2")
    written = json.loads((tmp_path / "gpu_check_cpu.json").read_text())
    assert [(step["step"], step["status"]) for step in written["steps"]] == [(2, "passed")], (
        done.stdout
    )
    assert done.returncode == 0
    assert written["device"] == "cpu"
    assert {"torch", "python"} <= written["versions"].keys()


def test_unknown_steps_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--steps", "1,16"])
    with pytest.raises(SystemExit) as left:
        gpu_check.main()
    assert left.value.code == 2
    assert "step 16 is not known; there are 1 to 15" in capsys.readouterr().err
