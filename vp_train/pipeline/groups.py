"""The process groups over which one pipeline communicates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from schedules.vocab import End


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups of one pipeline.

    ranks: the global rank of pipeline rank i for hops: the one with this rank's tensor-parallel
    index.
    leaders: the global rank of pipeline rank i as the root of collectives: its first
        tensor-parallel rank.  All tensor-parallel ranks are members of the groups of both ends.
    sends: the group in which this rank sends to pipeline rank i.
    receives: the group in which it receives from pipeline rank i.
    ends: the group of each end of the vocabulary.  It is None if a single rank owns the whole
        layer, because then there is nothing to exchange.
    tensor: the tensor-parallel ranks, None if there is only one.
    end_ranks: the ranks of the first and last stage, if both hold the same rows of a tied matrix,
        as only with an unsharded vocabulary.
    """

    ranks: tuple[int, ...]
    leaders: tuple[int, ...]
    sends: Mapping[int, dist.ProcessGroup]
    receives: Mapping[int, dist.ProcessGroup]
    ends: Mapping[End, dist.ProcessGroup | None]
    tensor: dist.ProcessGroup | None = None
    end_ranks: dist.ProcessGroup | None = None
