"""The process groups over which one pipeline communicates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from schedules.vocab import End


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups of one pipeline.

    Pipeline rank i is `ranks[i]` for hops.  For collectives it is all tensor-parallel ranks, which
    join the groups of both ends; as a root it is the first of them, `leaders[i]`.
    `sends[i]` is the group in which this rank sends to pipeline rank i, `receives[i]` that in which
    it receives from it.
    `ends[end]` is None where a single rank owns the whole layer: there is nothing to exchange.
    `tensor` joins the ranks of this pipeline rank, None if it is the only one.
    `end_ranks` joins the ranks of the first and last stage where both hold the same rows of a tied
    matrix, which only an unsharded vocabulary needs.
    """

    ranks: tuple[int, ...]
    leaders: tuple[int, ...]
    sends: Mapping[int, dist.ProcessGroup]
    receives: Mapping[int, dist.ProcessGroup]
    ends: Mapping[End, dist.ProcessGroup | None]
    tensor: dist.ProcessGroup | None = None
    end_ranks: dist.ProcessGroup | None = None
