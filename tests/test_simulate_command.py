"""vp-simulate: known figures, readable files, refusals in one line, all without torch."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from schedules.generators import GENERATORS
from schedules.generators.auto import solve
from schedules.ir import Kind, Schedule
from schedules.lower import lower
from schedules.replay import RUNTIMES, Hops, Runtime, replay
from schedules.vocab import searched_algorithms
from vp_train.commands.frontier import Curve, Reached, drawn, files_words, schedule_files
from vp_train.commands.simulate import (
    Outcome,
    Refusal,
    _named_point,
    grid,
    main,
    report,
    simulate_each,
    simulate_step,
)
from vp_train.config import ConfigError
from vp_train.model import shape
from vp_train.planning.plan import plan_step
from vp_train.settings import load_config

ROOT = Path(__file__).parent.parent
PUBLISHED = json.loads((ROOT / "benchmarks" / "data" / "a100_8gpu_s2048.json").read_text())["rows"]
AS_TYPED = [
    "schedule=v_half",
    "vocab=one_barrier",
    "parallel.pp=8",
    "num_microbatches=32",
    "cost=a100_4b",
]
# F = 1 s and B = 2 s per stage of one layer, all else takes no time: textbook formulas hold.
UNIT = [
    "vocab=none",
    "parallel.pp=4",
    "model.num_layers=4",
    "cost.hop_seconds=0",
    "cost.collective_seconds=0",
    "cost.layer_forward_seconds=1",
    "cost.layer_backward_seconds=2",
    "cost.output_row_seconds=0",
]
LAST_LANES = """\
  2       F0-F1-      B0----F2-B1----F3-B2----F4-B3----F5-B4----F6-B5----F7-B6----   B7----
  3          F0-B0----F1-B1----F2-B2----F3-B3----F4-B4----F5-B5----F6-B6----F7-B7----
"""
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def vp_simulate(run_here):
    return partial(run_here, main, "vp-simulate")


@pytest.mark.slow
def test_as_in_the_readme_without_torch():
    code = "import atexit, sys; from vp_train.commands.simulate import main\n"
    code += "atexit.register(lambda: print('torch' in sys.modules)); main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *AS_TYPED],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "False"
    assert [line[:4] for line in lines if line[:4].strip().isdecimal()] == [
        f"{rank:>3} " for rank in range(8)
    ] + [f"{rank:>4}" for rank in range(8)]
    outcome = simulate_step(load_config(AS_TYPED))
    for words in (
        "v_half with one_barrier, 8 ranks, 32 microbatches of 1 x 2,048 tokens",
        f"makespan     {outcome.timeline.makespan:.2f} s, without gradient exchange and optimizer",
        f"mean bubble  {outcome.timeline.mean_bubble:.1%}",
        "peak memory  ",
        f"lower bound  {outcome.bound.seconds:.2f} s: {outcome.bound.reason}",
        f"gap          {outcome.gap:.1%}",
        "costs        measured on 8 x A100-80G in float16",
        "simulated in ",
    ):
        assert words in done.stdout


def test_1f1b_takes_the_work_and_one_fill_and_drain(vp_simulate, monkeypatch):
    monkeypatch.setenv("COLUMNS", "103")  # of a grid, 99 are for the 33 seconds
    code, out, _ = vp_simulate(*UNIT, "num_microbatches=8")
    assert code == 0
    assert "makespan     33.00 s" in out  # (m + p - 1)(F + B)
    assert "mean bubble  27.3%" in out  # (p - 1) / (m + p - 1)
    assert "at most 4 microbatches in flight" in out  # p
    assert "gap          0.0% above the bound" in out
    in_flight = [
        line.split()[-3]
        for line in out.splitlines()
        if line[:4].strip().isdecimal() and " s " in line
    ]
    assert in_flight == ["4", "3", "2", "1"]
    assert LAST_LANES in out


def test_rows_that_would_balance_the_work_are_proposed_and_do(vp_simulate):
    uneven = [
        "vocab=one_barrier",
        "parallel.pp=4",
        "model.num_layers=7",
        "parallel.placement=balanced",
    ]
    code, out, _ = vp_simulate(*uneven)
    assert code == 0
    assert (
        "vocab.balance=true would take 5.8% off the work of the busiest rank, "
        "with 7,296 to 10,880 rows" in out
    )
    even, balanced = (
        simulate_step(load_config([*uneven, f"vocab.balance={words}"])).timeline
        for words in ("false", "true")
    )
    busiest = [max(map(timeline.busy, range(4))) for timeline in (even, balanced)]
    assert busiest[1] / busiest[0] == pytest.approx(1 - 0.058, abs=5e-4)
    assert "vocab.balance" not in vp_simulate(*uneven, "vocab.balance=true")[1]
    assert "vocab.balance" not in vp_simulate("vocab=one_barrier", "parallel.pp=4")[1]


def test_settings_are_those_of_vp_train(vp_simulate):
    code, out, _ = vp_simulate("--print-config", "cost=a100_4b", "model.vocab_size=64000")
    assert code == 0
    for words in ("hidden_size: 3072", "vocab_size: 64000", "layer_forward_seconds: 0.002835"):
        assert words in out
    code, out, _ = vp_simulate("--help")
    assert code == 0
    for words in (
        "--out DIR",
        "--compare A,B,...",
        "--vocab A,B,...",
        "--runtime NAME",
        "a100_4b",
        "optim.clip_grad_norm=",
        "vp-simulate --out",
    ):
        assert words in out


def test_a_model_may_be_chosen_after_all():
    assert load_config(["cost=a100", "model=small"]).model.hidden_size == 256
    assert (
        load_config(["cost=a100_4b", "model=small"]).model.hidden_size == 256
    )  # the plan refuses it, see below


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "1f1b,x"], "--compare: 'x' is not known; choose one of gpipe, 1f1b"),
        (
            ["--compare=1f1b", "--vocab", "tree"],
            "--vocab: 'tree' is not known; choose one of none, naive",
        ),
        (["--vocab", "none"], "--vocab belongs to --compare, --frontier, --jitter and"),
        (["--vocab", "none,naive"], "for one algorithm write vocab=none"),
        (["--vocab", "all"], "for one algorithm write vocab=one_barrier"),
        (["--samples", "9"], "--samples belongs to --jitter or --straggler"),
        (["--jitter", "x"], "--jitter x is not a fraction in [0, 1]; for 10 % write --jitter 0.1"),
        (["--jitter", "10"], "--jitter 10 is not a fraction in [0, 1]; for 10 % write"),
        (["--straggler", "2"], "--straggler 2 is not a fraction in [0, 1]; for 10 % write --strag"),
        (["--straggler", "-1"], "--straggler -1 is not a fraction in [0, 1]; for 10 % write"),
        (["--jitter", "0.1", "--samples", "0"], "--samples 0 is not a whole number in [1, 10,000]"),
        (["--frontier", "--jitter", "0.1"], "--frontier goes without --jitter; drop one of"),
        (["--jitter", "0.1", "--runtime", "cuda"], "--runtime goes without --jitter"),
        (["--runtime", "mpi"], "--runtime: 'mpi' is not known; choose one of cuda, gloo"),
        (["--runtime"], "--runtime needs a value: --runtime NAME"),
        (["--out"], "--out needs a value: --out DIR"),
        (["--out", "--compare", "1f1b"], "--out needs a value: --out DIR"),
        (
            ["--plot"],
            "--plot is not an option; there are --out, --compare, --frontier, --vocab, --runtime, "
            "--program, --jitter, --straggler, --samples, --seed, --help and --print-config",
        ),
        (
            ["vocab=none,naive"],
            "vocab=none,naive: one value is needed; vp-simulate --compare compares several",
        ),
        (
            ["model.num_layers=7"],
            "model.num_layers=7 does not split over 4 stages; use parallel.placement=balanced",
        ),
        (
            ["cost.layer_forward_seconds=-1"],
            "cost.layer_forward_seconds=-1.0 is too small; it must be at least 0",
        ),
        (["cost.hop_seconds=inf"], "cost.hop_seconds=inf is not a finite number"),
        (["cost.rank_slowness=[1,1,1,inf]"], "cost.rank_slowness=inf is not a finite number"),
        (
            ["cost.flops_per_second=0.5"],
            "cost.flops_per_second=0.5 is too small; it must be at least 1",
        ),
        (
            ["schedule.file=a.txt", "--compare", "1f1b"],
            "--compare simulates schedules by name, but schedule.file=a.txt is set",
        ),
        (
            ["cost=a100_4b", "model=small"],
            "these pass times are not for it; use a cost that is, or one that counts FLOPs",
        ),
        (
            ["cost=a100_4b", "micro_batch_size=2"],
            "cost.measured_layer_flops=5.154e+11, but a layer of this model takes 1.03",
        ),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_78(vp_simulate, arguments, message):
    code, out, err = vp_simulate(*arguments)
    assert code == 78
    assert err.startswith("vp-simulate: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert "bubble" not in out


@pytest.mark.parametrize("words", [(), ("--compare", "all"), ("--frontier",)])
def test_a_directory_that_cannot_be_written_is_known_before_the_work(vp_simulate, tmp_path, words):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", "/proc"):
        code, out, err = vp_simulate("--out", place, *words)
        assert (code, out) == (74, "")
        assert err.startswith(f"vp-simulate: --out {place} cannot be written (")
        assert len(err.splitlines()) == 1


def test_a_refusal_leaves_no_directory(vp_simulate, tmp_path):
    code, _, _ = vp_simulate("--out", tmp_path / "a" / "b", "--compare", "x")
    assert code == 78
    assert not list(tmp_path.iterdir())


def test_out_writes_files_that_can_be_read(vp_simulate, tmp_path):
    code, out, _ = vp_simulate("--out", tmp_path / "a" / "b", *UNIT)
    assert code == 0
    names = (
        "config.yaml",
        "schedule.txt",
        "schedule.svg",
        "schedule.png",
        "trace.json",
        "table.json",
    )
    assert f"written to {tmp_path / 'a' / 'b'}: {', '.join(names)}" in out
    config, text, picture, image, trace, table = (tmp_path / "a" / "b" / name for name in names)
    plan = plan_step(load_config(UNIT), 4)
    assert "layer_backward_seconds: 2.0" in config.read_text()
    assert Schedule.parse(text.read_text()) == plan.schedule
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert image.read_bytes().startswith(PNG)
    passes = [
        event
        for event in json.loads(trace.read_text())["traceEvents"]
        if event["ph"] == "X" and event["tid"] == 0
    ]
    assert sorted(event["name"] for event in passes) == sorted(
        str(item) for _, item in plan.schedule.passes()
    )
    (row,) = json.loads(table.read_text())["rows"]
    assert row["makespan_seconds"] == pytest.approx(33)
    assert row["bubble"] == pytest.approx([3 / 11] * 4)
    assert row["microbatches_in_flight"] == [4, 3, 2, 1]
    assert row["bound_seconds"] == pytest.approx(33)
    assert row["peak_bytes"] == list(plan.timeline.peak_bytes)


def test_the_program_is_printed_as_the_architecture_shows_it(vp_simulate):
    code, out, _ = vp_simulate("--program", "parallel.pp=2", "num_microbatches=1")
    page = (ROOT / "docs/architecture.md").read_text()
    assert code == 0
    for line in out.splitlines():
        assert line in page.replace("\nstart:", " start:")
    code, out, said = vp_simulate("--program", "--out", "a")
    assert (code, out) == (78, "")
    assert "--program prints the program alone; drop --out" in said


def test_an_error_comes_before_any_heading(vp_simulate):
    assert vp_simulate("vocab.algorithm=auto")[:2] == (78, "")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_is_replayed_and_shown(vp_simulate, tmp_path, runtime):
    code, out, _ = vp_simulate("--runtime", runtime, "--out", tmp_path, *UNIT)
    assert code == 0
    assert f"on {runtime:<9} 33.00 s, 0.00% longer than simulated" in out
    assert "waiting" not in out
    assert "table.json, replay.svg" in out
    assert ElementTree.parse(tmp_path / "replay.svg").getroot().tag.endswith("svg")
    assert f"1f1b with none, replayed on {runtime}" in (tmp_path / "replay.svg").read_text()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    titles = ("1f1b with none", f"1f1b with none, replayed on {runtime}")
    assert processes == [f"{title} rank {rank}" for title in titles for rank in range(4)]
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert row["replay"] == {"runtime": runtime, "makespan_seconds": pytest.approx(33), "longer": 0}


def test_the_passes_of_a_cpu_copy_to_the_host_themselves(vp_simulate, tmp_path):
    slow = ("run.device=cpu", "parallel.offload_activations=1", "cost.host_bytes_per_second=1e9")
    longer = {}
    for runtime in ("cuda", "gloo"):
        assert vp_simulate("--runtime", runtime, "--out", tmp_path / runtime, *slow)[0] == 0
        (row,) = json.loads((tmp_path / runtime / "table.json").read_text())["rows"]
        longer[runtime] = row["replay"]["longer"]
    assert abs(longer["cuda"]) < 1e-3 < longer["gloo"] < 0.5


def test_waits_that_no_simulation_shows_are_listed_worst_first(vp_simulate, monkeypatch):
    """Hops both ways share one stream in a V, and each takes a quarter of a forward."""
    monkeypatch.setitem(RUNTIMES, "cuda", replace(RUNTIMES["cuda"], hops=Hops.PAIRED))
    costs = [*UNIT, "model.num_layers=8", "cost.hop_seconds=0.25"]
    words = [*costs, "schedule=v_min", "vocab.algorithm=two_barrier"]
    code, out, _ = vp_simulate("--runtime", "cuda", *words)
    assert code == 0
    found = re.findall(
        r"([\d.]+) (m?s) more waiting of rank (\d) before (\d\w+\d+), at (\w+:\S+)", out
    )
    assert len(found) == 5
    seconds = [float(value) * (1e-3 if unit == "ms" else 1) for value, unit, *_ in found]
    assert seconds == sorted(seconds, reverse=True)
    assert re.search(
        r" during \d+% of the passes' time \(\d+% on the worst rank\) a posted communication waits "
        r"for another rank and occupies GPU thread blocks ",
        " ".join(out.split()),
    )
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = vp_simulate("--runtime", "cuda", *words)
    assert max(map(len, out.partition("schedule  ")[2].splitlines())) <= 80
    assert "more waiting" not in vp_simulate("--runtime", "gloo", *words)[1]


def test_a_comparison_replays_every_schedule(vp_simulate, tmp_path):
    code, out, _ = vp_simulate(
        "--compare", "1f1b,v_half", "--runtime", "gloo", "--out", tmp_path, *UNIT
    )
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["on", "gloo"] in [words[-2:] for words in lines]
    assert [words[-1] for words in lines if words[:1] == ["1f1b"]] == ["+0.00%"]
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert ["replay" in row for row in table] == [True, False]


@pytest.mark.parametrize(("schedule", "percent"), [("1f1b", 15.8), ("zb_h1", 9.0), ("v_half", 8.4)])
def test_the_published_costs_replay_as_simulated_but_not_without_a_side_stream(schedule, percent):
    inline = Runtime("inline", issues_ahead=True, continues_beside_passes=False, hops=Hops.PAIRED)
    words = [
        f"schedule={schedule}",
        "vocab=one_barrier",
        "cost=a100_4b",
        "parallel.pp=8",
        "num_microbatches=32",
    ]
    plan = plan_step(load_config(words), 8)
    program = lower(plan.schedule, plan.problem, plan.cost)

    def longer(runtime):
        return 100 * (
            replay(program, plan.cost, runtime).timeline.makespan / plan.timeline.makespan - 1
        )

    assert all(0 <= longer(runtime) + 1e-9 <= 0.05 for runtime in RUNTIMES.values())
    assert longer(inline) == pytest.approx(percent, abs=0.1)


def test_a_comparison_lists_what_is_not_possible_and_draws_the_rest(vp_simulate, tmp_path):
    # 4 layers split over 4 stages, but not over the 8 of a V.
    code, out, _ = vp_simulate(
        "--compare", "1f1b,zb_h1,v_half", "--vocab", "none,one_barrier", "--out", tmp_path, *UNIT
    )
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    rows = [words[:2] for words in lines if words and words[0] in GENERATORS]
    assert rows == [
        [name, vocab] for name in ("1f1b", "zb_h1", "v_half") for vocab in ("none", "one_barrier")
    ]
    assert ["1f1b", "none", "33.00", "s", "27.3%", "0.0%", "4"] in [words[:7] for words in lines]
    assert (
        out.count(
            "not possible: model.num_layers=4 does not split over 8 stages; use parallel.placement"
        )
        == 2
    )
    assert "4 of 6 simulated in " in out
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert ["reason" in row for row in table] == [False] * 4 + [True] * 2
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)


def test_files_that_were_in_the_output_directory_are_told_from_those_of_this_simulation(
    vp_simulate, tmp_path
):
    def last_words(*words):
        out = vp_simulate(*words, "--out", tmp_path / "out", *UNIT)[1]
        return out[out.index("written to") :].splitlines()[1:]

    own = {"config.yaml", "table.json", "comparison.png"}
    compared = "--compare", "1f1b,gpipe"
    assert last_words(*compared) == []
    assert last_words(*compared) == ["replaced there: config.yaml, table.json, comparison.png"]
    (tmp_path / "out" / "notes\x1b[2J").touch()
    shown = ["config.yaml", "schedule.txt", "schedule.svg", "schedule.png", "trace.json"]
    assert last_words() == [
        "replaced there: config.yaml, table.json",
        "there already, and not of this simulation: comparison.png, notes\\x1b[2J",
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*own, *shown, "notes\x1b[2J"}
    for number in range(10):
        (tmp_path / "out" / f"a{number}").touch()
    names = ", ".join(f"a{number}" for number in range(8))
    assert last_words(*compared)[-1] == (
        f"there already, and not of this simulation: {names}, and 7 more"
    )


def test_jitter_shows_how_the_steps_of_every_schedule_vary(vp_simulate, tmp_path):
    words = ("--jitter", "0.2", "--straggler", "0.5", "--samples", "8", "--out", tmp_path)
    code, out, _ = vp_simulate(*words, "--compare", "1f1b,zb_h1,v_half", *UNIT)
    assert code == 0
    assert "8 steps of every schedule, seed 0: passes and collectives vary by 0.2 each" in out
    assert "one rank, each in turn, is slower by 50%" in out
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    found = {row["schedule"]: row["disturbed"] for row in rows if "disturbed" in row}
    assert found.keys() == {"1f1b", "zb_h1"}, "a V of 8 stages has no 4 layers"
    for steps in found.values():
        assert len(steps["seconds"]) == 8
        low, middle, high = steps["quantiles_seconds"].values()
        assert low <= middle <= high <= steps["worst_seconds"] == max(steps["seconds"])
    for words, key in (("fastest on average", "mean_seconds"), ("least disturbed", "longer")):
        name = min(found, key=lambda name: found[name][key])
        assert f"{words:<19} {name} with none: " in out


def test_the_columns_of_a_searched_schedule_hold_what_is_found(vp_simulate):
    code, out, _ = vp_simulate("--jitter", "0", *UNIT, "schedule=auto", "vocab.algorithm=auto")
    assert code == 0
    assert "fastest on average" not in out, "one schedule is compared with none"
    head, row = (
        next(line for line in out.splitlines() if line.startswith(word))
        for word in ("schedule ", "auto from ")
    )
    assert row[head.index("vocab") - 1] == " " != row[head.index("vocab")]
    assert head.index("planned") + len("planned") == row.index(" s ") + len(" s")


def test_no_jitter_is_the_planned_step(vp_simulate):
    code, out, _ = vp_simulate("--jitter", "0", "--samples", "2", "--compare", "1f1b", *UNIT)
    assert code == 0
    assert out.count("33.00 s") >= 6
    assert "+0.00%" in out


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["schedule=zb_h1", "vocab.algorithm=one_barrier"], [["zb_h1", "one_barrier"]]),
        (["schedule.name=gpipe"], [["gpipe", "none"]]),
        (
            ["schedule=1f1b", "--vocab", "none,two_barrier"],
            [["1f1b", "none"], ["1f1b", "two_barrier"]],
        ),
    ],
    ids=["schedule and vocab", "schedule.name", "several algorithms"],
)
def test_jitter_disturbs_the_schedule_that_is_typed_and_no_other(vp_simulate, words, lines):
    code, out, _ = vp_simulate("--jitter", "0.1", "--samples", "2", *UNIT, *words)
    assert code == 0
    rows = [line.split()[:2] for line in out.splitlines()]
    assert [row for row in rows if row and row[0] in GENERATORS] == lines
    assert f"{len(lines)} of {len(lines)} simulated" in out


def test_jitter_disturbs_a_schedule_from_a_file_and_a_searched_one(
    vp_simulate, quick_search, tmp_path
):
    vp_simulate("--out", tmp_path, "schedule=zb_h1", *UNIT)
    for word, name in (
        (f"schedule.file={tmp_path / 'schedule.txt'}", "zb_h1"),
        ("schedule=auto", "auto"),
    ):
        code, out, _ = vp_simulate("--jitter", "0.1", "--samples", "2", *UNIT, word)
        assert code == 0
        assert f"\n{name}" in out
        assert "1 of 1 simulated" in out


def test_every_rank_is_the_slow_one_equally_often(vp_simulate):
    for words, count in ((["--straggler", "0.5"], 8), (["--jitter", "0.1"], 6)):
        _, out, _ = vp_simulate(*words, "--samples", "6", "schedule=1f1b", *UNIT)
        assert f"{count} steps of every schedule, seed 0: " in out, "4 ranks"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("schedule=v_half", "drop schedule=v_half, or compare with it: --compare v_half"),
        ("schedule.file=x.txt", "--frontier searches for schedules by itself; drop schedule.file"),
        ("schedule.cap_gib=2", "under every cap on memory; drop schedule.cap_gib=2"),
        ("--compare=1f1b,auto", "--frontier draws what auto finds as a line; drop auto from"),
    ],
)
def test_a_frontier_refuses_what_it_searches(vp_simulate, word, message):
    words = ["schedule=auto", word] if "cap" in word else [word]
    code, _, err = vp_simulate("--frontier", *words, *UNIT)
    assert code == 78
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_frontier_is_that_of_the_algorithm_that_is_typed(vp_simulate, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "vp_train.commands.simulate.curves", lambda config, names, *_: asked.append(names) or []
    )
    for word in ("vocab=two_barrier", "vocab.algorithm=none", "vocab=auto"):
        vp_simulate("--frontier", "--compare", "1f1b", *UNIT[1:], word)
    vp_simulate("--frontier", "--compare", "1f1b", "--vocab", "naive", *UNIT)
    assert asked == [("two_barrier",), ("none",), searched_algorithms(), ("naive",)]


@pytest.mark.slow
def test_the_frontier_is_a_table_a_picture_and_schedules_that_run(
    vp_simulate, quick_search, monkeypatch, tmp_path
):
    monkeypatch.setattr("vp_train.commands.frontier.MOST_CAPS", 3)
    small = ["parallel.pp=2", "model=nano", "num_microbatches=6"]
    words = ("--frontier", "--vocab", "one_barrier,none", "--compare", "1f1b,v_half")
    code, out, _ = vp_simulate(*words, "--out", tmp_path, *small)
    assert code == 0
    table = json.loads((tmp_path / "frontier.json").read_text())
    rows = out.partition("  from\n")[2].splitlines()
    ends = [(vocab, p["found_as"]) for vocab, points in table["frontiers"].items() for p in points]
    assert [(line.split()[0], line.rpartition("  ")[2]) for line in rows[: len(ends)]] == ends
    names = [(row["vocab"], row["schedule"]) for row in table["named"]]
    assert names == [
        ("one_barrier", "1f1b"),
        ("one_barrier", "v_half"),
        ("none", "1f1b"),
        ("none", "v_half"),
    ]
    for vocab, points in table["frontiers"].items():
        makespans = [point["makespan_seconds"] for point in points]
        assert makespans == sorted(makespans, reverse=True)
        assert all(point["peak_bytes"] <= point["cap_bytes"] * (1 + 1e-9) for point in points)
        for row in table["named"]:
            if row["vocab"] == vocab:
                below = [p for p in points if p["cap_bytes"] <= row["peak_bytes"] * (1 + 1e-9)]
                assert below, "no named schedule is left of the line"
                assert below[-1]["mean_bubble"] <= row["mean_bubble"] + 1e-9
        stored = {path.name for path in tmp_path.glob(f"{vocab}_*.txt")}
        assert stored == {point["file"] for point in points}
        for point in points:
            file = f"schedule.file={tmp_path / point['file']}"
            step = simulate_step(load_config([file, f"vocab={vocab}", *small])).timeline
            assert step.makespan == pytest.approx(point["makespan_seconds"])
            assert max(step.peak_bytes) <= point["cap_bytes"] * (1 + 1e-9)
        caps = points[0]["cap_bytes"] / table["microbatch_bytes"]
        assert points[0]["file"] == f"{vocab}_{caps:.4g}.txt"
    assert out.splitlines()[-1] == files_words(table["microbatch_bytes"])
    assert (tmp_path / "frontier.png").read_bytes().startswith(PNG)
    assert ElementTree.parse(tmp_path / "frontier.svg").getroot().tag.endswith("svg")


def test_caps_that_differ_in_the_sixth_digit_have_files_of_their_own():
    chosen = load_config([*UNIT, "schedule=1f1b"])
    first, second, third = (_named_point(simulate_step(chosen)) for _ in range(3))
    points = [
        replace(first, cap=2.0),
        replace(second, cap=2.00002),
        replace(second, cap=2.5),
        replace(third, cap=3.0),
    ]
    assert schedule_files(Curve("none", tuple(points)), 1.0) == [
        "none_2.txt",
        "none_2.00002.txt",
        "none_2.00002.txt",
        "none_3.txt",
    ]


@pytest.mark.parametrize("slower", [1.0, 1.3], ids=["as long as B", "longer than B"])
def test_the_faster_one_of_two_schedules_is_the_lower_one_of_a_picture(slower):
    """Where I and W take longer than B, a split schedule may have less bubble and take longer."""
    named = {"none": [], "one_barrier": []}
    for vocab in named:
        words = [f"cost.layer_{kind}_grad_seconds={slower}" for kind in ("input", "weight")]
        for name in ("1f1b", "zb_h1", "gpipe"):
            chosen = load_config([*UNIT[1:], *words, f"schedule={name}", f"vocab={vocab}"])
            named[vocab].append(_named_point(simulate_step(chosen)))
    reached = {vocab: [*map(Reached.of, points)] for vocab, points in named.items()}
    lines, marks = drawn({vocab: points[1:2] for vocab, points in reached.items()}, reached)
    assert [line.vocab for line in lines] == [*named]
    for line in lines:
        points, bubbles = named[line.vocab], [m.bubble for m in marks if m.vocab == line.vocab]
        assert line.points == [(points[1].cap, bubbles[1])]
        makespans = [point.timeline.makespan for point in points]
        order = sorted(range(3), key=makespans.__getitem__)
        assert order == sorted(range(3), key=bubbles.__getitem__)
        exact = [point.timeline.mean_bubble for point in points]
        assert bubbles[0] == pytest.approx(exact[0]), "1F1B does the least work"
        assert (bubbles == pytest.approx(exact)) == (slower == 1.0)


def test_auto_takes_part_in_a_comparison_and_is_searched_once_per_algorithm(
    vp_simulate, quick_search, monkeypatch, tmp_path
):
    searched = []

    def noted(options, *others):
        searched.append({option.problem.algorithm.name for option in options})
        return solve(options, *others)

    monkeypatch.setattr("vp_train.planning.plan.solve", noted)
    words = ("--compare", "1f1b,auto", "--vocab", "none,one_barrier", "--out", tmp_path)
    small = [*UNIT[1:], "schedule=auto", "schedule.cap_microbatches=20"]
    for extra in ((), ("--jitter", "0.1", "--samples", "4")):
        searched.clear()
        code, out, _ = vp_simulate(*words, *extra, *small)
        assert code == 0
        assert searched == [{"none"}, {"one_barrier"}]
        said = out.index("searching for the fastest schedule with each of none, one_barrier\n")
        assert said < out.index("schedule "), "before it is searched for"
        assert "4 of 4 simulated" in out
        rows = json.loads((tmp_path / "table.json").read_text())["rows"]
        names = [row["schedule"] for row in rows]
        assert names[:2] == ["1f1b", "1f1b"]
        assert all(name.startswith("auto from ") for name in names[2:])
    assert all(len(row["disturbed"]["seconds"]) == 4 for row in rows)
    assert "fastest on average  " in out


def test_a_comparison_names_the_algorithms_with_which_it_searches(vp_simulate, quick_search):
    searched = ", ".join(searched_algorithms())
    for words, named in (
        (["--compare", "auto", *UNIT], "none"),
        (["--compare", "auto", *UNIT[1:], "vocab=one_barrier"], "one_barrier"),
        (["--jitter", "0", *UNIT[1:], "schedule=auto", "vocab=auto"], f"any of {searched}"),
    ):
        code, out, _ = vp_simulate(*words)
        assert code == 0
        assert f"searching for the fastest schedule with {named}\n" in out, words


def test_all_stands_for_the_named_schedules_and_auto_may_be_added(vp_simulate, quick_search):
    _, out, _ = vp_simulate("--compare", "all,auto,1f1b", *UNIT)
    assert f"of {len(GENERATORS) + 1} simulated" in out
    _, out, _ = vp_simulate("--compare", "all", *UNIT)
    assert f"of {len(GENERATORS)} simulated" in out
    assert "searching" not in out


def test_a_schedule_from_a_file_is_called_what_it_is(vp_simulate, tmp_path):
    unit = [*UNIT, "vocab.algorithm=two_barrier"]
    assert vp_simulate("--out", tmp_path / "first", *unit, "schedule=zb_h1")[0] == 0
    file = f"schedule.file={tmp_path / 'first' / 'schedule.txt'}"
    assert vp_simulate("--out", tmp_path / "second", *unit, file)[0] == 0
    first, second = (
        json.loads((tmp_path / name / "table.json").read_text()) for name in ("first", "second")
    )
    assert first == second
    assert (second["rows"][0]["schedule"], second["rows"][0]["vocab"]) == ("zb_h1", "two_barrier")


def test_a_cap_of_auto_does_not_stop_a_comparison(vp_simulate):
    code, out, _ = vp_simulate(
        "schedule=auto", "schedule.cap_gib=1", "--compare", "1f1b,gpipe", *UNIT
    )
    assert code == 0
    assert "2 of 2 simulated" in out


def test_a_comparison_of_impossible_schedules_only_fails(vp_simulate, tmp_path):
    code, out, err = vp_simulate("--compare", "v_half", "--out", tmp_path, *UNIT)
    assert code == 78
    assert "not possible: " in out
    assert "none of these schedules is possible" in err


def test_all_means_every_name():
    found = list(
        simulate_each(
            load_config(["model=nano", "model.num_layers=8"]),
            tuple(GENERATORS),
            ("none", "one_barrier"),
        )
    )
    assert [item.schedule for item in found] == [name for name in GENERATORS for _ in range(2)]
    assert not [item for item in found if isinstance(item, Refusal)]
    assert all(item.gap > -1e-9 for item in found if isinstance(item, Outcome))


@pytest.mark.parametrize("options", [[], ["--compare", "1f1b"]])
def test_without_matplotlib_only_the_png_is_missing(vp_simulate, monkeypatch, tmp_path, options):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = vp_simulate(*options, "--out", tmp_path, *UNIT)
    assert code == 78
    assert "27.3%" in out
    assert "pip install 'vp_train[plot]'" in err
    assert len(err.splitlines()) == 1
    assert (tmp_path / "table.json").exists()
    assert not list(tmp_path.glob("*.png"))


def test_a_long_step_shows_its_beginning_and_many_ranks_none():
    long = simulate_step(load_config([*UNIT, "num_microbatches=200"])).timeline
    drawn = grid(long, 100).splitlines()
    assert drawn[-1].startswith("(the first 24.00 s of 609.00 s")  # 96 columns, "F199" in each
    assert max(map(len, drawn[:-1])) <= 100
    many = simulate_step(
        load_config([*UNIT, "parallel.pp=40", "model.num_layers=40", "num_microbatches=1"])
    ).timeline
    assert grid(many, 100) == "(no grid: 40 ranks are too many for text; --out DIR draws them)\n"


def test_measured_times_replace_the_estimate():
    given = [
        "cost.output_fixed_seconds=0.5",
        "cost.output_row_seconds=0.001",
        "cost.lookup_seconds=0.25",
    ]
    cost = plan_step(load_config([*UNIT, *given, "model.vocab_size=1000"]), 4).cost
    assert cost.pass_seconds[Kind.F] == (1.0,) * 4
    assert cost.pass_seconds[Kind.B] == (2.0,) * 4
    assert cost.pass_seconds[Kind.S] == pytest.approx(
        (0, 0, 0, 1.0)
    )  # two of three products of 1.5 s; no rows, no time
    assert cost.pass_seconds[Kind.T] == pytest.approx((0, 0, 0, 0.5))
    assert cost.pass_seconds[Kind.E] == (0.25,) * 4
    assert cost.pass_seconds[Kind.G] == (0.0,) * 4  # not given: a tenth of a collective
    assert cost.pass_seconds[Kind.W][0] == shape.layer_flops(load_config(UNIT).model, 256) / 5e10


def published(method):
    return [row for row in PUBLISHED if row["method"] == method]


def median_seconds(rows, kind):
    return statistics.median(us * 1e-6 for row in rows for us in row["pass_times_us"][kind])


def test_a100_4b_is_what_was_published():
    config, rows = load_config(["cost=a100_4b"]), published("vocab-2")
    cost, model = config.cost, config.model
    slope, intercept = statistics.linear_regression(
        [row["vocab"] / row["pp"] for row in rows], [median_seconds([row], "TS") for row in rows]
    )
    share = 24 / (48 + 8 * model.seq_length / model.hidden_size)  # of W in B, by FLOPs
    backward, bandwidth = median_seconds(rows, "B") / 4, cost.hop_bytes_per_second
    assert {
        "hop": cost.hop_seconds + 2 * model.seq_length * model.hidden_size / bandwidth,
        "F": cost.layer_forward_seconds,
        "B": cost.layer_backward_seconds,
        "I": cost.layer_input_grad_seconds,
        "W": cost.layer_weight_grad_seconds,
        "row": cost.output_row_seconds,
        "fixed": cost.output_fixed_seconds,
        "E": cost.lookup_seconds,
        "G": cost.lookup_grad_seconds,
    } == pytest.approx(
        {
            "hop": median_seconds(rows, "P2P"),
            "F": median_seconds(rows, "F") / 4,
            "B": backward,
            "I": (1 - share) * backward,
            "W": share * backward,
            "row": slope,
            "fixed": intercept,
            "E": median_seconds(rows, "IF"),
            "G": median_seconds(rows, "IB"),
        },
        rel=1e-3,
    )


def test_gpt_4b_has_the_published_flops():
    model = load_config(["model=gpt_4b"]).model
    layers = model.num_layers * shape.layer_flops(model, model.seq_length)
    for row in PUBLISHED:
        head = 2 * model.seq_length * model.hidden_size * row["vocab"]
        assert 3e-12 * (layers + head) == pytest.approx(row["tflop_per_microbatch"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "vocab"), [("vocab-1", "two_barrier"), ("vocab-2", "one_barrier")]
)
def test_the_published_iteration_is_predicted_within_4_percent(method, vocab):
    row = next(row for row in published(method) if row["vocab"] == 256_000)
    outcome = simulate_step(
        load_config(["cost=a100_4b", f"vocab={vocab}", "parallel.pp=8", "num_microbatches=128"])
    )
    assert 1e3 * outcome.timeline.makespan == pytest.approx(row["iteration_ms"], rel=0.04)


def test_a_plan_for_one_model_refuses_measurements_of_another():
    with pytest.raises(ConfigError, match="one that counts FLOPs"):
        simulate_step(load_config(["cost=a100_4b", "model.seq_length=4096", "parallel.pp=8"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "0.05 TFLOP/s, 200 µs a hop and 500 µs a barrier: assumed for a share of a CPU"),
        (("cost.hop_seconds=0.001",), "0.05 TFLOP/s, 1 ms a hop and 500 µs a barrier: assumed"),
        (("cost=a100",), "180 TFLOP/s, assumed"),
    ],
)
def test_the_costs_that_were_used_are_said(vp_simulate, words, said):
    code, out, _ = vp_simulate("model=nano", "parallel.pp=2", "num_microbatches=2", *words)
    assert code == 0
    assert f"costs FLOPs at {said}" in " ".join(out.split())


def test_it_is_said_which_rank_offloads_most_also_if_the_link_takes_no_time():
    few = [
        "schedule=gpipe",
        "parallel.pp=2",
        "num_microbatches=3",
        "parallel.layers_per_stage=[0,8]",
    ]
    lines = [
        report(simulate_step(load_config([*few, f"parallel.offload_activations={part}"])), 100)
        for part in (1, 0.05)
    ]
    assert re.search("offloaded +.* of rank 1 go to its host and back", lines[0])
    assert re.search("offloaded +nothing: .* half a layer of every stage", lines[1])
