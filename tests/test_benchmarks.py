"""Every benchmark can be imported: what its modules import of the project is still there."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCHMARKS.glob("*.py")))
def test_a_benchmark_can_be_imported(name):
    if name == "spin":
        pytest.importorskip("triton")
    importlib.import_module(name)
