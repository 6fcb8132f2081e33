"""Bubble against memory: the best schedule known under every cap, and its picture.

    python benchmarks/frontier.py [--ranks 8] [--microbatches 64] [--vocab one_barrier none]
        [--caps 20] [--json FILE] [--picture FILE.png]
    python benchmarks/frontier.py --drawn FILE.json --picture FILE.png

Costs are those of family.py, with an output layer of 2.4 layers.  A cap counts microbatches of a
rank's layers, where a shard held from S to T counts 0.15.  The seconds are those of the processor.
The second form draws a result again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from family import option
from provenance import provenance

from schedules.bound import step_bound
from schedules.generators import GENERATORS, generate, searched_schedules
from schedules.generators.auto import Option, Solution
from schedules.generators.frontier import FrontierPoint, caps_of, frontier
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.commands.frontier import Reached, drawn
from vp_train.commands.plot import Frontier, Marker, frontier_figure

HEAD = 2.4  # layers that the output layer costs


def named(name: str, choice: Option) -> FrontierPoint:
    """Return a named schedule, whose cap is what its fullest rank keeps."""
    schedule = generate(name, choice.problem, choice.cost)
    timeline = simulate(schedule, choice.problem, choice.cost)
    solution = Solution(choice, schedule, step_bound(choice.problem, choice.cost))
    return FrontierPoint(max(timeline.peak_bytes), solution, timeline)


def row(vocab: str, point: FrontierPoint) -> dict[str, Any]:
    """Return the figures of a point for the JSON file."""
    timeline = point.timeline
    return {
        "vocab": vocab,
        "schedule": point.solution.schedule.name,
        "cap": point.cap,
        "bubble_pct": 100 * timeline.mean_bubble,
        "gap_pct": 100 * (timeline.gap or 0.0),
        "peak_microbatches": max(timeline.peak_bytes),
        "makespan": timeline.makespan,
    }


def curve(
    vocab: str, num_ranks: int, num_microbatches: int, most: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of the frontier with at most `most` caps, and those of named schedules."""
    options = {
        name: option(name, VOCAB_ALGORITHMS[vocab], num_microbatches, HEAD, (1.0,) * num_ranks)
        for name in GENERATORS
    }
    known = [named(name, options[name]) for name in searched_schedules()]
    caps = caps_of([*options.values()], most)
    rows, started = list[dict[str, Any]](), time.process_time()
    for point in frontier([*options.values()], caps, named=known):
        bounds = [
            step_bound(choice.problem, choice.cost, (point.cap,) * num_ranks).seconds
            for choice in options.values()
        ]
        least = 1 - (1 - point.timeline.mean_bubble) * point.timeline.makespan / min(bounds)
        taken = time.process_time() - started
        rows.append(row(vocab, point) | {"least_pct": 100 * least, "processor_seconds": taken})
        print(
            f"| `{vocab}` | {point.cap:.4g} | {rows[-1]['bubble_pct']:.2f} % | "
            f"{rows[-1]['least_pct']:.2f} % | {rows[-1]['schedule']} | {taken:.0f} s |",
            flush=True,
        )
    return rows, [row(vocab, point) for point in known]


def read(table: Mapping[str, Any]) -> tuple[list[Frontier], list[Marker]]:
    """Return the lines and marks of a result, in microbatches of a rank's layers."""

    def reached(rows: Sequence[Mapping[str, Any]], kept: str) -> dict[str, list[Reached]]:
        points: dict[str, list[Reached]] = {row["vocab"]: [] for row in rows}
        for row in rows:
            points[row["vocab"]].append(
                Reached(row["schedule"], row[kept], row["bubble_pct"] / 100, row["makespan"])
            )
        return points

    return drawn(reached(table["frontier"], "cap"), reached(table["named"], "peak_microbatches"))


def draw(table: Mapping[str, Any], path: Path) -> None:
    """Draw the rows of a result."""
    sizes = f"{table['ranks']} ranks, {table['microbatches']} microbatches"
    title = f"{sizes}: bubble against memory, simulated"
    frontier_figure(*read(table), title, unit=1.0).savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--vocab", nargs="+", default=["one_barrier", "none"])
    parser.add_argument("--caps", type=int, default=20, help="at most so many per algorithm")
    parser.add_argument("--json", type=Path, help="write the rows as JSON")
    parser.add_argument("--drawn", type=Path, help="search nothing: take the rows of this file")
    parser.add_argument("--picture", type=Path, help="draw them")
    arguments = parser.parse_args()
    p, m = arguments.ranks, arguments.microbatches
    if arguments.drawn is None:
        heads = ("vocab", "cap", "bubble", "least", "found as", "processor, so far")
        print(f"| {' | '.join(heads)} |\n|---|---|---|---|---|---|", flush=True)
        table: dict[str, Any] = {"ranks": p, "microbatches": m, "frontier": [], "named": []}
        for vocab in arguments.vocab:
            rows, points = curve(vocab, p, m, arguments.caps)
            table["frontier"] += rows
            table["named"] += points
    else:
        table = json.loads(arguments.drawn.read_text())
    if arguments.json:
        arguments.json.write_text(json.dumps(provenance() | table, indent=1) + "\n")
    if arguments.picture:
        draw(table, arguments.picture)


if __name__ == "__main__":
    main()
