"""The part of a whole tensor that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # manifests are read without torch, whose import takes seconds
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """The `ranges` [start, stop) along `dim` that a rank holds, concatenated.

    `size` is the size of the whole tensor along `dim`.
    """

    dim: int
    size: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def even(cls, dim: int, size: int, rank: int, num_ranks: int, parts: int = 1) -> TensorSlice:
        """Return the share of `rank` in each of `parts` equal parts of the tensor."""
        part, share = size // parts, size // parts // num_ranks
        assert share * num_ranks * parts == size
        starts = [part * index + share * rank for index in range(parts)]
        return cls(dim, size, tuple((start, start + share) for start in starts))

    def part(self, whole: Tensor) -> Tensor:
        """Return the part of `whole` that the rank holds; it is a view if it is one range."""
        import torch

        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def whole_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the whole tensor, given the `shape` of the part."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])
