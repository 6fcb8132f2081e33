"""A timeline: when every pass ran, simulated or measured.  Both are the same data, so they are drawn and compared alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One interval on one rank.

    `name` is a pass (`2F0`) or a communication (`C0.3`, a barrier of microbatch 3); `kind` its letter or barrier name.
    Times in seconds from the start of the step.
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
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Timeline:
    """What every rank did in one step.

    `compute[r]` are the passes of rank r in order; `comm` the communications, shown on the rank that waits for them.
    `peak_bytes[r]` is the peak of what the passes of rank r keep for later ones (activations and held shards), in bytes;
    `peak_in_flight[r]` the peak number of (stage, microbatch) pairs whose backward has not finished.  No schedule of the same
    problem takes less than `bound` seconds (0: unknown).
    """

    compute: tuple[tuple[Span, ...], ...]
    comm: tuple[Span, ...]
    peak_bytes: tuple[float, ...]
    peak_in_flight: tuple[int, ...]
    bound: float = 0.0

    @property
    def num_ranks(self) -> int:
        return len(self.compute)

    @property
    def makespan(self) -> float:
        """Seconds from the start of the step to the end of its last pass or communication."""
        return max(
            (span.end for spans in (*self.compute, self.comm) for span in spans), default=0.0
        )

    def busy(self, rank: int) -> float:
        """Seconds rank `rank` computes."""
        return sum(span.seconds for span in self.compute[rank])

    def bubble(self, rank: int) -> float:
        """The fraction of the step in which rank `rank` computes nothing, 0 to 1."""
        return 1.0 - self.busy(rank) / self.makespan if self.makespan > 0 else 0.0

    @property
    def mean_bubble(self) -> float:
        """The mean of `bubble` over the ranks: 1 - total work / (ranks * makespan)."""
        available = self.num_ranks * self.makespan
        return (
            1.0 - sum(map(self.busy, range(self.num_ranks))) / available if available > 0 else 0.0
        )

    @property
    def gap(self) -> float | None:
        """How much longer the step takes than the lower bound: 0.02 is 2 %; None where no bound is known."""
        return (
            round(self.makespan / self.bound - 1.0, 9) + 0.0 if self.bound > 0 else None
        )  # 0, not -1e-16, on the bound
