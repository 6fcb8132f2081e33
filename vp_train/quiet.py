"""Silencing library warnings that users cannot act on.

They are about CUDA packages that are not installed, and about names that torch has changed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_deprecations() -> None:
    """Silence torch's deprecation warnings about collectives for the rest of this process.

    megatron-core and DeepSpeed call collectives by their former names.
    """
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Suppress megatron-core's warnings while its modules are imported or built inside."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
