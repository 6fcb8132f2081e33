"""Compare the what-ifs of vp-explain with steps in which the cause was really removed.

    python benchmarks/what_if.py [--schedules 1f1b zb_h1] [--layer-ms 40] [--steps 5] [--json FILE]

As in `rehearsal.py`, processes and communication are real and passes sleep, so ranks that share
processors have true times.  A step is made slow: a rank whose passes take longer, messages between
stages that arrive late, a rank with more vocabulary rows, or two of these.  It is traced, and
explained from the trace alone.  Then it runs without the cause.  Of several steps the fastest
counts on both sides: what other programs of the machine do only adds time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rehearsal import (
    Case,
    Report,
    Setup,
    Sleeper,
    common_start,
    decide,
    latest,
    run,
    sleep_overshoot,
    sleeping_modules,
    time_comms,
)
from torch import Tensor

from schedules.cost import CostModel
from schedules.generators import generate
from schedules.ir import Kind, Schedule
from schedules.problem import Problem
from schedules.replay import GLOO
from schedules.simulate import simulate
from schedules.timeline import Span, Timeline
from vp_train.explain.causes import Explanation, explain
from vp_train.explain.trace import TracedStep
from vp_train.mesh import build_mesh
from vp_train.pipeline.comms import Comms, ProcessGroups, Watch
from vp_train.pipeline.executor import Executor
from vp_train.pipeline.recorder import Recorder, joined_communications
from vp_train.pipeline.timers import HostTimer
from vp_train.planning.degrees import Degrees
from vp_train.tensors.pending import Pending

ROWS = 12_000  # of the whole vocabulary; S and T take as long as the rows of their rank say


@dataclass(frozen=True, slots=True)
class Trouble:
    """What makes a step slow.

    slowness: by rank, the factor of its passes.  hop_delay: seconds by which messages between
    stages arrive late.  rows: vocabulary rows by rank; () for equally many.
    """

    name: str
    slowness: Mapping[int, float] = field(default_factory=dict)
    hop_delay: float = 0.0
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A what-if of a slow step, and the step without its cause; all in seconds.

    named: the ranks that the explanation calls slow.  causes: what it says makes the step slow.
    """

    schedule: str
    vocab: str
    trouble: str
    planned_seconds: float
    slow_seconds: float
    what_if: str
    predicted_seconds: float
    measured_seconds: float
    error_pct: float
    named: str
    causes: dict[str, float]
    seconds_of_steps: tuple[float, ...]

    def cells(self) -> str:
        """Return the row of the printed table."""
        return (
            f"| `{self.schedule}` | {self.trouble} | {self.slow_seconds:.3f} | `{self.what_if}` "
            f"| {self.predicted_seconds:.3f} | {self.measured_seconds:.3f} "
            f"| {self.error_pct:+.1f} % |"
        )


HEADER = (
    "| schedule | trouble | slow s | what-if | predicted s | measured s | error |\n"
    + "|---" * 7
    + "|"
)


@dataclass(frozen=True, slots=True)
class _Late:
    """A message that arrives `seconds` after it really did.  One thread may wait for it."""

    pending: Pending
    seconds: float

    def wait(self) -> Tensor:
        result = self.pending.wait()
        time.sleep(self.seconds)
        return result

    def is_completed(self) -> bool:
        return self.pending.is_completed()


class SlowHops(ProcessGroups):
    """A transport whose messages between stages arrive late.  A recorder must watch them."""

    delay = 0.0

    def receive(self, buffer: Tensor, peer: int, *, watch: Watch) -> Pending:
        return super().receive(
            buffer, peer, watch=lambda pending: watch(_Late(pending, self.delay))
        )


def with_rows(cost: CostModel, rows: tuple[int, ...]) -> CostModel:
    """Return `cost` with S and T in proportion to the rows of their rank."""
    if not rows:
        return cost
    share = [len(rows) * count / sum(rows) for count in rows]
    scaled = {
        kind: tuple(part * value for part, value in zip(share, values, strict=True))
        if kind in (Kind.S, Kind.T)
        else values
        for kind, values in cost.pass_seconds.items()
    }
    return replace(cost, pass_seconds=scaled)


def slowed(cost: CostModel, problem: Problem, slowness: Mapping[int, float]) -> CostModel:
    """Return `cost` with the passes of slow ranks longer."""

    def factor(kind: Kind, index: int) -> float:
        rank = index if kind.is_vocabulary else problem.layout.rank_of(index)
        return slowness.get(rank, 1.0)

    scaled = {
        kind: tuple(factor(kind, index) * value for index, value in enumerate(values))
        for kind, values in cost.pass_seconds.items()
    }
    return replace(cost, pass_seconds=scaled)


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps of one trouble: the fastest one's seconds, and its trace on rank 0."""

    seconds: float
    seconds_of_steps: tuple[float, ...]
    step: TracedStep | None


def measure(
    rank: int, num_ranks: int, case: Case, setup: Setup, trouble: Trouble, hops: tuple[Any, Any]
) -> Measured:
    """Run steps with a trouble that the plan knows nothing of, except for its rows."""
    problem = setup.problem(case, num_ranks)
    groups = build_mesh(Degrees(1, num_ranks, 1), problem).pipeline
    transport = SlowHops(groups, torch.device("cpu"))
    transport.delay = trouble.hop_delay
    comms = Comms(transport)
    cost = with_rows(setup.cost(problem, *hops), trouble.rows)
    program, timeline = decide(rank, case, problem, cost)
    sleeper = Sleeper(slowed(cost, problem, trouble.slowness), sleep_overshoot())
    executor = Executor(program, rank, sleeping_modules(problem, rank, setup, sleeper), comms)
    batch = torch.zeros(setup.microbatches, 1, setup.tokens, dtype=torch.int64)
    steps: list[tuple[float, list[Span], list[Span]]] = []
    for step in range(1 + setup.steps):
        recorder = Recorder(rank, HostTimer(), [])
        start = common_start()
        recorder.timer.start(start)  # type: ignore[call-arg]
        executor.step(batch, batch, recorder)
        comms.drain()
        ended = max(span.end for span in recorder.spans)
        seconds = latest(ended)
        if step > 0:  # the first one is warm-up
            steps.append((seconds, recorder.spans, recorder.communications))
    seconds_of_steps = tuple(seconds for seconds, *_ in steps)
    fastest = min(range(len(steps)), key=seconds_of_steps.__getitem__)
    gathered: list[Any] = [None] * num_ranks
    dist.all_gather_object(gathered, steps[fastest][1:])
    traced = None
    if rank == 0:
        schedule = generate(case.schedule, problem, cost)
        measured = Timeline(
            tuple(tuple(spans) for spans, _ in gathered),
            joined_communications([messages for _, messages in gathered]),
            (0.0,) * num_ranks,
            (0,) * num_ranks,
        )
        traced = _traced(schedule, problem, cost, timeline, measured, trouble)
    return Measured(min(seconds_of_steps), seconds_of_steps, traced)


def _traced(
    schedule: Schedule,
    problem: Problem,
    cost: CostModel,
    planned: Timeline,
    measured: Timeline,
    trouble: Trouble,
) -> TracedStep:
    num_ranks = problem.layout.num_ranks
    return TracedStep(
        step=1,
        device="cpu",
        dtype="float32",
        problem=problem,
        schedule=schedule,
        cost=cost,
        sources={},
        slowness=(1.0,) * num_ranks,
        runtime=GLOO,
        planned_seconds=simulate(schedule, problem, cost).makespan,
        measured=measured,
        ranks=(),
        tp=1,
        rows=trouble.rows or (ROWS // num_ranks,) * num_ranks,
    )


def compare(num_ranks: int, cases: list[Case], setup: Setup, rank: int, report: Report) -> None:
    """Measure all cases as `rank`; rank 0 reports every row."""
    slow_rank = num_ranks // 2
    share = ROWS // (num_ranks + 2)
    nothing = Trouble("nothing")
    slow = Trouble("a slow rank", {slow_rank: 1.6})
    late = Trouble("slow hops", hop_delay=1.5 * setup.layer_seconds)
    both = Trouble("a slow rank and slow hops", slow.slowness, late.hop_delay)
    rows = Trouble(
        "unequal rows", rows=(*[share] * (num_ranks - 1), ROWS - (num_ranks - 1) * share)
    )
    for case in cases:
        problem = setup.problem(case, num_ranks)
        groups = build_mesh(Degrees(1, num_ranks, 1), problem).pipeline
        hops = time_comms(rank, problem, Comms(ProcessGroups(groups, torch.device("cpu"))), setup)
        found = {
            trouble.name: measure(rank, num_ranks, case, setup, trouble, hops)
            for trouble in (nothing, slow, late, both, rows)
        }
        if rank != 0:
            continue
        explained = {
            name: explain(measured.step)
            for name, measured in found.items()
            if measured.step is not None
        }
        for trouble, what_if, without in (
            (slow, "equal_ranks", nothing),
            (late, "planned_network", nothing),
            (both, "equal_ranks", late),
            (both, "planned_network", slow),
            (rows, "even_rows", nothing),
        ):
            report(_row(case, trouble, what_if, explained[trouble.name], found[without.name]))


def _row(case: Case, trouble: Trouble, name: str, explained: Explanation, without: Measured) -> Row:
    what_if = explained.what_if(name)
    predicted = float("nan") if what_if is None else what_if.seconds
    return Row(
        schedule=case.schedule,
        vocab=case.vocab,
        trouble=trouble.name,
        planned_seconds=explained.planned_seconds,
        slow_seconds=explained.measured_seconds,
        what_if=name,
        predicted_seconds=predicted,
        measured_seconds=without.seconds,
        error_pct=100 * (predicted / without.seconds - 1),
        named=", ".join(f"rank {row.rank}: {row.slowness:.2f}" for row in explained.slow),
        causes={cause.name: cause.seconds for cause in explained.causes},
        seconds_of_steps=without.seconds_of_steps,
    )


def main() -> None:
    from provenance import provenance

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--schedules",
        type=Case.parse,
        nargs="+",
        default=list(map(Case.parse, ("1f1b", "zb_h1"))),
        metavar="NAME[/VOCAB]",
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layer-ms", type=float, default=40.0, help="F of one layer")
    parser.add_argument("--head", type=float, default=2.4, help="output layer in layers")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each run")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for the whole run")
    parser.add_argument("--json", type=Path, help="write everything measured as JSON")
    arguments = parser.parse_args()
    setup = Setup(
        arguments.microbatches,
        arguments.layer_ms / 1e3,
        arguments.head,
        2e-3,
        256,
        512,
        torch.float32,
        arguments.steps,
    )
    load = os.getloadavg()[0]
    work = partial(compare, arguments.ranks, arguments.schedules, setup)
    rows = run(arguments.ranks, work, HEADER, arguments.timeout)
    print(f"largest error {max((row.error_pct for row in rows), key=abs):+.1f} %")
    if arguments.json:
        described = asdict(setup) | {
            "dtype": "float32",
            "ranks": arguments.ranks,
            "load_average_before": load,
        }
        result = provenance() | {"setup": described, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
