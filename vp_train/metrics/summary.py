"""The table at the end of a run: the prediction and the measurement of every rank."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from schedules.render import duration
from schedules.timeline import Timeline
from vp_train.planning.degrees import Degrees
from vp_train.units import human_bytes, plural

SUMMARY = "vp_train summary 1"  # the schema of summary.json
_MUCH = 1.1  # a step is explained if it differs from its plan by this factor


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSummary:
    """One rank: what it owns, and its predicted and measured figures of the traced step.

    Bubbles and `busy` are fractions from 0 to 1.  `predicted_bytes` and `measured_bytes` are peaks
    of activations, `peak_bytes` is the peak of all memory.
    """

    rank: int
    layers: str
    vocabulary_rows: int
    num_parameters: int
    busy: float
    predicted_bubble: float
    measured_bubble: float
    predicted_bytes: float
    measured_bytes: float
    peak_bytes: float


def summarize(
    predicted: Timeline,
    measured: Timeline,
    *,
    layers: Sequence[Sequence[range]],
    rows: Sequence[int],
    parameters: Sequence[int],
    peaks: Sequence[float],
) -> list[RankSummary]:
    """Return one row per rank.

    By rank: `layers` of its stages, vocabulary `rows`, number of `parameters`, and `peaks` of
    memory in bytes.
    """
    return [
        RankSummary(
            rank=rank,
            layers=_spans(layers[rank]),
            vocabulary_rows=rows[rank],
            num_parameters=parameters[rank],
            busy=1 - measured.bubble(rank),
            predicted_bubble=predicted.bubble(rank),
            measured_bubble=measured.bubble(rank),
            predicted_bytes=predicted.peak_bytes[rank],
            measured_bytes=measured.peak_bytes[rank],
            peak_bytes=peaks[rank],
        )
        for rank in range(measured.num_ranks)
    ]


def _spans(stages: Sequence[range]) -> str:
    """Return the layers of a rank in words: `0-3` or, with several stages, `0-1,6-7`."""
    return ",".join(_span(layers) for layers in stages if layers) or "none"


def _span(layers: range) -> str:
    return f"{layers.start}" if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"


def _human_count(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def rank_table(rows: Sequence[RankSummary], title: str, degrees: Degrees) -> Table:
    """Return a table of about 80 columns, at most 110: a terminal cuts wider ones.

    A row has the ranks of a pipeline rank, and is about the first replica.
    """
    table = Table(
        title=title,
        title_justify="left",
        header_style="",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for name in (
        plural(degrees.tp, "rank"),
        "layers",
        "V rows",
        "params",
        "busy",
        "bubble\nplanned",
        "bubble\nmeasured",
        "peak act.\nplanned",
        "peak act.\nmeasured",
        "peak\nmemory",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            degrees.ranks_of(row.rank),
            row.layers,
            f"{row.vocabulary_rows:,}",
            _human_count(row.num_parameters),
            f"{row.busy:.1%}",
            f"{row.predicted_bubble:.1%}",
            f"{row.measured_bubble:.1%}",
            human_bytes(row.predicted_bytes),
            human_bytes(row.measured_bytes),
            human_bytes(row.peak_bytes),
        )
    return table


def explain_words(planned: Timeline, measured: Timeline, directory: Path) -> str | None:
    """Return which command says why the traced step took another time than planned.

    It is None if the two differ by less than a tenth.
    """
    ratio = measured.makespan / planned.makespan if planned.makespan > 0 else 1.0
    if 1 / _MUCH < ratio < _MUCH:
        return None
    return f"vp-explain {shlex.quote(str(directory))} says where the difference comes from"


def step_words(planned: Timeline, measured: Timeline, device: str) -> str:
    """Return in words the planned and the measured time of the traced step.

    On a CPU they also say what to expect: how much longer the passes took than assumed, too.
    """
    words = f"the step: planned {duration(planned.makespan)}, took {duration(measured.makespan)}"
    if device != "cpu":
        return words
    ratio = _passes(measured) / _passes(planned) if _passes(planned) > 0 else 1.0
    passes = (
        "" if 1 / _MUCH < ratio < _MUCH else f"passes took {ratio:.2g} times what was planned; "
    )
    return (
        f"{words} ({passes}a plan gives every rank a processor of its own; "
        "vp-profile measures this one)"
    )


def _passes(timeline: Timeline) -> float:
    """Return the seconds of all passes of a step."""
    return sum(map(timeline.busy, range(timeline.num_ranks)))
