"""Fixtures every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from tests.ranks import Ranks

settings.register_profile("ci", derandomize=True)  # CI must not fail by chance; elsewhere every run tries new examples
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n living gloo processes, shared by all tests of the session."""
    pools: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        if world_size not in pools:
            pools[world_size] = Ranks(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.stop()
