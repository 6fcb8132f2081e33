"""The process groups of one pipeline, as its communication uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from schedules.vocab import End


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups of one pipeline.

    `ends[end]` is None where a single rank owns the whole layer: nothing to exchange.  Pipeline rank
    i is `ranks[i]` for hops.  For collectives it is all tensor-parallel ranks, which join the groups
    of both ends; as a root it is the first of them, `leaders[i]`.  `tensor` joins this rank's, None
    if it is the only one.  `end_ranks` joins the ranks of the first and last stage where both hold
    the same rows of a tied matrix, which only an unsharded vocabulary needs.
    """

    ranks: tuple[int, ...]
    leaders: tuple[int, ...]
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    ends: dict[End, dist.ProcessGroup | None]
    tensor: dist.ProcessGroup | None = None
    end_ranks: dist.ProcessGroup | None = None

    def hop(self, peer: int, *, upstream: bool) -> dist.ProcessGroup:
        """Return the group for hops to or from pipeline rank `peer`; `upstream` for gradients."""
        return self.backward if upstream else self.forward
