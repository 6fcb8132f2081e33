"""What a choice of `vp-plan --search` costs at least: bytes and seconds, without a simulation.

`Scales.weigh` is arithmetic over a few numbers and takes microseconds.  `Scales.draft` computes the
costs of all passes and takes milliseconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate

from schedules.bound import step_bound
from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.generators.auto import Watch
from schedules.generators.weave import waits_for_weights
from schedules.ir import Kind, Schedule
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.simulate import simulate_order
from schedules.timeline import Timeline
from schedules.vocab import VOCAB_ALGORITHMS, End, VocabAlgorithm, searched_algorithms
from vp_train.config import ConfigError, CostConfig, OptimConfig, RunConfig
from vp_train.model import shape
from vp_train.planning.choice import Choice, optimizers_of
from vp_train.planning.cluster import (
    ReplicaSeconds,
    gradient_seconds,
    hideable_seconds,
    on_cluster,
    tied_seconds,
    with_margin,
)
from vp_train.planning.degrees import Degrees
from vp_train.planning.estimate import estimate_cost
from vp_train.planning.memory import (
    host_optimizer_bytes,
    nodes_of,
    rank_state,
    state_of,
    total_bytes,
)
from vp_train.planning.overlap import exchange
from vp_train.planning.peaks import (
    Peak,
    Waits,
    at_peak,
    enough_microbatches,
    peaks_of,
)
from vp_train.planning.placement import balance, offloaded_layers, redistribute, split_vocabulary
from vp_train.planning.plan import (
    Draft,
    StepPlan,
    draft,
    draft_step,
    named_base_order,
    plan_step,
)
from vp_train.planning.report import optimizer_seconds
from vp_train.planning.some_recompute import Savings, SomeRecompute
from vp_train.planning.workload import Workload
from vp_train.units import human_bytes

_MOST_RANKS = 16  # of which the memory is looked at one by one
# Where the backward is whole, the base order says well what a step needs (where it is split, W may
# follow sooner): an optimizer may still fit with so many times the limit, and what would need so
# many times is refused without a simulation.
_ABOUT, _FAR_TOO_LARGE = 1.05, 2
# The part of the exchange of replicas which one microbatch alone leaves exposed that counts.  Of a
# whole step more may be hidden, so this is about the least: of 1,354 random choices on clusters
# with 1 to 8 ports in a node, 16 bounds were too high, by up to 1.5 %.
_SURE = 0.9
# Times the seconds that a step has for a microbatch, for which a link carries at most what is
# offloaded of it.
_LINK_TIME = 1.2
# What needs at most so many times the limit in a simulation almost fits.
NEARLY = 1.1
# Times what a link carries during the forwards, which counts before a simulation.  In 193 of the
# ranks of 100 random plans what was away from the device at the peak was once that in the median,
# and in one of 20 more than 1.9 times.
_BURST = 2.0
# Times the limit that the base order may need where W may follow sooner: such a choice is drafted,
# and simulated after what seems to fit.
_SOONER = 1.1
# What the base order needs is at most about so many times what a simulation says where W may follow
# sooner: of 60 steps that offload activations it was 1.25 times in one.
_FAR_SOONER = 1.3


@dataclass(frozen=True, slots=True)
class Weight:
    """The least seconds of a choice's step, and about the bytes of its worst rank.

    `optimizer` is the fastest that may fit.  `seems_to_fit` says whether with one of them about
    these bytes fit, and what goes to the hosts.
    """

    seconds: float
    needs: float
    optimizer: OptimConfig | None = None
    seems_to_fit: bool = True


class TooLargeError(ConfigError):
    """The error for a choice that needs more memory than there is.

    `needs` are the bytes of `rank`, the one that needs most, if it is known.  `constraint` says in
    words what they are for.
    """

    def __init__(self, needs: float, limit: float, what: str, rank: int | None = None) -> None:
        least = "" if what == SIMULATED else " at least"
        where = "" if rank is None else f" on rank {rank}"
        super().__init__(
            f"needs{least} {human_bytes(needs)}{where}, "
            f"{human_bytes(needs - limit)} more than the {limit / 2**30:.4g} GiB that a plan may "
            "use"
        )
        self.needs, self.rank, self.constraint = needs, rank, f"memory, for {what}"


class HostMemoryError(ConfigError):
    """The error for a choice that fits into GPUs, but needs more memory of a host than is known.

    `needs` are the bytes of a node at least.
    """

    def __init__(self, needs: float, limit: float) -> None:
        super().__init__(
            f"host memory, of which a node may use {limit / 2**30:,.6g} GiB "
            "(cluster.host_memory_gib)"
        )
        self.needs = needs


def check_hosts(needs: float, limit: float) -> None:
    """Raise HostMemoryError if a node needs more bytes of host memory than the limit."""
    if needs > limit:
        raise HostMemoryError(needs, limit)


STATE = "weights, gradients and optimizer state alone"
LEANEST = "state and the leanest activations"
EXPECTED = "state and the activations of the base order"
SIMULATED = "a whole step"


class SameChoiceError(ConfigError):
    """The error for a choice that another one is, too."""


def about_bytes(config: RunConfig) -> float:
    """Return about how many bytes the worst rank needs: those of `at_peak` and a held shard.

    A schedule that is searched for or read from a file counts as 1f1b.  Raises ConfigError.
    """
    name = (
        config.schedule.name
        if config.schedule.name in GENERATORS and config.schedule.file is None
        else "1f1b"
    )
    vocab = config.vocab.algorithm if config.vocab.algorithm != "auto" else searched_algorithms()[0]
    named = replace(
        config,
        schedule=replace(
            config.schedule, name=name, file=None, cap_gib=None, cap_microbatches=None
        ),
        vocab=replace(config.vocab, algorithm=vocab),
    )
    found = draft_step(named, config.cluster.num_gpus)
    minimum = at_peak(found, name, peaks_of(name, found.problem), holds=True)
    return max(total_bytes(minimum, [config.optim], rank)[0] for rank in range(minimum.num_ranks))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A choice with the costs of its passes, and lower bounds on its step.

    `passes` are the seconds of its passes at least, `seconds` those of the whole step.
    `optimizers` are those with which it may fit into memory.  With each of them a rank is
    `expected` to need so many bytes, and the step takes so many seconds `after` its passes at
    least.  `seems_to_fit` says whether it fits with what the base order keeps, which is more than
    the least, and `is_pressed` whether only an optimizer in host memory is likely to fit.
    """

    choice: Choice
    draft: Draft
    passes: float
    seconds: float
    optimizers: tuple[OptimConfig, ...]
    expected: tuple[float, ...]
    after: tuple[float, ...]
    seems_to_fit: bool
    is_pressed: bool = False

    @property
    def vocabulary_part(self) -> float:
        """The largest part of the passes that S and T of a rank take."""
        seconds = self.draft.cost.pass_seconds
        shards = map(sum, zip(seconds[Kind.S], seconds[Kind.T], strict=True))
        return max(shards) * self.choice.num_microbatches / self.passes

    def seconds_within(self, limit: float) -> float:
        """Return the least seconds with an optimizer of at most `limit` expected bytes, or inf."""
        fitting = [
            after for after, needs in zip(self.after, self.expected, strict=True) if needs <= limit
        ]
        return self.passes + min(fitting, default=math.inf)


def _on_device(choice: Choice) -> int:
    """Return about how many microbatches of a stage that offloads are on the device at once.

    One runs backward, and one is on its way to the host.  Of several stages one more comes back.
    """
    return 2 if choice.layout.num_chunks == 1 else 3


def _looked_at(step: Draft | StepPlan) -> list[int]:
    """Return the ranks whose memory is looked at: of many the ends, the middle, and the largest.

    Where stages recompute differently, also the first of the ranks in a row whose stages do alike:
    it has more microbatches in flight than those behind it.
    """
    layout = step.problem.layout
    ranks = range(layout.num_ranks)
    if len(ranks) <= _MOST_RANKS:
        return list(ranks)
    layers = [sum(len(step.layers[stage]) for stage in layout.stages_of(rank)) for rank in ranks]
    kinds = [[step.recompute[stage] for stage in layout.stages_of(rank)] for rank in ranks]
    firsts = {rank for rank in ranks[1:] if kinds[rank] != kinds[rank - 1]}
    return sorted({0, max(ranks, key=layers.__getitem__), len(ranks) // 2, ranks[-1], *firsts})


class Scales:
    """Weighs the choices for one configuration.  What they share is computed once.

    limit: the bytes that a rank may need.
    optimizers: those to choose from, None for all.
    margin: the part of host memory that stays free.
    """

    def __init__(
        self,
        config: RunConfig,
        limit: float,
        optimizers: tuple[OptimConfig, ...] | None = None,
        margin: float = 0.0,
    ) -> None:
        self.limit = limit
        self.host_limit = with_margin(config.cluster, margin).host_limit
        self._only = optimizers
        self._config = config
        self._optimizers: dict[int, list[OptimConfig]] = {}
        self._splits: dict[tuple[Degrees, int, bool], _Split] = {}
        self._placed: dict[tuple[str, Layout], _Placed] = {}
        self._peaks: dict[tuple[str, Layout, int, int], tuple[Peak, ...]] = {}
        self._after: dict[tuple[Degrees, OptimConfig, int], tuple[float, ReplicaSeconds]] = {}
        self._bounds: dict[tuple[object, ...], float] = {}
        self._orders_alone: dict[tuple[str, Problem], Schedule] = {}

    def with_optimizers(self, optimizers: tuple[OptimConfig, ...] | None) -> Scales:
        """Return scales with other optimizers, which share what does not depend on them."""
        other = copy(self)
        other._only, other._optimizers = optimizers, {}
        return other

    def check(self, choices: Iterable[Choice]) -> None:
        """Check the base order of every schedule once.  Raises ConfigError, which names it."""
        smallest: dict[str, Choice] = {}
        for choice in choices:
            known = smallest.setdefault(choice.schedule, choice)
            if choice.degrees.pp < known.degrees.pp:
                smallest[choice.schedule] = choice
        for name, choice in smallest.items():
            count = min(choice.num_microbatches, 2 * choice.degrees.pp)
            algorithm = VOCAB_ALGORITHMS[choice.vocab]
            split_backward = GENERATORS[name].split_backward
            named_base_order(name, Problem(choice.layout, count, algorithm, split_backward))

    def weigh(self, choice: Choice) -> Weight:
        """Return the weight of a choice.  Raises ConfigError if it cannot be run."""
        split, placed = self._split_of(choice), self._placed_of(choice)
        layout = placed.layout
        family, algorithm = GENERATORS[choice.schedule], VOCAB_ALGORITHMS[choice.vocab]
        # Memory of rank 0, which holds most microbatches.
        parameters = split.parameters(placed.of_rank[0], 0, layout, algorithm)
        states = [
            (state_of(split.work, optim, parameters).state, optim)
            for optim in self._optimizers_of(choice)
        ]
        least_state = min(state for state, _ in states)
        if least_state > self.limit:
            raise TooLargeError(least_state, self.limit, STATE)
        kept, expected = self._kept_bytes(choice, split, placed)
        fitting = [(state, optim) for state, optim in states if state + kept <= self.limit]
        if not fitting:
            raise TooLargeError(least_state + kept, self.limit, LEANEST)
        # An optimizer in host memory, of which every node has an equal part at best.
        if all(optim.offload for _, optim in fitting):
            check_hosts(split.host_state, self.host_limit)
        if split.host_state > self.host_limit:
            fitting = [(state, optim) for state, optim in fitting if not optim.offload]
        moved = self._moved_bytes(choice, split, placed)
        likely = [
            (state, optim)
            for state, optim in fitting
            if (family.split_backward or state + expected <= _ABOUT * self.limit)
            and moved + split.host_state * optim.offload <= self.host_limit
        ]
        room = (_SOONER if family.split_backward else 1.0) * self.limit
        seems_to_fit = any(state + expected <= room for state, _ in likely)
        fitting = likely or fitting
        forward, backward, sent_back = self._layer_of(choice)
        of_layer = shape.layer_parameters(split.work.share) / parameters
        of_rows = split.row_parameters(layout, algorithm) / parameters
        after = [
            least + _SURE * placed.exposed(whole, of_layer, of_rows, forward, backward, sent_back)
            for least, whole in (
                self._after_of(split.work, optim, parameters) for _, optim in fitting
            )
        ]
        fastest = min(range(len(after)), key=after.__getitem__)
        _, optim = fitting[fastest]
        seconds = self.bound(choice) + after[fastest]
        return Weight(seconds, least_state + expected, optim, seems_to_fit)

    def bound(self, choice: Choice) -> float:
        """Return the least seconds of the passes of a choice, whatever memory they need.

        A rank waits for the first stages to fill the pipeline, and what it sends back drains
        through them.  Meanwhile it may run W and T, which nobody waits for.
        """
        split, placed = self._split_of(choice), self._placed_of(choice)
        count = choice.num_microbatches
        layout, algorithm = placed.layout, VOCAB_ALGORITHMS[choice.vocab]
        forward, backward, sent_back = self._layer_of(choice)
        shards = split.shard_seconds(choice.vocab)
        root, bound = layout.rank_of(layout.num_stages - 1), 0.0
        for rank in placed.slowest:
            layers, before = placed.of_rank[rank], placed.before[rank]
            s, t = shards[rank if algorithm.sharded else -1]
            if not algorithm.sharded and rank != root:
                s = t = 0.0
            fill, drain = before * forward, before * sent_back
            bound = max(
                bound,
                fill + count * (layers * (forward + backward) + s + t),
                fill + count * (layers * (forward + sent_back) + s) + drain,
            )
        return bound

    def _layer_of(self, choice: Choice) -> tuple[float, float, float]:
        """Return the least seconds of a layer of a choice, see `_Split.layer`."""
        recompute = "none" if choice.recompute_where_needed else choice.recompute
        splits = GENERATORS[choice.schedule].split_backward
        return self._split_of(choice).layer(recompute, splits)

    def _moved_bytes(self, choice: Choice, split: _Split, placed: _Placed) -> float:
        """Return about the bytes of activations that the host of a node keeps at most."""
        if not choice.offload:
            return 0.0
        layout = placed.layout
        of_stage = [
            split.layer_bytes(kind)[0] * offloaded_layers(layers, choice.offload)
            for kind, layers in zip(choice.recompute_of_stages, placed.counts, strict=True)
        ]
        of_rank = [
            sum(
                of_stage[stage] * count
                for stage, count in zip(layout.stages_of(rank), peak.counts, strict=True)
            )
            for rank, peak in enumerate(self._peaks_of(choice, layout))
        ]
        return max(sum(n * of_rank[rank] for rank, n in node.items()) for node in split.nodes)

    def leanest(self, choice: Choice) -> float:
        """Return the bytes of state and of the leanest activations, where they may be too many."""
        split, placed = self._split_of(choice), self._placed_of(choice)
        algorithm = VOCAB_ALGORITHMS[choice.vocab]
        parameters = split.parameters(placed.of_rank[0], 0, placed.layout, algorithm)
        states = [state_of(split.work, optim, parameters).state for optim in self._held_of(choice)]
        return min(states) + self._kept_bytes(choice, split, placed)[0]

    def leanest_optimizer(self, choice: Choice) -> OptimConfig:
        """Return the optimizer that `leanest` counts."""
        work = self._split_of(choice).work
        return min(self._held_of(choice), key=lambda optim: state_of(work, optim, 1).state)

    def _held_of(self, choice: Choice) -> list[OptimConfig]:
        """Return the optimizers of a choice that hosts can hold, all if they can hold none."""
        optimizers = self._optimizers_of(choice)
        return self._held_by_hosts(choice, optimizers) or optimizers

    def _kept_bytes(self, choice: Choice, split: _Split, placed: _Placed) -> tuple[float, float]:
        """Return the least bytes of activations that rank 0 keeps, and those of the base order."""
        peak = self._peaks_of(choice, placed.layout)[0]
        of_layer, for_weights = split.layer_bytes(choice.recompute)
        splits = GENERATORS[choice.schedule].split_backward
        one_waits = splits and waits_for_weights(of_layer, for_weights)
        flying = peak.counts if one_waits else peak.kept
        least = at_most = waiting = 0.0
        for chunk, stage in enumerate(placed.layout.stages_of(0)):
            layers = placed.counts[stage]
            moved = offloaded_layers(layers, choice.offload)
            # The forwards of the warm-up come in a burst, of which the link carries a part.
            carried = min(moved, layers * split.carried(choice.recompute)) if moved else 0.0
            kept = (layers - carried) * of_layer
            if one_waits:
                waiting = max(waiting, 2 * layers * for_weights)  # beside the next one
            elif splits:  # nothing that waits for its W moves, and all of them may wait
                kept = max(kept, layers * for_weights)
            least += (layers - moved) * of_layer * peak.counts[chunk]
            at_most += kept * flying[chunk]
        return least, at_most + waiting

    def _optimizers_of(self, choice: Choice) -> list[OptimConfig]:
        dp = choice.degrees.dp
        if dp not in self._optimizers:
            self._optimizers[dp] = list(self._only or optimizers_of(self._config, dp))
        return self._optimizers[dp]

    def _held_by_hosts(self, choice: Choice, optimizers: list[OptimConfig]) -> list[OptimConfig]:
        """Return those of the optimizers whose state fits into host memory, at best."""
        if self._split_of(choice).host_state <= self.host_limit:
            return optimizers
        return [optim for optim in optimizers if not optim.offload]

    def draft(self, choice: Choice) -> Candidate:
        """Return the choice with the costs of its passes and tighter bounds.

        Raises ConfigError if it cannot be run, and TooLargeError if its memory does not suffice.
        """
        optimizers = self._optimizers_of(choice)
        if not choice.recompute_where_needed:
            return self._drafted(choice, optimizers)
        # An optimizer that needs less memory leaves fewer stages to recompute.
        found, refusal = list[Candidate](), None
        for mixed, some in self._where_needed(choice, self._held_of(choice)).items():
            try:
                found.append(self._drafted(mixed, some))
            except TooLargeError as error:
                refusal = min(refusal or error, error, key=lambda error: error.needs)
        if not found:
            assert refusal is not None
            raise refusal
        return min(found, key=lambda candidate: (not candidate.seems_to_fit, candidate.seconds))

    def _drafted(self, choice: Choice, optimizers: Sequence[OptimConfig]) -> Candidate:
        """Return the choice as `draft` does, with those of the optimizers that may fit."""
        drafted = self._draft(choice)
        peaks, ranks = self._peaks_of(choice, choice.layout), _looked_at(drafted)
        passes = self._bound_of(choice, drafted)
        kept = drafted.with_carried(_LINK_TIME * passes / choice.num_microbatches)
        minimum = at_peak(kept, choice.schedule, peaks, ranks=ranks)
        needs = list(zip(optimizers, self.needs(minimum, optimizers), strict=True))
        fitting = tuple(optim for optim, (num_bytes, _) in needs if num_bytes <= self.limit)
        if not fitting:
            optim, (least, rank) = min(needs, key=lambda one: one[1])
            is_state = rank_state(minimum, optim, rank).state > self.limit
            raise TooLargeError(least, self.limit, STATE if is_state else LEANEST, rank)
        moving = _on_device(choice) * max(drafted.cost.offload_bytes, default=0.0)
        splits, whole = GENERATORS[choice.schedule].split_backward, drafted.cost
        one = splits and waits_for_weights(sum(whole.stage_bytes), sum(whole.weight_bytes))
        waits: Waits = "one" if one else "all"
        peak = at_peak(kept, choice.schedule, peaks, waits=waits, holds=True, ranks=ranks)
        expected = [num_bytes + moving for num_bytes, _ in self.needs(peak, fitting)]
        if not splits and min(expected) > _FAR_TOO_LARGE * self.limit:
            raise TooLargeError(min(expected) / _FAR_TOO_LARGE, self.limit, EXPECTED)
        seems_to_fit = min(expected) <= self.limit
        likely = [
            place
            for place, num_bytes in enumerate(expected)
            if num_bytes <= (_FAR_SOONER if splits else _ABOUT) * self.limit
        ]
        likely = likely or list(range(len(fitting)))
        # How late gradients come and how early parameters are read, one microbatch alone says.
        alone = minimum
        if choice.degrees.dp > 1:
            alone = replace(minimum, timeline=self._alone(choice.schedule, drafted))
        after = [self.after(alone, optim, _SURE) for optim in fitting]
        if choice.offload:  # what the link cannot carry and what hosts hold, only the weight says
            seems_to_fit = seems_to_fit and self.weigh(choice).seems_to_fit
        is_pressed = all(fitting[place].offload for place in likely)
        return Candidate(
            choice=choice,
            draft=drafted,
            passes=passes,
            seconds=passes + min(after[place] for place in likely),
            optimizers=fitting,
            expected=tuple(expected),
            after=tuple(after),
            seems_to_fit=seems_to_fit,
            is_pressed=is_pressed,
        )

    def after(self, step: StepPlan, optim: OptimConfig, part: float = 1.0) -> float:
        """Return the seconds of a step after its passes; `part` counts of what is exposed."""
        states = [rank_state(step, optim, rank) for rank in range(step.num_ranks)]
        cluster, counts = self._config.cluster, [state.parameters for state in states]
        updates = [optimizer_seconds(step.degrees, cluster, optim, state) for state in states]
        exposed = max(
            part * exchange(step, cluster, optim, counts, updates).exposed,
            gradient_seconds(step.work, cluster, optim, max(counts)),
        )
        return exposed + tied_seconds(step.work, cluster, optim, step.problem) + max(updates)

    def cost_of(self, choice: Choice) -> CostConfig:
        """Return the measured or assumed costs of the split of a choice."""
        return self._split_of(choice).cost

    def ordered(self, choice: Choice, watch: Watch) -> StepPlan:
        """Return the step of a choice in the order that schedule=auto finds under its cap.

        `watch` may end its search.  Raises ConfigError if it finds none.
        """
        return plan_step(choice.applied(self._config), self._config.cluster.num_gpus, watch)

    def _draft(self, choice: Choice) -> Draft:
        split, family = self._split_of(choice), GENERATORS[choice.schedule]
        vocab = choice.vocabulary(split.work.vocab)
        work = replace(split.work, num_microbatches=choice.num_microbatches, vocab=vocab)
        return draft(
            work,
            split.cost,
            choice.parallel(self._config.parallel),
            choice.layout,
            VOCAB_ALGORITHMS[choice.vocab],
            split_backward=family.split_backward,
        )

    def needs(self, step: StepPlan, optimizers: Sequence[OptimConfig]) -> list[tuple[float, int]]:
        """Return the most bytes of a rank for each optimizer, and that rank; of many try a few."""
        ranks = _looked_at(step)
        found = [total_bytes(step, optimizers, rank) for rank in ranks]
        return [max(zip(of_ranks, ranks, strict=True)) for of_ranks in zip(*found, strict=True)]

    def _alone(self, name: str, draft: Draft) -> Timeline:
        """Return the timeline of one microbatch alone.

        Its forward and its backward run through all stages without a pause, about as those of the
        first and of the last microbatch of a step do.  Where the backward is whole, only T, E and G
        may change places, so one order is made for all costs.
        """
        one, cost = replace(draft.problem, num_microbatches=1), draft.cost
        if one.split_backward:
            return simulate_order(generate(name, one, cost, effort=1), one, cost)
        if (name, one) not in self._orders_alone:
            num_stages = one.layout.num_stages
            same = CostModel({Kind.F: (1.0,) * num_stages, Kind.B: (2.0,) * num_stages})
            self._orders_alone[name, one] = generate(name, one, same, effort=1)
        return simulate_order(self._orders_alone[name, one], one, cost)

    def _bound_of(self, choice: Choice, drafted: Draft) -> float:
        """Return the lower bound of the passes, which several schedules share."""
        key = (
            replace(choice, schedule="", num_chunks=None, optimizer=None),
            drafted.problem.layout,
            drafted.problem.split_backward,
        )
        if key not in self._bounds:
            self._bounds[key] = step_bound(drafted.problem, drafted.cost).seconds
        return self._bounds[key]

    def _where_needed(
        self, choice: Choice, optimizers: Sequence[OptimConfig]
    ) -> dict[Choice, Sequence[OptimConfig]]:
        """Return the choices with recomputation in as few stages as memory needs.

        Each comes with the optimizers to try.  Raises ConfigError if all or none of the stages
        recompute, because that is another choice.
        """
        everywhere = replace(choice, recompute_where_needed=False)
        # The first optimizer is the leanest of those on the GPU, the last one of all.
        first, last = optimizers[0], optimizers[-1]
        some = SomeRecompute.of(
            choice.schedule,
            *self._without_and_saving(everywhere),
            self._peaks_of(choice, choice.layout),
            (first, last),
        )
        found: dict[Choice, Sequence[OptimConfig]] = {}
        kinds = some.where_needed(first, self.limit)
        if len(set(kinds)) > 1:
            found[replace(everywhere, recompute_per_stage=kinds)] = optimizers
        if last.offload and choice.recompute in kinds:
            kinds = some.where_needed(last, self.limit)
            if len(set(kinds)) > 1:
                found.setdefault(replace(everywhere, recompute_per_stage=kinds), (last,))
        if not found:
            raise SameChoiceError(f"all stages recompute {kinds[0]}")
        return found

    def _without_and_saving(self, everywhere: Choice) -> tuple[Draft, Draft]:
        """Return drafts in which no stage recomputes, and all do as a choice says."""
        without = self._draft(replace(everywhere, recompute="none"))
        return without.with_carried(), self._draft(everywhere).with_carried()

    def with_more_recompute(self, candidate: Candidate, step: StepPlan) -> Candidate | None:
        """Return a candidate of which more stages recompute on the ranks without enough memory.

        None if all of its stages recompute, if no more may, or if only hosts lack memory; also if
        it needs far more than there is, unless some stages recompute beside offloading: what a link
        to the host carries, only a simulation says.  Where no stage recomputes, the first ones
        recompute selectively.  Raises TooLargeError like `draft`.

        step: one of the candidate that was simulated, for what ranks need with the optimizer that
        leaves most memory.
        """
        choice, kinds = candidate.choice, candidate.choice.recompute_per_stage
        if kinds is None and choice.recompute != "none":
            return None
        if kinds is None:
            kinds = ("none",) * choice.layout.num_stages
            choice = replace(choice, recompute="selective")
        ranks = range(step.num_ranks)
        needs = zip(*(total_bytes(step, candidate.optimizers, rank) for rank in ranks), strict=True)
        least = min(needs, key=max)
        excess = {
            rank: num_bytes - self.limit
            for rank, num_bytes in enumerate(least)
            if num_bytes > self.limit
        }
        moves = choice.offload and candidate.choice.recompute_per_stage is not None
        if not excess or not (moves or max(least) <= NEARLY * self.limit):
            return None
        kinds = self._savings_of(choice).with_more(kinds, excess)
        if kinds is None or len(set(kinds)) == 1:
            return None
        return self._drafted(replace(choice, recompute_per_stage=kinds), candidate.optimizers)

    def with_fewer_recompute(
        self, candidate: Candidate, step: StepPlan, optim: OptimConfig
    ) -> Candidate | None:
        """Return a candidate of which fewer stages recompute on the ranks with memory to spare.

        None if the candidate does not have some that recompute and some that do not, or if no fewer
        may.  Raises TooLargeError like `draft`.

        step: that of the candidate, which fits with `optim`.
        """
        choice = candidate.choice
        if choice.recompute_per_stage is None:
            return None
        spare = {
            rank: self.limit - total_bytes(step, [optim], rank)[0] for rank in range(step.num_ranks)
        }
        savings, tries = self._savings_of(choice), choice.offload > 0
        kinds = savings.with_fewer(choice.recompute_per_stage, spare, tries=tries)
        if kinds == choice.recompute_per_stage or len(set(kinds)) == 1:
            return None
        return self._drafted(replace(choice, recompute_per_stage=kinds), candidate.optimizers)

    def _savings_of(self, choice: Choice) -> Savings:
        """Return what every stage of a choice saves if it recomputes as the choice says."""
        drafts = self._without_and_saving(replace(choice, recompute_per_stage=None))
        return Savings.of(*drafts, self._peaks_of(choice, choice.layout))

    def _peaks_of(self, choice: Choice, layout: Layout) -> tuple[Peak, ...]:
        count = enough_microbatches(choice.schedule, choice.num_microbatches, layout)
        algorithm = VOCAB_ALGORITHMS[choice.vocab]
        key = (choice.schedule, layout, algorithm.extra_in_flight, count)
        if key not in self._peaks:
            split_backward = GENERATORS[choice.schedule].split_backward
            problem = Problem(layout, count, algorithm, split_backward)
            self._peaks[key] = peaks_of(choice.schedule, problem, check=False)
        return self._peaks[key]

    def _split_of(self, choice: Choice) -> _Split:
        key = (choice.degrees, choice.micro_batch_size, choice.sequence_parallel)
        if key not in self._splits:
            self._splits[key] = _Split(choice.applied(self._config), choice.degrees)
        return self._splits[key]

    def _placed_of(self, choice: Choice) -> _Placed:
        layout = choice.layout
        key = (choice.placement, layout)
        if key not in self._placed:
            self._placed[key] = _Placed.of(self._config, choice.placement, layout)
        return self._placed[key]

    def _after_of(
        self, work: Workload, optim: OptimConfig, parameters: int
    ) -> tuple[float, ReplicaSeconds]:
        """Return the least seconds of a step after its passes, if a rank has `parameters`.

        Beside them what passes may hide of the exchange between replicas.
        """
        key = (work.degrees, optim, parameters)
        if key not in self._after:
            cluster = self._config.cluster
            held = state_of(work, optim, parameters)
            least = gradient_seconds(work, cluster, optim, parameters)
            least += optimizer_seconds(work.degrees, cluster, optim, held)
            self._after[key] = least, hideable_seconds(work, cluster, optim, parameters)
        return self._after[key]


@dataclass(frozen=True, slots=True)
class _Placed:
    """Layers per stage and per rank, and those before the first stage of each rank.

    slowest: the ranks that bound the time of a step: the ends, and the last with most layers.
    first: of every stage of rank 0 its layers, and those of the stages before.
    """

    layout: Layout
    counts: tuple[int, ...]
    of_rank: tuple[int, ...]
    before: tuple[int, ...]
    slowest: tuple[int, ...]
    first: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, config: RunConfig, placement: str, layout: Layout) -> _Placed:
        model = config.model
        counts = (
            redistribute(model.num_layers, layout, shape.head_in_layers(model))
            if placement == "redistribute"
            else balance(model.num_layers, layout)
        )
        ranks = range(layout.num_ranks)
        of_rank = tuple(sum(counts[stage] for stage in layout.stages_of(rank)) for rank in ranks)
        ahead = tuple(accumulate(counts, initial=0))
        most = max(reversed(ranks), key=of_rank.__getitem__)
        slowest = tuple(sorted({0, most, ranks[-1]}))
        first = tuple((counts[stage], ahead[stage]) for stage in layout.stages_of(0))
        return cls(layout, counts, of_rank, ahead[: layout.num_ranks], slowest, first)

    def exposed(
        self,
        whole: ReplicaSeconds,
        of_layer: float,
        of_rows: float,
        forward: float,
        backward: float,
        sent_back: float,
    ) -> float:
        """Return about the seconds of the exchange that no pass of rank 0 hides.

        The first microbatch reads the parameters of a stage about as late, and the last one
        completes its gradients about as early before the end, as if it were alone.  Embedding rows
        come before the first stage, and those of the output layer after the last one.

        whole: the seconds of the exchange of rank 0 that passes may hide.
        of_layer, of_rows: the part of them for a layer, and for the rows of the embedding.
        forward, backward, sent_back: the seconds of a layer, see `_Split.layer`.
        """
        sums, gathers, part = of_rows * whole.sums, of_rows * whole.gathers, of_rows
        for layers, ahead in self.first:
            part += of_layer * layers
            sums = max(sums, part * whole.sums - layers * backward - ahead * sent_back)
            gathers = max(gathers, part * whole.gathers - (layers + ahead) * forward)
        num_layers = sum(self.counts)
        sums = max(sums, whole.sums - num_layers * sent_back)
        gathers = max(gathers, whole.gathers - num_layers * forward)
        return sums + gathers


class _Split:
    """What the choices with one split, micro-batch size and sequence parallelism share."""

    def __init__(self, config: RunConfig, degrees: Degrees) -> None:
        self.work = Workload.of(config, degrees)
        self.cost: CostConfig = on_cluster(self.work, config.cluster, config.cost)
        # The optimizer's bytes on each of the hosts, and how often a node has a pipeline rank.
        state = host_optimizer_bytes(self.work, shape.num_parameters(config.model))
        self.host_state = state / config.cluster.num_nodes
        self.nodes = [
            Counter(degrees.place(rank)[1] for rank in node)
            for node in nodes_of(degrees, config.cluster.gpus_per_node)
        ]
        self._layers: dict[str, dict[Kind, float]] = {}
        self._layer_bytes: dict[str, tuple[int, int]] = {}
        self._shards: dict[str, list[tuple[float, float]]] = {}

    def layer(self, recompute: str, split_backward: bool) -> tuple[float, float, float]:
        """Return the seconds of a layer: F, all of its backward, and what the next stage awaits."""
        if recompute not in self._layers:
            self._layers[recompute] = self._probe(recompute, "none")[0]
        seconds = self._layers[recompute]
        if split_backward:
            return seconds[Kind.F], seconds[Kind.I] + seconds[Kind.W], seconds[Kind.I]
        return seconds[Kind.F], seconds[Kind.B], seconds[Kind.B]

    def layer_bytes(self, recompute: str) -> tuple[int, int]:
        """Return the bytes that a layer keeps for one microbatch: from F on, and from I to W."""
        if recompute not in self._layer_bytes:
            work = self.work
            for_weights = shape.layer_weight_grad_bytes(
                work.share, work.micro_batch_size, work.item_bytes
            )
            self._layer_bytes[recompute] = work.layer_bytes(recompute), for_weights
        return self._layer_bytes[recompute]

    def carried(self, recompute: str) -> float:
        """Return about the largest part of what layers keep that goes to the host in a burst."""
        seconds, rate = self.layer(recompute, False)[0], self.cost.host_bytes_per_second
        num_bytes = self.layer_bytes(recompute)[0]
        return 1.0 if rate is None else min(1.0, _BURST * seconds * rate / num_bytes)

    def shard_seconds(self, vocab: str) -> list[tuple[float, float]]:
        """Return the seconds of S and T of every rank; the whole layer is on the last one."""
        if vocab not in self._shards:
            self._shards[vocab] = self._probe("none", vocab)[1]
        return self._shards[vocab]

    def parameters(
        self, num_layers: int, rank: int, layout: Layout, algorithm: VocabAlgorithm
    ) -> int:
        """Return the parameters of a rank at least, without small ones."""
        work = self.work
        ends = 2
        if not algorithm.sharded:
            ends = (rank == 0) + (rank == layout.rank_of(layout.num_stages - 1))
        if work.model.tied_embeddings:
            ends = min(ends, 1)
        rows = self.row_parameters(layout, algorithm)
        return num_layers * shape.layer_parameters(work.share) + ends * rows

    def row_parameters(self, layout: Layout, algorithm: VocabAlgorithm) -> int:
        """Return the parameters of the rows that a rank has of one end, if it has any."""
        rows = -(-self.work.model.vocab_size // self.work.degrees.tp)
        if algorithm.sharded:
            rows //= layout.num_ranks
        return rows * self.work.model.hidden_size

    def _probe(
        self, recompute: str, vocab: str
    ) -> tuple[dict[Kind, float], list[tuple[float, float]]]:
        """Return the seconds of a layer, and S and T of every rank, in a line of equal stages."""
        work, algorithm = self.work, VOCAB_ALGORITHMS[vocab]
        layout = Layout("linear", work.degrees.pp)
        problem = Problem(layout, 1, algorithm, split_backward=True)
        counts = balance(work.model.num_layers, layout)
        shards = {end: split_vocabulary(work, problem, end, None) for end in End}
        cost = estimate_cost(
            work,
            self.cost,
            problem,
            layers=[range(count) for count in counts],
            recompute=(recompute,) * layout.num_stages,
            shards=shards,
        )
        layer = {
            kind: min(
                seconds / count
                for seconds, count in zip(cost.pass_seconds[kind], counts, strict=True)
                if count
            )
            for kind in (Kind.F, Kind.B, Kind.I, Kind.W)
        }
        of_rank = list(zip(cost.pass_seconds[Kind.S], cost.pass_seconds[Kind.T], strict=True))
        return layer, of_rank
