"""One way to run a batch on a cluster: what `vp-plan --search` chooses, and its overrides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from schedules.generators import GENERATORS
from schedules.layout import Layout
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.config import ConfigError, OptimConfig, ParallelConfig, RunConfig, VocabConfig
from vp_train.config.parallel import RECOMPUTE, shortened
from vp_train.planning.batch import batch_of
from vp_train.planning.degrees import Degrees, split_ranks

# Whether a choice has vocabulary parallelism, and whether it offloads activations.
ChoiceKind = tuple[bool, bool]
KINDS: tuple[ChoiceKind, ...] = ((False, False), (False, True), (True, False), (True, True))
# Settings that a choice makes.  These are printed always, the others where they differ.
SHOWN_ALWAYS = (
    *("parallel.dp", "parallel.pp", "parallel.tp"),
    *("schedule.name", "vocab.algorithm", "parallel.recompute"),
    *("micro_batch_size", "num_microbatches"),
)
SHOWN_WHERE_OTHER = (
    *("schedule.num_chunks", "parallel.placement", "parallel.layers_per_stage"),
    *("parallel.recompute_per_stage", "parallel.sequence_parallel"),
    "parallel.offload_activations",
    *("optim.name", "optim.offload", "vocab.shards", "vocab.balance"),
    *("schedule.file", "schedule.cap_gib", "schedule.cap_microbatches"),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run the batch.

    num_chunks: the stages of a rank, None where the schedule leaves no choice.
    recompute: what stages recompute: all of them, or with `recompute_where_needed` those that would
        need too much memory.  `recompute_per_stage` says which these are once that is known.
    offload: parallel.offload_activations.
    balance: vocab.balance, which counts where the vocabulary is sharded.
    cap_gib: the memory under which schedule=auto orders the passes; None: as `schedule` does.
    optimizer: None until it is known which optimizers fit.
    """

    degrees: Degrees
    micro_batch_size: int
    num_microbatches: int
    schedule: str
    vocab: str
    recompute: str
    num_chunks: int | None = None
    placement: str = "balanced"
    sequence_parallel: bool = False
    recompute_where_needed: bool = False
    recompute_per_stage: tuple[str, ...] | None = None
    offload: float = 0.0
    balance: bool = False
    cap_gib: float | None = None
    optimizer: OptimConfig | None = None

    @property
    def schedule_name(self) -> str:
        """The value of schedule.name."""
        return self.schedule if self.cap_gib is None else "auto"

    @property
    def splits_vocabulary(self) -> bool:
        """Return whether several pipeline ranks own rows of the vocabulary."""
        return self.degrees.pp > 1 and VOCAB_ALGORITHMS[self.vocab].sharded

    @property
    def kind(self) -> ChoiceKind:
        """Whether it has vocabulary parallelism, and whether it offloads activations."""
        return self.splits_vocabulary, self.offload > 0

    @property
    def redistributes(self) -> bool:
        """Return whether the last stage has fewer layers, since it has the output layer."""
        return self.placement == "redistribute"

    @property
    def recomputes_partly(self) -> bool:
        """Return whether only some of the stages recompute."""
        return self.recompute_where_needed or self.recompute_per_stage is not None

    @property
    def layout(self) -> Layout:
        return GENERATORS[self.schedule].layout_of(self.degrees.pp, self.num_chunks)

    @property
    def recompute_of_stages(self) -> tuple[str, ...]:
        """What every stage recomputes."""
        return self.recompute_per_stage or (self.recompute,) * self.layout.num_stages

    def with_recompute(self, kinds: tuple[str, ...]) -> Choice:
        """Return the choice whose stages recompute these `kinds`, one of each stage."""
        most = max(kinds, key=RECOMPUTE.index)
        return replace(
            self, recompute=most, recompute_per_stage=kinds if len(set(kinds)) > 1 else None
        )

    def with_other_stage(self, *, fewer: bool, rank: int | None = None) -> list[Choice]:
        """Return the choices in which one stage recomputes less, or more; of `rank` if given."""
        kinds, found = self.recompute_of_stages, list[Choice]()
        for stage in range(len(kinds)) if rank is None else self.layout.stages_of(rank):
            level = RECOMPUTE.index(kinds[stage])
            for other in RECOMPUTE[:level] if fewer else RECOMPUTE[level + 1 :]:
                found.append(self.with_recompute((*kinds[:stage], other, *kinds[stage + 1 :])))
        return found

    def parallel(self, typed: ParallelConfig) -> ParallelConfig:
        """Return `typed` with this choice."""
        per_stage = self.recompute_per_stage
        return replace(
            typed,
            pp=self.degrees.pp,
            dp=self.degrees.dp,
            tp=self.degrees.tp,
            placement=self.placement,
            layers_per_stage=None,
            recompute=self.recompute if per_stage is None else "none",
            recompute_per_stage=per_stage,
            sequence_parallel=self.sequence_parallel,
            offload_activations=self.offload,
        )

    def vocabulary(self, typed: VocabConfig) -> VocabConfig:
        """Return `typed` with this choice."""
        balance = self.balance and self.splits_vocabulary
        return replace(typed, algorithm=self.vocab, shards=None, balance=balance)

    def applied(self, config: RunConfig) -> RunConfig:
        """Return `config` with this choice."""
        return replace(
            config,
            schedule=replace(
                config.schedule,
                name=self.schedule_name,
                num_chunks=self.num_chunks,
                file=None,
                cap_gib=self.cap_gib,
                cap_microbatches=None,
            ),
            vocab=self.vocabulary(config.vocab),
            parallel=self.parallel(config.parallel),
            optim=self.optimizer or config.optim,
            micro_batch_size=self.micro_batch_size,
            num_microbatches=self.num_microbatches,
        )

    def overrides(self, config: RunConfig) -> str:
        """Return the overrides to append to the command line of `config` to use this choice.

        They include resets of settings that do not go with it.
        """
        chosen = self.applied(config)
        other = [
            name for name in SHOWN_WHERE_OTHER if value_of(chosen, name) != value_of(config, name)
        ]
        return " ".join(
            f"{name}={word_of(value_of(chosen, name))}" for name in (*SHOWN_ALWAYS, *other)
        )

    def changes(self, config: RunConfig) -> str:
        """Return the overrides of what this choice changes in `config`, whose degrees are set."""
        return changes_of(config, self.applied(config))


def changes_of(config: RunConfig, chosen: RunConfig) -> str:
    """Return the overrides of what a choice has changed in `config`."""
    return " ".join(
        f"{name}={word_of(value_of(chosen, name))}"
        for name in (*SHOWN_ALWAYS, *SHOWN_WHERE_OTHER)
        if value_of(chosen, name) != value_of(config, name)
    )


def value_of(config: RunConfig, name: str) -> Any:
    """Return the value of a setting."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def word_of(value: Any) -> str:
    """Return the value of a setting as it is typed; whole numbers have no fraction: 1.0 -> 1."""
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(shortened(value))}]" if isinstance(value, tuple) else str(value)


def choice_of(config: RunConfig, degrees: Degrees) -> Choice:
    """Return the settings of a plan as a choice of a search."""
    parallel = config.parallel
    per_stage = parallel.recompute_per_stage
    return Choice(
        degrees,
        micro_batch_size=config.micro_batch_size,
        num_microbatches=config.num_microbatches,
        schedule=config.schedule.name,
        vocab=config.vocab.algorithm,
        recompute=max(per_stage or (parallel.recompute,), key=RECOMPUTE.index),
        num_chunks=config.schedule.num_chunks,
        placement=parallel.placement,
        sequence_parallel=parallel.sequence_parallel,
        recompute_per_stage=per_stage,
        offload=parallel.offload_activations,
        balance=config.vocab.balance,
    )


def unsearched(config: RunConfig) -> list[str]:
    """Return the settings of `config` whose values no search tries."""
    parallel = config.parallel
    is_given = {
        "schedule.name": config.schedule.name not in GENERATORS,
        "schedule.file": config.schedule.file is not None,
        "vocab.algorithm": config.vocab.algorithm not in VOCAB_ALGORITHMS,
        "vocab.shards": config.vocab.shards is not None,
        "parallel.layers_per_stage": parallel.layers_per_stage is not None,
        "parallel.recompute_per_stage": parallel.recompute_per_stage is not None,
    }
    return [name for name, given in is_given.items() if given]


def as_typed(config: RunConfig) -> Choice | None:
    """Return the choice that a search makes if it leaves the run of `config` as it is.

    None if no search makes it: see `unsearched`, or its degrees do not fit the cluster or the
    batch.
    """
    if unsearched(config):
        return None
    try:
        degrees = split_ranks(config.parallel, config.cluster.num_gpus)
        layout = GENERATORS[config.schedule.name].layout_of(degrees.pp, config.schedule.num_chunks)
    except (ConfigError, ValueError):
        return None
    count, rest = divmod(batch_of(config), degrees.dp * config.micro_batch_size)
    if rest:
        return None
    even = even_placement(config.model.num_layers, layout.num_stages)
    placement = config.parallel.placement
    choice = replace(
        choice_of(config, degrees),
        num_microbatches=count,
        num_chunks=layout.num_chunks if layout.name == "loop" else None,
        placement=placement if placement == "redistribute" else even,
    )
    return replace(choice, vocab="none", balance=False) if degrees.pp == 1 else choice


def optimizers_of(config: RunConfig, dp: int) -> list[OptimConfig]:
    """Return the ways to keep the state of AdamW: in every replica, sharded, and in host memory."""
    typed = config.optim
    whole = replace(typed, name="adamw", offload=False)
    sharded = replace(typed, name="zero1", offload=False)
    kept = [sharded, whole] if dp > 1 else [whole if typed.offload else typed]
    if config.run.device != "cuda":
        return kept
    return [*kept, replace(typed, name="zero1", offload=True)]


def even_placement(num_layers: int, num_stages: int) -> str:
    """Return the placement of layers that are as even as possible."""
    return "balanced" if num_layers % num_stages else "even"


def where_needed_values(recompute: str, num_stages: int) -> tuple[bool, ...]:
    """Return the values of `Choice.recompute_where_needed` that differ."""
    return (False,) if recompute == "none" or num_stages == 1 else (False, True)
