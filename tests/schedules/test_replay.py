"""A program takes as long as its schedule, with the streams of CUDA and the threads of gloo.

The schedules are generated for equal costs. They are replayed with these and with random costs, so
that no order passes the tests by chance.
"""

import random
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise, product
from typing import NamedTuple

import pytest

from schedules import generators
from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.graph import DeadlockError
from schedules.ir import Kind
from schedules.lower import Action, Op, Program, lower
from schedules.problem import Problem
from schedules.replay import CUDA, GLOO, Hops, LateStart, Runtime, late_starts, replay
from schedules.simulate import simulate
from schedules.timeline import Timeline
from schedules.vocab import VOCAB_ALGORITHMS, End, evaluation
from tests.schedules.cases import cost, problem

# CUDA without a side stream: the passes stop at the start of a collective that continues another.
INLINE = Runtime("inline", issues_ahead=True, continues_beside_passes=False, hops=Hops.PAIRED)
PAIRED = replace(CUDA, hops=Hops.PAIRED)
SIZES = tuple(product((1, 2, 3, 4, 8), (1, 2, 8)))
SECONDS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "S": 0.6, "T": 0.3, "E": 0.05, "G": 0.05}
HOP, BARRIER = 0.03, 0.1


class Step(NamedTuple):
    program: Program
    costs: CostModel
    simulated: Timeline


def problem_of(name: str, algorithm: str, p: int, m: int) -> Problem:
    family = GENERATORS[name]
    return Problem(family.layout_of(p), m, VOCAB_ALGORITHMS[algorithm], family.split_backward)


def costs_of(case: Problem, seed: str | None = None) -> CostModel:
    """Return costs with F = 1 per rank; with a seed, every cost has its own random factor."""
    layout, chance = case.layout, random.Random(seed)

    def times(value: float, count: int = 1) -> tuple[float, ...]:
        return tuple(
            value * (1.0 if seed is None else chance.uniform(0.5, 1.5)) for _ in range(count)
        )

    passes = {}
    for kind in Kind:
        chunks, count = (
            (1, layout.num_ranks) if kind.is_vocabulary else (layout.num_chunks, layout.num_stages)
        )
        passes[kind] = times(SECONDS[kind] / chunks, count)
    barriers = {name: times(BARRIER)[0] for name in ("CE", "C0", "C1", "C1b", "C2", "CG")}
    shards = (0.1,) * layout.num_ranks
    return CostModel(passes, times(HOP)[0], barriers, (1.0,) * layout.num_stages, shards)


@pytest.fixture
def quick(monkeypatch):
    """Generate schedules with little effort: the law holds for any order."""
    monkeypatch.setattr(generators, "_EFFORT", 1)


def lowered(name: str, algorithm: str, p: int, m: int, *seeds: str | None) -> list[Step]:
    """Return the program and the simulation of one schedule, with the costs of every seed."""
    case = problem_of(name, algorithm, p, m)
    schedule = generate(name, case, costs_of(case))
    steps = []
    for costs in [costs_of(case, seed) for seed in seeds or (None,)]:
        steps.append(Step(lower(schedule, case, costs), costs, simulate(schedule, case, costs)))
    return steps


def longer(step: Step, runtime: Runtime) -> float:
    """Return the fraction by which the replay takes longer than the simulation."""
    return replay(step.program, step.costs, runtime).timeline.makespan / step.simulated.makespan - 1


def late(step: Step, runtime: Runtime) -> list[LateStart]:
    """Return where ranks wait longer in the replay than in the simulation."""
    return late_starts(replay(step.program, step.costs, runtime), step.simulated)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("algorithm", sorted(VOCAB_ALGORITHMS))
@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_no_runtime_takes_more_than_half_a_percent_longer_than_simulated(name, algorithm):
    """Each size comes with every second algorithm, other ones for the next schedule.

    Many microbatches come with one number of ranks, another one for each algorithm.
    """
    turn = sorted(GENERATORS).index(name) + sorted(VOCAB_ALGORITHMS).index(algorithm)
    for p, m in (*SIZES[turn % 2 :: 2], ((2, 3, 4, 8)[turn % 4], 32)):
        for step in lowered(name, algorithm, p, m, None, f"{name} {algorithm} {p} {m}"):
            assert step.simulated.makespan >= step.simulated.bound * (1 - 1e-9)
            for runtime, at_most in ((CUDA, 0.005), (GLOO, 1e-9)):
                assert -1e-9 <= longer(step, runtime) <= at_most, (p, m, runtime)


@pytest.mark.parametrize(("name", "p"), [("interleaved", 2), ("zb_v", 8), ("v_min", 8)])
def test_a_stream_for_each_direction_of_hops_costs_nothing_and_one_for_both_does(name, p):
    """Two ranks with several stages send activations in both directions.

    In one stream for both directions these delay each other.
    """
    (step,) = lowered(name, "two_barrier", p, 8)
    assert longer(step, PAIRED) > 1e-4
    assert longer(step, CUDA) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "algorithm", "at_least"),
    [("1f1b", "one_barrier", 0.15), ("1f1b", "naive", 0.15), ("zb_h1", "one_barrier", 0.05)],
)
def test_without_a_side_stream_the_law_fails(name, algorithm, at_least):
    (step,) = lowered(name, algorithm, 8, 32)
    assert longer(step, INLINE) > at_least
    seconds: Counter[str] = Counter()
    for entry in late(step, INLINE):
        seconds[str(entry.cause).split(".")[0]] += entry.seconds
    assert seconds.most_common(1)[0][0] == "start:C1b"


def test_without_a_side_stream_two_barriers_lose_nothing():
    (step,) = lowered("1f1b", "two_barrier", 8, 32)
    assert longer(step, INLINE) <= 0.005


@pytest.mark.parametrize("name", ["1f1b", "v_half"])
def test_a_replay_without_loss_is_the_simulated_timeline(name):
    ((program, costs, simulated),) = steps = lowered(name, "one_barrier", 4, 8, "spans")
    for runtime in (GLOO, CUDA):
        assert late(*steps, runtime) == []
        timeline = replay(program, costs, runtime).timeline
        assert (timeline.peak_bytes, timeline.peak_in_flight) == (
            simulated.peak_bytes,
            simulated.peak_in_flight,
        )
        for spans, expected in zip(
            (*timeline.compute, timeline.comm), (*simulated.compute, simulated.comm), strict=True
        ):
            by_name = {span.name: span for span in expected}
            assert len(spans) == len(by_name) > 0
            for span in spans:
                same = by_name[span.name]
                assert (span.rank, span.kind, span.stage) == (same.rank, same.kind, same.stage)
                assert (span.start, span.end) == pytest.approx((same.start, same.end))


@pytest.mark.parametrize("runtime", [CUDA, GLOO])
@pytest.mark.parametrize(("p", "m"), [(1, 5), (2, 1), (4, 8)])
def test_1f1b_takes_the_work_and_one_fill_and_drain(p, m, runtime):
    case, costs = problem(p, m), cost(p)
    program = lower(generate("1f1b", case, costs), case, costs)
    assert replay(program, costs, runtime).timeline.makespan == pytest.approx((m + p - 1) * 3)


@pytest.mark.parametrize("runtime", [CUDA, GLOO])
def test_an_evaluation_takes_as_long_as_simulated(runtime):
    case = Problem(
        GENERATORS["gpipe"].layout_of(4),
        6,
        evaluation(VOCAB_ALGORITHMS["one_barrier"]),
        forward_only=True,
    )
    costs = costs_of(case, "evaluation")
    schedule = generate("gpipe", case, costs)
    timeline, simulated = (
        replay(lower(schedule, case, costs), costs, runtime).timeline,
        simulate(schedule, case, costs),
    )
    assert timeline.makespan == pytest.approx(simulated.makespan)
    assert (timeline.peak_bytes, timeline.peak_in_flight) == (
        simulated.peak_bytes,
        simulated.peak_in_flight,
    )


def with_ops(program, rank, ops):
    return replace(program, ranks=(*program.ranks[:rank], tuple(ops), *program.ranks[rank + 1 :]))


def moved(ops, at, to):
    """Return `ops` with the operation at index `at` moved to index `to`."""
    rest = [*ops[:at], *ops[at + 1 :]]
    return [*rest[:to], ops[at], *rest[to:]]


@pytest.mark.parametrize("runtime", [CUDA, GLOO])
@pytest.mark.parametrize("rank", range(4))
def test_a_wait_before_passes_that_need_not_wait_is_found(rank, runtime):
    """Every WAIT is moved before the last pass that starts before its collective ends."""
    ((program, costs, simulated),) = lowered("1f1b", "one_barrier", 4, 8)
    ends = {span.name: span.end for span in simulated.comm}
    starts = {span.name: span.start for span in simulated.compute[rank]}
    ops, found = program.ranks[rank], 0
    for at, op in enumerate(ops):
        if op.action is not Action.WAIT:
            continue
        early = [k for k, other in enumerate(ops[:at]) if other.action is Action.RUN]
        early = [k for k in early if starts[str(ops[k].item)] < ends[str(op.item)] - 0.01]
        started = next(
            k
            for k, other in enumerate(ops)
            if other.action is Action.START and other.item == op.item
        )
        if not early or early[-1] < started:
            continue
        found += 1
        result = replay(with_ops(program, rank, moved(ops, at, early[-1])), costs, runtime)
        reported = {(entry.rank, entry.name): entry for entry in late_starts(result, simulated)}
        entry = reported[rank, str(ops[early[-1]].item)]
        assert entry.cause == op
        assert entry.seconds > 0.005
    assert found >= 3


@pytest.mark.parametrize("runtime", [CUDA, GLOO])
def test_two_starts_in_another_order_on_one_rank_are_a_deadlock_that_names_them(runtime):
    ((program, costs, _),) = lowered("1f1b", "two_barrier", 3, 4)
    tried = 0
    for rank, ops in enumerate(program.ranks):
        by_end = {}
        for k, op in enumerate(ops):
            if op.action is not Action.START:
                continue
            before = by_end.get(op.exchange.end)
            by_end[op.exchange.end] = k
            if before is None:
                continue
            swapped = list(ops)
            swapped[before], swapped[k] = ops[k], ops[before]
            with pytest.raises(
                DeadlockError, match=r"^deadlock: rank 0 stands at \w+:.*, rank 1 .*, rank 2 "
            ):
                replay(with_ops(program, rank, swapped), costs, runtime)
            tried += 1
    assert tried > 30


@pytest.mark.parametrize("runtime", [CUDA, GLOO])
def test_two_starts_in_another_order_on_all_ranks_are_late_or_a_deadlock(runtime):
    ((program, costs, simulated),) = lowered("1f1b", "two_barrier", 3, 4)
    order = [
        op.item
        for op in program.ranks[0]
        if op.action is Action.START and op.exchange.end is End.OUTPUT
    ]
    late_ones = deadlocks = 0
    for first, second in pairwise(order):
        ranks = []
        for ops in program.ranks:
            starts = {op.item: k for k, op in enumerate(ops) if op.action is Action.START}
            ranks.append(tuple(moved(ops, starts[first], starts[second])))
        try:
            entries = late_starts(
                replay(replace(program, ranks=tuple(ranks)), costs, runtime), simulated
            )
        except DeadlockError:
            deadlocks += 1
            continue
        late_ones += any(entry.cause.item == first for entry in entries)
    assert late_ones > 3
    assert deadlocks > 0


@pytest.mark.parametrize("runtime", [CUDA, GLOO])
@pytest.mark.parametrize("action", [Action.START, Action.SEND, Action.RECV])
def test_a_communication_that_one_rank_never_issues_is_a_deadlock(action, runtime):
    ((program, costs, _),) = lowered("1f1b", "one_barrier", 3, 4)
    places = [
        (rank, k)
        for rank, ops in enumerate(program.ranks)
        for k, op in enumerate(ops)
        if op.action is action
    ]
    for rank, k in places:
        ops = program.ranks[rank]
        with pytest.raises(DeadlockError, match=r"rank [012] stands at "):
            replay(with_ops(program, rank, [*ops[:k], *ops[k + 1 :]]), costs, runtime)
    assert len(places) > 12


def test_a_start_behind_later_passes_is_late_only_where_the_host_runs_these():
    """The START of a collective that continues another is moved behind later passes on one rank.

    It still comes before the next START of the same end of the model.
    """
    ((program, costs, simulated),) = steps = lowered("1f1b", "one_barrier", 3, 4)
    assert late(*steps, GLOO) == []
    caused = 0
    for rank, ops in enumerate(program.ranks):
        output = [
            k
            for k, op in enumerate(ops)
            if op.exchange is not None and op.exchange.end is End.OUTPUT
        ]
        for at, to in pairwise(output):
            if ops[at].exchange.continues is not None:
                behind = Step(with_ops(program, rank, moved(ops, at, to - 1)), costs, simulated)
                assert late(behind, CUDA) == []
                caused += Op(Action.WAIT, ops[at].item) in {
                    entry.cause for entry in late(behind, GLOO)
                }
    assert caused > 0


def test_timelines_of_different_passes_are_not_compared():
    ((program, costs, _),) = lowered("1f1b", "one_barrier", 3, 4)
    ((_, _, other),) = lowered("gpipe", "one_barrier", 3, 4)
    with pytest.raises(ValueError, match="passes of rank 0 differ"):
        late_starts(replay(program, costs, CUDA), other)


def test_late_starts_are_sorted_and_say_where_and_why():
    (step,) = lowered("1f1b", "one_barrier", 4, 8)
    found = late(step, INLINE)
    assert [entry.seconds for entry in found] == sorted((e.seconds for e in found), reverse=True)
    worst = found[0]
    assert str(worst) == f"rank {worst.rank} before {worst.name}, at {worst.cause}"
    assert worst.seconds > 0.1


@pytest.mark.parametrize("algorithm", ["none", "one_barrier", "two_barrier"])
@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "v_half"])
def test_beside_waits_is_the_time_in_which_a_pass_runs_and_an_issued_communication_waits(
    name, algorithm, quick
):
    """A communication that a rank has issued waits until its last rank has issued it.

    Messages take no time, so none waits for an earlier one.
    """
    case = problem_of(name, algorithm, 3, 4)
    costs = CostModel(costs_of(case).pass_seconds)
    program = lower(generate(name, case, costs), case, costs)
    result = replay(program, costs, CUDA)
    ends = [{span.name: span.end for span in spans} for spans in result.timeline.compute]
    issued: dict[object, dict[int, float]] = defaultdict(dict)
    for rank, ops in enumerate(program.ranks):
        now = 0.0
        for op in ops:
            if op.action is Action.RUN:
                now = ends[rank][str(op.item)]
            elif op.action is Action.START and op.exchange.continues is None:
                issued[op.item][rank] = now
            elif op.action in (Action.SEND, Action.RECV):
                issued[op.item, *sorted((rank, op.peer))][rank] = now
    for rank, spans in enumerate(result.timeline.compute):
        own = [(times[rank], max(times.values())) for times in issued.values() if rank in times]
        passes = [(span.start, span.end) for span in spans]

        def seconds_of(*all_of, passes=passes, own=own):
            """Return the seconds in which each of these has an interval."""
            edges = sorted({edge for interval in (*passes, *own) for edge in interval})
            return sum(
                later - edge
                for edge, later in pairwise(edges)
                if all(any(a <= edge and later <= b for a, b in some) for some in all_of)
            )

        beside = seconds_of(passes, own) / seconds_of(passes)
        assert result.beside_waits[rank] == pytest.approx(beside, abs=1e-9)
    assert max(result.beside_waits) > 0.02
    short = CostModel({kind: tuple(1e-3 * t for t in v) for kind, v in costs.pass_seconds.items()})
    assert replay(program, short, CUDA).beside_waits == pytest.approx(result.beside_waits)


@pytest.mark.parametrize("runtime", [CUDA, GLOO])
@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "v_half"])
def test_the_cause_of_a_wait_is_what_ends_when_the_pass_begins(name, runtime, quick):
    """A pass that begins at the end of the one before it waits for nothing."""
    (step,) = lowered(name, "one_barrier", 4, 8, "causes")
    found = replay(step.program, step.costs, runtime)
    ends = {span.name: span.end for spans in found.timeline.compute for span in spans}
    ends = {name: end + step.costs.hop_seconds for name, end in ends.items()}
    ends |= {span.name: span.end for span in found.timeline.comm}
    waits = 0
    for spans, causes in zip(found.timeline.compute, found.causes, strict=True):
        before = 0.0
        for span, cause in zip(spans, causes, strict=True):
            begin = before if cause is None else ends[str(cause.item)]
            assert span.start == pytest.approx(begin)
            assert cause is None or begin > before
            before, waits = span.end, waits + (cause is not None)
    assert waits > 10
