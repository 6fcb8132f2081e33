"""One trained run for all tests of this package."""

from __future__ import annotations

import pytest

from tests.inference.trained import train


@pytest.fixture(scope="package")
def trained(tmp_path_factory):
    """A run on two ranks, of text of its own, in a directory with a difficult name."""
    return train(tmp_path_factory.mktemp("a = b"))
