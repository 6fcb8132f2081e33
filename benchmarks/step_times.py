"""Measure what the seconds by part of every step cost: gloo ranks on CPUs.

    python benchmarks/step_times.py [--ranks 2] [--models nano:300,small:20] [--json FILE]

Steps come in threes, one with the stopwatch and the figures of all ranks, two without, in an order
drawn with a seed; all write their record.  A model is given with its number of threes.  A step is
timed on every rank, from a barrier to its end, and the slowest rank counts.  The cost is the median
over the threes of with / mean of the two without - 1, of the seconds and of the CPU seconds of all
threads of all ranks, which do not count other work on the machine.  `null` compares the two steps
without with each other: its distance from 0 is noise.  `calls` says what the same calls take by
themselves on rank 0, which also writes the record: for the operations of its program without their
work, and as a part of a step.  It has the least noise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from job import result_of_job
from provenance import provenance

WARMUP = 4  # steps
KINDS = ("with", "without", "again without")


class Nothing:
    """A stopwatch that measures nothing."""

    def switch(self, part: object) -> None:
        pass

    def observe(self, item: object, held_bytes: object) -> AbstractContextManager[None]:
        return nullcontext()

    def waits(self, action: object, item: object) -> AbstractContextManager[None]:
        return nullcontext()

    def watch(self, name: str, channel: str, pending: Any) -> Any:
        return pending


def rank_main(directory: str, model: str, threes: int) -> None:
    """Train as one rank; rank 0 prints whether each step was measured, and its seconds, as JSON."""
    import torch
    import torch.distributed as dist

    from vp_train.assembly import build_rank
    from vp_train.data import open_source
    from vp_train.mesh import build_mesh
    from vp_train.metrics.reporter import Reporter
    from vp_train.metrics.run_directory import RunDirectory
    from vp_train.planning.plan import make_plan
    from vp_train.settings import load_config
    from vp_train.train import Run

    torch.set_num_threads(1)
    num_ranks = int(os.environ["WORLD_SIZE"])
    steps = WARMUP + 3 * threes
    config = load_config(
        [
            f"model={model}",
            "data=synthetic",
            f"parallel.pp={num_ranks}",
            f"run.root={directory}",
            f"run.steps={steps + 1}",
            "run.checkpoint_every=0",
            "run.eval_every=0",
            "run.trace_step=0",
            f"run.log_every={steps}",
        ]
    )
    dist.init_process_group("gloo")
    plan = make_plan(config, num_ranks)
    mesh = build_mesh(plan.degrees, plan.problem, config.run)
    source = open_source(config)
    run = Run(config, plan, mesh, source, build_rank(config, plan, mesh))
    if mesh.rank == 0:
        reporter = Reporter(config, plan, RunDirectory(config.run), 1)
        with open(os.devnull, "w") as nowhere:
            reporter._console.file = nowhere
            reporter.start("")
        reporter._console.quiet = True
        run.reporter = reporter
    stopwatch, meter = run._stopwatch, run._meter
    own, of_ranks = meter.figures, meter._figures_of_ranks
    orders = random.Random(1)
    kinds = ["with"] * WARMUP
    for _ in range(threes):
        kinds += orders.sample(KINDS, len(KINDS))
    rows: list[tuple[float, float]] = []
    for step, kind in enumerate(kinds, start=1):
        measures = kind == "with"
        nothing: Callable[[], Any] = lambda: tuple  # noqa: E731
        run._stopwatch = stopwatch if measures else Nothing()  # type: ignore[assignment]
        meter.figures = own if measures else nothing  # type: ignore[method-assign]
        meter._figures_of_ranks = of_ranks if measures else lambda *_: {}  # type: ignore[method-assign]
        mesh.steps.barrier()
        started, used = time.perf_counter(), time.process_time()
        run.train_step(step)
        rows.append((time.perf_counter() - started, time.process_time() - used))
    gathered = mesh.world.all_gather_json(rows)
    if mesh.rank == 0:
        print(json.dumps((kinds, gathered, seconds_of_calls(run, stopwatch))))
    dist.destroy_process_group()


def seconds_of_calls(run: Any, stopwatch: Any) -> float:
    """Return the median seconds of all that rank 0 calls in a step for its figures."""
    from schedules.lower import Action
    from vp_train.metrics.figures import RankFigures, figures_of
    from vp_train.pipeline.stopwatch import Part

    found = []
    for _ in range(200):
        started = time.perf_counter()
        for op in run.plan.program.ranks[0]:
            if op.action is Action.RUN:
                with stopwatch.observe(op.item, int):
                    pass
            elif op.action.waits:
                with stopwatch.waits(op.action, op.item):
                    pass
        for part in (*Part, Part.WAITING):
            stopwatch.switch(part)
        numbers = RankFigures(stopwatch.take(), *run._meter.memory()).numbers()
        figures = figures_of(list(map(RankFigures.of, [numbers] * run.mesh.degrees.num_ranks)))
        found.append(time.perf_counter() - started)
    few = {f"figure_{number}": 0.1 * number for number in range(8)}
    return statistics.median(found) + seconds_of_record(few | figures) - seconds_of_record(few)


def seconds_of_record(values: dict[str, float]) -> float:
    """Return the median seconds of writing one record, for TensorBoard too."""
    from vp_train.metrics.log import MetricsLog

    found = []
    with tempfile.TemporaryDirectory() as directory:
        log = MetricsLog(Path(directory) / "metrics.jsonl", Path(directory) / "tensorboard", 0)
        for step in range(200):
            started = time.perf_counter()
            log.record(step, values)
            found.append(time.perf_counter() - started)
        log.close()
    return statistics.median(found)


def measure(num_ranks: int, model: str, threes: int) -> dict[str, Any]:
    """Run the ranks, and return medians in seconds and the costs as fractions."""
    words = ["--models", f"{model}:{threes}"]
    kinds, of_ranks, calls = result_of_job(__file__, num_ranks, 29619, words)
    found: dict[str, dict[str, list[float]]] = {}
    for name, column, joined in (("seconds", 0, max), ("cpu_seconds", 1, sum)):
        of_steps = [joined(row[column] for row in rows) for rows in zip(*of_ranks, strict=True)]
        found[name] = {
            kind: [
                value
                for value, how in zip(of_steps[WARMUP:], kinds[WARMUP:], strict=True)
                if how == kind
            ]
            for kind in KINDS
        }
    return {
        "ranks": num_ranks,
        "model": model,
        "threes": threes,
        **{
            f"median_{name}": {kind: statistics.median(of_kind) for kind, of_kind in values.items()}
            for name, values in found.items()
        },
        "calls": {
            "seconds": calls,
            "cost": calls / statistics.median(found["seconds"]["without"]),
        },
        "cost": {name: paired(values["with"], values["without"]) for name, values in found.items()},
        "null": {
            name: paired(values["again without"], values["without"])
            for name, values in found.items()
        },
    }


def paired(these: list[float], others: list[float]) -> dict[str, float]:
    """Return the median of these / others - 1 over the threes, and its standard error."""
    ratios = [a / b - 1 for a, b in zip(these, others, strict=True)]
    # Of a median, from the quartiles: 1.2533 sigma / sqrt(n), with sigma = IQR / 1.349.
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "median": statistics.median(ratios),
        "error": 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5,
        "mean": statistics.fmean(these) / statistics.fmean(others) - 1,
    }


def main() -> None:
    """Measure, and print or write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", default="nano:300,small:20")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = [(name, int(count)) for name, count in re.findall(r"([\w.]+):(\d+)", options.models)]
    if options.as_rank:
        ((model, threes),) = models
        rank_main(options.as_rank, model, threes)
        return
    result = provenance() | {
        "models": [measure(options.ranks, model, threes) for model, threes in models]
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
