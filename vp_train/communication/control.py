"""Small host messages among all ranks: the health of a step, checkpoints, barriers.

A gloo group connects every pair of its members.  At 512 ranks that is 511 sockets per process, and
a process may usually open only 1,024 files.  So the ranks form rows, and the first ranks of the
rows, the leaders, form another group.  A gather runs within the rows, then among the leaders; then
the leaders broadcast the result within their rows.  At 512 ranks a rank has at most 46 connections,
and the longest chain has 52 messages instead of 511.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SMALL = 32  # up to this many ranks form a single row: connecting all pairs is cheap


def row_width(num_ranks: int) -> int:
    """Return how many consecutive ranks form a row."""
    return min(num_ranks, max(_SMALL, math.ceil(math.sqrt(num_ranks))))


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """All ranks of a run, for messages on the host.  Every method is collective.

    row: this rank's row of `width` consecutive ranks; the last row may be shorter.
    leaders: the first ranks of all rows.  It is None on other ranks and if there is one row.
    """

    rank: int
    size: int
    width: int
    row: dist.ProcessGroup
    leaders: dist.ProcessGroup | None = None

    @classmethod
    def flat(cls, group: dist.ProcessGroup) -> ControlGroup:
        """Return the ranks of `group` as a single row."""
        return cls(group.rank(), group.size(), group.size(), group)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks in rank order, [size, *tensor.shape].

        `tensor` lies in host memory and has the same shape and dtype on every rank.
        """
        row = tensor.new_zeros((self.row.size(), *tensor.shape))
        # In a rehearsal, where one process stands for all ranks, nothing else fills this row.
        row[self.row.rank()] = tensor
        dist.all_gather(list(row), tensor, group=self.row)
        if self.width >= self.size:
            return row
        num_rows = -(-self.size // self.width)
        rows = tensor.new_empty((num_rows, self.width, *tensor.shape))
        if self.leaders is not None:
            padded = tensor.new_zeros(rows.shape[1:])
            padded[: len(row)] = row
            dist.all_gather(list(rows), padded, group=self.leaders)
        dist.broadcast(rows, group=self.row, group_src=0)
        return rows.flatten(0, 1)[: self.size]

    def all_gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order, after a round trip through JSON.

        JSON rather than pickle, because data from a socket must not be able to run code.
        """
        encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.all_gather(torch.tensor([len(encoded)])).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(encoded)] = encoded
        texts = self.all_gather(padded).numpy()
        return [
            json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths, strict=True)
        ]

    def barrier(self) -> None:
        """Return when every rank has called this."""
        self.all_gather(torch.zeros(1))
