"""The words of a schedule: `Kind`, `Pass` and `Schedule`, with a text form that round-trips.

A schedule is data: for every rank, the order of its passes, and between which of them activations
wait in host memory. It does not contain communication, which `lower` adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """The kind of a pass: what it computes. The value is its letter in the text form."""

    F = "F"  # forward of one stage
    B = "B"  # full backward of one stage
    I = "I"  # noqa: E741 - gradient of a stage's input only
    W = "W"  # gradient of a stage's weights only
    S = "S"  # output layer: logits of one vocabulary shard and their local softmax
    T = "T"  # output layer: gradient of one shard's weights (and of the input, for some algorithms)
    E = "E"  # input embedding: look up the tokens that a vocabulary shard owns
    G = "G"  # input embedding: gradient of the rows that a vocabulary shard owns

    # Enum's own __hash__ is Python code, which is slow: passes are hashed millions of times.
    __hash__ = str.__hash__

    @property
    def is_vocabulary(self) -> bool:
        """Return whether such a pass belongs to a vocabulary shard, not to a stage of layers."""
        return self in _VOCABULARY


_VOCABULARY = frozenset((Kind.S, Kind.T, Kind.E, Kind.G))


_TOKEN = re.compile(r"(0|[1-9]\d*)([FBIWSTEG])(0|[1-9]\d*)")


class Pass(NamedTuple):
    """One unit of work of one microbatch on one rank.

    `stage` is the pipeline stage. For S, T, E and G it is the vocabulary shard, which equals the
    rank. A search makes millions of passes, and a named tuple takes half of the time of a frozen
    dataclass.
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, token: str) -> Pass:
        """Return the pass that `token` describes: `2F0` is stage 2, F, microbatch 0.

        Raises ValueError, naming the token, for anything else.
        """
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(
                f"{token!r} is not a pass; write <stage><kind><microbatch> "
                f"with a kind of {'/'.join(Kind)}, e.g. 2F0"
            )
        return cls(int(match[1]), Kind(match[2]), int(match[3]))


_FREE, _RELOAD = "offloaded:", "reload:"


@dataclass(frozen=True, slots=True)
class Offload:
    """The time in host memory of what a forward pass keeps, between passes of the same rank.

    What the offloaded layers of the forward pass `item` keep is copied to the host after it. The
    pass `free_before` waits for the end of that copy; the device memory is free from then on. After
    the pass `reload_after` it is taken again, and the copy back begins.
    """

    item: Pass
    free_before: Pass
    reload_after: Pass


@dataclass(frozen=True, slots=True)
class Schedule:
    """The order of the passes on every rank; `ranks[r]` are the passes of rank r.

    `offloads` has one entry for every forward pass whose activations wait in host memory, in the
    order in which they come back, rank after rank.
    """

    name: str
    ranks: tuple[tuple[Pass, ...], ...]
    offloads: tuple[Offload, ...] = ()

    @property
    def num_ranks(self) -> int:
        """The number of pipeline ranks."""
        return len(self.ranks)

    def passes(self) -> Iterable[tuple[int, Pass]]:
        """Return every (rank, pass), rank after rank, in the order of the passes."""
        return ((rank, item) for rank, order in enumerate(self.ranks) for item in order)

    def text(self) -> str:
        """Return the text form: a comment line with the name, then one line of passes per rank.

        Blanks separate the passes: `0E0 0F0 0S0`. `offloaded:0F0` comes before the pass that waits
        for this, `reload:0F0` after its pass.
        """
        around: dict[Pass, tuple[list[str], list[str]]] = {}
        for offload in self.offloads:
            around.setdefault(offload.free_before, ([], []))[0].append(f"{_FREE}{offload.item}")
            around.setdefault(offload.reload_after, ([], []))[1].append(f"{_RELOAD}{offload.item}")
        lines = [f"# {self.name}"]
        for order in self.ranks:
            words = list(map(str, order))
            if around:
                for place, item in enumerate(order):
                    before, after = around.pop(item, ((), ()))
                    words[place] = " ".join((*before, words[place], *after))
            lines.append(" ".join(words))
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Return the schedule whose `text()` is `text`.

        Raises ValueError for a missing name, and with the line number for a malformed token.
        """
        header, *lines = text.splitlines() or [""]
        if not header.startswith("# "):
            raise ValueError(f"a schedule starts with a line '# name', not {header[:40]!r}")
        ranks: list[tuple[Pass, ...]] = []
        offloads: list[Offload] = []
        for number, line in enumerate(lines, start=2):
            try:
                tokens = line.split()
                if _FREE in line or _RELOAD in line:
                    offloads += _offloads(tokens)
                    tokens = [token for token in tokens if ":" not in token]
                ranks.append(tuple(map(Pass.parse, tokens)))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
        return cls(header.removeprefix("# "), tuple(ranks), tuple(offloads))


def _offloads(tokens: list[str]) -> list[Offload]:
    """Return what the tokens of a line say about host memory; other tokens are passes."""
    free: dict[Pass, Pass] = {}
    found: list[Offload] = []
    waiting: list[Pass] = []
    last: Pass | None = None
    for token in tokens:
        if token.startswith(_FREE):
            waiting.append(Pass.parse(token.removeprefix(_FREE)))
        elif token.startswith(_RELOAD):
            item = Pass.parse(token.removeprefix(_RELOAD))
            if last is None or item not in free:
                raise ValueError(f"{token} comes without {_FREE}{item} and a pass between them")
            found.append(Offload(item, free.pop(item), last))
        else:
            last = Pass.parse(token)
            free |= dict.fromkeys(waiting, last)
            waiting.clear()
    if lacking := next(iter((*waiting, *free)), None):
        raise ValueError(f"{_FREE}{lacking} has no {_RELOAD}{lacking} after a later pass")
    return found
