"""Mutation testing: do the tests of a package fail when its code is wrong?

    python -m tests.mutants --packages schedules,data --count 20 --seed 1 --json mutants.json

A mutant is one small change of one file: a comparison shifted, a constant off by one, an operator
swapped, a `not` or a statement dropped.  It is made in a scratch copy of the tree, where only the
tests of its package run.  If they pass, the mutant has survived.  Then either a test is missing, or
the change has no effect.  `mutants_equivalent.txt` lists mutants without effect, with the reason;
they do not count.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import hypothesis.strategies  # noqa: F401 - imported once, before the forks
import pytest
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch.distributed  # noqa: F401

from tests.mutants_reach import Chosen, Reach, Recorder, Unshrunk, places_of, reporting

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
COPIED = (
    "schedules",
    "vp_train",
    "configs",
    "tests",
    "benchmarks",
    "docs",
    "launch",
    "pyproject.toml",
    "README.md",
    "Makefile",
)

# Every package has rows of path prefixes and the tests that should fail for mutants of such paths.
# The first row whose prefix matches counts.  The last row of a package matches all of its files.
PACKAGES: dict[str, tuple[tuple[str | tuple[str, ...], tuple[str, ...]], ...]] = {
    "schedules": (("schedules", ("tests/schedules", "tests/test_explain.py")),),
    "data": (
        # The tokenizer of an import and that of its text are one law of both packages.
        (
            ("vp_train/data/origin.py", "vp_train/data/tokenizer.py"),
            ("tests/data", "tests/hf/test_tokenizers.py"),
        ),
        ("vp_train/data", ("tests/data",)),
    ),
    "checkpoint": (
        ("vp_train/checkpoint/run.py", ("tests/test_resume.py", "tests/test_train.py")),
        ("vp_train/checkpoint", ("tests/checkpoint",)),
    ),
    "optim": (("vp_train/optim", ("tests/optim",)),),
    "metrics": (("vp_train/metrics", ("tests/metrics",)),),
    "vocab": (("vp_train/vocab", ("tests/vocab",)),),
    "model": (("vp_train/model", ("tests/model",)),),
    "pipeline": (("vp_train/pipeline", ("tests/pipeline",)),),
    "planner": (("vp_train/planning", ("tests/planning", "tests/test_plan_command.py")),),
    "hf": (("vp_train/hf", ("tests/hf",)),),
    "explain": (("vp_train/explain", ("tests/test_explain.py",)),),
    "report": (("vp_train/report", ("tests/report", "--ignore=tests/report/test_browser.py")),),
    "inference": (("vp_train/inference", ("tests/inference",)),),
    "supervision": (
        ("vp_train/supervision/watcher.py", ("tests/test_ends.py",)),
        ("vp_train/supervision", ("tests/supervision", "tests/test_local_ranks.py")),
    ),
    "communication": (
        (
            "vp_train/communication",
            (
                *("tests/test_communicators.py", "tests/test_control.py"),
                *("tests/test_failures.py", "tests/test_rendezvous.py"),
            ),
        ),
    ),
}

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_SILENT = ("warnings", "print")  # calls that only write text for people
# Extra time for a mutant, on top of a multiple of the time that its tests take without it.
SPARE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of the file `path`: characters [start, stop) of its text become `after`."""

    package: str
    path: str
    line: int
    start: int
    stop: int
    before: str
    after: str
    code: str  # the line of code that the change begins in

    def applied(self, text: str) -> str:
        """Return the text of the file with the change."""
        return text[: self.start] + self.after + text[self.stop :]

    def __str__(self) -> str:
        return f"{self.path}:{self.line}  {_one_line(self.before)}  ->  {_one_line(self.after)}"

    @property
    def key(self) -> str:
        """An identifier of the change that does not depend on line numbers."""
        return f"{self.path}  {self.code}  |  {_one_line(self.before)}  ->  {_one_line(self.after)}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of running the tests of a mutant."""

    mutant: Mutant
    status: str  # KILLED, TIMEOUT or SURVIVED
    equivalent: bool
    seconds: float


def _one_line(text: str) -> str:
    return " ".join(text.split())


def mutants_of(package: str, path: str, text: str) -> Iterator[Mutant]:
    """Yield every mutant of a file.

    Annotations, decorators, assertions and texts for people are not changed.
    """
    place, lines = places_of(text), text.splitlines()
    for node, changed in _changes(ast.parse(text)):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, stop = (
            place(node.lineno, node.col_offset),
            place(node.end_lineno, node.end_col_offset),
        )
        before, after = text[start:stop], ast.unparse(changed)
        if isinstance(node, ast.expr):
            after = f"({after})"
        yield Mutant(
            package, path, node.lineno, start, stop, before, after, lines[node.lineno - 1].strip()
        )


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST]]:
    """Yield every node below `node` that can be changed, with its replacement."""
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and _name(node.value.func) in _SILENT
    ):
        return
    if isinstance(node, ast.expr | ast.stmt):
        for changed in _changes_of(node):
            yield node, changed
    if isinstance(node, ast.Raise):
        return  # do not change its message
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child)


def _name(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def _changes_of(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    """Yield the replacements of a node."""
    match node:
        case ast.Compare(left, [operator, *others], comparators) if type(operator) in _COMPARISONS:
            yield ast.Compare(left, [_COMPARISONS[type(operator)](), *others], comparators)
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
            if value > 0:
                yield ast.Constant(value - 1)
        case ast.BinOp(left, operator, right) if type(operator) in _OPERATORS and not (
            _is_text(left) or _is_text(right)
        ):
            yield ast.BinOp(left, _OPERATORS[type(operator)](), right)
        case ast.UnaryOp(ast.Not(), operand):
            yield operand
        case ast.UnaryOp(ast.USub(), operand) if not isinstance(operand, ast.Constant):
            yield operand
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.Call(ast.Name(name), arguments, keywords) if name in _CALLS:
            yield ast.Call(ast.Name(_CALLS[name]), arguments, keywords)
        case ast.IfExp(_, body, otherwise):
            yield body
            yield otherwise
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()


def tests_of(mutant: Mutant) -> tuple[str, ...]:
    """Return the tests that should fail for this mutant."""
    return next(
        tests for prefix, tests in PACKAGES[mutant.package] if mutant.path.startswith(prefix)
    )


def _root(package: str) -> str:
    """Return the folder of a package."""
    root = PACKAGES[package][-1][0]
    assert isinstance(root, str)
    return root


def drawn(package: str, count: int, seed: int, begin: tuple[str, ...] = ("",)) -> list[Mutant]:
    """Draw `count` mutants of a package, reproducibly by seed as long as its files do not change.

    Only files whose path begins with one of `begin` are used.
    """
    found = []
    for file in sorted((ROOT / _root(package)).rglob("*.py")):
        path = str(file.relative_to(ROOT))
        if path.startswith(begin):
            found += list(mutants_of(package, path, file.read_text()))
    return random.Random(f"{seed} {package}").sample(found, min(count, len(found)))


def _run(
    scratch: Path, tests: Sequence[str], limit: float, *plugins: object
) -> tuple[int | None, float]:
    """Run pytest with `plugins` for at most `limit` seconds.

    Returns its exit status, None after a timeout, and the seconds that it took.  It runs in a fork
    of this process, which has already imported the slow third-party libraries.
    """
    start = time.monotonic()
    child = os.fork()
    if not child:
        status = 3
        try:
            os.setsid()
            gc.freeze()  # what ends threads would wait for some that a fork does not have
            status = _tested(scratch, tests, plugins)
        finally:
            os._exit(status)
    done, status = 0, 0
    while not done and time.monotonic() - start < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0 if done else 0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also ends ranks that its tests started
    if not done:
        os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if done else None, time.monotonic() - start


def _tested(scratch: Path, tests: Sequence[str], plugins: Sequence[object]) -> int:
    """Run pytest on the tree at `scratch` without output, and return its exit status."""
    os.environ |= {
        "CI": "1",  # hypothesis tries the same examples every time
        "PYTHONPATH": str(scratch),
        # Two mutants of the same size, made in the same second, would share their bytecode.
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    sys.dont_write_bytecode = True
    os.chdir(scratch)
    own = {path.stem for path in ROOT.iterdir()} | {path.name for path in scratch.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    sys.path[:] = [
        str(scratch),
        *(path for path in sys.path if path and Path(path).resolve() != ROOT),
    ]
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", f"--rootdir={scratch}"]
    return int(pytest.main([*options, *tests], plugins=[Unshrunk(), *plugins]))


def _known() -> frozenset[str]:
    """Return the keys of the mutants that are known to have no effect."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    return frozenset(line for line in lines if line and not line.startswith("#"))


def judge(mutants: list[Mutant], factor: float) -> Iterator[Outcome]:
    """Run the tests of every mutant, and yield the outcomes.

    A mutant may take `factor` times the time of its tests without it, and SPARE_SECONDS more.
    Raises SystemExit if the tests fail without a mutant, or if there are none.
    """
    known = _known()
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        scratch = Path(directory)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, scratch / name, ignore=shutil.ignore_patterns("__pycache__")
                )
            elif source.exists():
                shutil.copy2(source, scratch / name)
        by_tests: dict[tuple[str, ...], Reach] = {}
        for number, mutant in enumerate(mutants):
            tests = tests_of(mutant)
            if tests not in by_tests:
                by_tests[tests] = _reach(scratch, tests, mutants)
            reach = by_tests[tests]
            chosen = Chosen(
                reach.tests_of(number, Path(mutant.path).stem), frozenset(reach.seconds)
            )
            limit = SPARE_SECONDS + factor * sum(reach.seconds[test] for test in chosen.tests)
            status, seconds = _run_changed(scratch, mutant, chosen, limit)
            while status is None and _run(scratch, chosen.files, limit, chosen)[0] is None:
                limit *= 2  # without the change they end no sooner: the machine has become slower
                status, seconds = _run_changed(scratch, mutant, chosen, limit)
            verdict = {None: "TIMEOUT", 0: "SURVIVED"}.get(status, "KILLED")
            yield Outcome(mutant, verdict, verdict == "SURVIVED" and mutant.key in known, seconds)


def _run_changed(
    scratch: Path, mutant: Mutant, chosen: Chosen, limit: float
) -> tuple[int | None, float]:
    """Run `chosen` with the change as `_run` does; it passes if there is no test."""
    if not chosen.tests:
        return 0, 0.0
    target = scratch / mutant.path
    text = target.read_text()
    target.write_text(mutant.applied(text))
    try:
        return _run(scratch, chosen.files, limit, chosen)
    finally:
        target.write_text(text)


def _reach(scratch: Path, tests: tuple[str, ...], mutants: list[Mutant]) -> Reach:
    """Run `tests` without a mutant, and return which of them come to those `mutants` of theirs."""
    sites: dict[str, dict[int, int]] = {}
    for number, mutant in enumerate(mutants):
        if tests_of(mutant) == tests:
            sites.setdefault(mutant.path, {})[number] = mutant.start
    recorder = Recorder(scratch, len(mutants), _root(mutants[0].package).replace("/", "."))
    recorder.prepare()
    texts = {path: (scratch / path).read_text() for path in sites}
    silent: set[int] = set()
    for path, numbers in sites.items():
        text, without = reporting(texts[path], numbers)
        (scratch / path).write_text(text)
        silent |= without
    try:
        status, _ = _run(scratch, tests, 3600, recorder)
    finally:
        for path, text in texts.items():
            (scratch / path).write_text(text)
    if status == 5:
        raise SystemExit(f"mutants: {' '.join(tests)} have no test")
    if status != 0:
        raise SystemExit(
            f"mutants: {' '.join(tests)} end with {status} without a mutant; mend them first\n"
            f"{recorder.failure}"
        )
    return recorder.result(silent)


def rate(outcomes: list[Outcome]) -> tuple[int, int]:
    """Return the number of mutants that the tests noticed, and the number that count."""
    counted = [outcome for outcome in outcomes if not outcome.equivalent]
    return sum(outcome.status != "SURVIVED" for outcome in counted), len(counted)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Do the tests fail when the code is wrong?"
    )
    parser.add_argument(
        "--packages",
        default="schedules,data,checkpoint,optim,metrics",
        help=f"separated by commas, from {', '.join(PACKAGES)}",
    )
    parser.add_argument(
        "--files",
        default="",
        help="only files whose path begins with one of these, separated by commas",
    )
    parser.add_argument("--count", type=int, default=10, help="mutants of each package")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--factor",
        type=float,
        default=3.0,
        help="time limit, as a multiple of the time of the tests without a mutant",
    )
    parser.add_argument("--json", type=Path, help="write every outcome here")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    options = parser.parse_args()
    names = options.packages.split(",")
    for name in names:
        if name not in PACKAGES:
            parser.error(f"--packages={name} is not known; choose from {', '.join(PACKAGES)}")
    outcomes: list[Outcome] = []
    for name in names:
        mutants = drawn(name, options.count, options.seed, tuple(options.files.split(",")))
        if options.list:
            print(*mutants, sep="\n")
            continue
        for outcome in judge(mutants, options.factor):
            outcomes.append(outcome)
            note = " (equivalent)" if outcome.equivalent else ""
            print(
                f"{outcome.status + note:8s} {outcome.seconds:6.1f} s  {outcome.mutant}", flush=True
            )
        if options.json is not None:
            result = {
                "seed": options.seed,
                "count": options.count,
                "files": options.files,
                "outcomes": list(map(asdict, outcomes)),
            }
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.list:
        return
    for name in [*names, "all"]:
        own = [outcome for outcome in outcomes if name in (outcome.mutant.package, "all")]
        killed, counted = rate(own)
        share = f"{killed / counted:.0%}" if counted else "none"
        num_equivalent = sum(outcome.equivalent for outcome in own)
        print(f"{name}: {killed} of {counted} killed, {share}; {num_equivalent} equivalent")


if __name__ == "__main__":
    main()
