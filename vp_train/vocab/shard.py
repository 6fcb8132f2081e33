"""The vocabulary rows that a rank owns.  There is no padding, and a shard may have no rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Owned:
    """The K of the T ids of one microbatch that fall into a shard; all int64.

    positions: where they are among the T tokens [K].
    rows: their rows within the shard [K].
    row_of_token: the same rows by token [T], -1 for an id of another shard.
    """

    positions: Tensor
    rows: Tensor
    row_of_token: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.positions, self.rows, self.row_of_token


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows [start, stop) of the vocabulary."""

    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def split(self, num_parts: int) -> tuple[Shard, ...]:
        """Return consecutive parts of the sizes that `split_rows` gives."""
        return tuple(
            Shard(self.start + part.start, self.start + part.stop)
            for part in split_rows(self.num_rows, num_parts)
        )

    def owned(self, ids: Tensor, device: torch.device) -> list[Owned]:
        """Return which ids of each microbatch of `ids` [m, T] fall into this shard, on `device`.

        Waits for nothing where `ids` are on the CPU.
        """
        from vp_train.tensors.streams import to_device  # imports torch, which planning must not

        inside = (ids >= self.start) & (ids < self.stop)
        counts = inside.sum(1).tolist()
        positions = to_device(inside.nonzero()[:, 1], device)
        rows = to_device(ids[inside] - self.start, device)
        row_of_token = to_device((ids - self.start).masked_fill_(~inside, -1), device)
        parts = zip(
            positions.split_with_sizes(counts),
            rows.split_with_sizes(counts),
            row_of_token,
            strict=True,
        )
        return [Owned(*part) for part in parts]


def require_within(ids: Tensor, vocab_size: int, what: str) -> None:
    """Raise IndexError if one of `ids` lies outside [0, vocab_size); this waits for the device."""
    if not ids.numel():
        return
    least, largest = (int(bound) for bound in ids.aminmax())
    if least < 0 or largest >= vocab_size:
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        raise IndexError(
            f"{what} {int(outside[0])} is not in the vocabulary, "
            f"whose ids are 0 to {vocab_size - 1}"
        )


def split_rows(
    vocab_size: int, num_shards: int, sizes: Sequence[int] | None = None
) -> tuple[Shard, ...]:
    """Return `num_shards` consecutive shards of the given `sizes`.

    Without `sizes` a shard has ceil(V / n) rows until they run out, as with torch.chunk.  Raises
    ValueError unless `sizes` are `num_shards` counts of at least 0 that add up to `vocab_size`.
    """
    if sizes is None:
        rows = -(-vocab_size // num_shards)
        bounds = [min(vocab_size, rows * i) for i in range(num_shards + 1)]
    else:
        if len(sizes) != num_shards or min(sizes) < 0 or sum(sizes) != vocab_size:
            raise ValueError(
                f"{len(sizes)} shards with {sum(sizes)} rows; "
                f"give {num_shards} sizes of at least 0 that add up to {vocab_size}"
            )
        bounds = [sum(sizes[:i]) for i in range(num_shards + 1)]
    return tuple(Shard(start, stop) for start, stop in pairwise(bounds))
