"""Asynchronous sums and gathers over the replicas of one rank, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vp_train.tensors.collectives import all_gather_single, reduce_scatter_single
from vp_train.tensors.pending import Issued, Pending, Then


@dataclass(frozen=True, slots=True)
class Replicas:
    """The ranks of `group`, which hold the same parameters.

    With `through_host`, values on CUDA travel through host memory, for a group that has only gloo.
    Host tensors always need a group with gloo.
    """

    group: dist.ProcessGroup
    through_host: bool = False

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def sum(self, values: Tensor) -> Pending:
        """All-reduce: sum `values` over the replicas."""
        return self._issue(
            values, lambda whole: dist.all_reduce(whole, group=self.group, async_op=True)
        )

    def scatter_sum(self, values: Tensor) -> Pending:
        """Reduce-scatter: sum this replica's part of `values`; the other parts become invalid."""
        return self._issue(values, self._scatter_sum)

    def _scatter_sum(self, whole: Tensor) -> Any:
        """Issue the reduce-scatter of `whole`, on the host as an all-reduce in place.

        gloo's reduce-scatter is an all-reduce of a copy.  It makes the copy in the thread of the
        passes, and copies the result back when somebody waits for it.
        """
        if not whole.is_cuda:
            return dist.all_reduce(whole, group=self.group, async_op=True)
        return reduce_scatter_single(self._own(whole), whole, self.group, async_op=True)

    def gather(self, values: Tensor) -> Pending:
        """All-gather: take every part of `values` from the replica that owns it."""
        return self._issue(
            values,
            lambda whole: all_gather_single(whole, self._own(whole), self.group, async_op=True),
        )

    def _own(self, values: Tensor) -> Tensor:
        return values.view(self.size, -1)[self.rank]

    def _issue(self, values: Tensor, issue: Callable[[Tensor], Any]) -> Pending:
        if not self.through_host:
            return Issued(issue(values), values)
        host = values.cpu()
        return Then(Issued(issue(host), host), values.copy_)


@dataclass(frozen=True, slots=True)
class TiedWeight:
    """A parameter that two ranks of a replica hold, each with a term of its gradient.

    The terms are summed over the replicas before they are summed over the two ranks.  Groups of
    replicas may sum in different orders, but all replicas of a group get the same bits, and a sum
    of two terms has one order.  So all copies get the same gradient.

    name: of the parameter, which alone is in its bucket.
    sum: sums a part of the gradient over the two ranks, in place, and waits.
    """

    name: str
    sum: Callable[[Tensor], None]
