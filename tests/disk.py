"""A full disk, as far as one process can have one."""

from __future__ import annotations

import resource
from contextlib import contextmanager


@contextmanager
def largest_file(num_bytes):
    """Let no file of this process grow beyond `num_bytes`, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
