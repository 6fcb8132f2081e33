"""The checker names what is wrong. That it accepts right schedules is tested in test_generators."""

import re
from dataclasses import replace

import pytest

from schedules import check
from schedules.check import check_program, check_schedule
from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.graph import DeadlockError
from schedules.ir import Pass, Schedule
from schedules.lower import Action, lower
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS, evaluation
from tests.schedules.cases import cost, problem


@pytest.fixture
def case():
    return problem(3, 4, "one_barrier")


@pytest.fixture
def schedule(case):
    return generate("1f1b", case, cost(3, S=1, T=1))


@pytest.fixture
def program(case, schedule):
    return lower(schedule, case, cost(3, S=1, T=1))


def edited(program, rank, edit):
    ops = list(program.ranks[rank])
    edit(ops)
    return replace(program, ranks=(*program.ranks[:rank], tuple(ops), *program.ranks[rank + 1 :]))


def swapped(schedule, rank, first, second):
    order = list(schedule.ranks[rank])
    a, b = order.index(Pass.parse(first)), order.index(Pass.parse(second))
    order[a], order[b] = order[b], order[a]
    return Schedule(
        schedule.name, (*schedule.ranks[:rank], tuple(order), *schedule.ranks[rank + 1 :])
    )


def test_a_cycle_of_waiting_is_a_deadlock_that_names_the_passes(case, schedule):
    wrong = swapped(schedule, 2, "2S0", "2B0")  # B of the last stage before the S it depends on
    with pytest.raises(DeadlockError, match=r"2B0 waits for .*2S0|2S0 waits for .*2B0"):
        check_schedule(wrong, case)
    with pytest.raises(DeadlockError, match=r"deadlock: .*2B0.* waits for"):
        simulate(wrong, case, cost(3, S=1, T=1))


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_a_right_schedule_needs_no_search_for_the_words_of_a_cycle(monkeypatch, name):
    """The search takes far longer than to see that there is none."""
    family = GENERATORS[name]
    for p, m in ((1, 1), (3, 4)):
        right = Problem(
            family.layout_of(p), m, VOCAB_ALGORITHMS["one_barrier"], family.split_backward
        )
        made = generate(name, right, CostModel({}))
        monkeypatch.setattr(check, "require_acyclic", None)
        check_schedule(made, right)
        monkeypatch.undo()


def test_a_cycle_over_several_ranks_is_found(case, schedule):
    # The S of rank 0 comes after a backward, which waits for that S.
    wrong = swapped(schedule, 0, "0S0", "0B0")
    with pytest.raises(DeadlockError, match="0S0"):
        check_schedule(wrong, case)


OWN = "its passes are F, B of stage 1, microbatches 0 to 3"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            (lambda order: order.remove(Pass.parse("1F2"))),
            f"never runs 1F2 (1 pass missing); {OWN}",
        ),
        (
            (lambda order: order.__delitem__(slice(2, None))),
            f"never runs 1B0 (22 passes missing); {OWN}",
        ),
        ((lambda order: order.append(Pass.parse("1F2"))), "runs 1F2 2 times; every pass runs once"),
        (
            (lambda order: order.append(Pass.parse("0F2"))),
            f"runs 0F2, which is not among its passes; {OWN}",
        ),
        (
            (lambda order: order.append(Pass.parse("1S4"))),
            "runs 1S4, which is not among its passes; vocabulary one_barrier has E and G on every "
            "rank, S and T on every rank",
        ),
    ],
)
def test_every_pass_runs_once_on_its_rank(case, schedule, edit, message):
    order = list(schedule.ranks[1])
    edit(order)
    with pytest.raises(ValueError, match=f"^rank 1 {re.escape(message)}$"):
        check_schedule(
            Schedule("edited", (schedule.ranks[0], tuple(order), schedule.ranks[2])), case
        )


def index_of(ops, text):
    (index,) = [i for i, op in enumerate(ops) if str(op) == text]
    return index


def test_ranks_must_order_collectives_in_the_same_way(case, program):
    def start_one_broadcast_first(ops):  # this rank only receives, so it breaks no other rule
        ops.insert(0, ops.pop(index_of(ops, "start:C0.2")))

    with pytest.raises(
        ValueError, match=r"differently: at place 0, rank 1 starts C0\.2, rank 0 C0\.0"
    ):
        check_program(edited(program, 1, start_one_broadcast_first), case)


def test_transfers_between_two_ranks_have_one_order(case, program):
    with pytest.raises(
        ValueError, match=r"rank 0 sends 0F0 to rank 1, which receives 0F1 in its place"
    ):
        check_program(
            edited(program, 1, lambda ops: ops.insert(0, ops.pop(index_of(ops, "recv:0F1@0")))),
            case,
        )


def test_a_receive_issued_too_late_deadlocks_under_rendezvous():
    """Rank 0 blocks in the send of 0F1 before it receives 1B0.

    Rank 1 receives 0F1 only after it has sent 1B0.
    """
    case = problem(2, 3, "none")
    program = lower(generate("1f1b", case, cost(2)), case, cost(2))
    check_program(program, case)

    def receive_late(ops):
        receive = ops.pop(index_of(ops, "recv:0F1@0"))
        ops.insert(index_of(ops, "arrive:0F1@0"), receive)

    with pytest.raises(
        DeadlockError, match=r"the transfer of 0F1 waits for|waits for the transfer of 0F1"
    ):
        check_program(edited(program, 1, receive_late), case)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("1f1b", "none"), ("1f1b", "two_barrier"), ("zb_v", "one_barrier"), ("interleaved", "naive")],
)
@pytest.mark.usefixtures("unrefined")
def test_no_operation_of_a_program_is_missing_doubled_or_behind_what_needs_it(name, algorithm):
    """Every operation that is left out, done twice, or moved to where it cannot be, is found."""
    family = GENERATORS[name]
    case = Problem(family.layout_of(3), 2, VOCAB_ALGORITHMS[algorithm], family.split_backward)
    program = lower(generate(name, case, CostModel({})), case, CostModel({}))
    check_program(program, case)
    for rank, ops in enumerate(program.ranks):
        for place, op in enumerate(ops):
            rest = (*ops[:place], *ops[place + 1 :])
            wrong = [rest, (op, *ops), (*ops, op)]
            wrong += [(op, *rest)] * (op.action is not Action.NEED)
            wrong += [(*rest, op)] * (op.action in (Action.RECV, Action.START))
            for changed in wrong:
                ranks = (*program.ranks[:rank], changed, *program.ranks[rank + 1 :])
                if changed != ops:
                    with pytest.raises(ValueError, match=r"rank \d|deadlock"):
                        check_program(replace(program, ranks=ranks), case)


def complete(text, completes=True):
    def edit(ops):
        at = index_of(ops, text)
        ops[at] = replace(ops[at], completes=completes)

    return edit


def wrong_exchange(ops):
    at = index_of(ops, "start:C0.1")
    ops[at] = replace(ops[at], exchange=replace(ops[at].exchange, root=0))


def test_a_program_of_other_microbatches_is_refused(case, program):
    with pytest.raises(ValueError, match=r"of 3 microbatches.* of 4"):
        check_program(replace(program, num_microbatches=3), case)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda ops: ops.append(ops[0]), "rank 1 does .* twice"),
        (lambda ops: ops.pop(index_of(ops, "1F3")), "rank 1 does send:1F3@2 before 1F3"),
        (lambda ops: ops.pop(index_of(ops, "1G3!")), "first difference: 1G3"),
        (lambda ops: ops.pop(index_of(ops, "need:1S0")), "does 1S0 before it needs the weights"),
        (complete("1T2"), "does 1T3! after 1T2!, which completes"),
        (complete("1T3!", False), "never completes the gradient that 1T3 is the last for"),
        (complete("1F3"), "completes no gradient with 1F3!"),
        (wrong_exchange, r"does start:C0\.1 with the exchange"),
        (
            lambda ops: ops.insert(0, ops.pop(index_of(ops, "send:1F0@2"))),
            "does send:1F0@2 before 1F0",
        ),
        (
            lambda ops: ops.insert(0, ops.pop(index_of(ops, "arrive:0F0@0"))),
            "does arrive:0F0@0 before recv:0F0@0",
        ),
    ],
)
def test_every_rule_of_a_rank_is_checked(case, program, edit, message):
    with pytest.raises(ValueError, match=message):
        check_program(edited(program, 1, edit), case)


def test_a_collective_that_no_rank_starts_is_missed():
    """C1 of an evaluation is such a collective: no pass waits for it."""
    case = problem(2, 2, "one_barrier")
    case = replace(case, algorithm=evaluation(case.algorithm), forward_only=True)
    program = lower(generate("gpipe", case, cost(2)), case, cost(2))
    check_program(program, case)
    for rank in range(2):
        program = edited(
            program,
            rank,
            lambda ops: [ops.remove(op) for op in list(ops) if str(op).endswith(":C1.1")],
        )
    with pytest.raises(ValueError, match=r"does not start every output collective: 3 of 4"):
        check_program(program, case)


def test_a_schedule_for_other_ranks_is_refused(case, schedule):
    with pytest.raises(ValueError, match="has 2 ranks, the layout 3"):
        check_schedule(Schedule("short", schedule.ranks[:2]), case)
