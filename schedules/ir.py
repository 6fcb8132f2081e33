"""The words of a schedule: `Kind`, `Pass` and `Schedule`, with a text form that round-trips.

A schedule is data: for every rank, the order of its passes.  It says nothing about communication; `lower` adds that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a pass computes; the value is its letter in the text form."""

    F = "F"  # forward of one stage
    B = "B"  # full backward of one stage
    I = "I"  # noqa: E741 - gradient of a stage's input only
    W = "W"  # gradient of a stage's weights only
    S = "S"  # output layer: logits of one shard and their local softmax
    T = "T"  # output layer: gradient of one shard's weights (and of the input, for some algorithms)
    E = "E"  # input embedding: look up the tokens a shard owns
    G = "G"  # input embedding: gradient of the rows a shard owns

    __hash__ = str.__hash__  # Enum's own is Python code, and passes are hashed millions of times

    @property
    def is_vocabulary(self) -> bool:
        """True for the passes that belong to a vocabulary shard rather than to a stage of layers."""
        return self in _VOCABULARY


_VOCABULARY = frozenset((Kind.S, Kind.T, Kind.E, Kind.G))


_TOKEN = re.compile(r"(0|[1-9]\d*)([FBIWSTEG])(0|[1-9]\d*)")


@dataclass(frozen=True, slots=True, order=True)
class Pass:
    """One unit of work.  `stage` is the pipeline stage, or the shard (= rank) for S, T, E and G."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, token: str) -> Pass:
        """Read `2F0`.  Raises ValueError for anything else, with the token."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(
                f"{token!r} is not a pass; write <stage><kind><microbatch> with a kind of {'/'.join(Kind)}, e.g. 2F0"
            )
        return cls(int(match[1]), Kind(match[2]), int(match[3]))


@dataclass(frozen=True, slots=True)
class Schedule:
    """The order of the passes on every rank."""

    name: str
    ranks: tuple[tuple[Pass, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    def passes(self) -> Iterable[tuple[int, Pass]]:
        """Every (rank, pass), rank by rank in order."""
        return ((rank, item) for rank, order in enumerate(self.ranks) for item in order)

    def text(self) -> str:
        """One line per rank, passes separated by blanks: `0E0 0F0 0S0`.  A comment line carries the name."""
        lines = [f"# {self.name}"] + [" ".join(map(str, order)) for order in self.ranks]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read `text()` back.  Raises ValueError with the line number for a malformed token."""
        header, *lines = text.splitlines() or [""]
        if not header.startswith("# "):
            raise ValueError(f"a schedule starts with a line '# name', not {header!r}")
        ranks = []
        for number, line in enumerate(lines, start=2):
            try:
                ranks.append(tuple(Pass.parse(token) for token in line.split()))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
        return cls(header.removeprefix("# "), tuple(ranks))
