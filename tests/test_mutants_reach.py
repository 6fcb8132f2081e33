"""A mutant needs only the tests that come to its statement, and all where that is not known."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from tests.mutants import mutants_of
from tests.mutants_reach import PROBE, Chosen, Reach, reporting

SOURCE = '''
"""Words."""
from __future__ import annotations
LIMIT = 3


class Counted:
    start: int = 5

    def up(self, by=1):
        """More words."""
        return self.start + by


def sign(x):
    def half(y):
        return y / 2

    if x > 0:
        return 1
    elif x < 0:
        while x < -2:
            x = half(x)
        return -1
    return [0 for _ in range(1)][0]


def numbers():
    yield 7
    yield 8
'''


def reached_by(monkeypatch, call):
    """Return the lines of the mutants of SOURCE that `call` of its module comes to."""
    found = list(mutants_of("toy", "toy.py", SOURCE))
    text, silent = reporting(SOURCE, {n: mutant.start for n, mutant in enumerate(found)})
    numbers = set()
    monkeypatch.setitem(sys.modules, PROBE, SimpleNamespace(reached=numbers.add))
    names = {"__name__": "toy"}
    exec(compile(text, "toy.py", "exec"), names)
    assert not numbers, "nothing has run yet"
    result = call(SimpleNamespace(**names))
    lines = {found[number].line for number in numbers}
    return result, lines, {found[number].line for number in silent}


def test_statements_report_that_they_run_and_do_what_they_did(monkeypatch):
    outside = {4, 8, 10}  # they run when the module is imported
    for call, result, lines in (
        (lambda toy: toy.sign(2), 1, {19, 20}),
        (lambda toy: toy.sign(-1), -1, {19, 21, 22, 24}),
        (lambda toy: toy.sign(-3), -1, {17, 19, 21, 22, 24}),
        (lambda toy: toy.sign(0), 0, {19, 21, 25}),
        (lambda toy: next(toy.numbers()), 7, {29}),
        (lambda toy: toy.Counted().up(), 6, {12}),
    ):
        assert reached_by(monkeypatch, call) == (result, lines, outside)


def test_the_fastest_tests_run_first_and_of_a_slow_set_up_all_at_once():
    seconds = {
        "tests/test_a.py::slow": 3.0,
        "tests/test_a.py::quick": 0.1,
        "tests/test_b.py::quick": 0.2,
        "tests/test_c.py::quick": 0.1,
        "tests/test_c.py::first": 2.1,
        "tests/test_d.py::other": 0.1,
    }
    setups = dict.fromkeys(seconds, 0.0) | {"tests/test_c.py::first": 2.0}
    reach = Reach(setups, seconds, {1: frozenset(seconds) - {"tests/test_d.py::other"}})
    assert reach.tests_of(1, "b") == [
        "tests/test_b.py::quick",
        "tests/test_a.py::quick",
        "tests/test_c.py::quick",
        "tests/test_c.py::first",
        "tests/test_a.py::slow",
    ]
    assert set(reach.tests_of(2, "b")) == set(seconds), "a mutant that never reports"


def test_tests_that_a_change_renames_run_too():
    chosen = Chosen(["tests/test_b.py::two", "tests/test_a.py::one"], frozenset(["x::known"]))
    items = [
        SimpleNamespace(nodeid=name)
        for name in ("x::known", "x::new", "tests/test_a.py::one", "tests/test_b.py::two")
    ]
    chosen.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [*chosen.tests, "x::new"]
    assert chosen.files == ["tests/test_b.py", "tests/test_a.py"]
