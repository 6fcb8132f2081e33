"""The traced step of a run for its pictures, from trace/step_times.json.

The file may come from somebody else.  What is drawn of it are numbers, and names of passes and
messages that are checked letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schedules.ir import Pass
from schedules.timeline import Span, Timeline
from vp_train.durable import UnreadableError, read_json, shown
from vp_train.explain.trace import LARGEST, intervals, intervals_of_rank

_MOST_RANKS = 4_096
_LARGEST_SECONDS = 1e6
_LARGEST_BYTES = 1e18
_NAME = re.compile(r"[A-Za-z0-9_.:@>-]{1,60}")


@dataclass(frozen=True, slots=True)
class Timelines:
    """The timelines of the first replica in a step, as it was planned and as it was measured."""

    step: int
    schedule: str
    vocabulary: str
    planned: Timeline
    measured: Timeline

    @property
    def num_passes(self) -> int:
        """The number of measured passes."""
        return sum(map(len, self.measured.compute))


def read_timelines(path: Path) -> Timelines:
    """Return the timelines in a file.  Raises UnreadableError in one line."""
    record = read_json(path, LARGEST, follow=False)
    try:
        return Timelines(
            int(_number(record["step"], 1 << 53)),
            _name(record["schedule"]),
            _name(record["vocabulary"]),
            _timeline(record["planned"]),
            _timeline(record["measured"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        words = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UnreadableError(f"{path} is not what a run writes: {words[:200]}") from None


def _timeline(record: Mapping[str, Any]) -> Timeline:
    rows, messages = record["passes"], record["communications"]
    if not 0 < len(rows) <= _MOST_RANKS:
        raise ValueError(f"it has passes of {len(rows):,} ranks")
    compute = tuple(tuple(_passes(rank, row)) for rank, row in enumerate(rows))
    ranks = [int(_number(rank, len(rows) - 1)) for rank in messages["ranks"]]
    found = intervals(messages)
    if len(ranks) != len(found):
        raise ValueError(f"{len(found)} communications have {len(ranks)} ranks")
    comm = tuple(
        Span(rank, _name(name), name.partition(".")[0], -1, -1, start, end)
        for rank, (name, start, end) in zip(ranks, found, strict=True)
    )
    peaks = tuple(_number(count, _LARGEST_BYTES) for count in record["peak_bytes"])
    if len(peaks) != len(rows):
        raise ValueError(f"{len(rows)} ranks have {len(peaks)} peaks of memory")
    bound = _number(record["bound_seconds"], _LARGEST_SECONDS)
    timeline = Timeline(compute, comm, peaks, (0,) * len(rows), bound)
    if timeline.makespan <= 0:
        raise ValueError("no pass takes any time")
    return timeline


def _passes(rank: int, row: Mapping[str, Any]) -> list[Span]:
    found = []
    for name, start, end in intervals_of_rank(row):
        item = Pass.parse(_name(name))
        found.append(
            Span(rank, str(item), item.kind.value, item.stage, item.microbatch, start, end)
        )
    return found


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a name")
    return value


def _number(value: Any, largest: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
        raise ValueError(f"{shown(value)} is not a number from 0 to {largest:g}")
    return float(value)
