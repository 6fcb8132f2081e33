"""The problem a schedule solves: which passes exist, where they run, and what each waits for.

`Problem.inputs_of` is the only dependency rule. The generators, the simulator, the lowering and the
checker all call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from schedules.ir import Kind, Pass
from schedules.layout import Layout
from schedules.vocab import End, VocabAlgorithm


@dataclass(frozen=True, slots=True, order=True)
class Collective:
    """The collective of one barrier for one microbatch.

    It is a single node of the dependency graph, shared by all ranks that own a vocabulary shard.
    """

    barrier: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.barrier}.{self.microbatch}"


Node = Pass | Collective


@dataclass(frozen=True, slots=True)
class Problem:
    """One step: `num_microbatches` through the stages of `layout`, with the passes of `algorithm`.

    `split_backward` replaces every B by I (input gradient) and W (weight gradient). `forward_only`
    describes an evaluation, for which `algorithm` must be `vocab.evaluation(algorithm)`. Raises
    ValueError for fewer than 1 microbatch.
    """

    layout: Layout
    num_microbatches: int
    algorithm: VocabAlgorithm
    split_backward: bool = False
    forward_only: bool = False

    def __post_init__(self) -> None:
        if self.num_microbatches < 1:
            raise ValueError(f"{self.num_microbatches} microbatches; a step needs at least 1")

    @property
    def last_stage(self) -> int:
        """The index of the last stage."""
        return self.layout.num_stages - 1

    @property
    def backward(self) -> Kind:
        """The kind of pass that sends a gradient to the previous stage: B, or I if B is split."""
        return Kind.I if self.split_backward else Kind.B

    @property
    def stage_kinds(self) -> tuple[Kind, ...]:
        """The kinds of passes that every stage runs for a microbatch, in their order."""
        if self.forward_only:
            return (Kind.F,)
        return (Kind.F, Kind.I, Kind.W) if self.split_backward else (Kind.F, Kind.B)

    @property
    def shard_kinds(self) -> dict[End, tuple[Kind, ...]]:
        """The kinds of passes that every vocabulary shard runs for a microbatch, in their order."""
        if self.forward_only:
            return {End.INPUT: (Kind.E,), End.OUTPUT: (Kind.S,)}
        return {End.INPUT: (Kind.E, Kind.G), End.OUTPUT: (Kind.S, Kind.T)}

    def root(self, end: End) -> int:
        """Return the rank of the first stage (INPUT) or of the last stage (OUTPUT)."""
        return self.layout.rank_of(0 if end is End.INPUT else self.last_stage)

    def shard_ranks(self, end: End) -> tuple[int, ...]:
        """Return the ranks that own rows of the vocabulary layer of `end`."""
        return tuple(range(self.layout.num_ranks)) if self.algorithm.sharded else (self.root(end),)

    def rank_of(self, item: Pass) -> int:
        """Return the rank that runs `item`."""
        return item.stage if item.kind.is_vocabulary else self.layout.rank_of(item.stage)

    def passes_of(self, rank: int, microbatch: int | None = None) -> Iterator[Pass]:
        """Yield every pass that `rank` must run once, in no particular order.

        These are the passes of `microbatch`, or of all microbatches if it is None.
        """
        stages = self.layout.stages_of(rank)
        for i in self._microbatches(microbatch):
            for stage in stages:
                for kind in self.stage_kinds:
                    yield Pass(stage, kind, i)
            for end, kinds in self.shard_kinds.items():
                if rank in self.shard_ranks(end):
                    for kind in kinds:
                        yield Pass(rank, kind, i)

    def collectives(self, microbatch: int | None = None) -> Iterator[Collective]:
        """Yield every collective of `microbatch`, or of all microbatches if it is None."""
        for i in self._microbatches(microbatch):
            for barrier in self.algorithm.barriers:
                yield Collective(barrier.name, i)

    def _microbatches(self, only: int | None) -> range:
        return range(self.num_microbatches) if only is None else range(only, only + 1)

    def inputs_of(self, node: Node) -> tuple[Node, ...]:
        """Return the nodes that must have finished before `node` starts: THE dependency rule."""
        if isinstance(node, Collective):
            return self._inputs_of_collective(node)
        stage, kind, i = node.stage, node.kind, node.microbatch
        match kind:
            case Kind.F:
                return (
                    (Pass(stage - 1, Kind.F, i),) if stage > 0 else self._barriers_before(Kind.F, i)
                )
            case Kind.B | Kind.I:
                own = Pass(stage, Kind.F, i)
                if stage == self.last_stage:
                    return (own, *self._barriers_before(Kind.B, i))
                return (own, Pass(stage + 1, kind, i))
            case Kind.W:
                return (Pass(stage, Kind.I, i),)
            case Kind.T:
                return (Pass(stage, Kind.S, i), *self._barriers_before(Kind.T, i))
            case _:
                return self._barriers_before(kind, i)

    def _barriers_before(self, kind: Kind, microbatch: int) -> tuple[Node, ...]:
        return tuple(
            Collective(barrier.name, microbatch)
            for barrier in self.algorithm.barriers
            if kind in barrier.before
        )

    def _inputs_of_collective(self, node: Collective) -> tuple[Node, ...]:
        barrier, i = self.algorithm.barrier(node.barrier), node.microbatch
        if barrier.continues is not None:
            return (Collective(barrier.continues, i),)
        match barrier.after:
            case Kind.F:
                return (Pass(self.last_stage, Kind.F, i),)
            case Kind.B:
                return (Pass(0, self.backward, i),)
            case kind:
                assert kind is not None
                return tuple(Pass(rank, kind, i) for rank in self.shard_ranks(barrier.end))

    def is_hop(self, earlier: Node, later: Node) -> bool:
        """Return whether `later` gets the output of `earlier` by a point-to-point transfer.

        This is so if both are passes and run on different ranks.
        """
        return (
            isinstance(earlier, Pass)
            and isinstance(later, Pass)
            and self.rank_of(earlier) != self.rank_of(later)
        )

    def receivers(self, node: Collective) -> tuple[int, ...]:
        """Return the ranks that receive the result of the collective."""
        barrier = self.algorithm.barrier(node.barrier)
        return (
            (self.root(barrier.end),) if barrier.transfer.to_root else self.shard_ranks(barrier.end)
        )
