"""Measure how much of the communication between replicas overlaps with the passes.

    python benchmarks/replicas.py [--ranks 4] [--replicas 2] [--layers 8] [--mib 4] [--json FILE]
    python benchmarks/replicas.py --forecast 2 5 10 20

Executor, buckets, optimizers, processes and gloo are real.  Passes sleep as in `rehearsal.py`.  A
stage has `layers` layers, and a layer has `mib` MiB of gradients.

Steps of several kinds take turns.  `none` has no communication between replicas.  `late sum` sums
all gradients after the last pass, and `early sum` sums a bucket as soon as the last backward of its
layers is done.  With `zero1` the step after an update follows: `late gather` collects all new
parameters before the first pass, and `early gather` lets the first forward wait for each layer.
The hidden share is (late - early) / (late - none).

`can be` is the share that the order of passes lets hide.  It is computed from the simulated step
and from the time of a sum or gather without passes, of sums on the first rank of the pipeline
alone, of gathers on all ranks together, because a step begins with them.  Nothing can hide the sum
of the bucket that the last pass completes, nor the gather of the layer that the first pass reads
first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rehearsal import (
    Case,
    Setup,
    Sleeper,
    SleepingStage,
    common_start,
    decide,
    latest,
    run,
    sleep_overshoot,
    sleeping_modules,
)
from torch import Tensor, nn

from schedules.generators import generate
from schedules.ir import Kind, Pass
from schedules.lower import Action, Op, Program, lower
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.timeline import Span, Timeline
from vp_train.config import OptimConfig
from vp_train.config.bounds import BUCKETS_PER_STAGE
from vp_train.mesh import build_mesh
from vp_train.optim.buckets import FlatLayout, bucket_elements, lay_out
from vp_train.optim.gradients import Gradients
from vp_train.optim.optimizer import Optimizer, ReplicatedAdamW
from vp_train.optim.replicas import Replicas
from vp_train.optim.zero import ZeroAdamW
from vp_train.pipeline.comms import Comms, ProcessGroups
from vp_train.pipeline.executor import NO_UPDATES, Executor, RankModules, WeightUpdates
from vp_train.planning.degrees import Degrees
from vp_train.tensors.pending import Pending

SUMS = ("late sum", "early sum")
GATHERS = ("late gather", "early gather")
ROUNDS = 5  # of every communication that is timed alone
OPTIMIZERS = {"adamw": ReplicatedAdamW, "zero1": ZeroAdamW}


@dataclass(slots=True)
class LayeredStage(SleepingStage):
    """A sleeping stage that reports when the gradients of its `units` (layers) are complete."""

    units: tuple[tuple[str, ...], ...] = ()
    done: Callable[[Sequence[str]], None] | None = None
    need: Callable[[Sequence[str]], None] | None = None

    @contextmanager
    def reading(self, need: Callable[[Sequence[str]], None]) -> Iterator[None]:
        self.need = need
        yield
        self.need = None

    @contextmanager
    def completing(self, done: Callable[[Sequence[str]], None]) -> Iterator[None]:
        self.done = done
        yield
        self.done = None

    def pass_on(self, kind: Kind, received: Tensor) -> Tensor:
        if kind is Kind.F and self.need is not None:
            self._reading_layers(self.need)
            return torch.full_like(received, 1e-3)
        if kind is Kind.B and self.done is not None:
            self._by_layers(kind)
            return torch.full_like(received, 1e-3)
        return SleepingStage.pass_on(self, kind, received)

    def drain(self, microbatch: int) -> None:
        if self.done is None:
            SleepingStage.drain(self, microbatch)
        else:
            self.waiting.remove(microbatch)
            self._by_layers(Kind.W)

    def _by_layers(self, kind: Kind) -> None:
        """Sleep for the pass, and report the layers at equal intervals."""
        start = time.perf_counter()
        seconds = self.sleeper.cost.seconds(Pass(self.stage, kind, 0))
        for number, names in enumerate(self.units, start=1):
            end = start + seconds * number / len(self.units)
            time.sleep(max(0.0, end - time.perf_counter() - self.sleeper.overshoot))
            if self.done is not None:
                self.done(names)

    def _reading_layers(self, need: Callable[[Sequence[str]], None]) -> None:
        """Sleep for the forward of each layer, once its parameters are there."""
        seconds = self.sleeper.cost.seconds(Pass(self.stage, Kind.F, 0)) / len(self.units)
        end = time.perf_counter()
        for names in reversed(self.units):
            need(names)
            end = max(end, time.perf_counter()) + seconds
            time.sleep(max(0.0, end - time.perf_counter() - self.sleeper.overshoot))


@dataclass(frozen=True, slots=True)
class Early:
    """Weight updates that tell the optimizer of each layer that is read or, once, completed."""

    optimizer: Optimizer
    sums: bool
    seen: set[str] = field(default_factory=set)

    def need(self, item: Pass) -> None:
        pass

    def need_of(self, names: Sequence[str]) -> None:
        self.optimizer.need(names)

    def announce(self, names: Sequence[str]) -> None:
        new = [name for name in names if self.sums and name not in self.seen]
        self.seen.update(new)
        self.optimizer.ready(new)

    def complete(self, item: Pass) -> None:
        pass


@dataclass(slots=True)
class Held:
    """A gather that begins when it is released."""

    issue: Callable[[], Pending]
    work: Pending | None = None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


@dataclass(frozen=True, slots=True)
class HoldingReplicas(Replicas):
    """Replicas whose gathers wait for `release`, so that a measured step can begin with them."""

    held: list[Held] = field(default_factory=list)

    def gather(self, values: Tensor) -> Held:
        self.held.append(Held(partial(Replicas.gather, self, values)))
        return self.held[-1]

    def release(self) -> None:
        for held in self.held:
            held.work = held.issue()
        self.held.clear()


# What can be hidden


def reach(late: float, early: float, none: float) -> float:
    """Return the hidden share in percent."""
    return 100 * (late - early) / (late - none)


def finished(ready: Sequence[float], seconds: float) -> float:
    """Return when the last of equal messages ends, if each starts after the one before."""
    end = 0.0
    for moment in sorted(ready):
        end = max(end, moment) + seconds
    return end


@dataclass(frozen=True, slots=True)
class Forecast:
    """An estimate of what a simulated step hides, for `layers` of each stage in its buckets.

    Messages of a rank run one after another.  Buckets have equal sizes.
    """

    program: Program
    timeline: Timeline
    layers: int

    def sums(self, layouts: Sequence[FlatLayout], seconds: float) -> float:
        """Return the share of the sums in percent, if a bucket takes `seconds`."""
        none = self.timeline.makespan
        early, late = none, none
        for rank, layout in enumerate(layouts):
            ready = [0.0] * len(layout.buckets)
            for op in self.program.ranks[rank]:
                if op.completes and op.action is Action.RUN and not op.item.kind.is_vocabulary:
                    span = self._span(rank, op)
                    for k in range(self.layers):
                        bucket = bucket_of(layout, f"{op.item.stage}.{k}")
                        moment = span.start + span.seconds * (k + 1) / self.layers
                        ready[bucket] = max(ready[bucket], moment)
            early = max(early, finished(ready, seconds))
            end = self.timeline.compute[rank][-1].end
            late = max(late, end + len(ready) * seconds)
        return reach(late, early, none)

    def gathers(self, layouts: Sequence[FlatLayout], seconds: float) -> float:
        """Return the share of the gathers in percent, if a bucket takes `seconds`.

        A late first pass is taken to delay the step by as much.
        """
        delay, whole = 0.0, 0.0
        for rank, layout in enumerate(layouts):
            arrival = {index: i * seconds for i, index in enumerate(layout.reading_order, start=1)}
            whole = max(whole, len(arrival) * seconds)
            for op in self.program.ranks[rank]:
                if op.action is Action.NEED and not op.item.kind.is_vocabulary:
                    span = self._span(rank, op)
                    moment = span.start
                    for k in reversed(range(self.layers)):
                        there = arrival[bucket_of(layout, f"{op.item.stage}.{k}")]
                        moment = max(moment, there) + span.seconds / self.layers
                    delay = max(delay, moment - span.end)
        return reach(whole, delay, 0.0)

    def _span(self, rank: int, op: Op) -> Span:
        (span,) = (span for span in self.timeline.compute[rank] if span.name == str(op.item))
        return span


def units_of(stage: int, layers: int) -> tuple[tuple[str], ...]:
    """Return the parameter of every layer of a stage, in order of completion."""
    return tuple((f"{stage}.{k}",) for k in range(layers))


def layouts_of(problem: Problem, layers: int, mib: float, num_replicas: int) -> list[FlatLayout]:
    """Return the buckets of every rank of the pipeline, as the trainer makes them."""
    layouts = []
    for rank in range(problem.layout.num_ranks):
        runs = [units_of(stage, layers) for stage in sorted(problem.layout.stages_of(rank))]
        parameters = {
            name: nn.Parameter(torch.empty(int(mib * 2**18), device="meta"))
            for run in runs
            for (name,) in run
        }
        layouts.append(
            lay_out(
                parameters,
                runs,
                max_elements=bucket_elements(OptimConfig(), 4),
                num_parts=num_replicas,
                min_buckets=BUCKETS_PER_STAGE,
            )
        )
    return layouts


def print_forecast(setup: Setup, arguments: Any) -> None:
    """Print what can be hidden for messages of `arguments.forecast` milliseconds."""
    print("| schedule | vocab | what |", *(f"{ms:g} ms |" for ms in arguments.forecast))
    print("|---" * (3 + len(arguments.forecast)) + "|")
    for case in arguments.schedules:
        problem = setup.problem(case, arguments.ranks)
        cost = setup.cost(problem, 0.0, {})
        schedule = generate(case.schedule, problem, cost)
        forecast = Forecast(
            lower(schedule, problem, cost), simulate(schedule, problem, cost), arguments.layers
        )
        layouts = layouts_of(problem, arguments.layers, arguments.mib, arguments.replicas)
        for what, share in (("sum", forecast.sums), ("gather", forecast.gathers)):
            shares = (f"{share(layouts, ms / 1e3):.0f} % |" for ms in arguments.forecast)
            print(f"| `{case.schedule}` | `{case.vocab}` | {what} |", *shares)


def bucket_of(layout: FlatLayout, name: str) -> int:
    """Return the index of the bucket of parameter `name`."""
    (index,) = (index for index, bucket in enumerate(layout.buckets) if name in bucket.names)
    return index


def seconds_alone(issue: Callable[[], list[Pending]], runs: bool) -> float:
    """Return the median seconds of a message, issued together on the ranks where it `runs`.

    All ranks return the same.
    """
    taken, count = [], 1
    for _ in range(ROUNDS):
        start = common_start()
        pending = issue() if runs else []
        for message in pending:
            message.wait()
        taken.append(latest(time.perf_counter() - start))
        count = max(count, len(pending))
    return statistics.median(taken) / latest(count)


# Measurements


@dataclass(frozen=True, slots=True)
class Row:
    """The result for a schedule and an optimizer: median seconds of every kind of step.

    `hidden_pct` and `can_be_pct` have "sum" and, with zero1, "gather".  `message_seconds` are the
    seconds of the message of a bucket without passes.
    """

    schedule: str
    vocab: str
    optimizer: str
    what: str
    seconds: dict[str, float]
    hidden_pct: float
    can_be_pct: float
    message_seconds: float
    seconds_of_steps: dict[str, list[float]]

    def cells(self) -> str:
        """Return the row of the printed table."""
        none, late, early = self.seconds.values()
        return (
            f"| `{self.schedule}` | `{self.vocab}` | `{self.optimizer}` | {self.what} "
            f"| {none:.3f} | {late:.3f} | {early:.3f} | {self.hidden_pct:.0f} % "
            f"| {self.can_be_pct:.0f} % |"
        )


HEADER = (
    "| schedule | vocab | optimizer | what | none s | late s | early s | hidden | can be |\n"
    + "|---" * 9
    + "|"
)


def measure(
    rank: int,
    degrees: Degrees,
    case: Case,
    optimizer_name: str,
    setup: Setup,
    layers: int,
    mib: float,
) -> list[Row]:
    """Measure one case.  Every rank returns the same rows."""
    _, here, _ = degrees.place(rank)
    problem = setup.problem(case, degrees.pp)
    mesh = build_mesh(degrees, problem)
    cost = setup.cost(problem, 0.0, {})
    program, timeline = decide(rank, case, problem, cost)
    sleeper = Sleeper(cost, sleep_overshoot())
    plain = sleeping_modules(problem, here, setup, sleeper)
    dtype = torch.float32 if optimizer_name == "adamw" else torch.bfloat16
    parameters = {
        name: nn.Parameter(torch.zeros(int(mib * 2**18), dtype=dtype))
        for stage in plain.stages
        for (name,) in units_of(stage, layers)
    }
    optim = OptimConfig(optimizer_name)
    layouts = layouts_of(problem, layers, mib, degrees.dp)
    layout = layouts[here]
    gradients = Gradients(parameters, layout)
    replicas = HoldingReplicas(mesh.data)
    optimizer = OPTIMIZERS[optimizer_name](parameters, gradients, optim, replicas)
    stages = {
        stage: LayeredStage(stage, problem.backward, sleeper, units=units_of(stage, layers))
        for stage in plain.stages
    }
    comms = Comms(ProcessGroups(mesh.pipeline, torch.device("cpu")))
    batch = torch.zeros(setup.microbatches, 1, setup.tokens, dtype=torch.int64)

    def step(mode: str) -> float:
        early = mode in ("early sum", "early gather")
        updates: WeightUpdates = Early(optimizer, sums=mode in SUMS) if early else NO_UPDATES
        if mode in GATHERS:
            optimizer.step(0.0, 1.0)
        modules = RankModules(
            stages,
            plain.input_layer,
            plain.output_layer,
            setup.dtype,
            torch.device("cpu"),
            setup.hidden,
            updates=updates,
        )
        executor = Executor(program, here, modules, comms)
        start = common_start()
        replicas.release()
        if mode == "late gather":
            optimizer.settle()
        executor.step(batch, batch)
        if mode in SUMS:
            optimizer.reduce()
        taken = latest(time.perf_counter() - start)
        optimizer.settle()
        return taken

    modes = ("none", *SUMS, *(GATHERS if optimizer_name == "zero1" else ()))
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(1 + setup.steps):
        for mode in modes:
            taken = step(mode)
            if number:  # the first one is warm-up
                seconds[mode].append(taken)
    forecast = Forecast(program, timeline, layers)
    scatters = optimizer_name == "zero1"
    issue_sum = replicas.scatter_sum if scatters else replicas.sum
    alone = seconds_alone(
        lambda: [issue_sum(gradients.of(bucket)) for bucket in layout.buckets], here == 0
    )
    rows = [row_of(case, optimizer_name, "sum", seconds, alone, forecast.sums(layouts, alone))]
    if scatters:
        flat = torch.zeros(layout.num_elements, dtype=dtype)
        alone = seconds_alone(
            lambda: [
                Replicas.gather(replicas, flat[bucket.start : bucket.stop])
                for bucket in layout.buckets
            ],
            True,
        )
        can_be = forecast.gathers(layouts, alone)
        rows.append(row_of(case, optimizer_name, "gather", seconds, alone, can_be))
    mesh.destroy()
    return rows


def row_of(
    case: Case,
    optimizer: str,
    what: str,
    seconds: dict[str, list[float]],
    alone: float,
    can_be: float,
) -> Row:
    """Return the row of the sums or gathers, `what`."""
    own = {mode: seconds[mode] for mode in ("none", f"late {what}", f"early {what}")}
    medians = {mode: statistics.median(values) for mode, values in own.items()}
    none, late, early = medians.values()
    return Row(
        case.schedule,
        case.vocab,
        optimizer,
        what,
        medians,
        reach(late, early, none),
        can_be,
        alone,
        own,
    )


def measure_rank(
    degrees: Degrees, setup: Setup, arguments: Any, rank: int, report: Callable[[Row], None]
) -> None:
    """Measure all cases as `rank`."""
    for case in arguments.schedules:
        for name in arguments.optimizers:
            rows = measure(rank, degrees, case, name, setup, arguments.layers, arguments.mib)
            if rank == 0:
                for row in rows:
                    report(row)


def main() -> None:
    from provenance import provenance

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [Case.parse(name) for name in ("1f1b", "zb_h1", "v_half")]
    parser.add_argument(
        "--schedules", type=Case.parse, nargs="+", default=default, metavar="NAME[/VOCAB]"
    )
    parser.add_argument(
        "--optimizers", nargs="+", choices=sorted(OPTIMIZERS), default=sorted(OPTIMIZERS)
    )
    parser.add_argument("--ranks", type=int, default=4, help="ranks per pipeline")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8, help="layers per stage")
    parser.add_argument("--mib", type=float, default=4.0, help="MiB of fp32 gradients per layer")
    parser.add_argument(
        "--layer-ms", type=float, default=60.0, help="half of a rank's forward of one microbatch"
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="measured steps per kind, after one warm-up step"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for the whole run")
    parser.add_argument(
        "--forecast",
        type=float,
        nargs="+",
        metavar="MS",
        help="measure nothing; print what can be hidden if a bucket takes so many milliseconds",
    )
    parser.add_argument("--json", type=Path, help="write everything measured as JSON")
    arguments = parser.parse_args()
    if arguments.replicas < 2:
        parser.error(
            f"--replicas {arguments.replicas}: with one replica there is nothing to sum; "
            "give 2 or more"
        )
    setup = Setup(
        arguments.microbatches,
        arguments.layer_ms / 1e3,
        head_in_layers=2.4,
        embedding_seconds=4e-3,
        tokens=64,
        hidden=64,
        dtype=torch.float32,
        steps=arguments.steps,
    )
    if arguments.forecast:
        print_forecast(setup, arguments)
        return
    degrees = Degrees(arguments.replicas, arguments.ranks, 1)
    work = partial(measure_rank, degrees, setup, arguments)
    rows = run(degrees.num_ranks, work, HEADER, arguments.timeout)
    if arguments.json:
        described = {
            name: getattr(arguments, name)
            for name in ("ranks", "replicas", "microbatches", "layers", "mib", "layer_ms")
        }
        result = provenance() | {"setup": described, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
