"""The order of samples: a pure function of the seed and a position, so that no restart and no layout can change it.

A run takes the positions 0, 1, 2, ...; each step the next ones, each replica its part of them.  A position says whose turn it
is among the corpora of a blend, and the how-manieth sample of that corpus it is; its epoch's permutation says which one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from math import isqrt

_ROUNDS = 8  # four are enough for a large domain; small ones need more to be uniform


def own_positions(step: int, num_own: int, dp_rank: int, dp_size: int) -> range:
    """The positions of replica `dp_rank` at `step`, counted from 1: `num_own` of the step's dp_size * num_own."""
    assert step >= 1, step
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    start = ((step - 1) * dp_size + dp_rank) * num_own
    return range(start, start + num_own)


@dataclass(frozen=True, slots=True)
class Permutation:
    """A bijection of range(size), drawn by `key` (at most 64 bytes), in no memory.

    A Feistel network over pairs (left, right) below the root of size: each round adds a hash of one half to the other.  The few
    pairs beyond size are passed through again until they fall below it (cycle walking, Black and Rogaway, CT-RSA 2002).
    """

    size: int
    key: bytes

    def __call__(self, index: int) -> int:
        assert 0 <= index < self.size, (index, self.size)
        side = isqrt(self.size - 1) + 1
        while True:
            left, right = divmod(index, side)
            for number in range(_ROUNDS):
                digest = blake2b(b"%d %d" % (number, right), key=self.key, digest_size=8).digest()
                left, right = right, (left + int.from_bytes(digest, "big")) % side
            index = left * side + right
            if index < self.size:
                return index


@dataclass(frozen=True, slots=True)
class Turns:
    """Whose turn it is among corpora with whole `weights`: a pattern that repeats after their sum.

    Of the first k turns, whatever k, corpus c has its share of k rounded down or up.  `whose[k]` is the corpus of turn k,
    `before[k]` how many turns it had until then.
    """

    weights: tuple[int, ...]
    whose: tuple[int, ...]
    before: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[int]) -> Turns:
        """Turn j of a corpus of share w must come within [floor(j / w), ceil((j + 1) / w)); the earliest deadline goes first.

        Deadlines are always met: in fractions of a turn each corpus could run all the time, and integral deadlines of turns of
        length one are met in order whenever they can be met at all.
        """
        period, counts = sum(weights), [0] * len(weights)
        whose, before = [], []
        waiting = [
            (0, corpus) for corpus in range(len(weights))
        ]  # by the first moment of the next turn
        heapify(waiting)
        ready: list[tuple[int, int]] = []  # by deadline
        for turn in range(period):
            while waiting and waiting[0][0] <= turn:
                _, corpus = heappop(waiting)
                heappush(ready, (-(-(counts[corpus] + 1) * period // weights[corpus]), corpus))
            _, corpus = heappop(ready)
            whose.append(corpus)
            before.append(counts[corpus])
            counts[corpus] += 1
            heappush(waiting, (counts[corpus] * period // weights[corpus], corpus))
        return cls(tuple(weights), tuple(whose), tuple(before))

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The corpus of turn `position`, and how many turns it had before."""
        period, turn = divmod(position, len(self.whose))
        corpus = self.whose[turn]
        return corpus, period * self.weights[corpus] + self.before[turn]


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """Which sample of which corpus comes at a position; `sizes` are their numbers of samples.

    Each corpus gives every sample once before any a second time, in another order in each such epoch.  `purpose` tells orders
    of the same seed apart.
    """

    sizes: tuple[int, ...]
    turns: Turns
    seed: int
    purpose: str

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(corpus, sample) at `position`, from 0 on without end."""
        corpus, count = self.turns[position]
        epoch, index = divmod(count, self.sizes[corpus])
        key = f"{self.purpose} {self.seed} {corpus} {epoch}".encode()
        return corpus, Permutation(self.sizes[corpus], blake2b(key, digest_size=16).digest())(index)
