"""Sizes that memory and collectives ask for, and limits that bound memory."""

from __future__ import annotations

# Host memory comes in blocks: copying one takes far longer than issuing the copy.
HOST_BLOCK_BYTES = 8 << 20

# How far the host runs ahead of a GPU: about two microbatches, so that the GPU need not wait for it
# while S and T, which are short, run between F and B; and no farther, since the messages of these
# passes stay allocated.  Not measured on a GPU.
PASSES_AHEAD = 8


def rounded_up(count: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
