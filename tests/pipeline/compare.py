"""Differences between what ranks computed and what one process did, which no value that is not a number can hide in.

`max(0.0, nan)` is 0.0 and `nan > tolerance` is false: here whatever is not finite differs by infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two tensors of one shape, relative to the largest entry of `theirs`.

    It is infinite where any entry of either is not finite.  Raises AssertionError for other shapes, which would broadcast.
    """
    assert ours.shape == theirs.shape, f"{list(ours.shape)} is compared with {list(theirs.shape)}"
    if theirs.numel() == 0:
        return 0.0
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


@dataclass(slots=True)
class Comparison:
    """What one rank has compared: the largest difference by name, of those that all ranks together must compare."""

    expected: frozenset[str]
    largest: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, ours: Tensor | float, theirs: Tensor | float) -> None:
        """Compare `ours` with `theirs`.  Raises AssertionError for other shapes."""
        difference = largest_difference(torch.as_tensor(ours), torch.as_tensor(theirs))
        self.largest[name] = max(self.largest.get(name, 0.0), difference)


def assert_all_close(ranks: Iterable[Comparison], tolerance: float, *case: object) -> None:
    """Assert that every difference of every rank is below `tolerance`, and that what is expected was compared by some rank.

    `case` is said where that does not hold.
    """
    compared: set[str] = set()
    expected: set[str] = set()
    for rank, comparison in enumerate(ranks):
        wrong = {
            name: difference
            for name, difference in comparison.largest.items()
            if not difference < tolerance
        }
        assert not wrong, (f"rank {rank}", wrong, *case)
        compared |= comparison.largest.keys()
        expected |= comparison.expected
    assert expected, ("nothing was to be compared", *case)
    assert expected <= compared, (f"compared by no rank: {sorted(expected - compared)}", *case)
