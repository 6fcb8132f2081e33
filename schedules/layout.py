"""Where the stages live: the map between stage (global slice of the model) and rank (its owner)."""

from __future__ import annotations

from dataclasses import dataclass

LAYOUTS = ("linear", "loop", "v")


@dataclass(frozen=True, slots=True)
class Layout:
    """`linear`: stage s on rank s.  `loop`: stage s on rank s mod p.  `v`: rank r owns stages r and 2p-1-r."""

    name: str
    num_ranks: int
    num_chunks: int = 1  # stages per rank

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise ValueError(
                f"layout {self.name!r} is not known; choose one of {', '.join(LAYOUTS)}"
            )
        if self.num_ranks < 1 or self.num_chunks < 1:
            raise ValueError(
                f"{self.num_ranks} ranks with {self.num_chunks} chunks: both must be at least 1"
            )
        fixed = {"linear": 1, "v": 2}.get(self.name)
        if fixed is not None and self.num_chunks != fixed:
            raise ValueError(
                f"layout {self.name!r} has {fixed} chunk(s) per rank, not {self.num_chunks}; interleaved has others"
            )

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks

    def rank_of(self, stage: int) -> int:
        """The rank that owns `stage`."""
        if self.name == "v" and stage >= self.num_ranks:
            return 2 * self.num_ranks - 1 - stage
        return stage % self.num_ranks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of `rank` in model order; a stage's index in it is its chunk."""
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)
