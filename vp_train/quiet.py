"""Megatron-core warns at import that optional CUDA packages are absent; nobody here can act on that."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Import or build megatron-core parts without its notices."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
