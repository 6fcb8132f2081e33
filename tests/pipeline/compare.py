"""Differences between the results of ranks and of one process, in which no NaN can hide.

`max(0.0, nan)` is 0.0 and `nan > tolerance` is false.  So here a value that is not finite differs
by infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of `theirs`.

    It is infinite if any entry of either tensor is not finite.  Raises AssertionError if the shapes
    differ, even if they would broadcast.
    """
    assert ours.shape == theirs.shape, f"{list(ours.shape)} is compared with {list(theirs.shape)}"
    if theirs.numel() == 0:
        return 0.0
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


@dataclass(slots=True)
class Comparison:
    """The comparisons of one rank.

    expected: the names that all ranks together must compare.
    largest: the largest difference by name.
    """

    expected: frozenset[str]
    largest: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, ours: Tensor | float, theirs: Tensor | float) -> None:
        """Compare `ours` with `theirs`.  Raises AssertionError if the shapes differ."""
        difference = largest_difference(torch.as_tensor(ours), torch.as_tensor(theirs))
        self.largest[name] = max(self.largest.get(name, 0.0), difference)


def assert_all_close(ranks: Iterable[Comparison], tolerance: float, *case: object) -> None:
    """Assert that all differences are below `tolerance` and all expected names were compared.

    A failure shows `case`.
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
