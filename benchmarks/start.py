"""Measure by how much compiling delays the first step of a run on a CPU.

    python benchmarks/start.py [--ranks 4] [--rounds 3] [--json FILE] [key=value ...]

A job of one step is started in turns: `off` compiles nothing, `cold` compiles all elementwise work
of the layers and has neither torch's nor our cache of compiled code, `warm` is the next start.  The
model is `small` in bfloat16; further settings of `vp-train` replace ours.

`seconds` run from the start of the command to the line of its first step, `cpu_seconds` are those
of all processes of the job, compilers included.  `added` are medians over the rounds of what a
start takes longer than that of `off` in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import provenance

SYSTEMS = {"off": "off", "cold": "on", "warm": "on"}  # and run.compile
MEASURES = ("seconds", "cpu_seconds")


def start(words: list[str], compiles: str, temporary: Path) -> dict[str, float]:
    """Run one step, with `temporary` for what is compiled; return what it took."""
    code = "from vp_train.commands.train import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    environment = os.environ | {"TMPDIR": str(temporary)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as place:
        before, begin, first = _cpu_seconds(), time.perf_counter(), 0.0
        command += [f"run.compile={compiles}", f"run.root={place}"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
            assert job.stdout is not None
            for line in job.stdout:
                if line.startswith("step 1") and not first:
                    first = time.perf_counter() - begin
    if job.returncode or not first:
        raise SystemExit(f"exit code {job.returncode} of {' '.join(command)}")
    return {"seconds": first, "cpu_seconds": _cpu_seconds() - before}


def _cpu_seconds() -> float:
    """Return the CPU seconds of all processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, help="ranks of the pipeline (4)")
    parser.add_argument("--rounds", type=int, default=3, help="starts of every kind (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings of vp-train")
    arguments = parser.parse_intermixed_args()
    words = ["model=small", "data=synthetic", f"parallel.pp={arguments.ranks}", "run.steps=1"]
    words += ["run.dtype=bfloat16", "run.eval_every=0", "run.checkpoint_every=0"]
    words += ["run.report=false", "run.log_every=1", *arguments.settings]
    found: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as temporary:
            for system, compiles in SYSTEMS.items():
                found[system].append(start(words, compiles, Path(temporary)))
                print(system, json.dumps(found[system][-1]), flush=True)
    added = {
        system: {
            name: statistics.median(
                with_it[name] - without[name]
                for with_it, without in zip(starts, found["off"], strict=True)
            )
            for name in MEASURES
        }
        for system, starts in found.items()
        if system != "off"
    }
    for system, figures in added.items():
        seconds, cpu_seconds = (figures[name] for name in MEASURES)
        print(f"{system}: {seconds:.1f} s later, {cpu_seconds:.1f} s more CPU time")
    if arguments.json:
        result = {"settings": words, "added": added, "starts": found}
        arguments.json.write_text(json.dumps(provenance() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
