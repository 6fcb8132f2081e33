"""Vocabulary algorithms as data: their passes, their barriers, and which waits for which.

A barrier is one collective per microbatch. The algorithms are those of arXiv 2411.05288, with the
names of its figures in brackets: `two_barrier` (Algorithm 1, Vocab-1), `one_barrier` (Algorithm 2,
Vocab-2). `none` is the ordinary pipeline. It has the same passes, but the whole vocabulary is one
shard, on the rank of the last stage (output layer) or of the first stage (input layer).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from enum import StrEnum

from schedules.ir import Kind


class Transfer(StrEnum):
    """The collective by which a barrier moves its payload between the ranks with shards."""

    BROADCAST = "broadcast"  # from the rank of the root stage
    REDUCE = "reduce"  # sum, to the rank of the root stage
    GATHER = "gather"  # to the rank of the root stage; every shard sends its own tokens
    SCATTER = "scatter"  # from the rank of the root stage; every shard receives its own tokens
    ALL_MAX = "all_max"
    ALL_SUM = "all_sum"
    ALL_GATHER = "all_gather"

    @property
    def from_root(self) -> bool:
        """Return whether only the rank of the root stage has something to send."""
        return self in (Transfer.BROADCAST, Transfer.SCATTER)

    @property
    def to_root(self) -> bool:
        """Return whether only the rank of the root stage receives the result."""
        return self in (Transfer.REDUCE, Transfer.GATHER)


class End(StrEnum):
    """The end of the model that a barrier belongs to.

    Each end has its own communicator, so the order of its collectives is independent of the
    other's.
    """

    INPUT = "input"  # root: the rank of the first stage
    OUTPUT = "output"  # root: the rank of the last stage


class Payload(StrEnum):
    """The tensor that a barrier carries. T tokens, H hidden size, K tokens that one shard owns."""

    EMBEDDINGS = "embeddings"  # [K, H] from each shard: together the input of the first stage
    ACTIVATIONS = "activations"  # [T, H], the output of the last stage
    STATISTICS = "statistics"  # [3, T]: a shard's maximum, total and target logit
    MAXIMUM = "maximum"  # [T]
    SUMS = "sums"  # [2, T]: total and target logit relative to the maximum of all shards
    INPUT_GRADIENT = "input_gradient"  # [T, H], a shard's term of dL/dx of the output layer
    EMBEDDING_GRADIENT = "embedding_gradient"  # [T, H], of which each shard receives [K, H]


@dataclass(frozen=True, slots=True)
class Barrier:
    """A collective that takes place once per microbatch.

    It waits for the pass `after`: S, T or E on every shard, F of the last stage, or B for the
    backward of the first stage. Or it continues another barrier: its message needs the result of
    `continues`. Raises ValueError unless exactly one of the two is given. The passes in `before`
    wait for it. There F stands for the F of the first stage and B for the backward of the last
    stage.
    """

    name: str
    end: End
    transfer: Transfer
    payload: Payload
    before: tuple[Kind, ...]
    _: KW_ONLY
    after: Kind | None = None
    continues: str | None = None

    def __post_init__(self) -> None:
        if self.transfer.to_root and any(kind.is_vocabulary for kind in self.before):
            waiting = ", ".join(kind for kind in self.before if kind.is_vocabulary)
            raise ValueError(
                f"barrier {self.name} is a {self.transfer}, which delivers to the root alone, but "
                f"{waiting} waits for it on every shard; use another transfer"
            )
        if (self.after is None) == (self.continues is None):
            raise ValueError(
                f"barrier {self.name} has after={self.after} and continues={self.continues}; "
                "give exactly one of them"
            )


@dataclass(frozen=True, slots=True)
class VocabAlgorithm:
    """The properties of a vocabulary algorithm, and its barriers of both ends of the model.

    `sharded`: all ranks own vocabulary rows. If false, one rank holds a whole layer.
    `extra_in_flight`: the microbatches that the barriers between the last forward and the first
    backward add to the warm-up of 1F1B (arXiv 2411.05288, section 5).
    `input_gradient`: the pass that computes a shard's term of dL/dx, S or T; None for evaluation.
    `searched`: whether vocab=auto and vp-plan --search try the algorithm.
    """

    name: str
    sharded: bool
    extra_in_flight: int
    barriers: tuple[Barrier, ...]
    input_gradient: Kind | None
    _: KW_ONLY
    searched: bool = False

    def products(self, kind: Kind) -> int:
        """Return the number of matrix products over its rows that the S or T of a shard computes.

        With the output weights W and E = dL/dlogits up to a factor, S computes the logits x W^T and
        T the weight gradient E^T x. The pass `input_gradient` also computes E W, the term of dL/dx.
        """
        assert kind in (Kind.S, Kind.T)
        return 1 + (self.input_gradient is kind)

    def barrier(self, name: str) -> Barrier:
        """Return the barrier with this name. Raises KeyError if there is none."""
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
    """Return the all-gather of the statistics, for which the passes `before` wait."""
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
        VocabAlgorithm("naive", True, 2, _NAIVE, Kind.T),  # not searched: it is never the fastest
        VocabAlgorithm("two_barrier", True, 2, _TWO_BARRIER, Kind.T, searched=True),
        VocabAlgorithm("one_barrier", True, 1, _ONE_BARRIER, Kind.S, searched=True),
    )
}


def searched_algorithms() -> tuple[str, ...]:
    """Return the names of the algorithms that a search tries, the last one in the table first."""
    return tuple(name for name in reversed(VOCAB_ALGORITHMS) if VOCAB_ALGORITHMS[name].searched)


def evaluation(algorithm: VocabAlgorithm) -> VocabAlgorithm:
    """Return the algorithm of an evaluation, which has no backward.

    It embeds the tokens, broadcasts the output x of the last stage, and gathers the statistics,
    from which every rank computes the loss.
    """
    barriers = (_EMBED, _SHARE_X, _statistics())
    return VocabAlgorithm("evaluate", algorithm.sharded, 0, barriers, None)
