"""The map between stages (slices of the model's layers) and the pipeline ranks that own them."""

from __future__ import annotations

from dataclasses import dataclass

LAYOUTS = ("linear", "loop", "v")


@dataclass(frozen=True, slots=True)
class Layout:
    """The owner of every stage among p = `num_ranks` ranks, with `num_chunks` stages per rank.

    `linear`: rank s owns stage s. `loop`: rank s mod p owns stage s (interleaved). `v`: rank r owns
    the stages r and 2p-1-r. Raises ValueError for another name or an impossible number of ranks or
    chunks.
    """

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
                f"layout {self.name!r} has {fixed} chunk(s) per rank, not {self.num_chunks}; "
                "only layout 'loop' takes another number"
            )

    @property
    def num_stages(self) -> int:
        """The number of stages on all ranks together."""
        return self.num_ranks * self.num_chunks

    def rank_of(self, stage: int) -> int:
        """Return the rank that owns `stage`."""
        if self.name == "v" and stage >= self.num_ranks:
            return 2 * self.num_ranks - 1 - stage
        return stage % self.num_ranks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of `rank` in model order. The index of a stage in them is its chunk."""
        if self.name == "v":
            return rank, 2 * self.num_ranks - 1 - rank
        return tuple(range(rank, self.num_stages, self.num_ranks))
