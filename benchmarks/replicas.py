"""Measure how much of the gradient all-reduce over replicas overlaps with the passes.

    python benchmarks/replicas.py [--ranks 4] [--replicas 2] [--layers 8] [--mib 4] [--json FILE]

Executor, buckets, optimizers, processes and gloo are real.  Passes sleep as in `rehearsal.py`.  A
stage has `layers` layers, and a layer has `mib` MiB of gradients.  Steps of three kinds take turns:
`none` has no all-reduce, `late` reduces everything after the last pass, and `early` reduces a layer
as soon as its last backward is done.  The hidden share is (late - early) / (late - none).
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

from schedules.ir import Kind, Pass
from vp_train.config import OptimConfig
from vp_train.mesh import build_mesh
from vp_train.optim.buckets import lay_out
from vp_train.optim.gradients import Gradients
from vp_train.optim.optimizer import Optimizer, ReplicatedAdamW
from vp_train.optim.replicas import Replicas
from vp_train.optim.zero import ZeroAdamW
from vp_train.pipeline.comms import Comms, ProcessGroups
from vp_train.pipeline.executor import NO_UPDATES, Executor, RankModules, WeightUpdates
from vp_train.planning.degrees import Degrees

MODES = ("none", "late", "early")
OPTIMIZERS = {"adamw": ReplicatedAdamW, "zero1": ZeroAdamW}


@dataclass(slots=True)
class LayeredStage(SleepingStage):
    """A sleeping stage that reports when the gradients of its `units` (layers) are complete."""

    units: tuple[tuple[str, ...], ...] = ()
    done: Callable[[Sequence[str]], None] | None = None

    @contextmanager
    def completing(self, done: Callable[[Sequence[str]], None]) -> Iterator[None]:
        self.done = done
        yield
        self.done = None

    def pass_on(self, kind: Kind, received: Tensor) -> Tensor:
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


@dataclass(frozen=True, slots=True)
class EarlyReduction:
    """Weight updates that pass completed layers to the optimizer, once per step."""

    optimizer: Optimizer
    seen: set[str] = field(default_factory=set)

    def need(self, item: Pass) -> None:
        pass

    def announce(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self.seen]
        self.seen.update(new)
        self.optimizer.ready(new)

    def complete(self, item: Pass) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Row:
    """The result for a schedule and an optimizer: median seconds of every kind of step."""

    schedule: str
    vocab: str
    optimizer: str
    seconds: dict[str, float]
    hidden_pct: float
    seconds_of_steps: dict[str, list[float]]

    def cells(self) -> str:
        """Return the row of the printed table."""
        none, late, early = (self.seconds[mode] for mode in MODES)
        return (
            f"| `{self.schedule}` | `{self.vocab}` | `{self.optimizer}` "
            f"| {none:.3f} | {late:.3f} | {early:.3f} | {self.hidden_pct:.0f} % |"
        )


HEADER = (
    "| schedule | vocab | optimizer | none s | late s | early s | hidden |\n" + "|---" * 7 + "|"
)


def measure(
    rank: int,
    degrees: Degrees,
    case: Case,
    optimizer_name: str,
    setup: Setup,
    layers: int,
    mib: float,
) -> Row:
    """Measure one case.  Every rank returns the same row."""
    _, here, _ = degrees.place(rank)
    problem = setup.problem(case, degrees.pp)
    mesh = build_mesh(degrees, problem)
    cost = setup.cost(problem, 0.0, {})
    program, _ = decide(rank, case, problem, cost)
    sleeper = Sleeper(cost, sleep_overshoot())
    plain = sleeping_modules(problem, here, setup, sleeper)
    units = {stage: tuple((f"{stage}.{k}",) for k in range(layers)) for stage in plain.stages}
    dtype = torch.float32 if optimizer_name == "adamw" else torch.bfloat16
    parameters = {
        name: nn.Parameter(torch.zeros(int(mib * 2**18), dtype=dtype))
        for of_stage in units.values()
        for unit in of_stage
        for name in unit
    }
    layout = lay_out(parameters, list(units.values()), max_elements=1, num_parts=degrees.dp)
    gradients = Gradients(parameters, layout)
    optimizer = OPTIMIZERS[optimizer_name](
        parameters, gradients, OptimConfig(optimizer_name), Replicas(mesh.data)
    )
    stages = {
        stage: LayeredStage(stage, problem.backward, sleeper, units=units[stage])
        for stage in plain.stages
    }
    comms = Comms(ProcessGroups(mesh.pipeline, torch.device("cpu")))
    batch = torch.zeros(setup.microbatches, 1, setup.tokens, dtype=torch.int64)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for step in range(1 + setup.steps):
        for mode in MODES:
            updates: WeightUpdates = EarlyReduction(optimizer) if mode == "early" else NO_UPDATES
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
            executor.step(batch, batch)
            if mode != "none":
                optimizer.reduce()
            taken = latest(time.perf_counter() - start)
            if step:  # the first one is warm-up
                seconds[mode].append(taken)
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}
    hidden = (medians["late"] - medians["early"]) / (medians["late"] - medians["none"])
    mesh.destroy()
    return Row(case.schedule, case.vocab, optimizer_name, medians, 100 * hidden, seconds)


def measure_rank(
    degrees: Degrees, setup: Setup, arguments: Any, rank: int, report: Callable[[Row], None]
) -> None:
    """Measure all cases as `rank`."""
    for case in arguments.schedules:
        for name in arguments.optimizers:
            row = measure(rank, degrees, case, name, setup, arguments.layers, arguments.mib)
            if rank == 0:
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
