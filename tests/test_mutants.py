"""Mutants are small changes that parse, reproducible by seed, and judged by whether tests fail."""

from __future__ import annotations

import ast

import pytest

from tests import mutants
from tests.mutants import PACKAGES, ROOT, Mutant, Outcome, drawn, judge, mutants_of, rate

SOURCE = '''
"""Words with 1 number."""
from x import y

LIMIT: int = 3  # é: columns of ast count bytes


def f(a: int = 2, *, b=not None) -> list[int]:
    """More words."""
    assert a > 0, "words"
    if a >= LIMIT and not b:
        raise ValueError(f"{a + 1} is too large" + "!")
    for i in range(a):
        print(i - 1)
        if i == 7:
            continue
        y.run(-i, max(i, a))
    return [a + i if b else a * i for i in range(4)]
'''


def changes():
    return {(m.line, m.before, m.after) for m in mutants_of("toy", "toy.py", SOURCE)}


def test_a_mutant_is_one_change_that_parses():
    every = list(mutants_of("toy", "toy.py", SOURCE))
    for mutant in every:
        text = mutant.applied(SOURCE)
        assert SOURCE[mutant.start : mutant.stop] == mutant.before
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(SOURCE)), mutant
        assert text.count("\n") == SOURCE.count("\n")
    assert len(every) == len(changes())


@pytest.mark.parametrize(
    "change",
    [
        (5, "3", "(4)"),
        (5, "3", "(2)"),
        (8, "2", "(1)"),
        (8, "not None", "(None)"),
        (11, "a >= LIMIT", "(a > LIMIT)"),
        (11, "a >= LIMIT and not b", "(a >= LIMIT or not b)"),
        (12, 'raise ValueError(f"{a + 1} is too large" + "!")', "pass"),
        (15, "i == 7", "(i != 7)"),
        (16, "continue", "pass"),
        (17, "y.run(-i, max(i, a))", "pass"),
        (17, "-i", "(i)"),
        (17, "max(i, a)", "(min(i, a))"),
        (18, "a + i if b else a * i", "(a + i)"),
        (18, "a + i", "(a - i)"),
        (18, "a * i", "(a / i)"),
    ],
)
def test_every_kind_of_change_is_made(change):
    assert change in changes()


def test_words_annotations_and_assertions_stay():
    assert {line for line, *_ in changes()} == {5, 8, 11, 12, 13, 15, 16, 17, 18} - {13}


def test_the_same_seed_draws_the_same():
    assert drawn("optim", 5, 1) == drawn("optim", 5, 1) != drawn("optim", 5, 2)


def test_every_mutant_without_effect_is_one_of_the_code_as_it_stands():
    for line in mutants.EQUIVALENT.read_text().splitlines():
        if line and not line.startswith("#"):
            path, _, change = line.partition("  ")
            code, _, _ = change.partition("  |  ")
            lines = {each.strip() for each in (ROOT / path).read_text().splitlines()}
            assert code in lines, line


def test_every_package_has_files_and_tests():
    for package, rows in PACKAGES.items():
        assert len(drawn(package, 5, 1)) == 5
        for prefixes, tests in rows:
            for prefix in (prefixes,) if isinstance(prefixes, str) else prefixes:
                assert (ROOT / prefix).exists(), prefix
            assert all((ROOT / test).exists() for test in tests if not test.startswith("-")), tests


@pytest.mark.slow
def test_what_tests_notice_is_killed_and_what_they_pass_survives(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/code.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef spare(a):\n    return a - 1\n"
    )
    loop = "import time\nfrom toy.code import add\n\n\ndef test_add():\n    total = 0\n"
    loop += "    while total != 4:\n        total = add(total, 2)\n        time.sleep(0.01)\n"
    (tmp_path / "toy/test_code.py").write_text(loop)
    known = tmp_path / "known.txt"
    known.write_text("# nobody calls it\ntoy/code.py  return a - 1  |  1  ->  (2)\n")
    for name, value in {"ROOT": tmp_path, "EQUIVALENT": known, "COPIED": ("toy",)}.items():
        monkeypatch.setattr(mutants, name, value)
    monkeypatch.setattr(mutants, "PACKAGES", {"toy": (("toy", ("toy/test_code.py",)),)})
    monkeypatch.setattr(mutants, "SPARE_SECONDS", 8.0)
    text = (tmp_path / "toy/code.py").read_text()
    by_change = {(m.before, m.after): m for m in mutants_of("toy", "toy/code.py", text)}
    chosen = [by_change["a + b", "(a - b)"], by_change["a - 1", "(a + 1)"], by_change["1", "(2)"]]
    broken = Mutant("toy", "toy/code.py", 1, 0, 3, "def", "dif", "def add(a, b):")
    outcomes = list(judge([*chosen, broken], 3.0))
    assert [outcome.status for outcome in outcomes] == ["TIMEOUT", "SURVIVED", "SURVIVED", "KILLED"]
    assert [outcome.equivalent for outcome in outcomes] == [False, False, True, False]
    assert rate(outcomes) == (2, 3)
    assert (tmp_path / "toy/code.py").read_text() == text
    (tmp_path / "toy/test_code.py").write_text("def test_wrong():\n    assert False\n")
    with pytest.raises(
        SystemExit, match=r"toy/test_code.py end with 1 without a mutant; mend them first"
    ):
        list(judge(chosen, 1.0))


def test_the_rate_of_nothing_is_nothing():
    mutant = Mutant("toy", "toy.py", 1, 0, 1, "1", "(2)", "1")
    assert rate([]) == (0, 0)
    assert rate([Outcome(mutant, "SURVIVED", True, 1.0)]) == (0, 0)
    assert rate(
        [Outcome(mutant, "KILLED", False, 1.0), Outcome(mutant, "SURVIVED", False, 1.0)]
    ) == (1, 2)
