"""Every benchmark can be imported, and the page has the table of a stored result."""

import importlib
import json
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
    """It is printed from the stored result, and wins, loses and open follow from its seconds."""
    result = BENCHMARKS / "results" / "plan_fsdp.json"
    monkeypatch.setattr(sys, "argv", ["plan_fsdp.py", "--read", str(result)])
    importlib.import_module("plan_fsdp").main()
    table = capsys.readouterr().out
    assert table in (BENCHMARKS.parent / "docs" / "results_plans.md").read_text()
    assert len(table.splitlines()) == 2 + len(json.loads(result.read_text())["rows"])
    assert ", open |" in table
    assert ", loses |" in table
