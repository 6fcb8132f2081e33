"""What the directory of a run has on disk, read for a report.

The directory may come from somebody else, and a run may still write in it: what is not there or is
not what a run writes is a line in `RunRecord.missing`, and the rest is shown.
"""

from __future__ import annotations

import base64
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vp_train.config import ConfigError, printable
from vp_train.config.figures import BITS, LOSS, PROGRESS, set_of, validation_key
from vp_train.durable import (
    UnreadableError,
    checkpoints_in,
    meant_run,
    open_regular,
    plain,
    read_bytes,
    read_json,
    shown,
)
from vp_train.explain.causes import Explanation, explain
from vp_train.explain.trace import read_traced
from vp_train.report.curves import Curves, finite
from vp_train.report.traced import Timelines, read_timelines
from vp_train.settings.load import default_words
from vp_train.settings.saved import saved_words

_LARGEST_LINES = 1 << 33  # bytes of metrics.jsonl
_LONGEST_LINE = 1 << 20  # bytes
_LARGEST_PICTURE = 1 << 22  # bytes of schedule.svg
_LARGEST_VALUE = 1e30  # of a metric; larger ones have no place in a picture
_MOST_STEPS = 1 << 53
_MOST_EVENTS = 100  # steps of one kind that are named
_MOST_LOGS = 32
_LONGEST_TAIL = 2_000  # bytes of a log
_MOST_NOTICES = 60
_MOST_SETS = 16  # validation sets
_MOST_RANKS = 4_096
_MOST_EXPLAINED = 5_000  # passes of a step that are explained; more would take seconds

_T = TypeVar("_T")
# The keys of metrics.jsonl that a report shows.
_KEYS = {*PROGRESS, *(validation_key("", figure) for figure in (LOSS, BITS))} - {"left"}
_COUNTERS = {"spikes": "spike", "skipped_steps": "skipped step"}


@dataclass(slots=True)
class Events:
    """The steps at which something happened: how many, and the numbers of the first ones."""

    count: int = 0
    steps: list[int] = field(default_factory=list)

    def add(self, step: int, count: int = 1) -> None:
        """Note that it happened `count` times at a step."""
        self.count += count
        if len(self.steps) < _MOST_EVENTS:
            self.steps.append(step)


@dataclass(frozen=True, slots=True)
class Metrics:
    """The records of all steps: their curves, and the steps at which something went wrong."""

    curves: Curves
    events: Mapping[str, Events]


@dataclass(frozen=True, slots=True)
class RankRow:
    """One pipeline rank at the end of a run; what was not traced is None.

    Bytes are peaks.  `planned_bytes` and `measured_bytes` are those of activations.
    """

    rank: int
    peak_bytes: float
    layers: str | None = None
    vocabulary_rows: int | None = None
    num_parameters: int | None = None
    planned_bubble: float | None = None
    measured_bubble: float | None = None
    planned_bytes: float | None = None
    measured_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """The end of a file in logs/."""

    name: str
    tail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """All that a report shows of one run.

    settings: by name, as they are written on a command line.
    differing: the names of those that differ from the defaults.
    explanation: why the traced step took as long as it did; None also for very large steps.
    picture: the planned schedule as a data URI, for a run without a traced step.
    notices: what the run said beside its progress, newest last.
    missing: what could not be read, one line each.
    """

    path: Path
    settings: Mapping[str, str]
    defaults: Mapping[str, str]
    metrics: Metrics
    ranks: tuple[RankRow, ...]
    traced: Timelines | None
    explanation: Explanation | None
    picture: str | None
    environment: Mapping[str, Any]
    notices: tuple[str, ...]
    num_notices: int
    logs: tuple[Log, ...]
    checkpoints: tuple[int, ...]
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the run: that of its directory."""
        return printable(self.path.name)

    @property
    def differing(self) -> list[str]:
        """The names of the settings that differ from the defaults, without those of the place."""
        return [
            name
            for name, value in self.settings.items()
            if value != self.defaults.get(name) and name not in ("run.name", "run.root")
        ]

    @property
    def planned_steps(self) -> int | None:
        """The steps that the run was to do."""
        return self._count("run.steps")

    @property
    def eval_sequences(self) -> int | None:
        """The sequences of a validation, see `RunConfig.eval_sequences`."""
        given, count = self._count("run.eval_sequences"), self._count("run.eval_microbatches")
        if given is not None or count is None:
            return given
        return max(1, count) * (self._count("micro_batch_size") or 1)

    def _count(self, name: str) -> int | None:
        """Return a setting that is a number, None if it is not."""
        words = self.settings.get(name, "")
        return int(words) if words.isdecimal() and len(words) < 16 else None


def read_run(path: Path) -> RunRecord:
    """Return what the directory of a run has.  Raises ConfigError if it is none."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory{meant_run(path)}; give that of a run")
    if not any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(
            f"{path} has neither config.yaml nor metrics.jsonl; give the directory of a run"
        )
    missing: list[str] = []

    def reading(what: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return what()
        except (UnreadableError, ConfigError, OSError) as error:
            missing.append(printable(str(error))[:400])
            return otherwise

    nothing: dict[str, str] = {}
    settings = reading(lambda: saved_words(path / "config.yaml"), nothing)
    metrics = reading(lambda: _metrics(path / "metrics.jsonl"), Metrics(Curves(), {}))
    traced = reading(lambda: read_timelines(path / "trace" / "step_times.json"), None)
    explanation = None
    if traced is not None and traced.num_passes <= _MOST_EXPLAINED:
        explanation = reading(lambda: _explained(path), None)
    notices: tuple[tuple[str, ...], int] = ((), 0)
    if os.path.lexists(path / "notices.txt"):
        notices = reading(lambda: _notices(path / "notices.txt"), notices)
    return RunRecord(
        path=path,
        settings=settings,
        defaults=default_words(),
        metrics=metrics,
        ranks=reading(lambda: _ranks(path / "summary.json"), ()),
        traced=traced,
        explanation=explanation,
        picture=reading(lambda: _picture(path / "schedule.svg"), None) if traced is None else None,
        environment=reading(lambda: _environment(path / "env.json"), {}),
        notices=notices[0],
        num_notices=notices[1],
        logs=reading(lambda: _logs(path / "logs"), ()),
        checkpoints=reading(lambda: _steps(path / "checkpoints"), ()),
        missing=tuple(missing),
    )


def _explained(run: Path) -> Explanation:
    """Return why the traced step took as long as it did.  Raises ConfigError."""
    try:
        return explain(read_traced(run))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"the traced step does not fit its plan: {error}") from None


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file that may be large.  Raises UnreadableError."""
    with open_regular(path, follow=False) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_LINES:
            raise UnreadableError(f"{path} has over {_LARGEST_LINES:,} bytes")
        try:
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise UnreadableError(f"{path} has a line of over {_LONGEST_LINE:,} bytes")
                yield line
        except OSError as error:
            raise UnreadableError(f"{path}: {error.strerror or error}") from None


def _metrics(path: Path) -> Metrics:
    """Return the records in metrics.jsonl.

    Lines that are not records are left out, such as the last one that a kill has cut off.
    """
    curves = Curves()
    events = {"non-finite value": Events(), **{name: Events() for name in _COUNTERS.values()}}
    before = dict.fromkeys(_COUNTERS, 0.0)
    sets: set[str] = set()
    for line in _lines(path):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < _MOST_STEPS:
            continue
        kept = {
            key: value for key, value in record.items() if key in _KEYS or _is_of_set(key, sets)
        }
        curves.add(step, finite(kept, _LARGEST_VALUE))
        if any(value is None or value != value for value in kept.values()):
            events["non-finite value"].add(step)
        counted = finite({key: record.get(key) for key in _COUNTERS}, 1e15)
        for key, count in counted.items():
            if count > before[key]:
                events[_COUNTERS[key]].add(step, int(count - before[key]))
            before[key] = count
    return Metrics(curves, {name: found for name, found in events.items() if found.count})


def _is_of_set(key: str, sets: set[str]) -> bool:
    """Return whether a key is that of a validation set; at most a few of them are shown."""
    if set_of(key, LOSS) is None and set_of(key, BITS) is None:
        return False
    if len(sets) < 2 * _MOST_SETS:
        sets.add(key)
    return key in sets


def _notices(path: Path) -> tuple[tuple[str, ...], int]:
    """Return the newest lines of notices.txt, and how many there are."""
    newest: deque[str] = deque(maxlen=_MOST_NOTICES)
    count = 0
    for line in _lines(path):
        newest.append(printable(line.decode(errors="replace").rstrip())[:500])
        count += 1
    return tuple(newest), count


def _ranks(path: Path) -> tuple[RankRow, ...]:
    """Return the rows of summary.json, which a run writes at its end."""
    record = read_json(path, follow=False)
    try:
        rows = record["ranks"][:_MOST_RANKS]
        return tuple(_rank(row) for row in rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        words = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UnreadableError(f"{path} is not what a run writes: {words[:200]}") from None


def _rank(row: Mapping[str, Any]) -> RankRow:
    numbers = finite(row, 1e18)
    layers = row.get("layers")

    def whole(key: str) -> int | None:
        return int(numbers[key]) if key in numbers else None

    return RankRow(
        rank=int(numbers["rank"]),
        peak_bytes=numbers["peak_bytes"],
        layers=plain(layers) if isinstance(layers, str) else None,
        vocabulary_rows=whole("vocabulary_rows"),
        num_parameters=whole("num_parameters"),
        planned_bubble=numbers.get("predicted_bubble"),
        measured_bubble=numbers.get("measured_bubble"),
        planned_bytes=numbers.get("predicted_bytes"),
        measured_bytes=numbers.get("measured_bytes"),
    )


def _picture(path: Path) -> str:
    """Return a picture as a data URI: a browser runs nothing in it, and loads nothing for it."""
    content = read_bytes(path, _LARGEST_PICTURE, follow=False)
    return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"


def _environment(path: Path) -> dict[str, Any]:
    """Return env.json, with texts and numbers only."""
    record = read_json(path, follow=False)
    if not isinstance(record, dict):
        raise UnreadableError(f"{path} is not what a run writes: {shown(record)}")
    found: dict[str, Any] = {
        key: plain(str(record[key]))
        for key in ("python", "host", "cpus", "commit")
        if isinstance(record.get(key), str | int)
    }
    if isinstance(packages := record.get("packages"), dict):
        found["packages"] = {
            plain(name): plain(version)
            for name, version in list(packages.items())[:_MOST_EVENTS]
            if isinstance(version, str)
        }
    command = record.get("command")
    if isinstance(command, list) and all(isinstance(word, str) for word in command):
        found["command"] = [printable(word) for word in command[:1_000]]
    warnings = record.get("warnings")
    if isinstance(warnings, list):
        texts = [printable(words)[:1_000] for words in warnings if isinstance(words, str)]
        found["warnings"] = texts[:_MOST_EVENTS]
    return found


def _steps(path: Path) -> tuple[int, ...]:
    """Return the steps of the checkpoints in a directory."""
    return tuple(step for step, _ in checkpoints_in(path))


def _logs(path: Path) -> tuple[Log, ...]:
    """Return the ends of the logs of ranks that failed."""
    if path.is_symlink():
        raise UnreadableError(f"{path} is a symbolic link")
    found = []
    for place in sorted(path.glob("*.log"))[:_MOST_LOGS]:
        with open_regular(place, follow=False) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LONGEST_TAIL))
            text = file.read(_LONGEST_TAIL).decode(errors="replace")
        lines = [printable(line) for line in text.splitlines()]
        if lines:
            found.append(Log(printable(place.name), "\n".join(lines[-30:])))
    return tuple(found)
