"""We read the schedules that torch.distributed.pipelining writes, and torch reads ours."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from schedules.check import check_base, check_schedule
from schedules.cost import CostModel
from schedules.generators import GENERATORS, complete, generate
from schedules.graph import DeadlockError
from schedules.ir import Kind, Pass, Schedule
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.torch_csv import from_csv, to_csv
from schedules.vocab import VOCAB_ALGORITHMS

SIZES = [(p, m) for p in (1, 2, 3, 4) for m in (1, 2, 8)]


def schedules_of(*kinds):
    passes = st.builds(Pass, st.integers(0, 99), st.sampled_from(kinds), st.integers(0, 999))
    orders = st.lists(passes, min_size=1, max_size=8).map(tuple)
    return st.lists(orders, min_size=1, max_size=5).map(
        lambda ranks: Schedule("any name", tuple(ranks))
    )


@given(schedules_of(Kind.F, Kind.B) | schedules_of(Kind.F, Kind.I, Kind.W))
def test_stage_passes_round_trip(schedule):
    assert from_csv(to_csv(schedule), schedule.name) == schedule


def test_vocabulary_passes_are_left_out():
    schedule = Schedule.parse("# x\n0E0 0F0 0S0 0T0 0B0 0G0\n1S0 1F0 1B0 1T0\n")
    assert to_csv(schedule) == "0F0,0B0\n1F0,1B0\n"


def test_bubbles_quotes_and_the_line_ends_of_torch_are_read():
    schedule = from_csv('0F0,, 0F1 ,"0B0",0B1\r\n,1F0,1B0,1F1,1B1,\r\n', "x")
    assert schedule == Schedule.parse("# x\n0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n")


def test_if_any_backward_is_split_all_are():
    assert from_csv("0F0,0B0,0F1,0B1\n1F0,1I0,1W0,1F1,1B1\n", "x") == Schedule.parse(
        "# x\n0F0 0I0 0W0 0F1 0I1 0W1\n1F0 1I0 1W0 1F1 1I1 1W1\n"
    )


@pytest.mark.parametrize(
    "action", ["SEND_F", "RECV_F", "SEND_B", "RECV_B", "UNSHARD", "RESHARD", "REDUCE_GRAD"]
)
@pytest.mark.parametrize("microbatch", ["", "0"])
def test_communication_is_refused_with_its_place(action, microbatch):
    token = f"1{action}{microbatch}"
    with pytest.raises(
        ValueError, match=f"line 2, column 3: '{token}' is communication; .*compute_only"
    ):
        from_csv(f"0F0,0B0\n,1F0,{token},1B0\n", "x")


def test_every_action_of_torch_is_read_or_refused_by_name():
    forward, backward = (torch_schedules._Action.from_str(token) for token in ("0F1", "3B0"))
    for kind in torch_schedules._ComputationType:
        pair = (forward, backward) if kind is torch_schedules.OVERLAP_F_B else None
        token = str(torch_schedules._Action(0, kind, 0, pair))
        if kind.value in set(Kind):
            assert from_csv(token, "x").ranks[0][0] == Pass.parse(token)
        else:
            with pytest.raises(
                ValueError,
                match=f"line 1, column 1: {re.escape(repr(token))} (is communication|overlaps)",
            ):
                from_csv(token, "x")


def test_an_overlapped_pair_is_refused_with_its_place():
    message = "line 1, column 2: '(0F1;3B0)OVERLAP_F_B' overlaps two passes; write a cell for each"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_csv("0F0,(0F1;3B0)OVERLAP_F_B\n", "x")


@pytest.mark.parametrize("kind", "STEG")
def test_a_vocabulary_pass_is_refused_with_its_place(kind):
    with pytest.raises(ValueError, match=f"line 1, column 2: '0{kind}0' is a vocabulary pass"):
        from_csv(f"0F0,0{kind}0,0B0\n", "x")


@pytest.mark.parametrize(
    "token", ["0F", "F0", "0f0", "0F0x", "00F0", "-1F0", "0X0", "0F0 0B0", "None"]
)
def test_a_malformed_cell_is_refused_with_its_place(token):
    with pytest.raises(ValueError, match=f"line 2, column 3: '{token}' is not a pass; write"):
        from_csv(f"0F0,0B0\n1F0,,{token}\n", "x")


@pytest.mark.parametrize(
    "text", ["0F0,0B0\n\n1F0,1B0\n", "0F0,0B0\n,,\n", "0F0,0B0\n \n", '0F0,0B0\r\n""\r\n']
)
def test_a_row_without_passes_is_refused_for_it_would_shift_the_ranks(text):
    with pytest.raises(ValueError, match="line 2 has no passes, but every line is a rank"):
        from_csv(text, "x")


def test_no_rows_and_open_quotes_are_refused():
    with pytest.raises(ValueError, match="the CSV has no rows; write one per rank"):
        from_csv("", "x")
    with pytest.raises(ValueError, match="line 2 is not CSV"):
        from_csv('0F0,0B0\n"1F0,1B0\n', "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n1F0\n", "rank 1 never runs 1B0"),
        ("0F0,0B0\n1F0,1B0,1B0\n", "rank 1 runs 1B0 2 times"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", "rank 0 runs 0F1, which is not among its passes"),
        ("0F0,0I0,0W0\n1F0,1I0,1W0\n", "rank 0 runs 0I0, which is not among its passes"),
        ("1F0,1B0\n0F0,0B0\n", "rank 0 runs 1F0, which is not among its passes"),
        ("0F0,0B0\n", "has 1 ranks, the layout 2"),
    ],
)
def test_an_order_of_another_problem_is_found_before_it_is_woven(text, message):
    with pytest.raises(ValueError, match=message):
        check_base(
            from_csv(text, "x"), Problem(Layout("linear", 2), 1, VOCAB_ALGORITHMS["one_barrier"])
        )


def test_an_order_that_blocks_is_found_when_completed():
    layout = Layout("linear", 2)
    problem = Problem(layout, 1, VOCAB_ALGORITHMS["one_barrier"])
    base = from_csv("0F0,0B0\n1B0,1F0\n", "x")
    check_base(base, problem)
    words = "deadlock: 1B0 waits for 1F0 waits for 1B0; 1B0, 1F0 on rank 1"
    with pytest.raises(DeadlockError, match=words):
        complete("x", base.ranks, problem, costs_of(layout))


def test_microbatches_out_of_order_are_named_where_passes_added_in_order_wait_for_them():
    layout = Layout("linear", 2)
    problem = Problem(layout, 2, VOCAB_ALGORITHMS["none"])
    base = from_csv("0F1,0F0,0B1,0B0\n1F1,1B1,1F0,1B0\n", "x")
    check_base(base, problem)
    with pytest.raises(DeadlockError, match=r"^rank 0 runs 0F1 before 0F0, but"):
        complete("x", base.ranks, problem, costs_of(layout))


# Tests with torch. Until the first step, its schedule classes read only numbers from their stages.


def stages_of(layout):
    """Return stand-ins for the stages of rank 0."""
    numbers = {
        "num_stages": layout.num_stages,
        "group_size": layout.num_ranks,
        "group_rank": 0,
        "submod": None,
    }
    return [SimpleNamespace(**numbers) for _ in range(layout.num_chunks)]


def costs_of(layout):
    seconds = {"F": 1, "B": 2, "I": 1, "W": 1, "S": 0.5, "T": 0.5, "E": 0.1, "G": 0.1}
    return CostModel.uniform(layout.num_stages, layout.num_ranks, hop=0.1, barrier=0.1, **seconds)


def load_in_torch(text, layout, num_microbatches, path):
    """Return the order that torch reads from the CSV `text`.

    torch raises AssertionError if `_validate_schedule` refuses the order, or if it finds no order
    of sends and receives.
    """
    path.write_text(text)
    runtime = torch_schedules._PipelineScheduleRuntime(stages_of(layout), num_microbatches)
    runtime._load_csv(str(path))
    assert runtime.stage_index_to_group_rank == {
        stage: layout.rank_of(stage) for stage in range(layout.num_stages)
    }
    return tuple(tuple(map(str, runtime.pipeline_order[rank])) for rank in range(layout.num_ranks))


def tokens(ranks):
    return tuple(
        tuple(str(item) for item in order if not item.kind.is_vocabulary) for order in ranks
    )


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("name", GENERATORS)
def test_torch_accepts_every_schedule_of_the_table(name, p, m, tmp_path):
    family = GENERATORS[name]
    layout = family.layout_of(p)
    for algorithm in ("none", "one_barrier"):
        problem = Problem(layout, m, VOCAB_ALGORITHMS[algorithm], family.split_backward)
        base = Schedule(name, tuple(map(tuple, family.base_order(problem))))
        for schedule in (base, generate(name, problem, costs_of(layout))):
            text = to_csv(schedule)
            assert load_in_torch(text, layout, m, tmp_path / "order.csv") == tokens(schedule.ranks)
            assert tokens(from_csv(text, name).ranks) == tokens(schedule.ranks)


def test_torch_refuses_what_is_no_step(tmp_path):
    """The test above can fail: torch checks what it reads."""
    layout = Layout("linear", 2)
    for text in ("0F0,0B0\n1F0\n", "0F0,0B0\n1B0,1F0\n", "0F0,0B0\n0F1,0B1\n", "0F0,0B0\n"):
        with pytest.raises(AssertionError):
            load_in_torch(text, layout, 1, tmp_path / "order.csv")


FROM_TORCH = [
    (cls, Layout("loop", p, chunks), m, split)
    for cls, split in [
        ("ScheduleInterleaved1F1B", False),
        ("ScheduleInterleavedZeroBubble", True),
        ("ScheduleLoopedBFS", False),
    ]
    for p in (1, 2, 4)
    for chunks in (1, 2, 3)
    for m in (1, 2, 8)
] + [("ScheduleZBVZeroBubble", Layout("v", p, 2), m, True) for p in (1, 2, 3, 4) for m in (1, 2, 8)]


def dump(cls, layout, num_microbatches, path, **how):
    getattr(torch_schedules, cls)(stages_of(layout), num_microbatches)._dump_csv(str(path), **how)
    return path.read_text()


def require_runnable(base, layout, num_microbatches, split_backward):
    """Check that `base` can be completed with every vocabulary algorithm.

    The result must be right, cannot deadlock, and keeps the order of F and B, or of F and I.
    """
    for algorithm in VOCAB_ALGORITHMS.values():
        problem = Problem(layout, num_microbatches, algorithm, split_backward)
        check_base(base, problem)
        woven = complete(base.name, base.ranks, problem, costs_of(layout), keep_order=True)
        check_schedule(woven, problem)
        work = num_microbatches * layout.num_chunks * 3
        assert simulate(woven, problem, costs_of(layout)).makespan >= work
        for after, before in zip(tokens(woven.ranks), tokens(base.ranks), strict=True):
            assert [token for token in after if "W" not in token] == [
                token for token in before if "W" not in token
            ]


@pytest.mark.parametrize(("cls", "layout", "m", "split"), FROM_TORCH)
def test_the_orders_of_torch_run_here_with_any_vocabulary(cls, layout, m, split, tmp_path):
    text = dump(cls, layout, m, tmp_path / "order.csv", format="compute_only")
    require_runnable(from_csv(text, cls), layout, m, split)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 8)])
def test_dualpipe_v_runs_here_once_its_pairs_are_written_one_after_the_other(p, m, tmp_path):
    layout = Layout("v", p, 2)
    text = dump("ScheduleDualPipeV", layout, m, tmp_path / "order.csv", format="compute_only")
    with pytest.raises(ValueError, match="overlaps two passes"):
        from_csv(text, "dualpipe_v")
    apart = re.sub(r"\((\w+);(\w+)\)OVERLAP_F_B", r"\1,\2", text)
    require_runnable(from_csv(apart, "dualpipe_v"), layout, m, split_backward=True)


@pytest.mark.parametrize(("p", "chunks", "m"), [(2, 2, 4), (2, 3, 8), (4, 2, 8)])
def test_interleaved_1f1b_of_torch_takes_the_work_plus_one_fill_and_drain_of_a_chunk(
    p, chunks, m, tmp_path
):
    layout = Layout("loop", p, chunks)
    text = dump("ScheduleInterleaved1F1B", layout, m, tmp_path / "order.csv", format="compute_only")
    problem = Problem(layout, m, VOCAB_ALGORITHMS["none"])
    costs = CostModel.uniform(layout.num_stages, p, F=1, B=2)
    woven = complete("interleaved", from_csv(text, "interleaved").ranks, problem, costs)
    assert simulate(woven, problem, costs).makespan == pytest.approx(3 * (m * chunks + p - 1))


def test_a_file_with_the_communication_of_torch_is_refused(tmp_path):
    """torch writes such a file by default."""
    text = dump("ScheduleInterleaved1F1B", Layout("loop", 2, 2), 2, tmp_path / "order.csv")
    with pytest.raises(
        ValueError, match=r'line 1, column 1: .* is communication; dump .* format="compute_only"'
    ):
        from_csv(text, "x")
