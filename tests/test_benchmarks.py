"""Laws of benchmarks and of their stored results."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCHMARKS.glob("*.py")))
def test_a_benchmark_can_be_imported(name):
    if name == "spin":
        pytest.importorskip("triton")
    importlib.import_module(name)


def test_the_page_has_the_table_of_fsdp_with_its_verdicts(monkeypatch, capsys):
    """It is printed from the stored result, and the outcomes follow from its seconds."""
    result = BENCHMARKS / "results" / "plan_fsdp.json"
    monkeypatch.setattr(sys, "argv", ["plan_fsdp.py", "--read", str(result)])
    importlib.import_module("plan_fsdp").main()
    table = capsys.readouterr().out
    assert table in (BENCHMARKS.parent / "docs" / "results_plans.md").read_text()
    assert len(table.splitlines()) == 2 + len(json.loads(result.read_text())["rows"])
    for outcome in ("open", "loses", "ties"):
        assert f", {outcome} |" in table
    assert "-0 %" not in table


def commits_of(result):
    """Return the commits that a stored result names, without the mark of uncommitted changes."""
    if isinstance(result, list):
        return set().union(*map(commits_of, result))
    if not isinstance(result, dict):
        return set()
    own = result.get("commit", "")
    return ({own.rstrip("+")} if own else set()) | commits_of([*result.values()])


def history():
    """Return the hashes of all commits up to HEAD; skip where there is no whole history."""
    root = BENCHMARKS.parent
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("not a git repository")

    def git(*words):
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            pytest.skip(f"git {words[0]} fails: {done.stderr.strip()}")
        return done.stdout.strip()

    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("a shallow clone")
    return git("rev-list", "HEAD").splitlines()


def test_the_commit_of_every_stored_result_is_in_the_history():
    """After a rebase, a result has the commit of the same subject."""
    known = history()
    lost = {
        file.name: [
            commit
            for commit in commits_of(json.loads(file.read_text()))
            if len(commit) < 7 or not any(full.startswith(commit) for full in known)
        ]
        for file in sorted((BENCHMARKS / "results").glob("*.json"))
    }
    assert not {name: commits for name, commits in lost.items() if commits}
