"""Timelines: when every pass of a step ran, simulated or measured.

Both have the same form, so that they can be compared and drawn by the same functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """The interval of one pass or communication on one rank.

    `name` is a pass (`2F0`) or a collective (`C0.3`: barrier C0 of microbatch 3). `kind` is the
    letter of the pass or the name of the barrier. `stage` is that of the pass, -1 for a collective.
    `start` and `end` are in seconds from the start of the step.
    """

    rank: int
    name: str
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """The duration in seconds."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class HostTransfer:
    """A copy of activations to host memory or back, on the link of a rank.

    `span` has the stage and microbatch, and the kind `offload` or `reload`. The copy was issued at
    `issued` seconds, at the end of a pass.
    """

    span: Span
    issued: float
    num_bytes: float

    @property
    def is_offload(self) -> bool:
        """Return whether the copy goes to host memory."""
        return self.span.kind == OFFLOAD


OFFLOAD, RELOAD = "offload", "reload"


def _in_blocks(num_bytes: float, block_bytes: float) -> float:
    """Return the bytes of the blocks that hold `num_bytes`; 0 is a block of any size."""
    return math.ceil(num_bytes / block_bytes) * block_bytes if block_bytes else num_bytes


@dataclass(frozen=True, slots=True)
class Timeline:
    """The activity of every rank in one step.

    `compute[r]`: the passes of rank r in order.
    `comm`: the communications. A simulated collective is shown on the root rank of its end of the
    model, a measured communication on the rank where it ends last.
    `peak_bytes[r]`: the peak of the bytes that the passes of rank r keep for later passes, that is
    activations and what S keeps for T.
    `peak_in_flight[r]`: the peak number of (stage, microbatch) pairs whose backward has not ended.
    `bound`: no schedule of the same problem takes less than these seconds; 0 if it is unknown.
    `transfers`: the copies of activations to host memory and back, in the order of their issue on
    each rank.
    """

    compute: tuple[tuple[Span, ...], ...]
    comm: tuple[Span, ...]
    peak_bytes: tuple[float, ...]
    peak_in_flight: tuple[int, ...]
    bound: float = 0.0
    transfers: tuple[HostTransfer, ...] = ()

    @property
    def num_ranks(self) -> int:
        """The number of pipeline ranks."""
        return len(self.compute)

    @property
    def makespan(self) -> float:
        """The seconds from the start of the step to the end of its last pass or communication."""
        # A rank runs its passes one after the other, so its last pass ends last.
        last = [spans[-1].end for spans in self.compute if spans]
        return max((*last, *(span.end for span in self.comm)), default=0.0)

    def busy(self, rank: int) -> float:
        """Return the seconds in which rank `rank` computes."""
        return sum(span.seconds for span in self.compute[rank])

    def bubble(self, rank: int) -> float:
        """Return the fraction of the step in which rank `rank` computes nothing, from 0 to 1."""
        return 1.0 - self.busy(rank) / self.makespan if self.makespan > 0 else 0.0

    @property
    def mean_bubble(self) -> float:
        """The mean of `bubble` over the ranks: 1 - total work / (num_ranks * makespan)."""
        available = self.num_ranks * self.makespan
        return (
            1.0 - sum(map(self.busy, range(self.num_ranks))) / available if available > 0 else 0.0
        )

    def transfers_of(self, rank: int) -> tuple[Span, ...]:
        """Return the spans of a rank's transfers to the host and back, in the order of issue."""
        return tuple(t.span for t in self.transfers if t.span.rank == rank)

    def link_busy(self, rank: int) -> tuple[float, float]:
        """Return the fractions of the step in which a rank's link copies to the host, and back."""
        busy = [0.0, 0.0]
        for span in self.transfers_of(rank):
            busy[span.kind == RELOAD] += span.seconds
        step = self.makespan
        return (busy[0] / step, busy[1] / step) if step > 0 else (0.0, 0.0)

    def moved_bytes(self, rank: int) -> float:
        """Return the bytes that a rank copies to host memory in the step; as many come back."""
        return sum(t.num_bytes for t in self.transfers if t.span.rank == rank and t.is_offload)

    def host_bytes(self, rank: int, block_bytes: float) -> float:
        """Return the most bytes of host memory that the copies of a rank take at any time.

        A copy takes them from its forward pass, after which it is issued, to its first backward
        pass, which waits for its way back. Each takes whole blocks; 0: no more than its bytes.
        """
        copied = {
            (t.span.stage, t.span.microbatch): _in_blocks(t.num_bytes, block_bytes)
            for t in self.transfers
            if t.span.rank == rank and t.is_offload
        }
        changes = {"F": 1, "B": -1, "I": -1}
        held = most = 0.0
        for span in self.compute[rank]:
            if change := changes.get(span.kind):
                held += change * copied.get((span.stage, span.microbatch), 0.0)
                most = max(most, held)
        return most

    @property
    def gap(self) -> float | None:
        """The fraction by which the step exceeds the lower bound; None if no bound is known.

        A gap of 0.02 means 2 % longer than the bound.
        """
        # Rounding and adding 0.0 turn -1e-16 and -0.0 into 0.0 for a step that attains the bound.
        return round(self.makespan / self.bound - 1.0, 9) + 0.0 if self.bound > 0 else None
