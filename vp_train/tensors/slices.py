"""Which part of a whole tensor a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Along `dim`, the `ranges` [start, stop) of the `size` entries of the whole tensor, one after the other."""

    dim: int
    size: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def even(cls, dim: int, size: int, rank: int, num_ranks: int, parts: int = 1) -> TensorSlice:
        """The share of `rank` in each of `parts` equal parts."""
        part, each = size // parts, size // parts // num_ranks
        assert each * num_ranks * parts == size
        starts = [part * index + each * rank for index in range(parts)]
        return cls(dim, size, tuple((start, start + each) for start in starts))

    def part(self, whole: Tensor) -> Tensor:
        """What of `whole` is held: a view, if it is one range."""
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def whole_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of the whole tensor, from that of the part."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])
