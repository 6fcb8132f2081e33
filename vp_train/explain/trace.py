"""The traced step of a run, read from RUN/trace/step_times.json and checked.

The file may come from somebody else: whatever is wrong with it is said in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from schedules.check import check_schedule
from schedules.cost import CostModel
from schedules.generators.stored import recognise
from schedules.ir import Kind, Offload, Pass, Schedule
from schedules.lower import HOST_TRANSFERS
from schedules.problem import Problem
from schedules.replay import RUNTIMES, Runtime
from schedules.timeline import Span, Timeline
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.config import ConfigError, printable
from vp_train.config.run import SETTLED_STEP
from vp_train.durable import UnreadableError, meant_run, read_json, shown

SCHEMA = "vp_train step_times 1"
LARGEST = 1 << 27  # bytes; the largest step that can be planned takes about 100 MB
_MOST_RANKS = 1 << 16
_MOST_PASSES = 1 << 22
_LARGEST_SECONDS = 1e6
_LARGEST_BYTES = 1e18
_SOURCES = ("measured", "flops", "assumed")


@dataclass(frozen=True, slots=True)
class RankPlace:
    """A rank of the run and where it is."""

    rank: int
    replica: int
    pipeline_rank: int
    tensor_rank: int
    host: str

    @property
    def is_first(self) -> bool:
        """Return whether it is the first tensor-parallel rank, in the first replica."""
        return self.replica == self.tensor_rank == 0


@dataclass(frozen=True, slots=True)
class TracedRank(RankPlace):
    """What one rank of the run did: by kind, the seconds of its passes together."""

    passes: Mapping[Kind, float]


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A step as it was planned and as it was measured.

    schedule, measured, planned_seconds: of the first replica.
    cost: what the plan assumed; `sources` says by kind where its pass times come from, and
    `measured_on` on which device they were measured, "" if on none.
    slowness: the factors of the pipeline ranks that are in `cost`.
    rows: vocabulary rows by pipeline rank; empty if they are not known.
    processor: seconds of every pass in which its thread was on a processor; empty if not measured.
    cpus: the processors of the first rank's host, None if they are not known.
    """

    step: int
    device: str
    dtype: str
    problem: Problem
    schedule: Schedule
    cost: CostModel
    sources: Mapping[Kind, str]
    slowness: tuple[float, ...]
    runtime: Runtime
    planned_seconds: float
    measured: Timeline
    ranks: tuple[TracedRank, ...]
    tp: int
    measured_on: str = ""
    rows: tuple[int, ...] = ()
    processor: Mapping[Pass, float] = field(default_factory=dict)
    cpus: int | None = None

    @property
    def num_ranks(self) -> int:
        """The number of pipeline ranks."""
        return self.problem.layout.num_ranks


def read_traced(run: Path) -> TracedStep:
    """Return the traced step of a run.  Raises ConfigError, with the way out."""
    if not run.is_dir():
        raise ConfigError(f"{run} is not a directory{meant_run(run)}; give that of a run")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} has no config.yaml; give the directory of a run")
    path = run / "trace" / "step_times.json"
    if not path.exists():
        raise ConfigError(
            f"{path} is not there: the run has traced no step yet, or run.trace_step=0 turned it "
            f"off; go on with run.resume=true run.trace_step={SETTLED_STEP} and at least "
            f"{SETTLED_STEP} more run.steps"
        )
    try:
        record = read_json(path, LARGEST, follow=False)
    except UnreadableError as error:
        raise ConfigError(f"{error}; a run writes it at run.trace_step") from None
    try:
        return parse(record, _cpus(run / "env.json"))
    except (KeyError, TypeError, ValueError) as error:
        words = f"it has no {error}" if isinstance(error, KeyError) else printable(str(error))
        raise ConfigError(
            f"{path} is not what a run writes: {words[:300]}; trace a step anew with run.trace_step"
        ) from None


def _cpus(path: Path) -> int | None:
    """Return the processors that the file of the environment names, None if it names none."""
    try:
        environment = read_json(path, follow=False)
    except UnreadableError:
        return None
    found = environment.get("cpus") if isinstance(environment, dict) else None
    return found if type(found) is int and 0 < found < _MOST_RANKS else None


def parse(record: Any, cpus: int | None = None) -> TracedStep:
    """Return the step in the content of a file.  Raises KeyError, TypeError or ValueError."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA!r}")
    name, algorithm = _text(record["schedule"]), _text(record["vocabulary"])
    if algorithm not in VOCAB_ALGORITHMS:
        raise ValueError(f"vocabulary {shown(algorithm)} is not known")
    tp, dp = _count(record["tp"], "tp"), _count(record["dp"], "dp")
    planned, measured = _mapping(record["planned"]), _mapping(record["measured"])
    spans = [_passes(row, rank) for rank, row in enumerate(_list(measured["passes"]))]
    order = [[_pass(span) for span in row] for row in spans]
    offloads = tuple(map(_offload, _list(record.get("offloads", []))))
    schedule = Schedule(name, tuple(map(tuple, order)), offloads)
    layout, split_backward = recognise(schedule)
    microbatches = _count(record["num_microbatches"], "num_microbatches")
    if max(
        sum(map(len, order)), len(offloads)
    ) > _MOST_PASSES or layout.num_stages * microbatches > sum(map(len, order)):
        raise ValueError(
            f"{sum(map(len, order)):,} passes are not those of {microbatches:,} microbatches"
        )
    problem = Problem(layout, microbatches, VOCAB_ALGORITHMS[algorithm], split_backward)
    check_schedule(schedule, problem)
    if _count(record["pp"], "pp") != layout.num_ranks:
        raise ValueError(f"pp is {record['pp']}, but {layout.num_ranks} ranks have passes")
    ranks = tuple(map(_rank, _list(record["ranks"])))
    if len(ranks) > _MOST_RANKS or len(ranks) not in (0, dp * tp * layout.num_ranks):
        raise ValueError(
            f"it has {len(ranks):,} ranks, not dp x pp x tp = {dp * tp * layout.num_ranks:,}"
        )
    places = {(rank.replica, rank.pipeline_rank, rank.tensor_rank) for rank in ranks}
    inside = all(r < dp and p < layout.num_ranks and t < tp for r, p, t in places)
    if not inside or len(places) < len(ranks) or {r.rank for r in ranks} != {*range(len(ranks))}:
        raise ValueError("its ranks are not each rank of the run once")
    if not any(span.seconds for row in spans for span in row):
        raise ValueError("no pass took any time")
    cost = _mapping(record["cost"])
    runtime = _text(record.get("runtime", "gloo"))
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime {shown(runtime)} is not one of {', '.join(RUNTIMES)}")
    rows = tuple(_count(rows, "rows", least=0) for rows in _list(record.get("rows", [])))
    return TracedStep(
        step=_count(record["step"], "step"),
        device=_text(record["device"]),
        dtype=_text(record["dtype"]),
        problem=problem,
        schedule=schedule,
        cost=_cost(cost, problem),
        sources=_sources(cost.get("sources")),
        slowness=_slowness(cost.get("settings"), layout.num_ranks),
        runtime=RUNTIMES[runtime].on(record["device"]),
        planned_seconds=_seconds(planned["makespan_seconds"]),
        measured=Timeline(
            tuple(spans),
            tuple(_communications(_mapping(measured["communications"]), layout.num_ranks)),
            (),
            (),
        ),
        ranks=ranks,
        tp=tp,
        measured_on=printable(_text(cost.get("measured_on") or ""))[:80],
        rows=rows if len(rows) == layout.num_ranks else (),
        processor=_processor(record.get("processor_seconds", []), order),
        cpus=cpus,
    )


def _cost(record: Mapping[str, Any], problem: Problem) -> CostModel:
    """Return the costs of the plan; every pass of the problem has one."""
    layout, seconds = problem.layout, {}
    for letter, values in _mapping(record["pass_seconds"]).items():
        kind = Kind(letter)
        needed = layout.num_ranks if kind.is_vocabulary else layout.num_stages
        if len(_list(values)) != needed:
            raise ValueError(f"cost has {len(values)} values of {kind}, not {needed}")
        seconds[kind] = tuple(map(_seconds, values))
    barriers = {
        _text(name): _seconds(value) for name, value in _mapping(record["barrier_seconds"]).items()
    }
    num_bytes = _mapping(record.get("bytes", {}))
    kept = {
        f"{name}_bytes": _numbers(num_bytes.get(name, []), places, _LARGEST_BYTES)
        for name, places in (
            ("stage", layout.num_stages),
            ("shard", layout.num_ranks),
            ("weight", layout.num_stages),
            ("offload", layout.num_stages),
        )
    }
    copies = _numbers(record.get("offload_seconds", []), layout.num_stages, _LARGEST_SECONDS)
    return CostModel(
        seconds, _seconds(record["hop_seconds"]), barriers, offload_seconds=copies, **kept
    )


def _numbers(values: Any, places: int, largest: float) -> tuple[float, ...]:
    """Return the numbers of all stages or ranks, or none."""
    found = tuple(_number(value, largest) for value in _list(values))
    if len(found) not in (0, places):
        raise ValueError(f"cost has {len(found)} values of bytes or copies, not {places}")
    return found


def _offload(words: Any) -> Offload:
    """Return what is offloaded when, from three passes."""
    found = list(map(Pass.parse, _text(words).split()))
    if len(found) != 3:
        raise ValueError(f"{shown(words)} are not the three passes of what is offloaded")
    return Offload(*found)


def _sources(record: Any) -> dict[Kind, str]:
    found = {Kind(letter): _text(source) for letter, source in _mapping(record).items()}
    if wrong := next((source for source in found.values() if source not in _SOURCES), None):
        raise ValueError(f"source {shown(wrong)} is not one of {', '.join(_SOURCES)}")
    return found


def _slowness(settings: Any, num_ranks: int) -> tuple[float, ...]:
    factors = _mapping(settings or {}).get("rank_slowness")
    if factors is None:
        return (1.0,) * num_ranks
    found = tuple(map(_seconds, _list(factors)))
    if len(found) != num_ranks or min(found) <= 0:
        raise ValueError(f"cost.rank_slowness has {len(found)} values above 0, not {num_ranks}")
    return found


def _rank(record: Any) -> TracedRank:
    record = _mapping(record)
    passes = {
        Kind(letter): _seconds(_mapping(found)["seconds"])
        for letter, found in _mapping(record["pass_seconds"]).items()
    }
    rank, replica, pipeline_rank, tensor_rank = (
        _count(record[name], name, least=0)
        for name in ("rank", "replica", "pipeline_rank", "tensor_rank")
    )
    host = printable(_text(record["host"]))[:64]
    return TracedRank(rank, replica, pipeline_rank, tensor_rank, host=host, passes=passes)


def _passes(record: Any, rank: int) -> tuple[Span, ...]:
    """Return the spans of the passes of one rank."""
    found = []
    for name, start, end in intervals_of_rank(_mapping(record)):
        item = Pass.parse(name)
        found.append(Span(rank, name, item.kind.value, item.stage, item.microbatch, start, end))
    return tuple(found)


def _pass(span: Span) -> Pass:
    return Pass(span.stage, Kind(span.kind), span.microbatch)


def _processor(record: Any, order: Sequence[Sequence[Pass]]) -> dict[Pass, float]:
    """Return the seconds of each pass on a processor; {} if they were not measured."""
    if not any(map(_list, _list(record))):
        return {}
    if [len(_list(row)) for row in record] != [len(row) for row in order]:
        raise ValueError("processor_seconds has not one value for each pass")
    passes, values = chain.from_iterable(order), chain.from_iterable(record)
    return {item: _seconds(value) for item, value in zip(passes, values, strict=True)}


def _communications(record: Mapping[str, Any], num_ranks: int) -> list[Span]:
    ranks = _list(record["ranks"])
    timed = intervals(record)
    if len(ranks) != len(timed):
        raise ValueError(f"{len(timed)} communications have {len(ranks)} ranks")
    found = []
    for (name, start, end), rank in zip(timed, ranks, strict=True):
        if _count(rank, "rank", least=0) >= num_ranks:
            raise ValueError(f"communication {shown(name)} ends on rank {rank} of {num_ranks}")
        barrier, dot, _ = name.partition(".")
        copy, colon, item = name.partition(":")
        kind = barrier if dot else copy if colon else "hop"
        if colon and (copy not in HOST_TRANSFERS or Pass.parse(item).kind is not Kind.F):
            raise ValueError(f"communication {shown(name)} is not known")
        found.append(Span(rank, name, kind, -1, -1, start, end))
    return found


def intervals(record: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return names, starts and ends in seconds.  Raises KeyError, TypeError or ValueError."""
    names = _text(record["names"]).split()
    starts, ends = (list(map(_seconds, _list(record[key]))) for key in ("starts", "ends"))
    if not len(names) == len(starts) == len(ends):
        raise ValueError(f"{len(names)} names have {len(starts)} starts and {len(ends)} ends")
    found = list(zip(names, starts, ends, strict=True))
    if late := next((name for name, start, end in found if start > end), None):
        raise ValueError(f"{shown(late)} ends before it starts")
    return found


def intervals_of_rank(record: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return `intervals` of the passes of a rank, which run one after the other.

    Raises what `intervals` does, and ValueError for a pass that starts before the one before it has
    ended.
    """
    found = intervals(record)
    for (before, _, end), (name, start, _) in pairwise(found):
        if start < end:
            raise ValueError(f"{shown(name)} starts before {shown(before)} has ended")
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{shown(value)} is not an object")
    return value


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{shown(value)} is not a list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is not text")
    return value


def _count(value: Any, name: str, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
        raise ValueError(f"{name} is {shown(value)}, not a whole number of at least {least}")
    return value


def _seconds(value: Any) -> float:
    return _number(value, _LARGEST_SECONDS, "a time in seconds")


def _number(value: Any, largest: float, what: str = "a number of bytes or seconds") -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= largest  # neither has NaN
    ):
        raise ValueError(f"{shown(value)} is not {what}")
    return float(value)
