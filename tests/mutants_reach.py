"""Which tests come to the code that a mutant changes, and in which order to run them.

The tests run once without a mutant.  In that run every statement that a mutant will change reports
that it runs, in any process.  A mutant then needs only the tests that came to its statement, and
the fastest of them run first.
"""

from __future__ import annotations

import ast
import json
import mmap
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, settings

PROBE = "mutants_probe"  # the module in the scratch copy that statements report to
_PROBE_SOURCE = """import mmap
with open({path!r}, "r+b") as file:
    FLAGS = mmap.mmap(file.fileno(), 0)
def reached(number):
    FLAGS[number] = 1
"""
QUICK_SECONDS = 0.25  # tests below run before all others
SETUP_SECONDS = 1.0  # files with a longer set-up are run in one piece


def places_of(text: str) -> Callable[[int, int], int]:
    """Return the function from a line and a column of `ast` to an index of `text`."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    encoded = text.encode()
    return lambda line, column: len(encoded[: starts[line - 1] + column].decode())


def reporting(text: str, sites: Mapping[int, int]) -> tuple[str, set[int]]:
    """Return the text of a file whose statements report that they run.

    `sites` has the place of every mutant by its number.  Also returns the numbers that are never
    reported: what is outside of functions runs when it is imported, and kernels are compiled.
    """
    tree, place = ast.parse(text), places_of(text)
    innermost: dict[int, ast.stmt] = {}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("triton" in ast.unparse(decorator) for decorator in function.decorator_list):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.stmt) or node is function:
                continue
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            start = place(node.lineno, node.col_offset)
            stop = place(node.end_lineno, node.end_col_offset)
            for number, site in sites.items():
                known = innermost.get(number)
                if start <= site < stop and (
                    known is None or place(known.lineno, known.col_offset) <= start
                ):
                    innermost[number] = node
    reports = defaultdict(list)
    for number, statement in innermost.items():
        reports[statement] += ast.parse(f"__import__({PROBE!r}).reached({number})").body
    return ast.unparse(_Reports(reports).visit(tree)), set(sites) - set(innermost)


class _Reports(ast.NodeTransformer):
    """Put statements in front of others."""

    def __init__(self, reports: Mapping[ast.stmt, list[ast.stmt]]) -> None:
        self._reports = reports

    def visit(self, node: ast.AST) -> ast.AST | list[ast.AST]:
        self.generic_visit(node)
        if isinstance(node, ast.stmt) and node in self._reports:
            return [*self._reports[node], node]
        return node


@dataclass(frozen=True, slots=True)
class Reach:
    """The tests of a run, and the mutants that they came to.

    `setups` and `seconds` have the time of each test's set-up and of all of it; `reached` the
    tests of each mutant.  A mutant without an entry in it belongs to all tests.
    """

    setups: dict[str, float]
    seconds: dict[str, float]
    reached: dict[int, frozenset[str]]

    def tests_of(self, number: int, stem: str) -> list[str]:
        """Return the tests of a mutant of `stem`.py in the order in which they should run.

        Quick ones are first, of these test_`stem`.py.
        """
        chosen = self.reached.get(number, self.seconds.keys())
        in_file: dict[str, float] = defaultdict(float)
        setup: dict[str, float] = defaultdict(float)
        for test in chosen:
            in_file[_file(test)] += self.seconds[test]
        for test, seconds in self.setups.items():
            setup[_file(test)] = max(setup[_file(test)], seconds)

        def order(test: str) -> tuple[bool, bool, float, str, float]:
            file = _file(test)
            quick = self.seconds[test] < QUICK_SECONDS and setup[file] < SETUP_SECONDS
            named = Path(file).stem == f"test_{stem}"
            return not quick, not named, in_file[file], file, self.seconds[test]

        return sorted(chosen, key=order)


def _file(test: str) -> str:
    return test.partition("::")[0]


@dataclass(slots=True)
class Recorder:
    """A plugin of pytest that records the reach of the tests, for `num_mutants` mutants.

    A test after which the code has one result more in a cache of its own file shares what it came
    to with all tests of that file, and so do set-up and teardown.  The caches of the modules that
    begin with `prefix` are emptied after every test.
    """

    scratch: Path
    num_mutants: int
    prefix: str
    _flags: mmap.mmap = field(init=False)
    _setups: dict[str, float] = field(init=False, default_factory=dict)
    _seconds: dict[str, float] = field(init=False, default_factory=dict)
    _by_test: list[tuple[str, int]] = field(init=False, default_factory=list)
    _by_file: set[tuple[str, int]] = field(init=False, default_factory=set)
    _everywhere: set[int] = field(init=False, default_factory=set)
    _sizes: dict[str, int] = field(init=False, default_factory=dict)
    _failure: str = field(init=False, default="")

    def prepare(self) -> None:
        """Write the module that statements report to."""
        flags = self.scratch / f"{PROBE}.flags"
        flags.write_bytes(bytes(self.num_mutants))
        (self.scratch / f"{PROBE}.py").write_text(_PROBE_SOURCE.format(path=str(flags)))
        with flags.open("r+b") as file:
            self._flags = mmap.mmap(file.fileno(), 0)

    @property
    def failure(self) -> str:
        """The name of the test that failed in the run, with the end of its report."""
        return str(self._found()["failure"])

    def result(self, unknown: Iterable[int]) -> Reach:
        """Return what the run found; `unknown` are mutants that never report."""
        found = self._found()
        reached: dict[int, set[str]] = {number: set() for number in range(self.num_mutants)}
        for test, number in found["by_test"]:
            reached[number].add(test)
        for file, number in found["by_file"]:
            reached[number] |= {test for test in found["seconds"] if _file(test) == file}
        for number in {*found["everywhere"], *unknown}:
            del reached[number]
        return Reach(
            found["setups"],
            found["seconds"],
            {number: frozenset(tests) for number, tests in reached.items()},
        )

    def _found(self) -> dict[str, Any]:
        path = self.scratch / f"{PROBE}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"failure": ""}
        return found

    def _taken(self) -> list[int]:
        numbers = [number for number, flag in enumerate(self._flags[:]) if flag]
        self._flags[:] = bytes(self.num_mutants)
        return numbers

    def pytest_collection_finish(self) -> None:
        self._everywhere |= set(self._taken())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        if report.failed:
            self._failure = f"{test}\n{report.longreprtext[-2_000:]}"
        if report.when == "setup":
            self._setups[test] = report.duration
        self._seconds[test] = self._seconds.get(test, 0.0) + report.duration
        shared = report.when != "call" or self._has_cached(_file(test))
        for number in self._taken():
            if shared:
                self._by_file.add((_file(test), number))
            else:
                self._by_test.append((test, number))
        for name, module in list(sys.modules.items()):
            if name.startswith(self.prefix):
                for cached in _caches(module):
                    cached.cache_clear()

    def _has_cached(self, file: str) -> bool:
        module = sys.modules.get(file.removesuffix(".py").replace("/", "."))
        size = sum(cached.cache_info().currsize for cached in _caches(module))
        before, self._sizes[file] = self._sizes.get(file, 0), size
        return size != before

    def pytest_sessionfinish(self) -> None:
        found = {
            "setups": self._setups,
            "seconds": self._seconds,
            "by_test": self._by_test,
            "by_file": list(self._by_file),
            "everywhere": list(self._everywhere),
            "failure": self._failure,
        }
        (self.scratch / f"{PROBE}.json").write_text(json.dumps(found))


def _caches(module: ModuleType | None) -> list[Any]:
    """Return the functions of a module that cache their results."""
    values = [] if module is None else vars(module).values()
    return [value for value in values if callable(getattr(value, "cache_clear", None))]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A plugin of pytest that runs `tests` in their order, and then those that are not `known`."""

    tests: list[str]
    known: frozenset[str]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        place = {test: number for number, test in enumerate(self.tests)}
        items[:] = sorted(
            (item for item in items if item.nodeid in place or item.nodeid not in self.known),
            key=lambda item: place.get(item.nodeid, len(place)),
        )

    @property
    def files(self) -> list[str]:
        """The files of the tests."""
        return list(dict.fromkeys(map(_file, self.tests)))


class Unshrunk:
    """A plugin of pytest that lets hypothesis report the first example that fails."""

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        settings.register_profile(
            "mutants",
            settings(),
            phases=(Phase.explicit, Phase.generate),
            report_multiple_bugs=False,
        )
        settings.load_profile("mutants")
