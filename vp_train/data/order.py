"""The order of samples: a pure function of the seed and a position.

No restart and no parallel layout can change it.  A run takes positions 0, 1, 2, ...  Every step
takes the next global batch of positions, and every replica a contiguous part of them.

A position determines a sample in two stages.  `Turns` gives the corpus of the blend, and how many
samples that corpus gave before.  A permutation, different in every epoch, turns this count into the
index of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from math import isqrt

_ROUNDS = 8  # four are enough for a large domain; small domains need more to be uniform


def own_positions(step: int, num_own: int, dp_rank: int, dp_size: int) -> range:
    """Return the positions of replica `dp_rank` at `step`, which counts from 1.

    The step takes dp_size * num_own positions, of which every replica gets `num_own`.
    """
    assert step >= 1, step
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    start = ((step - 1) * dp_size + dp_rank) * num_own
    return range(start, start + num_own)


@dataclass(frozen=True, slots=True)
class Permutation:
    """A pseudorandom bijection of range(size) that needs no memory, keyed by at most 64 bytes.

    A Feistel network works on pairs (left, right) of numbers below the square root of size, rounded
    up.  Each round adds a hash of one half to the other half.  An output that is not below size
    goes through the network again until it is (cycle walking; Black and Rogaway, CT-RSA 2002).
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
    """The corpus of each position, for corpora with integer `weights`.

    The pattern repeats after sum(weights) turns.  Among the first k turns, for any k, every corpus
    has its exact share of k, rounded down or up.  `whose[k]` is the corpus of turn k, and
    `before[k]` is the number of turns that corpus had before.
    """

    weights: tuple[int, ...]
    whose: tuple[int, ...]
    before: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[int]) -> Turns:
        """Schedule the turns by earliest deadline first.

        Turn j of a corpus with share w of all turns must fall into the interval
        [floor(j / w), ceil((j + 1) / w)).  This is always possible.  If turns could be divided,
        every corpus could run all the time at rate w and meet every deadline.  For unit-length
        turns with integer release times and deadlines, earliest deadline first meets all deadlines
        whenever any schedule does.
        """
        period, counts = sum(weights), [0] * len(weights)
        whose, before = [], []
        # (earliest time of its next turn, corpus)
        waiting = [(0, corpus) for corpus in range(len(weights))]
        heapify(waiting)
        ready: list[tuple[int, int]] = []  # (deadline, corpus)
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
        """Return the corpus of turn `position`, and the number of turns it had before."""
        period, turn = divmod(position, len(self.whose))
        corpus = self.whose[turn]
        return corpus, period * self.weights[corpus] + self.before[turn]


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """The sample at each position.  `sizes` are the numbers of samples of the corpora.

    A corpus gives each of its samples once per epoch, in another order in every epoch.  `purpose`
    distinguishes orders with the same seed, such as training and validation.
    """

    sizes: tuple[int, ...]
    turns: Turns
    seed: int
    purpose: str

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (corpus, sample) at `position`, which counts from 0 without end."""
        corpus, count = self.turns[position]
        epoch, index = divmod(count, self.sizes[corpus])
        key = f"{self.purpose} {self.seed} {corpus} {epoch}".encode()
        return corpus, Permutation(self.sizes[corpus], blake2b(key, digest_size=16).digest())(index)
