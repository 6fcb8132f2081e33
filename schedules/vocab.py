"""Vocabulary algorithms as data: which passes they have, which barriers, and who waits for whom.

A barrier is one collective per microbatch.  The algorithms are those of arXiv 2411.05288; the names of its figures in
brackets: `two_barrier` (Algorithm 1, Vocab-1), `one_barrier` (Algorithm 2, Vocab-2).  `none` is the ordinary pipeline: the
same passes, with the whole vocabulary as one shard on the rank of the last (output) and first (input) stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from schedules.ir import Kind


class Transfer(StrEnum):
    """How a barrier moves its payload between the ranks that own shards."""

    BROADCAST = "broadcast"  # from the rank of the root stage
    REDUCE = "reduce"  # sum, to the rank of the root stage
    GATHER = "gather"  # to the rank of the root stage, each shard its own tokens
    SCATTER = "scatter"  # the other way round
    ALL_MAX = "all_max"
    ALL_SUM = "all_sum"
    ALL_GATHER = "all_gather"


class End(StrEnum):
    """The side of the model a barrier belongs to; each side has its own communicator, and so its own order."""

    INPUT = "input"  # root: the rank of the first stage
    OUTPUT = "output"  # root: the rank of the last stage


@dataclass(frozen=True, slots=True)
class Barrier:
    """One collective per microbatch.

    `after`: the pass it waits for (S, T or E on every shard, F of the last stage, the backward of the first), or the name of
    the barrier it continues.  `before`: the passes that wait for it (F of the first stage, the backward of the last).
    """

    name: str
    end: End
    transfer: Transfer
    after: Kind | str
    before: tuple[Kind, ...]


@dataclass(frozen=True, slots=True)
class VocabAlgorithm:
    """The passes of the output layer and all barriers, input side included.

    `sharded` is false when one rank holds a whole layer.  `extra_in_flight`: microbatches that the barriers between the
    last forward and the first backward add to a 1F1B warm-up (arXiv 2411.05288, section 5).
    """

    name: str
    sharded: bool
    extra_in_flight: int
    barriers: tuple[Barrier, ...]

    def barrier(self, name: str) -> Barrier:
        """The barrier called `name`; KeyError if this algorithm has none."""
        for barrier in self.barriers:
            if barrier.name == name:
                return barrier
        raise KeyError(f"{self.name} has no barrier {name!r}")


_EMBED = Barrier("CE", End.INPUT, Transfer.GATHER, Kind.E, (Kind.F,))
_SHARE_X = Barrier("C0", End.OUTPUT, Transfer.BROADCAST, Kind.F, (Kind.S,))
_EMBED_GRAD = Barrier("CG", End.INPUT, Transfer.SCATTER, Kind.B, (Kind.G,))
_STATS = Transfer.ALL_GATHER

# C1 gathers the softmax statistics; C1b, which continues it, sums dL/dx (one_barrier) or the exponentials (naive).
_ONE_BARRIER = (
    _EMBED,
    _SHARE_X,
    Barrier("C1", End.OUTPUT, _STATS, Kind.S, (Kind.T,)),
    Barrier("C1b", End.OUTPUT, Transfer.REDUCE, "C1", (Kind.B,)),
    _EMBED_GRAD,
)

VOCAB_ALGORITHMS: dict[str, VocabAlgorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        VocabAlgorithm("none", False, 0, _ONE_BARRIER),
        VocabAlgorithm(
            "naive",
            True,
            2,
            (
                _EMBED,
                _SHARE_X,
                Barrier("C1", End.OUTPUT, Transfer.ALL_MAX, Kind.S, ()),
                Barrier("C1b", End.OUTPUT, Transfer.ALL_SUM, "C1", (Kind.T,)),
                Barrier("C2", End.OUTPUT, Transfer.REDUCE, Kind.T, (Kind.B,)),
                _EMBED_GRAD,
            ),
        ),
        VocabAlgorithm(
            "two_barrier",
            True,
            2,
            (
                _EMBED,
                _SHARE_X,
                Barrier("C1", End.OUTPUT, _STATS, Kind.S, (Kind.T,)),
                Barrier("C2", End.OUTPUT, Transfer.REDUCE, Kind.T, (Kind.B,)),
                _EMBED_GRAD,
            ),
        ),
        VocabAlgorithm("one_barrier", True, 1, _ONE_BARRIER),
    )
}


def evaluation(algorithm: VocabAlgorithm) -> VocabAlgorithm:
    """The forward-only part of any algorithm: embed, share x, gather the statistics from which every rank knows the loss."""
    statistics = Barrier("C1", End.OUTPUT, _STATS, Kind.S, ())
    return VocabAlgorithm("evaluate", algorithm.sharded, 0, (_EMBED, _SHARE_X, statistics))
