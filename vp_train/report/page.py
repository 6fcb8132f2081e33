"""The pages of reports: one run, or several runs side by side, as one file of HTML each.

A page loads nothing and has no scripts; its own policy forbids both.  Names, settings and texts of
a run may be those of somebody else, so the templates escape them; only pictures that this package
draws are put in as they are.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from schedules.render import duration, facts, svg
from schedules.timeline import Timeline
from vp_train.config.figures import BITS, LOSS, name_of, set_of
from vp_train.config.typed import shell_word
from vp_train.durable import advising, replace, write_output
from vp_train.report import draw
from vp_train.report.curves import Curves, Point
from vp_train.report.record import Events, RunRecord, read_run
from vp_train.units import clock, count_words, human_bytes, loss_words

NAME = "report.html"  # in the directory of a run
COMPARISON = "comparison.html"  # of several runs
_GIB = 2.0**30
_NONE = "-"  # in the place of a value that is not known
_SEEN = 5e-4  # of the step: causes that add less are not shown
_ELSEWHERE = "vp-report --out FILE writes the report elsewhere"
_NAMED_STEPS = 12  # of one kind of event

# The parts of a step, from below, with their colours in the stack.
_PARTS = {
    "seconds/forward_backward": 0,
    "seconds/vocabulary": 4,
    "seconds/waiting_mean": 7,
    "seconds/gradient_sum": 2,
    "seconds/optimizer": 1,
    "seconds/data": 3,
    "seconds/checkpoint": 6,
    "seconds/validation": 5,
    "seconds/rest": 8,
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of picture: its title and unit, and its curves with their names.

    Values are multiplied by `scale`.
    """

    title: str
    unit: str
    curves: Mapping[str, str]
    scale: float = 1.0
    from_zero: bool = False


_KINDS = (
    _Kind("Loss", "nats per token", {"loss": "training", "validation_loss": "validation"}),
    _Kind("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    _Kind("Learning rate", "", {"learning_rate": "rate"}, from_zero=True),
    _Kind("Tokens per second", "all replicas", {"interval_tokens_per_second": "tokens/s"}, 1, True),
    _Kind("MFU", "% of the peak of all ranks", {"mfu": "MFU"}, 100.0, True),
    _Kind(
        "Waiting",
        "% of the time of passes and waiting",
        {"bubble_worst": "worst rank", "bubble_mean": "mean"},
        100.0,
        True,
    ),
    _Kind(
        "Memory",
        "GiB",
        {
            "memory/allocated_worst": "allocated, worst rank",
            "memory/allocated_mean": "allocated, mean",
            "memory/reserved_worst": "reserved, worst rank",
        },
        1 / _GIB,
        True,
    ),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of a legend."""

    name: str
    style: draw.Style
    value: str


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture with what stands around it; `svg` is the only part that is not escaped."""

    title: str
    unit: str
    svg: str
    words: str
    legend: tuple[_Entry, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Bar:
    """A row of a table with a bar; `share` is from 0 to 1."""

    name: str
    value: str
    share: float
    style: draw.Style

    @property
    def percent(self) -> str:
        return f"{100 * self.share:.1f}%"


def is_possible() -> bool:
    """Return whether the packages that a report needs are installed."""
    return draw.missing_package() is None


def write_report(run: Path, target: Path | None = None) -> Path:
    """Write the report of one run, by default into its directory, and return its path.

    Raises ConfigError if it is no run or a package is missing, and OSError.
    """
    draw.require_packages()
    text = _page("run.html.j2", _context(read_run(run)))
    if target is None:
        target = run / NAME
        with advising(target, _ELSEWHERE):
            replace(target, text)  # never through a link: the run may be that of somebody else
        return target
    write_output(target, text)
    return target


def write_comparison(runs: Sequence[Path], target: Path) -> Path:
    """Write the report of several runs on one page, and return its path.

    Raises ConfigError if one is no run or a package is missing, and OSError.
    """
    draw.require_packages()
    text = _page("compare.html.j2", _comparison([read_run(run) for run in runs]))
    with advising(target.absolute(), _ELSEWHERE):
        write_output(target, text)
    return target


def _page(template: str, context: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vp_train.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template(template).render(context, written=written)


def _context(run: RunRecord) -> dict[str, Any]:
    """Return what the page of one run shows."""
    curves = run.metrics.curves
    return {
        "run": run,
        "facts": _facts(run),
        "warnings": _warnings(run),
        "charts": _charts(curves),
        "stack": _stacked(curves),
        "shares": _shares(curves),
        "schedules": _schedules(run),
        "causes": _causes(run),
        "what_ifs": _what_ifs(run),
        "rank_columns": _RANK_COLUMNS,
        "rank_rows": _rank_rows(run),
        "versions": _versions(run),
        "commands": _commands(run),
    }


# Facts


def _number(value: float | None, digits: int = 4) -> str:
    """Return a number in words, a dash if there is none."""
    if value is None:
        return _NONE
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.{digits}g}"


def _loss(value: float | None) -> str:
    return _NONE if value is None else loss_words(value)


def _per_cent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1%}"


def _seconds(value: float) -> str:
    return duration(value) if value < 100 else clock(value)


def _bytes(value: float | None) -> str:
    return _NONE if value is None else human_bytes(value)


def _facts(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return name, value and a note of the most important figures that are known."""
    curves, planned = run.metrics.curves, run.planned_steps
    peak = _peak_bytes(run)
    best, first = curves.lowest("validation_loss"), curves.first
    found = [
        (
            "Steps",
            f"{curves.last:,}" + ("" if planned is None else f" of {planned:,}"),
            "" if first <= 1 else f"from step {first:,}",
        ),
        ("Loss", _loss(curves.latest("loss")), "training, last step"),
        (
            "Validation loss",
            _loss(curves.latest("validation_loss")),
            "" if best is None else f"lowest {loss_words(best[1])} at step {best[0]:,}",
        ),
        ("Tokens per second", _number(_speed(curves)), "median"),
        ("MFU", _per_cent(curves.median("mfu")), "median"),
        ("Waiting", _per_cent(curves.median("bubble_mean")), "mean rank, median"),
        ("Peak memory", _bytes(peak), "worst rank"),
        ("Time", clock(curves.total("seconds/step")), "of all steps"),
    ]
    return [fact for fact in found if fact[1] != _NONE]


def _speed(curves: Curves) -> float | None:
    """Return the median of the steps' tokens per second, as the table of a sweep does."""
    found = curves.median("tokens_per_second")
    return curves.median("interval_tokens_per_second") if found is None else found


def _peak_bytes(run: RunRecord) -> float | None:
    """Return the most memory of a rank in any recorded step, as the table of a sweep does.

    The end of a run knows only its last start.  It counts where no step is recorded.
    """
    if (highest := run.metrics.curves.highest("peak_bytes")) is not None:
        return highest[1]
    return max((row.peak_bytes for row in run.ranks), default=None)


def _warnings(run: RunRecord) -> list[str]:
    """Return what went wrong, or was doubtful from the start, in one line each."""
    found: list[str] = list(run.environment.get("warnings", ()))
    found += [_event_words(name, events) for name, events in run.metrics.events.items()]
    planned, done = run.planned_steps, run.metrics.curves.last
    if planned is not None and done < planned:
        found.append(
            f"{done:,} of {count_words(planned, 'step')} are recorded: it runs, or has ended early"
        )
    if run.logs:
        names = ", ".join(log.name for log in run.logs)
        found.append(f"processes have failed and left a log, see below: {names}")
    return found


def _event_words(name: str, events: Events) -> str:
    named = ", ".join(f"{step:,}" for step in events.steps[:_NAMED_STEPS])
    more = "" if len(events.steps) <= _NAMED_STEPS else " and later"
    return f"{count_words(events.count, name)}, at step {named}{more}"


# Curves


def _scaled(points: Sequence[Point], scale: float) -> list[Point]:
    return [(step, scale * value) for step, value in points]


def _words(name: str, curves: Curves, key: str, scale: float) -> str:
    """Return a curve in words, for those who do not see it."""
    low, high, last = curves.lowest(key), curves.highest(key), curves.latest(key)
    assert low is not None
    assert high is not None
    assert last is not None
    return (
        f"{name}: last {_number(scale * last)}, "
        f"lowest {_number(scale * low[1])} at step {low[0]:,}, "
        f"highest {_number(scale * high[1])} at step {high[0]:,}"
    )


def _last(curves: Curves, key: str, scale: float) -> str:
    value = curves.latest(key)
    return "" if value is None else _number(scale * value)


def _charts(curves: Curves) -> list[_Picture]:
    """Return the pictures of one run, those without any value left out."""
    kinds = list(_KINDS)
    losses, bits = (
        {key: name for key in curves.keys if (name := set_of(key, figure)) is not None}
        for figure in (LOSS, BITS)
    )
    kinds[1:1] = [
        _Kind("Validation losses", "nats per token", losses),
        _Kind("Bits per byte", "of validation", {"validation_bits_per_byte": "held out", **bits}),
    ]
    pictures = []
    for number, kind in enumerate(kinds):
        known = {key: name for key, name in kind.curves.items() if key in curves.keys}
        if not known:
            continue
        styles = {key: draw.Style.of(index) for index, key in enumerate(known)}
        lines = [(styles[key], _scaled(curves.points(key), kind.scale)) for key in known]
        pictures.append(
            _Picture(
                kind.title,
                kind.unit,
                draw.lines(lines, name=f"chart{number}", from_zero=kind.from_zero),
                "; ".join(_words(name, curves, key, kind.scale) for key, name in known.items()),
                tuple(
                    _Entry(name, styles[key], _last(curves, key, kind.scale))
                    for key, name in known.items()
                ),
            )
        )
    return pictures


def _stacked(curves: Curves) -> _Picture | None:
    """Return the picture of the seconds of a step by part, None if they are not known."""
    known = [key for key in _PARTS if curves.total(key) > 0]
    if not known:
        return None
    styles = {key: draw.Style(_PARTS[key]) for key in known}
    parts = [(style, curves.means(key)) for key, style in styles.items()]
    picture, is_cut = draw.stack(parts, name="stack")
    return _Picture(
        "Seconds of a step",
        "mean of the ranks",
        picture,
        "; ".join(_words(name_of(key), curves, key, 1.0) for key in known),
        tuple(_Entry(name_of(key), style, "") for key, style in styles.items()),
        "The longest steps are cut off at the top." if is_cut else "",
    )


def _shares(curves: Curves) -> list[_Bar]:
    """Return the share of every part in the time of all steps, largest first."""
    totals = [(total, key) for key in _PARTS if (total := curves.total(key)) > 0]
    whole = sum(total for total, _ in totals)
    return [
        _Bar(name_of(key), _seconds(total), total / whole, draw.Style(_PARTS[key]))
        for total, key in sorted(totals, reverse=True)
    ]


# Schedule and ranks


@dataclass(frozen=True, slots=True)
class _Schedule:
    """A picture of a schedule: an SVG element that this package drew, or a data URI."""

    title: str
    words: str
    svg: str = ""
    uri: str = ""


def _schedules(run: RunRecord) -> list[_Schedule]:
    """Return the planned and the measured step, or the planned one as the run has drawn it."""
    if (traced := run.traced) is None:
        return [_Schedule("As planned", "", uri=run.picture)] if run.picture else []
    names = f"{traced.schedule}, vocabulary {traced.vocabulary}"
    return [
        _Schedule(title, facts(timeline), _drawn(timeline, f"{names}: {title.lower()}", number))
        for number, (title, timeline) in enumerate(
            (("As planned", traced.planned), ("As measured", traced.measured))
        )
    ]


def _drawn(timeline: Timeline, title: str, number: int) -> str:
    """Return the picture of a step; identifiers in it are those of no other picture."""
    text = svg(timeline, title)
    return text.replace('id="bubble"', f'id="bubble{number}"').replace(
        "url(#bubble)", f"url(#bubble{number})"
    )


def _causes(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return the way from the planned to the measured seconds: words, what is added, the sum."""
    if (found := run.explanation) is None:
        return []
    now, rows = found.planned_seconds, [("planned", "", duration(found.planned_seconds))]
    for cause in found.causes:
        now += cause.seconds
        if abs(cause.seconds) < _SEEN * found.measured_seconds:
            continue
        sign = "-" if cause.seconds < 0 else "+"
        rows.append(
            (cause.words, f"{sign} {duration(abs(cause.seconds))}", duration(max(0.0, now)))
        )
    return rows


def _what_ifs(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return what would make the step shorter: words, its seconds, and the change."""
    if (found := run.explanation) is None:
        return []
    measured = found.measured_seconds
    return [
        (what_if.words, duration(what_if.seconds), f"{what_if.seconds / measured - 1:+.0%}")
        for what_if in found.shown_what_ifs
    ]


_RANK_COLUMNS = (
    *("Rank", "Layers", "Vocabulary rows", "Parameters", "Bubble planned", "Bubble measured"),
    *("Activations planned", "Activations measured", "Peak memory"),
)


def _rank_rows(run: RunRecord) -> list[tuple[list[str], float]]:
    """Return the cells of every pipeline rank, and its peak memory over that of the worst."""
    rows, most = run.ranks, max((row.peak_bytes for row in run.ranks), default=0.0)
    return [
        (
            [
                f"{row.rank}",
                row.layers or _NONE,
                _NONE if row.vocabulary_rows is None else f"{row.vocabulary_rows:,}",
                _NONE if row.num_parameters is None else f"{row.num_parameters / 1e6:,.2f} M",
                _per_cent(row.planned_bubble),
                _per_cent(row.measured_bubble),
                _bytes(row.planned_bytes),
                _bytes(row.measured_bytes),
                _bytes(row.peak_bytes),
            ],
            row.peak_bytes / most if most > 0 else 0.0,
        )
        for row in rows
    ]


# Versions and commands


def _versions(run: RunRecord) -> list[tuple[str, str]]:
    environment = run.environment
    found = [
        (name, environment[key])
        for key, name in (
            ("host", "host"),
            ("cpus", "processors"),
            ("commit", "commit of vp_train"),
            ("python", "Python"),
        )
        if key in environment
    ]
    found += environment.get("packages", {}).items()
    if "command" in environment:
        found.append(("started as", shlex.join(environment["command"])))
    return found


def _commands(run: RunRecord) -> list[tuple[str, str]]:
    """Return how to go on with a run: what a command does, and the command."""
    place, done, planned = run.path, run.metrics.curves.last, run.planned_steps
    where = [shell_word("run.name", place.name), shell_word("run.root", str(place.parent))]
    words = ["vp-train", *where, "run.resume=true"]
    path = shlex.quote(str(place))
    found = []
    if run.checkpoints:
        newest = f"from the checkpoint of step {run.checkpoints[-1]:,}"
        if planned is not None and done >= planned:
            found.append(
                (f"Train longer, {newest}", " ".join([*words, f"run.steps={2 * planned}"]))
            )
        else:
            found.append((f"Resume {newest}", " ".join(words)))
        found.append(("Score a text", f"vp-score {path} FILE"))
        found.append(("Let it write", f"vp-generate {path} --prompt TEXT"))
        found.append(("Export to Hugging Face", f"vp-export {path} DIRECTORY"))
    if run.traced is not None:
        found.append(("See why the step took as long as it did", f"vp-explain {path}"))
    found.append(("Write this page again", f"vp-report {path}"))
    return found


# Several runs


def _comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what the page of several runs shows."""
    names = _names(runs)
    styles = [draw.Style.of(index) for index in range(len(runs))]
    return {
        "names": names,
        "styles": styles,
        "paths": [str(run.path) for run in runs],
        "figures": _figures(runs),
        "settings": _differences([run.settings for run in runs]),
        "charts": _common_charts(runs, names, styles),
        "warnings": [(name, _warnings(run), run) for name, run in zip(names, runs, strict=True)],
        "versions": _differences([dict(_versions(run)) for run in runs]),
    }


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Return a name for every run: that of its directory, its path where two have the same."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]


def _differences(values: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the names that do not have the same value everywhere, with all values."""
    every = dict.fromkeys(name for found in values for name in found)
    rows = [(name, [found.get(name, _NONE) for found in values]) for name in every]
    hidden = ("run.name", "run.root", "run.resume")
    return [row for row in rows if len(set(row[1])) > 1 and row[0] not in hidden]


def _figures(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table of speed and memory."""
    curves = [run.metrics.curves for run in runs]
    steps = [max(1, found.num_steps) for found in curves]
    rows = [
        ("steps", [f"{found.last:,}" for found in curves]),
        ("loss, last", [_loss(found.latest("loss")) for found in curves]),
        ("validation loss, last", [_loss(found.latest("validation_loss")) for found in curves]),
        ("validation loss, lowest", [_lowest(found, "validation_loss") for found in curves]),
        ("validation, sequences", _validation_sizes(runs)),
        ("tokens per second, median", [_number(_speed(found)) for found in curves]),
        ("MFU, median", [_per_cent(found.median("mfu")) for found in curves]),
        (
            "waiting, mean rank, median",
            [_per_cent(found.median("bubble_mean")) for found in curves],
        ),
        ("peak memory, worst rank", [_bytes(_peak_bytes(run)) for run in runs]),
        ("activations, worst rank, planned", [_activations(run, planned=True) for run in runs]),
        ("activations, worst rank, measured", [_activations(run, planned=False) for run in runs]),
        ("time of all steps", [clock(found.total("seconds/step")) for found in curves]),
    ]
    for key, name in (("seconds/step", "whole"), *((key, name_of(key)) for key in _PARTS)):
        means = [found.total(key) / count for found, count in zip(curves, steps, strict=True)]
        if any(mean > 0 for mean in means):
            words = [duration(mean) if mean > 0 else _NONE for mean in means]
            rows.append((f"step, mean: {name}", words))
    return [row for row in rows if set(row[1]) != {_NONE}]


def _validation_sizes(runs: Sequence[RunRecord]) -> list[str]:
    """Return the sequences of each run's validation where they differ: losses of others say little.

    They are run.eval_sequences, or else run.eval_microbatches x micro_batch_size.
    """
    sizes = [run.eval_sequences for run in runs]
    return [_NONE if len(set(sizes)) == 1 or size is None else f"{size:,}" for size in sizes]


def _lowest(curves: Curves, key: str) -> str:
    found = curves.lowest(key)
    return _NONE if found is None else f"{loss_words(found[1])} at step {found[0]:,}"


def _activations(run: RunRecord, *, planned: bool) -> str:
    if run.traced is None:
        return _NONE
    return _bytes(max((run.traced.planned if planned else run.traced.measured).peak_bytes))


def _common_charts(
    runs: Sequence[RunRecord], names: Sequence[str], styles: Sequence[draw.Style]
) -> list[_Picture]:
    """Return the pictures of several runs: one for every key, with one curve of each run."""
    curves = [run.metrics.curves for run in runs]
    kinds = [
        ("loss", "Training loss", _KINDS[0]),
        ("validation_loss", "Validation loss", _KINDS[0]),
        *(
            (key, f"Validation loss: {name}", _KINDS[0])
            for key in dict.fromkeys(key for found in curves for key in found.keys)
            if (name := set_of(key, LOSS)) is not None
        ),
        *((next(iter(kind.curves)), kind.title, kind) for kind in _KINDS[1:]),
    ]
    pictures = []
    for number, (key, title, kind) in enumerate(kinds):
        known = [index for index, found in enumerate(curves) if key in found.keys]
        if not known:
            continue
        lines = [(styles[index], _scaled(curves[index].points(key), kind.scale)) for index in known]
        first = next(iter(kind.curves.values())) if len(kind.curves) > 1 else ""
        unit = ", ".join(filter(None, (kind.unit, first if kind is not _KINDS[0] else "")))
        pictures.append(
            _Picture(
                title,
                unit,
                draw.lines(lines, name=f"chart{number}", from_zero=kind.from_zero),
                "; ".join(_words(names[index], curves[index], key, kind.scale) for index in known),
                tuple(
                    _Entry(names[index], styles[index], _last(curves[index], key, kind.scale))
                    for index in known
                ),
            )
        )
    return pictures
