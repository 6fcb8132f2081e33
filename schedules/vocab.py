"""Vocabulary algorithms as data: which passes they have, which barriers, and who waits for whom.

A barrier is one collective per microbatch.  The algorithms are those of arXiv 2411.05288, with the
names of its figures in brackets: `two_barrier` (Algorithm 1, Vocab-1), `one_barrier` (Algorithm 2,
Vocab-2).  `none` is the ordinary pipeline: the same passes, with the whole vocabulary as one shard
on the rank of the last (output) and first (input) stage.
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

    @property
    def from_root(self) -> bool:
        """True where the rank of the root stage alone has something to send."""
        return self in (Transfer.BROADCAST, Transfer.SCATTER)

    @property
    def to_root(self) -> bool:
        """True where the result arrives on the rank of the root stage alone."""
        return self in (Transfer.REDUCE, Transfer.GATHER)


class End(StrEnum):
    """The side of the model a barrier belongs to; each side has its own communicator, and so its own order."""

    INPUT = "input"  # root: the rank of the first stage
    OUTPUT = "output"  # root: the rank of the last stage


class Payload(StrEnum):
    """What a barrier carries.  T tokens, H hidden, K tokens that one shard owns, n shards."""

    EMBEDDINGS = "embeddings"  # [K, H] of each shard: together the input of the first stage
    ACTIVATIONS = "activations"  # [T, H], the output of the last stage
    STATISTICS = "statistics"  # [3, T]: a shard's maximum, total and target logit
    MAXIMUM = "maximum"  # [T]
    SUMS = "sums"  # [2, T]: total and target logit relative to the maximum of all shards
    INPUT_GRADIENT = "input_gradient"  # [T, H], a shard's term of dL/dx of the output layer
    EMBEDDING_GRADIENT = "embedding_gradient"  # [T, H], of which each shard gets [K, H]


@dataclass(frozen=True, slots=True)
class Barrier:
    """One collective per microbatch.

    It waits for the pass `after` (S, T or E on every shard, F of the last stage, the backward of the
    first), or it continues another: its message needs what the barrier `continues` delivers.
    Exactly one of the two is given.  `before`: the passes that wait for it (F of the first stage,
    the backward of the last).
    """

    name: str
    end: End
    transfer: Transfer
    payload: Payload
    before: tuple[Kind, ...]
    after: Kind | None = None
    continues: str | None = None

    def __post_init__(self) -> None:
        if (self.after is None) == (self.continues is None):
            raise ValueError(
                f"barrier {self.name} is after {self.after} and continues {self.continues}; give one"
            )


@dataclass(frozen=True, slots=True)
class VocabAlgorithm:
    """The passes of the output layer and all barriers, input side included.

    `sharded` is false when one rank holds a whole layer.  `extra_in_flight`: microbatches that the
    barriers between the last forward and the first backward add to a 1F1B warm-up (arXiv
    2411.05288, section 5).  `input_gradient`: the pass that forms a shard's term of dL/dx, S or T;
    None if nothing does.  `searched`: whether vocab=auto and vp-plan --search try it.
    """

    name: str
    sharded: bool
    extra_in_flight: int
    barriers: tuple[Barrier, ...]
    input_gradient: Kind | None
    searched: bool = False

    def products(self, kind: Kind) -> int:
        """Return how many matrix products over its rows a shard's S or T has: logits, E W and E^T x."""
        assert kind in (Kind.S, Kind.T)
        return 1 + (self.input_gradient is kind)

    def barrier(self, name: str) -> Barrier:
        """The barrier called `name`; KeyError if this algorithm has none."""
        for barrier in self.barriers:
            if barrier.name == name:
                return barrier
        raise KeyError(f"{self.name} has no barrier {name!r}")


_EMBED = Barrier("CE", End.INPUT, Transfer.GATHER, Payload.EMBEDDINGS, (Kind.F,), after=Kind.E)
_EMBED_GRAD = Barrier(
    "CG", End.INPUT, Transfer.SCATTER, Payload.EMBEDDING_GRADIENT, (Kind.G,), after=Kind.B
)
_SHARE_X = Barrier(
    "C0", End.OUTPUT, Transfer.BROADCAST, Payload.ACTIVATIONS, (Kind.S,), after=Kind.F
)


def _statistics(*before: Kind) -> Barrier:
    return Barrier("C1", End.OUTPUT, Transfer.ALL_GATHER, Payload.STATISTICS, before, after=Kind.S)


_SUM_AFTER_T = Barrier(
    "C2", End.OUTPUT, Transfer.REDUCE, Payload.INPUT_GRADIENT, (Kind.B,), after=Kind.T
)
_SUM_AFTER_STATISTICS = Barrier(
    "C1b", End.OUTPUT, Transfer.REDUCE, Payload.INPUT_GRADIENT, (Kind.B,), continues="C1"
)
_NAIVE_MAXIMUM = Barrier("C1", End.OUTPUT, Transfer.ALL_MAX, Payload.MAXIMUM, (), after=Kind.S)
_NAIVE_SUMS = Barrier("C1b", End.OUTPUT, Transfer.ALL_SUM, Payload.SUMS, (Kind.T,), continues="C1")

_ONE_BARRIER = (_EMBED, _SHARE_X, _statistics(Kind.T), _SUM_AFTER_STATISTICS, _EMBED_GRAD)
_TWO_BARRIER = (_EMBED, _SHARE_X, _statistics(Kind.T), _SUM_AFTER_T, _EMBED_GRAD)
_NAIVE = (_EMBED, _SHARE_X, _NAIVE_MAXIMUM, _NAIVE_SUMS, _SUM_AFTER_T, _EMBED_GRAD)

VOCAB_ALGORITHMS: dict[str, VocabAlgorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        VocabAlgorithm("none", False, 0, _ONE_BARRIER, Kind.S, searched=True),
        VocabAlgorithm("naive", True, 2, _NAIVE, Kind.T),  # it never wins
        VocabAlgorithm("two_barrier", True, 2, _TWO_BARRIER, Kind.T, searched=True),
        VocabAlgorithm("one_barrier", True, 1, _ONE_BARRIER, Kind.S, searched=True),
    )
}


def searched_algorithms() -> tuple[str, ...]:
    """Return the names of the algorithms that a search tries, the last registered first."""
    return tuple(name for name in reversed(VOCAB_ALGORITHMS) if VOCAB_ALGORITHMS[name].searched)


def evaluation(algorithm: VocabAlgorithm) -> VocabAlgorithm:
    """Return the forward-only part of any algorithm.

    It embeds, shares x, and gathers the statistics from which every rank knows the loss.
    """
    barriers = (_EMBED, _SHARE_X, _statistics())
    return VocabAlgorithm("evaluate", algorithm.sharded, 0, barriers, None)
