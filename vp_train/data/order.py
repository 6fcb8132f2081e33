"""The order of samples: a pure function of the seed and a position.

No restart and no parallel layout can change it.  The samples at positions 0, 1, 2, ... in a row are
a stream of tokens.  Every step takes the next sequences of that stream, and every replica a
contiguous part of them, whatever their number and length: so a run may change both and use every
token once.  A sequence is usually one sample; a shorter or longer one is made of pieces of samples.

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


def own_starts(start: int, num_own: int, length: int, dp_rank: int, dp_size: int) -> range:
    """Return where the sequences of replica `dp_rank` begin, in tokens of the stream.

    The step begins at token `start` and takes dp_size * num_own sequences of `length` tokens, of
    which every replica gets `num_own`.
    """
    assert start >= 0, start
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    first = start + dp_rank * num_own * length
    return range(first, first + num_own * length, length)


def pieces_of(start: int, length: int, sample_length: int) -> list[tuple[int, range]]:
    """Return position and tokens of the pieces of samples that make up a sequence.

    The sequence has the tokens `start` to `start + length` of the stream, in which every sample
    has `sample_length`.
    """
    stop, pieces = start + length, []
    for position in range(start // sample_length, -(-stop // sample_length)):
        first = position * sample_length
        piece = range(max(start - first, 0), min(stop - first, sample_length))
        pieces.append((position, piece))
    return pieces


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
