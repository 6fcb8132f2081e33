"""Fixtures every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from schedules.generators import auto
from tests.ranks import Ranks

settings.register_profile(
    "ci", derandomize=True, deadline=None
)  # CI must not fail by chance; elsewhere every run tries new examples
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n living gloo processes, shared by all tests of the session."""
    pools: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        if world_size not in pools:
            pools[world_size] = Ranks(world_size)
        for size, pool in pools.items():
            if size != world_size:
                pool.rest()
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.stop()


@pytest.fixture
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """schedule=auto with little effort, for laws that hold at any."""
    monkeypatch.setattr(auto, "_FIRST", 3_000)
    monkeypatch.setattr(auto, "_ROUNDS", ((2, 15_000), (1, 30_000)))


# Files that take longest, to begin first: workers share the tests by files, and the last one must not be a long one.
LONGEST = (
    "tests/test_train.py",
    "tests/pipeline/test_equivalence.py",
    "tests/planner/test_memory.py",
    "tests/schedules/test_auto.py",
    "tests/hf/test_convert.py",
    "tests/schedules/test_replay.py",
    "tests/pipeline/test_local.py",
    "tests/schedules/test_generators.py",
    "tests/planner/test_search.py",
    "tests/test_gpu_check.py",
    "tests/test_mutants.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    places = {str(config.rootpath / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(LONGEST)))
