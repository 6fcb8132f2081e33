"""The ways to run a batch on a cluster: what `vp-plan --search` chooses, and what rules it out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

from schedules.generators import GENERATORS, searched_schedules
from schedules.layout import Layout
from schedules.vocab import VOCAB_ALGORITHMS, searched_algorithms
from vp_train.config import (
    ConfigError,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    VocabConfig,
)
from vp_train.config.errors import unknown
from vp_train.config.parallel import RECOMPUTE, shortened
from vp_train.model import shape
from vp_train.planning.degrees import Degrees, check_tensor_split, split_ranks
from vp_train.planning.placement import offloaded_layers, redistribute, split_layers
from vp_train.planning.plan import MOST_FORWARD_PASSES, SEQUENCE_DEVICES
from vp_train.units import count_words

# Those that divide the batch are tried; for larger ones see `with_larger_microbatches`.
MICRO_BATCH_SIZES = tuple(range(1, 17))
_MOST_EMPTY = 2  # stages without a layer
# What rules out a step that has too many passes.
TOO_LONG = f"more than {MOST_FORWARD_PASSES:,} forward passes (microbatches x stages)"
_OF_ONE_RANK = (("1f1b", "none"), ("interleaved", "none"))  # schedules and algorithms
OFFLOADED = (0.5, 1.0)  # parts of the layers that searches offload, besides none
# Settings that a choice makes.  These are printed always, the others where they differ.
_ALWAYS = (
    *("parallel.dp", "parallel.pp", "parallel.tp"),
    *("schedule.name", "vocab.algorithm", "parallel.recompute"),
    *("micro_batch_size", "num_microbatches"),
)
_WHERE_OTHER = (
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
        other = [name for name in _WHERE_OTHER if _value(chosen, name) != _value(config, name)]
        return " ".join(f"{name}={_word(_value(chosen, name))}" for name in (*_ALWAYS, *other))

    def changes(self, config: RunConfig) -> str:
        """Return the overrides of what this choice changes in `config`, whose degrees are set."""
        return changes_of(config, self.applied(config))


def changes_of(config: RunConfig, chosen: RunConfig) -> str:
    """Return the overrides of what a choice has changed in `config`."""
    return " ".join(
        f"{name}={_word(_value(chosen, name))}"
        for name in (*_ALWAYS, *_WHERE_OTHER)
        if _value(chosen, name) != _value(config, name)
    )


KEPT_WHERE_TYPED = "vocab.balance"  # by a search, also without --keep
# What a search may keep, and the value of a choice.
_KEPT: Mapping[str, Callable[[Choice], Any]] = {
    "parallel.dp": lambda choice: choice.degrees.dp,
    "parallel.pp": lambda choice: choice.degrees.pp,
    "parallel.tp": lambda choice: choice.degrees.tp,
    "micro_batch_size": lambda choice: choice.micro_batch_size,
    "schedule.name": lambda choice: choice.schedule,
    "schedule.num_chunks": lambda choice: choice.num_chunks,
    "vocab.algorithm": lambda choice: choice.vocab,
    "parallel.placement": lambda choice: choice.placement,
    "parallel.recompute": lambda choice: choice.recompute,
    "parallel.sequence_parallel": lambda choice: choice.sequence_parallel,
    "parallel.offload_activations": lambda choice: choice.offload,
    "vocab.balance": lambda choice: choice.balance,
}
_KEPT_OF_OPTIMIZERS = ("optim.name", "optim.offload")
_GROUPS = {  # whose values a choice sets: what of them may be kept
    "schedule": ("schedule.name",),
    "vocab": ("vocab.algorithm",),
    "optim": _KEPT_OF_OPTIMIZERS,
    "parallel": ("parallel.placement",),
}


def searched_words(overrides: Sequence[str]) -> list[str]:
    """Return those of the typed overrides that a search replaces by its own choice.

    The number of microbatches is not among them, since the batch follows from it.
    """
    names = {*_ALWAYS, *_WHERE_OTHER, *_GROUPS} - {"num_microbatches"}
    return [word for word in overrides if word.lstrip("+~").partition("=")[0] in names]


def settings_of(word: str) -> tuple[str, ...]:
    """Return the setting that an override sets, or of a group those that a choice sets."""
    name = word.lstrip("+~").partition("=")[0]
    return _GROUPS.get(name, (name,))


@dataclass(frozen=True, slots=True)
class Kept:
    """The settings that a search leaves as they are, with their values; see `--keep`."""

    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, names: Iterable[str]) -> Kept:
        """Return the settings called `names` with their values in `config`.

        A group stands for what a choice sets of it; `parallel` is refused, since its degrees are
        settings of their own.  Raises ConfigError for a setting that is not searched or that no
        search can keep, or that has no value to keep.
        """
        values: dict[str, Any] = {}
        known = ("schedule", "vocab", "optim", *_KEPT, *_KEPT_OF_OPTIMIZERS)
        for given in names:
            if given == "parallel":
                raise ConfigError("--keep parallel: name its settings, as in --keep parallel.tp")
            for name in _GROUPS.get(given, (given,)):
                if name in known:
                    pass
                elif name in (*_ALWAYS, *_WHERE_OTHER):
                    raise ConfigError(
                        f"--keep {name}: a search sets it and cannot keep it; keep only some of "
                        f"{', '.join(known)}"
                    )
                else:
                    raise ConfigError(f"{unknown(f'--keep {given}', given, known)}, or typed")
                values[name] = _value(config, name)
                if values[name] is None:
                    raise ConfigError(f"--keep {name}: it is not set; add {name}=8, for example")
        name = values.get("schedule.name", "1f1b")
        if name not in GENERATORS or ("schedule.name" in values and config.schedule.file):
            raise ConfigError(
                f"--keep schedule.name: a search keeps one of {', '.join(GENERATORS)}, not "
                f"{config.schedule.file or name}"
            )
        if values.get("vocab.algorithm", "none") not in VOCAB_ALGORITHMS:
            raise ConfigError("--keep vocab.algorithm: vocab=auto is any; drop one of the two")
        return cls(values)

    def has_word(self, word: str) -> bool:
        """Return whether this override sets what is kept."""
        return any(name in self.values for name in settings_of(word))

    def with_value(self, name: str, searched: Iterable[Any]) -> tuple[Any, ...]:
        """Return what is searched of a setting, with the value that is kept."""
        kept = (self.values[name],) if name in self.values else ()
        return tuple(dict.fromkeys((*searched, *kept)))

    def against(self, choice: Choice) -> str | None:
        """Return the first kept setting that a choice does not have, in words."""
        for name, value in self.values.items():
            if name in _KEPT and not self._has(choice, name, value):
                return f"--keep {name}={_word(value)}"
        return None

    @staticmethod
    def _has(choice: Choice, name: str, value: Any) -> bool:
        found = _KEPT[name](choice)
        match name:
            case "schedule.num_chunks":  # not of schedules that leave no choice
                return found in (None, value)
            case "parallel.placement":  # even and balanced are the same where both are possible
                return bool((found == "redistribute") == (value == "redistribute"))
            case "parallel.recompute":
                return bool(found == value) and not choice.recompute_where_needed
            case "parallel.sequence_parallel":  # one rank has nothing to split over
                return found == value or choice.degrees.tp == 1
        return bool(found == value)

    def optimizers(self, config: RunConfig) -> tuple[OptimConfig, ...] | None:
        """Return the optimizers that are left to choose from, None for all."""
        if not set(_KEPT_OF_OPTIMIZERS) & set(self.values):
            return None
        typed = config.optim
        names = self.values.get("optim.name"), self.values.get("optim.offload")
        found = [
            replace(typed, name=name, offload=offload)
            for name, offload in (("zero1", False), ("adamw", False), ("zero1", True))
            if names[0] in (None, name) and names[1] in (None, offload)
        ]
        return tuple(found) or (typed,)

    @property
    def words(self) -> str:
        """The settings with their values, as typed."""
        return ", ".join(f"{name}={_word(value)}" for name, value in self.values.items())


ALL = Kept()  # nothing is kept, everything is searched


def _value(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _word(value: Any) -> str:
    """Return the value of a setting as it is typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(shortened(value))}]" if isinstance(value, tuple) else str(value)


@dataclass(frozen=True, slots=True)
class Space:
    """All choices that can be planned, and how many others each constraint rules out.

    optimizers: those to choose from, None for all.
    kept: the settings that all choices share because they are not searched.
    """

    choices: tuple[Choice, ...]
    excluded: Counter[str]
    optimizers: tuple[OptimConfig, ...] | None = None
    kept: Kept = ALL


def batch_of(config: RunConfig) -> int:
    """Return the sequences of a step: num_microbatches x micro_batch_size x parallel.dp."""
    return config.num_microbatches * config.micro_batch_size * (config.parallel.dp or 1)


def with_replicas(config: RunConfig) -> RunConfig:
    """Return `config` with the parallel.dp that a run on its cluster infers, so its batch is set.

    Degrees that do not go with the cluster stay as they are.
    """
    try:
        dp = split_ranks(config.parallel, config.cluster.num_gpus).dp
    except ConfigError:
        return config
    return replace(config, parallel=replace(config.parallel, dp=dp))


def space_of(config: RunConfig, kept: Kept = ALL) -> Space:
    """Return every way to run the batch of `config` on all GPUs of its cluster.

    The ranks of a tensor-parallel group are on one node.  What has another value than `kept` is
    ruled out, and counts under the first setting that it does not have.  The run as it was typed is
    a choice also where no search tries its values, such as micro_batch_size=7.
    """
    batch, found = batch_of(config), dict[Choice, str | None]()  # what rules it out
    excluded: Counter[str] = Counter()

    def add(choice: Choice) -> None:
        found[choice] = kept.against(choice) or _too_long(choice) or _moves_nothing(choice, config)

    tried = [size for size in MICRO_BATCH_SIZES if batch % size == 0]
    sizes = kept.with_value("micro_batch_size", tried)
    for degrees in splits_of(config):
        variants = list(_variants(config, degrees, kept))
        reason = _reason_against(config, degrees)
        if reason is None and batch % degrees.dp:
            reason = f"the batch: dp must divide its {count_words(batch, 'sequence')}"
        if reason is not None:
            excluded[reason] += len(variants) * len(sizes)
            continue
        for size in sizes:
            if batch % (degrees.dp * size):
                continue
            count = batch // degrees.dp // size
            for variant in variants:
                add(replace(variant, micro_batch_size=size, num_microbatches=count))
    typed = as_typed(config)
    if (
        typed is not None
        and typed not in found
        and (not typed.offload or config.run.device == "cuda")
        and typed.layout.num_stages <= config.model.num_layers + _MOST_EMPTY
        and _reason_against(config, typed.degrees) is None
    ):
        add(typed)
    excluded.update(reason for reason in found.values() if reason is not None)
    choices = tuple(choice for choice, reason in found.items() if reason is None)
    return Space(choices, excluded, kept.optimizers(config), kept)


def _too_long(choice: Choice) -> str | None:
    """Return what rules out a choice whose step has more passes than can be planned."""
    if choice.layout.num_stages * choice.num_microbatches <= MOST_FORWARD_PASSES:
        return None
    return TOO_LONG


def _moves_nothing(choice: Choice, config: RunConfig) -> str | None:
    """Return what rules out a choice that offloads less than half a layer of every stage."""
    if not choice.offload:
        return None
    stages = split_layers(config.model, choice.parallel(config.parallel), choice.layout)
    if any(offloaded_layers(len(layers), choice.offload) for layers in stages):
        return None
    return f"parallel.offload_activations={choice.offload:g} is less than half a layer of a stage"


def without_vocabulary_of(config: RunConfig, degrees: Degrees) -> Space:
    """Return the choices without vocabulary parallelism that are otherwise as `config` is.

    Schedule, number of chunks and placement differ, and where only some stages recompute, which.
    """
    parallel = config.parallel
    kinds = set(parallel.recompute_per_stage or (parallel.recompute,))
    strongest = max(kinds, key=RECOMPUTE.index)
    choices = tuple(
        replace(
            choice,
            micro_batch_size=config.micro_batch_size,
            num_microbatches=config.num_microbatches,
            offload=parallel.offload_activations,
        )
        for choice in _variants(config, degrees)
        if not choice.splits_vocabulary
        and choice.recompute == strongest
        and (len(kinds) > 1 or not choice.recompute_where_needed)
        and choice.sequence_parallel == parallel.sequence_parallel
    )
    return Space(choices, Counter(), (config.optim,))


def offloading(choice: Choice, num_layers: int, *, where_needed: bool = False) -> list[Choice]:
    """Return the choices that offload activations and recompute at most as much as `choice`.

    With `where_needed` also those in which only the stages recompute that need it: it is dear to
    find out which, so a search tries them beside the best only.  A stage of one layer offloads all
    or nothing.  One rank also gives every layer a stage of its own, or two layers one of which goes
    to the host: in one stage activations live too short for both ways of the link.
    """
    strongest = RECOMPUTE.index(choice.recompute)
    moves_half = choice.layout.num_stages < num_layers
    bases = [(choice, OFFLOADED if moves_half else OFFLOADED[-1:])]
    for part in OFFLOADED if choice.degrees.pp == 1 else ():
        count = math.ceil(num_layers * part)
        if count > 1:
            place = _even(num_layers, count)
            split = replace(choice, schedule="interleaved", num_chunks=count, placement=place)
            bases.append((split, (part,)))
    return [
        replace(
            base,
            recompute=recompute,
            recompute_where_needed=needed,
            recompute_per_stage=None,
            offload=part,
            optimizer=None,
        )
        for base, parts in dict.fromkeys(bases)
        for recompute in RECOMPUTE[: strongest + 1]
        for needed in _where_needed(recompute, base.layout.num_stages)[: 1 + where_needed]
        for part in parts
    ]


def _where_needed(recompute: str, num_stages: int) -> tuple[bool, ...]:
    """Return the values of `Choice.recompute_where_needed` that differ."""
    return (False,) if recompute == "none" or num_stages == 1 else (False, True)


def neighbours(choice: Choice, others: Iterable[Choice], number: int = 1) -> list[Choice]:
    """Return those of the `others` that differ in `number` things, offloading as much as `choice`.

    These things are the degrees, the size of a microbatch, the schedule with its chunks, the
    vocabulary algorithm, the placement, what is recomputed, and sequence parallelism.  With the
    degrees the chunks and sequence parallelism may change, and with the algorithm the placement.
    To one pipeline rank, where what is recomputed decides them, the schedule, the algorithm and the
    placement change with all else.
    """
    return [
        other if other.offload == choice.offload else replace(other, offload=choice.offload)
        for other in others
        if _differences(choice, other) == number
    ]


def with_other_chunks(choice: Choice, num_layers: int) -> list[Choice]:
    """Return the choices whose ranks have one stage more or less, where this is free."""
    if choice.num_chunks is None:
        return []
    pp, counts = choice.degrees.pp, (choice.num_chunks - 1, choice.num_chunks + 1)
    return [
        replace(
            choice,
            num_chunks=count,
            placement=choice.placement if choice.redistributes else _even(num_layers, pp * count),
            recompute_where_needed=choice.recomputes_partly,
            recompute_per_stage=None,
            optimizer=None,
        )
        for count in counts
        if 2 <= count <= most_chunks(pp, num_layers)
        and pp * count * choice.num_microbatches <= MOST_FORWARD_PASSES
    ]


def with_larger_microbatches(choice: Choice) -> list[Choice]:
    """Return the choices with up to twice as large microbatches that no space has for their size.

    They recompute at most as much: a small model on a fast GPU needs them, and where the host is
    too slow for smaller ones, these recompute for nothing.  The next ones come beside the best.
    """
    size, strongest = choice.micro_batch_size, RECOMPUTE.index(choice.recompute)
    sequences = size * choice.num_microbatches
    return [
        replace(
            choice,
            micro_batch_size=larger,
            num_microbatches=sequences // larger,
            recompute=recompute,
            recompute_where_needed=choice.recomputes_partly and recompute != "none",
            recompute_per_stage=None,
            optimizer=None,
        )
        for larger in range(max(size, MICRO_BATCH_SIZES[-1]) + 1, 2 * size + 1)
        if sequences % larger == 0
        for recompute in RECOMPUTE[: strongest + 1]
    ]


def _even(num_layers: int, num_stages: int) -> str:
    """Return the placement of layers that are as even as possible."""
    return "balanced" if num_layers % num_stages else "even"


def _differences(choice: Choice, other: Choice) -> int:
    """Return in how many things two choices differ, see `neighbours`."""
    splits, moves = choice.degrees != other.degrees, choice.vocab != other.vocab
    schedules = choice.schedule != other.schedule or (
        choice.num_chunks != other.num_chunks and not splits
    )
    places = choice.redistributes != other.redistributes and not moves
    if other.degrees.pp == 1 and (splits or choice.degrees.pp == 1):
        moves = schedules = places = False
    return (
        splits
        + moves
        + (choice.micro_batch_size != other.micro_batch_size)
        + schedules
        + places
        + (
            choice.recompute != other.recompute
            or choice.recomputes_partly != other.recomputes_partly
        )
        + (choice.sequence_parallel != other.sequence_parallel and not splits)
    )


def splits_of(config: RunConfig) -> list[Degrees]:
    """Return every split of all GPUs into dp x pp x tp with tensor parallelism inside nodes."""
    cluster = config.cluster
    return [
        Degrees(cluster.num_gpus // tp // pp, pp, tp)
        for tp in _divisors(cluster.gpus_per_node)
        for pp in _divisors(cluster.num_gpus // tp)
    ]


def _reason_against(config: RunConfig, degrees: Degrees) -> str | None:
    """Return the constraint that rules out a split for every batch and schedule, if one does."""
    if degrees.pp > config.model.num_layers:
        return f"model.num_layers={config.model.num_layers}, which pp cannot exceed"
    try:
        check_tensor_split(config.model, degrees.tp)
    except ConfigError as error:
        return str(error)
    return None


def replicas_of(config: RunConfig) -> list[int]:
    """Return the degrees dp that some split has which the model allows, the smallest first."""
    return sorted(
        {split.dp for split in splits_of(config) if _reason_against(config, split) is None}
    )


def _divisors(count: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(count) + 1) if count % divisor == 0]
    return sorted({*small, *(count // divisor for divisor in small)})


def _variants(config: RunConfig, degrees: Degrees, kept: Kept = ALL) -> Iterator[Choice]:
    """Yield the choices for one split, as if each step had one microbatch of one sequence.

    They include values that are tried only because they are `kept`.  One rank gives every layer a
    stage of its own where only some recompute or offloading is kept; else that changes nothing.
    """
    pp, tp, model = degrees.pp, degrees.tp, config.model
    splits_sequences = config.run.device in SEQUENCE_DEVICES and model.seq_length % tp == 0
    both = (True, False) if tp > 1 and splits_sequences else (False,)
    schedules = kept.with_value("schedule.name", searched_schedules())
    algorithms = kept.with_value("vocab.algorithm", searched_algorithms())
    offload = kept.values.get("parallel.offload_activations", 0.0)
    balance = kept.values.get("vocab.balance", False)
    for schedule, vocab in product(schedules, algorithms) if pp > 1 else _OF_ONE_RANK:
        moves = pp > 1 and not VOCAB_ALGORITHMS[vocab].sharded
        for redistributes in (False, True) if moves else (False,):
            for num_chunks in _chunks(schedule, pp, model, kept, redistributes=redistributes):
                num_stages = GENERATORS[schedule].layout_of(pp, num_chunks).num_stages
                even = _even(model.num_layers, num_stages)
                kinds = [
                    (recompute, needed)
                    for recompute in RECOMPUTE
                    for needed in _where_needed(recompute, num_stages)
                    if needed or pp > 1 or num_stages == 1 or offload
                ]
                for (recompute, needed), sequences in product(kinds, both):
                    yield Choice(
                        degrees,
                        micro_batch_size=1,
                        num_microbatches=1,
                        schedule=schedule,
                        vocab=vocab,
                        recompute=recompute,
                        num_chunks=num_chunks,
                        placement="redistribute" if redistributes else even,
                        sequence_parallel=sequences,
                        recompute_where_needed=needed,
                        offload=offload,
                        balance=balance,
                    )


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
    even = _even(config.model.num_layers, layout.num_stages)
    placement = config.parallel.placement
    choice = replace(
        choice_of(config, degrees),
        num_microbatches=count,
        num_chunks=layout.num_chunks if layout.name == "loop" else None,
        placement=placement if placement == "redistribute" else even,
    )
    return replace(choice, vocab="none", balance=False) if degrees.pp == 1 else choice


def _chunks(
    schedule: str, pp: int, model: ModelConfig, kept: Kept = ALL, *, redistributes: bool = False
) -> Iterable[int | None]:
    """Return the stages per rank to try; every stage has a layer, but see `counts_of_chunks`."""
    family = GENERATORS[schedule]
    if family.layout != "loop":
        return (None,) if family.layout_of(pp).num_stages <= model.num_layers else ()
    if pp == 1:
        return (model.num_layers,) if model.num_layers > 1 else ()
    head = shape.head_in_layers(model) if redistributes else None
    counts = counts_of_chunks(pp, model.num_layers, head)
    wanted = kept.values.get("schedule.num_chunks")
    if wanted is None or not 2 <= wanted <= most_chunks(pp, model.num_layers):
        return counts
    return sorted({*counts, wanted})


@cache
def counts_of_chunks(pp: int, num_layers: int, head_in_layers: float | None) -> tuple[int, ...]:
    """Return the numbers of stages per rank that are worth a try, from 2 on.

    With smaller stages the pipeline fills and drains faster, and with more stages more is sent.  So
    a number is tried where the largest stage is smaller than with all lower ones, or where the
    layers divide by the stages.  `head_in_layers` is that of `redistribute`, None where it does not
    move any.

    Every stage has a layer.  Where it has only one, up to two stages may have none: the 126 layers
    of Llama 3 405B ran in 16 x 8 stages.
    """
    found, largest = list[int](), num_layers + 1
    for count in range(2, most_chunks(pp, num_layers) + 1):
        num_stages = pp * count
        most = (
            -(-num_layers // num_stages)
            if head_in_layers is None
            else max(redistribute(num_layers, Layout("loop", pp, count), head_in_layers))
        )
        if most < largest or num_layers % num_stages == 0:
            found.append(count)
        largest = min(largest, most)
    return tuple(found)


def most_chunks(pp: int, num_layers: int) -> int:
    """Return the most stages of a rank that a search tries with `pp` ranks."""
    return min(-(-num_layers // pp), (num_layers + _MOST_EMPTY) // pp)


def with_batch_of(config: RunConfig, num_tokens: int, multiple: int = 1) -> RunConfig:
    """Return `config` with a batch of about so many tokens, a `multiple` of so many sequences.

    Where these do not divide the tokens, it is of the counts within 5 % that a power of two divides
    best, because dp must divide the batch.
    """
    length = config.model.seq_length
    if num_tokens < length:
        raise ConfigError(
            f"--tokens {num_tokens} is less than one sequence of model.seq_length={length:,}; "
            f"write for example --tokens {8 * length}, or lower model.seq_length"
        )
    exact, rest = divmod(num_tokens, length * multiple)
    if rest:
        wanted = num_tokens / length / multiple
        near = range(math.ceil(0.95 * wanted), int(1.05 * wanted) + 1)
        exact = max(
            near or (max(1, exact),), key=lambda count: (count & -count, -abs(count - wanted))
        )
    exact *= multiple
    parallel = replace(config.parallel, dp=None, pp=None, tp=1)
    try:
        return replace(config, num_microbatches=exact, micro_batch_size=1, parallel=parallel)
    except ConfigError:
        raise ConfigError(
            f"--tokens {num_tokens} is {exact:,} sequences of model.seq_length={length:,}, more "
            "than a step can have; use fewer tokens"
        ) from None


def fitting_batches(config: RunConfig) -> tuple[list[int], list[int]]:
    """Return the batches nearest to that of `config`, and the numbers of nodes, that have a split.

    Batches are in sequences, and one below comes first, if there is any.  Nodes are at most those
    of the cluster.
    """
    batch, replicas, cluster = batch_of(config), replicas_of(config), config.cluster
    below = max((batch // dp * dp for dp in replicas), default=0)
    above = min(-(-batch // dp) * dp for dp in replicas)
    per_node, num_layers = cluster.gpus_per_node, config.model.num_layers
    gpus = {
        dp * pp * tp
        for tp in _divisors(per_node)
        if _reason_against(config, Degrees(1, 1, tp)) is None
        for dp in _divisors(batch)
        for pp in range(1, num_layers + 1)
    }
    counts = [one // per_node for one in gpus if one % per_node == 0]
    fewer = max((count for count in counts if count <= cluster.num_nodes), default=None)
    return [size for size in (below, above) if size], [] if fewer is None else [fewer]


def optimizers_of(config: RunConfig, dp: int) -> list[OptimConfig]:
    """Return the ways to keep the state of AdamW: in every replica, sharded, and in host memory."""
    typed = config.optim
    whole = replace(typed, name="adamw", offload=False)
    sharded = replace(typed, name="zero1", offload=False)
    kept = [sharded, whole] if dp > 1 else [whole if typed.offload else typed]
    if config.run.device != "cuda":
        return kept
    return [*kept, replace(typed, name="zero1", offload=True)]
