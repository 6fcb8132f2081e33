"""Communications and copies that were issued and are waited for later.

Order: what the caller of `wait` does next comes after the result.  On CUDA the current stream waits
and the host goes on.  With gloo, which works in host memory, the host waits.

Memory: a `Pending` holds the tensor that it writes for as long as it lives, also after `wait`, and
the one that it reads where another stream may wait first (`Issued.source`).  Who keeps it decides
when they are freed; see the third part of the rule in `tensors.streams`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Pending(Protocol):
    """A communication or copy in progress."""

    def wait(self) -> Tensor:
        """Return the result.  On CUDA the current stream waits for it, not the host."""
        ...

    def is_completed(self) -> bool:
        """Return whether it has ended.  This never waits."""
        ...


@dataclass(frozen=True, slots=True)
class Issued:
    """A communication of torch.distributed.

    work: torch's handle, None if there was nothing to send.
    result: the tensor that the result is in.
    source: the tensor that it reads, where another stream than the issuing one may wait first.
        torch holds a tensor only until the first wait.
    """

    work: dist.Work | None
    result: Tensor
    source: Tensor | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.result

    def is_completed(self) -> bool:
        return self.work is None or self.work.is_completed()


@dataclass(frozen=True, slots=True)
class Then:
    """What `finish` makes of the result of `pending`.  Each `wait` calls it, on its own stream."""

    pending: Pending
    finish: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        return self.finish(self.pending.wait())

    def is_completed(self) -> bool:
        return self.pending.is_completed()
