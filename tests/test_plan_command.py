"""vp-plan: a report that fits a screen, JSON, a search and refusals, all without torch."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

from schedules.render import duration
from tests.searched import shown_lines
from vp_train.commands import plan as plan_module
from vp_train.commands import search_beside
from vp_train.commands.plan import main
from vp_train.commands.plan_words import alternative_lines, plan_lines, text_of
from vp_train.failures import EXIT_CONFIG, EXIT_IO, EXIT_OK, EXIT_TIME
from vp_train.planning import alternatives
from vp_train.planning.alternatives import Alternative
from vp_train.planning.batch import batch_of
from vp_train.planning.cluster import with_margin
from vp_train.planning.compare import Help, report_as_typed
from vp_train.planning.degrees import Degrees
from vp_train.planning.found import Limits
from vp_train.planning.kept import Kept
from vp_train.planning.report import make_report
from vp_train.planning.search import search, without_vocabulary
from vp_train.settings import load_config

AS_TYPED = ["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=32"]
NANO = ["model=nano", "num_microbatches=8"]


@pytest.fixture
def vp_plan(run_here):
    return partial(run_here, main, "vp-plan")


def unbroken(out):
    """Return what was printed as one line, with single blanks."""
    return " ".join(out.split())


def overrides_behind(words, out):
    """Return the overrides behind words that begin a line: in it, or in the next one."""
    (found,) = re.findall(rf"^{words}\s+(.*)$", out, re.MULTILINE)
    return found


@pytest.mark.slow
def test_as_in_the_readme_without_torch():
    code = "import atexit, sys; from vp_train.commands.plan import main\n"
    code += "atexit.register(lambda: print('torch' in sys.modules)); main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *AS_TYPED],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == EXIT_OK, done.stderr
    lines = done.stdout.splitlines()
    assert lines.pop() == "False"
    assert len(lines) <= 28
    copied = [line for line in lines if re.fullmatch(r" +(\S+=\S+ ?){2,}", line)]
    assert max(len(line) for line in lines if line not in copied) <= 100
    found = make_report(load_config(AS_TYPED))
    assert (
        "8 GPUs on one node, 75 GiB, 312 TFLOP/s in bfloat16 each; large products reach 78%, "
        "attention 56%" in done.stdout
    )
    work = f"the model's work is {found.flops / 1e15:.3g} PFLOP"
    assert f"MFU {found.mfu:.1%}; {work}\n" in done.stdout
    assert f"step      {found.num_tokens:,} tokens in " in done.stdout
    assert "exposed" not in done.stdout, "it is 0.1 %"
    binds = lines.index(f"binds     {found.binds}")
    assert lines[binds + 1].startswith("without   vocabulary parallelism ")
    (helps,) = (line for line in lines if line.startswith("helps"))
    helps = re.match(r"helps     (.+): (.+ s) \((.+)% faster\), ", helps)
    again = make_report(load_config([*AS_TYPED, *helps[1].split()]))
    assert helps[2] == duration(again.step_seconds)
    assert helps[3] == f"{100 * (1 - again.step_seconds / found.step_seconds):.1f}"


def test_a_plan_is_shown_before_what_it_is_compared_with_or_alone(vp_plan, tmp_path, monkeypatch):
    typed = [*NANO, "parallel.pp=4", "--json", tmp_path / "plan.json"]
    _, whole, _ = vp_plan(*typed)
    assert json.loads((tmp_path / "plan.json").read_text())["helps"] != []
    code, alone, _ = vp_plan(*typed, "--no-compare")
    record = json.loads((tmp_path / "plan.json").read_text())
    assert (code, record["helps"]) == (EXIT_OK, None)
    alone = alone[: alone.index("written to")]
    assert whole.startswith(alone)
    assert "\nbinds " in alone
    assert whole[len(alone) :].startswith("without ")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vp_train.commands.plan.without_it", interrupted)
    code, out, _ = vp_plan(*typed)
    assert (code != EXIT_OK, out) == (True, alone)


def test_the_best_without_vocabulary_parallelism_leaves_as_much_memory_free_as_the_plan(
    vp_plan, monkeypatch
):
    monkeypatch.setattr("vp_train.commands.plan.helps_of", lambda *_: [])
    monkeypatch.setattr(alternatives, "fastest_of", lambda *_: None)  # of this split alone
    typed = ["model=gpt_4b", "cluster=h100_80g_node", "model.num_layers=8", "num_microbatches=16"]
    typed += ["cluster.gpus_per_node=4", "parallel.pp=4", "cluster.host_memory_gib=0"]
    bare = [*typed, "vocab=none", "parallel.placement=redistribute"]
    report, lean = make_report(load_config(bare)), make_report(load_config(typed))
    needs = report.ranks[report.worst].memory.total / 2**30
    assert lean.ranks[lean.worst].memory.total / 2**30 < 0.9 * needs
    for words, gib, is_found in (
        (typed, needs / 0.95 * 1.001, True),
        (typed, needs / 0.95 * 0.999, False),
        (bare, needs / 0.95 * 1.001, True),
        (bare, needs / 0.95 * 0.999, True),
        (bare, needs * 1.001, True),
    ):
        _, out, _ = vp_plan(*words, f"cluster.memory_gib={gib}")
        found = re.search(r"without vocabulary parallelism(.*)", unbroken(out))[1]
        if words == bare:
            assert found.startswith(", best found: this plan"), "it may use all"
        elif is_found:
            assert f", ~{needs:.2f} GiB on this split: " in found
            assert re.match(r".*vocab.algorithm=none parallel.placement=redistribute ", found)
        else:
            assert found.startswith(": nothing fits: ")
            assert f"than the {0.95 * gib:.4g} GiB that a plan may use" in found


@pytest.mark.parametrize("vocab", ["none", "one_barrier"])
def test_the_best_without_vocabulary_parallelism_stands_beside_what_this_split_takes(vocab):
    """It is of the split of the plan or of another, and faster or not."""
    config = load_config([*NANO, "parallel.pp=2", f"vocab={vocab}"])
    report = make_report(config)
    choice = without_vocabulary(config, report.degrees).without_vocabulary.choice
    head = "without   vocabulary parallelism"
    for part, compared in ((0.5, "50.0% faster"), (0.98, "2.0% faster"), (1.5, "50.0% slower")):
        seconds = part * report.step_seconds
        found = Help("a=1 b=2", seconds, 2.0**20, is_planned=False, choice=choice)
        other, words = Alternative(False, found, found), f"~{duration(seconds)} ({compared})"
        (line,) = alternative_lines(report, other)
        assert line == f"{head} {words}, ~1.0 MiB on this split: a=1 b=2"
        best = replace(found, seconds=seconds / 2, is_planned=True)
        (line,) = alternative_lines(report, replace(other, best=best))
        assert line.startswith(f"{head} {duration(seconds / 2)} (")
        assert line.endswith(", 1.0 MiB on this split: a=1 b=2"), "the same, but planned"
        best = replace(best, overrides="c=3")
        line, *more = alternative_lines(report, replace(other, best=best))
        is_worth_it = vocab != "none" or part < 1
        assert line.endswith(f", 1.0 MiB{f'; this split {words}' * is_worth_it}: c=3")
        assert more == [f"{'':10}this split: a=1 b=2"] * (part < 1), "nobody runs what is slower"
        (line,) = alternative_lines(report, replace(other, best=replace(best, overrides="")))
        assert line == f"{head}, best found: this plan"
    (line,) = alternative_lines(report, Alternative(False, best, reason="too large"))
    assert line.endswith(", 1.0 MiB; this split does not fit: c=3")
    (line,) = alternative_lines(report, Alternative(False, None, reason="too large"))
    assert line == f"{head}: nothing fits: too large"
    (line,) = alternative_lines(report, Alternative(True, best))
    assert line.startswith("with      vocabulary parallelism ")
    assert line.endswith(", 1.0 MiB: c=3")


def test_long_lines_are_broken_and_neither_tables_nor_overrides_are():
    words, row = "word " * 40, f"1  {'a  b' * 50}"
    overrides = " ".join(f"parallel.pp{n}={n}" for n in range(12))
    for begin, indent in (("fsdp      ", 10), ("          ", 10), ("link: ", 4)):
        first, *others = text_of([f"{begin}{words}{overrides}: {words}"]).splitlines()
        assert first.startswith(f"{begin}word")
        assert {len(line) - len(line.lstrip()) for line in others} == {indent}
        assert overrides in map(str.strip, others), "it can be copied without the colon"
        assert all(len(line) <= 100 for line in (first, *others) if overrides not in line)
        assert " ".join((first + "".join(others)).split()).count("word") == 80
    first, *others = text_of([f"helps     {overrides}: {words}"]).splitlines()
    assert first == f"helps     {overrides}"
    assert all(re.match(" {10}word ", line) for line in others)
    listed = f"kept: {overrides.replace(' ', ', ')}"
    broken = text_of([listed]).splitlines()
    assert max(map(len, broken)) <= 100, "what has commas is not to be copied"
    assert " ".join(map(str.strip, broken)) == listed
    kept = [row, "─" * 130, f"{'x' * 99} y", "", "first: " + 20 * "x"]
    assert text_of(kept[:2] + kept[3:]).splitlines() == kept[:2] + kept[3:]
    assert text_of(kept[2:3]).splitlines() == ["x" * 99, "    y"]
    for together in ("12.30 s", "~1,024 GiB", "dp=8 x pp=2 x tp=1", "1.5% slower", "193 GFLOP"):
        for before in range(70, 100):
            assert together in text_of([f"{'x' * before} {together} word"])


@pytest.fixture
def on_terminal(monkeypatch):
    """Return a function that makes stdout a terminal of so many columns."""

    def of_width(columns):
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))
        monkeypatch.setattr(sys, "stdout", sys.__stdout__)

    return of_width


def test_text_is_as_wide_as_the_terminal(on_terminal):
    """It has 100 columns where stdout is none, and where a terminal has no width."""
    widths = []
    for columns in (None, 80, 132, 10, 0):
        if columns is not None:
            on_terminal(columns)
        widths.append(max(map(len, text_of(["word " * 60]).splitlines())))
    assert widths == [99, 79, 129, 39, 99]


def test_the_table_of_ranks_fits_on_a_terminal_with_all_its_bytes(on_terminal):
    words = ["model=llama3_70b", "cluster=h100_80g_node", "cluster.num_nodes=8", "parallel.dp=1"]
    config = load_config([*words, "parallel.tp=4", "num_microbatches=64"])
    report = make_report(config)
    for columns in (80, 100):
        on_terminal(columns)
        lines = plan_lines(config, report)
        head = next(n for n, line in enumerate(lines) if line.startswith("rank "))
        table = lines[head : lines.index("", head)]
        assert max(map(len, table)) <= columns
        assert len(table) == 1 + report.degrees.pp
        for row, rank in zip(table[1:], report.ranks, strict=True):
            total = f"{rank.memory.total / 2**30:,.2f}"
            assert row.endswith(f" {duration(rank.busy)}")
            assert row.removesuffix(duration(rank.busy)).split()[-1] == total


def test_measured_pass_times_are_told_from_assumed_ones(vp_plan, tmp_path):
    file = tmp_path / "cost.yaml"
    file.write_text('layer_forward_seconds: 0.001\nmeasured_on: "a box, it\'s mine"\n')
    _, out, _ = vp_plan(*NANO, f"cost={file}")
    assert "in float32 each, pass times as measured on a box, it's mine " in unbroken(out)
    _, out, _ = vp_plan(*NANO)
    assert "in float32 each, 50% of it reached\n" in out


def test_links_are_said_where_a_run_assumes_others(vp_plan):
    cpu, gpu = [*NANO, "parallel.pp=2"], [*NANO, "parallel.pp=2", "cluster=h100_80g_node"]
    same = ["cost.hop_seconds=1e-4", "cost.collective_seconds=3e-4"]
    for words, expected in (
        (
            cpu,
            "links 200 µs a hop and 200 µs a barrier, as the cluster has; on a CPU vp-train and ",
        ),
        ([*cpu, "cluster.node_seconds=0.1"], "links 100 ms a hop and 100 ms a barrier, as"),
        ([*cpu, same[0]], "links 100 µs a hop and 200 µs a barrier, as"),
        ([*cpu, *same], ""),
        ([*NANO, "parallel.pp=1"], ""),
        ([*gpu, "run.device=cuda", "run.dtype=bfloat16"], ""),
    ):
        code, out, _ = vp_plan(*words, "--no-compare")
        assert code == 0
        assert expected in " ".join(out.split())
        assert ("links " in out) == bool(expected)


def test_costs_that_are_typed_count_on_a_cluster_too(vp_plan):
    """The law holds on the cluster of a CPU too, whose costs are the defaults."""
    _, out, _ = vp_plan(*NANO, "cost.flops_per_second=1e9")
    assert "in float32 each; cost has 0.001 TFLOP/s for all passes\n" in out
    before = make_report(load_config(NANO))
    for word in ("hop_seconds=0.5", "collective_seconds=0.5", "flops_per_second=1e9"):
        slow = make_report(load_config([*NANO, f"cost.{word}"]))
        assert slow.step_seconds > 5 * before.step_seconds, word
    split = [*NANO, "parallel.tp=2"]
    slow = make_report(load_config([*split, "cost.tensor_seconds=0.5"]))
    assert slow.step_seconds > 5 * make_report(load_config(split)).step_seconds


@pytest.mark.slow
def test_fsdp_has_assumed_rates_where_the_plan_has_measured_passes(vp_plan, tmp_path):
    words = ["model=gpt_4b", "cluster=a100_80g_node", "run.dtype=float16", "model.num_layers=8"]
    assumed = "; passes of FSDP at assumed rates, not as measured "
    assert assumed in unbroken(vp_plan(*words, "cost=a100_4b")[1])
    assert assumed not in unbroken(vp_plan(*words)[1])


def test_how_many_ranks_a_line_stands_for_is_said_where_it_is_more_than_one(vp_plan):
    assert "every line" not in vp_plan(*NANO, "parallel.pp=4")[1]
    assert ", 2 ranks per row\n" in vp_plan(*NANO, "parallel.pp=2")[1]


def test_uneven_layers_are_answered_with_uneven_rows(vp_plan):
    uneven = [*NANO, "parallel.pp=4", "parallel.layers_per_stage=[2,1,1,0]"]
    _, out, _ = vp_plan(*uneven)
    assert f" advice {make_report(load_config(uneven)).advice} " in unbroken(out)
    assert "vocab.balance=true would take " in out
    assert "advice" not in vp_plan(*uneven, "vocab.balance=true")[1]


def test_a_vocabulary_that_is_too_small_to_split_is_named_where_it_is_split():
    words = "advice    vocab.algorithm=none: a vocabulary of {} is too small to split over {} ranks"
    for pp, tp, size, is_said in (
        (4, 1, 3, True),
        (4, 1, 4, False),
        (2, 2, 3, True),
        (1, 2, 1, False),
    ):
        typed = [f"parallel.pp={pp}", f"parallel.tp={tp}", f"model.vocab_size={size}"]
        config = load_config([*NANO, *typed])
        assert (words.format(size, pp * tp) in plan_lines(config, make_report(config))) is is_said
        assert is_said is (pp > 1 and size < pp * tp)


def test_json_has_every_rank(vp_plan, tmp_path):
    code, out, _ = vp_plan(*NANO, "--json", tmp_path / "new" / "plan.json")
    record = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert code == EXIT_OK
    assert "written to" in out
    assert len(record["ranks"]) == 4
    for rank in record["ranks"]:
        memory = rank["memory"]
        parts = ("weights", "gradients", "optimizer", "activations", "vocabulary", "working")
        assert rank["total_bytes"] == pytest.approx(sum(memory[name] for name in parts))
    assert record["tokens_per_second"] == pytest.approx(8 * 64 / record["step_seconds"])
    assert record["fsdp"] is None, "there are no GPUs"
    most = max(rank["total_bytes"] for rank in record["ranks"])
    assert record["spare_bytes"] == record["limit_bytes"] - most
    for one in record["helps"]:
        again = make_report(load_config([*NANO, *one["overrides"].split()]))
        assert one["step_seconds"] == again.step_seconds
        assert one["tokens"] == again.num_tokens
        assert one["tokens_per_second"] > 1.01 * record["tokens_per_second"]


def test_json_has_what_the_screen_says_of_other_plans(vp_plan, tmp_path):
    """Both kinds, what would help, and a larger batch, with figures that their plans have."""
    path = tmp_path / "plan.json"
    few = [*NANO, "parallel.pp=4", "num_microbatches=4"]
    for words, fits in ((few, True), ([*few, "vocab=none", "cluster.memory_gib=0.005"], False)):
        code, out, _ = vp_plan(*words, "--json", path)
        record, report = json.loads(path.read_text()), make_report(load_config(words))
        assert (code == EXIT_OK) is fits is record["fits"] is report.fits
        kinds = [f"{kind}_vocabulary_parallelism" for kind in ("without", "with")]
        assert [record[kind] is not None for kind in kinds] == [True, "vocab=none" in words]
        said = [record[kind]["best"] for kind in kinds if record[kind] is not None]
        said += record["helps"]
        for one in said:
            assert one["overrides"] in unbroken(out)
            again = make_report(load_config([*words, *one["overrides"].split()]))
            mark = "" if one["planned"] else "~"
            assert f"{mark}{duration(one['step_seconds'])}" in out
            assert one["step_seconds"] == pytest.approx(again.step_seconds, rel=0.02)
            assert one["tokens_per_second"] == one["tokens"] / one["step_seconds"]
        larger = [one for one in record["helps"] if one["overrides"] == "num_microbatches=8"]
        assert [one["tokens"] for one in larger] == [2 * report.num_tokens] * fits
        helps = [one for one in record["would_help"] if one["overrides"] is not None]
        assert bool(helps) is (not fits)
        for one in helps:
            assert f"would help: {one['words']} " in f"{unbroken(out)} "
            if one["saved_bytes"] is None:
                continue
            again = make_report(load_config([*words, *one["overrides"].split()]))
            assert one["step_seconds"] == again.step_seconds
            needs = [plan.ranks[plan.worst].memory.total for plan in (report, again)]
            assert one["saved_bytes"] == pytest.approx(needs[0] - needs[1])
            assert one["enough"] is (needs[1] <= 0.95 * report.limit)
        assert record["decides"] is None, "CPUs have no contention"


# Settings of which each makes some proposal wrong that does not reset it.
STUBBORN = [
    ("schedule=interleaved", "schedule.num_chunks=2", "parallel.pp=2"),
    ("vocab.algorithm=none", "parallel.placement=redistribute", "micro_batch_size=2"),
    ("parallel.recompute_per_stage=[full,none]", "parallel.pp=2", "optim.name=zero1"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize("typed", STUBBORN, ids=lambda typed: typed[0])
def test_what_a_plan_proposes_can_be_appended_and_gives_what_is_said(vp_plan, typed):
    draw, tried = random.Random(len(typed[0])), 0
    for gib in (4, 0.006):
        count = draw.choice((4, 8))
        words = ["model=nano", f"num_microbatches={count}", f"cluster.memory_gib={gib}", *typed]
        _, out, _ = vp_plan(*words)
        lines = re.sub(r"\n {4}(?! )", " ", out)
        for kind, overrides, about, seconds in re.findall(
            r"^(helps|would fit:|would help:| {8}) +((?:[a-z][\w.]*=[^\s:]+ ?)+):? *"
            r"(about )?(\S+ m?s\b)?",
            lines,
            re.MULTILINE,
        ):
            again = make_report(load_config([*words, *overrides.split()]))
            if seconds and not about:
                assert again.fits
                assert duration(again.step_seconds) == seconds, (words, kind, overrides)
            tried += 1
    assert tried > 2


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (
            ["parallel.pp=4", "vocab=none", "model.vocab_size=65536"],
            "vocab.algorithm=one_barrier: ",
        ),
        (["parallel.dp=2", "parallel.pp=2", "run.dtype=bfloat16"], "optim.name=zero1: "),
        (["parallel.pp=4", "micro_batch_size=8"], "micro_batch_size=1 num_microbatches=64: "),
        (
            ["parallel.pp=4", "num_microbatches=2", "model.seq_length=512"],
            "parallel.recompute=full: ",
        ),
    ],
)
def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would_help(vp_plan, overrides, remedy):
    code, out, _ = vp_plan(*NANO, "cluster.memory_gib=0.004", *overrides)
    assert code == EXIT_CONFIG
    assert "MiB TOO MUCH" in out
    helps = [line for line in out.splitlines() if line.startswith("would help")]
    figures = re.compile(rf"would help: {remedy}[\d.]+ MiB less, step [\d.]+ m?s(, which |$)")
    assert any(figures.match(line) for line in helps)
    assert "more GPUs per replica" in helps[-1]


@pytest.mark.slow
def test_the_gpus_that_a_plan_lacks_come_with_a_split_that_fits(vp_plan):
    """It has the same batch, and the shortest pipeline that fits: of 2 ranks none does."""
    few = [*NANO, "model.num_layers=8", "parallel.pp=1", "cluster.memory_gib=0.009"]
    for dp, named in (
        (1, "cluster.num_nodes=4 parallel.pp=4 "),
        (4, "parallel.dp=1 parallel.pp=4 "),
    ):
        words = [*few, f"cluster.gpus_per_node={dp}", f"parallel.dp={dp}"]
        said = r"more GPUs per replica: ((?:[\w.]+=\w+ ?)+):? ([\d.]+ ms), [\d.]+ MiB"
        found = re.search(said, unbroken(vp_plan(*words)[1]))
        assert found[1].startswith(named)
        before, after = (load_config([*words, *more]) for more in ([], found[1].split()))
        assert batch_of(after) == batch_of(before)
        assert not make_report(before).fits
        again = make_report(after)
        assert (again.fits, duration(again.step_seconds)) == (True, found[2])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_search")
def test_search_prints_a_table_and_what_it_left_out(vp_plan, tmp_path):
    code, out, _ = vp_plan("--search", "--top", 3, *NANO, "--json", tmp_path / "found.json")
    record = json.loads((tmp_path / "found.json").read_text())
    assert code == EXIT_OK
    assert len(record["best"]) == 3
    steps = [plan["step_seconds"] for plan in record["best"]]
    assert steps == pytest.approx(sorted(steps), rel=1e-3)
    assert "none of the others that were weighed seems faster" in unbroken(out)
    assert "does not split over parallel.tp=4" in out
    assert "ruled out most: " in out
    assert out.count("the best found without vocabulary parallelism, on any split: ") == 1
    assert record["without_vocabulary_parallelism"]["step_seconds"] > steps[0]
    assert (record["choices"], record["ended"]) > (0, "")
    assert (record["margin"], record["fsdp"]) == (0.05, None)
    assert (record["decides"], record["link"], record["would_help"]) == (None, None, [])
    shown = out[out.index("in all rows: ") : out.index("the first:")].splitlines()
    assert max(map(len, shown)) <= 100
    assert "MFU" not in out, "nothing knows the peak of this machine"
    plans = record["best"]
    degrees = {f"dp={plan['dp']} x pp={plan['pp']} x tp={plan['tp']}" for plan in plans}
    assert (f"in all rows: {degrees.pop()}; " in shown[0]) is (not degrees)
    assert (" dp x pp x tp " in shown[2]) is (len(degrees) > 0)
    assert [row.split()[0] for row in shown[4:7]] == ["1", "2", "3"]
    first = overrides_behind("the first:", out)
    for place, plan in enumerate(plans[1:], 2):
        more = overrides_behind(f"row {place}, behind those:", out)
        again = make_report(load_config([*NANO, *first.split(), *more.split()]))
        assert again.step_seconds == pytest.approx(plan["step_seconds"])
        assert again.ranks == make_report(load_config([*NANO, *plan["overrides"].split()])).ranks
    assert " MiB" in shown[2]
    assert "0.0 " not in out


def test_what_is_not_planned_whole_has_its_row_as_an_estimate(vp_plan):
    """The effort suffices for short steps, and for the one plan that is always made."""
    _, out, _ = vp_plan("--search", "--top", 3, "--effort", 6, *NANO)
    first, *others = re.findall(r"^[123] .*$", out, re.MULTILINE)
    assert "~" not in first
    assert len(others) == 2
    assert all("~" in row for row in others)
    assert "\n~ estimated from short steps, not planned whole\n" in out


def test_more_time_is_advised_beside_more_effort_only_where_that_takes_more():
    config, limits = load_config(NANO), Limits(top=1, effort=6_000, seconds=180)
    result = search(config, limits, lambda: True, lambda words: None)
    result = replace(result, num_open=1, ended="effort", estimated=())
    for spent, more in (
        (None, ""),
        (90.0, ""),
        (91.0, ", and --seconds to 360 (now 180)"),
        (200.5, ", and --seconds to 401 (now 180)"),
    ):
        lines = shown_lines(config, limits, result, spent_seconds=spent)
        assert lines[0] == (
            "THE EFFORT IS SPENT with 1 choice left that might be faster; raise --effort to 12 "
            f"(now 6){more}"
        )
    late = replace(result, ended="time")
    assert shown_lines(config, limits, late, spent_seconds=180.0)[0] == (
        "OUT OF TIME with 1 choice left that might be faster; raise --seconds to 360 (now 180)"
    )


def test_of_a_searched_order_a_row_names_the_placement_that_was_found():
    """It may be another one than that of the choice whose memory it has."""
    config, limits = load_config(NANO), Limits(top=1, effort=6_000)
    result = search(config, limits, lambda: True, lambda words: None)
    first = result.best[0]
    choice = replace(first.choice, schedule="interleaved", num_chunks=8)
    for cap, name, words in (
        (None, "interleaved", "interleaved x 8"),
        (0.5, "auto from interleaved", "auto from interleaved x 8"),
        (0.5, "auto from zb_v", "auto from zb_v, V-shaped"),
        (0.5, "auto from 1f1b", "auto from 1f1b"),
    ):
        found = replace(
            first,
            choice=replace(choice, cap_gib=cap),
            report=replace(first.report, schedule=name),
        )
        text = "\n".join(shown_lines(config, limits, replace(result, best=(found,))))
        row = re.search(r"^1 .*(?:\n {3}.*)?", text, re.MULTILINE)[0]
        assert re.search(rf"{re.escape(words)}(;|  )", row)


def test_json_has_what_would_help_where_nothing_fits(vp_plan, tmp_path):
    path = tmp_path / "found.json"
    small = [*NANO, "cluster.memory_gib=0.002"]
    code, out, _ = vp_plan("--search", "--json", path, *small)
    record = json.loads(path.read_text())
    assert code == EXIT_CONFIG
    assert record["closest"]["overrides"] in unbroken(out)
    said = [f"would help: {one['words']}" for one in record["would_help"]]
    assert [line in unbroken(out) for line in said] == [True] * 2
    memory, nodes = record["would_help"]
    assert (memory["setting"], nodes["setting"]) == ("cluster.memory_gib", "cluster.num_nodes")
    assert f"GPUs with more than {memory['least']:.4g} GiB" in out
    assert [one["enough"] for one in record["would_help"]] == [None, None], "nothing is planned"
    assert f"cluster.num_nodes={nodes['least']} " in nodes["overrides"]
    closest, more = (
        make_report(load_config([*small, *one["overrides"].split()]))
        for one in (record["closest"], nodes)
    )
    assert more.num_tokens == closest.num_tokens == make_report(load_config(NANO)).num_tokens
    assert not closest.fits
    assert more.excess < closest.excess, "there are more ranks for the same batch"
    assert more.degrees.num_ranks == 4 * nodes["least"]
    less = replace(closest.cluster, memory_gib=0.999 * memory["least"])
    assert replace(closest, cluster=with_margin(less)).excess > 0


def test_a_search_says_how_to_ask_for_an_order_that_was_too_dear_for_it():
    config, limits = load_config(NANO), Limits(top=1, effort=6_000)
    result = search(config, limits, lambda: True, lambda words: None)
    choice = result.best[0].choice
    result = replace(result, unordered=None)
    assert "not tried" not in "\n".join(shown_lines(config, limits, result))
    result = replace(result, unordered=replace(choice, optimizer=None, cap_gib=0.5))
    (line,) = (ln for ln in shown_lines(config, limits, result) if ln.startswith("not tried"))
    changes = line.partition("--search: ")[2].split()
    asked = load_config([*NANO, *choice.overrides(config).split(), *changes])
    assert asked == replace(choice, cap_gib=0.5).applied(config)


def test_a_search_says_when_a_run_that_it_does_not_try_is_faster_as_it_was_typed():
    config, limits = load_config(NANO), Limits(top=1, effort=6_000)
    result = search(config, limits, lambda: True, lambda words: None)
    first = result.best[0].report
    assert report_as_typed(config, 0.0) is None, "a search makes it"
    counts = ",".join(map(str, [config.model.num_layers, 0, 0, 0]))
    config = load_config([*NANO, "parallel.pp=4", f"parallel.layers_per_stage=[{counts}]"])
    typed = report_as_typed(config, 0.0)
    assert typed == make_report(config)
    faster = replace(typed, passes=0.0)
    assert faster.step_seconds < first.step_seconds < typed.step_seconds
    same = replace(first, passes=first.passes - 1e-4 * first.step_seconds)
    for report, is_said in ((faster, True), (same, False), (typed, False), (None, False)):
        lines = shown_lines(config, limits, result, report)
        said = [line for line in lines if line.startswith("as typed: ")]
        assert len(said) == is_said
        assert all(line.endswith("not try parallel.layers_per_stage as given") for line in said)
    nothing = replace(result, best=(), with_vocabulary=None, without_vocabulary=None, leanest=None)
    assert any(line.startswith("as typed") for line in shown_lines(config, limits, nothing, typed))
    small = replace(config, cluster=replace(config.cluster, memory_gib=1e-6))
    assert report_as_typed(small, 0.0) is None, "it does not fit"


def test_a_run_is_not_planned_as_it_was_typed_if_its_batch_was_not(vp_plan, tmp_path, monkeypatch):
    planned = []

    def report_of(config, margin, watch):
        planned.append(config.num_microbatches)
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_module, "report_as_typed", report_of)
    for options in ([], ["--tokens", 1024]):
        found = ["--search", *options, "--effort", 100, "--top", 1, "--json", tmp_path / "a.json"]
        code, out, _ = vp_plan(*found, NANO[0])
        assert code == EXIT_OK
        assert "\nthe first:" in out, "it is shown in any case"
        assert json.loads((tmp_path / "a.json").read_text())["as_typed"] is None
    assert len(planned) == 1


def test_rows_are_in_the_order_of_their_times_also_where_an_estimate_is_the_fastest():
    config, limits = load_config(NANO), Limits(top=3, effort=6_000)
    result = search(config, limits, lambda: True, lambda words: None)
    fast = replace(result.estimated[0], seconds=result.best[0].report.step_seconds / 2)
    result = replace(result, estimated=(result.estimated[1], fast))
    lines = shown_lines(config, limits, result)
    rows = [line for line in lines if re.match(r"[123] ", line)]
    assert ["~" in row for row in rows] == [True, False, True]
    assert [line for line in lines if line.startswith("row 2, the first that is planned whole: ")]
    candidate = result.estimated[1].candidate
    moves = replace(candidate, choice=replace(candidate.choice, offload=1.0))
    for seconds, is_said in ((0.998, True), (0.994, False), (1.002, False)):
        seconds *= result.best[0].report.step_seconds
        other = replace(result.estimated[1], candidate=moves, seconds=seconds, host=50 * 2.0**30)
        assert not any(found.report.host.total for found in result.best)
        lines = shown_lines(config, limits, replace(result, estimated=(other,)))
        words = "the order counts steps with offloaded activations as 0.5% longer, since"
        assert any(line.startswith(words) for line in lines) is is_said
        (row,) = (line for line in lines if "offload 100%" in line and "~" in line)
        assert row.endswith("~51,200 *"), "an estimate depends on hosts, too"
        assert any(line.startswith("* depends on links to hosts") for line in lines)
        need = "host RAM is not checked: the first needs none, others up to 50.00 GiB per node;"
        assert any(line.startswith(need) for line in lines)


def test_words_of_a_row_stand_below_its_figures_where_the_table_is_too_wide(on_terminal):
    config, limits = load_config(NANO), Limits(top=3, effort=6_000)
    result = search(config, limits, lambda: True, lambda words: None)
    candidate = result.estimated[0].candidate
    choice = replace(
        candidate.choice,
        degrees=Degrees(16, 128, 8),
        schedule="interleaved",
        num_chunks=12,
        vocab="one_barrier",
        balance=True,
        placement="redistribute",
        recompute="selective",
        recompute_per_stage=("selective",) * 3 + ("none",) * 21,
        offload=0.5,
    )
    candidate = replace(candidate, choice=choice)
    wide = replace(result.estimated[0], candidate=candidate, host=1e13, seconds=12_345.678)
    result = replace(result, estimated=(wide,))
    cells = ["12,345.68 s", "interleaved x 12", "one_barrier, uneven rows, layers redistributed"]
    cells += ["16 x 128 x 8", "selective in 3/24, offload 50%", " *"]
    for columns in (80, 100, 200):
        on_terminal(columns)
        table = text_of(shown_lines(config, limits, result)).partition("~ estimated")[0]
        assert max(map(len, table.splitlines())) <= columns
        assert all(cell in " ".join(table.split()) for cell in cells)
        assert ("schedule x chunks" in table) is (columns == 200)
        head = next(line for line in table.splitlines() if " bubble " in line)
        row = next(line for line in table.splitlines() if "12,345.68 s" in line)
        assert row[: head.index("bubble") + len("bubble")].endswith(" -"), "it is not known"


@pytest.mark.slow
@pytest.mark.parametrize(
    "typed",
    [
        ["model.num_layers=6"],  # does not split over 4 stages
        ["parallel.pp=2"],  # of which the run has two replicas
        ["schedule.file=other.txt", "vocab.algorithm=naive", "schedule.name=gpipe"],
        ["schedule=auto", "vocab=auto", "schedule.cap_gib=1"],
        ["schedule=auto", "schedule.cap_microbatches=3", "parallel.placement=redistribute"],
        ["parallel.recompute_per_stage=[full,full,none,none]"],
    ],
    ids=lambda typed: typed[0],
)
def test_what_a_search_prints_can_be_pasted_behind_what_was_typed(
    vp_plan, tmp_path, monkeypatch, typed
):
    """Memory is so small that every winner needs a pipeline."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("a schedule that a search does not look into")
    typed = [*NANO, "cluster.memory_gib=0.012", *typed]
    found = ["--search", "--top", 1, "--effort", 100, "--json", tmp_path / "found.json"]
    code, out, _ = vp_plan(*found, *typed)
    assert code == EXIT_OK, out
    searched = [word for word in typed if word.startswith(("schedule", "vocab", "parallel."))]
    hint = "; --keep typed keeps them" if typed[-1] == "parallel.pp=2" else ""
    line = f"searched although typed: {', '.join(searched)}{hint}\n"
    assert (line in out) if searched else "although typed" not in out
    first = json.loads((tmp_path / "found.json").read_text())["best"][0]
    pasted = overrides_behind("the first:", out).split()
    again = make_report(load_config([*typed, *pasted]))
    assert first["pp"] > 1
    assert first["dp"] * first["num_microbatches"] * first["micro_batch_size"] == (
        16 if "parallel.pp=2" in typed else 8
    )
    assert again.step_seconds == pytest.approx(first["step_seconds"])


@pytest.mark.usefixtures("quick_search")
def test_an_order_that_a_search_has_found_is_found_again_from_what_it_prints(vp_plan):
    typed = [*NANO, "parallel.pp=4", "num_microbatches=4", "micro_batch_size=1", "vocab=none"]
    kept = "parallel.pp,micro_batch_size,vocab"
    code, out, _ = vp_plan("--search", "--keep", kept, "--top", 2, *typed)
    assert code == EXIT_OK
    pasted = overrides_behind("the first:", out).split()
    assert "schedule.name=auto" in pasted
    report = make_report(load_config([*typed, *pasted]))
    row = next(line for line in out.splitlines() if line.startswith("1 "))
    assert f" {duration(report.step_seconds)} " in row
    behind = overrides_behind("row 2, behind those:", out).split()
    assert "schedule.cap_gib=null" in behind
    other = make_report(load_config([*typed, *pasted, *behind]))
    assert other.step_seconds > 1.005 * report.step_seconds


def test_a_search_keeps_what_is_typed_if_it_is_asked_to(vp_plan, tmp_path):
    typed = ["parallel.pp=2", "schedule=gpipe", "vocab=none"]
    code, out, _ = vp_plan(
        "--search", "--keep", "typed", *NANO, *typed, "--json", tmp_path / "found.json"
    )
    assert code == EXIT_OK
    assert "kept: parallel.pp=2, schedule.name=gpipe, vocab.algorithm=none\n" in out
    assert "although typed" not in out
    assert "vocabulary parallelism" not in out
    assert "--keep parallel.pp=2: " in out
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["kept"] == {"parallel.pp": 2, "schedule.name": "gpipe", "vocab.algorithm": "none"}
    assert {(plan["pp"], plan["schedule"]) for plan in record["best"]} == {(2, "gpipe")}
    _, out, _ = vp_plan("--search", "--keep", "vocab, parallel.pp", *NANO, *typed)
    assert "searched although typed: schedule=gpipe\n" in out
    group = ["parallel=redistribute", "parallel.pp=2"]
    _, out, _ = vp_plan("--search", "--keep", "typed", *NANO, *group)
    assert "kept: parallel.placement=redistribute, parallel.pp=2\n" in out
    assert " vocabulary parallelism, with what is kept: " in out


def test_a_search_balances_rows_beside_uneven_layers_unless_that_is_typed(vp_plan, tmp_path):
    typed = [*NANO, "model.num_layers=5", "model.vocab_size=65536", "cluster.gpus_per_node=4"]
    typed += ["parallel.pp=4", "schedule=1f1b"]
    steps = []
    for words in ([], ["vocab.balance=false"]):
        options = ["--search", "--top", 1, "--json", tmp_path / "found.json"]
        options += ["--keep", "micro_batch_size,schedule,parallel.pp"]
        _, out, _ = vp_plan(*options, *typed, *words)
        first = json.loads((tmp_path / "found.json").read_text())["best"][0]
        again = make_report(load_config([*typed, *words, *first["overrides"].split()]))
        assert again.step_seconds == pytest.approx(first["step_seconds"])
        steps.append(first["step_seconds"])
        assert ("one_barrier, uneven rows" in out) is (not words)
        assert (" vocab.balance=true" in first["overrides"]) is (not words)
        assert (", vocab.balance=false\n" in out) is bool(words)
    assert steps[0] < 0.995 * steps[1]


def test_search_where_nothing_fits(vp_plan):
    code, out, _ = vp_plan("--search", *NANO, "cluster.memory_gib=0.002")
    assert code == EXIT_CONFIG
    assert "NOTHING FITS.  Closest:\n    parallel.dp=" in out
    assert "more than the 0.0019 GiB that a plan may use" in out, "5 % stay free"
    assert "ruled out most: memory, for weights, gradients and optimizer state alone: " in out
    helps = [line for line in out.splitlines() if line.startswith("would help")]
    assert "cluster.num_nodes=4" in helps[-1], "nothing that the search has refused is advised"
    assert "torchrun" not in out
    nodes = helps[-1].split()[2].rstrip(",")
    assert "NOTHING" not in vp_plan("--search", *NANO, "cluster.memory_gib=0.002", nodes)[1]


def test_the_number_of_nodes_that_would_do_is_about_the_least(monkeypatch):
    """It is doubled until something fits, and the interval is halved three times."""
    config = load_config(["model=nano", "cluster=h100_80g_node"])
    for now, least, said in ((1, 2, 2), (1, 3, 3), (1, 5, 5), (1, 33, 36), (3, 6, 6), (3, 7, 7)):
        cluster = dataclasses.replace(config.cluster, num_nodes=now)

        def fits(config, *_, least=least):
            return config.cluster.num_nodes >= least or None

        monkeypatch.setattr(search_beside, "fits_on", fits)
        found = search_beside._more_nodes(
            dataclasses.replace(config, cluster=cluster), Limits(), Kept()
        )
        assert found == (said, True)
    monkeypatch.setattr(search_beside, "fits_on", lambda *_: None)
    assert search_beside._more_nodes(config, Limits(), Kept()) is None


def test_where_only_what_is_kept_does_not_fit_the_search_says_so(vp_plan):
    small = (*NANO, "cluster.memory_gib=0.0046", "parallel.pp=1")
    code, out, _ = vp_plan("--search", "--keep", "parallel.pp", *small)
    assert code == EXIT_CONFIG
    assert "NOTHING FITS" in out
    assert "would help: to keep less with --keep; then dp=" in out
    assert "to keep less" not in vp_plan("--search", *NANO, "cluster.memory_gib=0.001")[1]


def test_a_search_without_any_split_says_what_would_work(vp_plan):
    code, _, err = vp_plan("--search", *NANO, "cluster.gpus_per_node=7")
    assert code == EXIT_CONFIG
    assert "a batch of 8 sequences does not split over 7 GPUs: dp must divide it" in err
    assert "use a batch of 7 or 14 sequences" in err


@pytest.fixture
def slow_cpu(monkeypatch):
    """Let every look at the CPU time of the process find 100 s more."""
    monkeypatch.setattr(
        "vp_train.commands.plan.time.process_time", iter(range(0, 10**6, 100)).__next__
    )


def test_no_result_in_time_is_not_a_mistake_of_the_user(vp_plan, slow_cpu):
    code, out, _ = vp_plan("--search", "--seconds", 1, *NANO, "cluster.memory_gib=0.0035")
    assert code == EXIT_TIME != EXIT_CONFIG
    assert "NOTHING TRIED SO FAR FITS.  Closest:\n    parallel.dp=" in out
    assert "raise --seconds" in out


def test_what_ended_a_search_stands_above_its_plans_and_what_was_not_searched_is_said(
    vp_plan, slow_cpu
):
    code, out, _ = vp_plan("--search", "--seconds", 1, *NANO)
    assert code == EXIT_OK
    _, ended, *_ = out.split("\n\n")
    assert re.match(
        r"OUT OF TIME with [\d,]+ choices left that might be faster(, and .*)?; raise --seconds "
        r"to 2 \(now 1\)$",
        unbroken(ended),
    )
    assert re.search(
        r"vocabulary parallelism, on any split: not searched to the end, [\d,]+ choices left", out
    )
    assert "fits" not in out


def test_the_clock_on_the_wall_does_not_end_a_search(vp_plan, monkeypatch):
    """A machine with other work takes longer for the same search, and must find the same."""
    monkeypatch.setattr(
        "vp_train.commands.searching.time.monotonic", iter(range(0, 10**7, 100)).__next__
    )
    few = ("--keep", "schedule,parallel.recompute", "schedule=1f1b")
    code, out, err = vp_plan("--search", "--seconds", 30, *few, *NANO)
    assert code == EXIT_OK
    assert "none of the others that were weighed seems faster" in unbroken(out)
    assert "OUT OF TIME" not in out
    progress = r"\d{3,} s: \d s of CPU, [\d,]+ of ([\d,]+) choices weighed\n"
    choices = re.match(progress, err)[1]
    assert f"\n{choices} choices, " in out, "a search counts them as its result does"


@pytest.mark.parametrize("words", [(), ("--search",)])
@pytest.mark.parametrize("place", ["/proc/x", "."])
def test_a_file_that_cannot_be_written_is_known_before_the_work(vp_plan, words, place):
    code, out, err = vp_plan(*words, "--json", place, *NANO)
    assert (code, out) == (EXIT_IO, "")
    assert f"--json {place} cannot be written (" in err


@pytest.mark.slow
def test_a_batch_in_tokens_is_said_as_it_is_rounded_and_where_it_comes_from(vp_plan):
    quick = ("--search", "--top", 1, "--effort", 1, "model=nano")
    code, out, _ = vp_plan(*quick, "--tokens", 1000)
    assert code == EXIT_OK
    assert "; 16 microbatches of 1 x 64 tokens" in out
    line = "batch: 16 sequences of 64 tokens, 1,024 tokens in a step"
    assert f"{line}, rounded from --tokens 1,000\n" in out
    assert f"{line}\n" in vp_plan(*quick, "--tokens", "1.024e3")[1]
    _, out, _ = vp_plan(*quick, "parallel.pp=2")
    assert f"{line}, by default; --tokens N sets another\n" in out
    kept = ("--keep", "micro_batch_size", "micro_batch_size=3")
    code, out, _ = vp_plan(*quick, "--tokens", 1000, *kept)
    assert code == EXIT_OK
    assert "batch: 15 sequences of 64 tokens" in out
    assert ", rounded from --tokens 1,000 to a multiple of micro_batch_size=3\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "3"], "--top belongs to --search"),
        (
            ["--json", "data.path=corpus/x", "model=nano"],
            "--json data.path=corpus/x: that looks like an override, not like a path; write",
        ),
        (
            ["--json", "model=nano", "cluster=h100_80g_node"],
            "--json model=nano: that looks like an override, not like a path; write --json PATH "
            "model=nano, or --json ./model=nano for a path of that name",
        ),
        (["--search", "--tokens", "1000000000"], "--tokens 1000000000 is 3,906,250 sequences of"),
        (
            ["--search", "--tokens", "4e6", "num_microbatches=8"],
            "--tokens and num_microbatches=8: both set the batch; drop one of the two",
        ),
        (
            ["--search", "--tokens", "-5", "num_microbatches=8"],
            "--tokens -5 is not a whole number in [1, 1,000,000,000]; write for example",
        ),
        (
            ["--search", "--tokens", "10"],
            "--tokens 10 is less than one sequence of model.seq_length=256; write for example",
        ),
        (["--search", "--tokens", "abc"], "[1, 1,000,000,000]; write for example --tokens 4e6"),
        (
            [
                *("--search", "--keep", "schedule,schedule.num_chunks", "model=nano"),
                *("schedule=interleaved", "schedule.num_chunks=11"),
            ],
            "--keep schedule.num_chunks=11: with parallel.pp=2 that is 22 stages, too many for "
            "model.num_layers=4; keep at most 2",
        ),
        (
            ["parallel.tp=2", "cluster.num_nodes=8"],
            "model.num_layers=8 does not split over 16 stages; use parallel.pp=2 or 4 or 8, "
            "parallel.placement=balanced, parallel.layers_per_stage, or vp-plan --search",
        ),
        (["vocab.balance=true", "vocab=none"], "vocab.balance=true needs a sharded vocabulary"),
        (["--margin", "3"], "--margin belongs to --search"),
        (
            ["--search", "schedule.file=nowhere.txt"],
            "schedule.file=nowhere.txt is not there; vp-simulate --out DIR writes DIR/schedule.txt",
        ),
        (["--search", "--no-compare"], "--no-compare is for one plan; drop it, or --search"),
        (["--keep", "schedule"], "--keep belongs to --search"),
        (["--search", "--keep", "parallel.pp"], "--keep parallel.pp: it is not set; add"),
        (["--search", "--keep", "parallel.ptp"], "--keep parallel.ptp is not known (did you mean"),
        (["--search", "--keep", "schedule", "schedule=auto"], "--keep schedule.name: a search"),
        (["--search", "--keep", "vocab", "schedule=auto", "vocab=auto"], "vocab=auto is any; drop"),
        (
            ["--search", "--keep", "typed", "vocab.shards=[1,2]"],
            "--keep vocab.shards: a search sets it and cannot keep it; keep only some of schedule",
        ),
        (["--search", "--keep", "parallel"], "--keep parallel: name its settings, as in"),
        (["--search", "--margin", "99"], "--margin 99 is not a whole number in [0, 90]"),
        (["--search", "--top", "x"], "--top x is not a whole number in [1, 1,000,000]"),
        (["--search", "--seconds", "0"], "--seconds 0 is not a whole number"),
        (
            ["cluster=moon"],
            "cluster=moon is not known; choose one of a100_40g_node, a100_80g_node, "
            "h100_80g_node, h200_141g_node, laptop",
        ),
        (["schedule.num_chunks=5", "schedule=zb_v"], "; add schedule.num_chunks=null"),
        (["parallel.pp=3"], "the cluster has 4 CPU ranks (cluster=laptop): parallel.pp=3 needs"),
        (
            ["cluster=a100_80g_node", "cost=a100_4b", "model.seq_length=4096"],
            "these pass times are not for it",
        ),
    ],
)
def test_refusals_in_one_line(vp_plan, arguments, message):
    code, _, err = vp_plan(*arguments)
    assert code == EXIT_CONFIG
    assert message in err
    assert len(err.splitlines()) == 1
