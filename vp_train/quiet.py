"""Notices of libraries about what nobody here can act on: absent CUDA packages, names that torch has changed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_deprecations() -> None:
    """For this process: megatron-core and DeepSpeed call collectives of torch by their former names."""
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Import or build megatron-core parts without its notices."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
