"""Small messages on the host that concern all ranks: the health of a step, checkpoints, barriers.

A gloo group connects every pair of its members.  At 512 ranks that is 511 sockets per process, and
a process may usually open 1,024 files.  So the ranks form rows, and the first ranks of the rows,
the leaders, form a group of their own: gather within the row, then among the leaders, then send the
result down the rows.  A rank of 512 has at most 46 connections, and the way is 52 messages long
instead of 511.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SMALL = 32  # so many ranks are one row: all pairs are cheap


def row_width(num_ranks: int) -> int:
    """Return how many consecutive ranks form a row."""
    return min(num_ranks, max(_SMALL, math.ceil(math.sqrt(num_ranks))))


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """All ranks of a run, for messages on the host.  Every method is collective.

    `row` joins this rank's row of `width` consecutive ranks; the last row may be shorter.
    `leaders` joins the first ranks of all rows; it is None elsewhere, and where there is one row.
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
        row[self.row.rank()] = (
            tensor  # all that there is in a process that only pretends to have others
        )
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
        """Return the values of all ranks in rank order, as JSON gives them back.

        Text, and not pickles: what arrives on a socket must not be able to run code.
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
        """Return when every rank has come here."""
        self.all_gather(torch.zeros(1))
