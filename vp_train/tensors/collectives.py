"""Two collectives of torch.distributed that were renamed in torch 2.13."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def all_gather_single(
    whole: Tensor, part: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> Any:
    """All-gather the `part` of every rank of `group` into `whole`, in rank order."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(whole, part, group=group, async_op=async_op)


def reduce_scatter_single(
    part: Tensor, whole: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> Any:
    """Reduce-scatter `whole` over the ranks of `group`: every rank gets its `part` of the sum."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(part, whole, group=group, async_op=async_op)
