"""A page has all its sections, loads nothing, runs nothing, and tells the truth about its run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from schedules.render import facts
from tests.disk import largest_file
from tests.report.conftest import EVIL, STEPS
from vp_train.commands.report import main
from vp_train.config import ConfigError
from vp_train.config.figures import name_of
from vp_train.durable import UnreadableError, write_output
from vp_train.explain.trace import read_traced
from vp_train.metrics.reporter import write_report
from vp_train.report import draw, page, record
from vp_train.report.record import read_run
from vp_train.report.traced import read_timelines
from vp_train.settings import load_config
from vp_train.units import human_bytes

SECTIONS = [
    "warnings",
    "curves",
    "time",
    "schedule",
    "why",
    "memory",
    "settings",
    "versions",
    "continue",
]
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The elements of a page: (name, attributes), and its text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def one(write_run):
    path, reporter = write_run("one", "optim.lr=0.25")
    write_report(reporter._config.run)
    return path


@pytest.fixture
def vp_report(run_here):
    return partial(run_here, main, "vp-report")


def check(found):
    """Assert what holds for every page."""
    names = {name for name, _ in found.elements}
    forbidden = {"script", "link", "iframe", "object", "embed", "form", "base", "foreignobject"}
    assert names & (forbidden | {"animate", "set", "image"}) == set()
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml;base64,"))
        assert "url(" not in re.sub(r"url\(#[\w]+\)", "", attributes.get("style", ""))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    policies = [item.get("content", "") for item in found.all("meta") if "http-equiv" in item]
    assert policies[0].startswith("default-src 'none'; ")
    assert len(found.all("h1")) == 1
    assert len(found.all("caption")) == len(found.all("table")) > 0
    pictures = [item for _, item in found.elements if item.get("role") == "img"]
    assert all(item["aria-label"] for item in pictures)
    assert all("alt" in item for item in found.all("img"))
    links = {item["href"][1:] for item in found.all("a")}
    assert links <= set(ids)


def test_the_page_of_a_run_has_all_sections(one):
    found = Page(one / "report.html")
    check(found)
    headings = [item["id"] for item in found.all("h2")]
    assert headings == SECTIONS
    captions = found.text
    for words in (
        *(
            "Validation losses",
            "wiki 7",
            "Bits per byte",
            "Loss",
            "Gradient norm",
            "Learning rate",
            "Tokens per second",
            "MFU",
            "Waiting",
        ),
        *("Memory", "Seconds of a step", "forward backward", "As planned", "As measured"),
        *("optim.lr", "0.25", "step 6: a loss of", "torch", f"{STEPS} of {STEPS}"),
    ):
        assert words in captions, words
    assert "1 non-finite value, at step 9" in captions
    assert "1 spike, at step 7" in captions
    assert len((one / "report.html").read_bytes()) < 500_000


def test_nothing_of_a_run_becomes_markup(evil_run):
    page.write_report(evil_run)
    found = Page(evil_run / "report.html")
    check(found)
    assert found.text.count("<script>alert(1)<!--") >= 8
    assert list(found.all("h1")) == [{}]


def test_two_runs_show_what_differs_and_their_curves_together_beside_the_first(
    one, write_run, evil_run, tmp_path, vp_report, capsys
):
    other, _ = write_run("other", "optim.lr=0.5", "schedule=gpipe")
    capsys.readouterr()
    assert vp_report(one, other) == (0, f"{one.parent}/comparison.html\n", "")
    found = Page(one.parent / "comparison.html")
    check(found)
    assert [item["id"] for item in found.all("h2")] == [
        *("settings", "curves", "figures", "warnings", "versions")
    ]
    settings = found.text.partition("Settings that differ")[2].partition("Curves")[0]
    names = re.findall(r"\b[a-z]+\.[a-z_]+", settings)
    assert names == ["schedule.name", "optim.lr"]
    assert "tokens per second, median" in found.text
    assert vp_report(one, evil_run, "--out", tmp_path / "evil.html")[0] == 0
    check(Page(tmp_path / "evil.html"))


@pytest.mark.parametrize(
    "name", ["plain", "it's one", 'a"b', "a,b=c", "(x)[1]{2}", "back\\slash", "~", EVIL]
)
def test_the_command_to_resume_finds_the_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "default_words", dict)
    run = tmp_path / name
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "config.yaml").write_text("run:\n  steps: 8\n")
    (run / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    (what, command), *others = page._commands(read_run(run))
    assert what == "Resume from the checkpoint of step 4"
    program, *words = shlex.split(command)
    (run / "config.yaml").unlink()  # it has not all sections
    settings = load_config(words).run
    assert (program, settings.directory, settings.resume) == ("vp-train", run, True)
    for _, other in others:
        assert shlex.split(other)[1] == str(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop("planned"), "it has no 'planned'"),
        (lambda r: r["measured"]["passes"][0].update(names="<b>"), "1 names have"),
        (lambda r: r["measured"]["passes"][0].update(names="<b>", starts=[0], ends=[1]), "a name"),
        (lambda r: r["measured"]["passes"][0].update(names="0Q0", starts=[0], ends=[1]), "a pass"),
        (lambda r: r["measured"]["passes"][0]["starts"].__setitem__(0, 1e9), "is not a time"),
        (lambda r: r["measured"]["passes"][0]["ends"].pop(), " ends"),
        (lambda r: r["planned"].update(passes=[]), "passes of 0 ranks"),
        (lambda r: r["planned"].update(passes=None), "NoneType"),
        (lambda r: r["planned"].update(peak_bytes=[True, 1]), "true is not a number"),
        (lambda r: r.update(schedule=EVIL), "is not a name"),
        (lambda r: r["planned"].update(bound_seconds="1"), "is not a number"),
        (lambda r: r["planned"]["communications"].update(ranks=[7]), "is not a number"),
        (lambda r: r["planned"]["communications"].update(ranks=[1]), " communications have 1 "),
    ],
)
def test_a_crafted_trace_is_refused_in_one_line(one, tmp_path, change, words):
    path = tmp_path / "step_times.json"
    content = json.loads((one / "trace" / "step_times.json").read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UnreadableError) as raised:
        read_timelines(path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_a_good_trace_the_plan_is_there_as_the_run_drew_it(write_run):
    run, _ = write_run("odd", steps=10)
    (run / "trace" / "step_times.json").write_text("{}")
    page.write_report(run)
    found = Page(run / "report.html")
    check(found)
    assert "Not in this report" in found.text
    assert len(found.all("img")) == 1  # the plan, as the run drew it


def test_crafted_files_are_lines_and_the_page_is_written(write_run):
    run, _ = write_run("crafted", steps=10)
    for name in ("env.json", "summary.json", "config.yaml"):
        (run / name).write_text("[" * 100_000)
    (run / "trace" / "step_times.json").unlink()
    (run / "trace" / "step_times.json").symlink_to("/etc/hostname")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n[1]\n{"step": "3"}\n{"step": 1e400}\n{"step": 11, "loss": 1e999}\n')
        file.write('{"step": 12, "loss": {"a": 1}, "spikes": -1e9}\n{"step": 13, "lo')
    found = read_run(run)
    assert len(found.missing) == 4
    assert all("\n" not in line for line in found.missing)
    assert found.metrics.curves.last == 12
    page.write_report(run)
    check(Page(run / "report.html"))


def test_seconds_below_zero_in_a_crafted_file_have_a_page(tmp_path):
    record = {"step": 1, "seconds/data": 1.0, "seconds/rest": -1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    check(Page(page.write_report(tmp_path)))


def test_the_peak_of_a_resumed_run_is_that_of_all_its_starts(tmp_path):
    lines = [json.dumps({"step": step, "peak_bytes": 9e9 / step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    last_start = {"ranks": [{"rank": 0, "peak_bytes": 4e9}]}
    (tmp_path / "summary.json").write_text(json.dumps(last_start))
    assert page._peak_bytes(read_run(tmp_path)) == 9e9
    (tmp_path / "metrics.jsonl").write_text("")
    assert page._peak_bytes(read_run(tmp_path)) == 4e9


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    page.write_report(tmp_path)
    found = Page(tmp_path / "report.html")
    assert "No step is recorded" in found.text
    assert "cannot be resumed" in found.text


def test_what_is_no_run_is_refused(tmp_path, vp_report):
    words = f"{tmp_path} has neither config.yaml nor metrics.jsonl; give the directory of a run"
    assert vp_report(tmp_path) == (78, "", f"vp-report: {words}\n")
    code, _, said = vp_report(tmp_path / "none")
    assert (code, "is not a directory; give that of a run" in said) == (78, True)
    assert vp_report()[0] == 78


def test_a_run_of_a_similar_name_is_named(vp_report):
    with TemporaryDirectory() as directory:  # a longer path would be shortened
        place = Path(directory)
        (place / "first").mkdir()
        (place / "first" / "config.yaml").touch()
        words = f"is not a directory (did you mean {place}/first?)"
        assert words in vp_report(place / "frist")[2]
        with pytest.raises(ConfigError, match=re.escape(words)):
            read_traced(place / "frist")


def recorded(tmp_path, name, *records, steps=None, **settings):
    """Write a run with these records and settings; return what is read of it."""
    path = tmp_path / name
    path.mkdir()
    lines = [json.dumps({"step": step, **values}) for step, values in enumerate(records, 1)]
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    words = "" if steps is None else f"run:\n  steps: {steps}\n"
    (path / "config.yaml").write_text(words)
    for step in settings.get("checkpoints", ()):
        (path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return read_run(path)


@pytest.mark.parametrize(
    ("done", "steps", "what"),
    [
        (1, None, "Resume from the checkpoint of step 4"),
        (1, 2, "Resume from the checkpoint of step 4"),
        (2, 2, "Train longer, from the checkpoint of step 4"),
        (3, 2, "Train longer, from the checkpoint of step 4"),
    ],
)
def test_a_run_that_is_done_trains_longer_and_any_other_is_resumed(tmp_path, done, steps, what):
    run = recorded(tmp_path, "a", *[{"loss": 1.0}] * done, steps=steps, checkpoints=(2, 4))
    (first, command), *others = page._commands(run)
    assert first == what
    assert (f"run.steps={2 * (steps or 0)}" in command) == what.startswith("Train")
    assert [name for name, _ in others] == [
        *("Score a text", "Let it write", "Export to Hugging Face", "Write this page again")
    ]
    without = recorded(tmp_path, "b", {"loss": 1.0}, steps=steps)
    assert [name for name, _ in page._commands(without)] == ["Write this page again"]
    early = f"{done:,} of {steps} steps are recorded: it runs, or has ended early"
    assert page._warnings(run) == [early] * (steps is not None and done < steps)


def test_events_are_counted_and_the_first_ones_named():
    for count, steps, words in (
        (1, [3], "1 spike, at step 3"),
        (2, [3, 1000], "2 spikes, at step 3, 1,000"),
        (12, list(range(12)), f"12 spikes, at step {', '.join(map(str, range(12)))}"),
        (13, list(range(13)), f"13 spikes, at step {', '.join(map(str, range(12)))} and later"),
    ):
        assert page._event_words("spike", record.Events(count, steps)) == words


def test_only_what_is_known_is_a_fact_and_speed_is_that_of_the_steps(tmp_path):
    run = recorded(tmp_path, "a", {"loss": 2.0, "tokens_per_second": 5.0}, {"loss": 1500.5})
    facts = {name: (value, note) for name, value, note in page._facts(run)}
    assert facts == {
        "Steps": ("2", ""),
        "Loss": ("1500.5000", "training, last step"),
        "Tokens per second": ("5", "median"),
        "Time": ("0:00", "of all steps"),
    }
    values = {"tokens_per_second": 5.0, "interval_tokens_per_second": 7.0, "mfu": 0.5}
    values |= {
        "validation_loss": 3.0,
        "bubble_mean": 0.25,
        "peak_bytes": 2**30,
        "seconds/step": 61.0,
    }
    more = recorded(tmp_path, "b", values, steps=4)
    assert [value for _, value, _ in page._facts(more)] == [
        *("1 of 4", "3.0000", "5", "50.0%", "25.0%", "1.00 GiB", "1:01")
    ]
    assert ("Validation loss", "3.0000", "lowest 3.0000 at step 1") in page._facts(more)


def test_several_runs_are_compared_by_means_of_a_step_and_what_none_has_is_left_out(tmp_path):
    runs = [
        recorded(tmp_path, "a", {"seconds/step": 1.0, "seconds/data": 0.0}, {"seconds/step": 3.0}),
        recorded(tmp_path, "b", {"seconds/data": 1.0}),
        recorded(tmp_path, "c"),
    ]
    rows = dict(page._figures(runs))
    assert rows["steps"] == ["2", "1", "0"]
    assert rows["step, mean: whole"] == ["2.00 s", "-", "-"]
    assert rows["step, mean: data"] == ["-", "1.00 s", "-"]
    assert "loss, last" not in rows
    assert "step, mean: waiting" not in rows


def test_the_speed_is_the_median_of_the_steps_not_of_what_a_progress_line_says(tmp_path):
    steps = [{"tokens_per_second": n, "interval_tokens_per_second": 1.0} for n in (1.0, 4.0, 8, 9)]
    (speed,) = dict(page._figures([recorded(tmp_path, "a", *steps)]))["tokens per second, median"]
    assert speed == "6"


def test_validations_of_other_sizes_are_named_beside_their_losses(tmp_path):
    runs = [recorded(tmp_path, name, {"validation_loss": 1.0}) for name in ("a", "b", "c")]

    def sizes(*settings):
        changed = [replace(run, settings=one) for run, one in zip(runs, settings, strict=True)]
        return dict(page._figures(changed)).get("validation, sequences")

    of_two = {"run.eval_microbatches": "16", "micro_batch_size": "2"}
    of_one = {"run.eval_microbatches": "16", "micro_batch_size": "1"}
    assert sizes(of_one, of_two, {}) == ["16", "32", "-"]
    assert sizes(of_one, of_two, of_two | {"run.eval_sequences": "8"}) == ["16", "32", "8"]
    assert sizes(of_two, of_two, of_one | {"run.eval_sequences": "32"}) is None


def test_the_shares_of_a_step_add_up_and_the_largest_is_first(tmp_path):
    run = recorded(
        tmp_path, "a", {"seconds/data": 1.0, "seconds/optimizer": 3.0, "seconds/rest": 0}
    )
    bars = page._shares(run.metrics.curves)
    assert [(bar.name, bar.value, bar.percent) for bar in bars] == [
        ("optimizer", "3.00 s", "75.0%"),
        ("data", "1.00 s", "25.0%"),
    ]
    assert page._shares(recorded(tmp_path, "b", {"loss": 1.0}).metrics.curves) == []


def test_losses_come_first_and_those_of_validation_sets_next(tmp_path):
    values = {
        "loss": 1.0,
        "validation/a/loss": 2.0,
        "validation/a/bits_per_byte": 3.0,
        "grad_norm": 4.0,
    }
    run = recorded(tmp_path, "a", values)
    pictures = page._charts(run.metrics.curves)
    assert [(each.title, each.legend[0].name, each.legend[0].value) for each in pictures] == [
        ("Loss", "training", "1"),
        ("Validation losses", "a", "2"),
        ("Bits per byte", "a", "3"),
        ("Gradient norm", "norm", "4"),
    ]
    common = page._common_charts([run], ["a"], [draw.Style(0)])
    assert [(each.title, each.unit) for each in common] == [
        ("Training loss", "nats per token"),
        ("Validation loss: a", "nats per token"),
        ("Gradient norm", "before clipping"),
    ]
    waiting = recorded(tmp_path, "b", {"bubble_worst": 0.5})
    (picture,) = page._common_charts([waiting], ["b"], [draw.Style(0)])
    assert picture.unit == "% of the time of passes and waiting, worst rank"
    assert picture.words == "b: last 50, lowest 50 at step 1, highest 50 at step 1"


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        *(("loss", 2.5, "2.5"), ("grad_norm", 0.5, "0.5"), ("learning_rate", 1e-3, "0.001")),
        *(("interval_tokens_per_second", 1234.0, "1,234"), ("mfu", 0.5, "50")),
        *(("bubble_worst", 0.25, "25"), ("bubble_mean", 0.125, "12.5")),
        *(("memory/allocated_worst", 2.0**31, "2"), ("memory/reserved_worst", 2.0**29, "0.5")),
    ],
)
def test_a_figure_is_shown_in_the_unit_of_its_picture(tmp_path, key, value, shown):
    curves = recorded(tmp_path, "a", {key: value / 2}, {key: value}).metrics.curves
    (picture,) = page._charts(curves)
    assert [entry.value for entry in picture.legend] == [shown]
    assert f"last {shown}, " in picture.words
    assert f"highest {shown} at step 2" in picture.words


def test_curves_of_what_cannot_be_below_zero_begin_there(tmp_path, monkeypatch):
    """Each picture has the scaled values, and a name that no other picture of the page has."""
    keys = {
        "loss": ("Loss", 1, False),
        "grad_norm": ("Gradient norm", 1, False),
        "learning_rate": ("Learning rate", 1, True),
        "interval_tokens_per_second": ("Tokens per second", 1, True),
        "mfu": ("MFU", 100, True),
        "bubble_worst": ("Waiting", 100, True),
        "memory/allocated_worst": ("Memory", 2**-30, True),
        "validation/a/loss": ("Validation losses", 1, False),
        "validation_bits_per_byte": ("Bits per byte", 1, False),
    }
    units = {
        "Loss": "nats per token",
        "Gradient norm": "before clipping",
        "Learning rate": "",
        "Tokens per second": "all replicas",
        "MFU": "% of the peak of all ranks",
        "Memory": "GiB",
        "Validation losses": "nats per token",
        "Bits per byte": "of validation",
    }
    made = {}

    def lines(curves, *, name, from_zero=False):
        assert name not in made
        made[name] = curves, from_zero
        return name

    monkeypatch.setattr(draw, "lines", lines)
    run = recorded(tmp_path, "a", dict.fromkeys(keys, 3.0), dict.fromkeys(keys, 6.0))
    several = {"Loss": "Training loss", "Validation losses": "Validation loss: a"}
    for others in ({}, several):
        shown = (
            page._common_charts([run, run], ["a", "b"], [draw.Style(4), draw.Style(5)])
            if others
            else page._charts(run.metrics.curves)
        )
        by_title = {picture.title: picture for picture in shown}
        assert len(by_title) == len(keys) - bool(others)
        for title, scale, from_zero in keys.values():
            name = others.get(title, title)
            if others and title == "Bits per byte":
                continue
            curves, zero = made[by_title[name].svg]
            assert zero is from_zero, title
            for _, points in curves:
                assert points == [(1, 3.0 * scale), (2, 6.0 * scale)], title
            assert len(curves) == (2 if others else 1)
            assert by_title[name].unit.startswith(units.get(title, "%"))
            styles = [style for style, _ in curves]
            assert styles == [entry.style for entry in by_title[name].legend]
            assert styles == ([draw.Style(4), draw.Style(5)] if others else [draw.Style(0)])
        made.clear()


def test_every_curve_of_a_picture_has_its_own_look_and_name(tmp_path):
    names = ["bubble_worst", "bubble_mean"], ["loss", "validation_loss"]
    names += (["memory/allocated_worst", "memory/allocated_mean", "memory/reserved_worst"],)
    for kinds in names:
        run = recorded(tmp_path, kinds[0].replace("/", "-"), dict.fromkeys(kinds, 1.0))
        (picture,) = page._charts(run.metrics.curves)
        assert [entry.style for entry in picture.legend] == [
            draw.Style.of(index) for index in range(len(kinds))
        ]
        assert len({entry.name for entry in picture.legend}) == len(kinds)
        assert picture.words.count("; ") == len(kinds) - 1


def test_the_parts_of_a_step_have_each_a_colour_of_its_own_in_picture_and_table(tmp_path):
    values = {key: 1.0 + index for index, key in enumerate(page._PARTS)}
    run = recorded(tmp_path, "a", values, {key: 3 * value for key, value in values.items()})
    picture = page._stacked(run.metrics.curves)
    assert [entry.name for entry in picture.legend] == [name_of(key) for key in page._PARTS]
    assert sorted(entry.style.colour for entry in picture.legend) == list(range(9))
    bars = page._shares(run.metrics.curves)
    assert {bar.name: bar.style for bar in bars} == {e.name: e.style for e in picture.legend}
    assert [bar.value for bar in bars[:2]] == ["36.00 s", "32.00 s"]
    assert sum(bar.share for bar in bars) == pytest.approx(1)
    assert picture.note == ""
    assert picture.words.startswith(
        "forward backward: last 3, lowest 1 at step 1, highest 3 at step 2; vocabulary: last"
    )
    steps = [{"seconds/data": 1.0}] * 4 + [{"seconds/data": 9.0}]
    high = page._stacked(recorded(tmp_path, "b", *steps).metrics.curves)
    assert high.note == "The longest steps are cut off at the top."
    assert page._stacked(recorded(tmp_path, "c", {"loss": 1.0}).metrics.curves) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((None, "-"), (0.0, "0"), (1.23456, "1.235"), (999.99, "1000"), (1_000.0, "1,000")),
        *((-1_234.5, "-1,234"), (-0.5, "-0.5"), (1e7, "10,000,000")),
    ],
)
def test_a_number_has_four_digits_or_no_fraction(value, words):
    assert page._number(value) == words


def test_seconds_are_a_duration_below_a_hundred_and_a_clock_above():
    assert (page._seconds(99.99), page._seconds(100.0)) == ("99.99 s", "1:40")
    assert (page._per_cent(None), page._per_cent(0.1234)) == ("-", "12.3%")
    assert (page._bytes(None), page._bytes(2048.0)) == ("-", "2.0 KiB")


def test_a_run_that_was_resumed_says_where_its_records_begin(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    for first, note in ((0, ""), (1, ""), (2, "from step 2"), (1_500, "from step 1,500")):
        (path / "metrics.jsonl").write_text(json.dumps({"step": first, "loss": 1.0}) + "\n")
        (name, value, said), *_ = page._facts(read_run(path))
        assert (name, value, said) == ("Steps", f"{first:,}", note)


def explained(causes=(), what_ifs=(), planned=1.0, measured=2.0):
    """Return a run whose traced step has this explanation, and nothing else."""
    explanation = SimpleNamespace(
        planned_seconds=planned,
        measured_seconds=measured,
        causes=[SimpleNamespace(words=words, seconds=seconds) for words, seconds in causes],
        shown_what_ifs=[SimpleNamespace(words=words, seconds=s) for words, s in what_ifs],
    )
    return SimpleNamespace(explanation=explanation)


def test_the_way_from_the_planned_to_the_measured_seconds_adds_up():
    """Leave out what adds less than one in two thousand, and count it in the sums."""
    causes = [("slow", 0.75), ("tiny", 0.000999), ("late", 0.001), ("fast", -0.5), ("gone", -9.0)]
    assert page._causes(explained(causes)) == [
        ("planned", "", "1.00 s"),
        ("slow", "+ 750 ms", "1.75 s"),
        ("late", "+ 1 ms", "1.75 s"),
        ("fast", "- 500 ms", "1.25 s"),
        ("gone", "- 9.00 s", "0 ms"),
    ]
    what_ifs = [("a", 1.0), ("b", 2.5)]
    assert page._what_ifs(explained((), what_ifs)) == [
        ("a", "1.00 s", "-50%"),
        ("b", "2.50 s", "+25%"),
    ]
    nothing = SimpleNamespace(explanation=None)
    assert (page._causes(nothing), page._what_ifs(nothing)) == ([], [])


def test_the_planned_and_the_measured_step_are_drawn_and_share_no_identifier(one):
    found = page._schedules(read_run(one))
    assert [each.title for each in found] == ["As planned", "As measured"]
    traced = read_run(one).traced
    for each, timeline in zip(found, (traced.planned, traced.measured), strict=True):
        assert each.words == facts(timeline)
        assert each.uri == ""
        ids = set(re.findall(r'id="([^"]*)"', each.svg))
        assert set(re.findall(r"url\(#(\w+)\)", each.svg)) <= ids
        name = f"{traced.schedule}, vocabulary {traced.vocabulary}: {each.title.lower()}"
        assert name in each.svg
    one_ids, two_ids = (set(re.findall(r'id="([^"]*)"', each.svg)) for each in found)
    assert not one_ids & two_ids


def test_the_versions_name_what_is_known_in_one_order(tmp_path):
    run = recorded(tmp_path, "a")
    assert page._versions(run) == []
    environment = {"python": "3.11", "commit": "abc", "cpus": 8, "host": "h"}
    environment |= {"command": ["vp-train", "a b"], "packages": {"torch": "2"}}
    (run.path / "env.json").write_text(json.dumps(environment))
    assert page._versions(read_run(run.path)) == [
        *(("host", "h"), ("processors", "8"), ("commit of vp_train", "abc"), ("Python", "3.11")),
        *(("torch", "2"), ("started as", "vp-train 'a b'")),
    ]


def test_the_warnings_begin_with_those_of_the_first_lines(tmp_path):
    run = recorded(tmp_path, "a", {"loss": None})
    assert len(page._warnings(run)) == 1
    (run.path / "env.json").write_text(json.dumps({"warnings": ["9 of 10 were left out"]}))
    assert page._warnings(read_run(run.path)) == ["9 of 10 were left out", *page._warnings(run)]


def test_only_what_differs_between_runs_is_listed():
    one = {"run.name": "a", "run.root": "x", "run.resume": "true", "optim.lr": "1", "same": "s"}
    two = {"run.name": "b", "run.root": "y", "optim.lr": "2", "same": "s", "only.two": "t"}
    assert page._differences([one, two]) == [
        ("optim.lr", ["1", "2"]),
        ("only.two", ["-", "t"]),
    ]
    assert page._differences([one, one]) == []


def test_every_row_of_the_table_of_several_runs(one, write_run, tmp_path):
    values = {
        "loss": 2.0,
        "validation_loss": 3.0,
        "interval_tokens_per_second": 1_234.0,
        "tokens_per_second": 7.0,
        "mfu": 0.25,
        "bubble_mean": 0.125,
        "peak_bytes": 2**30,
        "seconds/step": 120.0,
        **{key: 1.0 + index for index, key in enumerate(page._PARTS)},
    }
    run = recorded(tmp_path, "a", values, values | {"validation_loss": 2.5})
    rows = dict(page._figures([run, recorded(tmp_path, "b")]))
    assert {name: row[1] for name, row in rows.items()} == dict.fromkeys(rows, "-") | {
        "steps": "0",
        "time of all steps": "0:00",
    }
    assert {name: row[0] for name, row in rows.items()} == {
        "steps": "2",
        "loss, last": "2.0000",
        "validation loss, last": "2.5000",
        "validation loss, lowest": "2.5000 at step 2",
        "tokens per second, median": "7",
        "MFU, median": "25.0%",
        "waiting, mean rank, median": "12.5%",
        "peak memory, worst rank": "1.00 GiB",
        "time of all steps": "4:00",
        "step, mean: whole": "120.00 s",
        **{
            f"step, mean: {name}": f"{i + 1:.2f} s"
            for i, name in enumerate(map(name_of, page._PARTS))
        },
    }
    found = read_run(one)
    rows = dict(page._figures([found]))
    for name, timeline in (("planned", found.traced.planned), ("measured", found.traced.measured)):
        (words,) = rows[f"activations, worst rank, {name}"]
        assert words == human_bytes(max(timeline.peak_bytes))


def test_planned_and_measured_activations_are_those_of_the_worst_rank():
    sides = {
        "planned": SimpleNamespace(peak_bytes=(1.0, 2_048.0)),
        "measured": SimpleNamespace(peak_bytes=(4_096.0, 3.0)),
    }
    run = SimpleNamespace(traced=SimpleNamespace(**sides))
    assert page._activations(run, planned=True) == "2.0 KiB"
    assert page._activations(run, planned=False) == "4.0 KiB"
    assert page._activations(SimpleNamespace(traced=None), planned=True) == "-"


def test_a_comparison_says_of_every_run_what_its_own_page_says(tmp_path):
    runs = [recorded(tmp_path, name, {"loss": 1.0}, steps=2) for name in "ab"]
    found = page._comparison(runs)
    assert found["names"] == ["a", "b"]
    assert found["styles"] == [draw.Style.of(0), draw.Style.of(1)]
    assert found["paths"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert found["warnings"] == [(run.name, page._warnings(run), run) for run in runs]
    assert len(found["warnings"][0][1]) == 1
    assert found["figures"] == page._figures(runs)
    assert [entry.name for entry in found["charts"][0].legend] == ["a", "b"]


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
    runs = [
        recorded(tmp_path / place, name) for place, name in (("x", "a"), ("y", "a"), ("x", "b"))
    ]
    assert page._names(runs) == [f"{tmp_path}/x/a", f"{tmp_path}/y/a", "b"]


def test_a_row_of_a_rank_has_all_that_is_known_and_its_peak_beside_that_of_the_worst(tmp_path):
    run = recorded(tmp_path, "a")
    full = {"rank": 1, "peak_bytes": 2**29, "layers": "0-1", "vocabulary_rows": 1_234}
    full |= {"num_parameters": 5_678_901, "predicted_bubble": 0.125, "measured_bubble": 0.25}
    full |= {"predicted_bytes": 2**20, "measured_bytes": 2**21}
    ranks = [{"rank": 0, "peak_bytes": 2**30}, full]
    (run.path / "summary.json").write_text(json.dumps({"ranks": ranks}))
    (first, most), (second, half) = page._rank_rows(read_run(run.path))
    assert (first, most) == (["0", *["-"] * 7, "1.00 GiB"], 1.0)
    assert second == [
        *("1", "0-1", "1,234", "5.68 M", "12.5%", "25.0%", "1.0 MiB", "2.0 MiB", "512.0 MiB")
    ]
    assert half == 0.5
    assert len(second) == len(page._RANK_COLUMNS)
    (run.path / "summary.json").write_text(json.dumps({"ranks": [ranks[0] | {"peak_bytes": 0}]}))
    assert page._rank_rows(read_run(run.path))[0][1] == 0.0


@pytest.mark.parametrize("traced", [False, True])
def test_the_picture_of_the_plan_is_read_only_where_no_step_was_traced(write_run, traced):
    run, _ = write_run(f"pictured {traced}", steps=6, traced=traced)
    found = read_run(run)
    assert (found.traced is not None, found.picture is None) == (traced, traced)
    assert (found.explanation is not None) == traced


def test_a_missing_package_is_named_and_no_run_minds(one, write_run, monkeypatch, capsys):
    run, reporter = write_run("bare", steps=2)
    capsys.readouterr()
    monkeypatch.setattr(draw, "find_spec", lambda name: None if name == "matplotlib" else True)
    write_report(reporter._config.run)
    assert capsys.readouterr() == ("", "")
    assert not (run / "report.html").exists()
    with pytest.raises(ConfigError, match=r"needs matplotlib, .* pip install 'vp_train\[plot\]'"):
        page.write_report(run)
    with pytest.raises(ConfigError, match=r"needs matplotlib, .* pip install 'vp_train\[plot\]'"):
        page.write_comparison([run, run], run / "both.html")
    assert not (run / "both.html").exists()


def test_a_file_that_the_disk_does_not_take_is_named_as_it_was_typed(tmp_path):
    place = tmp_path / "r.html"
    place.write_text("old")
    with largest_file(10), pytest.raises(OSError, match="too large") as caught:
        write_output(place, "x" * 100)
    assert caught.value.filename == str(place)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("r.html", "old")]


def test_a_report_never_fails_a_run(write_run, monkeypatch, capsys):
    run, reporter = write_run("unlucky", steps=2)

    def fail(path):
        raise RuntimeError("a bug")

    monkeypatch.setattr(page, "write_report", fail)
    write_report(reporter._config.run)
    assert (
        capsys.readouterr().err
        == f"{run}/report.html cannot be written (a bug); going on without\n"
    )


def test_a_run_may_go_without(write_run):
    run, reporter = write_run("without", "run.report=false", steps=2)
    write_report(reporter._config.run)
    assert not (run / "report.html").exists()


def test_notices_that_cannot_be_written_are_one_warning(write_run, capsys):
    run, reporter = write_run("mute", steps=2)
    (run / "notices.txt").mkdir()
    capsys.readouterr()
    reporter.note("a word")
    reporter.note("another")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "notices.txt" in said


def test_a_page_goes_where_it_is_asked_to_be_and_no_device_or_link_is_replaced(
    one, vp_report, tmp_path
):
    code, said, _ = vp_report(one, "--out", tmp_path / "new" / "page.html")
    assert (code, said) == (0, f"{tmp_path}/new/page.html\n")
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "link.html").symlink_to("page.html")
    assert vp_report(one, "--out", tmp_path / "link.html")[0] == 0
    assert (tmp_path / "link.html").is_symlink()
    check(Page(tmp_path / "page.html"))
    code, _, said = vp_report(one, "--out", tmp_path / "page.html" / "a")
    assert (code, "cannot be written (File exists); give a file in" in said) == (74, True)
    locked = shutil.copytree(one, tmp_path / "locked") / "report.html"
    locked.unlink()
    locked.mkdir()
    words = f"{locked}: Is a directory; vp-report --out FILE writes the report elsewhere"
    assert vp_report(locked.parent) == (74, "", f"vp-report: {words}\n")


def test_arguments_that_are_no_paths_are_said_in_one_line(vp_report, tmp_path):
    code, _, said = vp_report("a\x1bb")
    words = r"argument RUN: a\x1bb: arguments and names of files have no control characters"
    assert (code, said) == (78, f"vp-report: {words}; see vp-report --help\n")
    code, _, said = vp_report("~nobody-here/run")
    assert (code, "is not a directory; give that of a run" in said) == (78, True)
