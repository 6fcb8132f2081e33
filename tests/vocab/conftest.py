"""A fixture for all tests of the vocabulary passes."""

from collections.abc import Iterator

import pytest
import torch._dynamo


@pytest.fixture(autouse=True)
def nothing_compiled_runs_uncompiled() -> Iterator[None]:
    """Fail where torch would silently run code uncompiled, beyond its limit of shapes."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
