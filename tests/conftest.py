"""Fixtures every test may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks


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
