"""What passes cost: seconds and bytes.  The simulator and the generators read nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from schedules.ir import Kind, Pass


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of each pass, hop and barrier; bytes that passes keep.  Raises ValueError for one below 0 or not a number.

    `pass_seconds[kind]` has one entry per stage for F, B, I, W and one per rank for S, T, E, G.  `stage_bytes[s]` stay from
    F of stage s to its B, `shard_bytes[r]` from S of rank r to its T.  With a split backward, `weight_bytes[s]` stay from I to
    W; where these are not given, everything stays until W.
    """

    pass_seconds: Mapping[Kind, tuple[float, ...]]
    hop_seconds: float = 0.0
    barrier_seconds: Mapping[str, float] = field(default_factory=dict)
    stage_bytes: tuple[float, ...] = ()
    shard_bytes: tuple[float, ...] = ()
    weight_bytes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for kind, values in self.pass_seconds.items():
            _refuse_negative(f"a {kind} pass cannot take", values, " s")
        _refuse_negative("a hop cannot take", (self.hop_seconds,), " s")
        for name, seconds in self.barrier_seconds.items():
            _refuse_negative(f"barrier {name} cannot take", (seconds,), " s")
        _refuse_negative("a stage cannot keep", self.stage_bytes, " bytes")
        _refuse_negative("a shard cannot keep", self.shard_bytes, " bytes")
        _refuse_negative("W cannot need", self.weight_bytes, " bytes")

    def seconds(self, item: Pass) -> float:
        """Duration of `item`; 0 for a kind without an entry.  Raises ValueError if the stage has no cost."""
        values = self.pass_seconds.get(item.kind)
        if values is None:
            return 0.0
        if item.stage >= len(values):
            raise ValueError(
                f"no cost for {item}: {len(values)} value(s) of {item.kind}, one per stage or rank needed"
            )
        return values[item.stage]

    def barrier(self, name: str) -> float:
        """Seconds of one barrier, from its last participant's start; 0 without an entry."""
        return self.barrier_seconds.get(name, 0.0)

    def byte_change(self, item: Pass) -> float:
        """Bytes that `item` leaves behind for later passes, less those it has used up."""
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
        """Equal stages and equal shards: `uniform(4, 4, F=1, B=2, S=0.5)`; a stage keeps 1 byte, a shard none."""
        per = {
            Kind(kind): (value,) * (num_ranks if Kind(kind).is_vocabulary else num_stages)
            for kind, value in seconds.items()
        }
        barriers = dict.fromkeys(("CE", "C0", "C1", "C1b", "C2", "CG"), barrier)
        return cls(per, hop, barriers, (1.0,) * num_stages, (0.0,) * num_ranks)


def _refuse_negative(words: str, values: Sequence[float], unit: str) -> None:
    """Raise ValueError for the first value that is below 0 or not a number."""
    for value in values:
        if not value >= 0:
            raise ValueError(f"{words} {value}{unit}; costs are at least 0")
