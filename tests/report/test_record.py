"""Files of a run are read up to their limits, and what is not what a run writes is said."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from vp_train.config.figures import BITS, LOSS, set_of, validation_key
from vp_train.durable import UnreadableError
from vp_train.report import page, record
from vp_train.report.record import Events, read_run


def written(path, *records):
    """Write metrics.jsonl; return what is read of it."""
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    return record._metrics(path / "metrics.jsonl")


def test_a_counter_that_grows_is_an_event_as_often_as_it_grows(tmp_path):
    counts = [(1, 0), (2, 2), (3, 2), (4, 3), (5, 1), (6, 2), (7, None)]
    found = written(tmp_path, *({"step": step, "spikes": count} for step, count in counts))
    assert found.events.keys() == {"spike"}
    assert (found.events["spike"].count, found.events["spike"].steps) == (4, [2, 4, 6])
    skipped = written(tmp_path, {"step": 1, "skipped_steps": 1})
    assert skipped.events.keys() == {"skipped step"}


def test_a_step_with_a_value_that_is_not_finite_is_one_event(tmp_path):
    lines = [{"step": 1, "loss": None, "grad_norm": None}, {"step": 2, "other": None}]
    found = written(tmp_path, *lines, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": 1.0})
    events = found.events["non-finite value"]
    assert (events.count, events.steps) == (2, [1, 3])
    assert found.curves.points("loss") == [(4, 1.0)]


def test_the_steps_of_so_many_events_are_named_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(record, "_MOST_EVENTS", 3)
    events = Events()
    for step in range(5):
        events.add(step, 2)
    assert (events.count, events.steps) == (10, [0, 1, 2])


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", None, 2**53])
def test_what_is_no_step_is_left_out(tmp_path, step):
    last = 2**53 - 1
    found = written(tmp_path, {"step": 0, "loss": 2.0}, {"step": step, "loss": 3.0}, {"step": last})
    assert found.curves.points("loss") == [(0, 2.0)]
    assert (found.curves.num_steps, found.curves.last) == (1, last), "step 0 is before the first"


def test_as_many_validation_sets_are_shown_as_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_MOST_SETS", 2)
    keys = [f"validation/s{i}/{name}" for i in range(3) for name in ("loss", "bits_per_byte")]
    found = written(tmp_path, {"step": 1} | dict.fromkeys(keys, 1.0))
    assert set(found.curves.keys) == set(keys[:4])


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("validation/a/loss", "a"),
        ("validation/a/b/loss", "a/b"),
        ("validation//loss", None),
        ("validation/loss", None),
        ("validation_loss", None),
        ("validation/a/bits_per_byte", None),
        (f"validation/{'a' * 184}/loss", "a" * 184),
        (f"validation/{'a' * 185}/loss", None),
    ],
)
def test_a_key_of_a_validation_set_has_its_name(key, name):
    assert set_of(key, LOSS) == name


@pytest.mark.parametrize("figure", [LOSS, BITS])
def test_a_report_reads_the_key_that_a_run_writes_for_a_validation_set(figure):
    for name in ("a", "a/b", "loss"):
        assert set_of(validation_key(name, figure), figure) == name
    assert set_of(validation_key("", figure), figure) is None


def test_the_newest_notices_and_their_number_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_MOST_NOTICES", 3)
    for count in (0, 2, 3, 5):
        lines = [f"line {number}" for number in range(count)]
        (tmp_path / "notices.txt").write_text("".join(f"{line}\n" for line in lines))
        assert record._notices(tmp_path / "notices.txt") == (tuple(lines[-3:]), count)


def test_a_log_is_shown_by_its_last_lines(tmp_path):
    (tmp_path / "logs").mkdir()
    for name, count in (
        ("rank-0.log", 0),
        ("rank-1.log", 1),
        ("rank-2.log", 30),
        ("rank-3.log", 99),
    ):
        (tmp_path / "logs" / name).write_text("".join(f"{number}\n" for number in range(count)))
    (tmp_path / "logs" / "other.txt").write_text("no log")
    found = {log.name: log.tail.splitlines() for log in record._logs(tmp_path / "logs")}
    assert found.keys() == {"rank-1.log", "rank-2.log", "rank-3.log"}
    for name, count in (("rank-1.log", 1), ("rank-2.log", 30), ("rank-3.log", 99)):
        assert found[name] == [str(number) for number in range(max(0, count - 30), count)]
    (tmp_path / "logs" / "rank-1.log").write_text("x" * 5_000)
    (first, *_) = record._logs(tmp_path / "logs")
    assert len(first.tail) == 2_000
    (tmp_path / "elsewhere").write_text("secret")
    (tmp_path / "logs" / "rank-4.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnreadableError, match="symbolic link"):
        record._logs(tmp_path / "logs")
    (tmp_path / "linked").symlink_to(tmp_path / "logs")
    with pytest.raises(UnreadableError, match="symbolic link"):
        record._logs(tmp_path / "linked")


def test_lines_and_files_have_a_longest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_LONGEST_LINE", 10)
    monkeypatch.setattr(record, "_LARGEST_LINES", 20)
    path = tmp_path / "notices.txt"
    path.write_text("12345678\n" + "\n" * 11)
    assert len(list(record._lines(path))) == 12
    path.write_text("12345678\n" + "\n" * 12)
    with pytest.raises(UnreadableError, match="has over 20 bytes"):
        list(record._lines(path))
    path.write_text("123456789\n")
    with pytest.raises(UnreadableError, match="has a line of over 10 bytes"):
        list(record._lines(path))


def test_a_rank_shows_what_is_known_of_it(tmp_path):
    rows = [
        {"rank": 0, "peak_bytes": 5},
        {
            "rank": 1,
            "peak_bytes": 6.0,
            "layers": "0-1",
            "vocabulary_rows": 7,
            "num_parameters": 8,
            "predicted_bubble": 0.1,
            "measured_bubble": 0.2,
            "predicted_bytes": 9,
            "measured_bytes": 10,
            "busy": True,
        },
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"ranks": rows}))
    first, second = record._ranks(tmp_path / "summary.json")
    assert first == record.RankRow(0, 5.0)
    assert second == record.RankRow(1, 6.0, "0-1", 7, 8, 0.1, 0.2, 9.0, 10.0)
    for bad in (
        {},
        {"ranks": [{}]},
        {"ranks": [{"rank": True, "peak_bytes": 1}]},
        {"ranks": 1},
        [],
    ):
        (tmp_path / "summary.json").write_text(json.dumps(bad))
        with pytest.raises(UnreadableError, match="is not what a run writes"):
            record._ranks(tmp_path / "summary.json")


def test_the_environment_has_texts_and_numbers_only(tmp_path):
    good = {"python": "3.11", "host": "a", "cpus": 8, "commit": None, "other": "x"}
    good |= {"packages": {"torch": "2", "none": None}, "command": ["vp-train", "a b"]}
    good |= {"warnings": ["a\x1bb", 3, "c"]}
    (tmp_path / "env.json").write_text(json.dumps(good))
    assert record._environment(tmp_path / "env.json") == {
        "python": "3.11",
        "host": "a",
        "cpus": "8",
        "packages": {"torch": "2"},
        "command": ["vp-train", "a b"],
        "warnings": ["a\\x1bb", "c"],
    }
    bad = {"packages": [1], "command": ["a", 1], "warnings": "a"}
    (tmp_path / "env.json").write_text(json.dumps(bad))
    assert record._environment(tmp_path / "env.json") == {}
    (tmp_path / "env.json").write_text("[]")
    with pytest.raises(UnreadableError, match="is not what a run writes"):
        record._environment(tmp_path / "env.json")


def test_the_steps_that_a_run_was_to_do_are_a_number_in_its_settings(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    for words, steps in (
        ("8", 8),
        ("x", None),
        ("-8", None),
        ("9" * 15, 10**15 - 1),
        ("9" * 16, None),
    ):
        (tmp_path / "config.yaml").write_text(f"run:\n  steps: {words}\n")
        assert read_run(tmp_path).planned_steps == steps


@pytest.mark.parametrize(("num_passes", "is_explained"), [(5_000, True), (5_001, False)])
def test_a_step_of_many_passes_is_drawn_and_not_explained(
    tmp_path, monkeypatch, num_passes, is_explained
):
    """Five thousand passes are drawn at most, and none of a step that does not fit its plan."""
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("")
    traced = SimpleNamespace(num_passes=num_passes)
    monkeypatch.setattr(record, "read_timelines", lambda path: traced)
    monkeypatch.setattr(record, "read_traced", lambda path: "the step")
    monkeypatch.setattr(record, "explain", lambda step: f"why {step}")
    found = read_run(tmp_path)
    assert found.traced is traced
    assert found.explanation == ("why the step" if is_explained else None)
    assert found.picture is None

    def fails(step):
        raise ValueError("rank 3 has no pass")

    monkeypatch.setattr(record, "explain", fails)
    found = read_run(tmp_path)
    words = "the traced step does not fit its plan: rank 3 has no pass"
    assert (found.explanation, words in found.missing) == (None, is_explained)


def test_a_report_reads_so_much_of_a_run_and_no_more(tmp_path):
    """The newest notices and ends of logs, the first events, sets and ranks."""
    lines = [{"step": step, "spikes": step} for step in range(1, 103)]
    sets = {f"validation/{number}/loss": 1.0 for number in range(40)}
    found = written(tmp_path, *lines, {"step": 200, "loss": 1e30} | sets, {"step": 201})
    assert found.events["spike"].count == 102
    assert found.events["spike"].steps == list(range(1, 101))
    assert sum(set_of(key, LOSS) is not None for key in found.curves.keys) == 32
    assert found.curves.latest("loss") == 1e30
    assert written(tmp_path, {"step": 1, "loss": 1.001e30}).curves.latest("loss") is None
    (tmp_path / "notices.txt").write_text("".join(f"{number}\n" for number in range(70)))
    notices, count = record._notices(tmp_path / "notices.txt")
    assert (notices[0], len(notices), count) == ("10", 60, 70)
    (tmp_path / "logs").mkdir()
    for number in range(40):
        (tmp_path / "logs" / f"rank-{number:02d}.log").write_text("a word\n")
    assert len(record._logs(tmp_path / "logs")) == 32
    ranks = [{"rank": rank, "peak_bytes": 1} for rank in range(4_100)]
    (tmp_path / "summary.json").write_text(json.dumps({"ranks": ranks}))
    assert len(record._ranks(tmp_path / "summary.json")) == 4_096
    (tmp_path / "env.json").write_text(
        json.dumps({"packages": {str(n): "1" for n in range(120)}, "command": ["a"] * 1_200})
    )
    environment = record._environment(tmp_path / "env.json")
    assert (len(environment["packages"]), len(environment["command"])) == (100, 1_000)


def test_a_line_and_a_picture_may_be_large_and_no_larger(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"x" * ((1 << 20) - 2) + b"\n")
    assert len(next(iter(record._lines(path)))) == (1 << 20) - 1
    path.write_bytes(b"x" * ((1 << 20) - 1) + b"\n")
    with pytest.raises(UnreadableError, match="has a line of over 1,048,576 bytes"):
        list(record._lines(path))
    with path.open("wb") as file:
        file.truncate((1 << 33) + 1)
    with pytest.raises(UnreadableError, match="has over 8,589,934,592 bytes"):
        list(record._lines(path))
    picture = tmp_path / "schedule.svg"
    picture.write_bytes(b"x" * (1 << 22))
    assert record._picture(picture).startswith("data:image/svg+xml;base64,eHh4")
    picture.write_bytes(b"x" * ((1 << 22) + 1))
    with pytest.raises(UnreadableError):
        record._picture(picture)


def test_every_key_that_a_run_writes_for_its_pictures_is_kept(tmp_path):
    keys = {*record._KEYS, "validation/a/loss", "validation/a/bits_per_byte"}
    found = written(tmp_path, {"step": 1, "other": 1.0} | dict.fromkeys(keys, 1.0))
    assert set(found.curves.keys) == keys
    shown = {key for kind in page._KINDS for key in kind.curves} | page._PARTS.keys()
    assert shown | {"peak_bytes", "tokens_per_second", "validation_bits_per_byte"} <= keys


def test_what_a_new_run_does_not_have_is_empty_and_what_a_summary_lacks_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("")
    found = read_run(tmp_path)
    assert (found.notices, found.num_notices, found.logs, found.ranks) == ((), 0, (), ())
    assert (found.checkpoints, found.traced, found.picture) == ((), None, None)
    assert (found.environment, found.explanation, found.metrics.events) == ({}, None, {})
    for content, words in (
        ({}, "it has no 'ranks'"),
        ({"ranks": [{"rank": 0}]}, "it has no 'peak_bytes'"),
        ({"ranks": [3]}, "'int' object has no attribute"),
    ):
        (tmp_path / "summary.json").write_text(json.dumps(content))
        with pytest.raises(UnreadableError, match=f"is not what a run writes: {words}"):
            record._ranks(tmp_path / "summary.json")
