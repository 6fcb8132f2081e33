"""What every test of the vocabulary passes needs."""

from collections.abc import Iterator

import pytest
import torch._dynamo


@pytest.fixture(autouse=True)
def nothing_compiled_runs_uncompiled() -> Iterator[None]:
    """Beyond its limit of shapes torch goes back to code that is not compiled, and a test of that tests nothing."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
