"""Sizes that memory and collectives ask for."""

from __future__ import annotations

# Host memory comes in blocks: copying one takes far longer than issuing the copy.
HOST_BLOCK_BYTES = 8 << 20


def rounded_up(count: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
