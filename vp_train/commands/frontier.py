"""What `vp-simulate --frontier` shows: the best bubble under every cap on memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from schedules.generators.frontier import FrontierPoint, caps_of, frontier
from schedules.render import duration
from vp_train.commands.plot import Frontier, Marker, frontier_figure, frontier_pictures
from vp_train.commands.searching import Searching
from vp_train.config import RunConfig
from vp_train.planning.degrees import wanted_ranks
from vp_train.planning.plan import searched_drafts
from vp_train.units import human_bytes

MOST_CAPS = 20  # under which a frontier is searched for, per algorithm


@dataclass(frozen=True, slots=True)
class Curve:
    """The frontier of one vocabulary algorithm."""

    vocab: str
    points: tuple[FrontierPoint, ...]


@dataclass(frozen=True, slots=True)
class Reached:
    """What a schedule takes: one point of a picture.

    `kept` is the memory of the fullest rank or the cap on it, `bubble` the mean bubble as a
    fraction, and `makespan` the time of the step, in any units that the points of a picture share.
    """

    schedule: str
    kept: float
    bubble: float
    makespan: float

    @classmethod
    def of(cls, point: FrontierPoint) -> Reached:
        """Return what a point of a search takes, in bytes and seconds."""
        timeline = point.timeline
        name = point.solution.schedule.name
        return cls(name, point.cap, timeline.mean_bubble, timeline.makespan)

    @property
    def work(self) -> float:
        """The time in which a rank computes, in the mean over the ranks."""
        return (1 - self.bubble) * self.makespan


# The named schedules of every algorithm, with what each keeps as its cap.
Named = Mapping[str, Sequence[FrontierPoint]]


def curves(
    config: RunConfig, algorithms: Sequence[str], named: Named, searching: Searching
) -> list[Curve]:
    """Search the frontier of every algorithm, and print a line for each point as it is found.

    No schedule in `named` lies below the frontier of its algorithm. Raises ConfigError if the
    settings allow no schedule.
    """
    width = max(map(len, ("vocab", *algorithms)))
    figures = f"{'cap':>10} {'keeps':>10} {'bubble':>7} {'gap':>7} {'makespan':>9}"
    print(f"{'vocab':<{width}} {figures}  from", flush=True)
    found = []
    for algorithm in algorithms:
        chosen = replace(config, vocab=replace(config.vocab, algorithm=algorithm))
        drafts = searched_drafts(chosen, wanted_ranks(config.parallel), (algorithm,))
        options = [option for option, _ in drafts]
        points = []
        caps = caps_of(options, MOST_CAPS)
        for point in frontier(options, caps, searching.watch, named.get(algorithm, ())):
            print(f"{algorithm:<{width}} {_line(point)}", flush=True)
            points.append(point)
        if points:
            found.append(Curve(algorithm, tuple(points)))
        if searching.is_stopped:
            break
    return found


def _line(point: FrontierPoint) -> str:
    timeline = point.timeline
    return (
        f"{human_bytes(point.cap):>10} {human_bytes(max(timeline.peak_bytes)):>10} "
        f"{timeline.mean_bubble:>7.1%} {timeline.gap or 0.0:>7.1%} "
        f"{duration(timeline.makespan):>9}  {point.solution.schedule.name}"
    )


def write(
    directory: Path, found: Sequence[Curve], named: Named, heading: str, unit: float
) -> list[str]:
    """Write table, schedules and pictures to `directory`, and return the names of the files.

    `named` are the named schedules to compare with, and a microbatch of a rank has `unit` bytes.
    """
    files = {curve.vocab: schedule_files(curve, unit) for curve in found}
    schedules: dict[str, None] = {}
    for curve in found:
        for point, name in zip(curve.points, files[curve.vocab], strict=True):
            if name not in schedules:
                (directory / name).write_text(point.solution.schedule.text())
            schedules[name] = None
    table = {
        "microbatch_bytes": unit,
        "frontiers": {
            curve.vocab: [*map(record, curve.points, files[curve.vocab])] for curve in found
        },
        "named": [
            {
                "schedule": point.solution.schedule.name,
                "vocab": vocab,
                "mean_bubble": point.timeline.mean_bubble,
                "peak_bytes": point.cap,
            }
            for vocab, points in named.items()
            for point in points
        ],
    }
    (directory / "frontier.json").write_text(json.dumps(table, indent=1) + "\n")
    lines, marks = drawn(
        {curve.vocab: [*map(Reached.of, curve.points)] for curve in found},
        {vocab: [*map(Reached.of, points)] for vocab, points in named.items()},
    )
    figure = frontier_figure(lines, marks, heading)
    return ["frontier.json", *frontier_pictures(figure, directory), *schedules]


def schedule_files(curve: Curve, unit: float) -> list[str]:
    """Return the name of the file with the schedule of every point of a curve.

    It has the cap in microbatches of `unit` bytes, with four digits or as many as tell it from
    other caps. Points that follow each other with one schedule share the file of the first.
    """
    files: list[str] = []
    last = None
    for point in curve.points:
        if point.solution is last:
            files.append(files[-1])
            continue
        names = (f"{curve.vocab}_{point.cap / unit:.{digits}g}.txt" for digits in range(4, 18))
        files.append(next(name for name in names if name not in files))
        last = point.solution
    return files


def files_words(unit: float) -> str:
    """Return in a line how the files of schedules are named; a microbatch has `unit` bytes."""
    return (
        f"schedules are VOCAB_CAP.txt, with the cap in microbatches of {human_bytes(unit)}; rows "
        "with one schedule share the file of the first; frontier.json has the file of every row"
    )


def drawn(
    found: Mapping[str, Sequence[Reached]], named: Mapping[str, Sequence[Reached]]
) -> tuple[list[Frontier], list[Marker]]:
    """Return the lines and the marks of a picture, given the points of every algorithm.

    What a schedule computes beyond the leanest one of its algorithm, as with more or with split
    passes, counts as bubble.  So the faster one of two is always the lower one.
    """
    least = {
        vocab: min(point.work for point in (*found.get(vocab, ()), *named.get(vocab, ())))
        for vocab in {**found, **named}
        if found.get(vocab) or named.get(vocab)
    }
    lines = [
        Frontier(vocab, [(point.kept, _bubble(point, least[vocab])) for point in points])
        for vocab, points in found.items()
    ]
    marks = [
        Marker(point.schedule, vocab, _bubble(point, least[vocab]), point.kept)
        for vocab, points in named.items()
        for point in points
    ]
    return lines, marks


def _bubble(point: Reached, least: float) -> float:
    """Return the part of the time of all ranks beyond `least` of work each; 0 for no time."""
    return 1 - least / point.makespan if point.makespan > 0 else 0.0


def record(point: FrontierPoint, file: str) -> Mapping[str, Any]:
    """Return a point for frontier.json: seconds, bytes, fractions, and its schedule's `file`."""
    timeline = point.timeline
    return {
        "cap_bytes": point.cap,
        "peak_bytes": max(timeline.peak_bytes),
        "mean_bubble": timeline.mean_bubble,
        "gap": timeline.gap,
        "makespan_seconds": timeline.makespan,
        "found_as": point.solution.schedule.name,
        "file": file,
    }
