"""The fault matrix: what goes wrong in a run, and how the job must end.

Each case is a job of two ranks under `vp-train`.  Rank 1 does a deed, or somebody sends a signal.
The job must end with the right code, in few lines, in time, with a word that names the cause; no
process may be left, and what was saved must be usable.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from tests.programs import Program
from vp_train import train
from vp_train.checkpoint.store import find
from vp_train.commands.train import main
from vp_train.failures import EXIT_CONFIG, EXIT_HANG, EXIT_INTERNAL, EXIT_IO, EXIT_TIME
from vp_train.supervision.requests import SIGNALS

STEP = 3  # in which rank 1 does its deed
TIMEOUT = 4  # run.timeout_seconds of the jobs
LINES = 10
SLACK = 20  # seconds that a loaded machine may need besides


def _train_badly(deed: str, step: int) -> None:
    """Be vp-train, but rank 1 does `deed` in step `step`, or before it connects if that is 0."""

    def do(run: object) -> None:
        exec(deed, {"run": run, "os": os, "signal": signal, "time": time, "sys": sys})

    train_step, connect = train.Run.train_step, train.connect

    def training(self, number):
        if number == step and self.mesh.rank == 1:
            do(self)
        train_step(self, number)

    def connecting(*arguments):
        Path(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
        if step == 0 and os.environ["RANK"] == "1":
            do(None)
        return connect(*arguments)

    train.Run.train_step, train.connect = training, connecting
    main()


POISON = (
    "from vp_train.model import elementwise; add = elementwise.add_gradient; "
    "elementwise.add_gradient = lambda weight, gradient: add(weight, gradient * float('nan'))"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, and the end that the job must have.

    deed: statement of rank 1 in step `step`, or before it connects if that is 0.
    number, target: a signal to the launcher, to rank 1 or to the store, after step STEP.
    code, words: exit code, and a pattern of the cause on stderr.
    seconds: from the fault to the end of the job.
    saved: whether a checkpoint must be there at the end.
    """

    code: int
    words: str
    deed: str = "pass"
    step: int = STEP
    number: int = 0
    target: str = ""
    seconds: float = 2.0
    saved: bool = False
    settings: tuple[str, ...] = ()


STOPPED = r"stopped after step \d+, because {} reached {}; a checkpoint is saved"
KILLED = r"rank 1 on \S+ was killed by SIGKILL \("
SILENT = r"has not answered for 4 s .*; rank 1 on \S+ no longer beats"
FAULTS = {
    "kill -9 of a rank": Fault(128 + 9, KILLED, number=signal.SIGKILL, target="rank"),
    "kill -9 at the start": Fault(128 + 9, KILLED, "os.kill(os.getpid(), 9)", 0),
    "a launcher that crashes": Fault(-11, "", number=signal.SIGSEGV, target="launcher"),
    "kill -9 of the store of the ranks": Fault(
        EXIT_INTERNAL,
        r"^vp-train: the store of the ranks on \S+ was killed by SIGKILL .*; run.resume=true goes",
        number=signal.SIGKILL,
        target="store",
        saved=True,
    ),
    "a segmentation fault": Fault(128 + 11, "killed by SIGSEGV", "os.kill(os.getpid(), 11)"),
    **{
        f"{number.name} to the {target}": Fault(
            EXIT_TIME,
            STOPPED.format(number.name, {"rank": "rank 1"}.get(target, "the launcher")),
            number=number,
            target=target,
            saved=True,
        )
        for number in SIGNALS
        for target in ("launcher", "rank")
    },
    "a time limit": Fault(
        EXIT_TIME, "run.max_minutes is over", saved=True, settings=("run.max_minutes=0.001",)
    ),
    "a stop file": Fault(
        EXIT_TIME,
        "the file STOP was there",
        "(run.config.run.directory / 'STOP').touch()",
        saved=True,
    ),
    "SIGSTOP of a rank": Fault(
        EXIT_HANG, SILENT, number=signal.SIGSTOP, target="rank", seconds=TIMEOUT + 5
    ),
    "SIGSTOP before the first group": Fault(
        EXIT_HANG,
        "rank 1 on .* no longer beats",
        "time.sleep(.5); os.kill(os.getpid(), 19)",
        0,
        seconds=TIMEOUT + 5,
        settings=(f"run.world_timeout_seconds={TIMEOUT}",),
    ),
    "a rank that sleeps at the start": Fault(
        EXIT_HANG,
        r"; rank 1 on \S+ is busy: preparing to connect; log of rank 0: ",
        "time.sleep(1000)",
        0,
        seconds=TIMEOUT + 5,
        settings=(f"run.world_timeout_seconds={TIMEOUT}",),
    ),
    "a rank that sleeps": Fault(
        EXIT_HANG, r"rank 1 on \S+ is busy: step 3", "time.sleep(1000)", seconds=TIMEOUT + 5
    ),
    "an exception": Fault(
        EXIT_INTERNAL, r"rank 1 failed at step 3: ValueError: odd \(in ", "raise ValueError('odd')"
    ),
    "out of memory": Fault(EXIT_INTERNAL, "MemoryError.*vp-plan", "bytearray(1 << 62)"),
    "sys.exit": Fault(EXIT_INTERNAL, r"something called sys.exit\(3\)", "sys.exit(3)"),
    "exit 0 too early": Fault(EXIT_INTERNAL, "rank 1 on .* left with code 0", "os._exit(0)"),
    "exit with a code": Fault(5, "rank 1 on .* left with code 5", "os._exit(5)"),
    "a file that cannot be written": Fault(
        EXIT_IO,
        "^vp-train: x: No space left on device, at step 3; ",
        "raise OSError(28, 'No space left on device', 'x')",
    ),
    "a NaN": Fault(EXIT_CONFIG, "step 3: non-finite gradient on rank [01]", POISON),
}


def wrong_with(fault: Fault, root: Path, pause: float = 0.0) -> str | None:
    """Run the job, and return what is wrong with its end, None if nothing is.

    A signal comes `pause` seconds after step STEP.
    """
    words = [
        *("model=nano", "data=synthetic", "parallel.pp=2", "num_microbatches=2", "run.log_every=1"),
        "run.report=false",
        *("run.steps=100000", "run.trace_step=0", "run.eval_every=0", "run.checkpoint_every=2"),
        *("run.name=run", f"run.root={root}", f"run.timeout_seconds={TIMEOUT}", *fault.settings),
    ]
    main_of_job = partial(_train_badly, fault.deed, fault.step)
    with Program(main_of_job, words, directory=root) as job:
        if fault.number:
            _await_step(job, STEP)
            time.sleep(pause)
            os.kill(_target(fault, job.pid, root), fault.number)
        elif fault.step:
            _await_step(job, STEP - 1)
        began = time.monotonic()
        try:
            done = job.finish(fault.seconds + 60)
        except subprocess.TimeoutExpired:
            return "it has not ended"
        seconds, code, said = time.monotonic() - began, done.returncode, done.stderr
    if code != fault.code:
        return f"code {code} instead of {fault.code}: {said}"
    if not re.search(fault.words, said):
        return f"{fault.words!r} is not in: {said}"
    if len(said.splitlines()) > LINES or "Traceback" in said:
        return f"more than {LINES} lines: {said}"
    if fault.step and seconds > fault.seconds + SLACK:
        return f"{seconds:.1f} s instead of {fault.seconds} s"
    until = time.monotonic() + 2
    while any(Path(f"/proc/{_pid(root, rank)}").exists() for rank in range(2)):
        if time.monotonic() > until:
            return "a rank is left"
        time.sleep(0.01)
    return _wrong_state(fault, root / "run")


def _await_step(job, step):
    """Read the output up to the line of a step, or to its end."""
    next((line for line in job.stdout if line.startswith(f"step {step:>6}/")), None)


def _target(fault, launcher, root):
    """Return the process that gets the signal of a fault."""
    if fault.target == "launcher":
        return launcher
    if fault.target == "rank":
        return _pid(root, 1)
    children = {child.pid for child in psutil.Process(launcher).children()}
    (store,) = children - {_pid(root, rank) for rank in range(2)}
    return store


def _pid(root, rank):
    """Return the process of a rank, which it has written into a file."""
    return int((root / f"pid-{rank}").read_text())


def _wrong_state(fault, directory):
    if fault.saved and not any((directory / "checkpoints").glob("step-*")):
        return "no checkpoint was saved"
    for path in (directory / "checkpoints").glob("step-*"):
        try:
            find(path)
        except ValueError as error:
            return f"{path.name} is not usable: {error}"
    if (directory / "STOP").exists():
        return "the stop file is still there"
    return None


def campaign(seed: int, count: int, at_once: int = 2, first: Sequence[str] = ()) -> list[str]:
    """Run `count` jobs, `at_once` at a time, each fault in turn; return what went wrong.

    The faults are in random order, but those of `first` come first.
    """
    chance, names = random.Random(seed), list(FAULTS)

    def run(number: int) -> str | None:
        name = names[number % len(names)]
        with tempfile.TemporaryDirectory() as root:
            pause = random.Random(seed + number).uniform(0.0, 0.3)
            wrong = wrong_with(FAULTS[name], Path(root), pause)
        return None if wrong is None else f"{name}: {wrong}"

    chance.shuffle(names)
    names.sort(key=lambda name: name not in first)
    with ThreadPoolExecutor(at_once) as threads:
        return [wrong for wrong in threads.map(run, range(count)) if wrong is not None]
