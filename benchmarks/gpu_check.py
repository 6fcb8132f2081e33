"""Fifteen checks of CUDA and NCCL on one GPU, in at most eight minutes.

    python benchmarks/gpu_check.py [--steps 1,3,6] [--out DIR] [--seconds 480]

Every step runs in its own process with its own time limit.  A step that raises, aborts or hangs
therefore does not stop the rest.  Steps that measure no time run first, three at once.  The others
then run one after another.  After every step its result is in `DIR/gpu_check_CARD.json` (default
DIR: benchmarks/results): what was expected, what was measured, and figures.  The exit code is 1 if
a step failed.  Without a GPU the same code runs with tiny sizes on the CPU, two steps at once, and
checks that need a GPU are not judged.

On a machine without a network, with torch 2.11, triton 3.6 and transformers for Python 3.12:

    benchmarks/gpu_wheels.sh wheels        # where there is a network
    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python benchmarks/gpu_check.py

vp_train itself need not be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from gpu_steps import STEPS
from provenance import provenance

ROOT = Path(__file__).parent.parent
_TAIL_LINES = 60
_MINIMUM_SECONDS = 5.0  # a step does not start with less time left
_CPU_PATIENCE = 10  # factor of the time limits on a CPU, which other processes may use too

# Makes a checkout importable that is not installed.  An installation maps vp_train.configs to
# configs/ (see pyproject.toml); here a link in a temporary directory does.
_SITECUSTOMIZE = """
import sys
sys.path.insert(0, {root!r})
import vp_train
vp_train.__path__.append({overlay!r})
"""


@dataclass(frozen=True, slots=True)
class Task:
    """A step to run in its own process.

    `command` writes its checks to the file that is its last argument.  A `timed` step runs alone.
    """

    number: int
    name: str
    limit_seconds: float
    command: tuple[str, ...]
    timed: bool = False


def tasks(numbers: Iterable[int], device: str) -> list[Task]:
    """Return the tasks of these step numbers on `device`."""
    script = str(Path(__file__).with_name("gpu_steps.py"))
    patience = 1 if device == "cuda" else _CPU_PATIENCE
    return [
        Task(
            number,
            STEPS[number].name,
            STEPS[number].limit_seconds * patience,
            (sys.executable, script, str(number), device),
            STEPS[number].timed and device == "cuda",
        )
        for number in numbers
    ]


def run_task(
    task: Task, scratch: Path, seconds: float, environment: dict[str, str]
) -> dict[str, Any]:
    """Run one step for at most `seconds` and return its record.  A failed step does not raise."""
    record: dict[str, Any] = {"step": task.number, "name": task.name, "checks": [], "figures": {}}
    limit = min(seconds, task.limit_seconds)
    if limit < _MINIMUM_SECONDS:
        return record | {"status": "no time left", "seconds": 0.0}
    folder = scratch / f"step_{task.number}"
    folder.mkdir()
    result, output = folder / "result.json", folder / "output.txt"
    began = time.perf_counter()
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*task.command, str(result)],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    record["seconds"] = round(time.perf_counter() - began, 1)
    if result.is_file():
        record |= json.loads(result.read_text())
    record["status"] = _status(code, record["checks"], limit)
    if record["status"] != "passed":
        lines = output.read_text(errors="replace").splitlines()
        record["output"] = lines[-_TAIL_LINES:]
    return record


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the processes that are left in the step's session, such as ranks that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _status(code: int | None, checks: Sequence[dict[str, Any]], limit: float) -> str:
    if code is None:
        return f"not done in {limit:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if code:
        return "raised" if code == 1 else f"exit code {code}"
    if not checks or any(check["passed"] is False for check in checks):
        return "failed"
    return "passed"


class Results:
    """The file of all results, rewritten after every step."""

    def __init__(self, path: Path, heading: dict[str, Any]) -> None:
        self._path, self._heading, self._lock = path, heading, Lock()
        self.records: dict[int, dict[str, Any]] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Add a record and rewrite the file by a rename, so that it is always complete."""
        with self._lock:
            self.records[record["step"]] = record
            steps = [self.records[number] for number in sorted(self.records)]
            written = self._path.with_suffix(".tmp")
            written.write_text(json.dumps(self._heading | {"steps": steps}, indent=1) + "\n")
            written.replace(self._path)
            print(
                f"step {record['step']:2} {record['name']}: "
                f"{record['status']}, {record['seconds']} s",
                flush=True,
            )


def check(
    todo: Sequence[Task],
    results: Results,
    seconds: float,
    *,
    jobs: int = 1,
    environment: dict[str, str] | None = None,
) -> bool:
    """Run the steps within `seconds`, and return whether all passed.

    Steps that are not timed run first, `jobs` at once.  Timed steps follow one after another.
    """
    deadline = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        environment = dict(os.environ if environment is None else environment)
        environment |= _import_path(Path(scratch), environment)

        def run(task: Task) -> None:
            results.add(run_task(task, Path(scratch), deadline - time.perf_counter(), environment))

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, [task for task in todo if not task.timed]))
        for task in todo:
            if task.timed:
                run(task)
    return all(record["status"] == "passed" for record in results.records.values())


def _import_path(scratch: Path, environment: dict[str, str]) -> dict[str, str]:
    """Return a PYTHONPATH that finds vp_train and its tests, whether they are installed or not."""
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    spec = importlib.util.find_spec("vp_train")
    if spec is None or importlib.util.find_spec("vp_train.configs") is None:
        overlay = scratch / "overlay"
        overlay.mkdir()
        (overlay / "configs").symlink_to(ROOT / "configs")
        (overlay / "sitecustomize.py").write_text(
            _SITECUSTOMIZE.format(root=str(ROOT), overlay=str(overlay))
        )
        paths.insert(0, str(overlay))
    return {"PYTHONPATH": os.pathsep.join(paths)}


def summary(records: Iterable[dict[str, Any]]) -> str:
    """Return a table of all checks: expected, measured, and the verdict."""
    rows = [("step", "check", "expected", "measured", "")]
    for record in records:
        title = f"{record['step']} {record['name']}"
        rows.append(
            (
                title,
                record["status"],
                "",
                f"{record['seconds']} s",
                "" if record["status"] == "passed" else "FAILED",
            )
        )
        for item in record["checks"]:
            verdict = {True: "passed", False: "FAILED", None: "not judged"}[item["passed"]]
            rows.append(("", item["what"], item["expected"], item["measured"], verdict))
        rows += [("", line, "", "", "") for line in record.get("output", [])[-3:]]
    widths = [min(60, max(len(row[column]) for row in rows)) for column in range(4)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]
        ).rstrip()
        for row in rows
    )


def _numbers(text: str) -> list[int]:
    try:
        chosen = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of steps; write for example 1,3,6"
        ) from None
    unknown = [number for number in chosen if number not in STEPS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"step {unknown[0]} is not known; there are 1 to {max(STEPS)}"
        )
    return sorted(set(chosen))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=_numbers, default=list(STEPS), help="for example 1,3,6 (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the result"
    )
    parser.add_argument(
        "--seconds", type=float, help="time limit of all steps together (default: 480 on a GPU)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    arguments = parser.parse_args()
    heading = provenance()
    card = heading.get("accelerator", {}).get("card", "")
    device = arguments.device or ("cuda" if card else "cpu")
    if device == "cuda" and not card:
        parser.error("--device cuda: torch finds no GPU here; leave it out")
    environment = {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
    }
    where = card if device == "cuda" else "cpu"
    if device == "cpu":
        print(
            "no GPU: the steps run with tiny sizes on the CPU, "
            "and checks that need a GPU are not judged",
            flush=True,
        )
        environment["CUDA_VISIBLE_DEVICES"] = ""
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "_", where.lower()).strip("_")
    path = arguments.out / f"gpu_check_{name}.json"
    results = Results(path, heading | {"device": where})
    jobs, seconds = (3, 480.0) if device == "cuda" else (2, 480.0 * _CPU_PATIENCE)
    seconds = arguments.seconds or seconds
    passed = check(
        tasks(arguments.steps, device),
        results,
        seconds,
        jobs=jobs,
        environment=environment,
    )
    table = summary(results.records[number] for number in sorted(results.records))
    print(f"\n{table}\n\nwritten to {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
