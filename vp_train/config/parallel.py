"""The section `parallel`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from vp_train.config.bounds import MOST_RANKS_OF_A_MODEL, MOST_REPLICAS
from vp_train.config.errors import ConfigError
from vp_train.config.setting import check_section, setting

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class ParallelConfig:
    """The degrees of parallelism, and the placement of layers on stages.

    A run has dp x pp x tp ranks: `dp` replicas of the model, each a pipeline of `pp` pipeline
    ranks, each of which is `tp` ranks that split its matrices.  A degree that is null is inferred
    from the world size.  If both `pp` and `dp` are null, `dp` is 1.
    """

    pp: int | None = setting(
        None,
        "Ranks of a pipeline; null: inferred from the world size.",
        least=1,
        most=MOST_RANKS_OF_A_MODEL,
    )
    dp: int | None = setting(
        None,
        "Replicas, each with num_microbatches of its own; null: inferred from the world size.",
        least=1,
        most=MOST_REPLICAS,
    )
    tp: int = setting(1, "Ranks that split each matrix.", least=1, most=MOST_RANKS_OF_A_MODEL)
    placement: str = setting(
        "even",
        "Layers per stage: even; balanced, numbers that differ by at most one; "
        "redistribute, fewer on the last stage (arXiv 2411.05288).",
        choices=("even", "balanced", "redistribute"),
    )
    layers_per_stage: tuple[int, ...] | None = setting(
        None, "Number of layers of each stage; overrides placement."
    )
    recompute: str = setting(
        "none",
        "What the backward recomputes instead of keeping it: nothing, the attention of each layer, "
        "or whole layers.",
        choices=RECOMPUTE,
    )
    recompute_per_stage: tuple[str, ...] | None = setting(
        None,
        "Recomputation of each stage, instead of recompute; 4*full is four of them.",
        choices=RECOMPUTE,
    )
    sequence_parallel: bool = setting(
        False, "Split norms and residuals over the tensor-parallel ranks too, by tokens."
    )
    offload_activations: float = setting(
        0.0,
        "Part of each stage's layers, the first ones, whose kept activations wait in host memory "
        "between forward and backward; 0: none.",
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        if self.recompute_per_stage is not None:
            whole = tuple(kind for word in self.recompute_per_stage for kind in _run_of(word))
            object.__setattr__(self, "recompute_per_stage", whole)
        check_section("parallel.", self)
        if self.recompute != "none" and self.recompute_per_stage is not None:
            raise ConfigError(
                f"parallel.recompute={self.recompute} and "
                f"parallel.recompute_per_stage={list(self.recompute_per_stage)}: set one of the two"
            )

    def recompute_of(self, stage: int) -> str:
        """Return what the backward of `stage` recomputes, one of RECOMPUTE."""
        return (
            self.recompute if self.recompute_per_stage is None else self.recompute_per_stage[stage]
        )


def recompute_words(kinds: tuple[str, ...]) -> str:
    """Return of how many stages each kind is recomputed, in words: full in 2/8, or none."""
    if len(set(kinds)) == 1:
        return kinds[0]
    counts = [(kind, kinds.count(kind)) for kind in reversed(RECOMPUTE[1:])]
    return ", ".join(f"{kind} in {count}/{len(kinds)}" for kind, count in counts if count)


def shortened(values: Iterable[object]) -> Iterator[str]:
    """Yield the items of a list as they are typed, of words that repeat `4*full` for four."""
    for value, run in groupby(values):
        count = len(list(run))
        repeats = isinstance(value, str) and count > 1
        yield from [f"{count}*{value}"] if repeats else [str(value)] * count


def _run_of(word: str) -> tuple[str, ...]:
    """Return the values that an item of a list stands for: `3*full` for three."""
    count, times, value = str(word).partition("*")
    return (value,) * int(count) if times and re.fullmatch("[0-9]{1,4}", count) else (word,)
