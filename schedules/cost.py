"""The cost of passes in seconds and bytes: all that generators and simulator know about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from schedules.ir import Kind, Pass


@dataclass(frozen=True, slots=True)
class CostModel:
    """The seconds of each pass, hop and barrier, and the bytes that passes keep for later passes.

    `pass_seconds[kind]` has one entry per stage for F, B, I, W and one per rank for S, T, E, G.
    `hop_seconds` is the time of a point-to-point transfer, `barrier_seconds[name]` of a collective.

    Stage s keeps `stage_bytes[s]` from its F to its B, and the vocabulary shard of rank r keeps
    `shard_bytes[r]` from its S to its T. With a split backward, stage s keeps only
    `weight_bytes[s]` from the end of I to W. Without an entry there it keeps everything until W.

    `offload_bytes[s]` are those of `stage_bytes[s]` that may wait in host memory from F to B or I.
    They take `offload_seconds[s]` on the link of their rank, in either direction.

    Raises ValueError for a cost that is below 0 or not a number.
    """

    pass_seconds: Mapping[Kind, tuple[float, ...]]
    hop_seconds: float = 0.0
    barrier_seconds: Mapping[str, float] = field(default_factory=dict)
    stage_bytes: tuple[float, ...] = ()
    shard_bytes: tuple[float, ...] = ()
    weight_bytes: tuple[float, ...] = ()
    offload_bytes: tuple[float, ...] = ()
    offload_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for kind, values in self.pass_seconds.items():
            _refuse_negative(f"a {kind} pass cannot take", values, " s")
        _refuse_negative("a hop cannot take", (self.hop_seconds,), " s")
        for name, seconds in self.barrier_seconds.items():
            _refuse_negative(f"barrier {name} cannot take", (seconds,), " s")
        _refuse_negative("a stage cannot keep", self.stage_bytes, " bytes")
        _refuse_negative("a shard cannot keep", self.shard_bytes, " bytes")
        _refuse_negative("W cannot need", self.weight_bytes, " bytes")
        _refuse_negative("a stage cannot offload", self.offload_bytes, " bytes")
        _refuse_negative("a transfer to the host cannot take", self.offload_seconds, " s")

    def seconds(self, item: Pass) -> float:
        """Return the duration of `item` in seconds; 0 for a kind without an entry.

        Raises ValueError if the kind has costs, but none for the stage or rank of `item`.
        """
        values = self.pass_seconds.get(item.kind)
        if values is None:
            return 0.0
        if item.stage >= len(values):
            raise ValueError(
                f"no cost for {item}: {len(values)} value(s) of {item.kind}, "
                "one per stage or rank needed"
            )
        return values[item.stage]

    def barrier(self, name: str) -> float:
        """Return the seconds of one barrier after its last rank has joined; 0 without an entry."""
        return self.barrier_seconds.get(name, 0.0)

    def microbatch_bytes(self, num_ranks: int) -> float:
        """Return the bytes that one microbatch keeps per rank, the unit of caps on memory."""
        return sum(self.stage_bytes) / num_ranks

    def offload(self, stage: int) -> tuple[float, float]:
        """Return the bytes that a stage may offload, and the seconds of their transfer."""
        num_bytes = self.offload_bytes[stage] if stage < len(self.offload_bytes) else 0.0
        seconds = self.offload_seconds[stage] if stage < len(self.offload_seconds) else 0.0
        return num_bytes, seconds

    def byte_change(self, item: Pass) -> float:
        """Return the bytes that `item` keeps for later passes, less those that it frees."""
        kept = self.stage_bytes[item.stage] if item.stage < len(self.stage_bytes) else 0.0
        for_weights = self.weight_bytes[item.stage] if item.stage < len(self.weight_bytes) else kept
        held = self.shard_bytes[item.stage] if item.stage < len(self.shard_bytes) else 0.0
        match item.kind:
            case Kind.F:
                return kept
            case Kind.B:
                return -kept
            case Kind.I:
                return for_weights - kept
            case Kind.W:
                return -for_weights
            case Kind.S:
                return held
            case Kind.T:
                return -held
            case _:
                return 0.0

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        num_ranks: int,
        *,
        hop: float = 0.0,
        barrier: float = 0.0,
        **seconds: float,
    ) -> CostModel:
        """Return the costs of equal stages and equal shards: `uniform(4, 4, F=1, B=2, S=0.5)`.

        Times are in seconds. A stage keeps 1 byte, a vocabulary shard none.
        """
        pass_seconds = {
            Kind(kind): (value,) * (num_ranks if Kind(kind).is_vocabulary else num_stages)
            for kind, value in seconds.items()
        }
        barriers = dict.fromkeys(("CE", "C0", "C1", "C1b", "C2", "CG"), barrier)
        return cls(
            pass_seconds,
            hop_seconds=hop,
            barrier_seconds=barriers,
            stage_bytes=(1.0,) * num_stages,
            shard_bytes=(0.0,) * num_ranks,
        )


def _refuse_negative(words: str, values: Sequence[float], unit: str) -> None:
    """Raise ValueError for the first value that is below 0 or not a number."""
    for value in values:
        if not value >= 0:
            raise ValueError(f"{words} {value}{unit}; costs are at least 0")
