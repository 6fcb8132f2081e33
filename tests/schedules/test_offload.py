"""Activations that wait in host memory: never later steps, never higher peaks, exact bytes."""

import random
from dataclasses import replace
from itertools import pairwise, product

import pytest

from schedules import generators
from schedules import offload as offloads
from schedules.check import check_program, check_schedule
from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.ir import Kind, Offload, Pass, Schedule
from schedules.jitter import Disturbance, disturbed_steps
from schedules.lower import HOST_TRANSFERS, Action, Op, Program, lower
from schedules.network import Network
from schedules.offload import place_transfers
from schedules.problem import Problem
from schedules.replay import CUDA, GLOO, replay
from schedules.simulate import simulate
from schedules.timeline import Timeline
from schedules.transfers import HostBytes
from schedules.vocab import VOCAB_ALGORITHMS

SECONDS = {"F": 1.0, "B": 2.0, "I": 1.1, "W": 0.9, "S": 0.6, "T": 0.3, "E": 0.05, "G": 0.05}
SIZES = tuple(product((1, 2, 3, 4), (1, 2, 8)))


def problem_of(name: str, algorithm: str, p: int, m: int) -> Problem:
    family = GENERATORS[name]
    return Problem(family.layout_of(p), m, VOCAB_ALGORITHMS[algorithm], family.split_backward)


def costs_of(case: Problem, transfer: float, part: float = 1.0) -> CostModel:
    """Return the costs of unequal stages; a transfer takes so many forwards of the stage."""
    stages, p, chunks = case.layout.num_stages, case.layout.num_ranks, case.layout.num_chunks
    uneven = [(1 + 0.1 * (stage % 3)) / chunks for stage in range(stages)]
    seconds = {
        kind: tuple(value * size for size in (uneven if kind in "FBIW" else (1.0,) * p))
        for kind, value in ((Kind(letter), value) for letter, value in SECONDS.items())
    }
    return CostModel(
        seconds,
        hop_seconds=0.03,
        barrier_seconds=dict.fromkeys(("CE", "C0", "C1", "C1b", "C2", "CG"), 0.1),
        stage_bytes=tuple(uneven),
        shard_bytes=(0.1,) * p,
        weight_bytes=tuple(0.4 * size for size in uneven) if case.split_backward else (),
        offload_bytes=tuple(part * size for size in uneven),
        offload_seconds=tuple(transfer * part * size for size in uneven),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Generate schedules with little effort: the laws hold for any order."""
    monkeypatch.setattr(generators, "_EFFORT", 1)


def peaks_by_events(schedule: Schedule, timeline: Timeline, costs: CostModel) -> list[float]:
    """Return the peak of every rank from the sum of all events in order of time.

    At one moment a pass ends, then reloads take memory, then offloaded memory is free, then a pass
    begins. Costs are such that every pass takes time.
    """
    spans = {span.name: span for spans in timeline.compute for span in spans}
    peaks = []
    for order in schedule.ranks:
        events = []
        for item in order:
            change, span = costs.byte_change(item), spans[str(item)]
            events.append((span.start, 3, change) if change > 0 else (span.end, 0, change))
        for offload in schedule.offloads:
            if offload.item in order:
                moved = costs.offload(offload.item.stage)[0]
                events.append((spans[str(offload.free_before)].start, 2, -moved))
                events.append((spans[str(offload.reload_after)].end, 1, moved))
        held = most = 0.0
        for *_, change in sorted(events):
            held += change
            most = max(most, held)
        assert held == pytest.approx(0, abs=1e-9)
        peaks.append(most)
    return peaks


def assert_transfers_keep_their_links(schedule: Schedule, timeline: Timeline) -> None:
    """Check every transfer against the passes around it and the one before it on its link."""
    spans = {span.name: span for spans in timeline.compute for span in spans}
    moves = {t.span.name: t for t in timeline.transfers}
    assert len(moves) == 2 * len(schedule.offloads)
    for offload in schedule.offloads:
        down, up = moves[f"offload:{offload.item}"], moves[f"reload:{offload.item}"]
        item = offload.item
        read = next(
            spans[name] for k in "BI" if (name := f"{item.stage}{k}{item.microbatch}") in spans
        )
        assert down.issued == spans[str(item)].end
        assert up.issued == spans[str(offload.reload_after)].end
        assert down.span.end <= spans[str(offload.free_before)].start <= up.issued
        assert up.issued <= up.span.start <= up.span.end <= read.start
    for rank in range(timeline.num_ranks):
        for kind in ("offload", "reload"):
            own = [t for t in timeline.transfers if (t.span.rank, t.span.kind) == (rank, kind)]
            for before, after in pairwise(own):
                assert after.span.start == max(after.issued, before.span.end)


@pytest.mark.parametrize("algorithm", sorted(VOCAB_ALGORITHMS))
@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_offloading_delays_nothing_and_lowers_peaks(name, algorithm):
    moved = 0
    for place, (p, m) in enumerate(SIZES):
        case = problem_of(name, algorithm, p, m)
        costs = costs_of(case, (0.01, 0.7, 3.0)[(place + place // 3 + 1) % 3])
        plain = generate(name, case, costs)
        before = simulate(plain, case, costs)
        schedule = place_transfers(plain, case, costs)
        moved += len(schedule.offloads)
        assert Schedule.parse(schedule.text()) == schedule
        check_schedule(schedule, case)
        after = simulate(schedule, case, costs)
        assert after.makespan >= before.makespan - 1e-9
        assert after.makespan <= before.makespan * (1 + 1e-6)
        for held, more in zip(after.peak_bytes, before.peak_bytes, strict=True):
            assert held <= more + 1e-9
        assert list(after.peak_bytes) == pytest.approx(peaks_by_events(schedule, after, costs))
        assert_transfers_keep_their_links(schedule, after)
        program = lower(schedule, case, costs)
        check_program(program, case)
        for runtime, at_most in ((CUDA, 0.005), (GLOO, 1e-9)):
            replayed = replay(program, costs, runtime).timeline
            assert -1e-9 <= replayed.makespan / after.makespan - 1 <= at_most
            assert replayed.peak_bytes == pytest.approx(after.peak_bytes)
            assert len(replayed.transfers) == len(after.transfers)
    assert moved > 10


@pytest.mark.parametrize("seed", [78, 119, 142])
def test_what_would_delay_the_step_a_little_is_not_placed(monkeypatch, seed):
    """Some copies of these steps end just after the pass that they should precede."""
    rng, case = random.Random(seed), problem_of("1f1b", "two_barrier", 4, 3)
    costs = costs_of(case, 0.3)
    uneven = {
        kind: tuple(value * rng.uniform(0.5, 1.5) for value in values)
        for kind, values in costs.pass_seconds.items()
    }
    costs = replace(costs, pass_seconds=uneven)
    plain = generate("1f1b", case, costs)

    def longer() -> float:
        after = simulate(place_transfers(plain, case, costs), case, costs).makespan
        return after / simulate(plain, case, costs).makespan - 1

    assert abs(longer()) <= 1e-6
    monkeypatch.setattr(offloads, "_LONGER", 1.0)
    assert 1e-6 < longer() < 1, "here the rule decides"


def scattered(schedule: Schedule, case: Problem, chance: random.Random) -> Schedule:
    """Return `schedule` with random forward passes in host memory for random times."""
    found = []
    for order in schedule.ranks:
        places = {item: place for place, item in enumerate(order)}
        chosen = []
        for item, made in places.items():
            if item.kind is Kind.F and chance.random() < 0.7:
                read = places[Pass(item.stage, case.backward, item.microbatch)]
                if read - made > 1:
                    free, back = sorted(chance.randrange(made + 1, read) for _ in range(2))
                    chosen.append((back, item, free))
        found += [Offload(item, order[free], order[back]) for back, item, free in sorted(chosen)]
    return replace(schedule, offloads=tuple(found))


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "v_half", "interleaved"])
def test_no_place_of_a_transfer_makes_a_step_shorter_and_bytes_stay_exact(name):
    chance = random.Random(name)
    for p, m in ((1, 2), (2, 8), (4, 8)):
        case = problem_of(name, "one_barrier", p, m)
        plain = generate(name, case, costs_of(case, 0.0))
        for transfer in (0.0, 0.3, 2.0):
            costs = costs_of(case, transfer)
            schedule = scattered(plain, case, chance)
            assert Schedule.parse(schedule.text()) == schedule
            check_schedule(schedule, case)
            before, after = simulate(plain, case, costs), simulate(schedule, case, costs)
            assert after.makespan >= before.makespan - 1e-9
            if transfer == 0:
                assert after.makespan == pytest.approx(before.makespan, abs=1e-9)
            assert all(
                held <= more + 1e-9
                for held, more in zip(after.peak_bytes, before.peak_bytes, strict=True)
            )
            assert list(after.peak_bytes) == pytest.approx(peaks_by_events(schedule, after, costs))
            assert_transfers_keep_their_links(schedule, after)
            program = lower(schedule, case, costs)
            check_program(program, case)
            replayed = replay(program, costs, GLOO).timeline
            assert replayed.makespan == pytest.approx(after.makespan)
            assert replayed.peak_bytes == pytest.approx(after.peak_bytes)


def test_steps_that_go_as_planned_take_the_simulated_time():
    case = problem_of("v_half", "one_barrier", 4, 8)
    costs = costs_of(case, 0.7)
    plain = generate("v_half", case, costs)
    for schedule in (place_transfers(plain, case, costs), scattered(plain, case, random.Random(1))):
        seconds = simulate(schedule, case, costs).makespan
        found = disturbed_steps(schedule, case, costs, Disturbance(), 1)
        assert found.seconds == pytest.approx((seconds,))
        late = disturbed_steps(schedule, case, costs, Disturbance(0.1), 20).mean
        assert late > disturbed_steps(plain, case, costs, Disturbance(0.1), 20).mean - 1e-9


def test_a_link_serves_each_direction_in_the_order_of_issue():
    case = problem_of("gpipe", "none", 1, 3)
    costs = CostModel.uniform(1, 1, F=1.0, B=2.0, S=1.0)
    costs = replace(costs, offload_bytes=(1.0,), offload_seconds=(1.5,))
    text = (
        "# x\n0E0 0E1 0E2 0F0 0F1 offloaded:0F0 0F2 0S0 offloaded:0F1 0S1 reload:0F1 0S2 0T0 0T1 "
        "0T2 0B2 0B1 reload:0F0 0B0 0G0 0G1 0G2\n"
    )
    timeline = simulate(Schedule.parse(text), case, costs)
    spans = {t.span.name: (t.span.start, t.span.end) for t in timeline.transfers}
    assert spans == {
        "offload:0F0": (1, 2.5),
        "offload:0F1": (2.5, 4),
        "reload:0F1": (5.5, 7),
        "reload:0F0": (10.5, 12),
    }
    starts = [span.start for span in timeline.compute[0] if span.kind in "FSB"]
    assert starts == [0, 1, 2.5, 3.5, 4.5, 5.5, 6.5, 8.5, 12]
    assert timeline.peak_bytes == (2.0,)
    # 0F1 takes a byte although its copy waits for the link.
    assert timeline.host_bytes(0, 0.0) == 2.0
    assert timeline.moved_bytes(0) == 2.0
    assert timeline.link_busy(0) == pytest.approx((3 / 14, 3 / 14))


def test_an_early_reload_costs_memory():
    case = problem_of("gpipe", "none", 1, 8)
    costs = CostModel.uniform(1, 1, F=1.0, B=2.0)
    costs = replace(costs, offload_bytes=(1.0,), offload_seconds=(0.25,))
    placed = place_transfers(generate("gpipe", case, costs), case, costs)
    last = Pass(0, Kind.F, 7)
    early = replace(placed, offloads=tuple(replace(o, reload_after=last) for o in placed.offloads))
    peaks = [simulate(order, case, costs).peak_bytes[0] for order in (placed, early)]
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize("transfer", [0.3, 1.0, 2.0])
def test_a_faster_link_lowers_the_peak(transfer):
    case = problem_of("1f1b", "none", 4, 16)
    plain = generate("1f1b", case, costs_of(case, transfer))
    peaks = []
    for factor in (2.0, 1.0, 0.5):
        costs = costs_of(case, factor * transfer)
        peaks.append(simulate(place_transfers(plain, case, costs), case, costs).peak_bytes[0])
    assert peaks == sorted(peaks, reverse=True)


def test_a_link_that_keeps_up_with_the_steady_state_keeps_up_with_the_warm_up():
    """A transfer takes longer than a forward, and less than forward and backward together."""
    case = problem_of("1f1b", "none", 8, 32)
    costs = CostModel.uniform(8, 8, F=1.0, B=2.0)
    costs = replace(costs, offload_bytes=(1.0,) * 8, offload_seconds=(2.0,) * 8)
    schedule = place_transfers(generate("1f1b", case, costs), case, costs)
    assert simulate(schedule, case, costs).peak_bytes[0] <= 4.0


def test_what_lives_too_short_stays_on_the_device():
    case = problem_of("1f1b", "none", 4, 8)
    costs = costs_of(case, 0.5)
    schedule = place_transfers(generate("1f1b", case, costs), case, costs)
    assert {offload.item.stage for offload in schedule.offloads} <= {0, 1, 2}
    assert schedule.offloads


def changed(program: Program, rank: int, ops: list[Op]) -> Program:
    ranks = list(program.ranks)
    ranks[rank] = tuple(ops)
    return replace(program, ranks=tuple(ranks))


def test_a_program_with_a_missing_doubled_or_misplaced_transfer_is_refused():
    case = problem_of("1f1b", "one_barrier", 3, 6)
    costs = costs_of(case, 0.3)
    schedule = place_transfers(generate("1f1b", case, costs), case, costs)
    program = lower(schedule, case, costs)
    check_program(program, case)
    caught = 0
    for rank, ops in enumerate(program.ranks):
        for place, op in enumerate(ops):
            if op.action not in HOST_TRANSFERS:
                continue
            rest = [*ops[:place], *ops[place + 1 :]]
            made = rest.index(next(o for o in rest if str(o.item) == str(op.item)))
            mutants = [rest, [*rest, op], [*rest[:made], op, *rest[made:]]]
            mutants.append([*ops[: place + 1], op, *ops[place + 1 :]])
            if op.action in (Action.OFFLOAD, Action.RESTORED):
                mutants.append([*ops[:place], *ops[place + 1 : place + 2], op, *ops[place + 2 :]])
            for mutant in mutants:
                with pytest.raises(ValueError, match=str(op.item)):
                    check_program(changed(program, rank, mutant), case)
                caught += 1
    assert caught > 50


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0F0 offloaded:0B1 0F1 reload:0B1 0B0 0B1", "0B1 is offloaded, but no forward pass"),
        ("offloaded:0F0 0F0 0F1 reload:0F0 0B0 0B1", "0F0 is offloaded from 0F0 to 0F1, which"),
        ("0F0 offloaded:0F0 0F1 0B0 reload:0F0 0B1", "0F0 is offloaded from 0F1 to 0B0, which"),
    ],
)
def test_a_time_in_host_memory_that_is_not_between_its_passes_is_refused(line, words):
    case = problem_of("1f1b", "none", 1, 2)
    with pytest.raises(ValueError, match=words):
        check_schedule(Schedule.parse(f"# x\n{line} 0S0 0T0 0S1 0T1 0E0 0E1 0G0 0G1\n"), case)


@pytest.mark.parametrize(
    "line",
    [
        "reload:0F0 0F0",
        "0F0 reload:0F0",
        "0F0 offloaded:0F0 reload:0F0 0F1",
        "0F0 offloaded:0F0",
        "0F0 offloaded:0F0 0F1",
        "0F0 offloaded:0F0 0F1 reload:0F0 reload:0F0",
    ],
)
def test_a_half_time_in_host_memory_is_refused_with_its_line(line):
    with pytest.raises(ValueError, match=r"line 2: (offloaded|reload):0F0"):
        Schedule.parse(f"# x\n{line}\n")


def test_of_all_waits_for_the_link_the_lowest_peak_counts_and_then_the_fewest_transfers():
    chance, together = random.Random(0), set()
    for p, m in ((1, 8), (2, 8), (4, 8)):
        for transfer in (0.1, 0.7, 1.3, 2.5):
            case = problem_of("1f1b", "one_barrier", p, m)
            costs = costs_of(case, transfer, chance.choice((0.3, 1.0)))
            schedule, network = generate("1f1b", case, costs), Network.of(case, costs)
            for rank, spans in enumerate(simulate(schedule, case, costs).compute):
                order, numbers = schedule.ranks[rank], network.orders(schedule)[rank]
                starts, ends = [span.start for span in spans], [span.end for span in spans]
                its = offloads._Rank.of(order, numbers, case, costs, network)
                changes = [costs.byte_change(item) for item in order]
                tried = [[], *(its._placed(wait, starts, ends)[0] for wait in offloads._WAITS)]
                peaks = [round(its._peak(one), 9) for one in tried]
                best = min(zip(peaks, map(len, tried), strict=True))
                together.add(len(set(zip(peaks, map(len, tried), strict=True))))
                found, lowest = its.best(ends)
                peak = HostBytes.of(found, costs).peak(order, changes)
                assert (round(peak, 9), len(found)) == best
                assert lowest == peak
    assert max(together) > 2, "waits differ"
