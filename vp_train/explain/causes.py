"""Why a step took longer than planned: TracedStep -> Explanation.

The measured step is replayed with the seconds of every single pass and message in it, so the replay
ends when the step did.  Each question is then one more replay, with some of these seconds replaced:
from the planned ones to the measured ones for the causes, which add up, and back for what the step
would take without one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median, median_low

from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.ir import Kind, Pass
from schedules.lower import Action, Program, lower
from schedules.offload import place_transfers
from schedules.problem import Collective, Node
from schedules.replay import Times, replay, times_of
from vp_train.explain.trace import TracedRank, TracedStep
from vp_train.planning.placement import fill_with_rows

SLOW = 1.1  # a rank that computes this many times as long as the others is slow
_SHOWN = 0.005  # of the step: what saves less is not shown
_ALONE = 0.9  # of the time of passes: with less they shared their processors
_UNEVEN = 1.05  # the work of the busiest rank over the mean
_MOST_REPLICAS = 8  # that are replayed, those with the longest passes

Seconds = Mapping[Pass, float]


@dataclass(frozen=True, slots=True)
class Cause:
    """One step of the way from the planned time to the measured one.

    seconds: what it adds; the causes of an explanation add up to the measured time less the planned
    one.
    """

    name: str
    words: str
    seconds: float


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What the step would take without one cause, in seconds, by simulation."""

    name: str
    words: str
    seconds: float


@dataclass(frozen=True, slots=True)
class KindTimes:
    """The mean seconds of a pass of one kind, or of a message, planned and measured.

    source: where the planned ones come from: measured, flops or assumed.  measured: None if such
    messages were not timed.
    """

    name: str
    count: int
    source: str
    planned: float
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over planned; None if one of them is not known."""
        known = self.measured is not None and self.planned > 0
        return self.measured / self.planned if known and self.measured is not None else None


@dataclass(frozen=True, slots=True)
class RankTimes:
    """The seconds of one rank of the run in the step.

    slowness: how many times as long as the other ranks it computes for the same work.
    planned_waiting, measured_waiting, between: of the first replica's first tensor-parallel ranks,
    else None.  `between` is the time between passes in which nothing was waited for.
    """

    rank: int
    replica: int
    pipeline_rank: int
    tensor_rank: int
    host: str
    planned: float
    measured: float
    slowness: float
    planned_waiting: float | None = None
    measured_waiting: float | None = None
    between: float | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The causes of a step's time.

    replicas: seconds of the step of other replicas, by the times of their passes.
    on_processor: the part of the time of passes in which their rank had a processor; 1 if it is not
    known.
    own: by kind and stage or rank, the mean seconds of a pass while it had one.
    rows: vocabulary rows by rank that would make all ranks equally busy, if they are not.
    """

    step: TracedStep
    planned_seconds: float
    measured_seconds: float
    causes: tuple[Cause, ...]
    what_ifs: tuple[WhatIf, ...]
    kinds: tuple[KindTimes, ...]
    ranks: tuple[RankTimes, ...]
    replicas: Mapping[int, float]
    on_processor: float
    own: Mapping[Kind, tuple[float, ...]]
    rows: tuple[int, ...] | None = None

    @property
    def slow(self) -> tuple[RankTimes, ...]:
        """The slow ranks, the slowest first."""
        found = (rank for rank in self.ranks if rank.slowness >= SLOW)
        return tuple(sorted(found, key=lambda rank: -rank.slowness))

    @property
    def shown_what_ifs(self) -> tuple[WhatIf, ...]:
        """The what-ifs that save enough to be shown, what saves most first."""
        least = (1 - _SHOWN) * self.measured_seconds
        found = (what_if for what_if in self.what_ifs if what_if.seconds < least)
        return tuple(sorted(found, key=lambda what_if: what_if.seconds))

    def what_if(self, name: str) -> WhatIf | None:
        """Return the what-if called `name`, None if its cause is not there."""
        return next((found for found in self.what_ifs if found.name == name), None)


def explain(step: TracedStep) -> Explanation:
    """Return why `step` took as long as it did.

    Raises ValueError if the measured step contradicts the plan.
    """
    return _Explaining.of(step).explanation()


@dataclass(frozen=True, slots=True)
class _Explaining:
    """The step with its program and its measured times.

    own: the seconds of every pass; if it shared a processor, those for which it had it.
    """

    step: TracedStep
    program: Program
    times: Times
    own: Seconds
    shared: bool
    slowness: Mapping[int, float]
    replayed: float = field(default=0.0)

    @classmethod
    def of(cls, step: TracedStep) -> _Explaining:
        program = lower(step.schedule, step.problem, step.cost)
        times = times_of(program, step.cost, step.runtime, step.measured)
        found = _own_seconds(step, times.passes)
        own = times.passes if found is None else found
        shared = found is not None
        slowness = _slowness(step, own, shared=shared)
        made = cls(step, program, times, own, shared, slowness)
        return replace(made, replayed=made.seconds(times))

    def seconds(self, times: Times | None, program: Program | None = None) -> float:
        """Return the seconds of the step in which passes and messages take `times`."""
        step = self.step
        played = replay(program or self.program, step.cost, step.runtime, times).timeline
        return max(span.end for spans in played.compute for span in spans)

    def without(self, times: Times, program: Program | None = None) -> float:
        """Return the seconds of the step with other times; what is not explained stays."""
        measured = self.measured_seconds
        return max(0.0, measured + self.seconds(times, program) - self.replayed)

    @property
    def measured_seconds(self) -> float:
        return max(span.end for spans in self.step.measured.compute for span in spans)

    def explanation(self) -> Explanation:
        step = self.step
        what_ifs, rows = self._what_ifs()
        return Explanation(
            step=step,
            planned_seconds=step.planned_seconds,
            measured_seconds=self.measured_seconds,
            causes=tuple(self._causes()),
            what_ifs=tuple(what_ifs),
            kinds=tuple(self._kinds()),
            ranks=tuple(self._ranks()),
            replicas=self._replicas(),
            on_processor=sum(self.own.values()) / sum(self.times.passes.values()),
            own=self._by_stage(self.own),
            rows=rows,
        )

    def _causes(self) -> list[Cause]:
        """Return the causes, which add up, from the planned time to the measured one."""
        step, own = self.step, self.own
        average = self._as_planned_but_average()
        stages = _means(own)
        chain: list[tuple[str, str, Times]] = [
            ("runtime", f"messages as {step.runtime.name} executes them", Times()),
            ("passes", "passes as long as measured, on average of all ranks", Times(average)),
            (
                "ranks",
                "differences between ranks",
                Times({item: stages[_key(item)] for item in own}),
            ),
            ("microbatches", "differences between microbatches", Times(own)),
        ]
        if self.shared:
            words = "passes that had to wait for a processor"
            chain.append(("processors", words, Times(self.times.passes)))
        chain += [
            (
                "communication",
                "messages as long as measured",
                Times(self.times.passes, self.times.communications),
            ),
        ]
        if step.schedule.offloads:
            words = "copies to the host and back as long as measured"
            chain.append(("copies", words, replace(chain[-1][2], copies=self.times.copies)))
        chain.append(("between", "time between passes: issuing messages, the host", self.times))
        causes, before = [], step.planned_seconds
        for name, words, times in chain:
            now = self.seconds(times)
            causes.append(Cause(name, words, now - before))
            before = now
        causes.append(Cause("rest", "not explained", self.measured_seconds - before))
        return causes

    def _as_planned_but_average(self) -> dict[Pass, float]:
        """Return planned seconds times the factor by which passes of the kind take longer."""
        own, cost = self.own, self.step.cost
        by_kind: dict[Kind, list[Pass]] = defaultdict(list)
        for item in own:
            by_kind[item.kind].append(item)
        found = {}
        for items in by_kind.values():
            planned, measured = sum(map(cost.seconds, items)), sum(own[item] for item in items)
            for item in items:
                found[item] = (
                    cost.seconds(item) * measured / planned if planned else measured / len(items)
                )
        return found

    # What the step would take without a cause

    def _what_ifs(self) -> tuple[list[WhatIf], tuple[int, ...] | None]:
        times, step, found = self.times, self.step, []

        def add(name: str, words: str, changed: Times, program: Program | None = None) -> None:
            found.append(WhatIf(name, words, self.without(changed, program)))

        slow = {rank: factor for rank, factor in self.slowness.items() if factor >= SLOW}
        for rank, factor in slow.items():
            words = f"if pipeline rank {rank} computed as fast as the others"
            changed = self._scaled({rank: 1 / factor})
            if len(slow) > 1:
                add(f"equal_rank_{rank}", words, changed)
            else:
                add("equal_ranks", words, changed)
        if len(slow) > 1:
            changed = self._scaled({rank: 1 / factor for rank, factor in slow.items()})
            add("equal_ranks", "if all ranks computed equally fast", changed)
        if self.shared:
            words = "if every rank had a processor of its own"
            add("processors", words, replace(times, passes=self.own))
        planned = {item: step.cost.seconds(item) for item in times.passes}
        add("planned_passes", "if passes took as long as planned", replace(times, passes=planned))
        means = _means(times.passes)
        even = {item: means[_key(item)] for item in times.passes}
        add(
            "even_microbatches",
            "if all microbatches took equally long",
            replace(times, passes=even),
        )
        for name, words, seconds in (
            ("planned_network", "if messages took as long as planned", self._planned_message),
            ("free_hops", "if messages between stages were free", self._without_hops),
            ("free_barriers", "if the vocabulary's barriers were free", self._without_barriers),
            ("free_network", "if all messages were free", lambda _: 0.0),
        ):
            messages = {item: seconds(item) for item in times.communications}
            add(name, words, replace(times, communications=messages))
        if times.copies:
            words = "if copies to the host and back took no time"
            add("free_copies", words, replace(times, copies=dict.fromkeys(times.copies, 0.0)))
        words = "without the time between passes"
        add("between", words, Times(times.passes, times.communications, times.copies))
        if (program := self._program(self._measured_cost())) is not None:
            words = f"with {step.schedule.name} ordered for the measured times"
            add("order", words, times, program)
        rows = self._even_rows()
        if rows is not None:
            changed, cost = self._with_rows(rows)
            words = "with vocabulary rows that make all ranks equally busy"
            add("even_rows", words, changed, self._program(cost))
        busy = self._busy()
        if max(busy) > _UNEVEN * fmean(busy) and rows is None:
            changed = self._scaled({r: fmean(busy) / b for r, b in enumerate(busy) if b})
            add("even_work", "if all ranks had equally much to compute", changed)
        return found, rows

    def _planned_message(self, item: Node) -> float:
        cost = self.step.cost
        return cost.barrier(item.barrier) if isinstance(item, Collective) else cost.hop_seconds

    def _without_hops(self, item: Node) -> float:
        return self.times.communications[item] if isinstance(item, Collective) else 0.0

    def _without_barriers(self, item: Node) -> float:
        return 0.0 if isinstance(item, Collective) else self.times.communications[item]

    def _scaled(self, factors: Mapping[int, float]) -> Times:
        """Return the measured times with the passes of some pipeline ranks times a factor."""
        rank_of = self.step.problem.rank_of
        passes = {
            item: seconds * factors.get(rank_of(item), 1.0)
            for item, seconds in self.times.passes.items()
        }
        return replace(self.times, passes=passes)

    def _measured_cost(self) -> CostModel:
        """Return the costs with which a plan from measured times would order the passes.

        Each kind of pass takes as long as on average, in the proportions of the plan, and a slow
        rank longer.  Messages take their median.
        """
        problem, cost = self.step.problem, self.step.cost
        average = self._as_planned_but_average()
        slow = {rank: factor for rank, factor in self.slowness.items() if factor >= SLOW}
        usual = fmean(slow.get(rank, 1.0) for rank in range(self.step.num_ranks))
        scaled = {
            item: seconds * slow.get(problem.rank_of(item), 1.0) / usual
            for item, seconds in average.items()
        }
        found = _by_message(self.times.communications)
        barriers = {name: median(values) for name, values in found.items() if name != _HOP}
        hop = median(found[_HOP]) if found.get(_HOP) else cost.hop_seconds
        copies: dict[int, list[float]] = defaultdict(list)
        for (_, item), seconds in self.times.copies.items():
            copies[item.stage].append(seconds)
        return replace(
            cost,
            pass_seconds=self._by_stage(scaled),
            hop_seconds=hop,
            barrier_seconds={**cost.barrier_seconds, **barriers},
            offload_seconds=tuple(
                median(copies[stage]) if copies[stage] else seconds
                for stage, seconds in enumerate(cost.offload_seconds)
            ),
        )

    def _by_stage(self, seconds: Seconds) -> dict[Kind, tuple[float, ...]]:
        """Return the mean seconds of a pass, by kind and stage or rank; 0 without passes."""
        layout, means = self.step.problem.layout, _means(seconds)
        return {
            kind: tuple(
                means.get((kind, index), 0.0)
                for index in range(layout.num_ranks if kind.is_vocabulary else layout.num_stages)
            )
            for kind in sorted({kind for kind, _ in means}, key=list(Kind).index)
        }

    def _program(self, cost: CostModel) -> Program | None:
        """Return the program of the same schedule ordered for `cost`.

        It is None for a schedule that has no generator.
        """
        problem, name = self.step.problem, self.step.schedule.name
        family = GENERATORS.get(name)
        if family is None or family.split_backward is not problem.split_backward:
            return None
        try:
            schedule = generate(name, problem, cost)
            if self.step.schedule.offloads:
                schedule = place_transfers(schedule, problem, cost)
            return lower(schedule, problem, cost)
        except ValueError:
            return None

    def _busy(self) -> list[float]:
        """Return the seconds of passes of each pipeline rank, equally fast ranks assumed."""
        busy = [0.0] * self.step.num_ranks
        for item, seconds in self.own.items():
            rank = self.step.problem.rank_of(item)
            busy[rank] += seconds / (self.slowness[rank] or 1.0)
        return busy

    def _even_rows(self) -> tuple[int, ...] | None:
        """Return rows by rank that make all ranks equally busy.

        It is None where rows are not sharded or not known, or where that would gain little.
        """
        step = self.step
        if not step.rows or not step.problem.algorithm.sharded or not any(step.rows):
            return None
        of_rows, rest = [0.0] * step.num_ranks, [0.0] * step.num_ranks
        for item, seconds in self.own.items():
            part = of_rows if item.kind in (Kind.S, Kind.T) else rest
            part[step.problem.rank_of(item)] += seconds
        per_row = [
            seconds / rows if rows else 0.0
            for seconds, rows in zip(of_rows, step.rows, strict=True)
        ]
        known = [value for value in per_row if value > 0]
        if not known:
            return None
        per_row = [value or fmean(known) for value in per_row]
        now = max(map(sum, zip(of_rows, rest, strict=True)))
        rows = fill_with_rows(sum(step.rows), rest, per_row)
        then = max(a + n * b for a, n, b in zip(rest, rows, per_row, strict=True))
        return tuple(rows) if then < now / (1 + (_UNEVEN - 1) / 2) else None

    def _with_rows(self, rows: Sequence[int]) -> tuple[Times, CostModel]:
        """Return the measured times, and the planned costs, with other vocabulary rows."""
        step = self.step
        passes = dict(self.times.passes)
        seconds = dict(step.cost.pass_seconds)
        for kind in (Kind.S, Kind.T):
            items = [item for item in passes if item.kind is kind]
            per_row = {i: passes[i] / step.rows[i.stage] for i in items if step.rows[i.stage]}
            usual = fmean(per_row.values())
            passes |= {item: rows[item.stage] * per_row.get(item, usual) for item in items}
            planned = sum(step.cost.seconds(item) for item in per_row)
            planned /= sum(step.rows[item.stage] for item in per_row)
            seconds[kind] = tuple(planned * count for count in rows)
        changed = replace(self.times, passes=passes)
        return changed, replace(step.cost, pass_seconds=seconds)

    # Tables

    def _kinds(self) -> list[KindTimes]:
        step, own = self.step, self.times.passes
        rows = []
        for kind in Kind:
            items = [item for item in own if item.kind is kind]
            if items:
                planned = fmean(map(step.cost.seconds, items))
                source = step.sources.get(kind, "flops")
                measured = fmean(own[item] for item in items)
                rows.append(KindTimes(kind, len(items), source, planned, measured))
        timed = {span.name for span in step.measured.comm}
        for action in (Action.OFFLOAD, Action.RELOAD):
            copies = {item: s for (way, item), s in self.times.copies.items() if way is action}
            if copies:
                planned = fmean(step.cost.offload(item.stage)[1] for item in copies)
                seen = [s for item, s in copies.items() if f"{action}:{item}" in timed]
                taken = fmean(seen) if seen else None
                rows.append(KindTimes(action, len(copies), "assumed", planned, taken))
        found = _by_message(self.times.communications)
        known = _by_message({i: s for i, s in self.times.communications.items() if str(i) in timed})
        barriers = [barrier.name for barrier in step.problem.algorithm.barriers]
        for name in (_HOP, *barriers):
            if values := found.get(name):
                planned = step.cost.hop_seconds if name == _HOP else step.cost.barrier(name)
                taken = fmean(known[name]) if known.get(name) else None
                if taken is not None or planned:
                    rows.append(KindTimes(name, len(values), "assumed", planned, taken))
        return rows

    def _ranks(self) -> list[RankTimes]:
        step, problem = self.step, self.step.problem
        factors = _factors(step, self.own, shared=self.shared)
        planned = [0.0] * step.num_ranks
        between = [0.0] * step.num_ranks
        busy = [0.0] * step.num_ranks
        for item, seconds in self.times.passes.items():
            rank = problem.rank_of(item)
            planned[rank] += step.cost.seconds(item)
            between[rank] += self.times.pass_leads[item]
            busy[rank] += seconds
        if not step.runtime.copies_beside_passes:
            for copy, seconds in self.times.copies.items():
                between[problem.rank_of(copy[1])] += seconds + self.times.copy_leads[copy]
        rows = []
        for place in _places(step):
            at, is_first = place.pipeline_rank, place.replica == place.tensor_rank == 0
            seconds = busy[at] if is_first else sum(found for _, found in place.passes.values())
            row = RankTimes(
                place.rank,
                place.replica,
                at,
                place.tensor_rank,
                place.host,
                planned[at],
                seconds,
                factors[place.rank],
            )
            if is_first:
                row = replace(
                    row,
                    planned_waiting=max(0.0, step.planned_seconds - planned[at]),
                    measured_waiting=max(0.0, self.measured_seconds - busy[at] - between[at]),
                    between=between[at],
                )
            rows.append(row)
        return rows

    def _replicas(self) -> dict[int, float]:
        """Return what the step takes the other replicas, by the sums of their passes."""
        step = self.step
        first = {
            rank.pipeline_rank: rank for rank in step.ranks if rank.replica == rank.tensor_rank == 0
        }
        factors: dict[int, dict[tuple[int, Kind], float]] = defaultdict(dict)
        total: dict[int, float] = defaultdict(float)
        for rank in step.ranks:
            if rank.replica == 0 or rank.tensor_rank:
                continue
            for kind, (count, seconds) in rank.passes.items():
                of_first, of_it = first[rank.pipeline_rank].passes.get(kind, (0, 0.0))
                total[rank.replica] += seconds
                if of_it > 0 and count == of_first:
                    factors[rank.replica][rank.pipeline_rank, kind] = seconds / of_it
        found = {}
        for replica in sorted(sorted(total, key=total.__getitem__)[-_MOST_REPLICAS:]):
            passes = {
                item: seconds * factors[replica].get((step.problem.rank_of(item), item.kind), 1.0)
                for item, seconds in self.times.passes.items()
            }
            found[replica] = self.without(replace(self.times, passes=passes))
        return found


_HOP = "hop"


def _key(item: Pass) -> tuple[Kind, int]:
    return item.kind, item.stage


def _means(seconds: Seconds) -> dict[tuple[Kind, int], float]:
    """Return the mean seconds of a pass by kind and stage."""
    found: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for item, value in seconds.items():
        found[_key(item)].append(value)
    return {key: fmean(values) for key, values in found.items()}


def _by_message(seconds: Mapping[Node, float]) -> dict[str, list[float]]:
    """Return the seconds of all messages by the name of their barrier, or `hop`."""
    found: dict[str, list[float]] = defaultdict(list)
    for item, value in seconds.items():
        found[item.barrier if isinstance(item, Collective) else _HOP].append(value)
    return found


def _places(step: TracedStep) -> tuple[TracedRank, ...]:
    """Return all ranks of the run; those of the timeline if the file names none."""
    if step.ranks:
        return step.ranks
    return tuple(TracedRank(rank, 0, rank, 0, "", {}) for rank in range(step.num_ranks))


def _factors(step: TracedStep, own: Seconds, *, shared: bool) -> dict[int, float]:
    """Return by rank of the run how many times as long as the others it computes for its work.

    Its work is that of the plan without its own slowness.  The measure of a kind of pass is the
    median rank: the lower one of two.  Where ranks shared processors, those of other replicas have
    the factor 1: how long they had one is not known.
    """
    sums: dict[tuple[int, Kind], float] = defaultdict(float)
    work: dict[tuple[int, Kind], float] = defaultdict(float)
    for spans in step.measured.compute:
        for span in spans:
            item = Pass(span.stage, Kind(span.kind), span.microbatch)
            key = span.rank, item.kind
            sums[key] += own[item]
            work[key] += step.cost.seconds(item) / step.slowness[span.rank]
    seconds: dict[int, dict[Kind, float]] = {}
    places = {place.rank: place.pipeline_rank for place in _places(step)}
    for place in _places(step):
        at = place.pipeline_rank
        if place.replica == place.tensor_rank == 0:
            found = {kind: value for (rank, kind), value in sums.items() if rank == at}
        else:
            found = {} if shared else {kind: value for kind, (_, value) in place.passes.items()}
        seconds[place.rank] = {kind: value for kind, value in found.items() if work[at, kind] > 0}
    paces: dict[Kind, list[float]] = defaultdict(list)
    for rank, found in seconds.items():
        for kind, value in found.items():
            paces[kind].append(value / work[places[rank], kind])
    # A kind of pass that only one rank has says nothing of that rank.
    usual = {kind: median_low(values) for kind, values in paces.items() if len(values) > 1}
    factors = dict.fromkeys(places, 1.0)
    judged = []
    for rank, found in seconds.items():
        kinds = found.keys() & usual.keys()
        expected = sum(usual[kind] * work[places[rank], kind] for kind in kinds)
        taken = sum(found[kind] for kind in kinds)
        if expected > 0:
            factors[rank] = taken / expected
            judged.append(rank)
    middle = median_low(factors[rank] for rank in judged or places) or 1.0
    return factors | {rank: factors[rank] / middle for rank in judged}


def _slowness(step: TracedStep, own: Seconds, *, shared: bool) -> dict[int, float]:
    """Return the factors of the pipeline ranks of the first replica."""
    factors = _factors(step, own, shared=shared)
    return {
        place.pipeline_rank: factors[place.rank]
        for place in _places(step)
        if place.replica == place.tensor_rank == 0
    }


def _own_seconds(step: TracedStep, measured: Seconds) -> dict[Pass, float] | None:
    """Return the seconds that every pass spent on a processor, at most those it took.

    It is None if passes were on one nearly all the time, or where that is not known: on a GPU, and
    with tensor parallelism, where ranks wait for each other inside their passes.
    """
    if step.device != "cpu" or step.tp > 1 or not step.processor:
        return None
    own = {item: min(seconds, step.processor[item]) for item, seconds in measured.items()}
    total = sum(measured.values())
    return own if 0 < sum(own.values()) < _ALONE * total else None
