"""Why a step took longer than planned: TracedStep -> Explanation.

The measured step is replayed with the seconds of every single pass and message in it, so the replay
ends when the step did.  Each question is then one more replay, with some of these seconds replaced:
from the planned ones to the measured ones for the causes, which add up, and back for what the step
would take without one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, median_low
from typing import Any

from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.ir import Kind, Pass
from schedules.lower import Action, Program, lower
from schedules.offload import place_transfers
from schedules.problem import Collective, Node
from schedules.replay import Times, replay, times_of
from schedules.timeline import Timeline
from vp_train.explain.trace import RankPlace, TracedRank, TracedStep
from vp_train.planning.placement import fill_with_rows
from vp_train.profile.costs import ALONE

SLOW = 1.1  # a rank that computes this many times as long as the others is slow
_SHOWN = 0.005  # of the step: what saves less is not shown
_UNEVEN = 1.025  # the work of the busiest rank over what it would be with other rows
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
        return self.measured / self.planned if self.measured is not None and self.planned else None


@dataclass(frozen=True, slots=True)
class ExplainedRank(RankPlace):
    """The seconds of one rank of the run in the step.

    slowness: how many times as long as the other ranks it computes for the same work.
    planned_waiting, measured_waiting, between: of the first replica's first tensor-parallel ranks,
    else None.  `between` is the time between passes in which nothing was waited for.
    """

    planned: float
    measured: float
    slowness: float
    planned_waiting: float | None = None
    measured_waiting: float | None = None
    between: float | None = None

    @property
    def is_slow(self) -> bool:
        """Return whether it computes much longer than the others for the same work."""
        return self.slowness >= SLOW


@dataclass(frozen=True, slots=True)
class Explanation:
    """The causes of a step's time.

    replicas: seconds of the step of other replicas, by the times of their passes.
    on_processor: the part of the time of passes in which their rank had a processor; 1 if it is not
    known.
    own: by kind and stage or rank, the mean seconds of a pass while it had one, on a rank that is
    not slow.
    rows: vocabulary rows by rank that would make all ranks equally busy, if they are not.
    """

    step: TracedStep
    planned_seconds: float
    measured_seconds: float
    causes: tuple[Cause, ...]
    what_ifs: tuple[WhatIf, ...]
    kinds: tuple[KindTimes, ...]
    ranks: tuple[ExplainedRank, ...]
    replicas: Mapping[int, float]
    on_processor: float
    own: Mapping[tuple[Kind, int], float]
    rows: tuple[int, ...] | None = None

    @property
    def slow(self) -> tuple[ExplainedRank, ...]:
        """The slow ranks, the slowest first."""
        found = (rank for rank in self.ranks if rank.is_slow)
        return tuple(sorted(found, key=lambda rank: -rank.slowness))

    @property
    def slowness(self) -> tuple[float, ...]:
        """The factors of the pipeline ranks to two digits, 1 for those that are not slow."""
        slow = {rank.pipeline_rank: round(rank.slowness, 2) for rank in self.slow if rank.is_first}
        return tuple(slow.get(rank, 1.0) for rank in range(self.step.num_ranks))

    def saves(self, seconds: float, part: float) -> bool:
        """Return whether a step of `seconds` saves more than `part` of the measured one."""
        return seconds < (1 - part) * self.measured_seconds

    @property
    def shown_what_ifs(self) -> tuple[WhatIf, ...]:
        """The what-ifs that save enough to be shown, what saves most first."""
        found = (what_if for what_if in self.what_ifs if self.saves(what_if.seconds, _SHOWN))
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
    shared: whether passes had to wait for a processor.
    ranks: all ranks of the run.
    replayed: the seconds of the step when it is replayed with the measured times.
    """

    step: TracedStep
    program: Program
    times: Times
    own: Seconds
    shared: bool
    ranks: tuple[ExplainedRank, ...]
    replayed: float

    @classmethod
    def of(cls, step: TracedStep) -> _Explaining:
        program = lower(step.schedule, step.problem, step.cost)
        times = times_of(program, step.cost, step.runtime, step.measured)
        own = _own_seconds(step, times.passes)
        shared = own != times.passes
        return cls(
            step=step,
            program=program,
            times=times,
            own=own,
            shared=shared,
            ranks=tuple(_ranks(step, times, own, shared=shared)),
            replayed=_replayed(step, program, times),
        )

    @property
    def factors(self) -> dict[int, float]:
        """The slowness of the pipeline ranks; 1 for one whose passes took no time."""
        return {rank.pipeline_rank: rank.slowness or 1.0 for rank in self.ranks if rank.is_first}

    @property
    def slow_factors(self) -> dict[int, float]:
        """The slowness of those pipeline ranks that are slow."""
        return {
            rank.pipeline_rank: rank.slowness
            for rank in self.ranks
            if rank.is_first and rank.is_slow
        }

    def seconds(self, times: Times | None, program: Program | None = None) -> float:
        """Return the seconds of the step in which passes and messages take `times`."""
        return _replayed(self.step, program or self.program, times)

    def without(self, times: Times, program: Program | None = None) -> float:
        """Return the seconds of the step with other times; what is not explained stays."""
        measured = self.measured_seconds
        return max(0.0, measured + self.seconds(times, program) - self.replayed)

    @property
    def measured_seconds(self) -> float:
        return _seconds_of(self.step.measured)

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
            ranks=self.ranks,
            replicas=self._replicas(),
            on_processor=sum(self.own.values()) / sum(self.times.passes.values()),
            own=_means(self._faster(self.own, self.slow_factors)),
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
        messages = Times(self.times.passes, self.times.communications)
        chain.append(("communication", "messages as long as measured", messages))
        if step.schedule.offloads:
            words = "copies to the host and back as long as measured"
            chain.append(("copies", words, replace(messages, copies=self.times.copies)))
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

        def add(name: str, words: str, program: Program | None = None, **changed: Any) -> None:
            found.append(WhatIf(name, words, self.without(replace(times, **changed), program)))

        slow = self.slow_factors
        for rank, factor in slow.items():
            words = f"if pipeline rank {rank} computed as fast as the others"
            name = f"equal_rank_{rank}" if len(slow) > 1 else "equal_ranks"
            add(name, words, passes=self._faster(times.passes, {rank: factor}))
        if len(slow) > 1:
            words = "if all ranks computed equally fast"
            add("equal_ranks", words, passes=self._faster(times.passes, slow))
        if self.shared:
            add("processors", "if every rank had a processor of its own", passes=self.own)
        planned = {item: step.cost.seconds(item) for item in times.passes}
        add("planned_passes", "if passes took as long as planned", passes=planned)
        means = _means(times.passes)
        even = {item: means[_key(item)] for item in times.passes}
        add("even_microbatches", "if all microbatches took equally long", passes=even)
        for name, words, seconds in (
            ("planned_network", "if messages took as long as planned", self._planned_message),
            ("free_hops", "if messages between stages were free", self._without_hops),
            ("free_barriers", "if the vocabulary's barriers were free", self._without_barriers),
            ("free_network", "if all messages were free", lambda _: 0.0),
        ):
            add(name, words, communications={item: seconds(item) for item in times.communications})
        if times.copies:
            words = "if copies to the host and back took no time"
            add("free_copies", words, copies=dict.fromkeys(times.copies, 0.0))
        words = "without the time between passes"
        add("between", words, pass_leads={}, communication_leads={}, copy_leads={})
        if (program := self._program(self._measured_cost())) is not None:
            add("order", f"with {step.schedule.name} ordered for the measured times", program)
        rows = self._even_rows()
        if rows is not None:
            passes, cost = self._with_rows(rows)
            words = "with vocabulary rows that make all ranks equally busy"
            add("even_rows", words, self._program(cost), passes=passes)
        else:
            busy = self._busy()
            factors = {rank: seconds / fmean(busy) for rank, seconds in enumerate(busy) if seconds}
            words = "if all ranks had equally much to compute"
            add("even_work", words, passes=self._faster(times.passes, factors))
        return found, rows

    def _planned_message(self, item: Node) -> float:
        cost = self.step.cost
        return cost.barrier(item.barrier) if isinstance(item, Collective) else cost.hop_seconds

    def _without_hops(self, item: Node) -> float:
        return self.times.communications[item] if isinstance(item, Collective) else 0.0

    def _without_barriers(self, item: Node) -> float:
        return 0.0 if isinstance(item, Collective) else self.times.communications[item]

    def _faster(self, passes: Seconds, factors: Mapping[int, float]) -> dict[Pass, float]:
        """Return the seconds of passes with some pipeline ranks faster by a factor."""
        rank_of = self.step.problem.rank_of
        return {item: value / factors.get(rank_of(item), 1.0) for item, value in passes.items()}

    def _measured_cost(self) -> CostModel:
        """Return the costs with which a plan from measured times would order the passes.

        Each kind of pass takes as long as on average, in the proportions of the plan, and a slow
        rank longer.  Messages take their median.
        """
        cost, slow = self.step.cost, self.slow_factors
        ranks = range(self.step.num_ranks)
        usual = fmean(slow.get(rank, 1.0) for rank in ranks)
        factors = {rank: usual / slow.get(rank, 1.0) for rank in ranks}
        scaled = self._faster(self._as_planned_but_average(), factors)
        found: dict[str, list[float]] = defaultdict(list)
        for message, seconds in self.times.communications.items():
            found[_name_of(message)].append(seconds)
        barriers = {name: median(values) for name, values in found.items() if name != _HOP}
        hop = median(found[_HOP]) if found[_HOP] else cost.hop_seconds
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

        It is None if no generator makes the schedule, such as one from a file. Its name alone does
        not tell: that of a file may be 1f1b although its backward is split.
        """
        problem, name = self.step.problem, self.step.schedule.name
        if name in GENERATORS and GENERATORS[name].split_backward != problem.split_backward:
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
        for item, seconds in self._faster(self.own, self.factors).items():
            busy[self.step.problem.rank_of(item)] += seconds
        return busy

    def _even_rows(self) -> tuple[int, ...] | None:
        """Return rows by rank that make all ranks equally busy.

        It is None where rows are not sharded or not known, or where that would gain little.
        """
        step = self.step
        of_rows, rest = [0.0] * step.num_ranks, [0.0] * step.num_ranks
        for item, seconds in self.own.items():
            part = of_rows if item.kind in (Kind.S, Kind.T) else rest
            part[step.problem.rank_of(item)] += seconds
        known = {
            rank: of_rows[rank] / count
            for rank, count in enumerate(step.rows)
            if count and of_rows[rank]
        }
        if not step.problem.algorithm.sharded or not known:
            return None
        per_row = [known.get(rank, fmean(known.values())) for rank in range(step.num_ranks)]

        def busiest(rows: Sequence[int]) -> float:
            return max(a + n * b for a, n, b in zip(rest, rows, per_row, strict=True))

        rows = fill_with_rows(sum(step.rows), rest, per_row)
        return tuple(rows) if busiest(step.rows) > _UNEVEN * busiest(rows) else None

    def _with_rows(self, rows: Sequence[int]) -> tuple[Seconds, CostModel]:
        """Return the measured passes, and the planned costs, with other vocabulary rows."""
        step = self.step
        passes = dict(self.times.passes)
        seconds = dict(step.cost.pass_seconds)
        for kind in (Kind.S, Kind.T):
            items = [item for item in passes if item.kind is kind]
            per_row = {i: passes[i] / step.rows[i.stage] for i in items if step.rows[i.stage]}
            usual = fmean(per_row.values())
            passes |= {item: rows[item.stage] * per_row.get(item, usual) for item in items}
            planned = sum(step.cost.pass_seconds.get(kind, ())) / sum(step.rows)
            seconds[kind] = tuple(planned * count for count in rows)
        return passes, replace(step.cost, pass_seconds=seconds)

    # Tables

    def _kinds(self) -> list[KindTimes]:
        """Return the rows of the kinds that were planned or measured to take some time."""
        step, times = self.step, self.times
        timed = {span.name for span in step.measured.comm}
        found: dict[str, list[tuple[float, float | None]]] = defaultdict(list)
        for item, seconds in times.passes.items():
            found[item.kind].append((step.cost.seconds(item), seconds))
        for (way, item), seconds in times.copies.items():
            planned = step.cost.offload(item.stage)[1]
            found[way].append((planned, seconds if f"{way}:{item}" in timed else None))
        for message, seconds in times.communications.items():
            measured = seconds if str(message) in timed else None
            found[_name_of(message)].append((self._planned_message(message), measured))
        barriers = (barrier.name for barrier in step.problem.algorithm.barriers)
        sources = {kind: step.sources.get(kind, "flops") for kind in Kind}
        rows = []
        for name in (*Kind, Action.OFFLOAD, Action.RELOAD, _HOP, *barriers):
            if values := found[name]:
                planned = fmean(each for each, _ in values)
                known = [each for _, each in values if each is not None]
                if known or planned:
                    taken = fmean(known) if known else None
                    source = sources.get(name, "assumed")
                    rows.append(KindTimes(name, len(values), source, planned, taken))
        return rows

    def _replicas(self) -> dict[int, float]:
        """Return what the step takes the other replicas, by the sums of their passes."""
        passes = {
            (rank.replica, rank.pipeline_rank): rank.passes
            for rank in self.step.ranks
            if rank.tensor_rank == 0
        }
        total: dict[int, float] = defaultdict(float)
        for (replica, _), own in passes.items():
            total[replica] += sum(own.values())
        total.pop(0, None)
        found = {}
        for replica in sorted(sorted(total, key=total.__getitem__)[-_MOST_REPLICAS:]):
            changed = {}
            for item, seconds in self.times.passes.items():
                rank = self.step.problem.rank_of(item)
                of_first = passes[0, rank].get(item.kind, 0.0)
                taken = passes[replica, rank].get(item.kind, of_first)
                changed[item] = seconds * taken / of_first if of_first else seconds
            found[replica] = self.without(replace(self.times, passes=changed))
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


def _name_of(item: Node) -> str:
    """Return the name of a message's barrier, or `hop`."""
    return item.barrier if isinstance(item, Collective) else _HOP


def _places(step: TracedStep) -> tuple[TracedRank, ...]:
    """Return all ranks of the run; those of the timeline if the file names none."""
    if step.ranks:
        return step.ranks
    return tuple(
        TracedRank(rank=rank, replica=0, pipeline_rank=rank, tensor_rank=0, host="", passes={})
        for rank in range(step.num_ranks)
    )


def _ranks(step: TracedStep, times: Times, own: Seconds, *, shared: bool) -> list[ExplainedRank]:
    """Return the seconds of all ranks of the run."""
    problem = step.problem
    planned = [0.0] * step.num_ranks
    between = [0.0] * step.num_ranks
    busy = [0.0] * step.num_ranks
    for item, seconds in times.passes.items():
        rank = problem.rank_of(item)
        planned[rank] += step.cost.seconds(item)
        between[rank] += times.pass_leads[item]
        busy[rank] += seconds
    if not step.runtime.copies_beside_passes:
        for copy, seconds in times.copies.items():
            between[problem.rank_of(copy[1])] += seconds + times.copy_leads[copy]
    factors = _factors(step, own, shared=shared)
    measured_seconds = _seconds_of(step.measured)
    rows = []
    for place in _places(step):
        at = place.pipeline_rank
        row = ExplainedRank(
            rank=place.rank,
            replica=place.replica,
            pipeline_rank=at,
            tensor_rank=place.tensor_rank,
            host=place.host,
            planned=planned[at],
            measured=busy[at] if place.is_first else sum(place.passes.values()),
            slowness=factors[place.rank],
        )
        if row.is_first:
            row = replace(
                row,
                planned_waiting=max(0.0, step.planned_seconds - planned[at]),
                measured_waiting=max(0.0, measured_seconds - busy[at] - between[at]),
                between=between[at],
            )
        rows.append(row)
    return rows


def _replayed(step: TracedStep, program: Program, times: Times | None) -> float:
    """Return the seconds of the step in which passes and messages take `times`."""
    return _seconds_of(replay(program, step.cost, step.runtime, times).timeline)


def _seconds_of(timeline: Timeline) -> float:
    """Return when the last pass ends."""
    return max(span.end for spans in timeline.compute for span in spans)


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
        if place.is_first:
            taken: Mapping[Kind, float] = {k: value for (r, k), value in sums.items() if r == at}
        else:
            taken = {} if shared else place.passes
        seconds[place.rank] = {kind: value for kind, value in taken.items() if work[at, kind]}
    paces: dict[Kind, list[float]] = defaultdict(list)
    for rank, found in seconds.items():
        for kind, value in found.items():
            paces[kind].append(value / work[places[rank], kind])
    # A kind of pass that only one rank has says nothing of that rank.
    usual = {kind: median_low(values) for kind, values in paces.items() if len(values) > 1}
    factors = {}
    for rank, found in seconds.items():
        kinds = found.keys() & usual.keys()
        expected = sum(usual[kind] * work[places[rank], kind] for kind in kinds)
        if expected:
            factors[rank] = sum(found[kind] for kind in kinds) / expected
    middle = median_low(factors.values() or [1.0]) or 1.0
    return {rank: factors.get(rank, middle) / middle for rank in places}


def _own_seconds(step: TracedStep, measured: Seconds) -> Seconds:
    """Return the seconds that every pass spent on a processor, at most those it took.

    They are the measured ones if passes were on one nearly all the time, or where that is not
    known: on a GPU, and with tensor parallelism, where ranks wait for each other inside their
    passes.
    """
    if step.device != "cpu" or step.tp > 1 or not step.processor:
        return measured
    own = {item: min(seconds, step.processor[item]) for item, seconds in measured.items()}
    total = sum(measured.values())
    return own if 0 < sum(own.values()) < ALONE * total else measured
