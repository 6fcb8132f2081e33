"""Sizes that memory and collectives ask for."""

from __future__ import annotations


def rounded_up(count: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
